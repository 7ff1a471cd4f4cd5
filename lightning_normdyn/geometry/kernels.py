"""The few primitives that read or write weights: no other file touches their entries.

`Kernels` is the whole interface: sums over vectors, displacement, scale, add, remove the radial
part. Kernels of another kind (a few fused launches on a GPU) can stand beside it with the same
methods. They know nothing of other ranks: what they return is this rank's part, which
`lightning_normdyn.geometry.vectors.WeightVectors` completes.

Letters: n vectors; w a weight before a step, v after it, Δ = v - w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_normdyn.geometry import chunks, passes
from lightning_normdyn.geometry.chunks import (
    Dims,
    Kernel,
    Views,
    entries_at_once,
    in_chunks,
)
from lightning_normdyn.geometry.index import RowIndex, Rows
from lightning_normdyn.geometry.passes import Operand, Pass


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
        self._entries = entries_at_once(device)
        self.rows_fit = index.in_order
        """Whether each vector is one row that can be taken at once, so that a number per vector may
        be used on the way."""
        for weight, rows in index.pieces:
            view = rows.view(values[weight])
            if chunks.cuts_rows(view, rows.dims(view), self._entries):
                self.rows_fit = False

    @property
    def fuses(self) -> bool:
        """Whether `remove_radial_` and `remove_radial_of_` work: a sum and the change that follows
        from it, row by row, while the row is in the cache."""
        # Off the CPU two passes cost no more memory traffic, and what lies between them is done
        # once for all vectors. A mask hides entries from sums, but not from changes.
        return self._device.type == "cpu" and self.rows_fit and not self._masked

    # ---- Sums: this rank's part, in the sums' dtype ----

    def products(
        self,
        pairs: Sequence[tuple[Operand, Operand | None]],
        *,
        exact: bool,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        """Inner products, ``(len(pairs), n)``: `lightning_normdyn.geometry.passes.Products`.

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
        products = passes.Products(pairs, copy, self._sum_dtype if exact else None)
        return self._collect(products.how, products.operands)

    def squares(self, tensors: Operand) -> Tensor:
        """<w, w>, ``(n,)``, by the fastest pass."""
        return self._collect(passes.SQUARES, [tensors])[0]

    def moments(self, tensors: Operand) -> Tensor:
        """`lightning_normdyn.functional.moment_sums`, ``(2, n)``."""
        return self._collect(passes.MOMENTS, [tensors])

    def displacement(
        self, before: Operand, after: Operand, *, exact: bool, norms: Tensor | None = None
    ) -> Tensor:
        """`lightning_normdyn.functional.displacement_sums`, ``(3, n)``.

        Args:
            before: w.
            after: v.
            exact: whether <w, w> is summed in float64.
            norms: ``(n,)`` norms of w if they are known, which saves a pass; not with ``exact``,
                and only where `rows_fit`.
        """
        dtype = self._sum_dtype if exact else None
        how = passes.displacement(dtype, known=norms is not None)
        return self._collect(how, [before, after], _given(norms))

    def radial(
        self,
        before: Operand,
        after: Operand,
    ) -> Tensor:
        """<w, w> and <w, Δ>, ``(2, n)``."""
        return self._collect(passes.RADIAL, [before, after])

    def radial_of_step(
        self,
        direction: Operand,
        after: Operand,
        length: Tensor,
    ) -> Tensor:
        """`radial` of a known step Δ = ``length * direction``, without a copy of w; and <direction,
        direction>: ``(3, n)``."""
        return self._collect(passes.RADIAL_OF_STEP, [direction, after], [length])

    # ---- Changes, in place ----

    def scale_(
        self,
        tensors: Operand,
        factor: Tensor,
    ) -> None:
        """Multiply every vector by its factor, ``(n,)``."""
        for weight, rows, number in self._rows_with(factor, dummy=1.0):
            tensor = tensors[weight]
            if tensor is not None:
                view = rows.view(tensor)
                view.mul_(_spread(number, rows, view))

    def add_scaled_(
        self,
        tensors: Operand,
        coefficient: Tensor,
        source: Operand,
    ) -> None:
        """Add ``coefficient * source`` to every vector; ``coefficient`` is ``(n,)``."""
        for weight, rows, number in self._rows_with(coefficient, dummy=0.0):
            tensor, addend = tensors[weight], source[weight]
            if tensor is not None and addend is not None:
                view = rows.view(tensor)
                # One read and one write; no temporary as large as the weight.
                view.addcmul_(rows.view(addend), _spread(number, rows, view))

    def remove_radial_(
        self,
        before: Operand,
        after: Operand,
        share: Tensor,
        active: Tensor | None,
    ) -> Tensor:
        """`radial`, and at once `lightning_normdyn.functional.remove_radial`, where this fuses.

        Args:
            before: w.
            after: v, which is changed.
            share: ``(n,)``: how much of w to remove beside the radial part.
            active: bool ``(n,)``: vectors to be changed; None: all.
        """
        how = passes.removing(passes.RADIAL, operands=2)
        return self._collect(how, [before, after], _given(share, active))

    def remove_radial_of_(
        self,
        direction: Operand,
        after: Operand,
        length: Tensor,
        share: Tensor,
        active: Tensor | None,
    ) -> Tensor:
        """`radial_of_step`, and at once the removal, where this fuses; arguments as there and for
        `remove_radial_`."""
        how = passes.removing(passes.RADIAL_OF_STEP, operands=3)
        return self._collect(how, [direction, after], _given(length, share, active))

    # ---- How a pass is taken ----

    def _collect(
        self,
        how: Pass,
        operands: Sequence[Operand],
        numbers: Sequence[Tensor] = (),
    ) -> Tensor:
        """Take a pass over every piece: ``(results, n)``.

        Args:
            how: the pass.
            operands: what its kernel reads; a weight for which all are None contributes zeros.
            numbers: ``(n,)`` each, given to the kernel behind the operands.
        """
        index = self._index
        dtype = how.dtype or self._precision
        written = torch.empty(
            how.written,
            sum(index.counts),
            dtype=dtype,
            device=self._device,
        )
        places = written.split_with_sizes(index.counts, 1)
        of_rows = [index.to_rows(number.to(self._precision), 0.0) for number in numbers]

        added_up: dict[int, Tensor] = {}
        for i, (weight, rows) in enumerate(index.pieces):
            views = self._views(weight, rows, operands)
            first = next((view for view in views if view is not None), None)
            if first is None:  # e.g. a weight without a gradient
                places[i].zero_()
                continue
            # The same numbers for all parts of a row: they broadcast over whatever is cut.
            views += [_spread(number[i], rows, first) for number in of_rows]
            dims, form = rows.dims(first), rows.form(first)

            # Short rows that need no conversion lose no digits to one long sum, and what reads
            # every entry once has no use for the cache.
            short = first.numel() <= index.counts[i] * chunks.CACHED_ENTRIES
            at_once = how.streaming and short and first.dtype == dtype
            entries = first.numel() if at_once else self._entries
            if not how.whole_rows and chunks.cuts_rows(first, dims, entries):
                sums = torch.zeros(
                    how.results,
                    *form,
                    dtype=self._sum_dtype,
                    device=first.device,
                )
                in_chunks(
                    self._adding(how, dtype),
                    sums.unbind(),
                    views,
                    dims,
                    entries,
                )
                added_up[i] = sums.flatten(1)
                continue

            # Written where it belongs: one buffer for all pieces saves a copy for each.
            place = places[i]
            if first.device != self._device:  # offloaded, or one of several devices
                place = torch.empty_like(place, device=first.device)
            outs = place.view(how.written, *form).unbind()
            in_chunks(how.kernel, outs, views, dims, entries, whole_rows=how.whole_rows)
            if place is not places[i]:
                places[i].copy_(place)

        # Once for all vectors, and in float64: the kernels left the delicate part to this.
        finished = how.finish(written.to(self._sum_dtype))
        for i, sums in added_up.items():
            finished.split_with_sizes(index.counts, 1)[i].copy_(sums)
        return index.to_vectors(finished)

    def _adding(
        self,
        how: Pass,
        dtype: torch.dtype,
    ) -> Kernel:
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

    def _views(
        self,
        weight: int,
        rows: Rows,
        operands: Sequence[Operand],
    ) -> list[Tensor | None]:
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

    def _rows_with(
        self,
        values: Tensor,
        *,
        dummy: float,
    ) -> Iterator[tuple[int, Rows, Tensor]]:
        """Every piece: its weight's position, and the values of its rows."""
        # Converted once here, not for every piece.
        of_rows = self._index.to_rows(values.to(self._precision), dummy)
        for (weight, rows), number in zip(self._index.pieces, of_rows, strict=True):
            yield weight, rows, number


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and of all numbers per vector on ``device``."""
    # Angles of 1e-6 rad are small differences of large sums, of which float32 would leave nothing.
    # Metal has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _given(*numbers: Tensor | None) -> list[Tensor]:
    return [number for number in numbers if number is not None]


def _spread(
    numbers: Tensor,
    rows: Rows,
    view: Tensor,
) -> Tensor:
    """One number per row, shaped to broadcast over a view of them."""
    return numbers.to(view.device, passes.own_precision(view)).view(rows.form(view))
