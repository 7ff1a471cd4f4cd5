"""Rules for operations that rearrange, repeat, cut or join tensors, also over ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn.invariance.flow import (
    NO_ROW,
    Blocked,
    Flow,
    Flows,
    Offset,
    along,
    compact,
    expanded,
    sizes_of_pieces,
    spread,
    without_dims,
)
from lightning_normdyn.invariance.rows import distinct

from .operation import Operation, rule_for, unary_rule


@unary_rule("""
    ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0 UnsqueezeBackward0 SqueezeBackward0
    SqueezeBackward1 SqueezeBackward2 SqueezeBackward3
""")
def view(operation: Operation, flow: Flow) -> Flow:
    """The entries stay in their order in memory."""
    return flow.reshaped(operation.shape(), operation.out)


@unary_rule("PermuteBackward0")
def permute(operation: Operation, flow: Flow) -> Flow:
    """The dimensions change places."""
    return flow.permuted(operation.attribute("dims"))


@unary_rule("TransposeBackward0 TBackward0")
def transpose(operation: Operation, flow: Flow) -> Flow:
    """Two dimensions change places; those of ``t()``, which saves none, are both of a matrix."""
    dims = list(range(flow.ndim))
    i = operation.attribute("dim0", 0)
    j = operation.attribute("dim1", -1)
    dims[i], dims[j] = dims[j], dims[i]
    return flow.permuted(dims)


@unary_rule("ExpandBackward0")
def _expand(operation: Operation, flow: Flow) -> Flow:
    """One row stands for every copy, as it did before."""
    return flow.lifted(len(operation.out))


@unary_rule("RepeatBackward0")
def _repeat(operation: Operation, flow: Flow) -> Flow:
    """Copies scale with the row of the original."""
    flow = flow.lifted(len(operation.out))
    repeats = operation.attribute("repeats")
    for dim, size in enumerate(flow.rows.shape):
        # One row for the whole dimension is still the one, however often it is repeated.
        if size == 1:
            repeats[dim] = 1
    rows = flow.rows.repeat(repeats)
    return flow.moved(rows, range(rows.ndim))


@unary_rule("SelectBackward0")
def _select(operation: Operation, flow: Flow) -> Flow:
    """One index of a dimension, which is then gone."""
    dim = operation.dim()
    operation.left_out(flow, [dim])
    # A python number, unlike the indices of ``indexing.py``: it is the same in every batch.
    index = operation.attribute("index")
    if flow.rows.size(dim) == 1:
        index = 0
    rows = flow.rows.select(dim, index)
    offset = without_dims(flow.offset, [dim])
    return replace(flow, rows=rows, offset=offset)


@unary_rule("SliceBackward0")
def _slice(operation: Operation, flow: Flow) -> Flow:
    """A stretch of a dimension; its rows go with the entries."""
    dim = operation.dim()
    size = operation.shape()[dim]
    length = operation.out[dim]
    if length < size:
        operation.left_out(flow, [dim])
    rows = flow.rows
    if rows.size(dim) > 1:
        # By python's own rule, since a start may be negative or beyond the end.
        whole = slice(operation.attribute("start"), None)
        start, _, _ = whole.indices(size)
        steps = torch.arange(length, dtype=torch.long, device="cpu")
        rows = rows.index_select(dim, start + operation.attribute("step") * steps)
    return flow.moved(rows, [dim])


@unary_rule("SplitBackward0 SplitWithSizesBackward0 ChunkBackward0")
def _split(operation: Operation, flow: Flow) -> Flows:
    """Pieces along one dimension, one output for each."""
    dim = operation.dim()
    # A piece may be used nowhere, and its rows are then not read.
    operation.left_out(flow, [dim])
    # One row for the whole dimension is the row of every piece.
    pieces: Sequence[Tensor] = [flow.rows] * len(operation.outputs)
    if flow.rows.size(dim) > 1:
        sizes = [shape[dim] for shape in operation.outputs]
        pieces = torch.split_with_sizes(flow.rows, sizes, dim)
    return [flow.moved(piece, [dim]) for piece in pieces]


@unary_rule("UnbindBackward0")
def _unbind(operation: Operation, flow: Flow) -> Flows:
    """The indices of one dimension, one output for each."""
    dim = operation.dim()
    operation.left_out(flow, [dim])
    # Once for all pieces: equal pieces of an offset stay equal, and may cancel.
    offset = without_dims(flow.offset, [dim])
    differs = flow.offset and flow.offset.varies[dim]
    leaving = []
    rows = expanded(flow.rows, operation.shape(), [dim])
    for piece in rows.unbind(dim):
        if offset and differs:
            offset = offset.changed(offset.varies)
        leaving.append(replace(flow, rows=piece, offset=offset))
    return leaving


@rule_for("CatBackward0 StackBackward0")
def _cat(operation: Operation, flows: Flows) -> Flow:
    """Tensors that are concatenated or stacked keep their rows, and must be of one degree."""
    ndim = len(operation.out)
    dim = operation.attribute("dim") % ndim
    degrees = {flow.degree for flow in flows if flow}
    if len(degrees) > 1:
        raise Blocked(f"{operation.place} joins tensors that scale differently")
    sizes: list[int] | None = [1] * len(flows)
    if operation.name == "StackBackward0":
        flows = [flow and flow.unsqueezed(dim) for flow in flows]
    else:
        sizes = sizes_of_pieces(operation.inputs, dim, operation.out[dim])
    if sizes is None:
        raise Blocked(f"{operation.place} joins several constants of unknown size")

    # A constant piece does not scale, and is marked so beside the others. It may be negative.
    constant = Flow(0, NO_ROW.reshape([1] * ndim))
    pieces = [flow or constant for flow in flows]
    shapes = [piece.rows.shape for piece in pieces]
    wide = [max(sizes_of_dim) for sizes_of_dim in zip(*shapes, strict=True)]
    rows = []
    for piece, size in zip(pieces, sizes, strict=True):
        # Along the joint every piece keeps its own size.
        wide[dim] = size
        rows.append(piece.rows.expand(wide))
    sign = min(piece.sign for piece in pieces)
    joint = compact(torch.cat(rows, dim))
    return Flow(degrees.pop(), joint, _joint_offset(flows, dim), sign)


def _joint_offset(flows: Flows, dim: int) -> Offset | None:
    """The offset of pieces that are joined along ``dim``."""
    offsets = [flow.offset for flow in flows if flow and flow.offset]
    if not offsets:
        return None
    tokens = {offset.token for offset in offsets}
    all_same = len(tokens) == 1 and len(offsets) == len(flows)
    if all_same and not offsets[0].varies[dim]:
        # The same bias was added to every piece, so one normalization removes it from all of them.
        return offsets[0]
    # A piece without an offset has one of 0, so it differs along the joint.
    joint = offsets[-1].widened(along([dim], len(offsets[-1].varies)))
    for offset in offsets:
        joint = joint.widened(offset.varies)
    return joint


@unary_rule("RollBackward0")
def _roll(operation: Operation, flow: Flow) -> Flow:
    """Entries move along, and come in again at the other end."""
    shifts = operation.attribute("shifts")
    dims = operation.attribute("dims")
    if dims:
        return flow.moved(flow.rows.roll(shifts, dims), dims)
    # Without dimensions it goes across all of them, in the order of memory.
    # Written out only where rows differ: it takes as much memory as the activation.
    rows = flow.rows
    if rows.numel() > 1:
        rows = rows.expand(operation.shape()).roll(shifts)
    return flow.moved(rows, range(rows.ndim))


@unary_rule("FlipBackward0")
def _flip(operation: Operation, flow: Flow) -> Flow:
    """Entries change their order along some dimensions."""
    dims = operation.attribute("dims")
    return flow.moved(flow.rows.flip(dims), dims)


@unary_rule("Rot90Backward0")
def _rotate(operation: Operation, flow: Flow) -> Flow:
    """A quarter turn in the plane of two dimensions."""
    # The two dimensions change places, so a row that holds for all of one must be written out.
    dims = operation.attribute("dims")
    rows = expanded(flow.rows, operation.shape(), dims)
    rows = compact(torch.rot90(rows, operation.attribute("k"), dims))
    offset = flow.offset
    if offset and offset.differs_along(dims):
        offset = spread(offset, dims)
    return replace(flow, rows=rows, offset=offset)


@unary_rule("PixelShuffleBackward0 PixelUnshuffleBackward0 ChannelShuffleBackward0")
def _shuffle(operation: Operation, flow: Flow) -> Flow:
    """Channels become places of an image, or the other way round."""
    # Rows may differ along the channels only, but these become places of the image, or come from
    # there: channels, and the two dimensions that they are exchanged with.
    rows = expanded(flow.rows, operation.shape(), [-3, -2, -1])
    if operation.name == "PixelShuffleBackward0":
        rows = torch.pixel_shuffle(rows, operation.attribute("upscale_factor"))
    elif operation.name == "PixelUnshuffleBackward0":
        rows = torch.pixel_unshuffle(rows, operation.attribute("downscale_factor"))
    else:
        rows = torch.channel_shuffle(rows, operation.attribute("groups"))
    return replace(flow, rows=compact(rows), offset=flow.offset_everywhere())


@unary_rule("DiagonalBackward0")
def _diagonal(operation: Operation, flow: Flow) -> Flow:
    """Entries of a plane of two dimensions, in a new one at the end."""
    i = operation.attribute("dim1")
    j = operation.attribute("dim2")
    # A diagonal needs entries of both, so a row that holds for all of one is written out.
    rows = expanded(flow.rows, operation.shape(), [i, j])
    rows = compact(rows.diagonal(operation.attribute("offset"), i, j))
    return replace(flow, rows=rows, offset=flow.offset_everywhere(rows.ndim))


@unary_rule("UnfoldBackward0")
def _unfold(operation: Operation, flow: Flow) -> Flow:
    """Windows along one dimension, which go into a new one."""
    dim = operation.attribute("dimension")
    # One row for the whole dimension is that of every window, too.
    rows = flow.rows.unsqueeze(-1)
    if flow.rows.size(dim) > 1:
        size = operation.attribute("size")
        step = operation.attribute("step")
        rows = compact(flow.rows.unfold(dim, size, step))
    return replace(flow, rows=rows, offset=flow.offset_everywhere(rows.ndim))


@unary_rule("ConstantPadNdBackward0")
def _pad(operation: Operation, flow: Flow) -> Flow:
    """Zeros go with any row. The value padded with is not saved: taken as 0, and the claim is
    marked."""
    inside = operation.attribute("pad")
    padded = []
    # Pairs of amounts, before and after, from the last dimension on; negative ones cut off.
    for k, amount in enumerate(inside):
        dim = flow.ndim - 1 - k // 2
        if amount > 0:
            padded.append(dim)
            operation.rows.assumed = True
        if flow.rows.size(dim) == 1:
            # Zeros may as well belong to the one row of the whole dimension.
            inside[k] = 0
    rows = flow.rows
    if any(inside):
        rows = nn.functional.pad(rows, inside)
    return replace(flow, rows=rows, offset=spread(flow.offset, padded))


# ------------------------------------------------------------------------------- parts of a DTensor

# On DTensors themselves operations show their full shapes, so that all other rules hold for them as
# they are. These two are the way to the part of it on this rank, and back.


@unary_rule("_ToTorchTensorBackward")
def _to_local(operation: Operation, flow: Flow) -> Flow:
    """From a DTensor to this rank's part of it."""
    before = operation.shape()
    after = operation.out
    if before == after:
        return flow
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec: Any = operation.node.dtensor_spec  # type: ignore[attr-defined]
    # Sharded along one dimension by two meshes: the part is not one stretch of it.
    if any(type(placement).__name__ == "_StridedShard" for placement in spec.placements):
        raise Blocked(f"no rule for strided shards in {operation.place}")
    _, start = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    # A dimension of one row for all is not cut: the row holds for every part.
    part = flow.rows
    for dim, size in enumerate(after):
        if part.size(dim) > 1 and size < before[dim]:
            part = part.narrow(dim, start[dim], size)
    if part.numel() < flow.rows.numel():
        # The other ranks follow the rest of the rows, and are asked at the end.
        rows = operation.rows
        rows.elsewhere = True
        rows.sharded = distinct(flow.rows, rows.sharded)
    return flow.moved(part, range(part.ndim))


@unary_rule("_FromTorchTensorBackward")
def _from_local(operation: Operation, flow: Flow) -> Flow:
    """From this rank's part to the DTensor."""
    after = operation.out
    if operation.shape() == after:
        return flow
    # The other ranks' entries come from rows that were not followed here: all go together.
    together = distinct(flow.rows, operation.rows.sharded)
    one = together[:1]
    operation.unite(one, together)
    rows = one.reshape([1] * len(after))
    return replace(flow, rows=rows, offset=flow.offset_everywhere())
