"""Rules for operations on each entry by itself: sums, products, powers, activations, choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_normdyn.invariance.flow import (
    Blocked,
    Flow,
    Shape,
    Sign,
    compact,
    either,
    everywhere,
    expanded,
    lift,
    shifted,
    varying,
)
from lightning_normdyn.invariance.rules.biases import without_bias_in_part
from lightning_normdyn.invariance.rules.operation import Operation, known, only, pure
from lightning_normdyn.invariance.rules.registry import rule_for


@rule_for(
    "CloneBackward0", "ToCopyBackward0", "AliasBackward0", "NegBackward0",
    "_DDPSinkBackward", "RegisterPostBackwardFunctionBackward", "RegisterPreBackwardFunctionBackward", "RedistributeBackward",
    "NestedRedistributeBackward", "PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward",
)  # fmt: skip
def unchanged(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow | None]:
    """Copies, casts, and the marks that strategies leave in the graph: input k becomes output k."""
    if operation.name == "NegBackward0":
        return [
            flow
            and replace(
                flow, sign=Sign.ANY, offset=flow.offset and flow.offset.changed(flow.offset.varies)
            )
            for flow in flows
        ]
    return flows


@rule_for(
    "ReluBackward0", "LeakyReluBackward0", "LeakyReluBackward1", "PreluKernelBackward0", "RreluWithNoiseBackward0", "AbsBackward0",
)  # fmt: skip
def homogeneous(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """An elementwise function with :math:`f(cx) = c f(x)` for c > 0."""
    flow = pure(operation, only(operation, flows))
    nonnegative = operation.name.startswith(("Relu", "Abs"))
    return replace(flow, sign=max(flow.sign, Sign.NONNEGATIVE) if nonnegative else flow.sign)


@rule_for("SignBackward0", "SgnBackward0")
def _sign(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return Flow(0, pure(operation, only(operation, flows)).rows)


@rule_for("NativeDropoutBackward0", "FusedDropoutBackward0", "TrilBackward0", "TriuBackward0")
def _masked(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    return replace(flow, offset=everywhere(flow))


@rule_for("MaskedFillBackward0", "MaskedFillBackward1")
def _masked_fill(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Zeros and infinities go with any row. The value is not saved: taken as one of these, and the
    claim is marked."""
    flow = lift(only(operation, flows), len(operation.outputs[0]))
    operation.rows.assumed = True
    return replace(flow, offset=everywhere(flow), sign=Sign.ANY)


@rule_for("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1")
def _multiply(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim, power = len(operation.outputs[0]), -1 if operation.name.startswith("Div") else 1
    a, b = (flow and lift(flow, ndim) for flow in [*flows, None][:2])
    if (a is not None and b is not None and a.padded) or (
        power == 1 and a is not None and b is not None and b.padded
    ):
        raise Blocked(f"a constant is added to a factor in {operation.place}")
    if a is not None and b is not None:
        rows = operation.unite(pure(operation, a).rows, pure(operation, b).rows)
        square = operation.node.next_functions[0] == operation.node.next_functions[1]
        nonnegative = square or min(a.sign, b.sign) != Sign.ANY
        return Flow(
            a.degree + power * b.degree, rows, sign=Sign.NONNEGATIVE if nonnegative else Sign.ANY
        )
    if a is None and b is not None and power == -1:
        return Flow(-b.degree, pure(operation, b).rows)
    flow = a if a is not None else b
    assert flow is not None
    other: Shape | None = ()  # the overload with a python number
    if len(flows) > 1:
        other = operation.inputs[1 if a is not None else 0]
    if other is None and flow.offset is not None:  # a constant: saved for the backward
        readable, saved = operation.saved_tensor("other" if a is not None else "self")
        other = tuple(saved.shape) if readable and isinstance(saved, Tensor) else None
    offset = flow.offset and flow.offset.changed(either(flow.offset.varies, varying(other, ndim)))
    sign: Sign = (
        flow.sign if flow.sign == Sign.STATISTIC else Sign.ANY
    )  # a multiple is still padded
    if (
        flow.sign == Sign.NONNEGATIVE
        and len(flows) > 1
        and operation.sign(1 if a is not None else 0) != Sign.ANY
    ):
        sign = Sign.NONNEGATIVE
    return replace(flow, offset=offset, sign=sign)


@rule_for(
    "AddBackward0",
    "AddBackward1",
    "SubBackward0",
    "SubBackward1",
    "RsubBackward0",
    "RsubBackward1",
    "LerpBackward0",
)
def _add(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim = len(operation.outputs[0])
    a, b = (flow and lift(flow, ndim) for flow in [*flows, None][:2])
    if a is not None and b is not None:
        if a.degree != b.degree:
            raise Blocked(f"{operation.place} adds tensors that scale differently")
        offset = a.offset or b.offset
        if a.offset is not None and b.offset is not None:
            plain = operation.name.startswith("Sub") and operation.attribute("alpha", 1) == 1
            same = plain and a.offset.token == b.offset.token  # x - mean(x): what was added cancels
            offset = None if same else a.offset.changed(either(a.offset.varies, b.offset.varies))
        elif offset is not None:
            offset = offset.changed(offset.varies)
        sign = min(a.sign, b.sign) if operation.name.startswith("Add") else Sign.ANY
        return Flow(a.degree, operation.unite(a.rows, b.rows), offset, sign, a.padded or b.padded)
    k = 1 if a is not None else 0
    flow = a if a is not None else b
    assert flow is not None
    if len(flows) == 1:  # a python number
        return (
            operation.forgive(flow, "")
            if flow.sign == Sign.STATISTIC
            else shifted(flow, (False,) * ndim, None)
        )
    other = operation.inputs[k]
    if other is None:
        return operation.forgive(flow, "a constant is added")
    if len(other) > 1 and math.prod(other) == math.prod(operation.outputs[0]):
        raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
    keep = operation.name.startswith("Add") and operation.attribute("alpha", 1) == 1
    if (
        len(other) == 1
        and (parts := without_bias_in_part(operation, flow, k, ndim - 1)) is not None
    ):
        return parts
    return shifted(flow, varying(other, ndim), operation.parameter(k) if keep else None)


@rule_for("MaximumBackward0", "MinimumBackward0", "WhereBackward0")
def _choice(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = (flow and lift(flow, len(operation.outputs[0])) for flow in flows)
    if a is None or b is None:
        flow = a if a is not None else b
        assert flow is not None
        return operation.forgive(flow, "chosen between it and something that does not scale")
    if pure(operation, a).degree != pure(operation, b).degree:
        raise Blocked(f"{operation.place} chooses between tensors that scale differently")
    if operation.name == "WhereBackward0":
        operation.rows.assumed = True  # the condition is not part of the graph
    return Flow(a.degree, operation.unite(a.rows, b.rows), sign=min(a.sign, b.sign))


@rule_for("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMinBackward1")
def _clamp(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    if len(flows) == 1:
        low, high = operation.attribute("min"), operation.attribute("max")
        if low == 0 and high is None:
            return replace(pure(operation, flow), sign=max(flow.sign, Sign.NONNEGATIVE))
    if len(flows) == 3 or (len(flows) == 1 and high is not None):
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    return operation.forgive(flow, "values are cut off")


@rule_for("PowBackward0", "SqrtBackward0", "RsqrtBackward0", "ReciprocalBackward0")
def _power(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = pure(operation, only(operation, flows))
    exponents = {"SqrtBackward0": 0.5, "RsqrtBackward0": -0.5, "ReciprocalBackward0": -1.0}
    exponent = (
        exponents[operation.name]
        if operation.name in exponents
        else float(operation.attribute("exponent"))
    )
    sign = max(flow.sign, Sign.NONNEGATIVE) if exponent % 2 == 0 else flow.sign
    return replace(
        flow, degree=flow.degree * exponent, sign=sign, padded=flow.padded and exponent > 0
    )


@rule_for("GluBackward0")
def _gated(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Gated linear unit, a * sigmoid(b) of the two halves: the scale passes in the first and is
    seen by the second."""
    flow, dim = only(operation, flows), operation.attribute("dim")
    rows, gates = expanded(flow.rows, known(operation.inputs[0]), [dim]).chunk(2, dim)
    operation.rows.forbid(gates, f"gates enter a sigmoid in {operation.place}")
    return Flow(flow.degree, compact(rows), everywhere(flow))
