"""The targeted weights as one index space: sums per vector out, factors per vector in.

A vector is what the loss sees as one direction: a filter in front of BatchNorm, the filters of one
channel group in front of GroupNorm, a whole matrix in front of LayerNorm.

Shapes: ``n`` vectors, ``weights`` weights. Over 500 lines, because it is the one interface of its
room: whatever is done with vectors is a method here.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import passes
from .kernel_choice import make_kernels
from .kernels import RowIndex, sum_dtype
from .partition import Partition
from .passes import Operand, Pair, Pass
from .pieces import Runs, itself
from .placement import GRADIENT, VERSION, hidden_entries, is_plain, place_all, version_of
from .reduction import Message, Reduction, Summarize


class HasGradients(Protocol):
    """What `WeightVectors` asks of a step: `lightning_normdyn.optimizers.step.Step`."""

    @property
    def with_gradient(self) -> Set[int]:
        """Ids of the weights that had a gradient when the step was ready; not to be changed."""


class HasSnapshots(Protocol):
    """What `WeightVectors` asks of a `lightning_normdyn.optimizers.bracket.StepBracket`."""

    def snapshots_of(self, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The copies that were taken of ``weights`` in this step."""


class WeightVectors(Reduction):
    """The targeted weights as one index space of ``n`` vectors.

    Every formula of the package is arithmetic on ``(n,)`` tensors. This class takes them from the
    weights and carries them back, so that a rule need not know shapes, memory formats or shards.
    What it does over several ranks (totals, counts, gathering) it has from `Reduction`.

    Args:
        weights: the parameters, in optimizer order.
        partitions: how each weight splits into vectors.
        names: what to call each weight in messages.
        read: for each weight, bool of its full shape: the entries that the loss reads, where a mask
            in the network hides the others. Only these enter sums and lengths; factors are applied
            to all. None, for one weight or for all: every entry.

    Attributes:
        n: number of vectors of which this rank holds an entry; all of them unless weights are
            sharded.
        slices: the range of each weight's vectors among these ``n``.
        weight_of: int64 ``(n,)``: the weight that each vector belongs to.
        length: float64 ``(n,)``: number of entries of each vector that the loss reads, over all
            ranks.
        cut: whether some vector lies on several ranks in pieces; the same on every rank that shares
            these weights.
        kernel_path: which kernels read and write the weights, and why.
        count: float64 ``(weights,)``: number of vectors of each weight, over all ranks.
        low_precision: whether some weight is stored in a dtype in which a factor close to 1 is lost
            to rounding.

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

    _shared: ClassVar[WeakValueDictionary[Any, WeightVectors]] = WeakValueDictionary()

    @classmethod
    def of(
        cls,
        weights: Sequence[Tensor],
        partitions: Sequence[Partition],
        names: Sequence[str],
        read: Sequence[Tensor | None],
    ) -> WeightVectors:
        """The index space of these weights; arguments as of the class.

        All who ask for the same, while somebody has it, get the same: nothing in it changes.
        """
        ids = [tuple(map(id, of_all)) for of_all in (weights, partitions, read)]
        kinds = [(weight.dtype, weight.device) for weight in weights]
        key = (*ids, tuple(kinds), tuple(names))
        known = cls._shared.get(key)
        if known is None:
            known = cls(weights, partitions, names, read)
            # How a shard lies may be another the next time, and ranks compare it.
            if known._bare:
                cls._shared[key] = known
        return known

    def __init__(
        self,
        weights: Sequence[Tensor],
        partitions: Sequence[Partition],
        names: Sequence[str] | None = None,
        read: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.weights = list(weights)
        self.partitions = list(partitions)
        self.names = names = list(names or map("weight {}".format, range(len(weights))))
        # Numbers per vector are kept in one place, even if weights lie on several devices.
        self.device = weights[0].device if weights else torch.device("cpu")
        self.sum_dtype = sum_dtype(self.device)
        self._placements = place_all(self.weights, self.partitions, self.names)
        self._plain = all(map(is_plain, self.weights))
        # Whether each weight is itself the tensor whose entries are read and written.
        self._bare = self._plain and all(p.storage is itself for p in self._placements)
        self._ids = frozenset(map(id, self.weights))
        self._all = (True,) * len(self.weights)
        self._answered: tuple[Set[int] | None, tuple[bool, ...]] = None, ()
        """What `has_gradient` was asked last, and what it said."""
        self._index = RowIndex(self._placements, self.device)
        self.n = self._index.n
        self.slices = self._index.slices

        # Worked out of the partitions, since a shard does not know how long its vectors are.
        lengths, hidden = [], []
        self._read = read or [None] * len(self.weights)
        # Of many weights that are split alike it is worked out once.
        of_alike: dict[Any, Tensor] = {}
        for i, entries in enumerate(self._read):
            alike = self._placements[i].shape, id(self.partitions[i]), id(entries)
            if alike not in of_alike:
                length = self.partitions[i].lengths(self._placements[i].shape, entries)
                of_alike[alike] = length.to(self.sum_dtype)
            lengths.append(of_alike[alike])
            hidden.append(hidden_entries(weights[i], entries, names[i]))

        dtypes = {value.dtype for value in self.values()}
        self.low_precision = not dtypes.isdisjoint({torch.bfloat16, torch.float16})
        self._kernels, self.kernel_path = make_kernels(
            self._index, self.values(), hidden, self.device
        )
        super().__init__(self._placements, lengths, self.device)
        counts = [partition.n for partition in self.partitions]
        self.count = torch.tensor(counts, dtype=self.sum_dtype, device=self.device)

    @property
    def through_masters(self) -> bool:
        """Whether an optimizer updates other tensors (DeepSpeed), which get gradients late."""
        return any(placement.master is not None for placement in self._placements)

    @property
    def _one_pass(self) -> bool:
        """Whether sums and the change that they lead to are taken row by row."""
        return self._kernels.fuses and not self.cut

    # ---- Operands: one local tensor (or None) per weight ----

    @property
    def _needs_no_view(self) -> bool:
        """Whether tensors may be taken as they are: a view of each costs more than its sums where
        weights are small."""
        # Autograd has to be kept out where it is on; in a step it is off.
        return self._bare and not torch.is_grad_enabled()

    def local(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's plain storage of tensors laid out like the weights (gradients, state),
        without autograd history."""
        if self._needs_no_view:
            return list(tensors)
        local = []
        for tensor, placement in zip(tensors, self._placements, strict=True):
            local.append(None if tensor is None else placement.storage(tensor.detach()))
        return local

    def values(self) -> list[Tensor]:
        """The weights themselves; writing to them writes to the weights."""
        if self._needs_no_view:
            return list(self.weights)
        return [p.value(w) for p, w in zip(self._placements, self.weights, strict=True)]

    def storages(self) -> dict[Tensor, Tensor]:
        """Each weight's local tensor, as `StepBracket.request_snapshot` wants them."""
        return dict(zip(self.weights, self.values(), strict=True))

    def gradients(self) -> list[Tensor | None]:
        """The gradients as the optimizer receives them; None where a weight has none."""
        if self._needs_no_view:
            return list(map(GRADIENT, self.weights))
        return [p.gradient(w) for p, w in zip(self._placements, self.weights, strict=True)]

    def has_gradient(self, step: HasGradients) -> tuple[bool, ...]:
        """For each weight whether it had a gradient when ``step`` was ready.

        True also where this rank holds none of its entries, since other ranks decide.
        """
        with_gradient = step.with_gradient
        # Asked several times in a step, and the same set may come in the next one.
        if self._answered[0] is not with_gradient:
            self._answered = with_gradient, self._which_are_in(with_gradient)
        return self._answered[1]

    def _which_are_in(self, ids: Set[int]) -> tuple[bool, ...]:
        # The common case; the loop takes ten times as long.
        if self._ids <= ids:
            return self._all
        answers = []
        for placement, weight in zip(self._placements, self.weights, strict=True):
            answers.append(not placement.pieces or id(weight) in ids)
        return tuple(answers)

    def versions(self) -> list[int]:
        """For each weight how often its numbers were written to, as torch counts it."""
        # Asked for in every step: looking for something inside or behind a weight costs more.
        if self._plain:
            return list(map(VERSION, self.weights))
        return [version_of(weight) for weight in self.weights]

    def snapshots(self, bracket: HasSnapshots) -> list[Tensor | None]:
        """The copies that ``bracket`` took of them in this step."""
        return list(bracket.snapshots_of(self.weights))

    def values_beside(self, before: Operand) -> Operand:
        """The weights, with None where ``before`` has none."""
        values: list[Tensor | None] = [*self.values()]
        for i, old in enumerate(before):
            if old is None:
                values[i] = None
        return values

    # ---- Sums over vectors ----

    def inner(
        self,
        *pairs: Pair,
        exact: bool = True,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        """Inner products of every vector, packed, completed over the ranks that share vectors in
        one collective.

        Args:
            pairs: ``(a, b)`` for <a, b>, ``(a, None)`` for <1, a>. A weight whose operand is None
                contributes zeros.
            exact: whether in float64; otherwise in the operands' own precision, float32 at least,
                which is twice as fast and errs by 1e-7 of the product of the two lengths. Enough
                for norms and cosines, not for differences of sums.
            copy: one of the operands, and where to copy it on the way.

        Returns:
            ``(len(pairs), n)``, float64.
        """
        return self.sum_(self._kernels.products(pairs, exact=exact, copy=copy))

    def partial_inner(self, *pairs: Pair, exact: bool = True) -> Tensor:
        """This rank's part of `inner`, without any communication: `complete_with_totals` completes
        it, later if need be."""
        return self._kernels.products(pairs, exact=exact)

    def inner_and_totals(
        self,
        *pairs: Pair,
        summarize: Summarize,
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`inner`, and in the same collective `totals` of what ``summarize`` makes of the inner
        products.

        Returns:
            ``(len(pairs), n)`` and ``(J, weights)``.
        """
        packed = self.partial_inner(*pairs, exact=exact)
        totals = self.complete_with_totals(packed, summarize)
        return packed, totals

    def norms(self) -> Tensor:
        """Norm of every vector, ``(n,)``, summed in the weights' own precision, float32 at least.

        Right to float32 rounding, which is all that a factor or a division needs. Where a
        difference of norms or an angle is wanted, use `inner`.
        """
        # Squares, since those add up over ranks.
        return self.sum_(self.partial_squares()).sqrt_()

    def partial_squares(self) -> Tensor:
        """This rank's part of <w, w>, ``(n,)``, by the fastest pass."""
        return self._kernels.sums(passes.SQUARES, [self.values()])[0]

    def moments(self, tensors: Operand) -> tuple[Tensor, Tensor]:
        """Sums of squares and sums of the entries of every vector, for standard deviations.

        A standard deviation from them is right to 1e-6 even where the mean is a thousand times as
        large.

        Args:
            tensors: laid out like the weights; None contributes zeros.

        Returns:
            <w, w> and <1, w>, each ``(n,)`` float64.
        """
        squares, sums = self.sum_(self._kernels.sums(passes.MOMENTS, [tensors]))
        return squares, sums

    def displacement(
        self, before: Operand, *, exact: bool = False, norms: Tensor | None = None
    ) -> Tensor:
        """Sums that tell how the weights moved since ``before``: <w, w>, <w, Δ>, <Δ, Δ> with w =
        ``before`` and Δ = now - w.

        Angles from them are right to 1e-3 of themselves from 1e-6 rad on (to 1e-6 where rounding of
        the weights is no matter), radial parts to 1e-6 of the step, also when the norm changes many
        times over: `lightning_normdyn.geometry.passes.displacement` says how.

        Args:
            before: w, the weights before the step.
            exact: whether <w, w> too is summed in float64, so that it can be set against another
                norm.
            norms: ``(n,)``, the norms of ``before`` as `inner` gave them, if they are known; a pass
                over it is saved where vectors are whole. Not with ``exact``.

        Returns:
            ``(3, n)``, completed over the ranks that share vectors.
        """
        # Known norms are those of whole vectors; parts of vectors need their own.
        if self.cut or not self._kernels.rows_fit:
            norms = None
        how = passes.displacement(self.sum_dtype if exact else None, known=norms is not None)
        sums = self._kernels.sums(how, [before, self.values_beside(before)], [norms])
        return self.sum_(sums)

    # ---- Values of vectors and of weights ----

    def _add_up(self, values: Tensor, runs: Runs) -> Tensor:
        return self._kernels.add_up(values, runs)

    def put_back(self, packed: Tensor, completed: Tensor, message: Message) -> None:
        """Write completed sums, ``(..., size)``, to their vectors."""
        self._kernels.put_back(packed, completed, message)

    def spread(self, per_weight: Tensor) -> Tensor:
        """One value per weight, ``(weights,)``, repeated for each of its vectors: ``(n,)``."""
        return per_weight[..., self.weight_of]

    def scatter_one(self, weight: int, values: Tensor) -> Tensor:
        """`scatter` for the weight at position ``weight`` alone."""
        return values.to(self.device)[..., self._placements[weight].held.to(self.device)]

    # ---- Writing ----

    def scale_(self, factor: Tensor, tensors: Operand | None = None) -> None:
        """Multiply every vector by its factor, in place.

        Args:
            factor: ``(n,)``.
            tensors: what to scale instead of the weights (gradients, state buffers); None entries
                are passed over.
        """
        self._kernels.scale_(self.values() if tensors is None else tensors, factor)

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
        changed = self.values() if tensors is None else tensors
        self._kernels.add_scaled_(changed, coefficient, source)

    def scale_and_add_(
        self,
        factor: Tensor,
        coefficient: Tensor,
        source: Operand,
    ) -> None:
        """`scale_` the weights, then `add_scaled_`; None in ``source``: passed over."""
        self._kernels.scale_and_add_(self.values_beside(source), factor, coefficient, source)

    def stretch_(
        self,
        before: Operand,
        stretch: Tensor,
        scale: Tensor,
        added: Tensor | None = None,
    ) -> None:
        """Stretch the step since ``before``, and scale what it ends at, in place:
        `lightning_normdyn.steering.stretch_step`.

        Where both factors are 1 and nothing is added, no bit changes.

        Args:
            before: the weights before the step; None entries are passed over.
            stretch: ``(n,)``.
            scale: ``(n,)``.
            added: ``(n,)``: how much of ``before`` is added in the end; None: nothing.
        """
        self._kernels.stretch_(self.values(), before, stretch, scale, added)

    def shortened(self, before: Operand) -> list[Tensor | None]:
        """Which entries of the weights have not moved away from 0 since ``before``: bool, laid out
        like the weights on this rank; None where ``before`` is."""
        masks: list[Tensor | None] = []
        for value, old in zip(self.values(), before, strict=True):
            masks.append(None if old is None else (value - old) * old <= 0)
        return masks

    def decay_shortened_(
        self, share: Tensor, before: Operand, shortened: Operand | None = None
    ) -> None:
        """Subtract ``share * before`` at the entries that have not moved away from 0 since
        ``before``, in place: a cautious decay. No communication.

        Args:
            share: ``(n,)``.
            before: the weights before the step; None entries are passed over.
            shortened: which entries, as `shortened` told earlier; None: as they are now.
        """
        self._kernels.decay_shortened_(self.values(), share, before, shortened)

    def remove_radial_(
        self, before: Operand, share: Tensor, active: Tensor | None = None
    ) -> Tensor:
        """Remove from the step since ``before`` its part along ``before``, and a share of
        ``before`` with it, in place: `lightning_normdyn.functional.remove_radial`.

        A vector for which the result is not finite is left alone. One collective where vectors lie
        on several ranks, none otherwise.

        Args:
            before: the weights before the step.
            share: ``(n,)``, e.g. the part that decay takes away.
            active: bool ``(n,)``, vectors to be changed; None: all.

        Returns:
            ``(n,)``: by how much of ``before`` each vector was changed or would have been.
        """
        after = self.values_beside(before)
        sums = self._sums_removing(passes.RADIAL, [before, after], [], share, active)
        square, product = sums
        removed = passes.removed_part(square, product, share)
        if not self._one_pass:
            self._kernels.add_scaled_(after, -passes.applied_part(removed, active), before)
        return removed

    def remove_radial_of_(
        self,
        direction: Operand,
        length: Tensor,
        share: Tensor,
        active: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`remove_radial_` where the step is known, ``length * direction``, so that no copy of the
        weights is needed.

        What is removed is wrong by the rounding of the weights' dtype times the length of the step
        over that of the weight.

        Args:
            direction: laid out like the weights; None entries are passed over.
            length: ``(n,)``.
            share: as for `remove_radial_`.
            active: as for `remove_radial_`.

        Returns:
            What `remove_radial_` returns, and ``(n,)``: how many times longer than the weight
            before it the step was.
        """
        after = self.values_beside(direction)
        operands = [direction, after]
        sums = self._sums_removing(passes.RADIAL_OF_STEP, operands, [length], share, active)
        square, product, direction_square = sums
        removed = passes.removed_part(square, product, share)
        if not self._one_pass:
            # w = v - length * direction, put in: w itself is nowhere, and its copy would cost the
            # memory that this method saves.
            applied = passes.applied_part(removed, active)
            self._kernels.add_scaled_(after, -applied, after)
            self._kernels.add_scaled_(after, applied * length, direction)
        ratio = length.abs() * (direction_square / passes.above_zero(square)).sqrt()
        return removed, ratio

    def _sums_removing(
        self,
        how: Pass,
        operands: list[Operand],
        numbers: list[Tensor | None],
        share: Tensor,
        active: Tensor | None,
    ) -> Tensor:
        """The sums of a pass that also removes what they lead to, where one pass can do both."""
        # If not, the caller removes it: the sums may have to wait for other ranks.
        if self._one_pass:
            how = passes.removing(how, len(operands) + len(numbers))
            numbers = [*numbers, share, active]
        return self.sum_(self._kernels.sums(how, operands, numbers))

    @cached_property
    def rounding(self) -> Tensor:
        """The relative rounding of each vector's weight, float32 ``(n,)``."""
        epsilons = [torch.finfo(value.dtype).eps for value in self.values()]
        return self.spread(torch.tensor(epsilons, dtype=torch.float32, device=self.device))
