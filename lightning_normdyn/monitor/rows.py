"""From measured steps on the host to one row: averages by weight and over all scale-invariant
vectors, the predictions beside them, and what is worth a warning.

Everything is worked out before anything is changed: a signal handler may save a checkpoint between
any two lines of Python. Over 500 lines, because all parts of a row fill the same draft.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from lightning_normdyn.optimizers.step import HostCopy

from .alarms import RUNAWAY, Alarms
from .averages import Averages
from .by_weight import with_table
from .histograms import Histogram
from .ledger import Ledger, Row
from .loggers import told_to_trainer
from .measure import Measured, Reading
from .norm_table import NormTable
from .quantities import QUANTITIES
from .result_rows import ResultRow
from .row_values import Block, RowValues

_OF_WEIGHTS = ("courses", "expectations", "balances", "norms", "rates")
"""What a ledger holds by weight."""


@dataclass
class Sent:
    """What was measured in one batch, on its way to the host.

    Args:
        results: one per optimizer that was measured.
        sizes: how many of the numbers are sums of each result, and then how many are of its
            vectors; one more is the number of clamped vectors, if anybody counts them.
        numbers: all of them, in one transfer.
        events: kinds of what happened since the results before these.
        marked: how often it had happened by then.
        skipped_steps: of the whole run.
        shown: whether loggers get it.
    """

    results: list[Measured]
    sizes: list[int]
    numbers: HostCopy
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
        self._blocks: list[Block] = []
        self._counted_vectors: dict[str, float] = {}
        self._vectors: dict[str, Any] = {}
        self._not_finite: list[str] = []
        self._dropped = False
        self._collapsed = 0.0
        # What the ledger will hold, in copies.
        self._of_weights: dict[str, Mapping[str, Any]] = {
            name: getattr(ledger, name) for name in _OF_WEIGHTS
        }
        self._measured = dict(ledger.measured)
        self._counted = dict(ledger.counted)
        self._in_row: set[int] = set()  # optimizers
        # Over all scale-invariant vectors: sum and count by name.
        self._overview: dict[str, tuple[float, float]] = {}
        self._compared = np.zeros(3, dtype=np.float64)
        self._awaited = np.zeros(4, dtype=np.float64)
        self._balance_ratios: list[float] = []

    def fill(self, *, only_due: bool) -> None:
        """Add the results whose update happened; with ``only_due``, without those that were
        measured because the fit may end with them."""
        sent = self._sent
        numbers = sent.numbers.get().double().numpy()
        # In the order in which they were put together; what is left over is of no result.
        *parts, clamped = np.split(numbers, np.cumsum(sent.sizes))
        count = len(sent.results)
        for result, sums, vectors in zip(sent.results, parts[:count], parts[count:], strict=True):
            reading = result.read(sums)
            if reading is not None and (result.look.due or not only_due):
                self._add(result, reading)
                self._vectors.update(result.read_vectors(vectors))
        # Without AWS nobody counts clamped vectors: a 0 would say that somebody looked.
        if len(clamped):
            self._counted_vectors["normdyn/clamped_vectors"] = float(clamped[0])

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

        weights = result.gauge.weights
        # Numbers that are not finite are answers here. Once for all formulas of the row: each of
        # them would take longer to say so than to compute.
        with np.errstate(all="ignore"):
            found = ResultRow(result, reading, self.ledger, self._sent.marked)
        self._blocks += found.blocks
        for name, known in self._of_weights.items():
            self._of_weights[name] = with_table(known, getattr(found, name))
        self._dropped |= found.has_dropped
        self._compared += found.compared
        self._awaited += found.awaited
        self._balance_ratios += found.balance_ratios.tolist()
        for place in np.flatnonzero(~found.averages.are_finite).tolist():
            self._not_finite.append(weights.names[place])
        # Only where the direction alone counts is a short vector trouble: it turns ever faster.
        self._collapsed += float(reading.collapsed[weights.invariant].sum())
        # One function for all weights: what is kept for each of a thousand until the row is there
        # costs Python's garbage collector.
        self.concerns.append(partial(self._look_for_trouble, result, found.averages, found.norms))
        self._pool(result, reading)

    def _look_for_trouble(self, result: Measured, averages: Averages, norms: NormTable) -> None:
        """Warn of weights whose norm overflows and of vectors that only decay."""
        weights = result.gauge.weights
        grows = np.zeros(len(weights.names), dtype=np.bool_)
        grows[norms.grown_beyond(RUNAWAY)] = True
        grows &= averages.has("weight_norm")
        dies = weights.invariant & (averages.totals_of("dead") != 0)
        for place in np.flatnonzero(grows | dies).tolist():
            target = result.plan.targets[place]
            if grows[place]:
                self._alarms.overflow(target, norms.of(place))
            if dies[place]:
                group = result.groups[result.places[place]]
                self._alarms.dead(result.gauge, target, group, averages.sums_of(place))

    def _pool(self, result: Measured, reading: Reading) -> None:
        """Add the scale-invariant weights of an optimizer to the overview."""
        invariant = result.gauge.weights.invariant
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
        # No update happened, so there is no row: the next one tells what happened since.
        if not self._optimizer_step:
            self.ledger = self.ledger.replaced(marked=marked, jumped=jumped, events=events)
            return
        values = RowValues(self._blocks, self._with_overview())
        if self._not_finite:
            warn = partial(self._alarms.not_finite, self._not_finite, self._step, values)
            self.concerns.append(warn)
        self.ledger = self.ledger.replaced(
            **self._of_weights,
            measured=self._measured,
            counted=self._counted,
            events=(),
            marked=marked,
            jumped=jumped,
            promised={**self.ledger.promised, **told_to_trainer(values)},
        )
        if self._dropped and marks_drops:
            events = (*events, "lr_drop")
        self.row = Row(self._step, self._optimizer_step, values, events, self._vectors)

    def _with_overview(self) -> dict[str, float]:
        values = dict(self._counted_vectors)
        for name, (total, count) in self._overview.items():
            if count:
                values[f"normdyn/{name}"] = QUANTITIES[name].mean(total, count)
        squares, predicted, number = self._compared.tolist()
        if number:
            angle = QUANTITIES["angular_update"]
            pooled = _from_prediction(angle.mean(squares, number), angle.mean(predicted, number))
            values.update({f"normdyn/{name}": value for name, value in pooled.items()})
        squares, angles, norms, number = self._awaited.tolist()
        if number:
            angle = QUANTITIES["angular_update"]
            means = [angle.mean(total, number) for total in (squares, angles, norms)]
            for name, value in _from_expectation(*means).items():
                if QUANTITIES[name].scope == "both":
                    values[f"normdyn/{name}"] = value
        if self._balance_ratios:
            # The median: one matrix far from its balance is a finding, and no reason to stop.
            values["normdyn/balance_ratio"] = median(self._balance_ratios)
        values["normdyn/optimizer_step"] = float(self._optimizer_step)
        values["normdyn/skipped_steps"] = float(self._sent.skipped_steps)
        values["normdyn/collapsed_vectors"] = self._collapsed
        return values


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
