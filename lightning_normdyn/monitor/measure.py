"""Measures the steps of one optimizer on the device: sums over vectors before and after an update
become the quantities of the table, and these become sums that travel to the host.

Nothing but `mean_norms` waits for the device. Legend: ``n`` vectors of this rank, ``w`` weights,
``k`` numbers that are averaged over vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.geometry.formulas import fuses_formulas, work_out
from lightning_normdyn.geometry.fusion import Number
from lightning_normdyn.optimizers.group_numbers import with_plain_numbers, without_params
from lightning_normdyn.optimizers.state import has_stepped
from lightning_normdyn.optimizers.step import Phase, Step

from .by_weight import Doubles, Flags
from .histograms import PACKED, Histogram, bin_vectors, unpack
from .measured_balance import MatrixSums
from .monitored_weights import MonitoredWeights
from .passed_steps import PassedSteps
from .pulls import decay_of_vectors
from .quantities import QUANTITIES, of_matrices, to_measure
from .step_sums import StepSums
from .vector_numbers import (
    UNLOGGED,
    VOUCHED,
    Idle,
    collapsed,
    kept_by_name,
    numbers_of_vectors,
    values_of,
)

WHOLE = len(MatrixSums._fields)
"""Sums over all vectors of a weight as one."""

COLLAPSED = 1e-3
"""A vector this much shorter than the mean of its weight has collapsed."""


@dataclass(frozen=True)
class Look:
    """Why a step is measured.

    Args:
        due: it is asked for, and not only taken because the fit may end with it.
        overdue: a logging step asks for it, so loggers get it; else it is the first of the fit.
    """

    due: bool
    overdue: bool


@dataclass
class Reading:
    """One measured step on the host, summed over the vectors of all ranks.

    Args:
        totals: ``(k, w)``, sums; of squares, for what is averaged as RMS.
        counts: ``(k, w)``, how many vectors each sum is over.
        matrices: ``(w,)``, of each weight all vectors as one.
        collapsed: ``(w,)``, vectors much shorter than the mean of their weight.
        histograms: by log key.
    """

    totals: Doubles
    counts: Doubles
    matrices: MatrixSums
    collapsed: Doubles
    histograms: dict[str, Histogram]


@dataclass
class Measured:
    """One measured step, still on the device and on the rank that holds the vectors.

    Args:
        gauge: who measured it.
        step: the x axis.
        optimizer_step: the optimizer's own count.
        look: why it was measured.
        values: ``(2 k + 6, n)``: what to sum over vectors, whether it counts, the sums of whole
            matrices, and the size, 0 where it is not finite.
        size: ``(n,)``.
        active: ``(n,)`` bool, vectors of weights that got a gradient; None: all.
        binned: ``(quantities with histograms, n)``, if there are to be any.
        kept: ``(2, n)``: norm and applied decay, if the history keeps vectors.
        skipped: ``(1,)``: 1 if the device skipped the update.
        groups: the hyperparameters of every param group at this very step.
        places: for each weight, the place of its param group.
        passed: with which hyperparameters the steps up to this one were taken.
        warm: ``(w,)``, which weights the optimizer had stepped before.
    """

    gauge: StepGauge
    step: int
    optimizer_step: int
    look: Look
    values: Tensor
    size: Tensor
    active: Tensor | None
    binned: Tensor | None
    kept: Tensor | None
    skipped: Tensor
    groups: list[dict[str, Any]]
    places: list[int]
    passed: PassedSteps
    warm: Flags

    @property
    def plan(self) -> Plan:
        """The weights."""
        return self.gauge.plan

    def reduce(self) -> Tensor:
        """All that goes to the host, over the vectors of all ranks, for `read`.

        Every rank must call it. Two small collectives, and two more for histograms; none where
        every rank holds all vectors.
        """
        vectors = self.plan.vectors
        # One collective for all sums; the second needs the mean size that this one gives.
        *totals, sizes = vectors.totals(self.values)
        numbers = self.size, sizes / vectors.count, vectors.weight_of, COLLAPSED, self.active
        (is_collapsed,) = work_out(vectors, collapsed, None, numbers)
        parts = [*totals, vectors.totals(is_collapsed)]
        if self.binned is not None:
            parts.append(bin_vectors(vectors, self.binned).flatten())
        # The flag travels with the sums: to ask for it here would wait for the device.
        return torch.cat([*parts, self.skipped])

    def read(self, numbers: Doubles) -> Reading | None:
        """What `reduce` gave, once it is on the host; None if the device skipped the update."""
        # A skipped update left the weights as they were: its angle of 0 would lower every mean.
        if numbers[-1]:
            return None
        kinds = len(self.gauge.measured)
        rows = 2 * kinds + WHOLE + 1
        width = len(self.plan.targets)
        table = numbers[: rows * width].reshape(rows, width)
        totals, counts = table[:kinds], table[kinds : 2 * kinds]
        sums = table[2 * kinds : -1]
        histograms = {}
        if self.binned is not None:
            histograms = self._histograms(numbers[rows * width : -1])
        return Reading(totals, counts, MatrixSums(*sums), table[-1], histograms)

    def _histograms(self, numbers: Doubles) -> dict[str, Histogram]:
        found = {}
        packed = numbers.reshape(len(self.gauge.binned), -1, PACKED).tolist()
        for quantity, histograms in zip(self.gauge.binned, unpack(packed), strict=True):
            for target, histogram in zip(self.plan.targets, histograms, strict=True):
                if histogram is not None:
                    found[f"{quantity}_histogram/{target.name}"] = histogram
        return found

    def kept_vectors(self, *, wanted: bool) -> Tensor:
        """Every vector's norm and applied decay, for `read_vectors`: flat, and empty if the history
        keeps none or if another rank keeps it.

        Every rank must call it; a collective where vectors lie on several.

        Args:
            wanted: whether this rank keeps the history.
        """
        nothing = self.values.new_empty(0)
        if self.kept is None:
            return nothing
        # Before the return: a rank that keeps no history takes part in the collective all the same.
        gathered = self.plan.vectors.gather(self.kept)
        return torch.cat(gathered, dim=-1).flatten() if wanted else nothing

    def read_vectors(self, numbers: Doubles) -> dict[str, Any]:
        """What `kept_vectors` gave, once it is on the host, by name."""
        return kept_by_name(self.plan.targets, numbers) if len(numbers) else {}


class StepGauge:
    """Measures the steps of one optimizer: which quantities apply to its weights, and what between
    the weight before and after an update they need.

    Args:
        plan: the weights.
        effects: which other callbacks act on each of them, and with which numbers.
        quantities: names that a person asked for; None: all that apply.
        keeps_vectors: whether the history keeps the norm of every vector.

    Attributes:
        names: the quantities that are measured, needed by the loggers or by predictions.
        effects: by weight.
        weights: what of them is the same in every row.
        entries: by weight, of all its vectors.
        lengths: by weight, entries of one vector.
        spare: memory of an earlier measurement that may be used again.
    """

    def __init__(
        self,
        plan: Plan,
        effects: Sequence[Effects],
        quantities: Sequence[str] | None,
        *,
        keeps_vectors: bool,
    ) -> None:
        self.plan = plan
        self.spare: Tensor | None = None
        of_matrices_of = []
        for target, effect in zip(plan.targets, effects, strict=True):
            steered, invariant = effect.rotation is not None, target.scale_invariant
            of_matrices_of.append(of_matrices(quantities, invariant, steered=steered))
        self._warm = np.zeros(len(plan.targets), dtype=np.bool_)
        self._cold: list[int] = np.flatnonzero(~self._warm).tolist()
        self._known_places: tuple[list[int], list[int]] | None = None
        standardized = [target.weight_standardized for target in plan.targets]
        self.standardized = plan.spread(standardized) if any(standardized) else None
        shrunk = any(effect.shrink or effect.decaying for effect in effects)
        asked = to_measure(quantities, standardized=any(standardized), shrunk=shrunk)
        # Predictions and verdicts rest on the norm, the angle, and the present decay.
        needed = ["weight_norm", "angular_update", *(["equivalent_weight_decay"] if shrunk else [])]
        self.names = list(dict.fromkeys([*asked, *needed]))
        self.weights = MonitoredWeights(plan.targets, self.names, of_matrices_of)
        self.entries = dict(zip(self.weights.names, map(int, self.weights.entries), strict=True))
        self.lengths = dict(zip(self.weights.names, map(int, self.weights.lengths), strict=True))
        self.take_effects(effects)
        # A shrink just before the step may be as small as 1e-7, and a mean much larger than the
        # standard deviation beside it: more than sums in float32 can tell. And a replay compares
        # its own norms with those kept.
        asks_exactly = any(QUANTITIES[name].exact for name in asked)
        self._is_exact = shrunk or keeps_vectors or any(standardized) or asks_exactly
        self._keeps_vectors = keeps_vectors
        self._idle = Idle.of(plan)
        self._newest = 0  # number of the step of the newest look at idle vectors
        vectors = plan.vectors
        self._not_skipped = torch.zeros(1, dtype=vectors.sum_dtype, device=vectors.device)
        self._sums_before: dict[str, Any] = {}
        self._norms_before: Tensor | None = None

    @property
    def measured(self) -> list[str]:
        """All that is averaged over vectors."""
        return [*self.names, *UNLOGGED]

    @property
    def binned(self) -> list[str]:
        """The measured quantities of which there are histograms."""
        return [name for name in self.names if QUANTITIES[name].histogram]

    def take_effects(self, effects: Sequence[Effects]) -> None:
        """What other callbacks do may change from epoch to epoch (WRS in its window)."""
        plan = self.plan
        one_of = {effect: effect for effect in effects}  # equal ones are then found at once
        names = self.weights.names
        self.effects = dict(zip(names, [one_of[effect] for effect in effects], strict=True))
        self.weights.take_effects(list(self.effects.values()))
        shrinks = [effect.shrink for effect in effects]
        # NaN, not 0: every mean leaves it out, while a 0 would be averaged as a strength.
        alphas = [nan if shrink is None else shrink.alpha for shrink in shrinks]
        vectors = plan.vectors
        of_weights = torch.tensor(alphas, dtype=vectors.sum_dtype, device=vectors.device)
        self._alpha = vectors.spread(of_weights)
        self._alpha_of_std = plan.spread(
            [shrink is not None and shrink.statistic == "std" for shrink in shrinks]
        )

    def before(self, step: Step, log_scale: Tensor | None = None) -> None:
        """Sum over the weights that the gradient was taken at; have them copied before the
        update; ``log_scale`` is ``(n,)``, of `lightning_normdyn.engine.combined`."""
        plan = self.plan
        bracket = step.bracket
        number = plan.number(step)
        # Whom the optimizer has stepped, it has stepped for good.
        for place in self._cold:
            self._warm[place] = has_stepped(plan.optimizer, plan.targets[place].weight, number)
        self._cold = np.flatnonzero(~self._warm).tolist() if self._cold else []
        vectors = plan.vectors
        weights = vectors.values()
        gradients = vectors.gradients()
        pairs = (
            (weights, weights),
            (weights, gradients),
            (gradients, gradients),
            (weights, None),
        )
        asked = pairs if self._is_exact else pairs[:3]
        # Where nothing changes the weights from here to the snapshot, that has the same norms, and
        # a CPU can take it in the same pass. Elsewhere one kernel copies all weights.
        is_unchanged = not self._is_exact and not bracket.acts_between(
            Phase.MEASURE, Phase.SNAPSHOT
        )
        copies_now = is_unchanged and vectors.device.type == "cpu"
        copy = (weights, bracket.early_snapshot(vectors.weights, weights)) if copies_now else None
        ww, wg, gg, *ones_w = vectors.inner(*asked, exact=self._is_exact, copy=copy)
        scale = getattr(step.optimizer, "grad_scale", None)
        # A fused optimizer unscales the gradients inside its kernel, so here they are still scaled.
        if scale is not None:
            wg = wg / scale.to(wg)
            gg = gg / scale.to(gg) ** 2
        # A kernel that reads the snapshot anyway takes its norms for nothing.
        needs_norms = is_unchanged and not fuses_formulas(vectors)
        self._norms_before = ww.sqrt() if needs_norms else None
        self._sums_before = {
            "lr": plan.rates().clone(),
            "ww": ww,
            "wg": wg,
            "gg": gg,
            "ones_w": ones_w[0] if ones_w else None,
            "decay": decay_of_vectors(plan, self.effects),
            "log_scale": log_scale,
        }
        if not copies_now:
            bracket.request_snapshot(vectors.storages())

    def after(self, step: Step, target_angle: Tensor | None = None) -> StepSums:
        """All sums of the step of `before`; ``target_angle`` is ``(n,)``."""
        # Let go of them now: until the next logging step they would only take memory.
        sums_before, self._sums_before = self._sums_before, {}
        norms, self._norms_before = self._norms_before, None
        vectors = self.plan.vectors
        before = vectors.snapshots(step.bracket)
        ss, sd, dd = vectors.displacement(before, exact=self._is_exact, norms=norms)
        return StepSums(
            **sums_before,
            ss=ss,
            sd=sd,
            dd=dd,
            entries=vectors.length,
            standardized=self.standardized,
            alpha=self._alpha,
            alpha_of_std=self._alpha_of_std,
            target_angle=target_angle,
        )

    def measure(
        self,
        step: Step,
        sums: StepSums,
        look: Look,
        *,
        now: int,
        histograms: bool,
        applied_decay: Tensor | None,
        passed: PassedSteps,
    ) -> Measured:
        """The numbers of a step, ready to be summed over vectors.

        Args:
            step: the step.
            sums: from `after`.
            look: why it is measured.
            now: the x axis.
            histograms: whether a logger shows them.
            applied_decay: ``(n,)``, for the history of single vectors.
            passed: the steps up to this one.
        """
        number = self.plan.number(step)
        passed_since = max(0, min(number - self._newest, VOUCHED))
        self._newest = number
        active = self.plan.mask(step)
        binned = None
        if fuses_formulas(self.plan.vectors) and not (histograms and self.binned):
            packed, size = self._packed_at_once(sums, passed_since, active)
        else:
            values, idle_steps = values_of(self.names, sums, passed_since, self._idle)
            self._idle.steps.copy_(idle_steps)
            packed, size = self._pack(values, sums, active), sums.size
            if histograms and self.binned:
                binned = self._binned(values, active)
        # Most updates cannot be skipped on the device, so there is no flag to read.
        if step.skipped is None:
            skipped = self._not_skipped
        else:
            skipped = step.skipped.to(packed.dtype).reshape(1)
        return Measured(
            gauge=self,
            step=now,
            optimizer_step=number,
            look=look,
            values=packed,
            size=size,
            active=active,
            binned=binned,
            kept=None if applied_decay is None else torch.stack([sums.norm, applied_decay]),
            skipped=skipped,
            # Copies: a schedule may have moved on when they are read.
            groups=[
                with_plain_numbers(without_params(group))
                for group in self.plan.optimizer.param_groups
            ],
            places=self._places(),
            passed=passed.copy(),
            warm=self._warm.copy(),
        )

    def _places(self) -> list[int]:
        """For each target the place of its param group, by identity: a dict is no key."""
        groups = list(map(id, self.plan.optimizer.param_groups))
        # A plan's groups stay those of its start, so that only a new one among them moves a place.
        if self._known_places is None or self._known_places[0] != groups:
            places = {group: i for i, group in enumerate(groups)}
            of_targets = self.plan.groups_of(self.plan.targets)
            self._known_places = groups, [places[id(group)] for group in of_targets]
        return self._known_places[1]

    def _binned(self, values: list[Tensor], active: Tensor | None) -> Tensor:
        by_name = dict(zip(self.names, values, strict=False))
        binned = torch.stack([by_name[name] for name in self.binned])
        if active is None:
            return binned
        # No bin counts a NaN. The angle of a weight outside this step would be 0.
        return torch.where(active, binned, nan)

    def _room(self, n: int) -> Tensor:
        """Memory for `Measured.values`."""
        # That of the last logging step, if nobody needs it any more: 7 million vectors times a
        # dozen numbers are worth keeping.
        out = self.spare
        self.spare = None
        rows = 2 * len(self.measured) + WHOLE + 1
        if out is None or out.shape != (rows, n):
            vectors = self.plan.vectors
            out = torch.empty(rows, n, dtype=vectors.sum_dtype, device=vectors.device)
        return out

    def _packed_at_once(
        self,
        sums: StepSums,
        passed: int,
        active: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`_pack` and the size of each vector, where a formula is one launch."""
        vectors = self.plan.vectors
        out = self._room(vectors.n)
        idle = self._idle
        of_step = [getattr(sums, field.name) for field in fields(sums)]
        numbers = tuple(self.names), Number(passed), idle.steps, idle.log_smallest, active
        into = *out.unbind(), None, idle.steps
        *_, size, _ = work_out(vectors, numbers_of_vectors, None, (*numbers, *of_step), into)
        return out, size

    def _pack(self, values: list[Tensor], sums: StepSums, active: Tensor | None) -> Tensor:
        """What is to be summed over vectors, in one tensor: `Measured.values`.

        A number that is not finite is left out (the effective learning rate of a vector of length 0
        is undefined), but not where the weight or its gradient is not finite either: there the mean
        over the vectors is not finite, and shall say so.
        """
        count = len(values)
        size = sums.size
        out = self._room(len(size))
        numbers = out[:count]
        counts = out[count : 2 * count]
        torch.stack(values, out=numbers)
        # 1 where a number is finite: 0 times infinity is none.
        torch.mul(numbers, 0, out=counts).eq_(0)
        diverged = torch.isfinite(sums.ww + sums.gg + sums.ss + sums.dd).logical_not_()
        torch.maximum(counts, diverged.to(size.dtype), out=counts)
        if active is not None:
            counts.mul_(active)
        numbers.masked_fill_(counts == 0, 0.0)
        # Of a weight that is not finite, none of these is: there is no balance then.
        torch.stack(sums.whole, out=out[2 * count : -1])
        # One infinite length would raise the mean, and all other vectors would look collapsed.
        out[-1] = size
        out[-1].nan_to_num_(0.0, 0.0, 0.0)
        for i, name in enumerate(self.names):
            # Sums of squares add up over ranks and optimizers, roots do not.
            if QUANTITIES[name].average == "rms":
                numbers[i].square_()
        return out


def mean_norms(plan: Plan) -> dict[str, float]:
    """The mean norm of each weight at this moment, by name; it waits for the device.

    Every rank must call it.
    """
    means = (sum_norms(plan) / plan.vectors.count).tolist()
    return {target.name: mean for target, mean in zip(plan.targets, means, strict=True)}


def sum_norms(plan: Plan) -> Tensor:
    """``(w,)``: the sum of the norms of each weight's vectors; every rank must call it."""
    return plan.vectors.totals(plan.vectors.norms())
