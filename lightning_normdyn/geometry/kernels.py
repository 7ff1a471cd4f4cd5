"""The few primitives that read or write weights, in torch operations: no other file touches entries.

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
from lightning_normdyn.geometry.chunks import Dims, Kernel, Views, entries_at_once, in_chunks
from lightning_normdyn.geometry.index import RowIndex, Rows
from lightning_normdyn.geometry.passes import Operand, Pass, applied_part, removed_part


class Kernels:
    """The primitives on one set of weights.

    Args:
        index: where the vectors lie in the local tensors.
        hidden: for each weight the entries that do not count in sums, bool like its local tensor;
            None: all count. Changes are made to all entries.
        device: where numbers per vector are kept.
        precision: in which numbers per vector are handed to a weight.
    """

    def __init__(
        self,
        index: RowIndex,
        hidden: Sequence[Tensor | None],
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self._index = index
        self._hidden = hidden
        self._device = device
        self._precision = precision
        self._sum_dtype = sum_dtype(device)
        self._masked = any(mask is not None for mask in hidden)

    @property
    def fuses(self) -> bool:
        """Whether `remove_radial_` and `remove_radial_of_` work: a sum and the change that follows
        from it, row by row, while the row is in the cache."""
        # Each vector must be one row. Off the CPU two passes cost no more memory traffic, and what
        # lies between them is done once for all vectors. A mask hides entries from sums, but not
        # from changes.
        return self._device.type == "cpu" and self._index.in_order and not self._masked

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
                and only where each vector is one row.
        """
        numbers = []
        if norms is not None:
            numbers = [norms, norms.reciprocal().nan_to_num_(0.0, 0.0, 0.0)]
        how = passes.displacement(self._sum_dtype if exact else None)
        return self._collect(how, [before, after], numbers)

    def radial(self, before: Operand, after: Operand) -> Tensor:
        """<w, w> and <w, Δ>, ``(2, n)``."""
        return self._collect(passes.RADIAL, [before, after])

    # ---- Changes, in place ----

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """Multiply every vector by its factor, ``(n,)``."""
        for weight, rows, number in self._rows_with(factor, dummy=1.0):
            tensor = tensors[weight]
            if tensor is not None:
                view = rows.view(tensor)
                view.mul_(_spread(number, rows, view))

    def add_scaled_(self, tensors: Operand, coefficient: Tensor, source: Operand) -> None:
        """Add ``coefficient * source`` to every vector; ``coefficient`` is ``(n,)``."""
        for weight, rows, number in self._rows_with(coefficient, dummy=0.0):
            tensor, addend = tensors[weight], source[weight]
            if tensor is not None and addend is not None:
                view = rows.view(tensor)
                view.addcmul_(rows.view(addend), _spread(number, rows, view))

    def remove_radial_(
        self, before: Operand, after: Operand, share: Tensor, active: Tensor | None
    ) -> Tensor:
        """`lightning_normdyn.functional.remove_radial` in one pass, where the kernels fuse.

        Args:
            before: w.
            after: v, which is changed.
            share: ``(n,)``: how much of w to take away beside the radial part.
            active: bool ``(n,)``: vectors to be changed; None: all.

        Returns:
            ``(n,)``: `lightning_normdyn.geometry.passes.removed_part`.
        """

        def kernel(dims: Dims, outs: Views, views: Views) -> None:
            start, end, own_share, *own_active = views
            square, product, _ = self._radial_of_rows(passes.radial, dims, views[:2], own_share)
            removed = outs[0].copy_(removed_part(square, product, own_share))
            end.addcmul_(start, applied_part(removed.to(own_share), *own_active), value=-1)

        return self._collect(_changing(kernel, 1), [before, after], _given(share, active))[0]

    def remove_radial_of_(
        self,
        direction: Operand,
        after: Operand,
        length: Tensor,
        share: Tensor,
        active: Tensor | None,
    ) -> Tensor:
        """`remove_radial_` where Δ = ``length * direction`` is known, and no copy of w is there.

        Args:
            direction: of the step.
            after: v, which is changed.
            length: ``(n,)``.
            share: as for `remove_radial_`.
            active: as for `remove_radial_`.

        Returns:
            ``(2, n)``: `lightning_normdyn.geometry.passes.removed_part`, and ||Δ|| / ||w||.
        """

        def kernel(dims: Dims, outs: Views, views: Views) -> None:
            step, end, own_length, own_share, *own_active = views
            square, product, start = self._radial_of_rows(
                passes.radial_of_step, dims, views[:3], own_share
            )
            removed = outs[0].copy_(removed_part(square, product, own_share))
            size = passes.norm_of(passes.widened(step), dims, outs[1])
            size.mul_(own_length.abs()).div_(square.sqrt())
            applied = applied_part(removed.to(own_share), *own_active)
            if start is not None:
                end.addcmul_(start, applied, value=-1)
            else:
                # w = v - length * direction, put in: w itself would be as long as the row.
                end.addcmul_(end, applied, value=-1).addcmul_(step, applied * own_length)

        return self._collect(
            _changing(kernel, 2), [direction, after], _given(length, share, active)
        )

    # ---- How a pass is taken ----

    def _collect(
        self, how: Pass, operands: Sequence[Operand], numbers: Sequence[Tensor] = ()
    ) -> Tensor:
        """Take a pass over every piece: ``(results, n)``.

        Args:
            how: the pass.
            operands: what its kernel reads; a weight for which all are None contributes zeros.
            numbers: ``(n,)`` each, given to the kernel behind the operands; only where each vector
                is one row, and none where rows are cut.
        """
        index = self._index
        dtype = self._sum_dtype if how.exact else self._precision
        written = torch.empty(how.written, sum(index.counts), dtype=dtype, device=self._device)
        places = written.split_with_sizes(index.counts, 1)
        of_rows = [index.to_rows(number.to(self._precision), 0.0) for number in numbers]

        cached = entries_at_once(self._device)
        added_up: dict[int, Tensor] = {}
        for i, (weight, rows) in enumerate(index.pieces):
            views = self._views(weight, rows, operands)
            first = next((view for view in views if view is not None), None)
            if first is None:
                places[i].zero_()
                continue
            dims, form = rows.dims(first), rows.form(first)
            entries = cached
            # Short rows that need no conversion lose no digits to one long sum, and what reads
            # every entry once has no use for the cache.
            if (
                how.streaming
                and first.dtype == dtype
                and (first.numel() <= index.counts[i] * chunks.CACHED_ENTRIES)
            ):
                entries = first.numel()
            if not how.whole_rows and chunks.cuts_rows(first, dims, entries):
                added_up[i] = self._add_up(how, views, dims, form, dtype).flatten(1)
                continue
            views += [_spread(number[i], rows, first) for number in of_rows]
            place = places[i]
            if first.device != self._device:  # offloaded, or one of several devices
                place = torch.empty_like(place, device=first.device)
            outs = place.view(how.written, *form).unbind()
            in_chunks(how.kernel, outs, views, dims, entries, whole_rows=how.whole_rows)
            if first.device != self._device:
                places[i].copy_(place)

        finished = how.finish(written.to(self._sum_dtype))
        for i, sums in added_up.items():
            finished.split_with_sizes(index.counts, 1)[i].copy_(sums)
        return index.to_vectors(finished)

    def _add_up(
        self, how: Pass, views: Views, dims: Dims, form: list[int], dtype: torch.dtype
    ) -> Tensor:
        """Sums of rows that are longer than a chunk, ``(results, *form)``: each part is finished,
        so that parts add up."""
        first = next(view for view in views if view is not None)
        sums = torch.zeros(how.results, *form, dtype=self._sum_dtype, device=first.device)

        def kernel(dims: Dims, outs: Views, views: Views) -> None:
            part = torch.empty(how.written, *outs[0].shape, dtype=dtype, device=first.device)
            how.kernel(dims, part.unbind(), views)
            for out, more in zip(outs, how.finish(part.to(self._sum_dtype)), strict=True):
                out += more

        in_chunks(kernel, sums.unbind(), views, dims, entries_at_once(self._device))
        return sums

    def _radial_of_rows(
        self, kernel: Kernel, dims: Dims, views: Views, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """<w, w>, <w, Δ> and w of whole rows, the sums in the dtype and form of ``like``; None in
        place of w where a single row is longer than a chunk."""
        if views[0].numel() <= entries_at_once(self._device):
            norm, product = like.new_empty(2, *like.shape).unbind()
            start = kernel(dims, (norm, product), views)
            return norm.square_(), product, start
        how = Pass(kernel, passes.finish_radial, 2, 2)
        square, product = self._add_up(how, views, dims, list(like.shape), like.dtype).to(
            like.dtype
        )
        return square, product, None

    def _views(self, weight: int, rows: Rows, operands: Sequence[Operand]) -> list[Tensor | None]:
        """A piece of every operand, hidden entries as zeros."""
        hidden = self._hidden[weight]
        views: list[Tensor | None] = []
        for operand in operands:
            tensor = operand[weight]
            view = None if tensor is None else rows.view(tensor)
            if view is not None and hidden is not None:
                view = view.masked_fill(rows.view(hidden), 0)
            views.append(view)
        return views

    def _rows_with(self, values: Tensor, *, dummy: float) -> Iterator[tuple[int, Rows, Tensor]]:
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


def _changing(kernel: Kernel, written: int) -> Pass:
    """A pass that also changes what it reads."""
    return Pass(kernel, lambda numbers: numbers, written, written, whole_rows=True)


def _given(*numbers: Tensor | None) -> list[Tensor]:
    return [number for number in numbers if number is not None]


def _spread(numbers: Tensor, rows: Rows, view: Tensor) -> Tensor:
    """One number per row, shaped to broadcast over a view of them."""
    return numbers.to(view.device, passes.own_precision(view)).view(rows.form(view))
