"""What one pass over a weight reads, sums and combines: the arithmetic of
`lightning_normdyn.geometry.kernels`.

A pass is taken in the weight's own precision, float32 at least; only the few numbers per row are
combined in float64. Where a plain sum would lose digits that way, the pass first takes the large
part out (the mean, the old direction) and sums what is left. The tests compare every pass with the
formula of `lightning_normdyn.functional` that it stands for.

Letters: w a weight before a step, v after it, Δ = v - w.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

Dims = list[int]
Views = Sequence[Any]
Kernel = Callable[[Dims, Views, Views], Any]
"""``kernel(dims, outs, views)`` reads views of one shape, sums over their dimensions ``dims`` and
writes what it finds to ``outs``, which are of size 1 in those."""

Operand = Sequence["Tensor | None"]
"""One local tensor per weight; None for a weight to be passed over."""

Pair = tuple[Operand, Operand | None]
"""What to multiply, <a, b>; ``(a, None)`` for <1, a>."""


@dataclass(frozen=True)
class Pass:
    """How one kind of sums is taken.

    Args:
        kernel: see `Kernel`.
        finish: makes of what the kernel wrote, ``(written, ...)``, sums that may be added over the
            parts of a vector, ``(results, ...)``; given in float64, and free to write to it.
        written: how many numbers the kernel writes for each row.
        results: how many sums ``finish`` makes of them.
        dtype: in which what the kernel writes is kept; None: in the weights' own precision.
        streaming: whether the kernel reads each entry once, so that a cache helps it only where
            rows are long or dtypes are converted.
        whole_rows: whether the kernel must see each row at once, because it also changes it.
        writes: position of the view that the kernel writes to, too; None: it writes to none.
        bears_zeros: whether zeros behind a row change nothing.
    """

    kernel: Kernel
    finish: Callable[[Tensor], Tensor]
    written: int
    results: int
    dtype: torch.dtype | None = None
    streaming: bool = False
    whole_rows: bool = False
    writes: int | None = None
    bears_zeros: bool = True


class Room:
    """Memory for what a kernel writes of each row.

    Args:
        written: how many numbers of each.
        rows: how many rows each lot has.
        dtype: of the numbers.
        device: where they are kept.

    Attributes:
        written: all of them, ``(written, rows)``, in the order of lots.
        columns: the rows of each lot.
        places: their part of ``written``.
    """

    def __init__(
        self,
        written: int,
        rows: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.written = torch.empty(written, sum(rows), dtype=dtype, device=device)
        stops = list(accumulate(rows))
        self.columns = [slice(stop - count, stop) for count, stop in zip(rows, stops, strict=True)]
        self.places = [self.written[:, columns] for columns in self.columns]
        self._outs: dict[int, tuple[list[int], Views]] = {}

    def outs(self, lot: int, form: list[int]) -> Views:
        """Where a kernel writes the numbers of the rows of a lot: each of the shape ``form``."""
        known = self._outs.get(lot)
        if known is None or known[0] != form:
            known = self._outs[lot] = form, self.places[lot].view(-1, *form).unbind()
        return known[1]


# ---- Norms, moments, displacement, radial part ----


def _norms(
    dims: Dims,
    outs: Views,
    views: Views,
) -> None:
    norm_of(widened(views[0]), dims, outs[0])


SQUARES = Pass(_norms, torch.square, 1, 1, streaming=True)
"""<w, w>."""


def _exact_norms(
    dims: Dims,
    outs: Views,
    views: Views,
) -> None:
    norm_of(widened(views[0], torch.float64), dims, outs[0])


EXACT_SQUARES = Pass(_exact_norms, torch.square, 1, 1, torch.float64)
"""<w, w>, summed in float64."""


def _moments(
    dims: Dims,
    outs: Views,
    views: Views,
) -> None:
    mean, length, left, members = outs
    x = widened(views[0])
    count = prod(x.shape[d] for d in dims)
    # Around an estimate of the mean: the standard deviation is then right to 1e-6 even beside a
    # mean a thousand times as large.
    sum_of(x, dims, mean)
    estimate = mean.div_(count).to(x.dtype)
    # The one that is subtracted. It need not be right: what it misses is in `left`.
    mean.copy_(estimate)
    rest = x - estimate
    norm_of(rest, dims, length)
    sum_of(rest, dims, left)
    members.fill_(count)


def _finish_moments(written: Tensor) -> Tensor:
    """With w = mean + rest."""
    mean, length, left, members = written
    squares = length.square() + mean * (2 * left + members * mean)
    return torch.stack([squares, left + members * mean])


# Not with zeros behind a row: around the mean of its entries, these would be far from 0.
MOMENTS = Pass(_moments, _finish_moments, 4, 2, bears_zeros=False)
"""<w, w> and <1, w>."""


def _finish_displacement(written: Tensor) -> Tensor:
    """With v = k w + r: Δ = (k - 1) w + r."""
    norm, ratio, length, along = written
    square, growth = norm.square(), ratio - 1
    radial = growth * square + along
    total = growth * (growth * square + 2 * along) + length.square()
    return torch.stack([square, radial, total])


def displacement(
    exact: torch.dtype | None,
    *,
    known: bool = False,
) -> Pass:
    """<w, w>, <w, Δ>, <Δ, Δ>, from w, v and, if they are known, norms of w.

    Args:
        exact: the dtype that <w, w> is summed in; None: the weight's own.
        known: whether norms are given.
    """
    return _displacement(exact, known)


# Made once each, so that kernels of another kind can tell which pass it is.
@cache
def _displacement(exact: torch.dtype | None, known: bool) -> Pass:
    def kernel(
        dims: Dims,
        outs: Views,
        views: Views,
    ) -> None:
        norm, ratio, length, along = outs
        before, after = map(widened, views[:2])
        if known:
            norm.copy_(views[2])
        else:
            norm_of(widened(before, exact), dims, norm)
        factor = norm_of(after, dims, ratio).div_(norm).nan_to_num_(0.0, 0.0, 0.0)
        if ratio.dtype != after.dtype:
            # The residual is taken with the rounded ratio, so this is the one to keep.
            factor = factor.to(after.dtype)
            ratio.copy_(factor)
        # The residual is nearly orthogonal to w, so that its sums lose no digits to the change of
        # the norm. addcmul rounds once where the machine can multiply and add at once; where it
        # cannot, entries are off by 3e-8 of themselves.
        residual = torch.addcmul(after, before, factor, value=-1)
        norm_of(residual, dims, length)
        sum_of(residual.mul_(before), dims, along)

    return Pass(kernel, _finish_displacement, 4, 3, exact, whole_rows=known)


def radial(
    dims: Dims,
    outs: Views,
    views: Views,
) -> Tensor:
    """The norm of w, and <w, Δ>, from w and v; returns w."""
    before, after = map(widened, views)
    # First what reads both: two weights come into the cache faster together than one after the
    # other.
    sum_of((after - before).mul_(before), dims, outs[1])
    norm_of(before, dims, outs[0])
    return before


def radial_of_step(
    dims: Dims,
    outs: Views,
    views: Views,
) -> Tensor:
    """The norm of w, <w, Δ> and the norm of the direction, from a direction, v, and the number that
    the step is of the direction; returns w."""
    direction, after, length = views
    # w is told from what it has become. Its error is the rounding of v, which matters only where
    # the step is many times as long as w.
    before = torch.addcmul(after, direction, length, value=-1)
    sum_of(before * direction, dims, outs[1]).mul_(length)
    norm_of(before, dims, outs[0])
    norm_of(widened(direction), dims, outs[2])
    return before


def _finish_radial(written: Tensor) -> Tensor:
    """From norms to squares."""
    # <w, Δ> in the middle may be negative and is written as it is.
    written[::2].square_()
    return written


RADIAL = Pass(radial, _finish_radial, 2, 2)
"""<w, w> and <w, Δ>."""
RADIAL_OF_STEP = Pass(radial_of_step, _finish_radial, 3, 3)
"""<w, w>, <w, Δ> and <direction, direction>."""


def removing(
    how: Pass,
    operands: int,
) -> Pass:
    """A pass that takes the sums of `RADIAL` or `RADIAL_OF_STEP` and at once removes from v the
    part along w, row by row.

    Args:
        how: the sums.
        operands: how many views they take. Behind them stand the share of w to remove beside the
            radial part and, if not all vectors are to be changed, which are.
    """

    def kernel(
        dims: Dims,
        outs: Views,
        views: Views,
    ) -> None:
        share, *active = views[operands:]
        # The row is in the cache now: the change costs no other read of memory.
        before = how.kernel(dims, outs, views[:operands])
        removed = removed_part(outs[0].square(), outs[1], share).to(share.dtype)
        views[1].addcmul_(before, applied_part(removed, *active), value=-1)

    return replace(how, kernel=kernel, whole_rows=True, writes=1)


def removed_part(
    square: Tensor,
    product: Tensor,
    share: Tensor,
) -> Tensor:
    """How much of w is taken away: ``share`` + <w, Δ> / <w, w>.

    As `lightning_normdyn.functional.radial_coefficient`, but not finite where Δ or w is not, so
    that such vectors can be counted.
    """
    return torch.addcdiv(share, product, above_zero(square))


def above_zero(square: Tensor) -> Tensor:
    """To divide by: of a vector of length zero the quotient is then 0, and not NaN."""
    return square.clamp(min=torch.finfo(square.dtype).tiny)


def applied_part(
    removed: Tensor,
    active: Tensor | None = None,
) -> Tensor:
    """`removed_part` of the vectors that are changed; 0 for the others and where not finite."""
    # Without a branch, which would make the host wait for the device.
    applied = removed.nan_to_num(0.0, 0.0, 0.0)
    return applied if active is None else applied * active


# ---- Inner products ----


def products(
    pairs: Sequence[Pair],
    copy: tuple[Operand, Operand] | None,
    exact: torch.dtype | None,
) -> tuple[Pass, list[Operand]]:
    """Several inner products in one pass, in which each operand is read once however many products
    it enters; returns what the pass reads, too.

    Args:
        pairs: ``(a, b)`` for <a, b>, ``(a, None)`` for <1, a>.
        copy: one of the operands, and where to copy it on the way.
        exact: the dtype that products are taken in; None: the operands' own.
    """
    operands: list[Operand] = []

    def position_of(operand: Operand) -> int:
        for position, known in enumerate(operands):
            # Callers ask for the weights anew for each product: other lists of the same tensors.
            if operand is known or all(x is y for x, y in zip(operand, known, strict=True)):
                return position
        operands.append(operand)
        return len(operands) - 1

    terms = []
    for row, (left, right) in enumerate(pairs):
        left_position = position_of(left)
        right_position = None if right is None else position_of(right)
        terms.append((row, left_position, right_position))
    squares = [row for row, left, right in terms if left == right]
    # Products of two weights first: two of them come into the cache faster together than one after
    # the other.
    terms.sort(key=lambda term: term[0] in squares)
    copied = None if copy is None else position_of(copy[0])
    read = len(operands)
    if copy is not None:
        operands.append(copy[1])

    def kernel(
        dims: Dims,
        outs: Views,
        views: Views,
    ) -> None:
        # While x is in the cache anyway.
        if copied is not None and views[copied] is not None and views[-1] is not None:
            views[-1].copy_(views[copied])
        values = []
        for view in views[:read]:
            values.append(None if view is None else widened(view, exact))
        for row, left, right in terms:
            x, out = values[left], outs[row]
            y = x if right is None else values[right]
            if x is None or y is None:
                out.zero_()
            elif right is None:
                sum_of(x, dims, out)
            elif left == right:
                # A norm reads x once and cannot overflow where its square would.
                norm_of(x, dims, out)
            else:
                sum_of(x * y, dims, out)

    def finish(written: Tensor) -> Tensor:
        for row in squares:
            written[row].square_()
        return written

    writes = None if copy is None else len(operands) - 1
    how = Pass(kernel, finish, len(pairs), len(pairs), exact, writes=writes)
    return how, operands


_A: list[Any] = [object()]
_B: list[Any] = [object()]
PRODUCTS, _ = products([(_A, _A), (_A, _B), (_B, _B)], None, None)
"""<a, a>, <a, b> and <b, b> of two operands, in their own precision."""


# ---- Sums of one view ----


def own_precision(*tensors: Tensor) -> torch.dtype:
    """float64 if some tensor is, else float32: loses nothing that they could keep."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widened(
    x: Tensor,
    exact: torch.dtype | None = None,
) -> Tensor:
    """In the dtype ``exact``; None: in its own precision, float32 at least."""
    if exact is not None:
        return x.to(exact)
    # bfloat16 and float16 hold too few digits for a sum, and float16 overflows.
    return x.float() if x.dtype.itemsize < 4 else x


def sum_of(
    x: Tensor,
    dims: Dims,
    out: Tensor,
) -> Tensor:
    """Sum over ``dims``; over none of them the entries themselves."""
    if not dims:
        return out.copy_(x)
    # An `out` of another dtype would make torch convert x first, entry by entry.
    if out.dtype != x.dtype:
        return out.copy_(x.sum(dims, keepdim=True))
    return torch.sum(x, dims, keepdim=True, out=out)


def norm_of(
    x: Tensor,
    dims: Dims,
    out: Tensor,
) -> Tensor:
    """Euclidean norm over ``dims``; over none of them absolute values."""
    # A row of one entry: without dimensions torch would take the norm of everything.
    if not dims:
        return out.copy_(x.abs())
    if out.dtype != x.dtype:
        return out.copy_(torch.linalg.vector_norm(x, dim=dims, keepdim=True))
    torch.linalg.vector_norm(x, dim=dims, keepdim=True, out=out)
    return out
