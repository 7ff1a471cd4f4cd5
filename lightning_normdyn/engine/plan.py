"""What a callback treats in one optimizer: its targets, as vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.decay import DecayOwner
from lightning_normdyn.optimizers.group_numbers import Number, group_number
from lightning_normdyn.optimizers.rate import applied_rate, rate_differs_within
from lightning_normdyn.optimizers.step import Step


@dataclass
class Target:
    """One targeted weight of one optimizer.

    Args:
        name: its first name in the LightningModule.
        weight: the parameter that the optimizer holds.
        partition: how it splits into vectors.
        verdict: what is known about its scale invariance.
        by_request: whether a person named it although nothing is known to make it scale-invariant.
    """

    name: str
    weight: Tensor
    partition: Partition
    verdict: Verdict
    by_request: bool

    @property
    def scale_invariant(self) -> bool:
        """Whether the loss is known not to see the length of these vectors."""
        return not self.by_request


@dataclass
class Tally:
    """In how many steps of one optimizer a callback meant to act, and in how many it found
    something to act on.

    Args:
        due: steps in which it was to act.
        acted: those of them in which some target had a gradient.
    """

    due: int = 0
    acted: int = 0
    _last: int = 0

    def note(self, number: int, found: bool) -> None:
        """Count step ``number``; several notes about one step count once."""
        if number != self._last:
            self._last = number
            self.due += 1
            self.acted += found


@dataclass
class Plan:
    """The targets of one callback in one optimizer, as vectors.

    Args:
        index: the optimizer's position in ``trainer.optimizers``.
        optimizer: the torch optimizer.
        targets: in optimizer order.
        vectors: their index space.
        groups: each param group with the range of vectors that it owns.

    Attributes:
        bad: bool ``(n,)``: vectors that had to be left alone at some step.
        positions: where each weight stands in ``targets``.
    """

    index: int
    optimizer: Optimizer
    targets: list[Target]
    vectors: WeightVectors
    groups: list[tuple[dict[str, Any], slice]]
    bad: Tensor = field(init=False)
    _fixed_rates: Tensor | None = None
    positions: dict[Tensor, int] = field(init=False)
    _values: dict[str, tuple[list[Any], Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[bool, ...], Tensor] = field(default_factory=dict)
    _owned: dict[tuple[bool, ...], Tensor] = field(default_factory=dict)
    _group_of: dict[Tensor, dict[str, Any]] = field(init=False)
    counters: dict[str, Tensor] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.bad = torch.zeros(self.vectors.n, dtype=torch.bool, device=self.vectors.device)
        self.positions = {target.weight: i for i, target in enumerate(self.targets)}
        self._group_of = {p: group for group, _ in self.groups for p in group["params"]}

    @property
    def claimed(self) -> dict[Tensor, Partition]:
        """What of each weight is treated, for `StepBracket.claim_decay`: rows that are not keep the
        optimizer's decay."""
        return {t.weight: t.partition for t in self.targets}

    def rates(self) -> Tensor:
        """The rate that the optimizer's next step really applies to each vector, ``(n,)`` float64;
        NaN where nobody can tell.

        For most optimizers that is the learning rate of the param group, read at this very step
        (`lightning_normdyn.optimizers.rate.applied_rate`). A rate that a step itself moves on is
        the one that was `fix_rates`.
        """
        if self._fixed_rates is not None:
            return self._fixed_rates
        if not any(rate_differs_within(self.optimizer, group) for group, _ in self.groups):
            values = [self._rate(group, group["params"][0]) for group, _ in self.groups]
            return self.spread_groups("rate", values)
        groups = self.groups_of(self.targets)
        by_weight = [
            self._rate(group, target.weight)
            for target, group in zip(self.targets, groups, strict=True)
        ]
        rates = torch.empty(
            self.vectors.n, dtype=self.vectors.sum_dtype, device=self.vectors.device
        )
        for rate, where in zip(by_weight, self.vectors.slices, strict=True):
            rates[where] = rate
        return rates

    def fix_rates(self) -> None:
        """Read the rates of the coming step, for all of its phases: afterwards the optimizer's
        state speaks of the next one."""
        self._fixed_rates = None
        self._fixed_rates = self.rates()

    def _rate(self, group: dict[str, Any], weight: Tensor) -> Number:
        rate = applied_rate(self.optimizer, group, weight)
        return nan if rate is None else rate

    def group_values(self, key: str) -> Tensor:
        """A number of the param groups (``"weight_decay"``, ...) for each vector, ``(n,)`` float64,
        read at this very step."""
        return self.spread_groups(key, [group_number(group, key) for group, _ in self.groups])

    def spread_groups(self, key: str, values: list[Number]) -> Tensor:
        """One number per param group, for each vector: ``(n,)`` float64; cached under ``key`` while
        the numbers stay the same."""
        # A float is a kernel argument; only a tensor that lives on the device is read there.
        # Nothing waits for the device.
        known = self._values.get(key)
        constant = not any(isinstance(v, Tensor) for v in values)
        if known is not None and constant and known[0] == values:
            return known[1]
        out = torch.empty(self.vectors.n, dtype=self.vectors.sum_dtype, device=self.vectors.device)
        for value, (_, where) in zip(values, self.groups, strict=True):
            out[where] = value
        self._values[key] = (values if constant else [], out)
        return out

    def active(self, step: Step) -> Tensor | None:
        """``(n,)`` bool: vectors of weights that got a gradient in this step; None if all did."""
        missing = tuple(not has for has in self.vectors.has_gradient(step))
        if not any(missing):
            return None
        if missing not in self._masks:
            per_weight = ~torch.tensor(missing, dtype=torch.bool, device=self.vectors.device)
            self._masks[missing] = self.vectors.spread(per_weight)
        return self._masks[missing]

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
        non-finite number. The last two are
        remembered in ``bad``.
        """
        good = torch.isfinite(values)
        if norms is not None:
            good &= torch.isfinite(norms) & (norms > 0)
        self.bad |= ~good
        active = self.active(step)
        self.tally.note(step.number, active is None or any(self.vectors.has_gradient(step)))
        if active is not None:
            good = good & active
        return step.unless_skipped(
            torch.where(good, values, torch.full_like(values, neutral)), neutral
        )

    def owns_decay(self, step: Step, owner: DecayOwner) -> Tensor:
        """``(n,)``: 1 for vectors whose decay is ``owner``'s to apply, 0 for those that another
        decays."""
        owners = step.bracket.decay_owners()
        owned = tuple(owners.get(t.weight) == owner for t in self.targets)
        if owned not in self._owned:
            self._owned[owned] = self.vectors.spread(
                torch.tensor(owned, dtype=self.vectors.sum_dtype, device=self.vectors.device)
            )
        return self._owned[owned]

    def count(self, key: str, values: Tensor, step: Step) -> None:
        """Add ``(n,)`` 0/1 values to a counter per vector that stays on the device until somebody
        reads it, after the update."""
        if key not in self.counters:  # now, so that every rank knows the same counters
            self.counters[key] = torch.zeros_like(values)
        step.when_updated(partial(self._add, key, values))

    def _add(self, key: str, values: Tensor) -> None:
        self.counters[key] += values

    def inherit(self, earlier: Plan) -> None:
        """Take over what was counted for vectors that an earlier plan had as well."""
        # Every rank must know the same counters, whatever it holds of these weights.
        for key, values in earlier.counters.items():
            self.counters[key] = self.carry(earlier, values, values.new_zeros(self.vectors.n))
        self.bad = self.carry(earlier, earlier.bad, self.bad)
        self.events = earlier.events

    def carry(self, earlier: Plan, values: Tensor, fresh: Tensor) -> Tensor:
        """An earlier plan's values, ``(earlier.vectors.n,)``, at the vectors that are still the
        same, ``fresh`` ``(n,)`` at the others.

        A weight may have got more vectors since: rows that no loss had read before. Then this is a
        collective, if vectors are sharded.
        """
        position = {t.name: j for j, t in enumerate(earlier.targets)}
        shared = [(i, position[t.name]) for i, t in enumerate(self.targets) if t.name in position]
        changed = [
            (i, j)
            for i, j in shared
            if not earlier.targets[j].partition.equal(self.targets[i].partition)
        ]
        result = fresh.clone()
        for i, j in shared:
            if (i, j) not in changed:
                result[self.vectors.slices[i]] = values[earlier.vectors.slices[j]].to(result)
        if not changed:
            return result
        gathered = earlier.vectors.gather(values)
        for i, j in changed:
            same = self.targets[i].partition.found_in(earlier.targets[j].partition)
            if not bool((same >= 0).any()):
                continue
            before = self.vectors.scatter_one(
                i, gathered[j][same.clamp(min=0).to(gathered[j].device)]
            ).to(result)
            known = self.vectors.scatter_one(i, same >= 0)
            here = self.vectors.slices[i]
            result[here] = torch.where(known, before, result[here])
        return result

    def mark(self, event: str) -> None:
        """Note that something happened to these weights in this step; the monitor writes it into
        its history."""
        # Counted and not listed: without a monitor nobody ever takes a list away, and of two
        # monitors only one could.
        self.events[event] = self.events.get(event, 0) + 1

    def group_of(self, target: Target) -> dict[str, Any]:
        """The param group that owns ``target``."""
        return self.groups_of([target])[0]

    def groups_of(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """The param group that owns each of ``targets``."""
        return [self._group_of[target.weight] for target in targets]

    @property
    def invariant(self) -> list[bool]:
        """For each target whether the loss is known not to see its length."""
        return [target.scale_invariant for target in self.targets]


__all__ = ["Plan", "Target"]
