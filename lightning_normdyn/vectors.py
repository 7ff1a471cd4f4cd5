"""The targeted weights as one index space of n weight vectors: packed sums out, per-vector factors in.

Shapes: ``n`` vectors, ``weights`` weights. A vector is what the loss sees as one direction: a filter in front of BatchNorm, the filters
of one channel group in front of GroupNorm, a whole matrix in front of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

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

    @cached_property
    def partial(self) -> bool:
        """Whether some entries belong to no vector."""
        return bool((self.labels < 0).any())

    def equal(self, other: Partition) -> bool:
        """Whether ``other`` splits a weight into the same vectors."""
        return self.keep == other.keep and torch.equal(self.labels, other.labels)


Operand = Sequence["Tensor | None"]

CACHED_ENTRIES = 2**17
"""On a CPU, this many float32 entries per thread of two weights and their difference stay in the cores' caches while sums are taken."""
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
        lengths = [_lengths(p, partition).to(self.sum_dtype) for p, partition in zip(self._placements, self.partitions, strict=True)]
        self._reduction = Reduction(self._placements, lengths, self.device)
        self.weight_of = self._reduction.weight_of
        self.length = self._reduction.length
        self.count = torch.tensor([p.n for p in self.partitions], dtype=self.sum_dtype, device=self.device)
        self._rounding: Tensor | None = None  # of each vector's weight
        self.low_precision = any(t.dtype in (torch.bfloat16, torch.float16) for t in self.values())
        """Whether some weight is stored in a dtype in which a factor close to 1 is lost to rounding."""

    @property
    def _entries(self) -> int:
        """How many entries of a weight a kernel takes at a time."""
        # Every thread takes its part of each kernel; below 2**15 entries a kernel has only one.
        return CACHED_ENTRIES * torch.get_num_threads() if self.device.type == "cpu" else KERNEL_ENTRIES

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
        def of_piece(i: int, piece: _IndexedPiece) -> _Found | None:
            used: list[Tensor] = []  # each operand once, however many products it enters

            def position(tensor: Tensor) -> int:
                if not any(t is tensor for t in used):
                    used.append(tensor)
                return next(k for k, t in enumerate(used) if t is tensor)

            factors: list[tuple[int, int | None] | None] = []
            for a, b in pairs:
                x, y = a[i], None if b is None else b[i]
                absent = x is None or (b is not None and y is None)
                factors.append(None if absent else (position(x), None if y is None else position(y)))  # type: ignore[arg-type]
            if not used:
                return None
            views = [piece.view(t) for t in used]
            dims, dtype = piece.summed(views[0]), self.sum_dtype if exact else _own_precision(*views)
            # A product of two weights first: two of them come into the cache faster together than one after the other.
            order = sorted((row for row, f in enumerate(factors) if f is not None), key=squares.__contains__)

            def kernel(*chunks: Tensor) -> Tensor:
                values = [c.to(dtype) for c in chunks]
                rows: dict[int, Tensor] = {}
                for row in order:
                    x, y = factors[row]  # type: ignore[misc]
                    rows[row] = _norm(values[x], dims) if row in squares else _product(values[x], None if y is None else values[y], dims)
                none = None if len(rows) == len(factors) else torch.zeros_like(rows[order[0]])
                return torch.stack([rows.get(row, none) for row in range(len(factors))])  # type: ignore[misc]

            return _sums(kernel, finish, views, dims, self._entries)

        squares = {row for row, (a, b) in enumerate(pairs) if b is not None and all(x is y for x, y in zip(a, b, strict=True))}

        def finish(found: Tensor) -> Tensor:
            found = found.to(self.sum_dtype)
            for row in squares:
                found[row].square_()
            return found

        return self._collect(len(pairs), of_piece, finish)

    def moments(self, tensors: Operand) -> tuple[Tensor, Tensor]:
        """Sums of squares and sums of the entries of every vector, for standard deviations.

        Summed around a first estimate of the mean, in the tensors' own precision, float32 at least: a standard deviation from the two is
        right to 1e-6 even where the mean is a thousand times as large.

        Args:
            tensors: laid out like the weights; None contributes zeros.

        Returns:
            <w, w> and <1, w>, each ``(n,)`` float64.
        """

        def kernel(dims: list[int]) -> Kernel:
            def sums(x: Tensor) -> Tensor:
                x = x.to(_own_precision(x))
                members = prod(x.shape[d] for d in dims)
                mean = _sum(x, dims) / members
                rest = x - mean
                return torch.stack([mean, _norm(rest, dims), _sum(rest, dims), torch.full_like(mean, members)])

            return sums

        def finish(found: Tensor) -> Tensor:
            mean, rest, left, members = found.to(self.sum_dtype)
            return torch.stack([rest.square() + mean * (2 * left + members * mean), left + members * mean])

        def of_piece(i: int, piece: _IndexedPiece) -> _Found | None:
            tensor = tensors[i]
            if tensor is None:
                return None
            view = piece.view(tensor)
            dims = piece.summed(view)
            return _sums(kernel(dims), finish, [view], dims, self._entries)

        ww, w1 = self._reduction.sum_(self._collect(4, of_piece, finish))
        return ww, w1

    def displacement(self, before: Operand, *, exact: bool = False) -> Tensor:
        """Sums that tell how the weights moved since ``before``: <w, w>, <w, Δ>, <Δ, Δ> with w = ``before`` and Δ = now - w.

        Angles from them are right to 1e-3 of themselves from 1e-6 rad on (to 1e-6 where rounding of the weights is no matter), radial parts
        to 1e-6 of the step, also when the norm changes many times over, although all passes over the weights are in their own precision,
        float32 at least: what is summed is the residual r = now - k w with the ratio of norms k, which is nearly orthogonal to w, and only
        the few numbers per vector are combined in float64.

        Args:
            before: w, the weights before the step.
            exact: whether <w, w> too is summed in float64, so that it can be set against another norm.

        Returns:
            ``(3, n)``, completed over the ranks that share vectors.
        """

        def kernel(dims: list[int]) -> Kernel:
            def sums(start: Tensor, now: Tensor) -> Tensor:
                dtype = _own_precision(start, now)
                start, now = start.to(dtype), now.to(dtype)
                norm = _norm(start.to(self.sum_dtype) if exact else start, dims)
                ratio = (_norm(now, dims) / norm).to(dtype).nan_to_num_(0.0, 0.0, 0.0)
                # One rounding where the machine multiplies and adds at once; where it does not, entries are off by 3e-8 of themselves.
                residual = torch.addcmul(now, start, ratio.neg())
                length = _norm(residual, dims)
                return torch.stack([norm, *(x.to(norm) for x in (ratio, length, _sum(residual.mul_(start), dims)))])

            return sums

        def finish(found: Tensor) -> Tensor:
            norm, ratio, length, along = found.to(self.sum_dtype)
            ww, growth = norm.square(), ratio - 1
            return torch.stack([ww, growth * ww + along, growth * (growth * ww + 2 * along) + length.square()])

        return self._reduction.sum_(self._of_both(4, before, kernel, finish))

    def radial_and_totals(self, before: Operand, *, summarize: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The part of the step since ``before`` that lies along ``before``: <w, w> and <w, Δ>, and `totals` in the same collective.

        The step is taken in the weights' own precision, float32 at least: right to 1e-7 of the step.

        Args:
            before: w, the weights before the step.
            summarize: from the sums ``(2, m)`` and the lengths ``(m,)`` of any m vectors to ``(J, m)`` values.

        Returns:
            ``(2, n)`` and ``(J, weights)``.
        """
        packed = self._of_both(2, before, _radial_kernel, self._radial_sums)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def _radial_sums(self, found: Tensor) -> Tensor:
        """<w, w> and <w, Δ> from what `_radial_kernel` finds."""
        norm, product = found.to(self.sum_dtype)
        return torch.stack([norm.square(), product])

    def _of_both(self, count: int, before: Operand, kernel: Callable[[list[int]], Kernel], finish: Finish) -> Tensor:
        """Collect what a kernel makes of the weights before and now."""
        values = self.values()

        def of_piece(i: int, piece: _IndexedPiece) -> _Found | None:
            then = before[i]
            if then is None:
                return None
            views = [piece.view(then), piece.view(values[i])]
            dims = piece.summed(views[0])
            return _sums(kernel(dims), finish, views, dims, self._entries)

        return self._collect(count, of_piece, finish)

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

        def square(found: Tensor) -> Tensor:
            return found.to(self.sum_dtype).square_()

        def of_piece(i: int, piece: _IndexedPiece) -> _Found:
            view = piece.view(values[i])
            dims, dtype = piece.summed(view), _own_precision(view)
            # A kernel that need not convert and sums short vectors has no use for the cache, and keeps its precision.
            if view.dtype == dtype and view.numel() <= piece.rows * CACHED_ENTRIES:
                return _Found(_norm(view, dims)[None].flatten(1), False)
            return _sums(lambda part: _norm(part.to(dtype), dims)[None], square, [view], dims, self._entries)

        return self._collect(1, of_piece, square)[0].sqrt_()

    def _collect(self, count: int, of_piece: Callable[[int, _IndexedPiece], _Found | None], finish: Finish) -> Tensor:
        """Pack what is found for each piece into ``(J, n)``.

        Args:
            count: how many rows kernels find, K.
            of_piece: what is found for a piece; None stands for zeros.
            finish: from ``(K, m)`` to ``(J, m)``, for what is not finished yet.
        """
        pieces = [(i, piece) for i, pieces in enumerate(self._pieces) for piece in pieces]
        found = [of_piece(i, piece) or _Found(torch.zeros(count, piece.rows, device=self.device), False) for i, piece in pieces]
        if self._in_order and found and not any(f.finished for f in found):
            return finish(torch.cat([f.sums.to(self.device) for f in found], 1))
        sums = [_finished(f, finish).to(self.device) for f in found]
        if self._in_order and sums:
            return torch.cat(sums, 1)
        size = sums[0].shape[0] if sums else finish(torch.zeros(count, 0, device=self.device)).shape[0]
        packed = torch.zeros(size, self.n + 1, dtype=self.sum_dtype, device=self.device)
        for (_, piece), part in zip(pieces, sums, strict=True):
            piece.add_to(packed, part)
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

    def add_scaled_(self, coefficient: Tensor, source: Operand, tensors: Operand | None = None) -> None:
        """Add ``coefficient * source`` to every vector, in place.

        Args:
            coefficient: ``(n,)``.
            source: what to add.
            tensors: what to add to instead of the weights (gradients); None entries are passed over, on either side.
        """
        coefficient = _with_dummy(coefficient, 0.0)
        for value, other, pieces in zip(self.values() if tensors is None else tensors, source, self._pieces, strict=True):
            if value is not None and other is not None:
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
            ss, sd = self._reduction.sum_(self._of_both(2, before, _radial_kernel, self._radial_sums))
            removed = _removed(ss, sd, share)
            self.add_scaled_(-_applied(removed, mask), before)
            return removed
        values, entries = self.values(), self._entries

        def of_piece(i: int, piece: _IndexedPiece) -> _Found | None:
            then = before[i]
            if then is None:
                return None
            now, start = piece.view(values[i]), piece.view(then)
            dims = piece.summed(now)
            kernel = _radial_kernel(dims)

            def project(start: Tensor, now: Tensor, share: Tensor, *mask: Tensor) -> Tensor:
                # Vectors together, as long as they stay in the cache from their sums to their change.
                if start.numel() <= entries:
                    norm, product = _radial(start, now, dims)
                    removed = _removed(norm.square_(), product, share)
                else:  # a single vector is longer than that
                    sums = _finished(_sums(kernel, self._radial_sums, [start, now], dims, entries), self._radial_sums)
                    removed = _removed(sums[0].reshape(share.shape), sums[1].reshape(share.shape), share).to(share.dtype)
                now.addcmul_(start, _applied(removed, *mask), value=-1)
                return removed[None]

            numbers = [piece.spread(v, now) for v in (share, mask) if v is not None]
            return _Found(_in_chunks(project, [start, now, *numbers], dims, entries, whole=True).flatten(1), False)

        return self._collect(1, of_piece, lambda found: found.to(self.sum_dtype))[0]

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
        if self._rounding is None:
            per_weight = torch.tensor([torch.finfo(t.dtype).eps for t in self.values()], dtype=torch.float32, device=self.device)
            self._rounding = self.spread(per_weight)
        full = self._rounding <= torch.finfo(torch.float32).eps
        matters = (owed - 1).abs() >= self._rounding
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
        dim = _outermost(first.shape, first)
        if dim not in summed or not whole:
            step = max(1, entries * first.shape[dim] // first.numel())
            chunks = zip(*(torch.split(v, step, dim) for v in views), strict=True)
            parts = [_in_chunks(kernel, chunk, summed, entries, whole=whole) for chunk in chunks]
            if dim not in summed:
                return torch.cat(parts, dim + 1)
            return torch.stack(parts).sum(0, dtype=_sum_dtype(first.device))
    return kernel(*views)


Finish = Callable[[Tensor], Tensor]


class _Found(NamedTuple):
    """What kernels found for the rows of a piece: ``(K, rows)``, or ``(J, rows)`` if already finished."""

    sums: Tensor
    finished: bool


def _sums(kernel: Kernel, finish: Finish, views: Sequence[Tensor], summed: Sequence[int], entries: int) -> _Found:
    """``kernel(*views)``, applied in chunks; finished only where rows are cut.

    Args:
        kernel: from views to ``(K, ...)``.
        finish: from ``(K, ...)`` to what may be added over the parts of a row, ``(J, ...)``.
        views: as for `_in_chunks`.
        summed: the dimensions that the kernel sums.
        entries: how many at a time.
    """
    cut = _cuts_rows(views[0], summed, entries)
    applied = (lambda *chunks: finish(kernel(*chunks))) if cut else kernel
    return _Found(_in_chunks(applied, views, summed, entries).flatten(1), cut)


def _finished(found: _Found, finish: Finish) -> Tensor:
    return found.sums if found.finished else finish(found.sums)


def _cuts_rows(view: Tensor, summed: Sequence[int], entries: int) -> bool:
    """Whether `_in_chunks` will cut this view within a row."""
    shape = list(view.shape)
    while prod(shape) > entries:
        dim = _outermost(shape, view)
        if dim in summed:
            return True
        shape[dim] = max(1, entries * shape[dim] // prod(shape))
    return False


def _outermost(shape: Sequence[int], view: Tensor) -> int:
    """The dimension whose steps in memory are longest: cut along it, a chunk lies in one place."""
    return max((d for d in range(view.ndim) if shape[d] > 1), key=view.stride)


def _radial(start: Tensor, now: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """The norm of w, and <w, Δ>, in the precision of the weights."""
    dtype = _own_precision(start)
    start = start.to(dtype)
    # First what reads both: two weights come into the cache faster together than one after the other.
    product = _sum((now.to(dtype) - start).mul_(start), dims)
    return _norm(start, dims), product


def _radial_kernel(dims: list[int]) -> Kernel:
    return lambda start, now: torch.stack(_radial(start, now, dims))


def _removed(ss: Tensor, sd: Tensor, share: Tensor) -> Tensor:
    return (sd / ss.clamp_(min=torch.finfo(ss.dtype).tiny)).add_(share)


def _applied(removed: Tensor, mask: Tensor | None = None) -> Tensor:
    taken = removed.nan_to_num(0.0, 0.0, 0.0)
    return taken if mask is None else taken * mask


def _sum_dtype(device: torch.device) -> torch.dtype:
    # Metal has no float64; everywhere else sums are exact enough for angles of 1e-6 rad.
    return torch.float32 if device.type == "mps" else torch.float64


def _own_precision(*views: Tensor) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in views) else torch.float32


def _product(x: Tensor, y: Tensor | None, dims: list[int]) -> Tensor:
    """<x, y>, or <1, x> if ``y`` is None."""
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
