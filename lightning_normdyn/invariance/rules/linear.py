"""Rules for matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import (
    Blocked,
    Flow,
    Sign,
    compact,
    everywhere,
    expanded,
    joined,
    lift,
    permuted,
    reshaped,
)
from lightning_normdyn.invariance.rules.biases import with_bias, with_bias_named
from lightning_normdyn.invariance.rules.operation import Operation, known, pure, refuse_padded
from lightning_normdyn.invariance.rules.registry import rule_for


def _contract(operation: Operation, a: Flow | None, b: Flow | None) -> Flow:
    """a @ b, both with the same number of dimensions."""
    for factor in (a, b):
        if factor is not None:
            refuse_padded(operation, factor)
    if (
        a is not None
        and b is not None
        and not all(bool(part.rows.all()) for part in (*a.parts, *b.parts))
    ):
        return _contract_parts(operation, a, b)
    left = operation.same_factor(a.rows, [-1]) if a is not None else None
    right = operation.same_factor(b.rows, [-2]) if b is not None else None
    # Sums of products of what is not negative (linear attention): a statistic, as their sum would
    # be.
    sign = Sign.STATISTIC if _product_is_nonnegative(operation, a, b) else Sign.ANY
    if left is not None and right is not None and a is not None and b is not None:
        pure(operation, a), pure(operation, b)
        return Flow(a.degree + b.degree, operation.unite(left, right), sign=sign)
    flow, rows = (a, left) if a is not None else (b, right)
    assert flow is not None
    assert rows is not None
    offset = flow.offset
    if (
        offset is not None
    ):  # the other factor may differ along its own dimensions, and over the batch
        kept = rows.ndim - 2 if a is not None else rows.ndim - 1
        offset = offset.changed(offset.varies[d] if d == kept else True for d in range(rows.ndim))
    return Flow(flow.degree, rows, offset, sign if offset is None else Sign.ANY)


def _contract_parts(operation: Operation, a: Flow, b: Flow) -> Flow:
    """a @ b where only some entries of a factor scale, or by different degrees: linear attention
    pads its values with ones."""
    factors: list[list[tuple[float, Tensor]]] = []
    for flow, dim in ((a, -1), (b, -2)):
        parts = [
            (pure(operation, part).degree, operation.same_factor(part.rows, [dim]))
            for part in flow.parts
        ]
        scales = torch.stack(torch.broadcast_tensors(*[rows > 0 for _, rows in parts])).any(0)  # type: ignore[no-untyped-call]
        factors.append(
            [*parts, (0.0, torch.where(scales, 0, -1))]
        )  # -1: an entry that does not scale
    by_degree: dict[float, Tensor] = {}
    for degree_a, rows_a in factors[0]:
        for degree_b, rows_b in factors[1]:
            left, right = torch.broadcast_tensors(rows_a, rows_b)  # type: ignore[no-untyped-call]
            both, either_one = (
                (left > 0) & (right > 0),
                ((left > 0) & (right < 0)) | ((left < 0) & (right > 0)),
            )
            operation.unite(left[both], right[both])
            rows = torch.where(both | either_one, torch.maximum(left, right), 0)
            degree = round(degree_a + degree_b, 9)
            by_degree[degree] = (
                torch.maximum(by_degree[degree], rows) if degree in by_degree else rows
            )
    return joined(
        [Flow(degree, compact(rows)) for degree, rows in by_degree.items() if bool(rows.any())]
    )


def _product_is_nonnegative(operation: Operation, a: Flow | None, b: Flow | None) -> bool:
    """Whether both factors of a matrix product have no negative entries; a factor that does not
    scale may be any tensor of the graph."""
    if operation.name not in ("MmBackward0", "BmmBackward0"):
        return False
    signs = [
        operation.sign(k) if flow is None else max(flow.sign, operation.sign(k))
        for k, flow in enumerate((a, b))
    ]
    return min(signs) != Sign.ANY


@rule_for("MmBackward0", "BmmBackward0")
def _matmul(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return _contract(operation, flows[0], flows[1])


@rule_for("AddmmBackward0", "BaddbmmBackward0")
def _matmul_plus(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    if flows[0] is not None:
        raise Blocked(f"the scale enters {operation.place} as the term that is added")
    return with_bias(operation, _contract(operation, flows[1], flows[2]), 0, -1)


@rule_for("SparseAddmmBackward0")
def _sparse_matmul(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """A sparse matrix (an adjacency matrix) times a dense one, plus a multiple of another."""
    if flows[0] is not None or flows[1] is not None or operation.attribute("beta", 0) != 0:
        raise Blocked(f"the scale enters {operation.place} by a side input, or something is added")
    return _contract(operation, None, flows[2])


@rule_for("TrilinearBackward0")
def _trilinear(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Sum of products of three tensors (``nn.Bilinear``)."""
    parts = []
    for k, flow in enumerate(flows):
        if flow is not None:
            rows = pure(operation, flow).rows
            for dim in sorted(operation.attribute(f"expand{k + 1}")):
                rows = rows.unsqueeze(dim)
            parts.append((flow.degree, rows))
    rows = parts[0][1]
    for _, other in parts[1:]:
        rows = operation.unite(rows, other)
    summed = operation.attribute("sumdim")
    rows = operation.same_factor(rows, summed)
    for dim in sorted(summed, reverse=True):
        rows = rows.squeeze(dim)
    return Flow(sum(degree for degree, _ in parts), rows)


@rule_for(
    "LinearBackward0", "LinearFunctionForZeroStage3Backward"
)  # DeepSpeed's has the same inputs
def _linear(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim = len(operation.outputs[0])
    weight = flows[1] and lift(permuted(flows[1], [1, 0]), ndim)
    flow = _contract(operation, flows[0], weight)
    return with_bias(operation, flow, 2, -1) if len(flows) > 2 else flow


@rule_for("MvBackward0")
def _matvec(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = flows
    flow = _contract(
        operation,
        a,
        b and reshaped(b, known(operation.inputs[1]), (*known(operation.inputs[1]), 1)),
    )
    return reshaped(flow, (*operation.outputs[0], 1), operation.outputs[0])


@rule_for("DotBackward0", "VdotBackward0")
def _dot(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = (flow and pure(operation, flow) for flow in flows)
    rows = [
        operation.same_factor(flow.rows, [0]).reshape(()) for flow in (a, b) if flow is not None
    ]
    if len(rows) == 2:
        operation.unite(*rows)
    return Flow(sum(flow.degree for flow in (a, b) if flow is not None), rows[0])


@rule_for("ConvolutionBackward0")
def _convolution(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    x, weight = flows[:2]
    if len(flows) > 2 and flows[2] is not None:
        raise Blocked(f"the scale enters {operation.place} as its bias")
    groups, channels, ndim = (
        operation.attribute("groups"),
        operation.outputs[0][1],
        len(operation.outputs[0]),
    )
    parts = []
    offset = None
    if x is not None:
        spatial = range(2, ndim)
        rows = operation.same_factor(x.rows, spatial)
        rows = rows.reshape(rows.size(0), -1)
        if rows.size(1) > 1:
            rows = operation.same_factor(rows.reshape(rows.size(0), groups, -1), [2]).expand(
                -1, -1, channels // groups
            )
        parts.append(compact(rows.reshape(rows.size(0), -1)))
        if x.offset is not None:
            border = any(operation.attribute("padding")) or operation.attribute(
                "transposed"
            )  # what is added meets the zeros around it
            offset = x.offset.changed(
                [x.offset.varies[0], True, *(border or x.offset.varies[d] for d in spatial)]
            )
    if weight is not None:
        pure(operation, weight)
        shape = known(operation.inputs[1])
        if operation.attribute("transposed"):
            rows = expanded(operation.same_factor(weight.rows, range(2, ndim)), shape, [0, 1])
            rows = operation.same_factor(rows.reshape(groups, shape[0] // groups, shape[1]), [1])
        else:
            rows = expanded(operation.same_factor(weight.rows, range(1, ndim)), shape, [0])
        parts.append(rows.reshape(1, channels))
    if x is not None and weight is not None:
        pure(operation, x)
        parts[0] = operation.unite(parts[1], parts[0])
    flow = Flow(
        sum(f.degree for f in (x, weight) if f is not None),
        parts[0].reshape(*parts[0].shape, *[1] * (ndim - 2)),
        offset,
    )
    if any(operation.attribute("bias_sym_sizes_opt") or ()):
        flow = with_bias_named(operation, flow)
    return flow


@rule_for(
    "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0", "ScaledDotProductFusedAttentionOverrideableBackward0",
)  # fmt: skip
def _attention(operation: Operation, flows: Sequence[Flow | None]) -> Flow | None:
    for k, flow in enumerate(flows):
        if (
            k != 2 and flow is not None
        ):  # only these rows are lost: those of the values in the same weight may be free
            operation.rows.forbid(
                flow.rows, f"queries, keys and masks enter a softmax in {operation.place}"
            )
    value = flows[2]
    if value is None:
        return None
    rows, heads = operation.same_factor(value.rows, [-2]), operation.outputs[0][-3]
    if rows.size(-3) not in (1, heads):  # grouped queries: several heads share their values
        rows = rows.repeat_interleave(heads // rows.size(-3), -3)
    return Flow(value.degree, rows, everywhere(value))
