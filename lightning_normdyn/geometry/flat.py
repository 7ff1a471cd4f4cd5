"""How a weight lies in a flat buffer that ranks hold in equal chunks: FSDP1, and DeepSpeed's ZeRO.

Both write all weights one behind the other into one buffer and cut that into equal chunks, without
regard to where a weight or a filter ends. A rank's part of a weight is then a range of its entries
in the order of memory: at most the end of a row, whole rows, and the beginning of a row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_normdyn.errors import NotSupportedError

from .partition import Partition, indices
from .pieces import Master, Piece, Placement, Range, Shape, Sharing, itself, private, untested


@dataclass(frozen=True, eq=False)
class FlatSlice:
    """Where a flattened weight lies in a flat buffer.

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

    @property
    def held(self) -> Range:
        """The entries ``start .. stop - 1`` of the flattened weight that this rank holds."""
        size = prod(self.shape)
        begin = self.rank * self.chunk - self.offset
        start = min(max(begin, 0), size)
        stop = min(max(begin + self.chunk, start), size)
        return start, stop


# ---- Which weights are slices ----

# By weight; None for one that was flattened but is whole on every rank.
_SLICES: Any = WeakTensorKeyDictionary()


def flat_slice(weight: Tensor) -> FlatSlice | None:
    """Where ``weight`` lies in a flat buffer; None if it is whole on this rank.

    Raises:
        NotSupportedError: if FSDP has flattened it and nobody has looked where it lies.
    """
    # The flag first: looking up a tensor by identity takes microseconds.
    if getattr(weight, "_fsdp_flattened", False) and weight not in _SLICES:
        raise NotSupportedError(
            "FSDP has flattened the weights, and where they lie was not looked up. Call "
            "lightning_normdyn.survey(model) with the outermost FSDP module first."
        )
    return slice_now(weight) if _SLICES.data else None


def knows_slices() -> bool:
    """Whether any weight is known to be a slice."""
    return len(_SLICES.data) > 0


def slice_now(weight: Tensor) -> FlatSlice | None:
    """`flat_slice` without the check, for every step."""
    # Most models have no slices, and looking up a tensor by identity takes microseconds.
    if not knows_slices():
        return None
    place: FlatSlice | None = _SLICES.get(weight)
    return place


def remember(slices: Mapping[Tensor, FlatSlice | None]) -> None:
    """Note where weights lie; None: flattened, but whole on every rank."""
    _SLICES.update(slices)


def forget(weights: Iterable[Tensor]) -> None:
    """Undo `remember`."""
    for weight in weights:
        _SLICES.pop(weight, None)


def survey_fsdp(module: nn.Module) -> None:
    """`remember` where the parameters lie that FSDP1 has flattened.

    Raises:
        NotSupportedError: for ``use_orig_params=False`` and for parameters that another strategy
            has sharded before.
    """
    for name, submodule in module.named_modules():
        handle = submodule.__dict__.get("_handle")
        # By name: the class is private, and torch.distributed.fsdp need not be imported.
        if type(handle).__name__ == "FlatParamHandle":
            unit = f"the FSDP unit `{name or type(module).__name__}`"
            remember(_slices_of(handle, unit))


def _slices_of(
    handle: Any,
    unit: str,
) -> dict[Tensor, FlatSlice | None]:
    """The slices of one FSDP unit; ``unit`` is what to call it in a message."""
    flat, original, sharded = private(
        handle, "flat_param", "_use_orig_params", "uses_sharded_strategy"
    )
    if not original:
        raise NotSupportedError(
            f"{unit} was wrapped with use_orig_params=False, so the optimizer sees one flat "
            f"parameter instead of weights. Pass use_orig_params=True to FSDPStrategy (Lightning's "
            f"default)."
        )
    weights, extensions = private(flat, "_params", "_param_extensions")
    # NO_SHARD: every rank holds all weights, as under DDP.
    if not sharded:
        return dict.fromkeys(weights)
    # Such a slice is a part of a part, whose place in the weight is told by two strategies.
    if any(extension is not None for extension in extensions):
        raise NotSupportedError(
            f"{unit} holds parameters that are sharded already (FSDP over tensor parallelism). Use "
            f"FSDP2 for that."
        )
    rank, world, group = private(handle, "rank", "world_size", "process_group")
    padded_numels, padding, size = private(
        flat, "_numels_with_padding", "_is_padding_mask", "_unpadded_unsharded_size"
    )
    # Rounded up: the last rank's chunk may be shorter.
    chunk = -(-size.numel() // world)
    offsets, end = [], 0
    for numel, is_padding in zip(padded_numels, padding, strict=True):
        if not is_padding:
            offsets.append(end)
        end += numel

    slices: dict[Tensor, FlatSlice | None] = {}
    layouts = zip(*private(flat, "_shapes", "_strides", "_shard_param_infos"), strict=True)
    for weight, offset, (shape, stride, shard) in zip(weights, offsets, layouts, strict=True):
        # Dimensions of equal stride have one index between them; their order is theirs.
        order = sorted(range(len(shape)), key=lambda d: (-stride[d], d))
        # What FSDP says of this rank is the check of the arithmetic, which must also tell where the
        # parts of all other ranks lie.
        place = FlatSlice(
            tuple(shape),
            tuple(order),
            offset,
            chunk,
            rank,
            group,
            flat=flat,
        )
        start, stop = place.held
        theirs = None
        if shard.in_shard:
            theirs = (shard.intra_param_start_idx, shard.intra_param_end_idx + 1)
        if theirs != ((start, stop) if stop > start else None):
            raise untested(
                f"{unit} holds the entries {theirs} of a weight where {(start, stop)} were expected"
            )
        slices[weight] = place
    return slices


# ---- How a slice divides into pieces ----


def place_flat(
    place: FlatSlice,
    partition: Partition,
) -> Placement:
    """How the slice of a flattened weight lies on this rank."""
    # The weight as its entries follow each other in memory, neighbouring dimensions that are summed
    # over taken as one.
    kept_positions = [place.order.index(d) for d in partition.keep]
    in_order = sorted(range(len(kept_positions)), key=kept_positions.__getitem__)
    labels = partition.labels.permute(*in_order)
    sizes: list[int] = []
    kept = []
    for position, d in enumerate(place.order):
        is_kept = position in kept_positions
        if is_kept or not sizes or len(sizes) - 1 in kept:
            sizes.append(place.shape[d])
        else:
            sizes[-1] *= place.shape[d]
        if is_kept:
            kept.append(len(sizes) - 1)

    # Boxes follow each other in the flat tensor as they do in the weight.
    pieces, done = [], 0
    for box in _boxes(tuple(sizes), *place.held):
        form = tuple(stop - start for start, stop in box)
        inside = labels
        for axis, d in enumerate(kept):
            inside = inside.narrow(axis, box[d][0], form[d])
        pieces.append(Piece(_window(done, form), tuple(kept), inside))
        done += prod(form)
    sharing = _sharing(place, labels, kept, sizes, partition.n)
    return Placement(
        place.shape,
        partition.n,
        itself,
        tuple(pieces),
        sharing,
        place.master,
    )


def _window(
    start: int,
    form: Shape,
) -> Callable[[Tensor], Tensor]:
    def select(local: Tensor) -> Tensor:
        return local[start : start + prod(form)].view(form)

    return select


def _boxes(
    shape: Shape,
    start: int,
    stop: int,
) -> Iterator[tuple[Range, ...]]:
    """The entries ``start .. stop - 1`` of a flattened tensor as products of ranges: the rest of a
    row, whole rows, part of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = prod(shape[1:])
    first = -(-start // row)  # the first row that begins in here
    last = stop // row  # the first row that does not end in here
    if first * row > start:
        before = (first - 1) * row
        for box in _boxes(shape[1:], start - before, min(stop, first * row) - before):
            yield ((first - 1, first), *box)
    if last > first:
        # All whole rows at once: a box has as many rows as fit.
        yield ((first, last), *((0, size) for size in shape[1:]))
    if last >= first:
        for box in _boxes(shape[1:], 0, stop - last * row):
            yield ((last, last + 1), *box)


def _sharing(
    place: FlatSlice,
    labels: Tensor,
    kept: list[int],
    sizes: list[int],
    n: int,
) -> Sharing:
    # The first entry of each combination of kept indices, and how far its last one lies behind it.
    first_entry = torch.zeros_like(labels)
    span = 0
    for d, size in enumerate(sizes):
        stride = prod(sizes[d + 1 :])
        if d in kept:
            steps = indices(size) * stride
            axes_behind = len(kept) - 1 - kept.index(d)
            first_entry += steps.view(-1, *[1] * axes_behind)
        else:
            span += (size - 1) * stride

    # A vector is cut if its first and its last entry lie in different chunks, and only then.
    valid = labels >= 0
    vector, entry = labels[valid], first_entry[valid]
    nowhere = labels.new_full((n,), -1)
    first = nowhere.scatter_reduce(0, vector, entry, "amin", include_self=False)
    last = nowhere.scatter_reduce(0, vector, entry, "amax", include_self=False) + span
    first_holder = (first + place.offset) // place.chunk
    last_holder = (last + place.offset) // place.chunk
    exists = first >= 0
    cut = exists & (first_holder != last_holder)
    # Replicas of the buffer lie in other groups; the group of rank zero holds the first copy.
    first_copy = 0 in dist.get_process_group_ranks(place.group)
    return Sharing(
        cut=cut,
        present=cut,
        counted=exists & (first_holder == place.rank) & first_copy,
        first_copy=first_copy,
        everywhere=False,
        group=place.group,
    )
