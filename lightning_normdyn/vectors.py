"""The targeted weights as one index space of n weight vectors: packed sums out, per-vector factors in.

Shapes: ``n`` vectors, ``weights`` weights. A vector is what the loss sees as one direction: a filter in front of BatchNorm, the filters
of one channel group in front of GroupNorm, a whole matrix in front of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_normdyn.sharding import Piece, Placement, Reduction, place_all

if TYPE_CHECKING:
    from lightning_normdyn.steps import StepBracket


@dataclass(frozen=True, eq=False)
class Partition:
    """Which entries of a weight form one vector.

    The entry at index ``e`` of the full (unsharded) weight belongs to vector ``labels[e[k] for k in keep]``.

    Args:
        keep: the dimensions of the weight that tell vectors apart, ascending, e.g. ``(0,)``.
        labels: int64, of shape ``[weight.shape[k] for k in keep]``; values ``0..n-1``, or -1 for entries that belong to no vector.
        granularity: ``"filter"``, ``"group"`` or ``"layer"``: what a person calls these vectors.

    Example:
        >>> Partition.filters((8, 3, 3, 3)).n
        8
        >>> Partition.layer((8, 16)).granularity
        'layer'
        >>> Partition.groups((8, 16), 2).labels.tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """

    keep: tuple[int, ...]
    labels: Tensor
    granularity: str

    @classmethod
    def filters(cls, shape: tuple[int, ...], *, axis: int = 0, transposed_groups: int | None = None) -> Partition:
        """One vector per output channel: dim ``axis``, or dim 1 within each group of a transposed convolution."""
        if transposed_groups is not None:
            inputs, per_group = shape[:2]
            group = torch.arange(inputs) // (inputs // transposed_groups)
            return cls((0, 1), group[:, None] * per_group + torch.arange(per_group), "filter")
        return cls((axis,), torch.arange(shape[axis]), "filter")

    @classmethod
    def groups(cls, shape: tuple[int, ...], groups: int) -> Partition:
        """``groups`` vectors, each of ``shape[0] / groups`` neighbouring rows."""
        return cls((0,), torch.arange(shape[0]) // (shape[0] // groups), "group")

    @classmethod
    def layer(cls, shape: tuple[int, ...]) -> Partition:
        """One vector: the whole weight."""
        return cls((0,), torch.zeros(shape[0], dtype=torch.long), "layer")

    @property
    def n(self) -> int:
        """Number of vectors."""
        return int(self.labels.max()) + 1 if self.labels.numel() else 0


Operand = Sequence["Tensor | None"]

CACHED_ENTRIES = 2**15
"""On a CPU, this many entries of two weights stay in a core's cache in float64 while several sums are taken of them."""
KERNEL_ENTRIES = 2**22
"""Elsewhere one kernel per weight is best; very large weights are cut so that temporaries stay small."""


class WeightVectors:
    """The targeted weights as one index space of ``n`` vectors.

    Every formula of the package is arithmetic on ``(n,)`` tensors; this class gathers them from the weights (packed sums, completed over
    the ranks that share vectors) and carries ``(n,)`` results back (scaling). It is the only place where a weight's shape, memory format,
    dtype or sharding is known.

    Args:
        weights: the parameters, in optimizer order.
        partitions: how each weight splits into vectors.
        names: what to call each weight in messages.

    Attributes:
        n: number of vectors of which this rank holds an entry; all of them unless weights are sharded.
        slices: the range of each weight's vectors among these ``n``.
        weight_of: int64 ``(n,)``: the weight that each vector belongs to.
        length: float64 ``(n,)``: number of entries of each vector, over all ranks.
        count: float64 ``(weights,)``: number of vectors of each weight, over all ranks.

    Raises:
        NotSupportedError: for sparse, complex, quantized or lazy weights.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
        >>> vectors = WeightVectors([weight], [Partition.filters((2, 2))])
        >>> vectors.norms().tolist()
        [5.0, 10.0]
        >>> vectors.scale_(torch.tensor([1.0, 0.5]))
        >>> weight.tolist()
        [[3.0, 4.0], [3.0, 4.0]]
    """

    def __init__(self, weights: Sequence[Tensor], partitions: Sequence[Partition], names: Sequence[str] | None = None) -> None:
        self.weights = list(weights)
        self.partitions = list(partitions)
        self.names = list(names) if names is not None else [f"weight {i}" for i in range(len(self.weights))]
        self.device = self.weights[0].device if self.weights else torch.device("cpu")
        self.sum_dtype = _sum_dtype(self.device)
        self._placements = place_all(self.weights, self.partitions, self.names)
        self.slices: list[slice] = []
        start = 0
        for placement in self._placements:
            self.slices.append(slice(start, start + len(placement.held)))
            start += len(placement.held)
        self.n = start
        self._pieces = [
            [_IndexedPiece(piece, placement.held, s, self.n) for piece in placement.pieces]
            for placement, s in zip(self._placements, self.slices, strict=True)
        ]
        pieces = [piece.where for pieces in self._pieces for piece in pieces]
        starts = [0, *(w.stop for w in pieces if w is not None)]
        # Each vector in exactly one piece, in order: what is found piece by piece only needs to be put one behind the other.
        self._in_order = starts[-1] == self.n and all(w is not None and w.start == at for w, at in zip(pieces, starts, strict=False))
        self._entries = CACHED_ENTRIES if self.device.type == "cpu" else KERNEL_ENTRIES
        lengths = [_lengths(p, partition).to(self.sum_dtype) for p, partition in zip(self._placements, self.partitions, strict=True)]
        self._reduction = Reduction(self._placements, lengths, self.device)
        self.weight_of = self._reduction.weight_of
        self.length = self._reduction.length
        self.count = torch.tensor([p.n for p in self.partitions], dtype=self.sum_dtype, device=self.device)
        self.low_precision = any(t.dtype in (torch.bfloat16, torch.float16) for t in self.values())
        """Whether some weight is stored in a dtype in which a factor close to 1 is lost to rounding."""

    # -- operands: one local tensor (or None) per weight ---------------------------------------------------------------

    def local(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's plain storage of tensors laid out like the weights (gradients, state), without autograd history."""
        return [None if t is None else p.storage(t.detach()) for t, p in zip(tensors, self._placements, strict=True)]

    def values(self) -> list[Tensor]:
        """The weights themselves; writing to them writes to the weights."""
        return [p.value(w) for w, p in zip(self.weights, self._placements, strict=True)]

    def storages(self) -> dict[Tensor, Tensor]:
        """Each weight's plain storage on this rank, as `StepBracket.request_snapshot` wants them."""
        return {w: v for w, v in zip(self.weights, self.values(), strict=True) if v is not None}

    def gradients(self) -> list[Tensor | None]:
        """The gradients as the optimizer receives them; None where a weight has none."""
        return [p.gradient(w) for w, p in zip(self.weights, self._placements, strict=True)]

    def has_gradient(self) -> tuple[bool, ...]:
        """For each weight whether it got a gradient; true also where this rank holds none of its entries, since other ranks decide."""
        return tuple(not p.pieces or p.gradient(w) is not None for w, p in zip(self.weights, self._placements, strict=True))

    def snapshots(self, bracket: StepBracket) -> list[Tensor | None]:
        """The copies that ``bracket`` took of these weights in this step."""
        return [bracket.snapshot(w) for w in self.weights]

    # -- sums over vectors ---------------------------------------------------------------------------------------------

    def inner(self, *pairs: tuple[Operand, Operand | None], exact: bool = True) -> Tensor:
        """Inner products of every vector, packed, completed over the ranks that share vectors in one collective.

        Args:
            pairs: ``(a, b)`` for <a, b>, ``(a, None)`` for <1, a>. A weight whose operand is None contributes zeros.
            exact: whether products are taken in float64; otherwise in the operands' own precision, float32 at least, which is twice as
                fast and errs by 1e-7 of the product of the two lengths. Enough for norms and cosines, not for differences of sums.

        Returns:
            ``(len(pairs), n)``, float64.
        """
        return self._reduction.sum_(self._products(pairs, exact))

    def inner_and_totals(
        self, *pairs: tuple[Operand, Operand | None], summarize: Callable[[Tensor, Tensor], Tensor], exact: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`inner`, and in the same collective `totals` of what ``summarize`` makes of the inner products.

        Args:
            pairs: as for `inner`.
            summarize: from the inner products ``(len(pairs), m)`` and the lengths ``(m,)`` of any m vectors to ``(J, m)`` values.
            exact: as for `inner`.

        Returns:
            ``(len(pairs), n)`` and ``(J, weights)``.
        """
        packed = self._products(pairs, exact)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def _products(self, pairs: Sequence[tuple[Operand, Operand | None]], exact: bool) -> Tensor:
        def of_piece(i: int, piece: _IndexedPiece) -> Tensor | None:
            used: list[Tensor] = []  # each operand once, however many products it enters

            def position(tensor: Tensor) -> int:
                if not any(t is tensor for t in used):
                    used.append(tensor)
                return next(k for k, t in enumerate(used) if t is tensor)

            factors: dict[int, tuple[int, int | None]] = {}
            for row, (a, b) in enumerate(pairs):
                x, y = a[i], None if b is None else b[i]
                if x is not None and b is None:
                    factors[row] = (position(x), None)
                elif x is not None and y is not None:
                    factors[row] = (position(x), position(y))
            if not factors:
                return None

            def kernel(*chunks: Tensor) -> Tensor:
                values = [c.to(dtype) for c in chunks]
                return torch.stack([_product(values[x], None if y is None else values[y], dims) for x, y in factors.values()])

            views = [piece.view(t) for t in used]
            dims, dtype = piece.summed(views[0]), self.sum_dtype if exact else _own_precision(*views)
            sums = _in_chunks(kernel, views, dims, self._entries).flatten(1)
            if len(factors) == len(pairs):
                return sums
            return sums.new_zeros(len(pairs), sums.shape[1]).index_copy_(0, torch.tensor(list(factors), device=sums.device), sums)

        return self._collect(len(pairs), of_piece)

    def displacement(self, before: Operand) -> Tensor:
        """Sums that tell how the weights moved since ``before``: <w, w>, <w, Δ>, <Δ, Δ> with w = ``before`` and Δ = now - w.

        The difference is taken in float64: taken in the weights' own precision it would cost angles below 1e-5 rad whenever the norm
        changes as well.

        Returns:
            ``(3, n)``, completed over the ranks that share vectors.
        """

        def kernel(dims: list[int]) -> Kernel:
            def sums(start: Tensor, now: Tensor) -> Tensor:
                start = start.to(self.sum_dtype)
                moved = now.to(self.sum_dtype) - start
                return torch.stack([_product(start, start, dims), _product(start, moved, dims), _product(moved, moved, dims)])

            return sums

        return self._reduction.sum_(self._of_both(3, before, kernel))

    def radial_and_totals(self, before: Operand, *, summarize: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The part of the step since ``before`` that lies along ``before``: <w, w> and <w, Δ>, and `totals` in the same collective.

        The step is taken in the weights' own precision, float32 at least: right to 1e-7 of the step.

        Args:
            before: w, the weights before the step.
            summarize: from the sums ``(2, m)`` and the lengths ``(m,)`` of any m vectors to ``(J, m)`` values.

        Returns:
            ``(2, n)`` and ``(J, weights)``.
        """
        packed = self._of_both(2, before, _radial_kernel)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def _of_both(self, count: int, before: Operand, kernel: Callable[[list[int]], Kernel]) -> Tensor:
        """Collect what a kernel makes of the weights before and now."""
        values = self.values()

        def of_piece(i: int, piece: _IndexedPiece) -> Tensor | None:
            then = before[i]
            if then is None:
                return None
            views = [piece.view(then), piece.view(values[i])]
            dims = piece.summed(views[0])
            return _in_chunks(kernel(dims), views, dims, self._entries).flatten(1)

        return self._collect(count, of_piece)

    def norms(self) -> Tensor:
        """Norm of every vector, ``(n,)``, summed in the weights' own precision, float32 at least.

        One pass of the fastest kernel: right to float32 rounding, which is all that a factor or a division needs. Where a difference of
        norms or an angle is wanted, use `inner`.
        """
        norms = self._local_norms()
        if self._in_order and not self._reduction.cuts:
            return norms
        return self._reduction.sum_(norms.square_()).sqrt_()

    def _local_norms(self) -> Tensor:
        """Norms of what this rank holds of every vector."""
        values = self.values()

        def of_piece(i: int, piece: _IndexedPiece) -> Tensor:
            view = piece.view(values[i])
            dims, dtype = piece.summed(view), _own_precision(view)
            # A kernel that need not convert and sums short vectors has no use for the cache, and keeps its precision.
            if view.dtype == dtype and view.numel() <= piece.rows * self._entries:
                return _norm(view, dims)[None].flatten(1)
            squares = _in_chunks(lambda part: _norm(part.to(dtype), dims).to(self.sum_dtype).square_()[None], [view], dims, self._entries)
            return squares.flatten(1).sqrt_()

        if self._in_order:
            return self._collect(1, of_piece)[0]
        return self._collect(1, lambda i, piece: of_piece(i, piece).to(self.sum_dtype).square_())[0].sqrt_()

    def _collect(self, count: int, of_piece: Callable[[int, _IndexedPiece], Tensor | None]) -> Tensor:
        """Pack what is found for each piece, ``(count, rows)``, into ``(count, n)``; None stands for zeros."""
        found = [(piece, of_piece(i, piece)) for i, pieces in enumerate(self._pieces) for piece in pieces]
        if self._in_order and found:
            parts = [torch.zeros(count, p.rows, device=self.device) if sums is None else sums.to(self.device) for p, sums in found]
            return torch.cat(parts, 1).to(self.sum_dtype)
        packed = torch.zeros(count, self.n + 1, dtype=self.sum_dtype, device=self.device)
        for piece, sums in found:
            if sums is not None:
                piece.add_to(packed, sums.to(packed))
        return packed[:, : self.n]

    def per_weight(self, values: Tensor) -> Tensor:
        """Sum ``(..., n)`` values over the vectors of each weight that this rank holds: ``(..., weights)``."""
        return self._reduction.per_weight(values)

    def totals(self, values: Tensor) -> Tensor:
        """`per_weight`, completed over all ranks, every vector counted once: ``(..., n)`` to ``(..., weights)``.

        One collective, or none where every rank holds all vectors. Every rank must call it.
        """
        return self._reduction.totals(values)

    def counts(self, bins: Tensor, size: int) -> Tensor:
        """How many vectors of each weight lie in each bin, over all ranks, every vector counted once.

        One collective, or none where every rank holds all vectors. Every rank must call it.

        Args:
            bins: ``(..., n)`` int64: the bin of each vector, ``0..size-1``, or -1 for none.
            size: number of bins.

        Returns:
            ``(..., weights, size)``.
        """
        return self._reduction.counts(bins, size)

    def spread(self, per_weight: Tensor) -> Tensor:
        """One value per weight, ``(weights,)``, repeated for each of its vectors: ``(n,)``."""
        return per_weight[..., self.weight_of]

    # -- all vectors of all ranks: for checkpoints and for what lies behind the weights ------------------------------------

    def gather(self, values: Tensor) -> list[Tensor]:
        """From ``(..., n)`` values of the vectors held here to those of all vectors, for each weight ``(..., vectors of the weight)``.

        One collective, or none where every rank holds all vectors. Every rank must call it.
        """
        return self._reduction.gather(values)

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """The inverse of `gather`, on any number of ranks, without communication."""
        return self._reduction.scatter(values)

    def scatter_one(self, weight: int, values: Tensor) -> Tensor:
        """`scatter` for the weight at position ``weight`` alone."""
        return values.to(self.device)[..., self._placements[weight].held.to(self.device)]

    # -- writing -------------------------------------------------------------------------------------------------------

    def scale_(self, factor: Tensor, tensors: Operand | None = None) -> None:
        """Multiply every vector by its factor, in place.

        Args:
            factor: ``(n,)``.
            tensors: what to scale instead of the weights (gradients, state buffers); None entries are passed over.
        """
        factor = _with_dummy(factor, 1.0)
        for tensor, pieces in zip(self.values() if tensors is None else tensors, self._pieces, strict=True):
            if tensor is not None:
                for piece in pieces:
                    view = piece.view(tensor)
                    view.mul_(piece.spread(factor, view))

    def add_scaled_(self, coefficient: Tensor, source: Operand) -> None:
        """Add ``coefficient * source`` to every vector of the weights, in place; ``coefficient`` is ``(n,)``."""
        coefficient = _with_dummy(coefficient, 0.0)
        for value, other, pieces in zip(self.values(), source, self._pieces, strict=True):
            if other is not None:
                for piece in pieces:
                    view = piece.view(value)
                    view.addcmul_(piece.view(other), piece.spread(coefficient, view))

    def remove_radial_(self, before: Operand, share: Tensor, active: Tensor | None = None) -> Tensor:
        """Take the part along ``before`` out of the step since then, and a share of ``before`` with it, in place.

        With s = ``before``, w now: ``w <- w - (<s, w - s> / <s, s> + share) s``. The step is taken as in `radial_and_totals`; a vector for
        which this is not finite is left alone. One pass where no vector lies on several ranks, one collective otherwise.

        Args:
            before: s, the weights before the step.
            share: ``(n,)``, e.g. the part that decay takes away.
            active: bool ``(n,)``, vectors to be changed; None: all.

        Returns:
            ``(n,)``: by how much of ``before`` each vector was changed or would have been.
        """
        mask = None if active is None else active.to(share.dtype)
        if not self._in_order or self._reduction.cuts:
            ss, sd = self._reduction.sum_(self._of_both(2, before, _radial_kernel))
            removed = _removed(ss, sd, share)
            self.add_scaled_(-_applied(removed, mask), before)
            return removed
        values = self.values()

        def of_piece(i: int, piece: _IndexedPiece) -> Tensor | None:
            then = before[i]
            if then is None:
                return None
            now, start = piece.view(values[i]), piece.view(then)
            dims = piece.summed(now)
            kernel = _radial_kernel(dims)

            def project(start: Tensor, now: Tensor, share: Tensor, *mask: Tensor) -> Tensor:
                sums = _in_chunks(kernel, [start, now], dims, self._entries)
                removed = _removed(sums[0], sums[1], share)
                now.addcmul_(start, _applied(removed, *mask).to(share.dtype), value=-1)
                return removed[None]

            numbers = [piece.spread(v, now) for v in (share, mask) if v is not None]
            # Vectors together, as long as they stay in the cache from their sums to their change.
            return _in_chunks(project, [start, now, *numbers], dims, 4 * self._entries, whole=True).flatten(1)

        return self._collect(1, of_piece)[0]

    def scale_rounded_(self, factor: Tensor, owed: Tensor) -> Tensor:
        """Multiply weights stored in bfloat16 or float16 by factors that rounding would swallow.

        A factor too close to 1 to survive rounding is kept in ``owed`` until it matters; what is then written is measured, so that
        rounding leaves no bias. Each rank does so for its own piece of a vector, without communication.

        Args:
            factor: ``(n,)``: this step's factor.
            owed: ``(n,)``: the product of factors not yet applied.

        Returns:
            The new ``owed``.
        """
        owed = owed * factor.to(owed.dtype)
        rounding = torch.stack([torch.tensor(torch.finfo(t.dtype).eps, dtype=owed.dtype) for t in self.values()]).to(owed.device)
        full = self.spread(rounding <= torch.finfo(torch.float32).eps)
        matters = (owed - 1).abs() >= self.spread(rounding)
        apply = torch.where(full | matters, owed, torch.ones_like(owed))
        before = self._local_norms()
        self.scale_(apply)
        done = (self._local_norms() / before).to(owed.dtype)
        done = torch.where(torch.isfinite(done) & (done > 0) & ~full, done, apply)
        return torch.where(full | matters, owed / done, owed)


class _IndexedPiece:
    """A piece with its rows mapped into the common index space; index ``n`` is a dummy for rows that belong to no vector.

    Attributes:
        rows: number of rows: entries of the kept dimensions.
        where: the range of vectors that they are, in order; None if they are no such range.
    """

    def __init__(self, piece: Piece, held: Tensor, where: slice, n: int) -> None:
        self._select = piece.select
        labels, keep, self._blocks = _merge_rows(piece.labels, piece.keep)
        self._keep = frozenset(keep)
        labels = labels.flatten()
        self._index = torch.where(labels >= 0, torch.searchsorted(held, labels) + where.start, n)
        self.rows = labels.numel()
        start = int(self._index[0]) if self.rows else where.start
        in_order = start + self.rows <= n and torch.equal(self._index, torch.arange(start, start + self.rows))
        # Whole filters in order are the common case: plain slices instead of index kernels.
        self.where = slice(start, start + self.rows) if in_order else None
        self._on: dict[torch.device, Tensor] = {}

    def _index_on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._index.to(device)
        return self._on[device]

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor, with one row per entry of the kept dimensions."""
        view = self._select(tensor)
        for dim, block in self._blocks:
            view = view.unflatten(dim, (-1, block))  # type: ignore[no-untyped-call]
        return view

    def summed(self, view: Tensor) -> list[int]:
        """The dimensions of a view within which a row lies."""
        return [d for d in range(view.ndim) if d not in self._keep]

    def add_to(self, packed: Tensor, sums: Tensor) -> None:
        """Add ``(count, rows)`` to ``(count, n + 1)``."""
        if self.where is not None:
            packed[:, self.where] += sums
        else:
            packed.index_add_(1, self._index_on(packed.device), sums)

    def spread(self, values: Tensor, view: Tensor) -> Tensor:
        """``(n + 1,)`` values of vectors, shaped to broadcast over ``view``, in a dtype that loses nothing that ``view`` could keep."""
        rows = values[self.where] if self.where is not None else values[self._index_on(values.device)]
        shape = [view.shape[d] if d in self._keep else 1 for d in range(view.ndim)]
        return rows.to(view.device, _own_precision(view)).reshape(shape)


def _merge_rows(labels: Tensor, keep: Sequence[int]) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """Take neighbouring entries with the same label together, so that groups, layers and transposed filters are rows as well.

    Returns:
        The labels of the merged rows, the dimensions that are kept, and which dimensions to unflatten first: ``(dim, size of the inner
        one)``, one after the other.
    """
    keep, blocks = list(keep), []
    for axis in reversed(range(labels.ndim)) if labels.numel() else ():
        size = labels.shape[axis]
        rows = labels.movedim(axis, 0).reshape(size, -1)
        changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
        block = gcd(size, *changes.tolist())
        labels = labels.index_select(axis, torch.arange(0, size, block))
        if block == size:
            labels = labels.squeeze(axis)
            del keep[axis]
        elif block > 1:
            blocks.append((keep[axis], block))
            keep = [k + (k > keep[axis]) for k in keep]
    return labels, keep, blocks


# -- sums of views: every kernel goes from views of one shape to (K, ...), of size 1 where rows were summed -------------------

Kernel = Callable[..., Tensor]


def _in_chunks(kernel: Kernel, views: Sequence[Tensor], summed: Sequence[int], entries: int, *, whole: bool = False) -> Tensor:
    """``kernel(*views)``, applied to so few entries at a time that they stay in the cache between its operations.

    Args:
        kernel: from views to ``(K, ...)``.
        views: of one shape, or of size 1 in the summed dimensions.
        summed: the dimensions that the kernel sums.
        entries: how many at a time.
        whole: never cut a row.
    """
    first = views[0]
    if first.numel() > entries:
        # Along the dimension whose steps in memory are longest, so that a chunk lies in one place.
        dim = max((d for d in range(first.ndim) if first.shape[d] > 1), key=first.stride)
        if dim not in summed or not whole:
            step = max(1, entries * first.shape[dim] // first.numel())
            chunks = zip(*(torch.split(v, step, dim) for v in views), strict=True)
            parts = [_in_chunks(kernel, chunk, summed, entries, whole=whole) for chunk in chunks]
            if dim not in summed:
                return torch.cat(parts, dim + 1)
            total = parts[0].to(_sum_dtype(first.device))
            for part in parts[1:]:
                total += part
            return total
    return kernel(*views)


def _radial_kernel(dims: list[int]) -> Kernel:
    """<w, w> and <w, Δ>, in the precision of the weights."""

    def sums(start: Tensor, now: Tensor) -> Tensor:
        dtype = _own_precision(start)
        start = start.to(dtype)
        return torch.stack([_product(start, start, dims), _sum((now.to(dtype) - start).mul_(start), dims)])

    return sums


def _removed(ss: Tensor, sd: Tensor, share: Tensor) -> Tensor:
    return share + sd / ss.clamp(min=torch.finfo(ss.dtype).tiny)


def _applied(removed: Tensor, mask: Tensor | None = None) -> Tensor:
    taken = removed.nan_to_num(0.0, 0.0, 0.0)
    return taken if mask is None else taken * mask


def _sum_dtype(device: torch.device) -> torch.dtype:
    # Metal has no float64; everywhere else sums are exact enough for angles of 1e-6 rad.
    return torch.float32 if device.type == "mps" else torch.float64


def _own_precision(*views: Tensor) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in views) else torch.float32


def _product(x: Tensor, y: Tensor | None, dims: list[int]) -> Tensor:
    """<x, y>, <x, x>, or <1, x> if ``y`` is None."""
    if y is x:
        return _norm(x, dims).square_()
    return _sum(x if y is None else x * y, dims)


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x


def _norm(x: Tensor, dims: list[int]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True) if dims else x.abs()


def _with_dummy(values: Tensor, dummy: float) -> Tensor:
    return torch.cat([values, values.new_full((1,), dummy)])


def _lengths(placement: Placement, partition: Partition) -> Tensor:
    labels = partition.labels.flatten()
    per_row = prod(placement.shape) // max(1, labels.numel())
    return torch.bincount(labels[labels >= 0], minlength=partition.n).to(torch.float64) * per_row
