"""Where a rank's piece of a weight lies among its weight vectors, and which ranks hold the rest.

This is the only room that asks what a parameter physically is. It answers with a `Placement`: how
to get from the parameter (or its
gradient, or a state tensor of the same layout) to this rank's plain local tensor, which views of
that tensor have rows that belong to one
vector each, and which vectors other ranks hold pieces of. `Reduction` completes sums over those
ranks, one collective at a time.

Private attributes of torch are read here and nowhere else, each behind a check that names the
versions this was tested with.

Letters: n vectors of a weight, W weights, K sums.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.step_view import part_of, split_groups
from lightning_normdyn.optimizers.wrappers import (
    second_phase,
    steps_in_two_phases,
    without_framework,
)

if TYPE_CHECKING:
    from lightning_normdyn.geometry.vectors import Partition

TESTED = "torch 2.13"

Shape = tuple[int, ...]
Range = tuple[int, int]


# --------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True, eq=False)
class Piece:
    """A view of a rank's local storage whose kept dimensions tell vectors apart.

    Args:
        select: from the local storage (weight, gradient or state) to the view; never copies.
        keep: the dimensions of the view that are kept when a vector is summed; the others are
            summed over.
        labels: int64, shape of the kept dimensions: the vector within the whole weight, or -1.
    """

    select: Callable[[Tensor], Tensor]
    keep: tuple[int, ...]
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Sharing:
    """How the ranks share one weight; every rank works this out by itself.

    Args:
        cut: bool ``(n,)``: vectors that lie on several ranks in pieces.
        present: bool ``(n,)``: those of them that some rank of ``group`` holds a piece of.
        counted: bool ``(n,)``: vectors for which this rank speaks when each is to be counted once;
            it holds a piece of each.
        first_copy: whether this rank's entries are the first of their copies.
        everywhere: whether every rank holds a piece of every vector.
        group: the ranks that together hold the vectors cut for this rank, each entry once; None: no
            process group is exactly that.
    """

    cut: Tensor
    present: Tensor
    counted: Tensor
    first_copy: bool
    everywhere: bool
    group: Any


@dataclass(frozen=True, eq=False)
class Placement:
    """How one weight lies on this rank.

    Args:
        shape: of the whole weight.
        n: number of its vectors, over all ranks.
        storage: from the parameter, its gradient or a state tensor to this rank's plain tensor.
        pieces: the views of that tensor, together covering every entry that this rank holds; none
            if it holds nothing.
        sharing: None if every rank holds the whole weight.
        master: None, or what the optimizer updates in place of the parameter (DeepSpeed).
        held: int64, ascending: the vectors of which this rank holds a piece.
    """

    shape: Shape
    n: int
    storage: Callable[[Tensor], Tensor]
    pieces: tuple[Piece, ...]
    sharing: Sharing | None = None
    master: Master | None = None
    held: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.sharing is None:
            held = torch.arange(self.n, dtype=torch.long, device="cpu")
        else:
            found = [p.labels.flatten() for p in self.pieces]
            held = (
                _distinct(torch.cat(found))
                if found
                else torch.zeros(0, dtype=torch.long, device="cpu")
            )
        object.__setattr__(self, "held", held[held >= 0])

    def value(self, weight: Tensor) -> Tensor:
        """This rank's plain tensor of the numbers that the optimizer updates; writing to it writes
        to the weight."""
        return self.storage(weight.detach() if self.master is None else self.master.value())

    def gradient(self, weight: Tensor) -> Tensor | None:
        """Its gradient as the optimizer receives it, or None."""
        gradient = weight.grad if self.master is None else self.master.gradient()
        return None if gradient is None else self.storage(gradient.detach())


def place_all(
    weights: Sequence[Tensor], partitions: Sequence[Partition], names: Sequence[str]
) -> list[Placement]:
    """How every weight lies on this rank; where weights are sharded, the ranks make sure that they
    mean the same.

    Raises:
        NotSupportedError: for a kind of tensor that is not understood (sparse, complex, quantized,
            lazy, an unknown subclass), and, on
            every rank, if one rank cannot place its piece or the pieces do not make up the weights.
    """
    placements: list[Placement] = []
    refusal: NotSupportedError | None = None
    try:
        placements = [
            place(w, p, name) for w, p, name in zip(weights, partitions, names, strict=True)
        ]
    except NotSupportedError as error:
        refusal = error
    if _world() > 1 and any(_is_dtensor(w) or _flat_slice(w) for w in weights):
        _compare_ranks(weights, partitions, names, placements, refusal)
    if refusal is not None:
        raise refusal
    return placements


def place(weight: Tensor, partition: Partition, name: str = "weight") -> Placement:
    """How ``weight`` lies on this rank, split as ``partition`` says.

    Raises:
        NotSupportedError: for a kind of tensor that is not understood (sparse, complex, quantized,
            lazy, an unknown subclass).

    Example:
        >>> from lightning_normdyn.geometry.vectors import Partition
        >>> placement = place(torch.ones(2, 3), Partition.filters((2, 3)))
        >>> [piece.labels.tolist() for piece in placement.pieces]
        [[0, 1]]
    """
    check_weight(weight, name)
    shape = full_shape(weight)
    if tuple(partition.labels.shape) != tuple(shape[k] for k in partition.keep if k < len(shape)):
        raise NotSupportedError(
            f"`{name}` has shape {shape} here, which does not fit its partition into vectors (dims "
            f"{partition.keep} of sizes "
            f"{tuple(partition.labels.shape)}). If it is a slice of a flat FSDP parameter, call "
            f"sharding.survey(module) first."
        )
    flat = _flat_slice(weight)
    if flat is not None:
        return _place_flat(flat, partition, name)
    if _is_dtensor(weight):
        return _place_dtensor(weight, partition, name)
    return Placement(
        shape, partition.n, _itself, (Piece(_itself, partition.keep, partition.labels),)
    )


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse by name what cannot be treated as a dense real weight.

    Raises:
        NotSupportedError: for lazy (uninitialized), complex, sparse, quantized or integer weights
            and unknown tensor subclasses.
    """
    from torch.nn.parameter import is_lazy

    kind = None
    if is_lazy(weight):
        kind = "a lazy parameter without a shape yet; run one forward pass before the fit"
    elif weight.is_complex():
        kind = "complex; leave it out with an exclude pattern"
    elif weight.is_sparse or weight.layout.__repr__() != "torch.strided":
        kind = f"stored as {weight.layout}; leave it out with an exclude pattern"
    elif weight.is_quantized or not weight.is_floating_point():
        kind = f"stored as {weight.dtype}; leave it out with an exclude pattern"
    elif type(weight.data) is not Tensor and not _is_dtensor(weight):
        kind = f"a {type(weight.data).__module__}.{type(weight.data).__name__}, whose storage is not understood; leave it out"
    if kind is not None:
        raise NotSupportedError(
            f"`{name}` was asked to be a target, but it is {kind} (params=[..., '!{name}'])."
        )


def full_shape(weight: Tensor) -> Shape:
    """The shape of the whole weight, whatever this rank holds of it; ``()`` for a lazy parameter.

    Example:
        >>> full_shape(torch.ones(2, 3))
        (2, 3)
    """
    from torch.nn.parameter import is_lazy

    if is_lazy(weight):
        return ()
    flat = _flat_slice(weight)
    if flat is not None:
        return flat.shape
    if isinstance(weight, nn.Parameter) and hasattr(
        weight, "ds_shape"
    ):  # DeepSpeed stage 3 leaves an empty tensor behind
        return tuple(weight.ds_shape)
    return tuple(weight.shape)


def has_gradient(weight: Tensor) -> bool:
    """Whether ``weight`` got a gradient, as far as every rank can answer the same: of a flat shard,
    whether anything beside it did."""
    place = _flat_slice(weight)
    if place is None:
        return weight.grad is not None
    return place.flat is None or place.flat.grad is not None


def gradient_of(weight: Tensor) -> Tensor | None:
    """What the optimizer takes for the gradient of ``weight`` on this rank: its own, or that of the
    tensor that is updated instead."""
    master = _master_of(weight)
    return weight.grad if master is None else master.flat.grad


def version_of(weight: Tensor) -> int:
    """How often the numbers of ``weight`` on this rank were written to, as torch counts it; for a
    gradient or a state tensor, too."""
    master = _master_of(weight)
    tensor = weight if master is None else master.flat
    if _is_dtensor(tensor):  # writing to the local tensor is not counted by what is around it
        tensor = cast(Any, tensor)._local_tensor
    return int(tensor._version)


def is_plain(weight: Tensor) -> bool:
    """Whether the optimizer writes to ``weight`` itself, and not to something inside it or in its
    place."""
    return not _is_dtensor(weight) and _master_of(weight) is None


def _master_of(weight: Tensor) -> Master | None:
    place = _FLAT.get(weight) if len(_FLAT.data) else None
    return None if place is None else place.master


def forget_gradients(module: nn.Module, stepped: Iterable[Tensor]) -> None:
    """Before compiled code runs for the first time, take gradients away that torch's compiler
    stumbles over.

    FSDP shows whole weights in a forward pass, with the gradients of their shards from the step
    before, which Lightning zeroes only
    later; the compiler takes a weight for the same as its gradient. Without somebody who looks at a
    first batch uncompiled, there are none.

    Args:
        module: what may be compiled, or a part of it.
        stepped: the parameters that an optimizer has just stepped, so that nothing is lost.
    """
    if any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
        for m in module.modules()
    ):
        for weight in stepped:
            if _flat_slice(weight) is not None:
                weight.grad = None


def _distinct(values: Tensor) -> Tensor:
    return cast(Tensor, torch.unique(values))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


# ------------------------------------------------------------------------------------------ DTensor


def _dtensor_class() -> Any:
    return import_module("torch.distributed.tensor").DTensor


def _is_dtensor(tensor: Tensor) -> bool:
    return type(tensor.data) is not Tensor and isinstance(tensor, _dtensor_class())


def _place_dtensor(weight: Any, partition: Partition, name: str) -> Placement:
    mesh, placements, shape = weight.device_mesh, weight.placements, tuple(weight.shape)
    mine = mesh.get_coordinate()
    sharded = {m: d for m, p in enumerate(placements) if (d := _sharded_dim(p, name)) is not None}
    if mine is None:
        raise NotSupportedError(
            f"`{name}` lies on the device mesh {mesh}, which rank {dist.get_rank()} is not part "
            f"of. "
            f"Leave it out with params=[..., '!{name}']."
        )
    coordinate = _coordinates(shape, mesh, placements, sharded)
    # This rank's block: along each dimension the indices that have this rank's coordinates.
    block = []
    for d in range(len(shape)):
        inside = torch.ones(shape[d], dtype=torch.bool, device="cpu")
        for m in sharded:
            if sharded[m] == d:
                inside &= coordinate[m] == mine[m]
        block.append(inside.nonzero().flatten())
    if tuple(len(b) for b in block) != tuple(weight.to_local().shape):
        raise NotSupportedError(
            f"`{name}` with placements {placements} on {mesh} has the local shape "
            f"{tuple(weight.to_local().shape)} where "
            f"{tuple(len(b) for b in block)} was expected. This was tested with {TESTED}; here is "
            f"torch {torch.__version__}."
        )
    labels = partition.labels
    for i, k in enumerate(partition.keep):
        labels = labels.index_select(i, block[k])
    pieces = (Piece(_itself, partition.keep, labels),) if all(len(b) for b in block) else ()
    return Placement(
        shape,
        partition.n,
        _to_local(placements),
        pieces,
        _dtensor_sharing(partition, mesh, sharded, coordinate, mine),
    )


def _sharded_dim(placement: Any, name: str) -> int | None:
    if placement.is_replicate():
        return None
    if type(placement).__name__ not in ("Shard", "_StridedShard"):
        raise NotSupportedError(
            f"`{name}` has the DTensor placement {placement!r}, which is not understood (Shard and "
            f"Replicate are). "
            f"Leave it out with params=[..., '!{name}']."
        )
    return int(placement.dim)


def _to_local(placements: Any) -> Callable[[Tensor], Tensor]:
    def storage(tensor: Any) -> Tensor:
        if not _is_dtensor(tensor):
            return cast(Tensor, tensor)
        # Sequence parallelism leaves some gradients as partial sums; the optimizer would complete
        # them in the same way.
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        return cast(Tensor, tensor.to_local())

    return storage


def _coordinates(
    shape: Shape, mesh: Any, placements: Any, sharded: dict[int, int]
) -> dict[int, Tensor]:
    """For every mesh dimension that shards: the mesh coordinate of each index of the tensor
    dimension that it shards."""
    found: dict[int, Tensor] = {}
    for d in set(sharded.values()):
        strided = [
            m
            for m in sharded
            if sharded[m] == d and type(placements[m]).__name__ == "_StridedShard"
        ]
        plain = [m for m in sharded if sharded[m] == d and m not in strided]
        # A strided shard (FSDP2 over tensor parallelism) splits what the mesh dimensions to its
        # right have already split.
        order = [*plain, *reversed(strided)]
        table = _successive_chunks(shape[d], tuple(mesh.size(m) for m in order))
        found.update({m: table[i] for i, m in enumerate(order)})
    return found


@lru_cache(maxsize=4096)
def _successive_chunks(size: int, counts: tuple[int, ...]) -> Tensor:
    """Which chunk each of ``size`` indices falls into when they are chunked ``counts[0]``-fold,
    each chunk ``counts[1]``-fold, ..."""
    table = torch.zeros(len(counts), size, dtype=torch.long, device="cpu")
    blocks = [torch.arange(size, dtype=torch.long, device="cpu")]
    for row, count in enumerate(counts):
        chunked = []
        for block in blocks:
            for i, part in enumerate(block.chunk(count)):
                table[row, part] = i
                chunked.append(part)
        blocks = chunked
    return table


def _dtensor_sharing(
    partition: Partition,
    mesh: Any,
    sharded: dict[int, int],
    coordinate: dict[int, Tensor],
    mine: Any,
) -> Sharing | None:
    sharded = {m: d for m, d in sharded.items() if mesh.size(m) > 1}
    if not sharded:
        return None
    keep, labels, n = partition.keep, partition.labels, partition.n
    position = torch.arange(labels.numel(), dtype=torch.long, device="cpu")[labels.flatten() >= 0]
    vector = labels.flatten()[position]
    index = dict(zip(keep, torch.unravel_index(position, labels.shape), strict=True))

    # at[m]: the coordinate along mesh dimension m of each position in the kept dimensions, if m
    # shards one of those.
    at = {m: coordinate[m][index[d]] for m, d in sharded.items() if d in keep}
    chunks = {
        m: int(coordinate[m].max()) + 1 if len(coordinate[m]) else 0 for m in sharded
    }  # not empty
    cut_by = {
        m: _extremes_differ(at[m], vector, n)
        if m in at
        else torch.full((n,), chunks[m] > 1, dtype=torch.bool, device="cpu")
        for m in sharded
    }
    cut = torch.stack(list(cut_by.values())).any(0)
    cutting = [m for m in sharded if bool(cut_by[m].any())]
    group = mesh.get_group(cutting[0]) if len(cutting) == 1 else None

    # Outside of the cutting dimensions the ranks of the group have this rank's coordinates.
    reachable = torch.ones_like(vector, dtype=torch.bool)
    for m in sharded:
        if m not in cutting:
            reachable &= (
                at[m] == mine[m]
                if m in at
                else torch.tensor(mine[m] == 0, dtype=torch.bool, device="cpu")
            )
    present = (
        torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, vector[reachable], True) & cut
    )

    # The holder of a vector's first entry speaks for it.
    first = torch.full((n,), labels.numel(), dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, position, "amin"
    )
    some = torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, vector, True)
    at_first = dict(
        zip(
            keep,
            torch.unravel_index(first.clamp(max=max(labels.numel() - 1, 0)), labels.shape),
            strict=True,
        )
    )
    speaks = some.clone()
    for m, d in sharded.items():
        speaks &= (
            coordinate[m][at_first[d]] == mine[m]
            if d in keep
            else torch.tensor(mine[m] == 0, dtype=torch.bool, device="cpu")
        )
    first_copy = bool((mesh.mesh == 0).any()) and all(
        mine[m] == 0 for m in range(mesh.ndim) if m not in sharded
    )

    # Everywhere: along the kept dimensions each combination of coordinates holds all vectors, along
    # the others no chunk is empty.
    owner, owners = torch.zeros_like(vector), 1
    for m in at:
        owner, owners = owner * mesh.size(m) + at[m], owners * mesh.size(m)
    combinations = _distinct(vector * owners + owner).numel()
    everywhere = combinations == int(some.sum()) * owners and all(
        m in at or chunks[m] == mesh.size(m) for m in sharded
    )
    return Sharing(
        cut, cut if group is None else present, speaks & first_copy, first_copy, everywhere, group
    )


def _extremes_differ(values: Tensor, vector: Tensor, n: int) -> Tensor:
    """Whether the ``values`` of a vector's positions are not all the same: bool ``(n,)``."""
    low = torch.zeros(n, dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, values, "amin", include_self=False
    )
    high = torch.zeros(n, dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, values, "amax", include_self=False
    )
    return low != high


# -------------------------------------------------------------------------------------- flat shards


@dataclass(frozen=True, eq=False)
class Master:
    """A slice of the flat float32 tensor that DeepSpeed's optimizer updates; the parameter itself
    is a copy of it.

    Args:
        flat: the tensor.
        start: where the weight's entries on this rank begin in it.
        length: how many they are.
    """

    flat: Tensor
    start: int
    length: int

    def value(self) -> Tensor:
        """The entries on this rank."""
        return self.of(self.flat)

    def gradient(self) -> Tensor | None:
        """Their gradient, unscaled and clipped; there between the moments ``ready`` and
        ``stepped``."""
        return None if self.flat.grad is None else self.of(self.flat.grad)

    def of(self, flat: Tensor) -> Tensor:
        """The same entries of another tensor of this layout (optimizer state)."""
        return flat.detach()[self.start : self.start + self.length]


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


def _flat_slice(weight: Tensor) -> FlatSlice | None:
    if weight not in _FLAT and getattr(weight, "_fsdp_flattened", False):
        raise NotSupportedError(
            "FSDP has flattened the weights, and where they lie was not looked up. Call "
            "lightning_normdyn.geometry.sharding.survey(model) "
            "with the outermost FSDP module first."
        )
    return cast("FlatSlice | None", _FLAT.get(weight))


def survey(module: nn.Module, optimizers: Iterable[Any] = ()) -> None:
    """Learn where the parameters lie that FSDP or DeepSpeed has flattened. Call it once after
    wrapping; without them it does nothing.

    Args:
        module: the outermost FSDP module, or any other.
        optimizers: as the strategy has wrapped them.

    Raises:
        NotSupportedError: for ``use_orig_params=False`` and for parameters that another strategy
            has sharded before.
    """
    for parameter in module.parameters():
        _FLAT.pop(parameter, None)  # an earlier fit may have used another strategy
    for optimizer in optimizers:
        for view in torch_optimizers(optimizer):
            if isinstance(view, _DeepSpeedView):
                _FLAT.update(view._places)
    for name, submodule in module.named_modules():
        handle = submodule.__dict__.get("_handle")
        if type(handle).__name__ != "FlatParamHandle":
            continue
        (flat, original, sharded) = _private(
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
            _FLAT.update(dict.fromkeys(_private(flat, "_params")[0]))
            continue
        shapes, strides, numels, padding, extensions, size, shards, params = _private(
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
        rank, world, group = _private(handle, "rank", "world_size", "process_group")
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
                raise _untested(
                    f"{where} holds the entries {theirs} of a weight where {(begin, end)} were "
                    f"expected"
                )
            _FLAT[weight] = place


def _place_flat(place: FlatSlice, partition: Partition, name: str) -> Placement:
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
    return Placement(place.shape, partition.n, _itself, tuple(pieces), sharing, place.master)


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


# ------------------------------------------------------------------------------- the ranks together


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _compare_ranks(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
    refusal: NotSupportedError | None,
) -> None:
    """Refuse on every rank what one rank refuses, and weights whose pieces, each counted once, do
    not make up the whole."""
    described = repr(
        [
            (name, p.shape, p.n, p.sharing is None or int(p.sharing.cut.sum()))
            for name, p in zip(names, placements, strict=False)
        ]
    )
    described += f" in {len(groups_of(p.sharing for p in placements if p.sharing))} groups"
    mine = (
        None if refusal is None else str(refusal),
        len(names),
        sha256(described.encode()).hexdigest(),
    )
    everybody: list[Any] = [None] * _world()
    dist.all_gather_object(everybody, mine)
    for rank, (error, _, _) in enumerate(everybody):
        if error is not None:
            raise NotSupportedError(f"rank {rank}: {error}") from refusal
    for rank, (_, count, digest) in enumerate(everybody):
        if digest != everybody[0][2]:
            raise NotSupportedError(
                f"Rank {rank} has other target weights than rank 0 ({count} against "
                f"{everybody[0][1]}, or other shapes or vectors). "
                "A strategy that gives ranks different weights, such as pipeline parallelism, is "
                "not understood. "
                "Use one in which all ranks share all."
            )
    found, expected = [], []
    for weight, partition, placement in zip(weights, partitions, placements, strict=True):
        sharing = placement.sharing or _whole(placement.n)
        entries = placement.value(weight).numel() if sharing.first_copy else 0
        found.append([int(sharing.counted.sum()), entries])
        expected.append(
            [_distinct(partition.labels[partition.labels >= 0]).numel(), prod(placement.shape)]
        )
    total = _all_reduce(
        torch.tensor(found, dtype=torch.long, device=weights[0].device if weights else "cpu"), None
    ).tolist()
    for name, got, want in zip(names, total, expected, strict=True):
        if got != want:
            raise _untested(
                f"The pieces of `{name}` on all ranks make up {got} (vectors, entries) where "
                f"{want} were expected"
            )


def _all_reduce(values: Tensor, group: Any) -> Tensor:
    """Add up ``values`` over ``group`` (None: all ranks), in place, on a device that the group can
    send from."""
    if (
        values.device.type == "cpu" and dist.get_backend(group) == "nccl"
    ):  # weights offloaded to the CPU
        on_device = values.cuda()
        dist.all_reduce(on_device, group=group)
        return values.copy_(on_device)
    dist.all_reduce(values, group=group)
    return values


def _whole(n: int) -> Sharing:
    """Every rank holds everything; rank zero speaks."""
    none, speaks = (
        torch.zeros(n, dtype=torch.bool, device="cpu"),
        _world() == 1 or dist.get_rank() == 0,
    )
    return Sharing(
        none,
        none,
        torch.full((n,), speaks, dtype=torch.bool, device="cpu"),
        speaks,
        everywhere=True,
        group=None,
    )


@dataclass(frozen=True)
class _Buffer:
    """The cut vectors that are completed together.

    Args:
        group: over which ranks; None: all.
        size: number of vectors in the buffer, the same on all these ranks.
        cut: local vectors that it holds, ``(c,)``, and ``slot``: where.
        adds: whether this rank adds its piece (``(c,)`` bool), or a copy of it does so on another
            rank.
        weight_of: the weight of every vector of the buffer, ``(size,)``.
        length: its number of entries, ``(size,)``.
        others: local vectors that are not cut and that this rank speaks for.
    """

    group: Any
    size: int
    cut: Tensor
    slot: Tensor
    adds: Tensor
    weight_of: Tensor
    length: Tensor
    others: Tensor


class Reduction:
    """Completes sums over the ranks that share vectors, with one collective at most. One process
    holds everything: nothing to do.

    Every rank calls every method, also a rank that holds nothing. If all cut vectors are shared
    within one process group (or one of equal
    groups side by side), only that group communicates, and only about those vectors; else all ranks
    do, each piece counted once.

    Args:
        placements: of the weights, in the order of the index space.
        lengths: for each weight the number of entries of all its vectors.
        device: where sums are kept.

    Attributes:
        length: number of entries of every vector held here.
        weight_of: its weight.
        everywhere: whether every rank holds a piece of every vector.
        cuts: whether some vector lies on several ranks.
    """

    def __init__(
        self, placements: Sequence[Placement], lengths: Sequence[Tensor], device: torch.device
    ) -> None:
        self.weights = len(placements)
        self._lengths = list(lengths)
        self._held = [p.held for p in placements]
        self._sizes = [p.n for p in placements]
        self._sharings = [p.sharing or _whole(p.n) for p in placements]
        self._device = device
        self.everywhere = all(s.everywhere for s in self._sharings)
        self.cuts = any(bool(s.cut.any()) for s in self._sharings)
        self.length = self._locally(self._lengths).to(device)
        self._counts = [len(h) for h in self._held]
        self.weight_of = _repeat(range(self.weights), self._counts).to(device)
        self._speaks = (
            self._locally([s.counted for s in self._sharings]).nonzero().flatten().to(device)
        )
        groups = groups_of(self._sharings)
        self._group = next(iter(groups.values())) if len(groups) == 1 else None
        self._near: _Buffer | None = None
        self._far: _Buffer | None = None

    def _locally(self, per_weight: Sequence[Tensor]) -> Tensor:
        """From all vectors of each weight to those held here, weight after weight."""
        return torch.cat(
            [values[held] for values, held in zip(per_weight, self._held, strict=True)]
            or [torch.zeros(0, dtype=torch.float32, device="cpu")]
        )

    def _buffer(self, near: bool) -> _Buffer:
        """The buffer of the group, or (not ``near``) the one that all cut vectors of all ranks fit
        into."""
        near = near and self._group is not None
        known = self._near if near else self._far
        if known is None:
            known = self._make_buffer(near)
            if near:
                self._near = known
            else:
                self._far = known
        return known

    def _make_buffer(self, near: bool) -> _Buffer:
        chosen = [s.present if near else s.cut for s in self._sharings]
        counts = torch.tensor([int(c.sum()) for c in chosen], dtype=torch.long, device="cpu")
        starts = counts.cumsum(0) - counts
        slot = self._locally(
            [
                torch.where(c, c.cumsum(0) - 1 + start, -1)
                for c, start in zip(chosen, starts, strict=True)
            ]
        )
        adds = self._locally(
            [
                torch.full((n,), near or s.first_copy, dtype=torch.bool, device="cpu")
                for n, s in zip(self._sizes, self._sharings, strict=True)
            ]
        )
        cut = (slot >= 0).nonzero().flatten()
        speaks = self._speaks.cpu()
        return _Buffer(
            group=self._group if near else None,
            size=int(counts.sum()),
            cut=cut.to(self._device),
            slot=slot[cut].to(self._device),
            adds=adds[cut].to(self._device),
            weight_of=_repeat(range(self.weights), counts.tolist()).to(self._device),
            length=torch.cat(
                [length[c] for length, c in zip(self._lengths, chosen, strict=True)]
            ).to(self._device),
            others=speaks[slot[speaks] < 0].to(self._device),
        )

    def _fill(self, buffer: _Buffer, packed: Tensor) -> Tensor:
        out = packed.new_zeros(*packed.shape[:-1], buffer.size)
        # A copy that does not add writes zeros: a product with 0 would let a NaN through.
        pieces = packed[..., buffer.cut]
        out[..., buffer.slot] = torch.where(buffer.adds, pieces, torch.zeros_like(pieces))
        return out

    def sum_(self, packed: Tensor) -> Tensor:
        """Complete ``(..., n)`` sums of the vectors held here, in place."""
        if self.cuts:
            buffer = self._buffer(near=True)
            packed[..., buffer.cut] = _all_reduce(self._fill(buffer, packed), buffer.group)[
                ..., buffer.slot
            ]
        return packed

    def per_weight(self, values: Tensor) -> Tensor:
        """Sum ``(..., n)`` over the vectors held here of each weight: ``(..., weights)``."""
        if (
            values.device.type == "cpu" and self.weights
        ):  # twice as fast there; elsewhere it would be a kernel for every weight
            return torch.stack(
                [part.sum(-1) for part in values.split_with_sizes(self._counts, -1)], -1
            )
        return values.new_zeros(*values.shape[:-1], self.weights).index_add_(
            -1, self.weight_of, values
        )

    def totals(self, values: Tensor) -> Tensor:
        """Sum complete ``(..., n)`` values over all vectors of each weight on all ranks, each
        counted once: ``(..., weights)``."""
        if self.everywhere:
            return self.per_weight(values)
        return _all_reduce(self._spoken(values, self._speaks), None)

    def mean_over_copies(self, totals: Tensor) -> Tensor:
        """The mean over all ranks of totals that were taken without communication; others are equal
        on all ranks already."""
        if not self.everywhere or _world() == 1:
            return totals
        return _all_reduce(totals.contiguous(), None) / _world()

    def counts(self, bins: Tensor, size: int) -> Tensor:
        """How many vectors of each weight on all ranks lie in each bin, each counted once: ``(...,
        n)`` to ``(..., weights, size)``."""
        chosen = slice(None) if self.everywhere else self._speaks
        weight_of, none = self.weight_of[chosen], self.weights * size
        out = self.length.new_zeros(bins[..., 0].numel(), none + 1)
        for row, mine in zip(out, bins[..., chosen].flatten(0, -2), strict=True):
            index = torch.where(mine >= 0, weight_of * size + mine, none)
            row.index_add_(0, index, torch.ones_like(index, dtype=out.dtype))
        out = out[:, :none].reshape(*bins.shape[:-1], self.weights, size)
        return out if self.everywhere else _all_reduce(out, None)

    def _spoken(self, values: Tensor, chosen: Tensor) -> Tensor:
        out = values.new_zeros(*values.shape[:-1], self.weights)
        return out.index_add_(-1, self.weight_of[chosen], values[..., chosen])

    def sum_with_totals_(
        self, packed: Tensor, summarize: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Complete ``(K, n)`` sums in place and return totals of what ``summarize`` makes of them,
        in one collective.

        Args:
            packed: this rank's sums.
            summarize: from sums ``(K, m)`` and lengths ``(m,)`` of any vectors to ``(J, m)``.

        Returns:
            ``(J, weights)``.
        """
        if self.everywhere or not self.cuts:
            return self.totals(summarize(self.sum_(packed), self.length))
        # Whole vectors are summarized before the collective; the sums of all cut vectors go with
        # them and every rank summarizes those.
        buffer = self._buffer(near=False)
        totals = self._spoken(summarize(packed, self.length), buffer.others)
        pieces = self._fill(buffer, packed)
        both = _all_reduce(torch.cat([pieces.flatten(), totals.flatten()]), None)
        pieces, totals = (
            both[: pieces.numel()].view_as(pieces),
            both[pieces.numel() :].view_as(totals),
        )
        packed[..., buffer.cut] = pieces[..., buffer.slot]
        return totals.index_add_(-1, buffer.weight_of, summarize(pieces, buffer.length))

    def gather(self, values: Tensor) -> list[Tensor]:
        """From ``(..., n)`` values of the vectors held here to those of all vectors of each weight,
        on every rank."""
        starts = torch.tensor(
            [0, *self._sizes[:-1]] if self._sizes else [], dtype=torch.long, device="cpu"
        ).cumsum(0)
        place = torch.cat(
            [held + start for held, start in zip(self._held, starts, strict=True)] or [starts]
        ).to(values.device)
        out = values.new_zeros(
            *values.shape[:-1],
            sum(self._sizes),
            dtype=torch.float64 if values.device.type != "mps" else torch.float32,
        )
        chosen = slice(None) if self.everywhere else self._speaks
        out[..., place[chosen]] = values[..., chosen].to(out.dtype)
        if not self.everywhere:
            _all_reduce(out, None)
        return list(torch.split(out.to(values.dtype), self._sizes, -1))

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """From values of all vectors of each weight to those of the vectors held here: the inverse
        of `gather`, without communication."""
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.cat(
            [
                v.to(self._device)[..., h.to(self._device)]
                for v, h in zip(values, self._held, strict=True)
            ],
            -1,
        )


def groups_of(sharings: Iterable[Sharing]) -> dict[tuple[int, ...] | None, Any]:
    """The different groups of ranks over which cut vectors are completed; None stands for one that
    no process group is."""
    return {
        None if s.group is None else tuple(dist.get_process_group_ranks(s.group)): s.group
        for s in sharings
        if bool(s.cut.any())
    }


def _repeat(values: Iterable[int], counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(
        torch.tensor(list(values), dtype=torch.long, device="cpu"),
        torch.tensor(list(counts), dtype=torch.long, device="cpu"),
    )


# --------------------------------------------------------------------------------------- optimizers


_VIEWS: WeakKeyDictionary[Any, list[Optimizer]] = WeakKeyDictionary()


def torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """What steps when ``optimizer`` does, each as a torch optimizer of the model's own weights.

    That is the optimizer itself, inside whatever Lightning, Fabric or a strategy has wrapped around
    it. Where a strategy steps something
    else than the weights it is a view, which has the class, the param groups, the state and the
    step hooks that the optimizer would have
    on one process: one for torch's ZeroRedundancyOptimizer, one for each part that DeepSpeed steps
    on its own.

    An optimizer that a person has put around another one steps itself: what it does to the weights
    after the inner step (Lookahead) belongs
    to its step. The exception is one in two phases (SAM): its first moves the weights aside for a
    second gradient, its second moves them
    back and lets the inner optimizer make the step.

    Raises:
        NotSupportedError: if there is none, or a way of stepping that is not understood.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
        >>> torch_optimizers(optimizer) == [optimizer]
        True
    """
    inner = without_framework(optimizer)
    if _is_deepspeed(inner) or _is_zero_redundancy(inner):
        if inner not in _VIEWS:
            _VIEWS[inner] = (
                _deepspeed_views(inner) if _is_deepspeed(inner) else [_zero_redundancy_view(inner)]
            )
        return _VIEWS[inner]
    if not isinstance(inner, Optimizer):
        raise NotSupportedError(
            f"{type(optimizer).__name__} is not a torch optimizer and wraps none. Use a "
            f"torch.optim.Optimizer."
        )
    return [second_phase(inner) if steps_in_two_phases(inner) else inner]


class _View:
    """An optimizer as it would be on one process. It never steps; it only tells, and passes hooks
    on."""

    _target: Any  # weak: the registry of views must not keep optimizers alive

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_target" not in vars(self):
            raise AttributeError(name)
        return getattr(self._target(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__} as seen on one process"


def _new_view(view: type[_View], target: Optimizer) -> Any:
    """A ``view`` that passes for an instance of the class of ``target``."""
    rule = type(target)
    made: Any = object.__new__(type(rule.__name__, (view, rule), {"__module__": rule.__module__}))
    made._target = ref(target)
    return made


def _is_zero_redundancy(optimizer: Any) -> bool:
    return any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__)


def _zero_redundancy_view(outer: Any) -> Optimizer:
    inner, overlap = _private(outer, "optim", "_overlap_with_ddp")
    if overlap:
        raise NotSupportedError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside of DDP's backward pass, "
            "where no gradient is final. "
            "Use overlap_with_ddp=False."
        )
    view = _new_view(_ZeroRedundancyView, inner)
    view._outer = ref(outer)
    return cast(Optimizer, view)


def groups_for_step(
    optimizer: Optimizer,
    groups: Sequence[dict[str, Any]],
    taken: Container[Tensor],
    *,
    write_through: bool,
) -> list[dict[str, Any]] | None:
    """What a step is to see in place of ``groups``, so that it applies no weight decay to the
    weights in ``taken``.

    Args:
        optimizer: one of `torch_optimizers`.
        groups: those of the object that steps: the optimizer itself, or what a strategy steps in
            its place.
        taken: the model's own weights.
        write_through: as for `lightning_normdyn.optimizers.step_view.split_groups`.

    Returns:
        As `lightning_normdyn.optimizers.step_view.split_groups`.
    """
    if isinstance(optimizer, _DeepSpeedView):
        return optimizer.groups_for_step(groups, taken, write_through)
    return split_groups(groups, taken, write_through=write_through)


def steps_as_one(optimizer: Optimizer) -> bool:
    """Whether all weights of ``optimizer`` are stepped as one tensor, so that its weight decay is
    on for all of them or off for all."""
    return isinstance(optimizer, _DeepSpeedView)


class _ZeroRedundancyView(_View):
    """Every rank holds all weights and gradients and updates some, which are then sent to all.

    So every rank treats all weights alike, as under DDP: at ``ready`` inside the inner step, at
    ``stepped`` after the outer one, when the
    others' updates have arrived.
    """

    _outer: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self._outer().param_groups)

    @property
    def state(self) -> Any:
        return self._target().state

    @property
    def _optimizer_step_post_hooks(self) -> Any:
        return self._outer()._optimizer_step_post_hooks

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self._target().register_step_pre_hook(
            lambda _, args, kwargs: hook(self, args, kwargs)
        )

    def register_step_post_hook(self, hook: Any) -> Any:
        return self._outer().register_step_post_hook(
            lambda _, args, kwargs: hook(self, args, kwargs)
        )


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def accumulates(model: Any) -> bool:
    """Whether what is called a step now only adds to the gradients: DeepSpeed's engine accumulates
    by itself, after it was told to step."""
    is_boundary = getattr(model, "is_gradient_accumulation_boundary", None)
    return is_boundary is not None and not is_boundary()


_UNTESTED_DEEPSPEED = (
    "cpu_offload",
    "offload_optimizer",
    "swap_optimizer",
    "zenflow",
    "torch_autocast_gradscaler",
    "use_muon",
)


def _deepspeed_views(optimizer: Any) -> list[Optimizer]:
    name = type(optimizer).__name__
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise NotSupportedError(
            f"DeepSpeed's {name} is not understood (ZeRO stages 1, 2 and 3 are, and stage 0 in "
            f"float32). "
            "Use stage 1, 2 or 3, or precision='32-true'."
        )
    switched_on = [key for key in _UNTESTED_DEEPSPEED if getattr(optimizer, key, None)]
    if switched_on:
        raise NotSupportedError(
            f"DeepSpeed with {switched_on[0]} was not tested. Leave it out of the DeepSpeed "
            f"configuration."
        )
    parts = _deepspeed_stage3(optimizer) if name.endswith("3") else _deepspeed_stage12(optimizer)
    views = []
    for flat, group, weights in parts:
        view = _new_view(_DeepSpeedView, optimizer.optimizer)
        view._flat, view._group, view._places = flat, group, weights
        view.param_groups = [{**group, "params": list(weights)}]
        views.append(cast(Optimizer, view))
    return views


Part = tuple[Tensor, dict[str, Any], dict[Tensor, FlatSlice]]


def _deepspeed_stage12(optimizer: Any) -> Iterator[Part]:
    weights, buffers, masters, sizes, groups = _private(
        optimizer,
        "bit16_groups",
        "bit16_groups_flat",
        "single_partition_of_fp32_groups",
        "partition_size",
        "real_dp_process_group",
    )
    for i, group in enumerate(optimizer.optimizer.param_groups):
        rank, places = dist.get_rank(groups[i]), {}
        for weight in weights[i]:
            # Parameters are views of the flat buffer, whatever the order and the gaps in it.
            offset = (weight.data_ptr() - buffers[i].data_ptr()) // weight.element_size()
            place = FlatSlice(
                tuple(weight.shape), tuple(range(weight.dim())), offset, sizes[i], rank, groups[i]
            )
            start, stop = place.range_of(rank)
            (mapping,) = _private(weight, "_hp_mapping")
            theirs = (
                (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
                if mapping is not None
                else None
            )
            if theirs != ((start, stop - start) if stop > start else None):
                raise _untested(
                    f"DeepSpeed holds the entries {theirs} (start, number) of a weight where "
                    f"{(start, stop - start)} was expected"
                )
            begin = mapping.hp_fragment_address.start if mapping is not None else 0
            places[weight] = replace(place, master=Master(masters[i], begin, stop - start))
        yield masters[i], group, places


def _deepspeed_stage3(optimizer: Any) -> Iterator[Part]:
    weights, masters, group_of = _private(
        optimizer, "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id"
    )
    for i, master in enumerate(masters):
        begin, places = 0, {}
        for weight in weights[i]:
            shape, piece, group = _private(weight, "ds_shape", "ds_tensor", "ds_process_group")
            chunk = piece.ds_numel
            place = FlatSlice(
                tuple(shape), tuple(range(len(shape))), 0, chunk, dist.get_rank(group), group
            )
            start, stop = place.range_of(place.rank)
            places[weight] = replace(place, master=Master(master, begin, stop - start))
            begin += (
                chunk  # what lies between the end of the weight and that of the chunk is padding
            )
        if begin != master.numel():
            raise _untested(
                f"a sub-group of DeepSpeed stage 3 has {master.numel()} entries where {begin} were "
                f"expected"
            )
        yield master, optimizer.optimizer.param_groups[group_of[i]], places


class _DeepSpeedView(_View):
    """One of the flat tensors that DeepSpeed steps one after the other, as the weights that it is
    made of."""

    _flat: Tensor
    _group: dict[str, Any]
    _places: dict[Tensor, FlatSlice]
    param_groups: list[dict[str, Any]]

    def groups_for_step(
        self, groups: Sequence[dict[str, Any]], taken: Container[Tensor], write_through: bool
    ) -> list[dict[str, Any]] | None:
        """`groups_for_step`: a flat tensor has one group only, so none of its weights gets decay
        from the optimizer."""
        if not self._group.get("weight_decay") or not any(
            weight in taken for weight in self._places
        ):
            return None
        shown: list[dict[str, Any]] = []
        for group in groups:
            ours = any(p is self._flat for p in group["params"])
            shown.append(
                part_of(group, {"weight_decay": 0.0}, write_through=write_through)
                if ours
                else group
            )
        return shown

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        flat = self._target().state.get(self._flat, {})
        return {
            w: {k: self._part(place, v) for k, v in flat.items()}
            for w, place in self._places.items()
        }

    def _part(self, place: FlatSlice, value: Any) -> Any:
        assert place.master is not None
        return (
            place.master.of(value)
            if isinstance(value, Tensor) and value.shape == self._flat.shape
            else value
        )

    def _steps(self) -> bool:
        """Whether the flat tensor is what steps now; its group is looked up each time, since
        loading a checkpoint makes new ones."""
        for group in self._target().param_groups:
            if any(p is self._flat for p in group["params"]):
                self._group = group
                return True
        return False

    def register_step_pre_hook(self, hook: Any) -> Any:
        def ours(_: Any, args: Any, kwargs: Any) -> Any:
            if not self._steps():
                return None
            settings = {key: value for key, value in self._group.items() if key != "params"}
            self.param_groups[0].update(settings)  # a schedule changes them
            return hook(self, args, kwargs)

        return self._target().register_step_pre_hook(ours)

    def register_step_post_hook(self, hook: Any) -> Any:
        def ours(_: Any, args: Any, kwargs: Any) -> None:
            if self._steps():
                hook(self, args, kwargs)

        return self._target().register_step_post_hook(ours)


def _private(owner: Any, *names: str) -> list[Any]:
    """Attributes that are not part of torch's public interface."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _untested(f"{type(owner).__name__} has no `{missing[0]}`")
    return [getattr(owner, name) for name in names]


def _untested(what: str) -> NotSupportedError:
    return NotSupportedError(
        f"{what}. The layout of sharded weights was tested with {TESTED}; here is torch "
        f"{torch.__version__}. "
        "Use the tested version, or another strategy."
    )
