"""Rules for operations that rearrange, repeat, cut or join tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_normdyn.invariance.flow import (
    Blocked,
    Flow,
    Sign,
    compact,
    either,
    everywhere,
    expanded,
    lift,
    moved,
    new_token,
    permuted,
    reshaped,
    without_dim,
)
from lightning_normdyn.invariance.rules.operation import Operation, known, only
from lightning_normdyn.invariance.rules.registry import rule_for


@rule_for(
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2",
)  # fmt: skip
def _view(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return reshaped(only(operation, flows), known(operation.inputs[0]), operation.outputs[0])


@rule_for("TransposeBackward0", "TBackward0", "PermuteBackward0")
def _permute(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    dims = list(range(flow.rows.ndim))
    if operation.name == "PermuteBackward0":
        return permuted(flow, operation.attribute("dims"))
    if operation.name == "TBackward0":
        return permuted(flow, dims[::-1])
    i, j = operation.attribute("dim0"), operation.attribute("dim1")
    dims[i], dims[j] = dims[j], dims[i]
    return permuted(flow, dims)


@rule_for("ExpandBackward0")
def _expand(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return lift(only(operation, flows), len(operation.outputs[0]))


@rule_for("RepeatBackward0")
def _repeat(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = lift(only(operation, flows), len(operation.outputs[0]))
    rows = flow.rows.repeat(
        [r if flow.rows.size(d) > 1 else 1 for d, r in enumerate(operation.attribute("repeats"))]
    )
    return moved(flow, rows, range(rows.ndim))


@rule_for("SelectBackward0")
def _select(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(known(operation.inputs[0])),
    )
    operation.left_out(flow, [dim])
    rows = flow.rows.select(dim, operation.attribute("index") if flow.rows.size(dim) > 1 else 0)
    return replace(flow, rows=rows, offset=without_dim(flow.offset, dim))


@rule_for("SliceBackward0")
def _slice(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(known(operation.inputs[0])),
    )
    if operation.outputs[0][dim] < known(operation.inputs[0])[dim]:
        operation.left_out(flow, [dim])
    if flow.rows.size(dim) == 1:
        return moved(flow, flow.rows, [dim])
    start = operation.attribute("start") or 0
    size, length, step = (
        known(operation.inputs[0])[dim],
        operation.outputs[0][dim],
        operation.attribute("step"),
    )
    start = max(0, start + size) if start < 0 else min(start, size)
    index = start + step * torch.arange(length, dtype=torch.long, device="cpu")
    return moved(flow, flow.rows.index_select(dim, index), [dim])


@rule_for("SplitBackward0", "SplitWithSizesBackward0", "ChunkBackward0", "UnbindBackward0")
def _split(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow]:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(known(operation.inputs[0])),
    )
    operation.left_out(flow, [dim])  # a piece may be used nowhere
    if operation.name == "UnbindBackward0":
        pieces, offset = (
            expanded(flow.rows, known(operation.inputs[0]), [dim]).unbind(dim),
            without_dim(flow.offset, dim),
        )
        differs = flow.offset is not None and flow.offset.varies[dim]
        return [
            replace(
                flow,
                rows=piece,
                offset=offset.changed(offset.varies) if offset and differs else offset,
            )
            for piece in pieces
        ]
    if flow.rows.size(dim) == 1:
        return [moved(flow, flow.rows, [dim]) for _ in operation.outputs]
    return [
        moved(flow, piece, [dim])
        for piece in torch.split_with_sizes(
            flow.rows, [shape[dim] for shape in operation.outputs], dim
        )
    ]


@rule_for("CatBackward0", "StackBackward0")
def _cat(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    present = [flow for flow in flows if flow is not None]
    ndim, stack = len(operation.outputs[0]), operation.name == "StackBackward0"
    dim = operation.attribute("dim") % ndim
    if len({flow.degree for flow in present}) > 1:
        raise Blocked(f"{operation.place} joins tensors that scale differently")
    known = 0 if stack else sum(shape[dim] for shape in operation.inputs if shape is not None)
    if (
        not stack and sum(shape is None for shape in operation.inputs) > 1
    ):  # one constant takes what the others leave
        raise Blocked(f"{operation.place} joins several constants of unknown size")
    pieces = []
    for flow, shape in zip(flows, operation.inputs, strict=True):
        size = (
            1 if stack else shape[dim] if shape is not None else operation.outputs[0][dim] - known
        )
        rows = (
            torch.zeros([1] * ndim, dtype=torch.long, device="cpu")
            if flow is None
            else flow.rows.unsqueeze(dim)
            if stack
            else flow.rows
        )
        pieces.append(rows.expand([size if d == dim else n for d, n in enumerate(rows.shape)]))
    common = [max(piece.size(d) for piece in pieces) for d in range(ndim)]
    rows = torch.cat(
        [
            piece.expand([piece.size(d) if d == dim else n for d, n in enumerate(common)])
            for piece in pieces
        ],
        dim,
    )
    offset = None
    offsets = [flow.offset for flow in present if flow.offset is not None]
    if (
        len(offsets) == len(flows)
        and len({o.token for o in offsets}) == 1
        and (stack or not offsets[0].varies[dim])
    ):
        same = offsets[0]
        if stack:
            token = same.token if not any(same.varies[:dim]) else new_token()
            same = replace(
                same, varies=(*same.varies[:dim], False, *same.varies[dim:]), token=token
            )
        return Flow(present[0].degree, compact(rows), same, min(flow.sign for flow in present))
    for flow in present:
        if flow.offset is not None:
            varies = (
                *flow.offset.varies[:dim],
                True,
                *flow.offset.varies[dim if stack else dim + 1 :],
            )
            offset = flow.offset.changed(
                varies if offset is None else either(varies, offset.varies)
            )
    return Flow(
        present[0].degree,
        compact(rows),
        offset,
        min(flow.sign for flow in present) if len(present) == len(flows) else Sign.ANY,
    )


@rule_for("RollBackward0", "FlipBackward0", "Rot90Backward0")
def _roll(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), known(operation.inputs[0])
    dims = [d % len(shape) for d in operation.attribute("dims")] or list(range(len(shape)))
    if operation.name == "Rot90Backward0":
        offset = flow.offset
        if offset is not None and any(offset.varies[d] for d in dims):
            offset = offset.changed(v or d in dims for d, v in enumerate(offset.varies))
        return replace(
            flow,
            rows=compact(
                torch.rot90(expanded(flow.rows, shape, dims), operation.attribute("k"), dims)
            ),
            offset=offset,
        )
    if all(flow.rows.size(d) == 1 for d in dims):
        return moved(flow, flow.rows, dims)
    rows = expanded(flow.rows, shape, dims)
    if operation.name == "FlipBackward0":
        return moved(flow, rows.flip(dims), dims)
    return moved(
        flow, rows.roll(operation.attribute("shifts"), operation.attribute("dims") or []), dims
    )


@rule_for("PixelShuffleBackward0", "PixelUnshuffleBackward0", "ChannelShuffleBackward0")
def _shuffle(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), known(operation.inputs[0])
    rows = expanded(flow.rows, shape, range(max(0, len(shape) - 4) + (len(shape) > 3), len(shape)))
    if operation.name == "PixelShuffleBackward0":
        rows = torch.pixel_shuffle(rows, operation.attribute("upscale_factor"))
    elif operation.name == "PixelUnshuffleBackward0":
        rows = torch.pixel_unshuffle(rows, operation.attribute("downscale_factor"))
    else:
        rows = torch.channel_shuffle(rows, operation.attribute("groups"))
    return replace(flow, rows=compact(rows), offset=everywhere(flow))


@rule_for("DiagonalBackward0")
def _diagonal(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    i, j = operation.attribute("dim1"), operation.attribute("dim2")
    rows = expanded(flow.rows, known(operation.inputs[0]), [i, j]).diagonal(
        operation.attribute("offset"), i, j
    )
    return replace(
        flow, rows=compact(rows), offset=flow.offset and flow.offset.changed([True] * rows.ndim)
    )


@rule_for("UnfoldBackward0")
def _unfold(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = only(operation, flows), operation.attribute("dimension")
    rows = flow.rows.unsqueeze(-1)
    if flow.rows.size(dim) > 1:
        rows = flow.rows.unfold(dim, operation.attribute("size"), operation.attribute("step"))
    return replace(
        flow, rows=compact(rows), offset=flow.offset and flow.offset.changed([True] * rows.ndim)
    )


@rule_for("ConstantPadNdBackward0")
def _pad(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Zeros go with any row. The value padded with is not saved: taken as 0, and the claim is
    marked."""
    flow, amounts = only(operation, flows), operation.attribute("pad")
    ndim = flow.rows.ndim
    padded = [ndim - 1 - k // 2 for k, amount in enumerate(amounts) if amount > 0]
    if any(amount > 0 for amount in amounts):
        operation.rows.assumed = True
    inside = [
        amount if flow.rows.size(ndim - 1 - k // 2) > 1 else 0 for k, amount in enumerate(amounts)
    ]
    rows = nn.functional.pad(flow.rows, inside) if any(inside) else flow.rows
    offset = flow.offset and flow.offset.changed(
        v or d in padded for d, v in enumerate(flow.offset.varies)
    )
    return replace(flow, rows=rows, offset=offset)
