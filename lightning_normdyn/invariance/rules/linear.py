"""Rules for matrix products, convolutions and attention."""

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import (
    Blocked,
    Flow,
    Flows,
    Offset,
    Sign,
    compact,
    expanded,
    joined,
)

from .biases import with_bias, with_bias_of_channels
from .operation import Operation, present, rule_for

# -------------------------------------------------------------------------------- matrix products


@rule_for("MmBackward0 BmmBackward0")
def _matmul(operation: Operation, flows: Flows) -> Flow:
    """A product of two matrices."""
    return _contract(operation, *flows)


@rule_for("AddmmBackward0 BaddbmmBackward0")
def _matmul_plus(operation: Operation, flows: Flows) -> Flow:
    """A product of two matrices plus a bias, as a linear layer does it."""
    added, *factors = flows
    if added is not None:
        raise Blocked(f"the scale enters {operation.place} as the term that is added")
    product = _contract(operation, *factors)
    return with_bias(operation, product, 0)


@rule_for("SparseAddmmBackward0")
def _sparse_matmul(operation: Operation, flows: Flows) -> Flow:
    """A sparse matrix (an adjacency matrix) times a dense one, plus a multiple of another."""
    *others, dense = flows
    if any(others) or operation.attribute("beta", 0) != 0:
        raise Blocked(f"the scale enters {operation.place} by a side input, or something is added")
    return _contract(operation, None, dense)


# The function of DeepSpeed's stage 3 has the same inputs as torch's.
@rule_for("LinearBackward0 LinearFunctionForZeroStage3Backward")
def _linear(operation: Operation, flows: Flows) -> Flow:
    """``x @ weight.T + bias``."""
    x, weight, *bias = flows
    if weight:
        # torch stores it as (outputs, inputs).
        transposed = weight.permuted([1, 0])
        weight = transposed.lifted(len(operation.out))
    flow = _contract(operation, x, weight)
    if bias:
        return with_bias(operation, flow, 2)
    return flow


@rule_for("MvBackward0")
def _matvec(operation: Operation, flows: Flows) -> Flow:
    """A vector is a matrix with one column."""
    matrix, vector = flows
    if vector:
        vector = vector.unsqueezed(1)
    flow = _contract(operation, matrix, vector)
    out = operation.out
    return flow.reshaped((*out, 1), out)


@rule_for("DotBackward0 VdotBackward0")
def _dot(operation: Operation, flows: Flows) -> Flow:
    """A product of two vectors is one number."""
    degree: float = 0
    rows = []
    for flow in flows:
        if flow:
            degree += operation.pure(flow).degree
            one = operation.same_factor(flow.rows, [0])
            rows.append(one.reshape(()))
    # Where only one factor depends on the weight, both are the same, and this does nothing.
    operation.unite(rows[0], rows[-1])
    return Flow(degree, rows[0])


@rule_for("TrilinearBackward0")
def _trilinear(operation: Operation, flows: Flows) -> Flow:
    """Sum of products of three tensors (``nn.Bilinear``)."""
    degree: float = 0
    rows = None
    for k, flow in enumerate(flows):
        if not flow:
            continue
        degree += flow.degree
        factor = operation.pure(flow).rows
        # This factor lacks these dimensions of the product: one row holds along them.
        for dim in sorted(operation.attribute(f"expand{k + 1}")):
            factor = factor.unsqueeze(dim)
        rows = factor if rows is None else operation.unite(rows, factor)
    assert rows is not None
    summed = operation.attribute("sumdim")
    rows = operation.same_factor(rows, summed)
    return Flow(degree, rows.squeeze(tuple(summed)))


def _contract(
    operation: Operation,
    a: Flow | None,
    b: Flow | None,
) -> Flow:
    """a @ b, both with the same number of dimensions."""
    for factor in (a, b):
        if factor is not None:
            operation.refuse_padded(factor)
    sign = _sign_of_product(operation, (a, b))
    if a and b:
        if not (_scales_everywhere(a) and _scales_everywhere(b)):
            return _contract_parts(operation, a, b)
        left = operation.same_factor(operation.pure(a).rows, [-1])
        right = operation.same_factor(operation.pure(b).rows, [-2])
        # The product of a weight with itself, or of two layers that share one.
        rows = operation.unite(left, right)
        return Flow(a.degree + b.degree, rows, sign=sign)

    k, flow = present((a, b))
    # Columns of the left factor meet rows of the right one.
    rows = operation.same_factor(flow.rows, [-1 - k])
    offset = flow.offset
    if offset:
        # The other factor may differ along its own dimensions, and over the batch.
        varies = [True] * rows.ndim
        varies[k - 2] = offset.varies[k - 2]
        offset = offset.changed(varies)
        sign = Sign.ANY
    return Flow(flow.degree, rows, offset, sign)


def _scales_everywhere(flow: Flow) -> bool:
    return all(bool(part.rows.all()) for part in flow.parts)


def _sign_of_product(operation: Operation, factors: tuple[Flow | None, Flow | None]) -> Sign:
    """Sums of products of what is not negative (linear attention): a statistic, as their sum would
    be."""
    if operation.name not in ("MmBackward0", "BmmBackward0"):
        return Sign.ANY
    for k, flow in enumerate(factors):
        # A factor that does not scale may be any tensor of the graph.
        sign = operation.sign(k)
        if flow:
            sign = max(flow.sign, sign)
        if sign == Sign.ANY:
            return Sign.ANY
    return Sign.STATISTIC


# Stands for an entry that does not scale, where 0 says that a part knows nothing of it.
_CONSTANT = -1


def _contract_parts(
    operation: Operation,
    a: Flow,
    b: Flow,
) -> Flow:
    """a @ b where only some entries of a factor scale, or by different degrees: linear attention
    pads its values with ones."""
    by_degree: dict[float, Tensor] = {}
    for degree_a, rows_a in _terms(operation, a, -1):
        for degree_b, rows_b in _terms(operation, b, -2):
            # Every term of a with every term of b, entry by entry of the product.
            left, right = torch.broadcast_tensors(rows_a, rows_b)  # type: ignore[no-untyped-call]
            both = (left > 0) & (right > 0)
            operation.unite(left[both], right[both])
            # 0 on either side: another pair of terms tells of this entry.
            known = (left != 0) & (right != 0)
            row = torch.maximum(left, right).clamp(min=0)
            rows = torch.where(known, row, 0)
            degree = round(degree_a + degree_b, 9)
            if degree in by_degree:
                rows = torch.maximum(by_degree[degree], rows)
            by_degree[degree] = rows
    parts = []
    for degree, rows in by_degree.items():
        if bool(rows.any()):
            parts.append(Flow(degree, compact(rows)))
    return joined(parts)


def _terms(
    operation: Operation,
    flow: Flow,
    dim: int,
) -> list[tuple[float, Tensor]]:
    """The parts of a factor that is summed along ``dim``, and what does not scale as one more of
    degree 0."""
    terms = []
    constant = torch.full((), _CONSTANT, dtype=torch.long, device="cpu")
    for part in flow.parts:
        rows = operation.same_factor(operation.pure(part).rows, [dim])
        terms.append((part.degree, rows))
        constant = torch.where(rows > 0, 0, constant)
    return [*terms, (0.0, constant)]


# ------------------------------------------------------------------------------------ convolutions


@rule_for("ConvolutionBackward0")
def _convolution(operation: Operation, flows: Flows) -> Flow:
    """Each output channel sums over the inputs of its group."""
    # Both x and weight where a weight is used in two layers, or was computed from another.
    x, weight, *bias = flows
    if any(bias):
        raise Blocked(f"the scale enters {operation.place} as its bias")
    degree: float = 0
    offset = None
    channels = []
    if weight:
        degree += operation.pure(weight).degree
        channels.append(_channels_of_weight(operation, weight))
    if x:
        offset = _offset_of_input(operation, x)
        if weight:
            operation.pure(x)
        degree += x.degree
        channels.append(_channels_of_input(operation, x))
    # Where only one of them depends on the weight, both are the same, and nothing is united.
    rows = operation.unite(channels[0], channels[-1])

    spatial = [1] * (len(operation.out) - 2)
    flow = Flow(degree, rows.reshape(*rows.shape, *spatial), offset)
    if any(operation.attribute("bias_sym_sizes_opt") or ()):
        return with_bias_of_channels(operation, flow)
    return flow


def _channels_of_input(operation: Operation, x: Flow) -> Tensor:
    """The row that each output channel of each sample scales with, as its inputs do: ``(samples or
    1, channels or 1)``."""
    spatial = range(2, x.ndim)
    rows = operation.same_factor(x.rows, spatial).flatten(1)
    if rows.size(1) == 1:
        return rows
    # Every output of a group sums over all inputs of the group.
    groups = operation.attribute("groups")
    channels = operation.out[1]
    rows = rows.reshape(rows.size(0), groups, -1)
    rows = operation.same_factor(rows, [2])
    outputs = rows.expand(-1, -1, channels // groups)
    return compact(outputs.flatten(1))


def _offset_of_input(operation: Operation, x: Flow) -> Offset | None:
    if not x.offset:
        return None
    samples, _, *spatial = x.offset.varies
    if any(operation.attribute("padding")) or operation.attribute("transposed"):
        # What is added meets the zeros around it.
        spatial = [True] * len(spatial)
    # Every output channel weighs what was added by a filter of its own.
    return x.offset.changed([samples, True, *spatial])


def _channels_of_weight(operation: Operation, weight: Flow) -> Tensor:
    """The row that each output channel scales with, as its filter does: ``(1, channels)``."""
    shape = operation.shape(1)
    ndim = weight.ndim
    if operation.attribute("transposed"):
        # (inputs, outputs of one group, ...): a filter is one column within its group.
        rows = operation.same_factor(weight.rows, range(2, ndim))
        groups = operation.attribute("groups")
        rows = expanded(rows, shape, [0, 1])
        rows = rows.reshape(groups, -1, shape[1])
        rows = operation.same_factor(rows, [1])
    else:
        rows = operation.same_factor(weight.rows, range(1, ndim))
        rows = expanded(rows, shape, [0])
    return rows.reshape(1, operation.out[1])


# --------------------------------------------------------------------------------------- attention


@rule_for("""
    ScaledDotProductFlashAttentionForCpuBackward0 ScaledDotProductFlashAttentionBackward0
    ScaledDotProductEfficientAttentionBackward0 ScaledDotProductCudnnAttentionBackward0
    ScaledDotProductFusedAttentionOverrideableBackward0
""")
def _attention(operation: Operation, flows: Flows) -> Flow | None:
    """Values are averaged over positions; a softmax sees the scale of queries and keys."""
    value = flows[2]
    for k, flow in enumerate(flows):
        if flow and k != 2:
            # Only these rows are lost: those of the values in the same weight may be free.
            reason = f"queries, keys and masks enter a softmax in {operation.place}"
            operation.rows.forbid(flow.rows, reason)
    if not value:
        return None
    rows = operation.same_factor(value.rows, [-2])
    heads = operation.out[-3]
    if rows.size(-3) not in (1, heads):
        # Grouped queries: several heads share their values.
        rows = rows.repeat_interleave(heads // rows.size(-3), -3)
    return Flow(value.degree, rows, value.offset_everywhere())
