"""How one weight lies on this rank: which views of its local storage hold which vectors, and who
holds the rest.

Letters: n vectors of a weight, W weights, K sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError

from .partition import indices

Shape = tuple[int, ...]

Range = tuple[int, int]

TESTED = "torch 2.13"


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


class Rows:
    """A piece of one weight as a tensor in which every row belongs to one vector.

    Attributes:
        labels: int64 ``(rows,)``: the vector within the weight that each row belongs to, or -1.
        kept: the dimensions of its views that tell rows apart.
        are_whole: whether the rows are all of the weight, one below the other: runs of its entries
            in the order of their indices.
    """

    def __init__(self, piece: Piece) -> None:
        self._select = piece.select
        labels, kept, self._blocks = _merge_rows(piece.labels, piece.keep)
        self.kept = frozenset(kept)
        self.are_whole = piece.select is itself and sorted(kept) == list(range(len(kept)))
        self.labels = labels.flatten()

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a local tensor; a row is what the kept dimensions tell apart."""
        view = self._select(tensor)
        for dim, block in self._blocks:
            # A view, whatever the strides: the dimension is split, not joined.
            view = view.unflatten(dim, (-1, block))  # type: ignore[no-untyped-call]
        return view

    def form(self, view: Tensor) -> list[int]:
        """The shape of one number per row that broadcasts over a view."""
        form = [1] * view.ndim
        for d in self.kept:
            form[d] = view.shape[d]
        return form

    def dims(self, view: Tensor) -> list[int]:
        """The dimensions of a view that lie within a row."""
        return [d for d in range(view.ndim) if d not in self.kept]


# All callbacks on a plain weight have the same piece of it.
_known_rows: WeakKeyDictionary[Piece, Rows] = WeakKeyDictionary()


def rows_of(piece: Piece) -> Rows:
    """The rows of a piece, worked out once."""
    rows = _known_rows.get(piece)
    if rows is None:
        rows = _known_rows[piece] = Rows(piece)
    return rows


def _merge_rows(
    labels: Tensor, kept: Sequence[int]
) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """Join neighbouring entries that have the same label, so that groups, layers and transposed
    filters are single rows as well.

    Args:
        labels: of a piece.
        kept: the dimensions of the piece's view that they stand for.

    Returns:
        The labels of the joined rows; the dimensions that are kept; and which dimensions to
        unflatten first, ``(dim, size of the inner one)``, one after the other.
    """
    # Fewer and longer rows: fewer numbers per weight, and longer runs of memory for each sum.
    kept = list(kept)
    blocks: list[tuple[int, int]] = []
    if not labels.numel():
        return labels, kept, blocks
    # From the last axis on, so that the axes still to come keep their numbers.
    for axis in reversed(range(labels.ndim)):
        size = labels.shape[axis]
        lines = labels.movedim(axis, 0).reshape(size, -1)
        # The largest block such that no label changes within one.
        changes = (lines[1:] != lines[:-1]).any(1).nonzero().flatten() + 1
        block = gcd(size, *changes.tolist())
        labels = labels.index_select(axis, indices(size)[::block])
        if block == size:
            labels = labels.squeeze(axis)
            del kept[axis]
        elif block > 1:
            dim = kept[axis]
            blocks.append((dim, block))
            kept = [k + (k > dim) for k in kept]
    return labels, kept, blocks


# ---- The primitives ----


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
class Master:
    """A slice of the flat float32 tensor that DeepSpeed's optimizer updates; the parameter itself
    is a copy of it.

    Args:
        flat: the tensor.
        start: where the weight's entries on this rank begin in it.
        length: how many they are.
    """

    # Held as a whole and not as the slice: gradients and state have the same layout.
    flat: Tensor
    start: int
    length: int

    def gradient(self) -> Tensor | None:
        """Their gradient, unscaled and clipped.

        It is there only while the step runs: DeepSpeed assembles it just before and frees it after.
        """
        if self.flat.grad is None:
            return None
        return self.of(self.flat.grad)

    def of(
        self,
        flat: Tensor,
    ) -> Tensor:
        """The same entries of another tensor of this layout (optimizer state)."""
        return flat.detach()[self.start : self.start + self.length]


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
    """

    shape: Shape
    n: int
    storage: Callable[[Tensor], Tensor]
    pieces: tuple[Piece, ...]
    sharing: Sharing | None = None
    master: Master | None = None

    @cached_property
    def held(self) -> Tensor:
        """The vectors of which this rank holds a piece: int64, ascending."""
        # Without shards every vector is here, also one that no label names.
        if self.sharing is None:
            return indices(self.n)
        labels = [piece.labels.flatten() for piece in self.pieces]
        held = distinct(torch.cat([indices(0), *labels]))
        return held[held >= 0]

    def value(
        self,
        weight: Tensor,
    ) -> Tensor:
        """This rank's plain tensor of the numbers that the optimizer updates; writing to it writes
        to the weight."""
        # The parameter itself may be a rounded copy (bfloat16) of what the optimizer updates.
        value = weight if self.master is None else self.master.of(self.master.flat)
        return self.storage(value.detach())

    def gradient(
        self,
        weight: Tensor,
    ) -> Tensor | None:
        """Its gradient as the optimizer receives it, or None."""
        gradient = weight.grad if self.master is None else self.master.gradient()
        if gradient is None:
            return None
        # A gradient of a gradient must not keep the graph of this step alive.
        return self.storage(gradient.detach())


def distinct(values: Tensor) -> Tensor:
    """The different values, ascending."""
    values_once: Tensor = torch.unique(values)
    return values_once


def itself(tensor: Tensor) -> Tensor:
    """From a plain tensor to its storage."""
    return tensor


# ---- What torch and DeepSpeed keep private, behind a check that names the tested version ----


def private(owner: Any, *names: str) -> list[Any]:
    """Attributes that are not part of a public interface.

    Raises:
        NotSupportedError: if one of them is not there.
    """
    # All are looked for before the first is used, so that the message names the layout, not a
    # failure somewhere behind it.
    for name in names:
        if not hasattr(owner, name):
            raise untested(f"{type(owner).__name__} has no `{name}`")
    return [getattr(owner, name) for name in names]


def untested(what: str) -> NotSupportedError:
    """The error that says ``what`` is otherwise than in the tested version."""
    return NotSupportedError(
        f"{what}. The layout of sharded weights was tested with {TESTED}; here is torch "
        f"{torch.__version__}. Use the tested version, or another strategy."
    )


@dataclass(frozen=True)
class Runs:
    """Vectors of each weight, to be added up.

    Args:
        chosen: which of all vectors, in their order.
        weight_of: int64, the weight of each of them.
        weights: how many weights there are.
    """

    chosen: slice | Tensor
    weight_of: Tensor
    weights: int

    @cached_property
    def order(self) -> Tensor:
        """int32: the chosen vectors, weight after weight."""
        chosen = self.chosen
        if isinstance(chosen, slice):
            chosen = indices(len(self.weight_of))
        return chosen.to(self.weight_of.device, torch.int32)

    @cached_property
    def first(self) -> Tensor:
        """int32 ``(weights + 1,)``: where those of each weight begin in `order`."""
        ends = indices(self.weights + 1)
        # On the host, and once: a search on the device would be for a few hundred numbers.
        first = torch.searchsorted(self.weight_of.cpu(), ends)
        return first.to(self.weight_of.device, torch.int32)

    def add_up(self, values: Tensor) -> Tensor:
        """Sum ``(..., n)`` values: ``(..., weights)``."""
        totals = values.new_zeros(*values.shape[:-1], self.weights)
        return totals.index_add_(-1, self.weight_of, values[..., self.chosen])
