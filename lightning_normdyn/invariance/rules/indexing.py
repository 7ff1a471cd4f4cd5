"""Rules for operations that pick or write entries at places that a tensor of indices gives.

Where the data say which rows are read, the rows that were stand for the others: they are remembered
in `Rows.picked`. Indices that are saved inside a checkpoint are not looked at.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import NO_ROW, Blocked, Flow, Flows, Offset, Sign, compact
from lightning_normdyn.invariance.rows import distinct

from .operation import Operation, Result, present, rule_for, unary_rule

Index = Sequence[Tensor | None]

# --------------------------------------------------------------------------------- picking entries


@unary_rule("IndexSelectBackward0")
def _index_select(operation: Operation, flow: Flow) -> Flow:
    """Entries along one dimension, at indices that the data may give."""
    dim = operation.dim()
    operation.left_out(flow, [dim])
    index = operation.indices("index", flow, [dim])
    rows = flow.rows
    # One row for the whole dimension is also that of whatever is picked from it.
    if rows.size(dim) > 1:
        rows = compact(rows.index_select(dim, index.cpu()))
        operation.rows.pick(rows)
    return flow.moved(rows, [dim])


@unary_rule("GatherBackward0")
def _gather(operation: Operation, flow: Flow) -> Flow:
    """Entries along one dimension, at other indices for every place of the others."""
    shape = operation.shape()
    out = operation.out
    if not shape:
        return flow
    dim = operation.dim()
    rows = flow.rows
    wide = list(out)
    wide[dim] = shape[dim]
    smaller = []
    for other in range(len(shape)):
        # The index may be smaller than the tensor along the other dimensions.
        if other != dim and out[other] < shape[other]:
            smaller.append(other)
            if rows.size(other) > 1:
                rows = rows.narrow(other, 0, out[other])
    operation.left_out(flow, [dim, *smaller])
    index = operation.indices("index", flow, [dim])
    if rows.size(dim) > 1:
        picked = rows.expand(wide).gather(dim, index.cpu())
        rows = compact(picked)
        operation.rows.pick(rows)
    return flow.moved(rows, range(len(shape)))


@unary_rule("MaskedSelectBackward0 TakeBackward0")
def _select_entries(operation: Operation, flow: Flow) -> Flow:
    """Entries are picked from anywhere in the tensor, into one dimension."""
    shape = operation.shape()
    everything = range(len(shape))
    is_masked = operation.name == "MaskedSelectBackward0"
    operation.left_out(flow, everything)
    index = operation.indices("mask" if is_masked else "index", flow, everything)
    if index is None:
        return Flow(flow.degree, flow.rows.reshape(1), flow.offset_everywhere(1))
    rows = flow.rows.expand(shape)
    if is_masked:
        rows = rows.masked_select(index.cpu())
    else:
        rows = rows.take(index.cpu())
    operation.rows.pick(rows)
    return Flow(flow.degree, compact(rows), flow.offset_everywhere(rows.ndim))


@unary_rule("IndexBackward0")
def _index(operation: Operation, flow: Flow) -> Flow:
    """``tensor[index]`` with tensors of indices and masks."""
    shape = operation.shape()
    index = operation.indices("indices", flow, range(len(shape)))
    if index is None:
        # Nothing differs, but how many dimensions are left, and where, is not known.
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    # A mask or a list of indices may leave rows out, even if it left none in this batch.
    dims = _indexed_dims(index)
    operation.left_out(flow, dims)
    rows = flow.rows.expand(shape)[_on_cpu(index)]
    if any(flow.rows.size(d) > 1 for d in dims):
        operation.rows.pick(rows)
    offset = flow.offset
    if offset:
        offset = _offset_at(offset, dims, rows.ndim)
    return replace(flow, rows=compact(rows), offset=offset)


def _on_cpu(index: Index) -> tuple[Any, ...]:
    """What ``tensor[index]`` takes, with a slice where nothing is indexed."""
    return tuple(slice(None) if i is None else i.cpu() for i in index)


def _indexed_dims(index: Index) -> list[int]:
    """The dimensions of ``tensor`` that ``tensor[index]`` picks from."""
    dims: list[int] = []
    start = 0
    for i in index:
        stop = start + 1
        # A mask stands for as many dimensions as it has itself.
        if i is not None and i.dtype in (torch.bool, torch.uint8):
            stop = start + i.ndim
        if i is not None:
            dims.extend(range(start, stop))
        start = stop
    return dims


def _offset_at(
    offset: Offset,
    dims: Sequence[int],
    ndim: int,
) -> Offset:
    """The offset of ``tensor[index]``, of ``ndim`` dimensions, where the index picks from ``dims``:
    the others keep it entry for entry."""
    stays = [v for d, v in enumerate(offset.varies) if d not in dims]
    # What is indexed comes out where the indices stand, if they stand side by side, and else in
    # front.
    start = 0
    if dims[-1] - dims[0] < len(dims):
        start = dims[0]
    is_indexed = offset.differs_along(dims)
    picked = [is_indexed] * (ndim - len(stays))
    varies = (*stays[:start], *picked, *stays[start:])
    if is_indexed:
        return offset.changed(varies)
    return replace(offset, varies=varies, token=object())


# --------------------------------------------------------------------------------- writing entries


@rule_for("IndexPutBackward0")
def _index_put(operation: Operation, flows: Flows) -> Result:
    """``tensor[indices] = values``: what is not written over stays what it was."""
    if operation.attribute("accumulate"):
        return _accumulate(operation, flows)
    readable, index = operation.saved_tensor("indices")
    if not readable:
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    target, values = flows
    _, flow = present(flows)
    # What is written over loses its offset and the rest keeps it: no one offset is right.
    operation.pure(flow)
    rows = target.rows if target else NO_ROW
    # A copy: the target's own flow, which other operations may read, stays as it is.
    rows = rows.expand(operation.out).clone()

    written = NO_ROW
    if values:
        if operation.pure(values).degree != flow.degree:
            raise Blocked(f"{operation.place} writes into a tensor that scales differently")
        written = values.rows
        if any(rows.size(d) > 1 for d in _indexed_dims(index)):
            # Where they come to lie, and so what they meet there, depends on the data.
            operation.rows.pick(written)
    rows[_on_cpu(index)] = written
    return Flow(flow.degree, compact(rows))


@rule_for("IndexAddBackward0 ScatterAddBackward0 ScatterReduceBackward0 IndexReduceBackward0")
def _accumulate(operation: Operation, flows: Flows) -> Flow:
    """Entries are added, averaged or compared at indices along one dimension (messages between the
    nodes of a graph).

    A constant to add to is taken as zeros, and the claim is marked.
    """
    target, source = flows
    out = operation.out
    dims = [operation.attribute("dim", 0) % len(out)]
    if operation.name == "IndexPutBackward0":
        # At any index of the whole tensor.
        dims = list(range(len(out)))
    if not target:
        _, source = present(flows)
        added = _gathered_at(operation, source, dims)
        # A target that requires grad is no fresh `torch.zeros`.
        if operation.inputs[0] is not None:
            raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
        # A constant target, nearly always `torch.zeros`.
        operation.rows.assumed = True
        return added

    _refuse_products(operation, target)
    if not source:
        if 0 in (operation.inputs[1] or ()):
            # An expert without tokens adds nothing.
            return target
        raise Blocked(f"a constant is added in {operation.place}")

    added = _gathered_at(operation, source, dims)
    # What is added lies beside what was there: both must scale alike.
    if target.degree != source.degree:
        raise Blocked(f"{operation.place} adds tensors that scale differently")
    offset = added.offset
    if target.offset:
        offset = target.offset.changed([True] * len(out))
    rows = operation.same_factor(target.rows, dims)
    rows = operation.unite(rows, added.rows)
    sign = _sign_of_sums(operation, min(target.sign, source.sign))
    return Flow(source.degree, rows, offset, sign)


@unary_rule("SegmentReduceBackward0")
def _segment_reduce(operation: Operation, flow: Flow) -> Flow:
    """Neighbours along one axis are added, averaged or compared."""
    axis = operation.attribute("axis", 0) % len(operation.out)
    return _gathered_at(operation, flow, [axis])


def _gathered_at(
    operation: Operation,
    source: Flow,
    dims: list[int],
) -> Flow:
    """What comes out where entries of ``source`` come together along ``dims``."""
    _refuse_products(operation, source)
    out = operation.out
    rows = source.rows
    # Which entries come together depends on the data, so all along these dimensions do.
    if rows.ndim == len(out):
        rows = operation.same_factor(rows, dims)
    else:
        rows = operation.same_factor(rows, range(rows.ndim))
        rows = rows.reshape([1] * len(out))
    # `scatter` reads a source only as far as its index goes: which rows these are is not followed.
    if any(size not in (1, out[d]) for d, size in enumerate(rows.shape)):
        raise Blocked(f"no rule for {operation.place} with a source that is larger than its target")
    sign = _sign_of_sums(operation, source.sign)
    return Flow(source.degree, rows, source.offset_everywhere(len(out)), sign)


def _refuse_products(operation: Operation, flow: Flow) -> None:
    """Products change the degree entry by entry, and the largest may change with what was added."""
    reduce = operation.attribute("reduce", "sum")
    if reduce == "prod":
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    if reduce in ("amax", "amin", "max", "min"):
        operation.pure(flow)


def _sign_of_sums(operation: Operation, lowest: Sign) -> Sign:
    """Sums and means of squares over the nodes of a graph are statistics, as they are over an
    axis."""
    is_sum = operation.attribute("reduce", "sum") in ("sum", "mean")
    if is_sum and lowest != Sign.ANY:
        return Sign.STATISTIC
    return lowest


# ---------------------------------------------------------------------------------------- lookups


@unary_rule("EmbeddingBackward0")
def _embedding(operation: Operation, flow: Flow) -> Flow:
    """Rows of a table: each index reads one, so they need not be scaled together."""
    index = _indices_of_lookup(operation, flow)
    rows = flow.rows
    out = operation.out
    if rows.size(0) == 1:
        # Cut along its columns, the table looks the same from every index.
        columns = [1] * len(out)
        columns[-1] = rows.size(1)
        return replace(flow, rows=rows.reshape(columns))
    rows = rows[index.cpu()]
    operation.rows.pick(rows)
    return replace(flow, rows=rows)


@unary_rule("EmbeddingBagBackward0")
def _embedding_bag(operation: Operation, flow: Flow) -> Flow:
    """Rows of a table are added, averaged or compared: which ones meet depends on the data, so all
    that occur go together."""
    index = _indices_of_lookup(operation, flow)
    rows = flow.rows
    if rows.size(0) > 1:
        rows = rows[distinct(index.cpu())]
        operation.rows.pick(rows)
    rows = operation.same_factor(rows, [0])
    return replace(flow, rows=rows, sign=Sign.ANY)


def _indices_of_lookup(operation: Operation, flow: Flow) -> Any:
    """Which rows of a table are read; None where that cannot be seen and does not matter."""
    operation.pure(flow)
    name, module = operation.module
    if getattr(module, "max_norm", None) is not None:
        # It changes the length of rows before it reads them.
        raise Blocked(
            f"max_norm of {name or operation.name} rescales the rows in every forward pass"
        )
    operation.left_out(flow, [0])
    return operation.indices("indices", flow, [0])
