"""What a parameter physically is on this rank: a plain tensor, a DTensor, a slice of a flat shard.

It answers with a `Placement`: how to get from the parameter (or its gradient, or a state tensor of
the same layout) to this rank's plain local tensor, which views of that tensor have rows that belong
to one vector each, and which vectors other ranks hold pieces of.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from math import prod
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_normdyn.errors import NotSupportedError

from .dtensor import is_dtensor, place_dtensor
from .flat import flat_slice, knows_slices, place_flat, slice_now
from .partition import Partition
from .pieces import Piece, Placement, Shape, distinct, itself, untested
from .reduction import all_reduce, groups_of, held_everywhere, of_all_ranks, world_size

# Asked of every weight in every step, so without a Python frame for each.
GRADIENT = attrgetter("grad")
VERSION = attrgetter("_version")


def place_all(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
) -> list[Placement]:
    """How every weight lies on this rank; where weights are sharded, the ranks make sure that they
    mean the same.

    Raises:
        NotSupportedError: for a kind of tensor that is not understood (sparse, complex, quantized,
            lazy, an unknown subclass), and, on every rank, if one rank cannot place its piece or
            the pieces do not make up the weights.
    """
    placements = []
    refusal: NotSupportedError | None = None
    try:
        for weight, partition, name in zip(weights, partitions, names, strict=True):
            placements.append(place(weight, partition, name))
    except NotSupportedError as error:
        # Raised below: the other ranks would wait for this one to compare.
        refusal, placements = error, []
    # Without shards (DDP) every rank holds all, and nothing is added up over ranks.
    if world_size() > 1 and any(is_dtensor(w) or flat_slice(w) for w in weights):
        _compare_ranks(weights, partitions, names, placements, refusal)
    if refusal is not None:
        raise refusal
    return placements


def place(
    weight: Tensor,
    partition: Partition,
    name: str = "weight",
) -> Placement:
    """How ``weight`` lies on this rank, split as ``partition`` says.

    Raises:
        NotSupportedError: for a kind of tensor that is not understood (sparse, complex, quantized,
            lazy, an unknown subclass).

    Example:
        >>> import torch
        >>> placement = place(torch.ones(2, 3), Partition.filters((2, 3)))
        >>> [piece.labels.tolist() for piece in placement.pieces]
        [[0, 1]]
    """
    check_weight(weight, name)
    shape, labels = full_shape(weight), partition.labels
    if tuple(labels.shape) != tuple(shape[d] for d in partition.keep if d < len(shape)):
        raise NotSupportedError(
            f"`{name}` has shape {shape} here, which does not fit its partition into vectors (dims "
            f"{partition.keep} of sizes {tuple(labels.shape)}). If it is a slice of a flat FSDP "
            f"parameter, call lightning_normdyn.survey(module) first."
        )
    flat = flat_slice(weight)
    if flat is not None:
        return place_flat(flat, partition)
    if is_dtensor(weight):
        return place_dtensor(weight, partition, name)
    of_shapes = _of_plain.setdefault(partition, {})
    if shape not in of_shapes:
        piece = Piece(itself, partition.keep, labels)
        of_shapes[shape] = Placement(shape, partition.n, itself, (piece,))
    return of_shapes[shape]


# Of a plain tensor nothing but its partition and shape counts, which all callbacks on it share, and
# weights that are alike.
_of_plain: WeakKeyDictionary[Partition, dict[Shape, Placement]] = WeakKeyDictionary()


def check_weight(
    weight: Tensor,
    name: str,
) -> None:
    """Refuse by name what cannot be treated as a dense real weight.

    Raises:
        NotSupportedError: for lazy (uninitialized), complex, sparse, quantized or integer weights
            and unknown tensor subclasses.
    """
    # Everything that is written to in place must be plain numbers with strides: what a subclass or
    # a packed format does to a multiplication is not known.
    kind = None
    if is_lazy(weight):
        kind = "a lazy parameter without a shape yet; run one forward pass before the fit"
    elif weight.is_complex():
        kind = "complex; leave it out with an exclude pattern"
    elif weight.layout != torch.strided:
        kind = f"stored as {weight.layout}; leave it out with an exclude pattern"
    elif weight.is_quantized or not weight.is_floating_point():
        kind = f"stored as {weight.dtype}; leave it out with an exclude pattern"
    elif type(weight.data) is not Tensor and not is_dtensor(weight):
        subclass = f"{type(weight.data).__module__}.{type(weight.data).__name__}"
        kind = f"a {subclass}, whose storage is not understood; leave it out"
    if kind is not None:
        raise NotSupportedError(
            f"`{name}` was asked to be a target, but it is {kind} (params=[..., '!{name}'])."
        )


def hidden_entries(
    weight: Tensor,
    read: Tensor | None,
    name: str,
) -> Tensor | None:
    """Which entries of a weight's local tensor the loss does not read: bool, laid out like it.

    Args:
        weight: the parameter.
        read: bool of its full shape: the entries that the loss reads; None: all.
        name: what to call it in messages.
    """
    if read is None:
        return None
    # A partition that tells every entry apart, so that the mask is sharded as the weight is.
    every_entry = Partition(tuple(range(read.ndim)), torch.where(read, 0, -1), "layer")
    placement = place(weight, every_entry, name)
    hidden = torch.zeros_like(placement.value(weight), dtype=torch.bool)
    for piece in placement.pieces:
        view = piece.select(hidden)
        view.copy_((piece.labels < 0).reshape(view.shape))
    return hidden


def full_shape(weight: Tensor) -> Shape:
    """The shape of the whole weight, whatever this rank holds of it; ``()`` for a lazy parameter.

    Example:
        >>> import torch
        >>> full_shape(torch.ones(2, 3))
        (2, 3)
    """
    if is_lazy(weight):
        return ()
    flat = flat_slice(weight)
    if flat is not None:
        return flat.shape
    # DeepSpeed stage 3 leaves an empty tensor behind.
    return tuple(getattr(weight, "ds_shape", weight.shape))


def has_gradient(weight: Tensor) -> bool:
    """Whether ``weight`` got a gradient, as far as every rank can answer the same: of a flat shard,
    whether anything beside it did."""
    flat = flat_slice(weight)
    if flat is None:
        return weight.grad is not None
    # DeepSpeed's flat tensors get their gradients only within the step.
    return flat.flat is None or flat.flat.grad is not None


def any_gradient(weights: Iterable[Tensor]) -> bool:
    """Whether any of them got a gradient, as `has_gradient` says it."""
    # One by one: nearly always the first that is asked has one.
    return any(map(has_gradient, weights))


def gradient_of(weight: Tensor) -> Tensor | None:
    """What the optimizer takes for the gradient of ``weight`` on this rank: its own, or that of the
    tensor that is updated instead."""
    return _updated(weight).grad


def gradients_of(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """`gradient_of` each weight."""
    # For every weight of every step: a call for each would take longer than what it asks.
    return list(map(gradient_of if knows_slices() else GRADIENT, weights))


def with_gradient(weights: Iterable[Tensor]) -> list[Tensor]:
    """Those of which `gradient_of` has one."""
    if knows_slices():
        return [weight for weight in weights if gradient_of(weight) is not None]
    return [weight for weight in weights if weight.grad is not None]


def version_of(weight: Tensor) -> int:
    """How often the numbers of ``weight`` on this rank were written to, as torch counts it; for a
    gradient or a state tensor, too."""
    tensor = _updated(weight)
    # What is around a local tensor does not count writing to it.
    if is_dtensor(tensor):
        tensor = cast(Any, tensor)._local_tensor
    return int(tensor._version)


def versions_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """`version_of` each tensor; 0 for None."""
    tensors = list(tensors)
    # The common case without a Python frame for each.
    if not knows_slices() and _ITSELF.issuperset(map(type, tensors)):
        return list(map(VERSION, tensors))
    versions = []
    any_sliced = knows_slices()
    for tensor in tensors:
        if tensor is None:
            versions.append(0)
        elif any_sliced or type(tensor) not in _ITSELF:
            versions.append(version_of(tensor))
        else:
            versions.append(tensor._version)
    return versions


# Types of tensors that are nothing but their numbers.
_ITSELF = frozenset([Tensor, nn.Parameter])


def is_plain(weight: Tensor) -> bool:
    """Whether the optimizer writes to ``weight`` itself, and not to something inside it or in its
    place."""
    return not is_dtensor(weight) and _updated(weight) is weight


def _updated(weight: Tensor) -> Tensor:
    """The tensor that the optimizer updates: ``weight``, or DeepSpeed's flat tensor."""
    place = slice_now(weight)
    if place is None or place.master is None:
        return weight
    return place.master.flat


def forget_gradients(
    module: nn.Module,
    stepped: Iterable[Tensor],
) -> None:
    """Before compiled code runs for the first time, take gradients away that torch's compiler
    stumbles over.

    FSDP shows whole weights in a forward pass, with the gradients of their shards from the step
    before, which Lightning zeroes only later; the compiler takes a weight for the same as its
    gradient. Without somebody who looks at a first batch uncompiled, there are none.

    Args:
        module: what may be compiled, or a part of it.
        stepped: the parameters that an optimizer has just stepped, so that nothing is lost.
    """
    # Elsewhere gradients are a person's, who may still want to look at them.
    if not any(map(_is_compiled, module.modules())):
        return
    for weight in stepped:
        if flat_slice(weight) is not None:
            weight.grad = None


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


# ---- Whether all ranks mean the same ----

# Every rank works out by itself which vectors it shares with whom. If one of them came to another
# answer, a collective would add up what does not belong together, or wait for ever.


def _compare_ranks(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
    refusal: NotSupportedError | None,
) -> None:
    """Refuse on every rank what one rank refuses, and weights whose pieces, each counted once, do
    not make up the whole.

    A collective: every rank calls it, also one that has nothing to place.
    """
    error = None if refusal is None else str(refusal)
    # A digest: names of thousands of weights need not travel.
    digest = sha256(_description(names, placements).encode()).hexdigest()
    everybody = of_all_ranks((error, len(names), digest))
    # A refusal first: after it there are no placements, so digests differ for no other reason.
    for rank, (error, _, _) in enumerate(everybody):
        if error is not None:
            raise NotSupportedError(f"rank {rank}: {error}") from refusal
    _, first_count, first_digest = everybody[0]
    for rank, (_, count, digest) in enumerate(everybody):
        if digest != first_digest:
            raise NotSupportedError(
                f"Rank {rank} has other target weights than rank 0 ({count} against {first_count}, "
                f"or other shapes or vectors). A strategy that gives ranks different weights, such "
                f"as pipeline parallelism, is not understood. Use one in which all ranks share all."
            )
    _check_completeness(weights, partitions, names, placements)


def _description(
    names: Sequence[str],
    placements: Sequence[Placement],
) -> str:
    """What must be the same on all ranks."""
    parts = []
    # Not strict: there are no placements after a refusal.
    for name, placement in zip(names, placements, strict=False):
        sharing = placement.sharing
        is_cut = sharing is None or int(sharing.cut.sum())
        parts.append((name, placement.shape, placement.n, is_cut))
    groups = groups_of(p.sharing for p in placements if p.sharing is not None)
    return f"{parts} in {len(groups)} groups"


def _check_completeness(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
) -> None:
    counted, expected = [], []
    for weight, partition, placement in zip(weights, partitions, placements, strict=True):
        sharing = placement.sharing or held_everywhere(placement.n)
        # Replicas must not count twice.
        entries = placement.value(weight).numel() * sharing.first_copy
        counted.append([int(sharing.counted.sum()), entries])
        vectors = distinct(partition.labels[partition.labels >= 0])
        expected.append([len(vectors), prod(placement.shape)])
    # On the device of the weights: NCCL sends from nowhere else.
    own = torch.tensor(counted, dtype=torch.long, device=weights[0].device)
    total = all_reduce(own, None)
    for name, got, want in zip(names, total.tolist(), expected, strict=True):
        if got != want:
            raise untested(
                f"The pieces of `{name}` on all ranks make up {got} (vectors, entries) where "
                f"{want} were expected"
            )
