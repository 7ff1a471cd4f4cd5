"""From measured steps on the host to one row: averages by weight and over all scale-invariant
vectors, the predictions beside them, and what is worth a warning.

Everything is worked out before anything is changed: a signal handler may save a checkpoint between
any two lines of Python. Over 500 lines, because all parts of a row fill the same draft.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, nan, sqrt
from statistics import median
from typing import Any

import torch

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.optimizers.recognition import has_plain_rate
from lightning_normdyn.optimizers.step import HostCopy

from .alarms import Alarms
from .averages import Averages
from .expected_norms import Interval, WeightStep, follow
from .histograms import Histogram
from .ledger import Ledger, Norms, Row
from .loggers import told_to_trainer
from .measure import Measured, Reading
from .measured_balance import (
    OF_ONE_STEP,
    Balance,
    MatrixSums,
    quantities_of,
    quantities_of_step,
)
from .passed_steps import Stretch
from .predictions import Predictor, noise_coherence
from .pulls import Strength, strength_of
from .quantities import QUANTITIES
from .verdicts import Course

LR_DROP = 1.5
"""A learning rate that was constant and is this much lower at the next record has dropped; a
schedule that glides never does."""

SAME_RATE = 1e-3
"""Relative difference up to which two rates are the same constant."""

_RESTS_ON = ("weight_norm", "gradient_scale", "equivalent_weight_decay")
"""What a prediction is computed from."""


@dataclass
class Sent:
    """What was measured in one batch, on its way to the host.

    Args:
        results: one per optimizer that was measured.
        sizes: how many of the numbers belong to each result; one more is the number of clamped
            vectors, if anybody counts them.
        numbers: all of them, in one transfer.
        vectors: what the history keeps of each result's vectors.
        events: kinds of what happened since the results before these.
        marked: how often it had happened by then.
        skipped_steps: of the whole run.
        shown: whether loggers get it.
    """

    results: list[Measured]
    sizes: list[int]
    numbers: HostCopy
    vectors: list[dict[str, Any]]
    events: tuple[str, ...]
    marked: dict[tuple[int, int, str], int]
    skipped_steps: int
    shown: bool


class RowDraft:
    """A row while results are added to it, and what became of them in the end.

    Args:
        ledger: what was known before it; it is not changed.
        sent: the results.
        alarms: who warns.

    Attributes:
        ledger: after `finish`, the one that the row goes into.
        row: after `finish`, what the history is told; None if the device skipped every update.
        histograms: by log key.
        concerns: warnings to give, each as a function to call.
    """

    def __init__(
        self,
        ledger: Ledger,
        sent: Sent,
        alarms: Alarms,
    ) -> None:
        self.ledger = ledger
        self.row: Row | None = None
        self.histograms: dict[str, Histogram] = {}
        self.concerns: list[Callable[[], None]] = []
        self._sent = sent
        self._alarms = alarms
        self._step = sent.results[0].step
        self._optimizer_step = 0
        self._values: dict[str, float] = {}
        self._vectors: dict[str, Any] = {}
        self._not_finite: list[str] = []
        self._dropped = False
        self._collapsed = 0.0
        self._means: dict[str, dict[str, float]] = {}
        # What the ledger will hold, in copies.
        self._courses = dict(ledger.courses)
        self._expectations = dict(ledger.expectations)
        self._balances = dict(ledger.balances)
        self._norms = dict(ledger.norms)
        self._rates = dict(ledger.rates)
        self._measured = dict(ledger.measured)
        self._counted = dict(ledger.counted)
        self._in_row: set[int] = set()  # optimizers
        # Over all scale-invariant vectors: sum and count by name.
        self._overview: dict[str, tuple[float, float]] = {}
        # Squared angles, squared predictions and their number, of vectors with a prediction; the
        # same of vectors with an expectation, and their squared norms.
        self._compared = [0.0] * 3
        self._awaited = [0.0] * 4

    def fill(self, *, only_due: bool) -> None:
        """Add the results whose update happened; with ``only_due``, without those that were
        measured because the fit may end with them."""
        sent = self._sent
        numbers = sent.numbers.get().tolist()
        for result, size, vectors in zip(sent.results, sent.sizes, sent.vectors, strict=True):
            # In the order in which they were put together; what is left over is of no result.
            own = numbers[:size]
            numbers = numbers[size:]
            reading = result.read(own)
            if reading is not None and (result.look.due or not only_due):
                self._add(result, reading)
                self._vectors.update(vectors)
        # Without AWS nobody counts clamped vectors: a 0 would say that somebody looked.
        if numbers:
            self._values["normdyn/clamped_vectors"] = numbers[-1]

    def _add(self, result: Measured, reading: Reading) -> None:
        index = result.plan.index
        # Of several optimizers in one row, the number of the first stands for the row.
        self._optimizer_step = self._optimizer_step or result.optimizer_step
        self._counted[index] = result.optimizer_step
        self._in_row.add(index)
        if result.look.due:
            self._measured[index] = self._step
        # By weight and not by optimizer: a person looks for a name.
        self.histograms.update(reading.histograms)
        predictor = Predictor(result.plan.optimizer, result.groups, result.optimizer_step)
        # All weights at once: Python takes ten times as long for each of them.
        averages = Averages(result.gauge.measured, reading.totals, reading.counts)
        for j, target in enumerate(result.plan.targets):
            self._add_weight(result, target, j, averages, predictor)
            # Only where the direction alone counts is a short vector trouble: it turns ever faster.
            if target.scale_invariant:
                self._collapsed += reading.collapsed[j]
        # One function for all weights: what is kept for each of a thousand until the row is there
        # costs Python's garbage collector.
        self.concerns.append(partial(self._look_for_trouble, result, averages, self._norms))
        self._pool(result, reading)
        interval = self._interval(result)
        self._add_expected(result, reading, interval)
        self._add_balances(result, reading, interval)

    def _look_for_trouble(
        self, result: Measured, averages: Averages, norms: Mapping[str, Norms]
    ) -> None:
        """Warn of weights whose norm overflows and of vectors that only decay."""
        for j, target in enumerate(result.plan.targets):
            if "weight_norm" in self._means[target.name]:
                self._alarms.overflow(target, norms[target.name])
            if target.scale_invariant and averages.total_of("dead", j):
                group = result.groups[result.places[j]]
                self._alarms.dead(result.gauge, target, group, averages.sums_of(j))

    def _add_weight(
        self,
        result: Measured,
        target: Target,
        j: int,
        averages: Averages,
        predictor: Predictor,
    ) -> None:
        name = target.name
        means = averages.of(j)
        if not averages.are_finite[j]:
            self._not_finite.append(name)
        self._means[name] = means
        compared = self._compare(result, target, result.places[j], means, predictor)
        # As written in the table of quantities: what is measured stands before what it is compared
        # with.
        for quantity in result.gauge.names:
            if quantity in means:
                self._values[f"{quantity}/{name}"] = means[quantity]
        for quantity, value in compared.items():
            self._values[f"{quantity}/{name}"] = value

        if "weight_norm" in means:
            known = self._norms.get(name, Norms(means["weight_norm"]))
            self._norms[name] = known.seen_at(result.optimizer_step, means["weight_norm"])
        if "lr" in means:
            before = self._rates.get(name, ())
            self._rates[name] = (*before[-1:], means["lr"])
            # One weight is enough: param groups may drop at different steps, and each drop is
            # marked.
            self._dropped |= _has_dropped(before, means["lr"])
        if target.scale_invariant and "equilibrium_angular_update" in compared:
            # Of all vectors with a prediction the squares are pooled: predictions are about the
            # root mean square, and a mean of the weights' ratios would be another number.
            squares, count = averages.sums_of(j)["angular_update"]
            predicted = compared["equilibrium_angular_update"] ** 2 * count
            _add_to(self._compared, squares, predicted, count)

    def _compare(
        self,
        result: Measured,
        target: Target,
        place: int,
        means: Mapping[str, float],
        predictor: Predictor,
    ) -> dict[str, float]:
        """What the weight settles at and how its angle compares, if it is scale-invariant and its
        optimizer is understood."""
        if not target.scale_invariant or "lr" not in means or "weight_norm" not in means:
            return {}
        # A copy: the ledger there is must not change before the next one is in its place.
        course = self._courses.get(target.name, Course()).fork()
        self._courses[target.name] = course
        # At a rate of 0 nothing moves: the last prediction stands.
        if means["lr"] == 0:
            return {}
        gauge = result.gauge
        prediction_from = partial(
            predictor.predict,
            place,
            gauge.effects[target.name],
            length=gauge.lengths[target.name],
            shape=target.matrix,
        )
        if not all(isfinite(means.get(name, 0.0)) for name in _RESTS_ON):
            # A run that diverged has no prediction any more; its curves shall show where.
            would_be = {**means, **dict.fromkeys(_RESTS_ON, 1.0)}
            had_one = course.latest is not None
            if had_one or prediction_from(would_be) is not None:
                return _from_prediction(nan, nan)
            return {}
        prediction = prediction_from(means)
        course.add(result.optimizer_step, prediction)
        if prediction is None or "angular_update" not in means:
            return {}
        return _from_prediction(means["angular_update"], prediction.angular_update)

    # -- what rests on all steps since the newest row

    def _interval(self, result: Measured) -> Interval:
        """The steps since the newest row of this optimizer."""
        newest = self.ledger.counted.get(result.plan.index)
        stretches = [] if newest is None else result.passed.since(newest)
        return Interval(
            result.plan.optimizer,
            result.groups,
            result.optimizer_step,
            stretches,
            has_plain_rate(result.plan.optimizer),
        )

    def _add_balances(
        self,
        result: Measured,
        reading: Reading,
        interval: Interval,
    ) -> None:
        """Extend the window of each weight, and add what it shows."""
        strengths = _Strengths(result, interval)
        has_jumped = result.plan.index in self.ledger.new_jumps(self._sent.marked)
        for j, target in enumerate(result.plan.targets):
            name = target.name
            means = self._means[name]
            # Without a gradient the weight was not stepped, nor decayed.
            if "angular_update" not in means:
                self._balances.pop(name, None)
                continue
            effects = result.gauge.effects[name]
            place = result.places[j]
            balance = self._balances.get(name, Balance()).after(
                result.optimizer_step,
                reading.matrices[j],
                means.get("lr", nan),
                Strength(nan) if _is_rounded(target) else strengths.now(place, effects),
                strengths.passed(place, effects),
                is_set=has_jumped and (effects.rescaling is not None or effects.jumps is not None),
            )
            self._balances[name] = balance
            wanted = result.gauge.of_matrices[name]
            # Nobody has an expectation of its optimizer: what it is held against is its balance,
            # and without one, how fast its norm moves is what can be said.
            is_expected = name in self._expectations or f"expected_ratio/{name}" in self._values
            if not is_expected and "balance_ratio" not in wanted:
                wanted = [*wanted, "norm_drift", "balance_ratio"]
            if not wanted:
                continue
            # To look for a span of steps takes ten times as long as all else here.
            if OF_ONE_STEP.issuperset(wanted):
                shown = quantities_of_step(balance)
            else:
                group = result.groups[place]
                kappa0 = noise_coherence(result.plan.optimizer, group, effects, target.matrix)
                shown = quantities_of(balance, result.gauge.entries[name], kappa0)
            for quantity in wanted:
                if quantity in shown:
                    self._values[f"{quantity}/{name}"] = shown[quantity]

    def _add_expected(
        self,
        result: Measured,
        reading: Reading,
        interval: Interval,
    ) -> None:
        """Walk the courses of scale-invariant weights up to this step, and compare with them."""
        gauge = result.gauge
        angle_row = gauge.measured.index("angular_update")
        totals, counts = reading.totals[angle_row].tolist(), reading.counts[angle_row].tolist()
        steps = []
        squares_of = {}
        for j, target in enumerate(result.plan.targets):
            name = target.name
            means = self._means[name]
            is_known = all(isfinite(means.get(key, nan)) for key in ("lr", "angular_update"))
            # A single number has no direction.
            if not target.scale_invariant or not is_known or gauge.lengths[name] < 2:
                continue
            if _is_rounded(target):
                continue
            squares_of[name] = totals[j], counts[j]
            step = WeightStep(
                name,
                result.places[j],
                gauge.effects[name],
                gauge.lengths[name],
                target.matrix,
                norm=sqrt(reading.matrices[j].ww / gauge.counts[name]),
                angle=means["angular_update"],
                lr=means["lr"],
                gradient_scale=means.get("gradient_scale", 0.0),
                is_warm=name in result.warm,
            )
            steps.append(step)
        for name, expected in follow(interval, steps, self.ledger.expectations).items():
            self._expectations[name] = expected.expectation
            if expected.angle is not None and expected.norm is not None:
                self._await(name, squares_of[name], expected.angle, expected.norm)
        for j, target in enumerate(result.plan.targets):
            aim = _steered_to(gauge.effects[target.name], reading.matrices[j])
            if aim is not None and target.name in squares_of:
                self._await(target.name, squares_of[target.name], *aim)

    def _await(
        self, name: str, measured: tuple[float, float], angle: float, norm: float | None
    ) -> None:
        """Compare a weight with what is expected of it in this step.

        Args:
            name: of the weight.
            measured: sum and number of its squared angles.
            angle: what is expected.
            norm: what is expected; None where nobody can tell.
        """
        compared = _from_expectation(self._means[name]["angular_update"], angle, norm or nan)
        for key, value in compared.items():
            if norm is not None or key != "expected_weight_norm":
                self._values[f"{key}/{name}"] = value
        squares, count = measured
        # As products: the power of a float that is too large raises.
        squared_norm = 0.0 if norm is None else norm * norm
        _add_to(self._awaited, squares, angle * angle * count, squared_norm * count, count)

    def _pool(self, result: Measured, reading: Reading) -> None:
        """Add the scale-invariant weights of an optimizer to the overview."""
        invariant = result.plan.invariant
        totals = reading.totals[:, invariant].sum(1).tolist()
        counts = reading.counts[:, invariant].sum(1).tolist()
        # The names come first; what no logger gets stands behind them and is left out.
        for name, total, count in zip(result.gauge.names, totals, counts, strict=False):
            known_total, known_count = self._overview.get(name, (0.0, 0.0))
            self._overview[name] = (known_total + total, known_count + count)

    def finish(self, *, marks_drops: bool) -> None:
        """Make the row and the ledger that it goes into.

        Args:
            marks_drops: whether drops of the learning rate are marked here: one who acts on drops
                marks them itself, at the step at which it acted.
        """
        # Each kind once: a rescale of a hundred weights is one mark in a picture.
        events = tuple(dict.fromkeys([*self.ledger.events, *self._sent.events]))
        marked = self._sent.marked
        # Those in this row begin anew; of the others it is remembered until they have one.
        jumped = self.ledger.new_jumps(marked).difference(self._in_row)
        self.ledger = replace(self.ledger, marked=marked, jumped=jumped, events=events)
        # No update happened, so there is no row: the next one tells what happened since.
        if not self._optimizer_step:
            return
        values = self._with_overview()
        if self._not_finite:
            warn = partial(self._alarms.not_finite, self._not_finite, self._step, values)
            self.concerns.append(warn)
        self.ledger = replace(
            self.ledger,
            courses=self._courses,
            expectations=self._expectations,
            balances=self._balances,
            norms=self._norms,
            rates=self._rates,
            measured=self._measured,
            counted=self._counted,
            events=(),
            promised={**self.ledger.promised, **told_to_trainer(values)},
        )
        if self._dropped and marks_drops:
            events = (*events, "lr_drop")
        self.row = Row(self._step, self._optimizer_step, values, events, self._vectors)

    def _with_overview(self) -> dict[str, float]:
        values = dict(self._values)
        for name, (total, count) in self._overview.items():
            if count:
                values[f"normdyn/{name}"] = QUANTITIES[name].mean(total, count)
        squares, predicted, number = self._compared
        if number:
            angle = QUANTITIES["angular_update"]
            pooled = _from_prediction(angle.mean(squares, number), angle.mean(predicted, number))
            values.update({f"normdyn/{name}": value for name, value in pooled.items()})
        squares, angles, norms, number = self._awaited
        if number:
            angle = QUANTITIES["angular_update"]
            means = [angle.mean(total, number) for total in (squares, angles, norms)]
            for name, value in _from_expectation(*means).items():
                if QUANTITIES[name].scope == "both":
                    values[f"normdyn/{name}"] = value
        ratios = [v for key, v in values.items() if key.startswith("balance_ratio/")]
        if ratios:
            # The median: one matrix far from its balance is a finding, and no reason to stop.
            values["normdyn/balance_ratio"] = median(ratios)
        values["normdyn/optimizer_step"] = float(self._optimizer_step)
        values["normdyn/skipped_steps"] = float(self._sent.skipped_steps)
        values["normdyn/collapsed_vectors"] = self._collapsed
        return values


def _add_to(sums: list[float], *terms: float) -> None:
    # In Python: for a few numbers, an array takes ten times as long.
    for i, term in enumerate(terms):
        sums[i] += term


def _from_prediction(measured: float, predicted: float) -> dict[str, float]:
    """The quantities that compare a measured angular update with its prediction."""
    compared = {}
    for quantity in QUANTITIES.values():
        if quantity.prediction is not None:
            compared[quantity.name] = quantity.prediction(measured, predicted)
    return compared


def _from_expectation(
    measured: float,
    angle: float,
    norm: float,
) -> dict[str, float]:
    """The quantities that compare a measured angular update with what was expected."""
    compared = {}
    for quantity in QUANTITIES.values():
        if quantity.expectation is not None:
            compared[quantity.name] = quantity.expectation(measured, angle, norm)
    return compared


def _steered_to(effects: Effects, sums: MatrixSums) -> tuple[float, float | None] | None:
    """Angle and norm that a step ends at whatever the optimizer does, because a callback sets them;
    the norm None where that is no number of its own."""
    rotation = effects.rotation
    # Of other vectors than those that are turned, nobody can tell.
    if rotation is None or effects.underived or not rotation.sets_angle:
        return None
    # 0 at a rate of 0, where there is nothing to compare with.
    if not (sums.target_angle > 0 and isfinite(sums.target_angle)):
        return None
    is_known = rotation.norm == "hold" and rotation.target_norm != "initial"
    return sums.target_angle, float(rotation.target_norm) if is_known else None


def _is_rounded(target: Target) -> bool:
    """Whether rounding alone turns a weight by 2.5e-3 in every step, whatever pulls at it."""
    return target.weight.dtype in (torch.bfloat16, torch.float16)


class _Strengths:
    """What decays the weights of one optimizer, now and in the steps since the newest row.

    Many weights share a param group and what callbacks do, so each answer is worked out once.
    """

    def __init__(self, result: Measured, interval: Interval) -> None:
        self._optimizer = result.plan.optimizer
        self._interval = interval
        self._now: dict[tuple[int, Effects], Strength] = {}
        self._passed: dict[tuple[int, Effects], list[tuple[Stretch, Strength, float | None]]] = {}

    def now(self, place: int, effects: Effects) -> Strength:
        """In the measured step, of a weight in the param group at ``place``."""
        key = (place, effects)
        if key not in self._now:
            group = self._interval.groups[place]
            self._now[key] = strength_of(self._optimizer, group, effects)
        return self._now[key]

    def passed(self, place: int, effects: Effects) -> list[tuple[Stretch, Strength, float | None]]:
        """For `lightning_normdyn.monitor.pulls.passed_between`."""
        key = (place, effects)
        if key not in self._passed:
            self._passed[key] = self._find(place, effects)
        return self._passed[key]

    def _find(self, place: int, effects: Effects) -> list[tuple[Stretch, Strength, float | None]]:
        found = []
        for stretch in self._interval.stretches:
            # The param group joined later, so its weights were not stepped then.
            if place >= len(stretch.settings):
                return []
            settings = stretch.settings[place]
            group = {**self._interval.groups[place], **settings}
            lr = settings.get("lr") if self._interval.reads_rates else None
            found.append((stretch, strength_of(self._optimizer, group, effects), lr))
        return found


def _has_dropped(before: Sequence[float], rate: float) -> bool:
    """Whether the learning rate of a weight just fell by a jump, which pictures mark.

    Args:
        before: the last two rates, as far as there were any.
        rate: the present one.
    """
    # Both rates before must agree: a schedule that glides falls from row to row.
    if not before or abs(before[0] - before[-1]) > SAME_RATE * before[-1]:
        return False
    return 0 < rate <= before[-1] / LR_DROP
