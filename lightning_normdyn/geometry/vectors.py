"""The targeted weights as one index space of n weight vectors: packed sums out, per-vector factors
in.

Shapes: ``n`` vectors, ``weights`` weights. A vector is what the loss sees as one direction: a
filter in front of BatchNorm, the filters
of one channel group in front of GroupNorm, a whole matrix in front of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from itertools import repeat
from math import gcd, prod
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.pieces import Piece
from lightning_normdyn.geometry.placement import is_plain, place, place_all, version_of
from lightning_normdyn.geometry.reduction import Reduction


class _Ready(Protocol):
    """What `WeightVectors` asks of a step: `lightning_normdyn.optimizers.step.Step`."""

    @property
    def with_gradient(self) -> Set[int]:
        """Ids of the weights that had a gradient when the step was ready."""


class _Snapshots(Protocol):
    """What `WeightVectors` asks of a `lightning_normdyn.optimizers.bracket.StepBracket`."""

    def snapshot(self, weight: Tensor) -> Tensor | None:
        """The copy that was taken of ``weight`` in this step."""


Operand = Sequence["Tensor | None"]

CACHED_ENTRIES = 2**17
"""On a CPU, this many float32 entries per thread of two weights and their difference stay in the
cores' caches while sums are taken."""
KERNEL_ENTRIES = 2**22
"""Elsewhere one kernel per weight is best; very large weights are cut so that temporaries stay
small."""


class WeightVectors:
    """The targeted weights as one index space of ``n`` vectors.

    Every formula of the package is arithmetic on ``(n,)`` tensors; this class gathers them from the
    weights (packed sums, completed over
    the ranks that share vectors) and carries ``(n,)`` results back (scaling). It is the only place
    where a weight's shape, memory format,
    dtype or sharding is known.

    Args:
        weights: the parameters, in optimizer order.
        partitions: how each weight splits into vectors.
        names: what to call each weight in messages.
        read: for each weight, bool of its full shape: the entries that the loss reads, where a mask
            in the network hides the others. Only
            these enter sums and lengths; factors are applied to all. None, for one weight or for
            all: every entry.

    Attributes:
        n: number of vectors of which this rank holds an entry; all of them unless weights are
            sharded.
        slices: the range of each weight's vectors among these ``n``.
        weight_of: int64 ``(n,)``: the weight that each vector belongs to.
        length: float64 ``(n,)``: number of entries of each vector that the loss reads, over all
            ranks.
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

    def __init__(
        self,
        weights: Sequence[Tensor],
        partitions: Sequence[Partition],
        names: Sequence[str] | None = None,
        read: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.weights = list(weights)
        self.partitions = list(partitions)
        self.names = (
            list(names) if names is not None else [f"weight {i}" for i in range(len(self.weights))]
        )
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
        # Each vector in exactly one piece, in order: what is found piece by piece only needs to be
        # put one behind the other.
        self._in_order = starts[-1] == self.n and all(
            w is not None and w.start == at for w, at in zip(pieces, starts, strict=False)
        )
        self._rows = [piece.rows for pieces in self._pieces for piece in pieces]
        read = [None] * len(self.weights) if read is None else read
        lengths = [
            partition.lengths(placement.shape, entries).to(self.sum_dtype)
            for placement, partition, entries in zip(
                self._placements, self.partitions, read, strict=True
            )
        ]
        self._hidden = [
            None if entries is None else _hidden(weight, entries, name)
            for weight, entries, name in zip(self.weights, read, self.names, strict=True)
        ]
        self._masked = any(hidden is not None for hidden in self._hidden)
        self._reduction = Reduction(self._placements, lengths, self.device)
        self.weight_of = self._reduction.weight_of
        self.length = self._reduction.length
        self.count = torch.tensor(
            [p.n for p in self.partitions], dtype=self.sum_dtype, device=self.device
        )
        self._plain = all(map(is_plain, self.weights))
        self._rounding: Tensor | None = None  # of each vector's weight
        self._precision = _own_precision(*self.values())
        self.low_precision = any(t.dtype in (torch.bfloat16, torch.float16) for t in self.values())
        """Whether some weight is stored in a dtype in which a factor close to 1 is lost to
        rounding."""

    @property
    def _entries(self) -> int:
        """How many entries of a weight a kernel takes at a time."""
        # Every thread takes its part of each kernel; below 2**15 entries a kernel has only one.
        return (
            CACHED_ENTRIES * torch.get_num_threads()
            if self.device.type == "cpu"
            else KERNEL_ENTRIES
        )

    @property
    def cut(self) -> bool:
        """Whether some vector lies on several ranks in pieces; the same on every rank that shares
        these weights."""
        return self._reduction.cuts

    @property
    def _one_pass(self) -> bool:
        """Whether sums and the change that they lead to are best taken piece by piece: where a
        piece holds whole vectors and stays in a
        CPU's cache. Elsewhere two passes cost no more memory traffic, and what lies between them is
        done once for all vectors.
        """
        return self.device.type == "cpu" and self._whole and not self._masked

    @property
    def _whole(self) -> bool:
        """Whether each vector lies whole in one piece, in order: what is found for a piece is
        final."""
        return self._in_order and not self._reduction.cuts

    # -- operands: one local tensor (or None) per weight
    # ---------------------------------------------------------------

    def local(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's plain storage of tensors laid out like the weights (gradients, state),
        without autograd history."""
        return [
            None if t is None else p.storage(t.detach())
            for t, p in zip(tensors, self._placements, strict=True)
        ]

    def values(self) -> list[Tensor]:
        """The weights themselves; writing to them writes to the weights."""
        return [p.value(w) for w, p in zip(self.weights, self._placements, strict=True)]

    def storages(self) -> dict[Tensor, Tensor]:
        """Each weight's plain storage on this rank, as `StepBracket.request_snapshot` wants
        them."""
        return {w: v for w, v in zip(self.weights, self.values(), strict=True) if v is not None}

    def gradients(self) -> list[Tensor | None]:
        """The gradients as the optimizer receives them; None where a weight has none."""
        return [p.gradient(w) for w, p in zip(self.weights, self._placements, strict=True)]

    def has_gradient(self, step: _Ready) -> tuple[bool, ...]:
        """For each weight whether it had a gradient when ``step`` was ready; true also where this
        rank holds none of its entries, since
        other ranks decide."""
        return tuple(
            not p.pieces or id(w) in step.with_gradient
            for w, p in zip(self.weights, self._placements, strict=True)
        )

    def versions(self) -> list[int]:
        """For each weight how often its numbers were written to:
        `lightning_normdyn.geometry.placement.version_of`."""
        if self._plain:
            return [w._version for w in self.weights]
        return [version_of(w) for w in self.weights]

    def snapshots(self, bracket: _Snapshots) -> list[Tensor | None]:
        """The copies that ``bracket`` took of these weights in this step."""
        return [bracket.snapshot(w) for w in self.weights]

    # -- sums over vectors
    # ---------------------------------------------------------------------------------------------

    def inner(
        self,
        *pairs: tuple[Operand, Operand | None],
        exact: bool = True,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        """Inner products of every vector, packed, completed over the ranks that share vectors in
        one collective.

        Args:
            pairs: ``(a, b)`` for <a, b>, ``(a, None)`` for <1, a>. A weight whose operand is None
                contributes zeros.
            exact: whether products are taken in float64; otherwise in the operands' own precision,
                float32 at least, which is twice as
                fast and errs by 1e-7 of the product of the two lengths. Enough for norms and
                cosines, not for differences of sums.
            copy: one of the operands, and where to copy it on the way: cheaper than a pass of its
                own. None entries are passed over.

        Returns:
            ``(len(pairs), n)``, float64.
        """
        return self._reduction.sum_(self._products(pairs, exact, copy))

    def inner_and_totals(
        self,
        *pairs: tuple[Operand, Operand | None],
        summarize: Callable[[Tensor, Tensor], Tensor],
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`inner`, and in the same collective `totals` of what ``summarize`` makes of the inner
        products.

        Args:
            pairs: as for `inner`.
            summarize: from the inner products ``(len(pairs), m)`` and the lengths ``(m,)`` of any m
                vectors to ``(J, m)`` values.
            exact: as for `inner`.

        Returns:
            ``(len(pairs), n)`` and ``(J, weights)``.
        """
        packed = self._products(pairs, exact)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def partial_inner(self, *pairs: tuple[Operand, Operand | None], exact: bool = True) -> Tensor:
        """This rank's part of `inner`, without any communication: `complete_with_totals` completes
        it, later if need be."""
        return self._products(pairs, exact)

    def complete_with_totals(
        self, packed: Tensor, summarize: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Complete what `partial_inner` gave, in place, and return `totals` of what ``summarize``
        makes of it, as `inner_and_totals`."""
        return self._reduction.sum_with_totals_(packed, summarize)

    def mean_over_copies(self, totals: Tensor) -> Tensor:
        """Make ``(..., weights)`` totals equal on all ranks where each rank worked them out for
        itself.

        Where every rank holds all vectors, `totals` communicates nothing, and ranks could come to
        different conclusions if a person's code
        changed the numbers on one of them. One collective with more than one rank, nothing with
        one.
        """
        return self._reduction.mean_over_copies(totals)

    @property
    def through_masters(self) -> bool:
        """Whether an optimizer updates other tensors in place of the weights (DeepSpeed), which get
        their gradients late."""
        return any(p.master is not None for p in self._placements)

    def _products(
        self,
        pairs: Sequence[tuple[Operand, Operand | None]],
        exact: bool,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        if copy is not None and self._masked:  # what is summed then is not what is to be copied
            pairs_to_copy = [
                (x, y) for x, y in zip(*copy, strict=True) if x is not None and y is not None
            ]
            for original, destination in pairs_to_copy:
                destination.copy_(original)
            copy = None
        operands: list[Operand] = []  # each once, however many products it enters

        def position(operand: Operand) -> int:
            known = (
                k
                for k, o in enumerate(operands)
                if o is operand or all(x is y for x, y in zip(o, operand, strict=True))
            )
            found = next(known, len(operands))
            if found == len(operands):
                operands.append(operand)
            return found

        factors = [
            (row, position(a), None if b is None else position(b))
            for row, (a, b) in enumerate(pairs)
        ]
        squares = [row for row, x, y in factors if x == y]
        # A product of two weights first: two of them come into the cache faster together than one
        # after the other.
        factors.sort(key=lambda factor: factor[1] == factor[2])
        source, known = (
            (None, len(operands)) if copy is None else (position(copy[0]), len(operands))
        )
        if copy is not None:
            operands.append(copy[1])

        def kernel(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor | None]) -> None:
            if (
                source is not None
                and (x := views[source]) is not None
                and (y := views[-1]) is not None
            ):
                y.copy_(x)
            values = [
                None if v is None else v.to(self.sum_dtype) if exact else _widened(v)
                for v in views[:known]
            ]
            for row, left, right in factors:
                x, y = values[left], None if right is None else values[right]
                if x is None or (right is not None and y is None):
                    outs[row].zero_()
                elif left == right:
                    _norm(x, dims, outs[row])
                else:
                    _sum(x if y is None else x * y, dims, outs[row])

        def finish(found: Tensor) -> Tensor:
            found = found.to(self.sum_dtype)
            for row in squares:
                found[row].square_()
            return found

        return self._collect(kernel, operands, finish, len(pairs), exact=exact)

    def moments(self, tensors: Operand) -> tuple[Tensor, Tensor]:
        """Sums of squares and sums of the entries of every vector, for standard deviations.

        Summed around a first estimate of the mean, in the tensors' own precision, float32 at least:
        a standard deviation from the two is
        right to 1e-6 even where the mean is a thousand times as large.

        Args:
            tensors: laid out like the weights; None contributes zeros.

        Returns:
            <w, w> and <1, w>, each ``(n,)`` float64.
        """

        def kernel(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]) -> None:
            mean, length, left, members = outs
            x = _widened(views[0])
            count = prod(x.shape[d] for d in dims)
            first = _sum(x, dims) / count
            rest = x - first
            mean.copy_(first)
            _norm(rest, dims, length)
            _sum(rest, dims, left)
            members.fill_(count)

        def finish(found: Tensor) -> Tensor:
            mean, rest, left, members = found.to(self.sum_dtype)
            return torch.stack(
                [rest.square() + mean * (2 * left + members * mean), left + members * mean]
            )

        ww, w1 = self._reduction.sum_(self._collect(kernel, [tensors], finish, 4, 2))
        return ww, w1

    def displacement(
        self, before: Operand, *, exact: bool = False, norms: Tensor | None = None
    ) -> Tensor:
        """Sums that tell how the weights moved since ``before``: <w, w>, <w, Δ>, <Δ, Δ> with w =
        ``before`` and Δ = now - w.

        Angles from them are right to 1e-3 of themselves from 1e-6 rad on (to 1e-6 where rounding of
        the weights is no matter), radial parts
        to 1e-6 of the step, also when the norm changes many times over, although all passes over
        the weights are in their own precision,
        float32 at least: what is summed is the residual r = now - k w with the ratio of norms k,
        which is nearly orthogonal to w, and only
        the few numbers per vector are combined in float64.

        Args:
            before: w, the weights before the step.
            exact: whether <w, w> too is summed in float64, so that it can be set against another
                norm.
            norms: ``(n,)``, the norms of ``before`` as `inner` gave them, if they are known; a pass
                over it is saved where vectors are
                whole. Not with ``exact``.

        Returns:
            ``(3, n)``, completed over the ranks that share vectors.
        """

        def kernel(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]) -> None:
            norm, ratio, length, along = outs
            start, now = map(_widened, views[:2])
            if len(views) > 2:
                norm.copy_(views[2])
                factor = _norm(now, dims, ratio).mul_(views[3])
            else:
                _norm(start.to(self.sum_dtype) if exact else start, dims, norm)
                factor = _norm(now, dims, ratio).div_(norm).nan_to_num_(0.0, 0.0, 0.0)
            if ratio.dtype != now.dtype:
                factor = factor.to(now.dtype)
                ratio.copy_(factor)  # the one that is used
            # One rounding where the machine multiplies and adds at once; where it does not, entries
            # are off by 3e-8 of themselves.
            residual = torch.addcmul(now, start, factor, value=-1)
            _norm(residual, dims, length)
            _sum(residual.mul_(start), dims, along)

        def finish(found: Tensor) -> Tensor:
            norm, ratio, length, along = found.to(self.sum_dtype)
            ww, growth = norm.square(), ratio - 1
            return torch.stack(
                [ww, growth * ww + along, growth * (growth * ww + 2 * along) + length.square()]
            )

        numbers = []
        if norms is not None and self._whole:
            numbers = self._numbers(norms, norms.reciprocal().nan_to_num_(0.0, 0.0, 0.0))
        return self._reduction.sum_(
            self._collect(kernel, self._and_now(before), finish, 4, 3, numbers=numbers, exact=exact)
        )

    def radial_and_totals(
        self, before: Operand, *, summarize: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The part of the step since ``before`` that lies along ``before``: <w, w> and <w, Δ>, and
        `totals` in the same collective.

        The step is taken in the weights' own precision, float32 at least: right to 1e-7 of the
        step.

        Args:
            before: w, the weights before the step.
            summarize: from the sums ``(2, m)`` and the lengths ``(m,)`` of any m vectors to ``(J,
                m)`` values.

        Returns:
            ``(2, n)`` and ``(J, weights)``.
        """
        packed = self._collect(_radial_kernel, self._and_now(before), self._radial_sums, 2)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def _radial_sums(self, found: Tensor) -> Tensor:
        """<w, w> and <w, Δ> from what `_radial_kernel` finds."""
        norm, product = found.to(self.sum_dtype)
        return torch.stack([norm.square(), product])

    def _and_now(self, before: Operand) -> list[Operand]:
        return [
            before,
            [
                None if then is None else now
                for then, now in zip(before, self.values(), strict=True)
            ],
        ]

    def norms(self) -> Tensor:
        """Norm of every vector, ``(n,)``, summed in the weights' own precision, float32 at least.

        One pass of the fastest kernel: right to float32 rounding, which is all that a factor or a
        division needs. Where a difference of
        norms or an angle is wanted, use `inner`.
        """
        norms = self._local_norms()
        if self._whole:
            return norms
        return self._reduction.sum_(norms.square_()).sqrt_()

    def _local_norms(self) -> Tensor:
        """Norms of what this rank holds of every vector."""

        def kernel(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]) -> None:
            _norm(_widened(views[0]), dims, outs[0])

        def square(found: Tensor) -> Tensor:
            return found.to(self.sum_dtype).square_()

        return self._collect(kernel, [self.values()], square, 1, streaming=True)[0].sqrt_()

    def _collect(
        self,
        kernel: Kernel,
        operands: Sequence[Operand],
        finish: Finish,
        count: int,
        results: int | None = None,
        *,
        numbers: Sequence[Tensor] = (),
        exact: bool = False,
        streaming: bool = False,
        whole: bool = False,
    ) -> Tensor:
        """Pack what a kernel finds for each piece into ``(results, n)``.

        Args:
            kernel: see `Kernel`.
            operands: what it reads; a weight for which all of them are None contributes zeros.
            finish: from ``(K, ...)`` to what may be added over the parts of a vector, ``(J, ...)``.
            count: how many numbers the kernel writes per vector, K.
            results: how many ``finish`` makes of them, J; None: as many.
            numbers: ``(n,)``, given to the kernel behind the operands, but not where rows are cut;
                only if each vector lies in one piece.
            exact: whether what it writes is kept in float64.
            streaming: whether the kernel reads everything once, so that the cache is of no use
                unless sums are long or dtypes converted.
            whole: never cut a row.
        """
        entries, results = self._entries, results or count
        dtype = self.sum_dtype if exact else self._precision
        packed = (
            torch.empty(count, self.n, dtype=dtype, device=self.device) if self._in_order else None
        )
        places = repeat(None) if packed is None else iter(packed.split_with_sizes(self._rows, 1))
        given = [v.split_with_sizes(self._rows) for v in numbers]
        apart: list[tuple[_IndexedPiece, Tensor]] = []  # what is finished already
        position = -1
        for i, pieces in enumerate(self._pieces):
            for piece in pieces:
                position, place = position + 1, next(places)
                views = [None if o[i] is None else piece.view(o[i]) for o in operands]  # type: ignore[arg-type]
                hidden = self._hidden[i]
                if hidden is not None:
                    mask = piece.view(hidden)
                    views = [None if view is None else view.masked_fill(mask, 0) for view in views]
                first = next((v for v in views if v is not None), None)
                if first is None:
                    if place is not None:
                        place.zero_()
                    continue
                dims, form = piece.summed(first), piece.form(first)
                # A kernel that need not convert and sums short vectors has no use for the cache,
                # and keeps its precision.
                at_once = (
                    streaming
                    and first.dtype == dtype
                    and first.numel() <= piece.rows * CACHED_ENTRIES
                )
                limit = first.numel() if at_once else entries
                if not whole and _cuts_rows(first, dims, limit):
                    sums = torch.zeros(results, *form, dtype=self.sum_dtype, device=first.device)
                    _in_chunks(
                        _summing(kernel, count, finish, dtype), sums.unbind(), views, dims, limit
                    )
                    apart.append((piece, sums.flatten(1)))
                    continue
                views += [piece.spread(v[position], first) for v in given]
                if place is not None and place.device == first.device:
                    _in_chunks(
                        kernel, place.view(count, *form).unbind(), views, dims, limit, whole=whole
                    )
                else:
                    own = torch.empty(count, *form, dtype=dtype, device=first.device)
                    _in_chunks(kernel, own.unbind(), views, dims, limit, whole=whole)
                    if place is None:
                        apart.append((piece, finish(own.flatten(1))))
                    else:
                        place.copy_(own.flatten(1))
        if packed is not None:
            packed = finish(packed)
            for piece, sums in apart:
                packed[:, piece.where] = sums.to(packed)
            return packed
        packed = torch.zeros(results, self.n + 1, dtype=self.sum_dtype, device=self.device)
        for piece, sums in apart:
            piece.add_to(packed, sums.to(packed))
        return packed[:, : self.n]

    def per_weight(self, values: Tensor) -> Tensor:
        """Sum ``(..., n)`` values over the vectors of each weight that this rank holds: ``(...,
        weights)``."""
        return self._reduction.per_weight(values)

    def totals(self, values: Tensor) -> Tensor:
        """`per_weight`, completed over all ranks, every vector counted once: ``(..., n)`` to
        ``(..., weights)``.

        One collective, or none where every rank holds all vectors. Every rank must call it.
        """
        return self._reduction.totals(values)

    def counts(self, bins: Tensor, size: int) -> Tensor:
        """How many vectors of each weight lie in each bin, over all ranks, every vector counted
        once.

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

    # -- all vectors of all ranks: for checkpoints and for what lies behind the weights
    # ------------------------------------

    def gather(self, values: Tensor) -> list[Tensor]:
        """From ``(..., n)`` values of the vectors held here to those of all vectors, for each
        weight ``(..., vectors of the weight)``.

        One collective, or none where every rank holds all vectors. Every rank must call it.
        """
        return self._reduction.gather(values)

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """The inverse of `gather`, on any number of ranks, without communication."""
        return self._reduction.scatter(values)

    def scatter_one(self, weight: int, values: Tensor) -> Tensor:
        """`scatter` for the weight at position ``weight`` alone."""
        return values.to(self.device)[..., self._placements[weight].held.to(self.device)]

    # -- writing
    # -------------------------------------------------------------------------------------------------------

    def scale_(self, factor: Tensor, tensors: Operand | None = None) -> None:
        """Multiply every vector by its factor, in place.

        Args:
            factor: ``(n,)``.
            tensors: what to scale instead of the weights (gradients, state buffers); None entries
                are passed over.
        """
        factors = self._by_piece(factor, 1.0)
        for tensor, pieces in zip(
            self.values() if tensors is None else tensors, self._pieces, strict=True
        ):
            for piece in pieces:
                mine = next(factors)
                if tensor is not None:
                    view = piece.view(tensor)
                    view.mul_(piece.spread(mine, view))

    def add_scaled_(
        self, coefficient: Tensor, source: Operand, tensors: Operand | None = None
    ) -> None:
        """Add ``coefficient * source`` to every vector, in place.

        Args:
            coefficient: ``(n,)``.
            source: what to add.
            tensors: what to add to instead of the weights (gradients); None entries are passed
                over, on either side.
        """
        coefficients = self._by_piece(coefficient, 0.0)
        for value, other, pieces in zip(
            self.values() if tensors is None else tensors, source, self._pieces, strict=True
        ):
            for piece in pieces:
                mine = next(coefficients)
                if value is not None and other is not None:
                    view = piece.view(value)
                    view.addcmul_(piece.view(other), piece.spread(mine, view))

    def _by_piece(self, values: Tensor, dummy: float) -> Iterator[Tensor]:
        """From ``(n,)`` the values of each piece's rows, ``dummy`` for rows that belong to no
        vector."""
        values = values.to(self._precision)  # once, not for every piece
        if self._in_order:
            return iter(values.split_with_sizes(self._rows))
        extended = torch.cat([values, values.new_full((1,), dummy)])
        return (piece.rows_of(extended) for pieces in self._pieces for piece in pieces)

    def remove_radial_(
        self, before: Operand, share: Tensor, active: Tensor | None = None
    ) -> Tensor:
        """Take the part along ``before`` out of the step since then, and a share of ``before`` with
        it, in place.

        With s = ``before``, w now: ``w <- w - (<s, w - s> / <s, s> + share) s``. The step is taken
        as in `radial_and_totals`; a vector for
        which this is not finite is left alone. One collective where vectors lie on several ranks,
        none otherwise.

        Args:
            before: s, the weights before the step.
            share: ``(n,)``, e.g. the part that decay takes away.
            active: bool ``(n,)``, vectors to be changed; None: all.

        Returns:
            ``(n,)``: by how much of ``before`` each vector was changed or would have been.
        """
        operands = self._and_now(before)
        if self._one_pass:
            return self._remove_in_one_pass_(_radial_kernel, operands, [], share, active)[0]
        ss, sd = self._reduction.sum_(self._collect(_radial_kernel, operands, self._radial_sums, 2))
        removed = _removed(ss, sd, share)
        self.add_scaled_(-_applied(removed, *self._numbers(active)), before)
        return removed

    def remove_radial_of_(
        self, direction: Operand, length: Tensor, share: Tensor, active: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`remove_radial_` where the step is known, so that no copy of the weights is needed: w - s
        = ``length * direction``.

        s is told from the sum of itself and the step, so what is removed is wrong by the rounding
        of the weights' dtype times the length of
        the step over that of s.

        Args:
            direction: laid out like the weights; None entries are passed over.
            length: ``(n,)``.
            share: as for `remove_radial_`.
            active: as for `remove_radial_`.

        Returns:
            What `remove_radial_` returns, and ``(n,)``: how many times longer than s the step was.
        """
        operands = _, now = self._and_now(direction)
        if self._one_pass:
            removed, ratio = self._remove_in_one_pass_(
                _radial_kernel_of_step, operands, [length], share, active
            )
            return removed, ratio
        # Exactly: <s, s> is a small difference of large sums where the step is longer than s.
        ww, wd, dd = self.inner((now, now), (now, direction), (direction, direction))
        ss = (ww - 2 * length * wd + length.square() * dd).clamp_(min=torch.finfo(ww.dtype).tiny)
        ratio = length.abs() * (dd / ss).sqrt()
        removed = _removed(ss, length * (wd - length * dd), share)
        applied = _applied(removed, *self._numbers(active))
        self.add_scaled_(-applied, now, now)
        self.add_scaled_(applied * length, direction)
        return removed, ratio

    def _remove_in_one_pass_(
        self,
        kernel: Kernel,
        operands: list[Operand],
        lengths: list[Tensor],
        share: Tensor,
        active: Tensor | None,
    ) -> Tensor:
        """`remove_radial_`, or with ``lengths`` `remove_radial_of_`; ``kernel`` sums what tells the
        step and hands back s.

        Returns:
            ``(1, n)``, or ``(2, n)`` with ``lengths``.
        """
        entries, told = self._entries, len(operands) + len(lengths)

        def project(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]) -> None:
            # Vectors together, as long as they stay in the cache from their sums to their change.
            (other, now), (share, *mask) = views[:2], views[told:]
            if now.numel() <= entries:
                square, product = sums = share.new_empty(2, *share.shape).unbind()
                start = kernel(dims, sums, views[:told])
                square.square_()
            else:  # a single vector is longer than that
                sums = share.new_zeros(2, *share.shape, dtype=self.sum_dtype).unbind()
                _in_chunks(
                    _summing(kernel, 2, self._radial_sums, share.dtype),
                    sums,
                    views[:told],
                    dims,
                    entries,
                )
                (square, product), start = (x.to(share) for x in sums), None if lengths else other
            removed = outs[0].copy_(_removed(square, product, share))
            if lengths:
                _norm(_widened(other), dims, outs[1]).mul_(views[2].abs()).div_(square.sqrt())
            applied = _applied(removed.to(share), *mask)
            if start is None:  # as long as the vector itself
                now.addcmul_(now, applied, value=-1).addcmul_(other, applied * views[2])
            else:
                now.addcmul_(start, applied, value=-1)

        numbers = self._numbers(*lengths, share, active)
        count = 2 if lengths else 1
        return self._collect(
            project,
            operands,
            lambda found: found.to(self.sum_dtype),
            count,
            numbers=numbers,
            whole=True,
        )

    def _numbers(self, *numbers: Tensor | None) -> list[Tensor]:
        """Those that are given, in the precision of the weights."""
        return [v.to(self._precision) for v in numbers if v is not None]

    def scale_rounded_(self, factor: Tensor, owed: Tensor) -> Tensor:
        """Multiply weights stored in bfloat16 or float16 by factors that rounding would swallow.

        A factor too close to 1 to survive rounding is kept in ``owed`` until it matters; what is
        then written is measured, so that
        rounding leaves no bias. Each rank does so for its own piece of a vector, without
        communication.

        Args:
            factor: ``(n,)``: this step's factor.
            owed: ``(n,)``: the product of factors not yet applied.

        Returns:
            The new ``owed``.
        """
        owed = owed * factor.to(owed.dtype)
        if self._rounding is None:
            per_weight = torch.tensor(
                [torch.finfo(t.dtype).eps for t in self.values()],
                dtype=torch.float32,
                device=self.device,
            )
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
    """A piece with its rows mapped into the common index space; index ``n`` is a dummy for rows
    that belong to no vector.

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
        in_order = start + self.rows <= n and torch.equal(
            self._index, torch.arange(start, start + self.rows, dtype=torch.long, device="cpu")
        )
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

    def form(self, view: Tensor) -> list[int]:
        """The shape of one number per row, such that it broadcasts over a view."""
        return [size if d in self._keep else 1 for d, size in enumerate(view.shape)]

    def summed(self, view: Tensor) -> list[int]:
        """The dimensions of a view within which a row lies."""
        return [d for d in range(view.ndim) if d not in self._keep]

    def add_to(self, packed: Tensor, sums: Tensor) -> None:
        """Add ``(count, rows)`` to ``(count, n + 1)``."""
        if self.where is not None:
            packed[:, self.where] += sums
        else:
            packed.index_add_(1, self._index_on(packed.device), sums)

    def rows_of(self, values: Tensor) -> Tensor:
        """From ``(n + 1,)`` values of vectors those of the rows."""
        return (
            values[self.where] if self.where is not None else values[self._index_on(values.device)]
        )

    def spread(self, rows: Tensor, view: Tensor) -> Tensor:
        """One value per row, shaped to broadcast over ``view``, in a dtype that loses nothing that
        ``view`` could keep."""
        return rows.to(view.device, _own_precision(view)).view(self.form(view))


def _merge_rows(
    labels: Tensor, keep: Sequence[int]
) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """Take neighbouring entries with the same label together, so that groups, layers and transposed
    filters are rows as well.

    Returns:
        The labels of the merged rows, the dimensions that are kept, and which dimensions to
        unflatten first: ``(dim, size of the inner
        one)``, one after the other.
    """
    keep, blocks = list(keep), []
    for axis in reversed(range(labels.ndim)) if labels.numel() else ():
        size = labels.shape[axis]
        rows = labels.movedim(axis, 0).reshape(size, -1)
        changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
        block = gcd(size, *changes.tolist())
        labels = labels.index_select(
            axis, torch.arange(0, size, block, dtype=torch.long, device="cpu")
        )
        if block == size:
            labels = labels.squeeze(axis)
            del keep[axis]
        elif block > 1:
            blocks.append((keep[axis], block))
            keep = [k + (k > keep[axis]) for k in keep]
    return labels, keep, blocks


# -- sums of views: every kernel goes from views of one shape to (K, ...), of size 1 where rows were
# summed -------------------

Kernel = Callable[[list[int], Sequence[Tensor], Sequence[Any]], Any]
"""``kernel(summed, outs, views)`` sums views over some dimensions and writes what it finds to outs,
which are of size 1 in those."""
Finish = Callable[[Tensor], Tensor]


def _in_chunks(
    kernel: Kernel,
    outs: Sequence[Tensor],
    views: Sequence[Tensor | None],
    summed: list[int],
    entries: int,
    *,
    whole: bool = False,
) -> None:
    """``kernel(summed, outs, views)``, applied to so few entries at a time that they stay in the
    cache between its operations.

    Args:
        kernel: see `Kernel`.
        outs: of size 1 in the summed dimensions.
        views: of one shape, or of size 1 in the summed dimensions; one of the first kind must come
            before all others.
        summed: the dimensions that the kernel sums.
        entries: how many at a time.
        whole: never cut a row.
    """
    first = next(v for v in views if v is not None)
    size = first.numel()
    if size > entries:
        dim = _outermost(first.shape, first)
        if dim not in summed or not whole:
            step, count = max(1, entries * first.shape[dim] // size), len(outs)
            fits = size // first.shape[dim] * step <= entries
            parts = [
                repeat(t) if t is None or t.shape[dim] == 1 else t.unsafe_split(step, dim)
                for t in (*outs, *views)
            ]
            for chunk in zip(*parts, strict=False):
                if fits:
                    kernel(summed, chunk[:count], chunk[count:])
                else:
                    _in_chunks(kernel, chunk[:count], chunk[count:], summed, entries, whole=whole)
            return
    kernel(summed, outs, views)


def _summing(kernel: Kernel, count: int, finish: Finish, dtype: torch.dtype) -> Kernel:
    """A kernel that adds to its outs what ``kernel`` finds, finished: for rows that are cut."""

    def summing(summed: list[int], outs: Sequence[Tensor], views: Sequence[Any]) -> None:
        found = torch.empty(count, *outs[0].shape, dtype=dtype, device=outs[0].device)
        kernel(summed, found.unbind(), views)
        for out, part in zip(outs, finish(found), strict=True):
            out += part

    return summing


def _cuts_rows(view: Tensor, summed: Sequence[int], entries: int) -> bool:
    """Whether `_in_chunks` will cut this view within a row."""
    if view.numel() <= entries:
        return False
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


def _radial_kernel(dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """The norm of w, and <w, Δ>, in the precision of the weights; hands back w."""
    start, now = map(_widened, views)
    # First what reads both: two weights come into the cache faster together than one after the
    # other.
    _sum((now - start).mul_(start), dims, outs[1])
    _norm(start, dims, outs[0])
    return start


def _radial_kernel_of_step(
    dims: list[int], outs: Sequence[Tensor], views: Sequence[Tensor]
) -> Tensor:
    """`_radial_kernel` where the step is a number times a direction."""
    step, now, length = views
    start = torch.addcmul(now, step, length, value=-1)
    _sum(start * step, dims, outs[1]).mul_(length)
    _norm(start, dims, outs[0])
    return start


def _removed(ss: Tensor, sd: Tensor, share: Tensor) -> Tensor:
    return torch.addcdiv(share, sd, ss.clamp_(min=torch.finfo(ss.dtype).tiny))


def _applied(removed: Tensor, mask: Tensor | None = None) -> Tensor:
    taken = removed.nan_to_num(0.0, 0.0, 0.0)
    return taken if mask is None else taken * mask


def _sum_dtype(device: torch.device) -> torch.dtype:
    # Metal has no float64; everywhere else sums are exact enough for angles of 1e-6 rad.
    return torch.float32 if device.type == "mps" else torch.float64


def _own_precision(*views: Tensor) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in views) else torch.float32


def _widened(x: Tensor) -> Tensor:
    """In its own precision, float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def _sum(x: Tensor, dims: list[int], out: Tensor | None = None) -> Tensor:
    if dims and out is not None and out.dtype == x.dtype:
        return torch.sum(x, dims, keepdim=True, out=out)
    found = x.sum(dims, keepdim=True) if dims else x
    return found if out is None else out.copy_(found)


def _norm(x: Tensor, dims: list[int], out: Tensor | None = None) -> Tensor:
    if dims and out is not None and out.dtype == x.dtype:
        torch.linalg.vector_norm(x, dim=dims, keepdim=True, out=out)
        return out
    found: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True) if dims else x.abs()
    return found if out is None else out.copy_(found)


def _hidden(weight: Tensor, read: Tensor, name: str) -> Tensor:
    """Which entries of this rank's storage the loss does not read: bool, laid out like the
    storage."""
    labels = torch.where(read, 0, -1)
    placement = place(weight, Partition(tuple(range(read.ndim)), labels, "layer"), name)
    storage = placement.value(weight)
    hidden = torch.zeros_like(storage, dtype=torch.bool)
    for piece in placement.pieces:
        view = piece.select(hidden)
        view.copy_((piece.labels < 0).reshape(view.shape).to(hidden.device))
    return hidden
