"""How one weight lies on this rank: which views of its local storage hold which vectors, and who
holds the rest.

Letters: n vectors of a weight, W weights, K sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import indices
from lightning_normdyn.geometry.wrapped import Master

Shape = tuple[int, ...]


Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Piece:
    """A view of a rank's local storage whose kept dimensions tell vectors apart.

    Args:
        select: from the local storage (weight, gradient or state) to the view; never copies.
        keep: the dimensions of the view that are kept when a vector is summed; the others are
            summed over.
        labels: int64, shape of the kept dimensions: the vector within the whole weight, or -1.
    """

    # A function, so that one piece serves the weight, its gradient and its state alike.
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
    # Worked out of the pieces.
    held: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Without shards every vector is here, also one that no label names.
        held = indices(self.n)
        if self.sharing is not None:
            labels = [piece.labels.flatten() for piece in self.pieces]
            held = distinct(torch.cat([indices(0), *labels]))
            held = held[held >= 0]
        # The class is frozen; this is how dataclasses themselves set a field.
        object.__setattr__(self, "held", held)

    def value(self, weight: Tensor) -> Tensor:
        """This rank's plain tensor of the numbers that the optimizer updates; writing to it writes
        to the weight."""
        # The parameter itself may be a rounded copy (bfloat16) of what the optimizer updates.
        value = weight if self.master is None else self.master.value()
        return self.storage(value.detach())

    def gradient(self, weight: Tensor) -> Tensor | None:
        """Its gradient as the optimizer receives it, or None."""
        gradient = weight.grad if self.master is None else self.master.gradient()
        if gradient is None:
            return None
        # A gradient of a gradient must not keep the graph of this step alive.
        return self.storage(gradient.detach())


def distinct(values: Tensor) -> Tensor:
    """The different values, ascending."""
    return cast(Tensor, torch.unique(values))


def itself(tensor: Tensor) -> Tensor:
    """From a plain tensor to its storage."""
    return tensor
