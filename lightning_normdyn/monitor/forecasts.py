"""The forecast of a fit, when it has begun and when it is over: where the norms of each param group
will go, and what is to be said of that.

Before the first step the schedulers are stepped ahead; after it the first row has the norms at the
start, so that nothing waits for the device. At the end the same run is forecast once more, with the
coherence and the energy that its steps have shown. Words:
`lightning_normdyn.theory.forecast_words`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, isfinite
from statistics import fmean
from typing import Any, NamedTuple

from torch.optim import Optimizer

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.flavours import Trainer
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.optimizers.group_numbers import group_number
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.theory.comparison import Turning, compared
from lightning_normdyn.theory.forecast import Advice, GroupWeights, Measured, forecast_group
from lightning_normdyn.theory.forecast_words import MOST_GROUPS, GroupLine, as_table
from lightning_normdyn.theory.schedule import Schedule

from .balance import Point, Span
from .expectations import Expectation
from .group_sizes import group_names
from .horizon import MOST_STEPS, Horizon, horizon_of, schedules_of
from .measure import StepGauge
from .measured_balance import Balance
from .predictions import noise_coherence

# Advice that rests on coherence and energy.
_FROM_NORMS = ("norm shrinks in the cool-down", "norm doubles")

__all__ = ["Ahead", "Forecasts", "line_of", "look_ahead", "title_of"]


class Ahead(NamedTuple):
    """What is known of the param groups of one optimizer before its first step.

    Args:
        optimizer: the optimizer.
        kind: the class whose predictions hold for it.
        horizon: how far the fit goes.
        schedules: one per param group; empty where no step is to come.
        names: what tables call the param groups.
    """

    optimizer: Optimizer
    kind: type
    horizon: Horizon
    schedules: list[Schedule]
    names: list[str]


def look_ahead(
    optimizers: Sequence[Optimizer], configs: Sequence[Any], horizon: Horizon, trainer: Trainer
) -> list[Ahead]:
    """Step the schedulers of a fit ahead.

    Args:
        optimizers: those that step.
        configs: Lightning's settings of all schedulers.
        horizon: how far the fit goes.
        trainer: of the fit.
    """
    ahead = []
    for optimizer, names in zip(optimizers, group_names(optimizers), strict=True):
        kind = class_for_predictions(optimizer)
        schedules = schedules_of(optimizer, configs, horizon, trainer, kind)
        ahead.append(Ahead(optimizer, kind, horizon, schedules, names))
    return ahead


def line_of(
    ahead: Ahead,
    place: int,
    count: int,
    weights: GroupWeights,
    *,
    measured: Measured | None = None,
    steps: int | None = None,
    note: str = "",
) -> list[GroupLine]:
    """The line of one param group; none where its learning rate cannot be read ahead.

    Args:
        ahead: of its optimizer.
        place: of the group.
        count: weights of two or more dimensions in it.
        weights: those whose norms are forecast.
        measured: what a run has shown of them.
        steps: after how many steps the run was over; None: at its planned end.
        note: what else is to be said of it.
    """
    if place >= len(ahead.schedules):
        return []
    schedule = ahead.schedules[place]
    if steps is not None:
        schedule = schedule.first(steps)
    horizon = ahead.horizon
    # It lives on an accelerator, and reading it would wait for the device.
    if not all(map(isfinite, schedule.rates)) or not len(schedule.groups):
        return []
    forecast = forecast_group(
        ahead.kind,
        schedule,
        weights,
        steps_per_epoch=horizon.per_epoch,
        measured=measured,
        goes_on=horizon.goes_on,
    )
    if forecast.is_assumed and not note:
        note = "the learning rate is taken to stay as it is: its scheduler cannot be stepped ahead"
    decay = float(group_number(ahead.optimizer.param_groups[place], "weight_decay"))
    line = GroupLine(
        ahead.names[place],
        count,
        decay,
        forecast,
        steps_per_epoch=horizon.per_epoch,
        is_whole=horizon.steps is not None and horizon.steps <= MOST_STEPS,
        note=note,
    )
    return [line]


def title_of(horizon: Horizon) -> str:
    """The line above a forecast.

    Example:
        >>> title_of(Horizon(3000, None))
        'lightning-normdyn: forecast for 3,000 optimizer steps'
    """
    if horizon.steps is None:
        return (
            "lightning-normdyn: forecast for one relaxation time, since nobody knows how many "
            "steps will come"
        )
    if horizon.steps > MOST_STEPS:
        return (
            f"lightning-normdyn: forecast for the first {MOST_STEPS:,} of {horizon.steps:,} "
            f"optimizer steps"
        )
    return f"lightning-normdyn: forecast for {horizon.steps:,} optimizer steps"


class _Shown(NamedTuple):
    """What a run has shown of one weight.

    Args:
        span: all steps since its norm was last set or its decay last jumped.
        energy: of recent steps, as `lightning_normdyn.theory.growth` has it.
        decay_share: of what holds its norm; None where nobody can tell.
    """

    span: Span
    energy: float
    decay_share: float | None


class Forecasts:
    """The forecasts of one fit.

    Args:
        trainer: of the fit, at the start of training.
        optimizers: those that step, before their first step in this fit.
    """

    def __init__(self, trainer: Trainer, optimizers: Sequence[Optimizer]) -> None:
        self._horizon = horizon_of(trainer, len(trainer.optimizers))
        self._ahead = look_ahead(optimizers, trainer.lr_scheduler_configs, self._horizon, trainer)
        # By weight, the norm of the whole matrix before the first step.
        self._starts: dict[str, float] = {}
        self._told: set[int] = set()

    @property
    def has_more(self) -> bool:
        """Whether some optimizer has not been forecast yet."""
        return len(self._told) < len(self._ahead)

    def awaited(self, gauges: Mapping[int, StepGauge]) -> dict[int, StepGauge]:
        """Those of the optimizers that have not been forecast yet."""
        known = range(len(self._ahead))
        return {i: gauge for i, gauge in gauges.items() if i in known and i not in self._told}

    def at_start(
        self,
        gauges: Mapping[int, StepGauge],
        expectations: Mapping[str, Expectation],
        balances: Mapping[str, Balance],
    ) -> str:
        """The forecast for optimizers of which the first row is there; empty where there is none.

        Args:
            gauges: of these optimizers.
            expectations: of scale-invariant weights, from that row.
            balances: of all weights, from that row.
        """
        lines: list[GroupLine] = []
        left_out = 0
        for index, gauge in gauges.items():
            self._told.add(index)
            ahead = self._ahead[index]
            for place, targets in _by_group(ahead, gauge).items():
                free = [t for t in targets if gauge.effects[t.name] == Effects()]
                self._remember_starts(free, balances)
                # A course takes time, and of hundreds of groups nobody would read all.
                if free and len(lines) == MOST_GROUPS:
                    left_out += 1
                elif free:
                    # Of other weights nobody knows the coherence in advance.
                    known = [t for t in free if t.name in expectations]
                    weights = GroupWeights.of(
                        (expectations[t.name].start, gauge.lengths[t.name], t.matrix) for t in known
                    )
                    note = _note(len(targets) - len(free))
                    lines += line_of(ahead, place, len(targets), weights, note=note)
        if not lines:
            return ""
        return as_table(title_of(self._horizon), lines, left_out=left_out)

    def _remember_starts(self, targets: Sequence[Target], balances: Mapping[str, Balance]) -> None:
        """The norms of whole matrices before the first step."""
        for target in targets:
            balance = balances.get(target.name)
            if balance is not None and balance.newest is not None:
                self._starts[target.name] = balance.newest.squared_norm**0.5

    def at_end(
        self,
        gauges: Mapping[int, StepGauge],
        balances: Mapping[str, Balance],
        steps: Sequence[int],
    ) -> str:
        """The forecast of the same run with what it has shown; empty where it has shown nothing.

        Args:
            gauges: of the optimizers.
            balances: of all weights, at the end.
            steps: that each optimizer has taken in this fit.
        """
        lines: list[GroupLine] = []
        left_out = 0
        advice: list[Advice] = []
        for index, gauge in gauges.items():
            if index >= min(len(self._ahead), len(steps)):
                continue
            ahead = self._ahead[index]
            turning = []
            for place, targets in _by_group(ahead, gauge).items():
                shown = _shown(ahead, gauge, targets, balances)
                if not shown or place >= len(ahead.schedules):
                    continue
                peak_lr = max(ahead.schedules[place].rates)
                turning += [_turning(name, each, peak_lr) for name, each in shown.items()]
                if len(lines) == MOST_GROUPS:
                    left_out += 1
                else:
                    lines += self._line_at_end(ahead, place, targets, shown, steps[index])
            advice += compared(turning)
        title = "lightning-normdyn: the same run, forecast with the coherence it has shown"
        return as_table(title, lines, advice, left_out=left_out) if lines else ""

    def _line_at_end(
        self,
        ahead: Ahead,
        place: int,
        targets: Sequence[Target],
        shown: Mapping[str, _Shown],
        steps: int,
    ) -> list[GroupLine]:
        known = [t for t in targets if t.name in shown and isfinite(self._starts.get(t.name, inf))]
        if not known:
            return []
        weights = GroupWeights.of((self._starts[t.name], t.entries, t.matrix) for t in known)
        measured = Measured([], [])
        for target in known:
            measured.coherence.append(shown[target.name].span.coherence)
            measured.energy.append(shown[target.name].energy)
        lines = line_of(ahead, place, len(targets), weights, measured=measured, steps=steps)
        return [_without_advice_on_schedules(line) for line in lines]


def _without_advice_on_schedules(line: GroupLine) -> GroupLine:
    """What follows from the schedule alone was said at the start."""
    advice = [each for each in line.forecast.advice if each.kind in _FROM_NORMS]
    return replace(line, forecast=replace(line.forecast, advice=tuple(advice)))


def _by_group(ahead: Ahead, gauge: StepGauge) -> dict[int, list[Target]]:
    """The weights that are measured, by the place of their param group."""
    groups = ahead.optimizer.param_groups
    # By identity: groups may be equal.
    places = {id(group): place for place, group in enumerate(groups)}
    targets = gauge.plan.targets
    by_group: dict[int, list[Target]] = {}
    for target, group in zip(targets, gauge.plan.groups_of(targets), strict=True):
        # A view of an optimizer may show other dictionaries each time.
        if id(group) in places:
            by_group.setdefault(places[id(group)], []).append(target)
    return by_group


def _note(treated: int) -> str:
    if not treated:
        return ""
    return f"callbacks act on {treated} of its weights, which are not forecast"


def _shown(
    ahead: Ahead,
    gauge: StepGauge,
    targets: Sequence[Target],
    balances: Mapping[str, Balance],
) -> dict[str, _Shown]:
    """What a run has shown of those weights on which the optimizer alone acts."""
    shown = {}
    groups = gauge.plan.groups_of(targets)
    for target, group in zip(targets, groups, strict=True):
        name = target.name
        effects = gauge.effects[name]
        balance = balances.get(name)
        if balance is None or effects != Effects():
            continue
        window = balance.window
        span = window.whole
        energy = _energy(ahead.kind, group, target, window.points)
        # The newest steps may be a cool-down, in which nothing turns. Yet they tell whether enough
        # was turned for a coherence at all.
        if span is None or window.newest_span(gauge.entries[name]) is None:
            continue
        if energy is None or not isfinite(span.coherence):
            continue
        share = None
        # No loss can pull at a weight whose length it does not see.
        noise = (
            None
            if target.scale_invariant
            else noise_coherence(ahead.optimizer, group, effects, target.matrix)
        )
        if noise is not None and span.pulls > 0:
            # λ of the loss over that of decay; where the loss pushes outwards, decay holds alone.
            pulls = span.loss_decay(noise) / (span.pulls / span.rates)
            share = 1 / (1 + max(0.0, pulls))
        shown[name] = _Shown(span, energy, share)
    return shown


def _energy(
    kind: type, group: Mapping[str, Any], target: Target, points: Sequence[Point]
) -> float | None:
    """The energy of steps, averaged over the newer half of a window; None at a rate of 0."""
    response = own_response(kind, group, Subject(target.matrix))
    energies = []
    for point in points[len(points) // 2 :]:
        energy = point.energy
        # Steps in proportion to the gradient fall as the norm grows.
        if response is not None and not response.normalized:
            energy *= point.squared_norm
        if isfinite(energy):
            energies.append(energy)
    return fmean(energies) if energies else None


def _turning(
    name: str,
    shown: _Shown,
    peak_lr: float,
) -> Turning:
    span = shown.span
    return Turning(
        name,
        angle=(span.angles / span.steps) ** 0.5,
        coherence=span.coherence,
        lr=span.rates / span.steps,
        pull=span.pulls / span.steps,
        peak_lr=peak_lr,
        decay_share=shown.decay_share,
    )
