"""Where a rank's piece of a weight lies among its weight vectors, and which ranks hold the rest.

This is the only room that asks what a parameter physically is. It answers with a `Placement`: how to get from the parameter (or its
gradient, or a state tensor of the same layout) to this rank's plain local tensor, which views of that tensor have rows that belong to one
vector each, and whether a sum over a vector must be completed by other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError

if TYPE_CHECKING:
    from lightning_normdyn.vectors import Partition


@dataclass(frozen=True, eq=False)
class Piece:
    """A view of a rank's local storage whose kept dimensions tell vectors apart.

    Args:
        select: from the local storage (weight, gradient or state) to the view; never copies.
        keep: the dimensions of the view that are kept when a vector is summed; the others are summed over.
        labels: int64, shape of the kept dimensions: the vector within the weight, or -1.
    """

    select: Callable[[Tensor], Tensor]
    keep: tuple[int, ...]
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Placement:
    """How one weight lies on this rank.

    Args:
        storage: from the parameter, its gradient or a state tensor to this rank's plain tensor.
        pieces: the views of that tensor, together covering every entry that this rank holds.
    """

    storage: Callable[[Tensor], Tensor]
    pieces: tuple[Piece, ...]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def place(weight: Tensor, partition: Partition, name: str = "weight") -> Placement:
    """How ``weight`` lies on this rank, split as ``partition`` says.

    Raises:
        NotSupportedError: for a kind of tensor that is not understood (sparse, complex, quantized, lazy).
    """
    check_weight(weight, name)
    return Placement(_itself, (Piece(_itself, partition.keep, partition.labels),))


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse by name what cannot be treated as a dense real weight.

    Raises:
        NotSupportedError: for lazy (uninitialized), complex, sparse, quantized or integer weights.
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
    if kind is not None:
        raise NotSupportedError(f"`{name}` was asked to be a target, but it is {kind} (params=[..., '!{name}']).")


class Reduction:
    """Completes packed sums over the ranks that share vectors. One process holds everything: nothing to do."""

    def __init__(self, placements: Sequence[Placement]) -> None:
        self.placements = placements

    def sum_(self, packed: Tensor) -> Tensor:
        """Add up ``packed`` (float64, ``(..., n)`` or ``(..., weights)``) over the ranks that share vectors, in place."""
        return packed


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of the whole weight, whatever this rank holds of it; ``()`` for a lazy parameter."""
    from torch.nn.parameter import is_lazy

    return () if is_lazy(weight) else tuple(weight.shape)


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer whose step changes the weights, inside whatever a strategy has wrapped around it.

    Raises:
        NotSupportedError: if there is none.
    """
    seen: set[int] = set()
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer") and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise NotSupportedError(f"{type(optimizer).__name__} is not a torch optimizer and wraps none. Use a torch.optim.Optimizer.")
    return optimizer
