"""The targets of one callback in one optimizer as vectors, and what a rule asks about them in a
step: rates, who has a gradient, what can be treated, what was counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf, nan
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.geometry.formulas import fuses_formulas
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.decay import DecayOwner
from lightning_normdyn.optimizers.group_numbers import Number
from lightning_normdyn.optimizers.recognition import applied_rate, facts_of, has_plain_rate
from lightning_normdyn.optimizers.step import Phase, Step

from .tally import Tally
from .vector_state import VectorState


@dataclass
class Target:
    """One targeted weight of one optimizer.

    Args:
        name: its first name in the LightningModule.
        weight: the parameter that the optimizer holds.
        partition: how it splits into vectors.
        verdict: what is known about its scale invariance.
        by_request: whether a person named it although nothing is known to make it scale-invariant.
        weight_standardized: whether weight standardization removes its mean before it is used.
    """

    name: str
    weight: Tensor
    partition: Partition
    verdict: Verdict
    by_request: bool
    weight_standardized: bool = False

    @property
    def scale_invariant(self) -> bool:
        """Whether the loss is known not to see the length of these vectors."""
        return not self.by_request

    @property
    def entries(self) -> int:
        """Numbers in all of its vectors, on all ranks together."""
        return int(self.partition.lengths(self.verdict.shape, self.verdict.read).sum())

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Rows and columns, of a weight of two dimensions."""
        shape = self.verdict.shape
        return (shape[0], shape[1]) if len(shape) == 2 else None


def guarded(
    values: Tensor,
    neutral: float,
    bad: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`Plan.guard` as a formula, which can be worked out together with others.

    Args:
        values: ``(n,)``.
        neutral: what takes their place where a vector cannot be treated.
        bad: bool ``(n,)``: vectors that had to be left alone so far.
        active: see `Plan.active`.
        skipped: see `lightning_normdyn.optimizers.step.Step.skipped`.
        norms: ``(n,)``: a vector without a length is left alone.

    Returns:
        The values, and ``bad`` as it is now.

    Example:
        >>> values, bad = torch.tensor([2.0, torch.inf]), torch.tensor([False, False])
        >>> guarded(values, 1.0, bad, None, None)
        (tensor([2., 1.]), tensor([False,  True]))
    """
    good = _are_sound(values, norms)
    # Chosen and not multiplied by 0: 0 times NaN is NaN, which would go into the weight.
    return torch.where(are_treated(good, active, skipped), values, neutral), bad | ~good


def _are_sound(values: Tensor, norms: Tensor | None) -> Tensor:
    """``(n,)``: whose value is finite, and whose norm, where norms are given, is a length."""
    # Two comparisons where `isfinite` is four operations; NaN fails both.
    sound = values.abs() < inf
    if norms is not None:
        sound = sound & (norms > 0) & (norms < inf)
    return sound


def are_treated(
    chosen: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
) -> Tensor:
    """``chosen``, without vectors that got no gradient, and none where the update is skipped."""
    if active is not None:
        chosen = chosen & active
    if skipped is not None:
        chosen = chosen & ~(skipped > 0)
    return chosen


class Plan:
    """The targets of one callback in one optimizer, as vectors.

    Args:
        index: the optimizer's position in ``trainer.optimizers``.
        bracket: the bracket of the optimizer.
        targets: in optimizer order.
        memory: the callback's state per vector; None: nothing was remembered so far.
        steps_before: real steps of the optimizer before the first that ``bracket`` counts, over
            resumes.
        earlier: the plan whose place this one takes.

    Attributes:
        vectors: the index space of the targets' vectors.
        groups: each param group that owns targets, with the range of its vectors.
        bad: bool ``(n,)``: vectors that had to be left alone at some step.
        counters: ``{name: (n,)}``, on the device until somebody reads them.
        published: ``{name: (n,)}``, what the rule tells others of its vectors; see `taken_from`.
        events: how often each kind of event has happened.
        tally: in how many steps the callback acted.
        before: the targets of the plan whose place this one takes, by name.
    """

    def __init__(
        self,
        index: int,
        bracket: StepBracket,
        targets: list[Target],
        *,
        memory: VectorState | None = None,
        steps_before: int = 0,
        earlier: Plan | None = None,
    ) -> None:
        self.index = index
        self.bracket = bracket
        self.optimizer: Optimizer = bracket.optimizer
        self.targets = targets
        self.vectors = WeightVectors.of(
            [t.weight for t in targets],
            [t.partition for t in targets],
            [t.name for t in targets],
            [t.verdict.read for t in targets],
        )
        self.groups = self._find_groups()
        self._memory = memory or VectorState()
        self._steps_before = steps_before
        self.bad = self.state("bad", 0.0, torch.bool)
        self.counters: dict[str, Tensor] = {}
        self.published: dict[str, Tensor] = {}
        self._places: WeakKeyDictionary[Plan, Tensor] = WeakKeyDictionary()
        self.events: dict[str, int] = {}
        self.tally = Tally()
        self.before: dict[str, Target] = {}
        if earlier is not None:
            # The same objects: who has them goes on counting in them.
            self.events, self.tally = earlier.events, earlier.tally
            self.before = {t.name: t for t in earlier.targets}
        self._group_of = {}
        for group, _ in self.groups:
            self._group_of.update(dict.fromkeys(group["params"], group))
        self._fixed_rates: Tensor | None = None
        self._values: dict[str, tuple[list[Any], Tensor]] = {}
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._owned: dict[DecayOwner, tuple[Mapping[Tensor, DecayOwner], Tensor, int]] = {}
        self._removers: list[Callable[[], None]] = []
        if not has_plain_rate(self.optimizer):
            # Before everybody who asks for rates in this step: an empty `order` sorts first.
            self.on_close(bracket.add(Phase.MEASURE, lambda step: self._fix_rates(), order=""))

    def _find_groups(self) -> list[tuple[dict[str, Any], slice]]:
        slice_of = dict(zip(self.vectors.weights, self.vectors.slices, strict=True))
        groups = []
        for group in self.optimizer.param_groups:
            # Targets stand in the optimizer's order, so those of a group lie side by side.
            slices = [slice_of[p] for p in group["params"] if p in slice_of]
            if slices:
                groups.append((group, slice(slices[0].start, slices[-1].stop)))
        return groups

    # -- as long as the plan is in force

    def on_close(self, remove: Callable[[], None]) -> None:
        """Call ``remove`` when this plan is no longer in force."""
        self._removers.append(remove)

    def close(self) -> None:
        """Take away every handler and every claim that belongs to this plan; idempotent."""
        removers, self._removers = self._removers, []
        for remove in removers:
            remove()

    # -- the param groups

    @property
    def claimed(self) -> dict[Tensor, Partition]:
        """What of each weight is treated, for `StepBracket.claim_decay`: rows that are not keep the
        optimizer's decay."""
        return {t.weight: t.partition for t in self.targets}

    def group_of(self, target: Target) -> dict[str, Any]:
        """The param group that owns ``target``."""
        return self._group_of[target.weight]

    def groups_of(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The param group that owns each of ``targets``."""
        return [self.group_of(target) for target in targets]

    def rates(self) -> Tensor:
        """The rate that the optimizer's next step really applies to each vector, ``(n,)`` float64;
        NaN where nobody can tell.

        For most optimizers that is the learning rate of the param group, read at this very step
        (`lightning_normdyn.optimizers.facts.applied_rate`). A rate that a step itself moves on was
        read at the start of the step.
        """
        if self._fixed_rates is not None:
            return self._fixed_rates
        # One number per group is one write each; one per weight only where it must be.
        by_group = self.group_rates()
        if by_group is not None:
            return self.spread_groups("rate", by_group)
        rates = self._empty()
        for target, where in zip(self.targets, self.vectors.slices, strict=True):
            rates[where] = self._rate(self.group_of(target), target.weight)
        return rates

    def group_rates(self) -> list[Number] | None:
        """`rates` by param group, each a number of the host or a tensor; None where they differ
        within a group, or are those of the start of the step."""
        if self._fixed_rates is not None:
            return None
        if any(facts_of(self.optimizer, group).rate_by_weight for group, _ in self.groups):
            return None
        return [self._rate(group, group["params"][0]) for group, _ in self.groups]

    def _fix_rates(self) -> None:
        """Read the rates of the coming step, for all of its phases: after the update the
        optimizer's state speaks of the next one."""
        # Emptied first: else `rates` would return those of the step before.
        self._fixed_rates = None
        self._fixed_rates = self.rates()

    def _rate(self, group: dict[str, Any], weight: Tensor) -> Number:
        rate = applied_rate(self.optimizer, group, weight)
        return nan if rate is None else rate

    def _empty(self) -> Tensor:
        vectors = self.vectors
        return torch.empty(vectors.n, dtype=vectors.sum_dtype, device=vectors.device)

    def spread_groups(self, key: str, values: list[Number]) -> Tensor:
        """One number per param group, for each vector: ``(n,)`` float64; cached under ``key`` while
        the numbers stay the same."""
        known = self._values.get(key)
        # A number that is a tensor may have been written to, so it is never taken from the cache.
        constant = not any(isinstance(v, Tensor) for v in values)
        if known is not None and constant and known[0] == values:
            return known[1]
        # A float is a kernel argument; only a tensor that lives on the device is read there.
        # Nothing waits for the device.
        spread = self._empty()
        for value, (_, where) in zip(values, self.groups, strict=True):
            spread[where] = value
        self._values[key] = (values if constant else [], spread)
        return spread

    # -- which vectors

    def spread(self, per_target: Sequence[bool]) -> Tensor:
        """One flag per target, for each of its vectors: bool ``(n,)``, not to be changed."""
        key = tuple(per_target)
        # Which weights get no gradient (idle experts, frozen layers), or who decays which, is
        # nearly always the same.
        if key not in self._masks:
            flags = torch.tensor(key, dtype=torch.bool, device=self.vectors.device)
            self._masks[key] = self.vectors.spread(flags)
        return self._masks[key]

    def active(self, step: Step) -> Tensor | None:
        """``(n,)`` bool: vectors of weights that got a gradient in this step; None if all did."""
        has_gradient = self.vectors.has_gradient(step)
        return None if all(has_gradient) else self.spread(has_gradient)

    def mask(self, step: Step) -> Tensor | None:
        """`active` for a formula: as a program, the same serves steps without a gradient too."""
        if fuses_formulas(self.vectors):
            return self.spread(self.vectors.has_gradient(step))
        return self.active(step)

    def treated(self, step: Step) -> Tensor | None:
        """``(n,)`` bool: vectors of weights that got a gradient in an update that the device does
        not skip; None: all, for certain."""
        active = self.active(step)
        if step.skipped is None:
            return active
        all_active = torch.ones_like(self.bad) if active is None else active
        return step.unless_skipped(all_active, False)

    def guard(
        self, values: Tensor, neutral: float, step: Step, norms: Tensor | None = None
    ) -> Tensor:
        """``values`` where a vector can be treated, ``neutral`` elsewhere.

        Elsewhere means: a weight without gradient, an update that the device skips, a zero norm, a
        non-finite number. The last two are remembered in ``bad``.
        """
        good = self.note_acting(step, values, norms)
        active = self.active(step)
        if active is not None:
            good = good & active
        # Chosen and not multiplied by 0: 0 times NaN is NaN, which would go into the weight.
        return step.unless_skipped(torch.where(good, values, neutral), neutral)

    def note_acting(self, step: Step, values: Tensor, norms: Tensor | None = None) -> Tensor:
        """Note that the callback acts in ``step``, and in ``bad`` which vectors it has to leave
        alone, by ``values`` and ``norms`` as of `guard`; ``(n,)`` bool: the others."""
        # Everything stays on the device: who is left alone is read when somebody asks for it.
        good = _are_sound(values, norms)
        self.bad |= ~good
        self._note(step)
        return good

    def guards(self, step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `guarded` takes in this step: ``bad``, who is active, and whether the update is
        skipped. Notes that the callback acts."""
        self._note(step)
        return self.expected_guards(step)

    def _note(self, step: Step) -> None:
        has_gradient = self.vectors.has_gradient(step)
        # Of no weights at all, none lacks a gradient.
        self.tally.note(step.number, all(has_gradient) or any(has_gradient))

    def expected_guards(self, step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`guards` of a step in which the callback may not act."""
        active = self.mask(step)
        if step.skipped is None:
            return self.bad, active, None
        return self.bad, active, step.skipped.to(self.bad.device).reshape(())

    def owns_decay(self, step: Step, owner: DecayOwner) -> Tensor:
        """``(n,)`` bool: vectors whose decay is ``owner``'s to apply."""
        return self._ownership(step, owner)[1]

    def owns_all(self, step: Step, owner: DecayOwner) -> bool:
        """Whether `owns_decay` is true of all vectors."""
        return self._ownership(step, owner)[2] == len(self.targets)

    def owns_none(self, step: Step, owner: DecayOwner) -> bool:
        """Whether `owns_decay` is true of no vector."""
        return self._ownership(step, owner)[2] == 0

    def _ownership(
        self, step: Step, owner: DecayOwner
    ) -> tuple[Mapping[Tensor, DecayOwner], Tensor, int]:
        # Asked at every step: a rescaling's claim holds inside its window only.
        owners = step.bracket.decay_owners()
        known = self._owned.get(owner)
        # The same object as long as all claims are the same.
        if known is None or known[0] is not owners:
            is_owned = [owners.get(target.weight) == owner for target in self.targets]
            known = self._owned[owner] = owners, self.spread(is_owned), sum(is_owned)
        return known

    def taken_from(self, other: Plan, values: Tensor) -> Tensor:
        """``(n,)``: what ``values`` of the vectors of ``other``, a plan for the same optimizer, say
        of these vectors.

        0 for weights that ``other`` has not; NaN where it splits a weight into vectors that are
        neither the same nor the whole weight.
        """
        if other not in self._places:
            self._places[other] = self._find_places(other)
        # Filled on the device: a list of numbers would be copied there, and the host would wait.
        extended = torch.cat([values, values.new_zeros(1), values.new_full((1,), nan)])
        return extended[self._places[other]]

    def _find_places(self, other: Plan) -> Tensor:
        absent, unknown = other.vectors.n, other.vectors.n + 1
        theirs = {t.weight: i for i, t in enumerate(other.targets)}
        places = torch.full((self.vectors.n,), absent, dtype=torch.long, device="cpu")
        for target, where in zip(self.targets, self.vectors.slices, strict=True):
            if target.weight not in theirs:
                continue
            position = theirs[target.weight]
            there = other.vectors.slices[position]
            if other.targets[position].partition.equal(target.partition):
                places[where] = torch.arange(
                    there.start, there.stop, dtype=torch.long, device="cpu"
                )
            else:
                # One number for the whole weight is that of each of its vectors.
                is_whole = there.stop - there.start == other.targets[position].partition.n == 1
                places[where] = there.start if is_whole else unknown
        return places.to(self.vectors.device)

    @cached_property
    def invariant(self) -> list[bool]:
        """For each target whether the loss is known not to see its length."""
        return [target.scale_invariant for target in self.targets]

    # -- what is remembered

    def number(self, step: Step) -> int:
        """1-based count of ``step`` over resumes."""
        return self._steps_before + step.number

    def state(
        self,
        key: str,
        initial: float | Callable[[], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """State of each vector, ``(n,)``, that outlives this plan and goes into checkpoints. Change
        it in place.

        Every rank must call it, when a worker is made.

        Args:
            key: names the state among those of the callback.
            initial: for vectors that nothing is known of: a number, or a function that gives
                ``(n,)`` and may be a collective.
            dtype: None: that of sums.
        """
        vectors = self.vectors
        # Not the dtype of the weights: in bfloat16 a counter would stay at 256 for ever.
        kind = dtype or vectors.sum_dtype

        def make() -> Tensor:
            if callable(initial):
                return initial()
            return torch.full((vectors.n,), initial, dtype=kind, device=vectors.device)

        return self._memory.take(key, vectors, make, kind)

    def counter(self, key: str) -> Tensor:
        """A counter per vector, ``(n,)``, that starts at 0; for `count`."""
        # At once and not when the first is counted, so that every rank knows the same counters.
        self.counters[key] = self.state(key, 0.0)
        return self.counters[key]

    def count(self, key: str, counted: Tensor, step: Step) -> None:
        """Set a `counter` after the update, once in a step.

        Args:
            key: names it.
            counted: ``(n,)``, what it was and what this step adds.
            step: the step.
        """
        # Not now: if this step raises before its update, nothing has happened that could count.
        step.when_updated(partial(self._set_counter, key, counted))

    def _set_counter(self, key: str, counted: Tensor) -> None:
        counter = self.counters[key]
        # A CUDA graph reads and writes where things lay when it was captured.
        if counted.is_cuda and torch.cuda.is_current_stream_capturing():
            counter.copy_(counted)
        else:
            # Its memory is taken over: to add it up now would be one more launch in each step.
            counter.set_(counted)  # type: ignore[call-overload]

    def mark(self, event: str) -> None:
        """Note that something happened to these weights in this step; the monitor writes it into
        its history."""
        # Counted and not listed: without a monitor nobody ever takes a list away, and of two
        # monitors only one could.
        self.events[event] = self.events.get(event, 0) + 1
