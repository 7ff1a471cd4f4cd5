"""Rules for operations on each entry by itself: sums, products, powers, activations, choices."""

import math
from dataclasses import replace

from torch import Tensor

from lightning_normdyn.invariance.flow import (
    Blocked,
    Flow,
    Flows,
    Shape,
    Sign,
    compact,
    expanded,
    spread,
    varying,
)

from .biases import with_input
from .operation import Operation, present, rule_for, unary_rule


# Those behind `AliasBackward0` are what strategies leave in the graph: DDP, FSDP2, DeepSpeed,
# DTensor.
@rule_for("""
    CloneBackward0 ToCopyBackward0 AliasBackward0 _DDPSinkBackward
    RegisterPostBackwardFunctionBackward RegisterPreBackwardFunctionBackward
    PreBackwardFunctionForModuleBackward PostBackwardFunctionModuleBackward RedistributeBackward
    NestedRedistributeBackward
""")
def unchanged(operation: Operation, flows: Flows) -> Flows:
    """Copies, casts, and the marks of strategies: input k becomes output k."""
    return flows


@unary_rule("NegBackward0")
def negated(operation: Operation, flow: Flow) -> Flow:
    """The scale passes, but the offset is another one, and what was not negative is."""
    # x - b and -x + b have different offsets: they must not cancel in a difference.
    changed = spread(flow.offset, ())
    return replace(flow, offset=changed, sign=Sign.ANY)


@unary_rule("""
    ReluBackward0 AbsBackward0 LeakyReluBackward0 LeakyReluBackward1 PreluKernelBackward0
    RreluWithNoiseBackward0
""")
def homogeneous(operation: Operation, flow: Flow) -> Flow:
    """An elementwise function with :math:`f(cx) = c f(x)` for c > 0."""
    operation.pure(flow)
    if operation.name.startswith(("Relu", "Abs")):
        return _nonnegative(flow)
    return flow


def _nonnegative(flow: Flow) -> Flow:
    return replace(flow, sign=max(flow.sign, Sign.NONNEGATIVE))


@unary_rule("SignBackward0 SgnBackward0")
def _sign(operation: Operation, flow: Flow) -> Flow:
    """A sign does not depend on a positive scale, so this is a normalization."""
    return Flow(0, operation.pure(flow).rows)


@unary_rule("NativeDropoutBackward0 FusedDropoutBackward0 TrilBackward0 TriuBackward0")
def _masked(operation: Operation, flow: Flow) -> Flow:
    """Zeros go with any row, but they stand in the place of what was added, too."""
    return replace(flow, offset=flow.offset_everywhere())


@unary_rule("MaskedFillBackward0 MaskedFillBackward1")
def _masked_fill(operation: Operation, flow: Flow) -> Flow:
    """Zeros and infinities go with any row.

    The value is not saved: it is taken as one of these, and the claim is marked.
    """
    operation.rows.assumed = True
    flow = flow.lifted(len(operation.out))
    return replace(flow, offset=flow.offset_everywhere(), sign=Sign.ANY)


@unary_rule("GluBackward0")
def _gated(operation: Operation, flow: Flow) -> Flow:
    """Gated linear unit, a * sigmoid(b) of the two halves: the scale passes in the first and is
    seen by the second."""
    dim = operation.attribute("dim")
    # The gates are lost, but the values in the same weight may be free.
    rows = expanded(flow.rows, operation.shape(), [dim])
    rows, gates = rows.chunk(2, dim)
    operation.rows.forbid(gates, f"gates enter a sigmoid in {operation.place}")
    return Flow(flow.degree, compact(rows), flow.offset_everywhere())


# ------------------------------------------------------------------------------ products and powers


def _operands(operation: Operation, flows: Flows) -> tuple[Flow | None, Flow | None]:
    """The flows of two operands, broadcast. A python number as the second is no input."""
    ndim = len(operation.out)
    aligned = [flow and flow.lifted(ndim) for flow in (*flows, None)]
    return aligned[0], aligned[1]


@rule_for("MulBackward0 MulBackward1 DivBackward0 DivBackward1")
def _multiply(operation: Operation, flows: Flows) -> Flow:
    """Degrees add up in a product and are subtracted in a quotient; a constant factor has none."""
    a, b = _operands(operation, flows)
    is_quotient = operation.name.startswith("Div")
    if a and b:
        return _product(operation, a, b, is_quotient)
    if b and is_quotient:
        # A constant over the flow: the degree changes its sign.
        return Flow(-b.degree, operation.pure(b).rows)
    k, flow = present((a, b))
    # A python number has no dimension.
    shape: Shape | None = ()
    if len(flows) == 2:
        shape = operation.inputs[1 - k]
    if shape is None and flow.offset:
        # The shape of a constant is known where it is saved for the backward.
        _, saved = operation.saved_tensor(("other", "self")[k])
        if isinstance(saved, Tensor):
            shape = tuple(saved.shape)
    offset = flow.offset
    if offset:
        offset = offset.widened(varying(shape, len(operation.out)))
    # A multiple of a statistic is still padded with an epsilon only.
    sign = flow.sign
    if sign == Sign.NONNEGATIVE and operation.sign(1 - k) == Sign.ANY:
        sign = Sign.ANY
    return replace(flow, offset=offset, sign=sign)


def _product(
    operation: Operation,
    a: Flow,
    b: Flow,
    is_quotient: bool,
) -> Flow:
    """Both factors depend on the weight: degrees add up, and partners share a factor."""
    # In a denominator, and there alone, the constant beside a statistic is an epsilon.
    if a.padded or (b.padded and not is_quotient):
        raise Blocked(f"a constant is added to a factor in {operation.place}")
    rows = operation.unite(operation.pure(a).rows, operation.pure(b).rows)
    # A square is not negative, whatever is known of its factor.
    sign = min(a.sign, b.sign, Sign.NONNEGATIVE)
    if operation.source(0) == operation.source(1):
        sign = Sign.NONNEGATIVE
    power = -b.degree if is_quotient else b.degree
    return Flow(a.degree + power, rows, sign=sign)


@unary_rule("PowBackward0 SqrtBackward0 RsqrtBackward0 ReciprocalBackward0")
def _power(operation: Operation, flow: Flow) -> Flow:
    """The degree is multiplied by the exponent."""
    operation.pure(flow)
    # An offset cannot be followed through a power: (x + b)^2 mixes two degrees.
    exponents = {"SqrtBackward0": 0.5, "RsqrtBackward0": -0.5, "ReciprocalBackward0": -1.0}
    exponent: float = operation.attribute("exponent", exponents.get(operation.name))
    if exponent % 2 == 0:
        flow = _nonnegative(flow)
    # Below a fraction bar the constant beside a statistic has become harmless.
    padded = flow.padded and exponent > 0
    return replace(flow, degree=flow.degree * exponent, padded=padded)


# ------------------------------------------------------------------------------------ sums, choices


@rule_for("""
    AddBackward0 AddBackward1 SubBackward0 SubBackward1 RsubBackward0 RsubBackward1 LerpBackward0
""")
def _add(operation: Operation, flows: Flows) -> Flow:
    """Terms must scale alike. A constant is an offset, or an epsilon beside a statistic."""
    a, b = _operands(operation, flows)
    if a and b:
        return _sum_of_two(operation, a, b)
    k, flow = present((a, b))
    out = operation.out
    if len(flows) == 1 and flow.sign != Sign.STATISTIC:
        return flow.shifted((False,) * len(out))
    # Of a constant not even the shape is known: beside a statistic it is an epsilon, as a python
    # number is.
    shape = None
    if len(flows) == 2:
        shape = operation.inputs[1 - k]
    if shape is None:
        return operation.forgive(flow, "a constant is added")
    if len(shape) > 1 and math.prod(shape) == math.prod(out):
        # As large as the result: a residual stream, and no bias.
        raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
    # With a sign or a factor it is not the parameter itself that is added.
    parameter = None
    is_plain = operation.attribute("alpha", 1) == 1
    if is_plain and operation.name.startswith("Add"):
        parameter = operation.parameter(1 - k)
    return with_input(operation, flow, 1 - k, varying(shape, len(out)), parameter)


def _sum_of_two(
    operation: Operation,
    a: Flow,
    b: Flow,
) -> Flow:
    """Both terms depend on the weight."""
    # c^2 x + c y is no power of c times anything.
    if a.degree != b.degree:
        raise Blocked(f"{operation.place} adds tensors that scale differently")
    offset = spread(a.offset or b.offset, ())
    if a.offset and b.offset:
        is_plain = operation.attribute("alpha", 1) == 1
        is_difference = is_plain and operation.name.startswith("Sub")
        offset = a.offset.widened(b.offset.varies)
        if is_difference and a.offset.token == b.offset.token:
            # x - mean(x): what was added to both cancels.
            offset = None
    sign = Sign.ANY
    if operation.name.startswith("Add"):
        sign = min(a.sign, b.sign)
    rows = operation.unite(a.rows, b.rows)
    return Flow(a.degree, rows, offset, sign, a.padded or b.padded)


@rule_for("MaximumBackward0 MinimumBackward0 WhereBackward0")
def _choice(operation: Operation, flows: Flows) -> Flow:
    """One of two tensors, entry by entry: they must scale alike."""
    a, b = _operands(operation, flows)
    if not (a and b):
        _, flow = present((a, b))
        return operation.forgive(flow, "chosen between it and something that does not scale")
    if operation.pure(a).degree != operation.pure(b).degree:
        raise Blocked(f"{operation.place} chooses between tensors that scale differently")
    if operation.name == "WhereBackward0":
        # The condition is not part of the graph: it may look at the scale.
        operation.rows.assumed = True
    rows = operation.unite(a.rows, b.rows)
    return Flow(a.degree, rows, sign=min(a.sign, b.sign))


@rule_for("ClampBackward0 ClampBackward1 ClampMinBackward0 ClampMinBackward1")
def _clamp(operation: Operation, flows: Flows) -> Flow:
    """Only a bound of 0 scales with everything; a small one beside a statistic is an epsilon."""
    flow = operation.only(flows)
    may_cut_above = len(flows) == 3
    if len(flows) == 1:
        # Bounds by numbers. Those by tensors are not looked at.
        low = operation.attribute("min")
        high = operation.attribute("max")
        if low == 0 and high is None:
            return _nonnegative(operation.pure(flow))
        may_cut_above = high is not None
    if may_cut_above:
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    return operation.forgive(flow, "values are cut off")
