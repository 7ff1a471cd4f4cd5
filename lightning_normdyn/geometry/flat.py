"""How a weight lies in a flat buffer that ranks hold in equal chunks: FSDP1, and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.internals import private, untested
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.pieces import Piece, Placement, Range, Shape, Sharing, itself
from lightning_normdyn.geometry.wrapped import Master


@dataclass(frozen=True, eq=False)
class FlatSlice:
    """Where a flattened weight lies in a flat buffer that ranks hold in equal chunks.

    Args:
        shape: of the weight.
        order: its dimensions as they follow each other in memory, slowest first.
        offset: of its first entry in the flat buffer.
        chunk: entries per rank.
        rank: of this process within ``group``.
        group: the ranks that hold the buffer.
        master: None, or what the optimizer updates in place of the parameter.
        flat: FSDP's flat parameter, which has a gradient on every rank or on none.
    """

    shape: Shape
    order: tuple[int, ...]
    offset: int
    chunk: int
    rank: int
    group: Any
    master: Master | None = None
    flat: Tensor | None = None

    def range_of(self, rank: int) -> Range:
        """The entries ``start .. stop - 1`` of the flattened weight that ``rank`` holds."""
        start = min(max(rank * self.chunk - self.offset, 0), prod(self.shape))
        return start, min(max((rank + 1) * self.chunk - self.offset, start), prod(self.shape))


_FLAT: Any = (
    WeakTensorKeyDictionary()
)  # weight -> FlatSlice, or None if it was flattened but not sharded


def flat_slice(weight: Tensor) -> FlatSlice | None:
    """Where ``weight`` lies in a flat buffer; None for one that is whole on every rank, or is no
    slice of one."""
    if weight not in _FLAT and getattr(weight, "_fsdp_flattened", False):
        raise NotSupportedError(
            "FSDP has flattened the weights, and where they lie was not looked up. Call "
            "lightning_normdyn.survey(model) "
            "with the outermost FSDP module first."
        )
    return cast("FlatSlice | None", _FLAT.get(weight))


def slice_now(weight: Tensor) -> FlatSlice | None:
    """As `flat_slice`, without a look at what FSDP says of ``weight``: for every step."""
    return cast("FlatSlice | None", _FLAT.get(weight)) if len(_FLAT.data) else None


def remember(places: Mapping[Tensor, FlatSlice | None]) -> None:
    """Note where weights lie; None: flattened, but whole on every rank."""
    _FLAT.update(places)


def forget(weights: Iterable[Tensor]) -> None:
    """Undo `remember`."""
    for weight in weights:
        _FLAT.pop(weight, None)


def survey_fsdp(module: nn.Module) -> None:
    """`remember` where the parameters lie that FSDP1 has flattened.

    Raises:
        NotSupportedError: for ``use_orig_params=False`` and for parameters that another strategy
            has sharded before.
    """
    for name, submodule in module.named_modules():
        handle = submodule.__dict__.get("_handle")
        if type(handle).__name__ != "FlatParamHandle":
            continue
        (flat, original, sharded) = private(
            handle, "flat_param", "_use_orig_params", "uses_sharded_strategy"
        )
        where = f"the FSDP unit `{name or type(module).__name__}`"
        if not original:
            raise NotSupportedError(
                f"{where} was wrapped with use_orig_params=False, so the optimizer sees one flat "
                f"parameter instead of weights. "
                "Pass use_orig_params=True to FSDPStrategy (Lightning's default)."
            )
        if not sharded:
            remember(dict.fromkeys(private(flat, "_params")[0]))
            continue
        shapes, strides, numels, padding, extensions, size, shards, params = private(
            flat,
            "_shapes",
            "_strides",
            "_numels_with_padding",
            "_is_padding_mask",
            "_param_extensions",
            "_unpadded_unsharded_size",
            "_shard_param_infos",
            "_params",
        )
        rank, world, group = private(handle, "rank", "world_size", "process_group")
        if any(e is not None for e in extensions):
            raise NotSupportedError(
                f"{where} holds parameters that are sharded already (FSDP over tensor "
                f"parallelism). Use FSDP2 for that."
            )
        offsets, start = [], 0
        for numel, is_padding in zip(numels, padding, strict=True):
            if not is_padding:
                offsets.append(start)
            start += numel
        chunk = -(-size.numel() // world)
        for weight, shape, stride, offset, shard in zip(
            params, shapes, strides, offsets, shards, strict=True
        ):
            order = tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], d)))
            place = FlatSlice(tuple(shape), order, offset, chunk, rank, group, flat=flat)
            begin, end = place.range_of(rank)
            theirs = (
                (shard.intra_param_start_idx, shard.intra_param_end_idx + 1)
                if shard.in_shard
                else None
            )
            if (begin, end) != theirs and not (begin == end and theirs is None):
                raise untested(
                    f"{where} holds the entries {theirs} of a weight where {(begin, end)} were "
                    f"expected"
                )
            remember({weight: place})


def place_flat(place: FlatSlice, partition: Partition, name: str) -> Placement:
    """How the slice of a flattened weight lies on this rank."""
    # As the entries lie in memory, with neighbouring dimensions that are summed over taken as one.
    keep = [place.order.index(k) for k in partition.keep]
    labels = partition.labels.permute(*sorted(range(len(keep)), key=keep.__getitem__))
    sizes: list[int] = []
    kept: list[int] = []
    for position, d in enumerate(place.order):
        if position in keep:
            kept.append(len(sizes))
            sizes.append(place.shape[d])
        elif sizes and len(sizes) - 1 not in kept:
            sizes[-1] *= place.shape[d]
        else:
            sizes.append(place.shape[d])
    start, stop = place.range_of(place.rank)
    pieces, done = [], 0
    for box in _boxes(tuple(sizes), start, stop):
        inside = labels
        for i, d in enumerate(kept):
            inside = inside.narrow(i, box[d][0], box[d][1] - box[d][0])
        form = tuple(b - a for a, b in box)
        pieces.append(Piece(_window(done, form), tuple(kept), inside))
        done += prod(form)
    sharing = _flat_sharing(place, labels, kept, tuple(sizes), partition.n)
    return Placement(place.shape, partition.n, itself, tuple(pieces), sharing, place.master)


def _window(start: int, form: Shape) -> Callable[[Tensor], Tensor]:
    def select(local: Tensor) -> Tensor:
        return local[start : start + prod(form)].view(form)

    return select


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Range, ...]]:
    """The entries ``start .. stop - 1`` of a flattened tensor as products of ranges: the rest of a
    row, whole rows, part of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = prod(shape[1:])
    first = -(-start // row)  # the first row that begins in here
    if first * row > start:
        head = min(stop, first * row)
        for box in _boxes(shape[1:], start - (first - 1) * row, head - (first - 1) * row):
            yield ((first - 1, first), *box)
    last = stop // row  # the first row that does not end in here
    if last > first:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if last >= first and stop > last * row:
        for box in _boxes(shape[1:], 0, stop - last * row):
            yield ((last, last + 1), *box)


def _flat_sharing(
    place: FlatSlice, labels: Tensor, kept: list[int], sizes: Shape, n: int
) -> Sharing:
    stride = [prod(sizes[d + 1 :]) for d in range(len(sizes))]
    position = torch.zeros(labels.shape, dtype=torch.long, device="cpu")
    for i, d in enumerate(kept):
        steps = torch.arange(sizes[d], dtype=torch.long, device="cpu") * stride[d]
        position += steps.reshape([-1 if j == i else 1 for j in range(labels.dim())])
    span = sum((sizes[d] - 1) * stride[d] for d in range(len(sizes)) if d not in kept)
    valid = labels >= 0
    vector, position = labels[valid], position[valid]
    nowhere = torch.full((n,), -1, dtype=torch.long, device="cpu")
    first = nowhere.scatter_reduce(0, vector, position, "amin", include_self=False)
    last = nowhere.scatter_reduce(0, vector, position, "amax", include_self=False) + span
    holder, end = (first + place.offset) // place.chunk, (last + place.offset) // place.chunk
    cut = (first >= 0) & (holder != end)
    first_copy = 0 in dist.get_process_group_ranks(place.group)
    counted = (first >= 0) & (holder == place.rank) & first_copy
    return Sharing(cut, cut, counted, first_copy, everywhere=False, group=place.group)
