"""The few primitives that read or write weights: no other file touches their entries.

`Kernels` is the whole interface: take a pass (sums, which may change each row on the way), scale,
add. Kernels of another kind (a few fused launches on a GPU) can stand beside it with the same
methods. They know nothing of other ranks: what they return is this rank's part, which
`lightning_normdyn.geometry.vectors.WeightVectors` completes. What is taken at once, a large weight
or many small ones, is a `lightning_normdyn.geometry.lots.Lot`.

Letters: n vectors; w a weight before a step, v after it, Δ = v - w.
"""

from collections.abc import Sequence
from itertools import chain, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import passes
from .lot_choice import lots_of
from .lots import Change, Lot, Stack, spread
from .partition import indices
from .passes import Dims, Kernel, Operand, Pair, Pass, Room, Views
from .pieces import Placement, Rows, Runs, rows_of
from .reduction import Message

CACHED_ENTRIES = 2**17
"""On a CPU, this many float32 entries per thread of two weights and their difference stay in the
cores' caches while sums are taken."""
KERNEL_ENTRIES = 2**22
"""On other devices one launch per weight is fastest; only very large weights are cut, so that
temporaries stay small."""


# ---- Rows: which row of which local tensor is which vector ----

# A *row* is a run of a weight's entries on this rank that belong to one vector: a filter, a group
# of neighbouring filters, a whole matrix, or what a shard holds of one of these. Sums are taken row
# by row and then given to vectors; factors of vectors are handed to rows.


class RowIndex:
    """The rows of all pieces of all weights, numbered through, and the vector that each belongs to.

    Args:
        placements: of the weights, in the order of the index space.
        device: where numbers per vector are kept.

    Attributes:
        n: number of vectors of which this rank holds an entry.
        slices: the range of each weight's vectors among them.
        pieces: every piece on this rank, with the position of its weight.
        counts: number of rows of each piece, in the order of ``pieces``.
        vector_of_row: int64, the vector of each row, in the order of ``pieces``; -1: none. On the
            host.
        in_order: whether row i is vector i, all of them: the common case of whole filters, which
            needs no indexing.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        device: torch.device,
    ) -> None:
        self.slices: list[slice] = []
        self.pieces: list[tuple[int, Rows]] = []
        self.n = 0
        # For each piece the vectors of its rows within the weight, and the weight's first vector.
        positions = [indices(0)]
        starts = []
        for weight, placement in enumerate(placements):
            for piece in placement.pieces:
                rows = rows_of(piece)
                self.pieces.append((weight, rows))
                position = rows.labels
                if placement.sharing is not None:
                    # Vectors that lie on other ranks alone have no number here.
                    found = torch.searchsorted(placement.held, rows.labels)
                    position = torch.where(rows.labels < 0, -1, found)
                positions.append(position)
                starts.append(self.n)
            # A vector that several pieces hold parts of has one number all the same.
            self.slices.append(slice(self.n, self.n + len(placement.held)))
            self.n += len(placement.held)
        self.counts = [len(position) for position in positions[1:]]
        # Row by row through all pieces, as kernels write their results.
        of_row = torch.cat(positions)
        start = torch.tensor(starts, dtype=torch.long, device="cpu")
        start = start.repeat_interleave(torch.tensor(self.counts, dtype=torch.long, device="cpu"))
        self.vector_of_row = of_row = torch.where(of_row < 0, -1, of_row + start)
        self.in_order = torch.equal(of_row, indices(self.n))
        # Rows that belong to no vector go to one more place behind the n vectors.
        # An index instead of a mask: its size is known, so that the host never waits for it.
        self._of_row = torch.where(of_row < 0, self.n, of_row).to(device)

    def to_rows(self, values: Tensor, dummy: float) -> Tensor:
        """From ``(n,)`` values of the vectors those of all rows, in the order of ``pieces``.

        Args:
            values: one per vector.
            dummy: the value of rows that belong to no vector.
        """
        if not self.in_order:
            with_dummy = torch.cat([values, values.new_full((1,), dummy)])
            values = with_dummy.to(self._of_row.device)[self._of_row]
        return values

    def to_vectors(self, sums: Tensor) -> Tensor:
        """Add up sums over rows, ``(K, rows)``, within each vector: ``(K, n)``."""
        if self.in_order:
            return sums  # no copy: the usual case
        by_vector = sums.new_zeros(len(sums), self.n + 1)
        return by_vector.index_add_(1, self._of_row, sums)[:, : self.n]


class Kernels:
    """The primitives on one set of weights.

    Args:
        index: where the vectors lie in the local tensors.
        values: the local tensors of the weights.
        hidden: for each weight the entries that do not count in sums, bool like its local tensor;
            None: all count. Changes are made to all entries.
        device: where numbers per vector are kept.
    """

    def __init__(
        self,
        index: RowIndex,
        values: Sequence[Tensor],
        hidden: Sequence[Tensor | None],
        device: torch.device,
    ) -> None:
        self._index = index
        self._device = device
        self._precision = passes.own_precision(*values)
        self._sum_dtype = sum_dtype(device)
        self._masked = any(mask is not None for mask in hidden)
        # Fixed here, so that what is said of rows below stays true if threads are set later.
        self._entries = _entries_at_once(device)
        self._lots = lots_of(index.pieces, values, hidden, self._entries)
        self._lots_without_zeros: list[Lot] = []
        """The same rows in the same order, none with zeros behind it."""
        for lot in self._lots:
            self._lots_without_zeros += lot.without_zeros()
        stacks = [lot.weights for lot in self._lots if isinstance(lot, Stack)]
        self._stacked = list(chain.from_iterable(stacks))
        self._order, self._places = self._find_order()
        self._rooms: dict[Any, Room] = {}
        """Kept, since cutting them anew takes longer than small weights themselves."""
        self.rows_fit = index.in_order
        """Whether each vector is one row that can be taken at once, so that a number per vector may
        be used on the way."""
        for lot in self._lots_without_zeros:
            (view,) = lot.views([values])
            if view is None or view.numel() <= self._entries:
                continue
            if cuts_rows(view, lot.dims(view), self._entries):
                self.rows_fit = False

    def _find_order(self) -> tuple[Tensor | None, Tensor | None]:
        """The number of each row in the order of lots, and its place there by number; None where
        lots have all rows in the order of their numbers."""
        pieces = [piece for lot in self._lots for piece in lot.pieces]
        if pieces == list(range(len(pieces))):
            return None, None
        of_pieces = indices(sum(self._index.counts)).split_with_sizes(self._index.counts)
        order = torch.cat([of_pieces[piece] for piece in pieces])
        return order.to(self._device), order.argsort().to(self._device)

    @property
    def fuses(self) -> bool:
        """Whether a pass may both sum a row and change it, while the row is in the cache."""
        # Off the CPU two passes cost no more memory traffic, and what lies between them is done
        # once for all vectors. A mask hides entries from sums, but not from changes.
        return self._device.type == "cpu" and self.rows_fit and not self._masked

    # ---- Sums: this rank's part, in the sums' dtype ----

    def sums(
        self,
        how: Pass,
        operands: Sequence[Operand],
        numbers: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """This rank's part of the sums of one kind, ``(results, n)``, in the sums' dtype.

        Args:
            how: the pass that takes them. One that changes rows (`passes.removing`) may be taken
                only where this `fuses`, one that is given norms only where `rows_fit`.
            operands: what its kernel reads; a weight for which all are None contributes zeros.
            numbers: ``(n,)`` each, given to the kernel behind the operands; None: left out.
        """
        index = self._index
        dtype = how.dtype or self._precision
        lots = self._lots if how.bears_zeros else self._lots_without_zeros
        room = self._room(how.written, dtype, lots)
        given = [self._of_lots(number, 0.0, lots) for number in numbers if number is not None]

        added_up: list[tuple[slice, Tensor]] = []
        for i, (lot, *of_lot) in enumerate(zip(lots, *given, strict=True)):
            views = lot.views(operands, how.writes)
            first = next((view for view in views if view is not None), None)
            if first is None:  # e.g. a weight without a gradient
                room.places[i].zero_()
                continue
            dims, form = lot.dims(first), lot.form(first)
            # The same numbers for all parts of a row: they broadcast over whatever is cut.
            views += [spread(number, form, first) for number in of_lot]

            # Short rows that need no conversion lose no digits to one long sum, and what reads
            # every entry once has no use for the cache.
            short = first.numel() <= lot.rows * CACHED_ENTRIES
            at_once = how.streaming and short and first.dtype == dtype
            entries = first.numel() if at_once else self._entries
            if not how.whole_rows and cuts_rows(first, dims, entries):
                sums = torch.zeros(how.results, *form, dtype=self._sum_dtype, device=first.device)
                in_chunks(self._adding(how, dtype), sums.unbind(), views, dims, entries)
                added_up.append((room.columns[i], sums.flatten(1)))
                continue

            # Written where it belongs: one buffer for all pieces saves a copy for each.
            if first.device == self._device:
                outs = room.outs(i, form)
                in_chunks(how.kernel, outs, views, dims, entries, whole_rows=how.whole_rows)
            else:  # offloaded, or one of several devices
                buffer = torch.empty_like(room.places[i], device=first.device)
                outs = buffer.view(how.written, *form).unbind()
                in_chunks(how.kernel, outs, views, dims, entries, whole_rows=how.whole_rows)
                room.places[i].copy_(buffer)
            if how.writes is not None:
                lot.put_back(views[how.writes], operands, how.writes)

        # Once for all vectors, and in float64: the kernels left the delicate part to this.
        finished = how.finish(room.written.to(self._sum_dtype))
        for columns, sums in added_up:
            finished[:, columns].copy_(sums)
        if self._places is not None:
            finished = finished[:, self._places]
        return index.to_vectors(finished)

    def _room(self, written: int, dtype: torch.dtype, lots: Sequence[Lot]) -> Room:
        """Memory for so many numbers of each row of ``lots``."""
        kind = written, dtype, lots is self._lots
        room = self._rooms.get(kind)
        if room is None:
            room = Room(written, [lot.rows for lot in lots], dtype, self._device)
            # Sums that need no conversion are handed out in this very memory.
            if self._device.type == "cpu" and dtype != self._sum_dtype:
                self._rooms[kind] = room
        return room

    def products(
        self,
        pairs: Sequence[Pair],
        *,
        exact: bool,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        """Inner products, ``(len(pairs), n)``: `lightning_normdyn.geometry.passes.products`.

        Args:
            pairs: what to multiply. None contributes zeros.
            exact: whether in float64; else in the operands' own precision.
            copy: one of the operands, and where to copy it on the way.
        """
        if copy is not None and self._masked:
            # A sum sees hidden entries as zeros, a copy must not.
            for original, destination in zip(*copy, strict=True):
                if original is not None and destination is not None:
                    destination.copy_(original)
            copy = None
        if copy is not None:
            copy = copy[0], self._copied_first(*copy)
        # One pass for all pairs: the weights are read once however many sums are asked for.
        how, operands = passes.products(pairs, copy, self._sum_dtype if exact else None)
        return self.sums(how, operands)

    def _copied_first(self, original: Operand, destination: Operand) -> Operand:
        """Copy the weights of stacks; returns where the others are still to be copied to."""
        left = list(destination)
        sources, copies = [], []
        # A stack is a copy itself: from there to the destination would be a second one.
        for weight in self._stacked:
            source, copied = original[weight], left[weight]
            left[weight] = None
            if source is not None and copied is not None:
                sources.append(source)
                copies.append(copied)
        if copies:
            torch._foreach_copy_(copies, sources)
        return left

    def add_up(self, values: Tensor, runs: Runs) -> Tensor:
        """Sum ``(..., n)`` values over vectors of each weight: ``(..., weights)``."""
        return runs.add_up(values)

    def put_back(self, packed: Tensor, completed: Tensor, message: Message) -> None:
        """Write completed sums, ``(..., size)``, to their vectors in ``packed``, ``(..., n)``."""
        packed[..., message.cut] = completed[..., message.slot]

    # ---- Changes, in place ----

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """Multiply every vector by its factor, ``(n,)``."""
        for lot, of_lot in zip(self._lots, self._of_lots(factor, 1.0, self._lots), strict=True):
            lot.scale_(tensors, of_lot)

    def add_scaled_(self, tensors: Operand, coefficient: Tensor, source: Operand) -> None:
        """Add ``coefficient * source`` to every vector; ``coefficient`` is ``(n,)``."""

        def add(views: Views, by: Tensor) -> None:
            view, addend = views
            # One read and one write; no temporary as large as the weight.
            view.addcmul_(addend, by)

        self._change(add, [tensors, source], [(coefficient, 0.0)])

    def scale_and_add_(
        self, tensors: Operand, factor: Tensor, coefficient: Tensor, source: Operand
    ) -> None:
        """`scale_`, and then `add_scaled_`."""
        self.scale_(tensors, factor)
        self.add_scaled_(tensors, coefficient, source)

    def stretch_(
        self,
        tensors: Operand,
        before: Operand,
        stretch: Tensor,
        scale: Tensor,
        added: Tensor | None,
    ) -> None:
        """Make every vector v into ``scale * (w + stretch * (v - w)) + added * w`` with
        w = ``before``; numbers are ``(n,)``."""

        def lengthen(views: Views, by: Tensor, factor: Tensor) -> None:
            view, origin = views
            # lerp takes the difference first: of `stretch * v - (stretch - 1) * w`, rounding of
            # the weights would be multiplied by a large stretch.
            out = view if view.dtype.itemsize >= 4 else None
            ends = passes.widened(origin), passes.widened(view)
            moved = torch.lerp(*ends, by, out=out)
            moved.mul_(factor)
            if out is None:
                view.copy_(moved)

        self._change(lengthen, [tensors, before], [(stretch, 1.0), (scale, 1.0)])
        if added is not None:
            self.add_scaled_(tensors, added, before)

    def decay_shortened_(
        self,
        tensors: Operand,
        share: Tensor,
        before: Operand,
        shortened: Operand | None,
    ) -> None:
        """Subtract ``share * before`` at the entries that have not moved away from 0 since
        ``before``; ``share`` is ``(n,)``, ``shortened`` bool like the tensors, if that is known."""

        def decay(views: Views, by: Tensor) -> None:
            view, was, *known = views
            mask = known[0] if known else (view - was) * was <= 0
            # One lot at a time: its temporaries are as large as itself.
            decayed = torch.where(mask, was, torch.zeros_like(was))
            view.addcmul_(decayed, by, value=-1)

        operands = [tensors, before] if shortened is None else [tensors, before, shortened]
        self._change(decay, operands, [(share, 0.0)])

    def _change(
        self,
        change: Change,
        operands: Sequence[Operand],
        numbers: Sequence[tuple[Tensor, float]],
    ) -> None:
        """Change the first operand in place where all of them have a weight.

        Args:
            change: see `lightning_normdyn.geometry.lots.Change`.
            operands: what it is called with.
            numbers: ``(n,)`` each, and the value for rows that belong to no vector.
        """
        of_lots = [self._of_lots(values, dummy, self._lots) for values, dummy in numbers]
        for lot, *of_lot in zip(self._lots, *of_lots, strict=True):
            lot.change_(change, operands, of_lot)

    def _adding(self, how: Pass, dtype: torch.dtype) -> Kernel:
        """The kernel of a pass for rows that are cut: finishes each part and adds it to outs."""

        def kernel(
            dims: Dims,
            outs: Views,
            views: Views,
        ) -> None:
            part = torch.empty(how.written, *outs[0].shape, dtype=dtype, device=outs[0].device)
            how.kernel(dims, part.unbind(), views)
            # Norms do not add up, their squares do: hence finished first.
            for out, more in zip(outs, how.finish(part.to(self._sum_dtype)), strict=True):
                out += more

        return kernel

    def _of_lots(self, values: Tensor, dummy: float, lots: Sequence[Lot]) -> Sequence[Tensor]:
        """From ``(n,)`` values of vectors those of the rows of each lot."""
        # Cut once here, and converted unless a single lot does it. A rank may have no lot at all.
        if len(lots) != 1:
            values = values.to(self._precision)
        of_rows = self._index.to_rows(values, dummy)
        if self._order is not None:
            of_rows = of_rows[self._order]
        return [of_rows] if len(lots) == 1 else of_rows.split_with_sizes([lot.rows for lot in lots])


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and of all numbers per vector on ``device``."""
    # Angles of 1e-6 rad are small differences of large sums, of which float32 would leave nothing.
    # Metal has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


# ---- Chunks: so few entries at a time that they stay in the processor's cache ----

# A kernel is several torch operations on the same entries (subtract, multiply, sum). On a whole
# weight each of them would read its operands from main memory; on chunks only the first one does.


def _entries_at_once(device: torch.device) -> int:
    """How many entries of a weight a kernel should take at a time on ``device``."""
    if device.type != "cpu":
        return KERNEL_ENTRIES
    # Every thread takes its part of each operation, and has a cache of its own.
    return CACHED_ENTRIES * torch.get_num_threads()


def in_chunks(
    kernel: Kernel,
    outs: Views,
    views: Views,
    dims: Dims,
    entries: int,
    *,
    whole_rows: bool = False,
) -> None:
    """``kernel(dims, outs, views)``, applied to at most about ``entries`` entries at a time.

    Args:
        kernel: see `Kernel`. Where a row is cut it sees the row's parts one after the other.
        outs: what it writes to.
        views: what it reads: of one shape, or of size 1 in the summed dimensions, or None; one of
            full shape must come before all others.
        dims: the dimensions that it sums over.
        entries: how many at a time.
        whole_rows: never cut a row, however long.
    """
    first = next(view for view in views if view is not None)
    size = first.numel()
    cut_dim = _outermost(first.shape, first) if size > entries else -1
    if cut_dim < 0 or (whole_rows and cut_dim in dims):
        kernel(dims, outs, views)
        return

    # Along the outermost dimension alone; if one index of it is still too much, the chunks are cut
    # again along the next one.
    length = first.shape[cut_dim]
    step = max(1, entries * length // size)
    fits = size // length * step <= entries
    parts = [_parts(tensor, step, cut_dim) for tensor in (*outs, *views)]
    # Not strict: the parts of what has nothing to cut are repeated without end.
    for chunk in zip(*parts, strict=False):
        chunk_outs, chunk_views = chunk[: len(outs)], chunk[len(outs) :]
        if fits:
            kernel(dims, chunk_outs, chunk_views)
        else:
            in_chunks(kernel, chunk_outs, chunk_views, dims, entries, whole_rows=whole_rows)


def cuts_rows(view: Tensor, dims: Dims, entries: int) -> bool:
    """Whether `in_chunks` will cut this view within a row, so that its parts must be added up."""
    shape = list(view.shape)
    while prod(shape) > entries:
        dim = _outermost(shape, view)
        if dim in dims:
            return True
        shape[dim] = max(1, entries * shape[dim] // prod(shape))
    return False


def _parts(tensor: Any, step: int, dim: int) -> Any:
    if tensor is None or tensor.shape[dim] == 1:
        return repeat(tensor)
    # unsafe_split: without the bookkeeping of views that autograd needs.
    return tensor.unsafe_split(step, dim)


def _outermost(shape: Sequence[int], view: Tensor) -> int:
    """The dimension whose steps in memory are longest: cut along it, a chunk lies in one place."""
    return max((d for d in range(view.ndim) if shape[d] > 1), key=view.stride)
