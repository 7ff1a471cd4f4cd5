"""What one measured optimizer adds to a row: averages of its weights, what they are compared with,
and what the next row needs to know of them. All weights at once, since Python takes ten times as
long for each of them.

Legend: ``w`` weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import nan
from typing import NamedTuple

import numpy as np

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.optimizers.recognition import has_plain_rate

from .averages import Averages
from .balance import Passed
from .by_weight import Doubles, Flags, Ints, places_among, table_of
from .course_table import CourseTable, Predictions
from .expectations import ExpectationTable
from .expected_norms import Interval, Kind, WeightSteps, follow
from .ledger import Ledger
from .measure import Measured, Reading
from .measured_balance import SHOWN, BalanceRow, BalanceTable, quantities_of
from .monitored_weights import UNEXPECTED
from .norm_table import NormTable, RateTable
from .predictions import Prediction, Predictor
from .pulls import End, Strength, Taken, passed_between
from .quantities import QUANTITIES
from .row_values import Block

_RESTS_ON = ("weight_norm", "gradient_scale", "equivalent_weight_decay")
"""What a prediction is computed from."""


class _Alike(NamedTuple):
    """What weights settle at that do so whatever their size and gradients."""

    prediction: Prediction | None


class ResultRow:
    """The part of a row that is about the weights of one optimizer. To be made where numpy is
    silent: numbers that are not finite are answers here.

    Args:
        result: what was measured of them.
        reading: its numbers.
        ledger: what was known before the row; it is not changed.
        marked: how often each event had happened when the row was measured.

    Attributes:
        averages: of the weights.
        blocks: the row's numbers of each weight, in the order in which new keys come.
        courses, expectations, balances, norms, rates: what is known of the weights after the row,
            as tables.
        has_dropped: whether the learning rate of a weight has just fallen by a jump.
        compared: sums over vectors with a prediction: squared angles, squared predictions, and
            their number.
        awaited: the same of vectors with an expectation: squared angles, squared expected angles,
            squared expected norms, and their number.
        balance_ratios: how the weights turn against their balance, of those that show it.
    """

    def __init__(
        self,
        result: Measured,
        reading: Reading,
        ledger: Ledger,
        marked: Mapping[tuple[int, int, str], int],
    ) -> None:
        self._result = result
        self._reading = reading
        self._weights = result.gauge.weights
        self._kinds = self._weights.kinds(result.places)
        self.averages = Averages(result.gauge.measured, reading.totals, reading.counts)
        self._rates = self.averages.of("lr")
        self._angles = self.averages.of("angular_update")
        self.blocks: list[Block] = []

        newest = ledger.counted.get(result.plan.index)
        self._interval = Interval(
            result.plan.optimizer,
            result.groups,
            result.optimizer_step,
            [] if newest is None else result.passed.since(newest),
            has_plain_rate(result.plan.optimizer),
            self._weights.answers,
        )
        self._note_norms(ledger)
        self._predict(ledger)
        self._expect(ledger)
        has_jumped = result.plan.index in ledger.new_jumps(marked)
        self._balance(ledger, has_jumped=has_jumped)

    def _note_norms(self, ledger: Ledger) -> None:
        names = self._weights.names
        averages = self.averages
        number = self._result.optimizer_step
        norms = table_of(NormTable, ledger.norms, names)
        self.norms = norms.seen_at(number, averages.of("weight_norm"), averages.has("weight_norm"))
        rates = table_of(RateTable, ledger.rates, names)
        has_rate, present = averages.has("lr"), self._rates
        # One weight is enough: param groups may drop at different steps, and each drop is marked.
        self.has_dropped = bool((rates.have_dropped(present) & has_rate).any())
        self.rates = rates.then(present, has_rate)

    # -- what a weight settles at

    def _predict(self, ledger: Ledger) -> None:
        """Compare scale-invariant weights whose optimizer is understood with what they settle at,
        and add what was measured of all."""
        averages = self.averages
        courses = table_of(CourseTable, ledger.courses, self._weights.names)
        has_both = averages.has("lr") & averages.has("weight_norm")
        judged = self._weights.invariant & has_both
        # At a rate of 0 nothing moves: the last prediction stands.
        moving = judged & (self._rates != 0)
        # A run that diverged has no prediction any more; its curves shall show where.
        are_finite = np.isfinite(averages.of(_RESTS_ON[0], otherwise=0.0))
        for name in _RESTS_ON[1:]:
            are_finite &= np.isfinite(averages.of(name, otherwise=0.0))
        # One number that is not finite makes a prediction none, whatever the formula takes of it.
        taken = moving & are_finite

        predictor = Predictor(
            self._result.plan.optimizer, self._result.groups, self._result.optimizer_step
        )
        predictions = self._predictions(predictor, taken)
        self.courses = courses.after(self._result.optimizer_step, predictions, taken, judged)

        measured, predicted = self._angles, predictions.angular_update
        compared = taken & predictions.there & averages.has("angular_update")
        # Hardly ever, and then each weight that has no prediction now is asked for one.
        if not are_finite.all():
            diverged = moving & ~are_finite
            had_one = diverged & courses.latest.there
            compared |= had_one | self._would_have_one(predictor, diverged & ~had_one)
            measured = np.where(diverged, nan, measured)
            predicted = np.where(diverged, nan, predicted)
        rows = [averages.means[: len(self._result.gauge.names)]]
        for name in self._weights.predicted:
            compare = QUANTITIES[name].prediction
            # `MonitoredWeights.predicted` names no others.
            assert compare is not None
            rows.append(compare(measured, predicted)[None])
        # As written in the table of quantities: what is measured stands before what it is compared
        # with.
        there = [averages.are_there[: len(self._result.gauge.names)]]
        there += [compared[None]] * (len(rows) - 1)
        self.blocks.append(
            Block(
                self._weights.measured,
                np.concatenate(rows),
                np.concatenate(there),
                self._weights.everywhere,
            )
        )
        # Of all vectors with a prediction the squares are pooled: predictions are about the root
        # mean square, and a mean of the weights' ratios would be another number.
        squares = averages.totals_of("angular_update")[compared]
        counts = averages.counts_of("angular_update")[compared]
        aims = np.square(predicted[compared]) * counts
        self.compared = np.array([squares.sum(), aims.sum(), counts.sum()], dtype=np.float64)

    def _predictions(self, predictor: Predictor, taken: Flags) -> Predictions:
        """Of the weights that are ``taken``, ``(w,)``."""
        predictions = Predictions.none(len(taken))
        width = len(taken)
        for kind in self._kinds:
            chosen = kind.weights[taken[places_among(kind.weights, width)]]
            rates = self._rates[places_among(chosen, width)]
            different = _different(rates)
            # Where nobody can tell the rate, there is no prediction.
            for rate in different:
                weights = chosen if len(different) == 1 else chosen[rates == rate]
                of_all = self._prediction_of_all(predictor, kind, rate, int(weights[0]))
                if of_all is not None:
                    predictions.put(places_among(weights, width), of_all.prediction)
                    continue
                has_scale = self._means_at(weights).get("gradient_scale")
                # A formula would divide by the size of a gradient that there is none of.
                if has_scale is None or has_scale.all() or not has_scale.any():
                    parts = [weights]
                else:
                    parts = [weights[has_scale != 0], weights[has_scale == 0]]
                for part in parts:
                    lengths = self._weights.lengths[part]
                    about = kind.effects, self._means_at(part), lengths, kind.shape
                    each = predictor.predict_each(kind.group, rate, *about)
                    predictions.put_each(part, each)
        return predictions

    def _means_at(self, weights: Ints) -> dict[str, Doubles]:
        return {name: of_all[weights] for name, of_all in self._means.items()}

    def _prediction_of_all(
        self,
        predictor: Predictor,
        kind: Kind,
        rate: float,
        place: int,
    ) -> _Alike | None:
        """What all weights of a kind settle at, as they mostly do, whatever their size; None where
        each has to be asked."""

        def ask() -> _Alike | None:
            if not predictor.are_alike(kind.group, rate, kind.effects, kind.shape):
                return None
            return _Alike(self._prediction_at(predictor, kind, place))

        group = self._interval.groups[kind.group]
        # Of some optimizers it moves on with the number of the step.
        if self._interval.theory.asks_for_step(group):
            return ask()
        return self._interval.theory.at_rate(group, rate, kind.effects, kind.shape, ask)

    def _prediction_at(self, predictor: Predictor, kind: Kind, place: int) -> Prediction | None:
        measured = {name: of_all.item(place) for name, of_all in self._means.items()}
        return self._prediction_of(predictor, kind, place, measured)

    def _prediction_of(
        self, predictor: Predictor, kind: Kind, place: int, measured: Mapping[str, float]
    ) -> Prediction | None:
        length = int(self._weights.lengths[place])
        return predictor.predict(kind.group, kind.effects, measured, length, kind.shape)

    @cached_property
    def _means(self) -> dict[str, Doubles]:
        """By name, of each weight, what a prediction asks for."""
        means = {}
        for name in ("lr", *_RESTS_ON):
            if self.averages.has(name).any():
                means[name] = self.averages.of(name, otherwise=0.0)
        return means

    def _would_have_one(self, predictor: Predictor, weights: Flags) -> Flags:
        """``(w,)``, which of some weights would have a prediction if their numbers were finite."""
        would_have = np.zeros_like(weights)
        if not weights.any():
            return would_have
        rates = self._rates.tolist()
        for kind in self._kinds:
            for place in kind.weights[weights[kind.weights]].tolist():
                measured = {"lr": rates[place], **dict.fromkeys(_RESTS_ON, 1.0)}
                prediction = self._prediction_of(predictor, kind, place, measured)
                would_have[place] = prediction is not None
        return would_have

    # -- what is expected of it in this very step

    def _expect(self, ledger: Ledger) -> None:
        """Walk the courses of scale-invariant weights up to this step, and compare with them."""
        weights, averages = self._weights, self.averages
        matrices = self._reading.matrices
        rates, angles = self._rates, self._angles
        followed = weights.followable & np.isfinite(rates) & np.isfinite(angles)
        norms = np.sqrt(matrices.ww / weights.counts)
        steps = WeightSteps(
            self._kinds,
            weights.lengths,
            norms,
            angles,
            rates,
            averages.of("gradient_scale", otherwise=0.0),
            self._result.warm,
            followed,
        )
        known = table_of(ExpectationTable, ledger.expectations, weights.names)
        self.expectations, expected = follow(self._interval, steps, known)

        width = len(weights.names)
        there = np.zeros((len(weights.expected.quantities), width), dtype=np.bool_)
        values = np.full(there.shape, nan, dtype=np.float64)
        self.awaited = np.zeros(4, dtype=np.float64)
        block = Block(weights.expected, values, there, expected.order)
        shown = expected.shown
        # What is expected in silence is compared with nothing.
        norms = expected.norms if shown.all() else np.where(shown, expected.norms, nan)
        self._await(block, shown, expected.angles, norms)
        steered = np.zeros(width, dtype=np.bool_)
        for kind in self._kinds:
            norm = _steered_to(kind.effects)
            if norm is None:
                continue
            aims = matrices.target_angle
            # 0 at a rate of 0, where there is nothing to compare with.
            aimed = np.zeros(width, dtype=np.bool_)
            aimed[kind.weights] = (aims > 0)[kind.weights] & np.isfinite(aims)[kind.weights]
            aimed &= followed
            steered |= aimed
            self._await(block, aimed, aims, np.full(width, norm, dtype=np.float64))
        if steered.any():
            (others,) = np.nonzero(steered & ~np.isin(weights.everywhere, expected.order))
            block = block._replace(order=np.concatenate([expected.order, others]))
        self.blocks.append(block)

    def _await(self, block: Block, weights: Flags, angles: Doubles, norms: Doubles) -> None:
        """Compare some weights with what is expected of them in this step.

        Args:
            block: where it is written.
            weights: ``(w,)``, which weights.
            angles: ``(w,)``, what is expected.
            norms: ``(w,)``, what is expected; NaN where nobody can tell.
        """
        if not weights.any():
            return
        measured = self._angles
        # Nearly always all of them.
        chosen: Flags | slice = slice(None) if weights.all() else weights
        is_unknown = np.isnan(norms)
        # No weight has a length of 0 that anybody expects.
        known_norms = np.where(norms == 0, nan, norms)
        for i, name in enumerate(block.keys.quantities):
            compare = QUANTITIES[name].expectation
            # `MonitoredWeights.expected` names no others.
            assert compare is not None
            compared = compare(measured, angles, known_norms)
            told: Flags | slice = chosen
            if name == "expected_weight_norm":
                told = weights & ~is_unknown
            block.values[i, told] = compared[told]
            block.there[i, told] = True
        squares = self.averages.totals_of("angular_update")[chosen]
        counts = self.averages.counts_of("angular_update")[chosen]
        norm = np.where(is_unknown[chosen], 0.0, norms[chosen])
        angle = angles[chosen]
        sums = (squares, angle * angle * counts, norm * norm * counts, counts)
        self.awaited += [terms.sum() for terms in sums]

    # -- what holds its norm

    def _balance(self, ledger: Ledger, *, has_jumped: bool) -> None:
        """Extend the window of each weight, and add what it shows."""
        weights, result = self._weights, self._result
        known = table_of(BalanceTable, ledger.balances, weights.names)
        strength, passed, is_known, is_set = self._decays(known, has_jumped=has_jumped)
        self.balances = known.after(
            BalanceRow(
                result.optimizer_step,
                self._reading.matrices,
                self._rates,
                strength,
                passed,
                is_known,
                is_set,
                # Without a gradient a weight was not stepped, nor decayed.
                self.averages.has("angular_update"),
            )
        )
        wanted = weights.of_matrices.copy()
        ratio = weights.expected.quantities.index("expected_ratio")
        is_expected = self.expectations.known | self.blocks[-1].there[ratio]
        again = [SHOWN.index(name) for name in UNEXPECTED]
        # Whoever asked for its balance gets the drift of its norm only if they asked for it, too.
        lacks = ~is_expected & ~wanted[SHOWN.index("balance_ratio")]
        wanted[len(SHOWN) :] = lacks
        asked = wanted[: len(SHOWN)].copy()
        asked[again] |= lacks
        coherences = self._noise_coherences(asked)
        shown = quantities_of(self.balances, weights.entries, coherences, asked)
        values = np.concatenate([shown, shown[again]])
        # Absent, and not NaN: that would say that the run has diverged.
        there = wanted & np.isfinite(values) & self.balances.known
        self.blocks.append(Block(weights.balanced, values, there, weights.everywhere))
        ratios = SHOWN.index("balance_ratio")
        self.balance_ratios = shown[ratios][there[ratios] | there[-1]]

    def _noise_coherences(self, wanted: Flags) -> Doubles:
        """``(w,)``, that of each weight of which a quantity rests on it; NaN where it is not known
        or not asked for."""
        coherences = np.full(len(self._weights.names), nan, dtype=np.float64)
        asked = wanted[SHOWN.index("loss_decay")]
        if not asked.any():
            return coherences
        theory = self._interval.theory
        # Of a kind that nobody asks about, it would be worked out for nothing.
        for kind in self._kinds:
            if asked[kind.weights].any():
                group = self._result.groups[kind.group]
                kappa = theory.noise_coherence(group, kind.effects, kind.shape)
                coherences[kind.weights] = nan if kappa is None else kappa
        return coherences

    def _decays(
        self, known: BalanceTable, *, has_jumped: bool
    ) -> tuple[Strength, Passed, Flags, Flags]:
        """What decays the weights now, ``(w,)`` each; what has passed since the newest row; of
        which weights that is known; and whose norm was set in between."""
        width = len(self._weights.names)
        strengths = np.zeros((3, width), dtype=np.float64)
        passed = np.zeros((4, width), dtype=np.float64)
        is_known = np.zeros(width, dtype=np.bool_)
        is_set = np.zeros(width, dtype=np.bool_)
        now = End(self._interval.number, self._rates, self._reading.matrices.size)
        together: dict[tuple[int, Effects], list[Ints]] = {}
        for kind in self._kinds:
            together.setdefault((kind.group, kind.effects), []).append(kind.weights)
        for (group, effects), parts in together.items():
            weights = np.concatenate(parts)
            of_group = self._interval.groups[group]
            strength = self._interval.theory.strength(of_group, effects)
            strengths[:, weights] = np.array(strength, dtype=np.float64)[:, None]
            sets_norm = effects.rescaling is not None or effects.jumps is not None
            is_set[weights] = has_jumped and sets_norm
            steps = self._taken(group, effects)
            is_known[weights] = bool(steps)
            before = End(*(column[weights] for column in known.ends))
            present = End(now.number, now.lr[weights], now.size[weights])
            for row, column in zip(passed, _passed(before, present, steps), strict=True):
                row[weights] = column
        in_16_bits = self._weights.in_16_bits
        strengths[:, in_16_bits] = np.array(Strength(nan), dtype=np.float64)[:, None]
        return Strength(*strengths), Passed(*passed), is_known, is_set

    def _taken(self, group: int, effects: Effects) -> list[Taken]:
        """The steps since the newest row as a decay of these weights took them; empty where they
        are not known."""
        steps = []
        for stretch in self._interval.stretches:
            # The param group joined later, so its weights were not stepped then.
            if group >= len(stretch.settings):
                return []
            then = self._interval.group_in(stretch, group)
            lr = stretch.settings[group].get("lr") if self._interval.reads_rates else None
            strength = self._interval.theory.strength(then, effects)
            steps.append(Taken(stretch.first, stretch.last, strength, lr))
        return steps


def _different(rates: Doubles) -> list[float]:
    """The different ones of some rates, without NaN."""
    # Nearly always all weights of a kind have one rate.
    if len(rates) and (rates == rates[0]).all():
        return [float(rates[0])]
    known: list[float] = np.unique(rates[~np.isnan(rates)]).tolist()
    return known


def _passed(before: End, now: End, steps: list[Taken]) -> Passed:
    """`passed_between`, once for all weights where it is the same of them."""
    depends_on_weight = any(taken.strength.alpha or taken.lr is None for taken in steps)
    if depends_on_weight or (before.number != before.number[:1]).any():
        return passed_between(before, now, steps)
    first = [End(end.number, end.lr[:1], end.size[:1]) for end in (before, now)]
    return passed_between(first[0]._replace(number=before.number[:1]), first[1], steps)


def _steered_to(effects: Effects) -> float | None:
    """The norm that a step ends at whatever the optimizer does, because a callback sets it and the
    angle; NaN where it is no number of its own, None where no angle is set."""
    rotation = effects.rotation
    # Of other vectors than those that are turned, nobody can tell.
    if rotation is None or effects.underived or not rotation.sets_angle:
        return None
    is_known = rotation.norm == "hold" and rotation.target_norm != "initial"
    return float(rotation.target_norm) if is_known else nan


__all__ = ["ResultRow"]
