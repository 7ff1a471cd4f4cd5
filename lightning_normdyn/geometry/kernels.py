"""The few primitives that read or write weights: no other file touches their entries.

`Kernels` is the whole interface: take a pass (sums, which may change each row on the way), scale,
add. Kernels of another kind (a few fused launches on a GPU) can stand beside it with the same
methods. They know nothing of other ranks: what they return is this rank's part, which
`lightning_normdyn.geometry.vectors.WeightVectors` completes.

Letters: n vectors; w a weight before a step, v after it, Δ = v - w.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import passes
from .partition import indices
from .passes import Dims, Kernel, Operand, Pair, Pass, Views
from .pieces import Placement, Rows, rows_of

CACHED_ENTRIES = 2**17
"""On a CPU, this many float32 entries per thread of two weights and their difference stay in the
cores' caches while sums are taken."""
KERNEL_ENTRIES = 2**22
"""On other devices one launch per weight is fastest; only very large weights are cut, so that
temporaries stay small."""
SMALL_ENTRIES = 2**12
"""Up to this many entries of a weight, calling torch for it costs more than the arithmetic."""

Viewed = tuple[Rows, list[Tensor | None]]
"""The rows of one piece, and its view of every operand."""


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
        self._hidden = hidden
        self._device = device
        self._precision = passes.own_precision(*values)
        self._sum_dtype = sum_dtype(device)
        self._masked = any(mask is not None for mask in hidden)
        # Fixed here, so that what is said of rows below stays true if threads are set later.
        self._entries = _entries_at_once(device)
        self.rows_fit = index.in_order
        """Whether each vector is one row that can be taken at once, so that a number per vector may
        be used on the way."""
        for weight, rows in index.pieces:
            view = rows.view(values[weight])
            if view.numel() > self._entries and cuts_rows(view, rows.dims(view), self._entries):
                self.rows_fit = False

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
        written = torch.empty(
            how.written,
            sum(index.counts),
            dtype=dtype,
            device=self._device,
        )
        given = [number.to(self._precision) for number in numbers if number is not None]
        of_rows = [index.to_rows(number, 0.0) for number in given]

        added_up: list[tuple[slice, Tensor]] = []
        stop = 0
        for alike in self._portions(how, operands):
            rows, views = alike[0]
            start, stop = stop, stop + len(alike) * len(rows.labels)
            columns = slice(start, stop)
            place = written[:, columns]
            first = next((view for view in views if view is not None), None)
            if first is None:  # e.g. a weight without a gradient
                place.zero_()
                continue
            dims, form = rows.dims(first), rows.form(first)
            if len(alike) > 1:
                views = _stacked(alike)
                dims, form = [d + 1 for d in dims], [len(alike), *form]
                first = next(view for view in views if view is not None)
            # The same numbers for all parts of a row: they broadcast over whatever is cut.
            views += [_spread(number[columns], form, first) for number in of_rows]

            # Short rows that need no conversion lose no digits to one long sum, and what reads
            # every entry once has no use for the cache.
            short = first.numel() <= (stop - start) * CACHED_ENTRIES
            at_once = how.streaming and short and first.dtype == dtype
            entries = first.numel() if at_once else self._entries
            if not how.whole_rows and cuts_rows(first, dims, entries):
                sums = torch.zeros(
                    how.results,
                    *form,
                    dtype=self._sum_dtype,
                    device=first.device,
                )
                in_chunks(self._adding(how, dtype), sums.unbind(), views, dims, entries)
                added_up.append((columns, sums.flatten(1)))
                continue

            # Written where it belongs: one buffer for all pieces saves a copy for each.
            buffer = place
            if first.device != self._device:  # offloaded, or one of several devices
                buffer = torch.empty_like(place, device=first.device)
            outs = buffer.view(how.written, *form).unbind()
            in_chunks(how.kernel, outs, views, dims, entries, whole_rows=how.whole_rows)
            if buffer is not place:
                place.copy_(buffer)

        # Once for all vectors, and in float64: the kernels left the delicate part to this.
        finished = how.finish(written.to(self._sum_dtype))
        for columns, sums in added_up:
            finished[:, columns].copy_(sums)
        return index.to_vectors(finished)

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
        # One pass for all pairs: the weights are read once however many sums are asked for.
        how, operands = passes.products(pairs, copy, self._sum_dtype if exact else None)
        return self.sums(how, operands)

    # ---- Changes, in place ----

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """Multiply every vector by its factor, ``(n,)``."""
        for weight, rows, number in self._rows_with(factor, dummy=1.0):
            tensor = tensors[weight]
            if tensor is not None:
                view = rows.view(tensor)
                view.mul_(_spread(number, rows.form(view), view))

    def add_scaled_(self, tensors: Operand, coefficient: Tensor, source: Operand) -> None:
        """Add ``coefficient * source`` to every vector; ``coefficient`` is ``(n,)``."""
        for weight, rows, number in self._rows_with(coefficient, dummy=0.0):
            tensor, addend = tensors[weight], source[weight]
            if tensor is not None and addend is not None:
                view = rows.view(tensor)
                # One read and one write; no temporary as large as the weight.
                view.addcmul_(rows.view(addend), _spread(number, rows.form(view), view))

    def stretch_(self, tensors: Operand, before: Operand, stretch: Tensor, scale: Tensor) -> None:
        """Make every vector v into ``scale * (w + stretch * (v - w))`` with w = ``before``; factors
        are ``(n,)``."""
        of_stretch = self._rows_with(stretch, dummy=1.0)
        of_scale = self._rows_with(scale, dummy=1.0)
        for (weight, rows, by), (_, _, factor) in zip(of_stretch, of_scale, strict=True):
            tensor, start = tensors[weight], before[weight]
            if tensor is None or start is None:
                continue
            view, origin = rows.view(tensor), rows.view(start)
            form = rows.form(view)
            # lerp takes the difference first: of `stretch * v - (stretch - 1) * w`, rounding of
            # the weights would be multiplied by a large stretch.
            out = view if view.dtype.itemsize >= 4 else None
            ends = passes.widened(origin), passes.widened(view)
            moved = torch.lerp(*ends, _spread(by, form, view), out=out)
            moved.mul_(_spread(factor, form, view))
            if out is None:
                view.copy_(moved)

    def decay_shortened_(
        self,
        tensors: Operand,
        share: Tensor,
        before: Operand,
        shortened: Operand | None,
    ) -> None:
        """Subtract ``share * before`` at the entries that have not moved away from 0 since
        ``before``; ``share`` is ``(n,)``, ``shortened`` bool like the tensors, if that is known."""
        for weight, rows, number in self._rows_with(share, dummy=0.0):
            tensor, old = tensors[weight], before[weight]
            if tensor is None or old is None:
                continue
            known = None if shortened is None else shortened[weight]
            view, was = rows.view(tensor), rows.view(old)
            mask = (view - was) * was <= 0 if known is None else rows.view(known)
            # One weight at a time: its temporaries are as large as itself.
            decayed = torch.where(mask, was, torch.zeros_like(was))
            view.addcmul_(decayed, _spread(number, rows.form(view), view), value=-1)

    def _adding(self, how: Pass, dtype: torch.dtype) -> Kernel:
        """The kernel of a pass for rows that are cut: finishes each part and adds it to outs."""

        def kernel(
            dims: Dims,
            outs: Views,
            views: Views,
        ) -> None:
            part = torch.empty(
                how.written,
                *outs[0].shape,
                dtype=dtype,
                device=outs[0].device,
            )
            how.kernel(dims, part.unbind(), views)
            # Norms do not add up, their squares do: hence finished first.
            for out, more in zip(outs, how.finish(part.to(self._sum_dtype)), strict=True):
                out += more

        return kernel

    def _portions(self, how: Pass, operands: Sequence[Operand]) -> Iterator[list[Viewed]]:
        """All pieces in their order: each by itself, or neighbours that are small and alike
        together, so that thousands of small layers cost few calls of torch."""
        # One by one, since a view with hidden entries is a copy.
        viewed = ((rows, self._views(i, rows, operands)) for i, rows in self._index.pieces)
        if how.writes:  # what it writes to a stack would not reach the weights
            yield from ([one] for one in viewed)
            return
        for likeness, alike in groupby(viewed, _likeness):
            together = 1
            if likeness is not None:
                shape, *_ = likeness
                together = max(1, self._entries // max(1, prod(shape)))
            while portion := list(islice(alike, together)):
                yield portion

    def _views(self, weight: int, rows: Rows, operands: Sequence[Operand]) -> list[Tensor | None]:
        """A piece of every operand, hidden entries as zeros."""
        hidden = self._hidden[weight]
        views: list[Tensor | None] = []
        for operand in operands:
            tensor = operand[weight]
            if tensor is None:
                views.append(None)
            elif hidden is None:
                views.append(rows.view(tensor))
            else:
                views.append(rows.view(tensor).masked_fill(rows.view(hidden), 0))
        return views

    def _rows_with(self, values: Tensor, *, dummy: float) -> Iterator[tuple[int, Rows, Tensor]]:
        """Every piece: its weight's position, and the values of its rows."""
        # Converted once here, not for every piece.
        of_rows = self._index.to_rows(values.to(self._precision), dummy)
        of_pieces = of_rows.split_with_sizes(self._index.counts)
        for (weight, rows), number in zip(self._index.pieces, of_pieces, strict=True):
            yield weight, rows, number


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and of all numbers per vector on ``device``."""
    # Angles of 1e-6 rad are small differences of large sums, of which float32 would leave nothing.
    # Metal has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _spread(numbers: Tensor, form: Sequence[int], view: Tensor) -> Tensor:
    """One number per row, of the shape ``form`` that broadcasts over a view of them."""
    return numbers.to(view.device, passes.own_precision(view)).view(form)


def _likeness(viewed: Viewed) -> tuple[torch.Size, Any, Any] | None:
    """What pieces must have in common to be stacked; None where one is taken by itself."""
    rows, views = viewed
    shapes = {view.shape for view in views if view is not None}
    small = len(shapes) == 1 and prod(*shapes) <= SMALL_ENTRIES
    # A stack has rows in one run of memory; of other rows it would add up entries in another order,
    # and a vector's sum would depend on who its neighbours are.
    if not small or not all(view is None or _is_one_run(view) for view in views):
        return None
    kinds = [None if view is None else (view.dtype, view.device) for view in views]
    return shapes.pop(), rows.kept, kinds


def _is_one_run(view: Tensor) -> bool:
    return view.layout == torch.strided and view.is_contiguous()


def _stacked(alike: Sequence[Viewed]) -> list[Tensor | None]:
    """Every operand of pieces that have the same `_likeness`, along a new first dimension."""
    stacks = []
    for views in zip(*(views for _, views in alike), strict=True):
        stacks.append(None if views[0] is None else torch.stack(views))
    return stacks


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
