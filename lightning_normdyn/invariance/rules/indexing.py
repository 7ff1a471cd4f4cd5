"""Rules for operations that pick or write entries at places that a tensor of indices gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import Blocked, Flow, Offset, Sign, compact, moved, new_token
from lightning_normdyn.invariance.rows import distinct
from lightning_normdyn.invariance.rules.operation import Operation, known, only, pure
from lightning_normdyn.invariance.rules.registry import rule_for


@rule_for("IndexSelectBackward0")
def _index_select(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), known(operation.inputs[0])
    dim = operation.attribute("dim") % len(shape)
    operation.left_out(flow, [dim])
    index = operation.indices("index", flow, [dim])
    rows = flow.rows
    if rows.size(dim) > 1:
        rows = compact(rows.index_select(dim, index.cpu()))
        operation.rows.pick(distinct(rows))
    return moved(flow, rows, [dim])


@rule_for("IndexBackward0")
def _index(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), known(operation.inputs[0])
    index = operation.indices("indices", flow, range(len(shape)))
    if index is None:  # nothing differs, but how many dimensions are left, and where, is not known
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    dims = _indexed_dims(index)
    operation.left_out(flow, dims)
    rows = flow.rows.expand(shape)[tuple(slice(None) if i is None else i.cpu() for i in index)]
    if any(flow.rows.size(d) > 1 for d in dims):
        operation.rows.pick(distinct(rows))
    return replace(
        flow, rows=compact(rows), offset=flow.offset and _picked(flow.offset, index, rows.ndim)
    )


def _indexed_dims(index: Sequence[Tensor | None]) -> list[int]:
    """The dimensions of ``tensor`` that ``tensor[index]`` picks from; a mask stands for as many as
    it has itself."""
    dims: list[int] = []
    dim = 0
    for i in index:
        size = i.ndim if i is not None and i.dtype in (torch.bool, torch.uint8) else 1
        if i is not None:
            dims.extend(range(dim, dim + size))
        dim += size
    return dims


@rule_for("MaskedSelectBackward0", "TakeBackward0")
def _select_entries(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Entries are picked from anywhere in the tensor, into one dimension."""
    flow, shape = only(operation, flows), known(operation.inputs[0])
    masked = operation.name == "MaskedSelectBackward0"
    operation.left_out(flow, range(len(shape)))
    index = operation.indices("mask" if masked else "index", flow, range(len(shape)))
    if index is None:
        return Flow(flow.degree, flow.rows.reshape(1), flow.offset and flow.offset.changed([True]))
    index = index.cpu()
    if masked:
        wide, mask = torch.broadcast_tensors(flow.rows.expand(shape), index)  # type: ignore[no-untyped-call]
        rows = wide[mask]
    else:
        rows = flow.rows.expand(shape).take(index)
    operation.rows.pick(distinct(rows))
    return Flow(flow.degree, compact(rows), flow.offset and flow.offset.changed([True] * rows.ndim))


def _picked(offset: Offset, index: Sequence[Tensor | None], ndim: int) -> Offset:
    """The offset of ``tensor[index]``: dimensions that are not indexed keep it entry for entry."""
    kept: list[
        tuple[int, bool]
    ] = []  # where in the index a dimension stood, and whether the offset differs along it
    indexed, dim = False, 0
    for position, i in enumerate(index):
        size = (
            1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.ndim
        )  # a mask stands for all its dimensions
        if i is None:
            kept.append((position, offset.varies[dim]))
        else:
            indexed |= any(offset.varies[dim : dim + size])
        dim += size
    kept += [(len(index) + d, v) for d, v in enumerate(offset.varies[dim:])]
    where = [position for position, i in enumerate(index) if i is not None]
    together = where == list(
        range(where[0], where[-1] + 1)
    )  # what is indexed comes out there, else in front
    front = [v for position, v in kept if together and position < where[0]]
    varies = [*front, *[indexed] * (ndim - len(kept)), *[v for _, v in kept[len(front) :]]]
    return (
        offset.changed(varies)
        if indexed
        else replace(offset, varies=tuple(varies), token=new_token())
    )


@rule_for("IndexPutBackward0")
def _index_put(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """``tensor[indices] = values``: what is not written over stays what it was."""
    shape = operation.outputs[0]
    readable, index = operation.saved_tensor("indices")
    if operation.attribute("accumulate"):
        return _accumulate(operation, flows)
    if not readable:
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    target, values = flows
    flow = pure(operation, target if target is not None else only(operation, flows, 1))
    if target is not None and values is not None and pure(operation, values).degree != flow.degree:
        raise Blocked(f"{operation.place} writes into a tensor that scales differently")
    rows = (
        torch.zeros(shape, dtype=torch.long, device="cpu")
        if target is None
        else target.rows.expand(shape).clone()
    )
    if values is not None and any(rows.size(d) > 1 for d in _indexed_dims(index)):
        operation.rows.pick(
            distinct(values.rows)
        )  # where they come to lie, and so what they meet there, depends on the data
    rows[tuple(slice(None) if i is None else i.cpu() for i in index)] = (
        torch.zeros(1, dtype=torch.long, device="cpu") if values is None else values.rows
    )
    return Flow(flow.degree, compact(rows))


def _accumulate(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Entries are added, averaged or compared at indices along one dimension (messages between the
    nodes of a graph).

    A constant to add to is taken as zeros, and the claim is marked.
    """
    segments = operation.name.startswith("Segment")
    target, source = (None, only(operation, flows)) if segments else flows
    reduce = operation.attribute("reduce", "sum")
    if reduce == "prod":
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    out = operation.outputs[0]
    dims = [operation.attribute("axis" if segments else "dim", 0) % len(out)]
    if operation.name == "IndexPutBackward0":  # at any index of the whole tensor
        dims = list(range(len(out)))
    for flow in (target, source):
        if flow is not None and reduce in ("amax", "amin", "max", "min"):
            pure(operation, flow)
    rows = (
        None
        if source is None
        else operation.same_factor(
            source.rows, dims if source.rows.ndim == len(out) else range(source.rows.ndim)
        )
    )
    if rows is not None and rows.ndim != len(out):
        rows = rows.reshape([1] * len(out))
    if rows is not None and any(n not in (1, out[d]) for d, n in enumerate(rows.shape)):
        raise Blocked(f"no rule for {operation.place} with a source that is larger than its target")
    offset = (
        None
        if source is None or source.offset is None
        else source.offset.changed([True] * len(out))
    )
    if target is None:
        assert source is not None
        assert rows is not None
        if not segments and operation.inputs[0] is not None:
            raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
        operation.rows.assumed |= not segments
        return Flow(source.degree, rows, offset, _sign_of_sums(reduce, [source.sign]))
    if source is None or rows is None:
        added = operation.inputs[1] if len(operation.inputs) > 1 else None
        if added is not None and 0 in added:  # an expert without tokens adds nothing
            return target
        raise Blocked(f"a constant is added in {operation.place}")
    if target.degree != source.degree:
        raise Blocked(f"{operation.place} adds tensors that scale differently")
    if target.offset is not None:
        offset = target.offset.changed([True] * len(out))
    rows = operation.unite(operation.same_factor(target.rows, dims), rows)
    return Flow(source.degree, rows, offset, _sign_of_sums(reduce, [target.sign, source.sign]))


def _sign_of_sums(reduce: str, signs: Sequence[Sign]) -> Sign:
    """Sums and means of squares over the nodes of a graph are statistics, as they are over an
    axis."""
    lowest = min(signs)
    return Sign.STATISTIC if reduce in ("sum", "mean") and lowest != Sign.ANY else lowest


rule_for(
    "IndexAddBackward0",
    "ScatterAddBackward0",
    "ScatterReduceBackward0",
    "IndexReduceBackward0",
    "SegmentReduceBackward0",
)(_accumulate)


@rule_for("GatherBackward0")
def _gather(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape, out = only(operation, flows), known(operation.inputs[0]), operation.outputs[0]
    dim = operation.attribute("dim") % max(1, len(shape))
    if not shape:
        return flow
    others = [d for d in range(len(shape)) if d != dim]
    operation.left_out(flow, [dim, *(d for d in others if out[d] < shape[d])])
    rows = flow.rows
    for d in others:  # the index may be smaller than the tensor there
        if rows.size(d) > 1:
            rows = rows.narrow(d, 0, out[d])
    index = operation.indices("index", flow, [dim])
    if rows.size(dim) > 1:
        wide = rows.expand([shape[d] if d == dim else out[d] for d in range(len(shape))])
        rows = compact(wide.gather(dim, index.cpu()))
        operation.rows.pick(distinct(rows))
    return moved(flow, rows, range(len(shape)))


@rule_for("EmbeddingBackward0")
def _embedding(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, out = pure(operation, only(operation, flows)), operation.outputs[0]
    _refuse_max_norm(operation)
    operation.left_out(flow, [0])
    index = operation.indices("indices", flow, [0])
    rows = flow.rows
    if rows.size(0) == 1:
        return replace(flow, rows=rows.reshape([1] * (len(out) - 1) + [rows.size(1)]))
    rows = rows[index.cpu()]
    operation.rows.pick(rows)
    return replace(flow, rows=rows)


def _refuse_max_norm(operation: Operation) -> None:
    """A lookup with ``max_norm`` changes the length of rows before it reads them."""
    if getattr(operation.module[1], "max_norm", None) is not None:
        raise Blocked(
            f"max_norm of {operation.module[0] or operation.name} rescales the rows in every "
            f"forward pass"
        )


@rule_for("EmbeddingBagBackward0")
def _embedding_bag(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Rows of a table are added, averaged or compared: which ones meet depends on the data, so all
    that occur go together."""
    flow = pure(operation, only(operation, flows))
    _refuse_max_norm(operation)
    operation.left_out(flow, [0])
    index = operation.indices("indices", flow, [0])
    rows = flow.rows
    if rows.size(0) > 1:
        rows = rows[distinct(index.cpu())]
        operation.rows.pick(rows)
    return replace(flow, rows=operation.same_factor(rows, [0]), sign=Sign.ANY)
