"""What a person should read from the curves of a weight at the end of a fit: one verdict, judged by
its norm and by its predictions on the way.

Numbers of the host. Formulas and words: `lightning_normdyn.theory.outlook`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import copysign, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.theory.outlook import reading

from .curves import Doubles, as_table
from .history import History
from .predictions import Prediction

# Relaxation times after which a start within 20 % of the equilibrium is forgotten.
SETTLED_AFTER = 6.0
# Relaxation times, and least number of rows. A norm counts as drifting if it does so both over the
# short and over the long window: within one, the norms of a settled network wander by a tenth.
SHORT = (2.0, 6)
LONG = (4.0, 12)
# But a drift by this much within a relaxation time is none of that: after a burst the two windows
# may even disagree on the direction.
WANDERING = 0.3
# A change of lr x decay by this much is worth an entry in a course.
NOTED_CHANGE = 0.01
# And by this much aims at another equilibrium.
OTHER_AIM = 0.1
MOST_PULLS = 512


@dataclass
class Course:
    """What happened to a weight's prediction on the way: the e-foldings elapsed, and how the
    schedule moved.

    Args:
        latest: the newest prediction.
        step: optimizer step of it.
        elapsed: relaxation times since the start.
        pulls: (optimizer step, lr x decay), an entry for each change by a hundredth.
    """

    latest: Prediction | None = None
    step: int = 0
    elapsed: float = 0.0
    pulls: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, prediction: Prediction | None) -> None:
        """Take in the prediction of an optimizer step, counted from 1."""
        if prediction is not None and prediction.relaxation:
            # Steps since the last look went by at this rate.
            self.elapsed += (step - self.step) / prediction.relaxation
            if not self.pulls or _differs(prediction.pull, self.pulls[-1][1], NOTED_CHANGE):
                self.pulls.append((step, prediction.pull))
            if len(self.pulls) > MOST_PULLS:
                # A cosine over a long run has an entry for every percent; half of them show it as
                # well.
                del self.pulls[1::2]
        self.latest = prediction
        self.step = step

    def fork(self) -> Course:
        """A course that starts as this one and goes on by itself."""
        return replace(self, pulls=list(self.pulls))

    def steady_since(self) -> float:
        """The step since which lr x decay has been within a tenth of what it is now; before,
        another equilibrium was aimed at."""
        since = -inf
        for step, pull in reversed(self.pulls):
            if _differs(pull, self.pulls[-1][1], OTHER_AIM):
                return since
            since = float(step)
        return -inf

    def change(self, window: float) -> float:
        """Largest relative change of lr x decay within the last ``window`` steps."""
        start = self.step - window
        within = [pull for step, pull in self.pulls if step > start]
        before = [pull for step, pull in self.pulls if step <= start]
        current = self.pulls[-1][1]
        # The last value from before the window was in force at its start.
        changes = [abs(pull / current - 1) for pull in [*before[-1:], *within]]
        return max(changes, default=0.0)


def _differs(pull: float, other: float, share: float) -> bool:
    return abs(pull / other - 1) > share


class _Curves(NamedTuple):
    """The rows of a weight that have a norm and an angle, float64 ``(rows,)``."""

    steps: Doubles
    norms: Doubles
    angles: Doubles
    predicted: Doubles
    """NaN where there is no prediction."""


def judge(history: History, name: str, course: Course) -> str:
    """What a person should read from the curves of weight ``name``, judged by its norm.

    Args:
        history: rows with ``weight_norm``, ``angular_update`` and, where there is a prediction,
            ``equilibrium_angular_update``.
        name: the weight.
        course: its predictions on the way.

    Returns:
        a verdict of `lightning_normdyn.theory.outlook.reading`; "not settled yet" instead of
        "settled" before `SETTLED_AFTER` e-foldings; under WRS the comparison alone; "too few rows";
        "not finite since step 5" for a weight that ended with NaN.
    """
    diverged = _not_finite_since(history, name)
    if diverged is not None:
        return f"not finite since step {diverged}"
    curves = _curves(history, name)
    if len(curves.steps) < 3:
        return "too few rows"
    steps = curves.steps
    if course.step:  # its own optimizer may step more or less often than others
        steps = steps * (course.step / (steps[-1] + 1))

    prediction = course.latest
    relaxation = None if prediction is None else prediction.relaxation
    recent = _window(steps, SHORT, relaxation, course.steady_since())
    longer = _window(steps, LONG, relaxation, course.steady_since())

    turned = _root_mean_square(curves.angles[recent])
    # Compared over the same rows: an angle without a prediction belongs to neither mean.
    known = recent & np.isfinite(curves.predicted)
    ratio = None
    if prediction is not None and known.any():
        expected = _root_mean_square(curves.predicted[known])
        ratio = _root_mean_square(curves.angles[known]) / expected
    if prediction is not None and relaxation is None and ratio is not None and turned > 0:
        return f"length held by WeightRescaling, {ratio:.2g}x the prediction"

    # A norm of 0 has no logarithm.
    growth = 2 * np.log(np.maximum(curves.norms, 1e-300))
    drift = _slope(steps[recent], growth[recent])
    if relaxation and abs(drift) * relaxation < WANDERING:
        drift = _common(drift, _slope(steps[longer], growth[longer]))
    words = reading(
        drift,
        relaxation,
        ratio,
        course.change(relaxation) if relaxation else 0.0,
        angular_update=turned,
        power=4 if prediction is None else prediction.power,
        age=(steps[-1] - steps[recent][0]) / 2,  # a slope is that of the middle of its window
    )
    if words.startswith("settled") and course.elapsed < SETTLED_AFTER:
        words = f"not settled yet, {ratio:.2g}x the prediction"
    is_rough = prediction is not None and prediction.rough
    if is_rough and "prediction" in words and words != "no prediction":
        return f"{words} (a rough one)"
    return words


def _not_finite_since(history: History, name: str) -> int | None:
    """The first of the steps, up to the newest row, at which the norm or the angle was NaN or
    infinite; None if the newest is finite."""
    since: list[int] = []
    for key in (f"weight_norm/{name}", f"angular_update/{name}"):
        steps, values = history.curve(key)
        finite = np.flatnonzero(np.isfinite(values))
        trailing = steps[finite[-1] + 1 :] if len(finite) else steps
        since += trailing[:1].tolist()
    return min(since, default=None)


def _curves(history: History, name: str) -> _Curves:
    quantities = ("weight_norm", "angular_update", "equilibrium_angular_update")
    recorded = {quantity: history.curve(f"{quantity}/{name}") for quantity in quantities}
    steps, table = as_table(recorded)
    # A number of a single step that was not finite, after which the run went on, is no part of a
    # curve.
    usable = np.isfinite(table[:2]).all(axis=0)
    return _Curves(steps[usable].astype(np.float64), *table[:, usable])


def _window(
    steps: Doubles,
    span: tuple[float, int],
    relaxation: float | None,
    since: float,
) -> NDArray[np.bool_]:
    """Which rows to look at: so many relaxation times, at least so many rows, but not more than the
    second half of the run, and nothing from before ``since``; three rows in any case."""
    relaxations, rows = span
    half = (steps[0] + steps[-1]) / 2
    by_time = steps[-1] - relaxations * (relaxation or inf)
    by_rows = steps[-min(rows, len(steps))]
    start = min(by_time, by_rows)
    chosen: NDArray[np.bool_] = steps >= max(start, half, since)
    chosen[-3:] = True
    return chosen


def _common(first: float, second: float) -> float:
    """The smaller of two slopes that agree on the direction; else 0."""
    return copysign(min(abs(first), abs(second)), first) if first * second > 0 else 0.0


def _slope(x: Doubles, y: Doubles) -> float:
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / np.square(centred).sum())


def _root_mean_square(values: Doubles) -> float:
    return float(np.sqrt(np.square(values).mean()))
