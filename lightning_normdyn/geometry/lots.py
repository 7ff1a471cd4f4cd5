"""Which pieces of weights are taken at once: a large one by itself, small ones that are alike
together.

Calling torch for a small weight costs more than its arithmetic, and a pass is a dozen calls. So
small weights are copied into one tensor, ``(rows, entries of a row)``, and a pass is taken over
that. What it has changed there is copied back. Rows of different lengths have zeros behind them.
The sum of a row is the same to the bit whichever rows lie beside it; which do,
`lightning_normdyn.geometry.lot_choice` decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import compress, groupby, repeat
from math import prod
from operator import and_, attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from . import passes
from .passes import Dims, Operand
from .pieces import Rows

COPIED_ENTRIES = 2**12
"""Up to this many entries of a weight, a change of single entries (an addition) is made in a copy
and copied back; it is one or two calls, which cost less than two more passes over memory."""

ROW_UNIT = 64
"""Rows that are filled up with zeros are as long as a multiple of this. torch adds up a row by four
registers, of at most 16 numbers each: zeros that fill whole rounds change no bit of a sum, whatever
the width of the tensor."""

# Asked of every weight, so without a Python frame for each.
DTYPE = attrgetter("dtype")

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
    def views(self, operands: Sequence[Operand], changed: int | None = None) -> list[Tensor | None]:
        """These rows of every operand, hidden entries as zeros; None where an operand has none of
        them.

        Args:
            operands: as of `Kernels.sums`.
            changed: position of the one whose view is to be changed and `put_back`; None: none is.
        """

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

    def without_zeros(self) -> list[Lot]:
        """The same rows in the same order, as lots that put nothing behind a row."""
        return [self]


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

    def views(self, operands: Sequence[Operand], changed: int | None = None) -> list[Tensor | None]:
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
        # A buffer for the operand that a pass changes, and its parts, of the shapes of the weights.
        self._buffers: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def views(self, operands: Sequence[Operand], changed: int | None = None) -> list[Tensor | None]:
        """See `Lot.views`: copies, with zeros for the weights that an operand has not; the one that
        is changed is valid until the next ones are asked for."""
        copies = []
        for place, operand in enumerate(operands):
            copies.append(self._copied(operand, keeps=place == changed))
        return copies

    def _copied(self, operand: Operand, *, keeps: bool) -> Tensor | None:
        tensors = [operand[weight] for weight in self.weights]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        if len(present) < len(tensors):
            for i, size in enumerate(self._sizes):
                if tensors[i] is None:
                    tensors[i] = present[0].new_zeros(size, *self._inner)
        # Along the first dimension: the entries then lie in the order of their indices, however
        # each tensor lies in memory. What will be cut again to be put back goes to memory that is
        # cut already: for small weights that takes as long as copying them. Not what would be
        # converted on the way there.
        is_kept = keeps and not self._changes_in_place
        if is_kept and len(set(map(DTYPE, present))) == 1:
            buffer, _ = self._cut_buffer(present[0])
            torch.cat(tensors, out=buffer)  # type: ignore[arg-type]
            return buffer.view(-1, self._length)
        copied: Tensor = torch.cat(tensors)  # type: ignore[arg-type]
        return copied.reshape(-1, self._length)

    def _cut_buffer(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        kind = like.device, like.dtype
        if kind not in self._buffers:
            buffer = like.new_empty(sum(self._sizes), *self._inner)
            self._buffers[kind] = buffer, list(buffer.split_with_sizes(self._sizes))
        return self._buffers[kind]

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
        changed: list[Any] = [operands[position][weight] for weight in self.weights]
        parts = self._parts(view, position)
        is_whole = [True] * len(changed)
        for operand in operands:
            tensors = [operand[weight] for weight in self.weights]
            is_whole = list(map(and_, is_whole, map(is_not, tensors, repeat(None))))
        if not all(is_whole):
            changed, parts = list(compress(changed, is_whole)), list(compress(parts, is_whole))
        if changed:
            torch._foreach_copy_(changed, parts)

    def _parts(self, view: Tensor, position: int) -> list[Tensor]:
        """The numbers of each weight in the view of the operand at a place, in the weight's own
        shape."""
        buffer, parts = self._buffers.get((view.device, view.dtype), (None, []))
        if buffer is not None and buffer.data_ptr() == view.data_ptr():
            return parts
        return list(view.view(-1, *self._inner).split_with_sizes(self._sizes))

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
            views = self.views(operands, changed=0)
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


class Padded(Stack):
    """Whole small weights whose rows differ in length, one below the other, with zeros behind each
    row. Only for passes that zeros do not disturb.

    Args:
        pieces: see `Lot`.
        weights: positions of the weights.
        shapes: of the weights.
        lengths: for each weight the entries of its rows.
    """

    def __init__(
        self,
        pieces: Sequence[int],
        weights: Sequence[int],
        shapes: Sequence[torch.Size],
        lengths: Sequence[int],
    ) -> None:
        self.pieces = list(pieces)
        self.weights = list(weights)
        self._shapes = list(shapes)
        self._counts = [
            shape.numel() // length for shape, length in zip(shapes, lengths, strict=True)
        ]
        self._lengths = list(lengths)
        self._length = padded_length(max(lengths))
        self.rows = sum(self._counts)
        self._changes_in_place = False
        self._kept = {}
        # A buffer for each operand of a pass, and its parts, of the shapes of the weights.
        self._buffers: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def views(self, operands: Sequence[Operand], changed: int | None = None) -> list[Tensor | None]:
        """See `Lot.views`: copies, valid until the next ones are asked for."""
        return [self._filled(operand, place) for place, operand in enumerate(operands)]

    def _filled(self, operand: Operand, place: int) -> Tensor | None:
        tensors = [operand[weight] for weight in self.weights]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return None
        buffer, parts = self._buffer(place, present[0])
        if len(present) < len(tensors):
            buffer.zero_()
            parts = [p for p, tensor in zip(parts, tensors, strict=True) if tensor is not None]
        torch._foreach_copy_(parts, present)
        return buffer

    def _buffer(self, place: int, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Memory for the operand at a place, and the parts of it that weights are copied to."""
        kind = place, like.device, like.dtype
        if kind not in self._buffers:
            # Kept: cutting it costs as much as a pass, and the zeros stay where they are.
            buffer = like.new_zeros(self.rows, self._length)
            parts = []
            of_weights = buffer.split_with_sizes(self._counts)
            for rows, shape, length in zip(of_weights, self._shapes, self._lengths, strict=True):
                parts.append(rows[:, :length].view(shape))
            self._buffers[kind] = buffer, parts
        return self._buffers[kind]

    def put_back(
        self,
        view: Tensor | None,
        operands: Sequence[Operand],
        position: int,
    ) -> None:
        """See `Lot.put_back`."""
        super().put_back(view, operands, position)
        if view is not None:
            # What was written behind the rows may be NaN, and would be summed in the next pass.
            view.zero_()

    def _parts(self, view: Tensor, position: int) -> list[Tensor]:
        _, parts = self._buffer(position, view)
        return parts

    def without_zeros(self) -> list[Lot]:
        """See `Lot.without_zeros`: stacks of rows of equal length."""
        stacks: list[Lot] = []
        inner = [shape[1:] for shape in self._shapes]
        kinds = list(zip(self._lengths, inner, strict=True))
        for (length, _), members in groupby(range(len(kinds)), kinds.__getitem__):
            run = list(members)
            of_run = slice(run[0], run[-1] + 1)
            pieces, weights = self.pieces[of_run], self.weights[of_run]
            stacks.append(Stack(pieces, weights, self._shapes[of_run], length))
        return stacks

    def _new_numbers(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        of_rows = torch.empty(self.rows, 1, dtype=dtype, device=device)
        of_weights = []
        for rows, shape in zip(of_rows.split_with_sizes(self._counts), self._shapes, strict=True):
            of_weights.append(rows.view(-1, *[1] * (len(shape) - 1)))
        return of_rows, of_weights


def padded_length(length: int) -> int:
    """How long a row of ``length`` entries is with the zeros behind it.

    Example:
        >>> padded_length(9), padded_length(64), padded_length(65)
        (64, 64, 128)
    """
    return -(-length // ROW_UNIT) * ROW_UNIT


def spread(
    numbers: Tensor,
    form: Sequence[int],
    view: Tensor,
) -> Tensor:
    """One number per row, of the shape ``form`` that broadcasts over a view of them."""
    return numbers.to(view.device, passes.own_precision(view)).view(form)
