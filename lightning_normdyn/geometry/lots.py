"""Which pieces of weights are taken at once: a large one by itself, small ones that are alike
together.

Calling torch for a small weight costs more than its arithmetic, and a pass is a dozen calls. So
small weights whose rows are equally long are copied into one tensor, ``(rows, entries of a row)``,
and a pass is taken over that. What it has changed there is copied back. Which weights lie together
is decided by their shapes alone, once for a set of weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import passes
from .passes import Dims, Operand
from .pieces import Rows

SMALL_ENTRIES = 2**14
"""Up to this many entries of a weight, calling torch for it costs more than copying it."""


COPIED_ENTRIES = 2**12
"""Up to this many entries of a weight, a change of single entries (an addition) is made in a copy
and copied back; it is one or two calls, which cost less than two more passes over memory."""

Change = Callable[..., None]
"""``change(views, *numbers)`` writes to the first of the views; numbers broadcast over them."""


class Lot(ABC):
    """Some rows that are taken at once.

    Attributes:
        pieces: positions of the pieces whose rows these are, in their order.
        rows: how many rows they have.
    """

    pieces: list[int]
    rows: int

    @abstractmethod
    def views(self, operands: Sequence[Operand]) -> list[Tensor | None]:
        """These rows of every operand, hidden entries as zeros; None where an operand has none of
        them."""

    @abstractmethod
    def dims(self, view: Tensor) -> Dims:
        """The dimensions of a view that lie within a row."""

    @abstractmethod
    def form(self, view: Tensor) -> list[int]:
        """The shape of one number per row that broadcasts over a view."""

    @abstractmethod
    def put_back(
        self,
        view: Tensor | None,
        operands: Sequence[Operand],
        position: int,
    ) -> None:
        """Make a view that has been changed what ``operands[position]`` holds; a weight that some
        operand has not is passed over."""

    @abstractmethod
    def change_(
        self, change: Change, operands: Sequence[Operand], numbers: Sequence[Tensor]
    ) -> None:
        """Change the rows of the first operand in place, all of their entries, also hidden ones; a
        weight that some operand has not is passed over.

        Args:
            change: see `Change`.
            operands: what it is called with.
            numbers: ``(rows,)`` each, given behind them.
        """

    @abstractmethod
    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """Multiply every row by its factor, ``(rows,)``, in place."""


class Alone(Lot):
    """One piece of one weight: its views are the memory of the weight itself.

    Args:
        place: position among the pieces.
        weight: position of its weight.
        piece: its rows.
        hidden: the entries of the weight that do not count in sums, or None.
    """

    def __init__(
        self,
        place: int,
        weight: int,
        piece: Rows,
        hidden: Tensor | None,
    ) -> None:
        self.pieces = [place]
        self.rows = len(piece.labels)
        self._weight = weight
        self._piece = piece
        self._hidden = hidden

    def views(self, operands: Sequence[Operand]) -> list[Tensor | None]:
        """See `Lot.views`; with hidden entries these are copies."""
        views: list[Tensor | None] = []
        for operand in operands:
            tensor = operand[self._weight]
            if tensor is None:
                views.append(None)
                continue
            view = self._piece.view(tensor)
            if self._hidden is not None:
                view = view.masked_fill(self._piece.view(self._hidden), 0)
            views.append(view)
        return views

    def dims(self, view: Tensor) -> Dims:
        """See `Lot.dims`."""
        return self._piece.dims(view)

    def form(self, view: Tensor) -> list[int]:
        """See `Lot.form`."""
        return self._piece.form(view)

    def put_back(
        self,
        view: Tensor | None,
        operands: Sequence[Operand],
        position: int,
    ) -> None:
        """Nothing: what was changed is the weight."""

    def change_(
        self, change: Change, operands: Sequence[Operand], numbers: Sequence[Tensor]
    ) -> None:
        """See `Lot.change_`."""
        views = []
        for operand in operands:
            tensor = operand[self._weight]
            if tensor is None:
                return
            views.append(self._piece.view(tensor))
        form = self.form(views[0])
        change(views, *[spread(number, form, views[0]) for number in numbers])

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """See `Lot.scale_`."""
        tensor = tensors[self._weight]
        if tensor is not None:
            view = self._piece.view(tensor)
            view.mul_(spread(factor, self.form(view), view))


class Stack(Lot):
    """Whole small weights, one below the other.

    Args:
        pieces: see `Lot`.
        weights: positions of the weights.
        shapes: of the weights; all are alike but in the first dimension.
        length: entries of a row.

    Attributes:
        weights: as given.
    """

    def __init__(
        self,
        pieces: Sequence[int],
        weights: Sequence[int],
        shapes: Sequence[torch.Size],
        length: int,
    ) -> None:
        self.pieces = list(pieces)
        self.weights = list(weights)
        self._length = length
        self._inner = shapes[0][1:]
        self._sizes = [shape[0] for shape in shapes]
        self.rows = sum(self._sizes) * prod(self._inner) // length
        # A row may be several slices along the first dimension: a group of filters, a layer.
        self._slices_of_row = length // prod(self._inner)
        largest = max(self._sizes) * prod(self._inner)
        self._changes_in_place = largest > COPIED_ENTRIES
        self._kept: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def views(self, operands: Sequence[Operand]) -> list[Tensor | None]:
        """See `Lot.views`: copies, with zeros for the weights that an operand has not."""
        return list(map(self._copied, operands))

    def _copied(self, operand: Operand) -> Tensor | None:
        tensors = [operand[weight] for weight in self.weights]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        if len(present) < len(tensors):
            for i, size in enumerate(self._sizes):
                if tensors[i] is None:
                    tensors[i] = present[0].new_zeros(size, *self._inner)
        # Along the first dimension: the entries then lie in the order of their indices, however
        # each tensor lies in memory.
        copied: Tensor = torch.cat(tensors)  # type: ignore[arg-type]
        return copied.reshape(-1, self._length)

    def dims(self, view: Tensor) -> Dims:
        """See `Lot.dims`."""
        return [1]

    def form(self, view: Tensor) -> list[int]:
        """See `Lot.form`."""
        return [self.rows, 1]

    def put_back(
        self,
        view: Tensor | None,
        operands: Sequence[Operand],
        position: int,
    ) -> None:
        """See `Lot.put_back`."""
        if view is None:
            return
        parts = view.view(-1, *self._inner).split_with_sizes(self._sizes)
        changed: list[Any] = []
        values = []
        for weight, part in zip(self.weights, parts, strict=True):
            if all(operand[weight] is not None for operand in operands):
                changed.append(operands[position][weight])
                values.append(part)
        if changed:
            torch._foreach_copy_(changed, values)

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """See `Lot.scale_`."""
        present = [i for i, weight in enumerate(self.weights) if tensors[weight] is not None]
        if not present:
            return
        scaled: list[Any] = [tensors[self.weights[i]] for i in present]
        # In place, and not by copies: one pass over memory, and half the calls.
        factors = self._by_weight(factor, scaled[0])
        if len(present) < len(factors):
            factors = [factors[i] for i in present]
        torch._foreach_mul_(scaled, factors)

    def change_(
        self, change: Change, operands: Sequence[Operand], numbers: Sequence[Tensor]
    ) -> None:
        """See `Lot.change_`; no weight with hidden entries is in a stack."""
        if not self._changes_in_place:
            views = self.views(operands)
            first = views[0]
            if first is None or any(view is None for view in views):
                return
            form = self.form(first)
            change(views, *[spread(number, form, first) for number in numbers])
            self.put_back(first, operands, 0)
            return
        kept = None
        for i, weight in enumerate(self.weights):
            tensors = [operand[weight] for operand in operands]
            changed = tensors[0]
            if changed is None or any(tensor is None for tensor in tensors):
                continue
            if kept is None:
                kept = [
                    self._by_weight(number, changed, place) for place, number in enumerate(numbers)
                ]
            change(tensors, *[of_weights[i] for of_weights in kept])

    def _by_weight(self, numbers: Tensor, like: Tensor, place: int = 0) -> list[Tensor]:
        """From one number per row those of each weight, of a shape that broadcasts over it: valid
        until the next ones are asked for at the same ``place``."""
        kind = place, like.device, passes.own_precision(like)
        if kind not in self._kept:
            self._kept[kind] = self._new_numbers(*kind[1:])
        of_rows, of_weights = self._kept[kind]
        of_rows.copy_(numbers.view(-1, 1))
        return of_weights

    def _new_numbers(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Memory for one number per slice along the first dimension, as seen by rows and by
        weights."""
        # Kept, since cutting it anew in each step would cost as much as what is done with it.
        of_slices = torch.empty(
            self.rows * self._slices_of_row, *[1] * len(self._inner), dtype=dtype, device=device
        )
        of_rows = of_slices.view(self.rows, self._slices_of_row)
        return of_rows, list(of_slices.split_with_sizes(self._sizes))


def spread(
    numbers: Tensor,
    form: Sequence[int],
    view: Tensor,
) -> Tensor:
    """One number per row, of the shape ``form`` that broadcasts over a view of them."""
    return numbers.to(view.device, passes.own_precision(view)).view(form)


# ---- Which weights lie together ----


def lots_of(
    pieces: Sequence[tuple[int, Rows]],
    values: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    entries: int,
) -> list[Lot]:
    """All pieces, each in one lot.

    Args:
        pieces: of all weights, each with the position of its weight.
        values: the local tensors of the weights.
        hidden: for each weight the entries that do not count in sums, or None.
        entries: how many entries a stack may have, so that it stays in a cache.
    """
    lots: list[Lot] = []
    alike: dict[Any, list[int]] = {}
    for place, (weight, rows) in enumerate(pieces):
        value = values[weight]
        length = None if hidden[weight] is not None else _row_length(value, rows)
        if length is None:
            lots.append(Alone(place, weight, rows, hidden[weight]))
            continue
        # Neighbours or not: a weight's sums must not depend on who stands beside it.
        kind = length, value.shape[1:], value.dtype, value.device
        alike.setdefault(kind, []).append(place)
    for (length, *_), places in alike.items():
        sizes = [values[pieces[place][0]].numel() for place in places]
        for part in _portions(sizes, entries):
            weights = [pieces[place][0] for place in places[part]]
            shapes = [values[weight].shape for weight in weights]
            lots.append(Stack(places[part], weights, shapes, length))
    # In the order of the pieces where that is possible: numbers per row then need no index.
    return sorted(lots, key=lambda lot: lot.pieces[0])


def _row_length(value: Tensor, rows: Rows) -> int | None:
    """The entries of a row, if this is a small weight whose rows stand one below the other; else
    None."""
    size, count = value.numel(), len(rows.labels)
    # Of a part of a weight, or of rows that run through it otherwise, there are too few to make up
    # for what they would need.
    if not 0 < size <= SMALL_ENTRIES or not value.ndim or not rows.are_whole:
        return None
    length = size // count
    return None if length % prod(value.shape[1:]) else length


def _portions(sizes: Sequence[int], entries: int) -> list[slice]:
    """Runs of ``sizes`` whose sums are at most ``entries``, or that have one size only."""
    bounds = [0]
    before = 0
    for i, total in enumerate(accumulate(sizes)):
        if total - before > entries and i > bounds[-1]:
            bounds.append(i)
            before = total - sizes[i]
    bounds.append(len(sizes))
    return [slice(start, stop) for start, stop in pairwise(bounds)]
