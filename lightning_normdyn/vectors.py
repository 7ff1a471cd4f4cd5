"""The targeted weights as one index space of n weight vectors: packed sums out, per-vector factors in.

Shapes: ``n`` vectors, ``weights`` weights. A vector is what the loss sees as one direction: a filter in front of BatchNorm, the filters
of one channel group in front of GroupNorm, a whole matrix in front of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
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
        # Metal has no float64; everywhere else sums are exact enough for angles of 1e-6 rad.
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64
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

    def inner(self, *pairs: tuple[Operand, Operand | None]) -> Tensor:
        """Inner products of every vector, packed, completed over the ranks that share vectors in one collective.

        Args:
            pairs: ``(a, b)`` for <a, b>, ``(a, None)`` for <1, a>. A weight whose operand is None contributes zeros.

        Returns:
            ``(len(pairs), n)``, accumulated in float64.
        """
        return self._reduction.sum_(self._local_inner(pairs))

    def inner_and_totals(
        self, *pairs: tuple[Operand, Operand | None], summarize: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`inner`, and in the same collective `totals` of what ``summarize`` makes of the inner products.

        Args:
            pairs: as for `inner`.
            summarize: from the inner products ``(len(pairs), m)`` and the lengths ``(m,)`` of any m vectors to ``(J, m)`` values.

        Returns:
            ``(len(pairs), n)`` and ``(J, weights)``.
        """
        packed = self._local_inner(pairs)
        totals = self._reduction.sum_with_totals_(packed, summarize)
        return packed, totals

    def _local_inner(self, pairs: Sequence[tuple[Operand, Operand | None]]) -> Tensor:
        packed = torch.zeros(len(pairs), self.n + 1, dtype=self.sum_dtype, device=self.device)
        for i, pieces in enumerate(self._pieces):
            for piece in pieces:
                wide: dict[int, Tensor] = {}  # each operand is widened once, however many products it enters
                for row, (a, b) in enumerate(pairs):
                    x, y = a[i], None if b is None else b[i]
                    if x is None or (b is not None and y is None):
                        continue
                    first = self._widen(piece, x, wide)
                    if b is None:
                        sums = piece.sum(first)
                    elif y is x:
                        sums = piece.norm(first).square_()
                    else:
                        assert y is not None
                        sums = piece.sum(first * self._widen(piece, y, wide))
                    piece.add_to(packed[row], sums)
        return packed[:, : self.n]

    def _widen(self, piece: _IndexedPiece, tensor: Tensor, wide: dict[int, Tensor]) -> Tensor:
        key = id(tensor)
        if key not in wide:
            wide[key] = piece.select(tensor).to(self.sum_dtype)
        return wide[key]

    def displacement(self, before: Operand) -> Tensor:
        """Sums that tell how the weights moved since ``before``: <w, w>, <w, Δ>, <Δ, Δ> with w = ``before`` and Δ = now - w.

        The difference is taken in float64: taken in the weights' own precision it would cost angles below 1e-5 rad whenever the norm
        changes as well.

        Returns:
            ``(3, n)``, completed over the ranks that share vectors.
        """
        packed = torch.zeros(3, self.n + 1, dtype=self.sum_dtype, device=self.device)
        for then, now, pieces in zip(before, self.values(), self._pieces, strict=True):
            if then is None or now is None:
                continue
            for piece in pieces:
                start = piece.select(then).to(self.sum_dtype)
                moved = piece.select(now).to(self.sum_dtype) - start
                piece.add_to(packed[0], piece.norm(start).square_())
                piece.add_to(packed[1], piece.sum(start * moved))
                piece.add_to(packed[2], piece.norm(moved).square_())
        return self._reduction.sum_(packed[:, : self.n])

    def norms(self) -> Tensor:
        """Norm of every vector, ``(n,)``, summed in the weights' own precision, float32 at least.

        One pass of the fastest kernel: right to float32 rounding, which is all that a factor or a division needs. Where a difference of
        norms or an angle is wanted, use `inner`.
        """
        return self._reduction.sum_(self._local_squares()).sqrt_()

    def _local_squares(self) -> Tensor:
        packed = torch.zeros(self.n + 1, dtype=self.sum_dtype, device=self.device)
        for tensor, pieces in zip(self.values(), self._pieces, strict=True):
            for piece in pieces:
                assert tensor is not None
                view = piece.select(tensor)
                dtype = view.dtype if view.dtype in (torch.float32, torch.float64) else torch.float32
                piece.add_to(packed, piece.norm(view, dtype).to(self.sum_dtype).square_())
        return packed[: self.n]

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
                    view = piece.select(tensor)
                    view.mul_(piece.rows(factor, view))

    def add_scaled_(self, coefficient: Tensor, source: Operand) -> None:
        """Add ``coefficient * source`` to every vector of the weights, in place; ``coefficient`` is ``(n,)``."""
        coefficient = _with_dummy(coefficient, 0.0)
        for tensor, other, pieces in zip(self.values(), source, self._pieces, strict=True):
            if tensor is not None and other is not None:
                for piece in pieces:
                    view = piece.select(tensor)
                    view.addcmul_(piece.select(other), piece.rows(coefficient, view))

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
        before = self._local_squares()
        self.scale_(apply)
        done = (self._local_squares() / before).sqrt().to(owed.dtype)
        done = torch.where(torch.isfinite(done) & (done > 0) & ~full, done, apply)
        return torch.where(full | matters, owed / done, owed)


class _IndexedPiece:
    """A piece with its rows mapped into the common index space; index ``n`` is a dummy for rows that belong to no vector."""

    def __init__(self, piece: Piece, held: Tensor, where: slice, n: int) -> None:
        self.select, self.keep = piece.select, piece.keep
        labels = piece.labels.flatten()
        index = torch.where(labels >= 0, torch.searchsorted(held, labels) + where.start, n)
        rows = labels.numel()
        start = int(index[0]) if rows else 0
        # Whole filters in order are the common case: plain slices instead of index kernels.
        self._slice = slice(start, start + rows) if start + rows <= n and torch.equal(index, torch.arange(start, start + rows)) else None
        self._single = int(index[0]) if rows and bool((index == index[0]).all()) else None
        self._index = index
        self._on: dict[torch.device, Tensor] = {}

    def _index_on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._index.to(device)
        return self._on[device]

    def _dims(self, view: Tensor) -> list[int]:
        return [d for d in range(view.ndim) if d not in self.keep]

    def sum(self, view: Tensor) -> Tensor:
        dims = self._dims(view)
        return view.sum(dims) if dims else view

    def norm(self, view: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dims = self._dims(view)
        return torch.linalg.vector_norm(view, dim=dims, dtype=dtype) if dims else view.abs().to(dtype or view.dtype)

    def add_to(self, packed: Tensor, sums: Tensor) -> None:
        sums = sums.flatten().to(packed.device)
        if self._slice is not None:
            packed[self._slice] += sums
        elif self._single is not None:
            packed[self._single] += sums.sum()
        else:
            packed.index_add_(0, self._index_on(packed.device), sums)

    def rows(self, values: Tensor, view: Tensor) -> Tensor:
        """The values of this piece's vectors, shaped to broadcast over ``view``, in a dtype that loses nothing that ``view`` could
        keep."""
        if self._slice is not None:
            rows = values[self._slice]
        elif self._single is not None:
            rows = values[self._single].expand(self._index.numel())
        else:
            rows = values[self._index_on(values.device)]
        shape = [view.shape[d] if d in self.keep else 1 for d in range(view.ndim)]
        dtype = view.dtype if view.dtype == torch.float64 else torch.float32
        return rows.reshape(shape).to(view.device, dtype)


def _with_dummy(values: Tensor, dummy: float) -> Tensor:
    return torch.cat([values, values.new_full((1,), dummy)])


def _lengths(placement: Placement, partition: Partition) -> Tensor:
    labels = partition.labels.flatten()
    per_row = prod(placement.shape) // max(1, labels.numel())
    return torch.bincount(labels[labels >= 0], minlength=partition.n).to(torch.float64) * per_row
