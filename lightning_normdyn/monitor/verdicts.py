"""What a person should read from the curves of a weight at the end of a fit: one verdict, judged by
how it turns now against what is expected of it, or against its own balance.

Numbers of the host. Words: `lightning_normdyn.theory.words`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import copysign, inf, isfinite, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.theory.words import TOO_EARLY, Balanced, Finding, Numbers, finding_of

from .balance import LEAST_ROWS as MATRIX_ROWS
from .curves import Doubles, as_table
from .history import History
from .measured_balance import Balance
from .predictions import Prediction

# Relaxation times after which a start within 20 % of the equilibrium is forgotten.
SETTLED_AFTER = 6.0
# |d ln‖w‖²| x relaxation time below which a norm has settled.
SETTLED_DRIFT = 0.1
# Relaxation times, and least number of rows. A norm counts as drifting if it does so both over the
# short and over the long window: within one, the norms of a settled network wander by a tenth.
SHORT = (2.0, 6)
LONG = (4.0, 12)
# But a drift by this much within a relaxation time is none of that: after a burst the two windows
# may even disagree on the direction.
WANDERING = 0.3
# And by this much aims at another equilibrium.
OTHER_AIM = 0.1
# A predicted angle that was constant up to this share, and then fell by this factor, has dropped; a
# schedule that glides never does.
SAME_AIM = 0.01
DROP = 1.2
# Relaxation times after which a drop is forgotten.
DROP_FELT = 6.0
LEAST_ROWS = 3


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

    def steady_since(self) -> float:
        """The step since which lr x decay has been within a tenth of what it is now; before,
        another equilibrium was aimed at."""
        since = -inf
        for step, pull in reversed(self.pulls):
            if _differs(pull, self.pulls[-1][1], OTHER_AIM):
                return since
            since = float(step)
        return -inf


def _differs(
    pull: float,
    other: float,
    share: float,
) -> bool:
    return abs(pull / other - 1) > share


@dataclass(frozen=True)
class Grounds:
    """What a verdict rests on beside the curves of a weight.

    Args:
        rough: whether what is expected of it is some tens of percent off.
        optimizer_alone: whether no callback acts on it, so that LRDropRescaling could.
        balanced: its measured balance; None where it has none.
        held_by: the callback that sets its norm after every step; empty where none does.
    """

    rough: bool = False
    optimizer_alone: bool = True
    balanced: Balanced | None = None
    held_by: str = ""


class _Curves(NamedTuple):
    """The rows of a weight that have a norm and an angle, float64 ``(rows,)``; NaN where nothing is
    expected or predicted."""

    steps: Doubles
    norms: Doubles
    angles: Doubles
    predicted: Doubles
    expected: Doubles


def judge(
    history: History,
    name: str,
    course: Course,
    grounds: Grounds = Grounds(),
) -> Finding:
    """What a person should read from the curves of weight ``name``.

    Args:
        history: rows with ``weight_norm``, ``angular_update`` and, where there is one,
            ``expected_angular_update`` and ``equilibrium_angular_update``.
        name: the weight.
        course: its predictions on the way.
        grounds: what else it rests on.

    Returns:
        a finding of `lightning_normdyn.theory.words`; "too few rows"; "not finite since step 5" for
        a weight that ended with NaN.
    """
    diverged = _not_finite_since(history, name)
    if diverged is not None:
        return Finding("not finite", f"not finite since step {diverged}")
    curves = _in_optimizer_steps(_curves(history, name), course)
    if len(curves.steps) < LEAST_ROWS:
        return Finding("too early", "too few rows")
    prediction = course.latest
    relaxation = None if prediction is None else prediction.relaxation
    recent = _window(curves.steps, SHORT, relaxation, course.steady_since())
    expected_ratio = _ratio(curves.angles, curves.expected, recent)
    settled_ratio = None
    if prediction is not None:
        settled_ratio = _ratio(curves.angles, curves.predicted, recent)
    held_by = grounds.held_by
    # Of a weight that WeightRescaling sets back there is a prediction, and no relaxation.
    if not held_by and prediction is not None and relaxation is None:
        held_by = "WeightRescaling"
    return finding_of(
        Numbers(
            angle=_root_mean_square(curves.angles[recent]),
            drift=_drift(curves, course),
            expected_ratio=expected_ratio,
            settled_ratio=settled_ratio,
            relaxation=relaxation,
            elapsed=course.elapsed,
            rough=grounds.rough,
            held_by=held_by,
            since_drop=_has_dropped(curves, relaxation),
            can_rescale=grounds.optimizer_alone,
            balance=grounds.balanced,
        )
    )


def norm_has_settled(
    history: History,
    name: str,
    course: Course,
) -> bool:
    """Whether the norm of a weight stands still, judged by its drift alone, whatever its angle."""
    curves = _in_optimizer_steps(_curves(history, name), course)
    prediction = course.latest
    if len(curves.steps) < LEAST_ROWS or prediction is None or not prediction.relaxation:
        return False
    is_still = abs(_drift(curves, course)) * prediction.relaxation < SETTLED_DRIFT
    return is_still and course.elapsed >= SETTLED_AFTER


def balance_of(
    balance: Balance | None,
    entries: int,
    power: float,
    noise_coherence: float | None,
    *,
    in_16_bits: bool = False,
) -> Balanced | None:
    """The measured balance of a weight as a verdict takes it; None of a weight never measured.

    Args:
        balance: its windows.
        entries: numbers in the matrix.
        power: P of its optimizer: its norm relaxes in 1/(P · pull) steps.
        noise_coherence: κ of pure noise; None where it is not known, or the loss cannot pull at the
            weight because it is scale-invariant.
        in_16_bits: whether it is stored so: rounding then hides what decay does.
    """
    if balance is None or balance.newest is None:
        return None
    if in_16_bits:
        return Balanced(missing="weights of 16 bits are rounded by more than decay does")
    pull = balance.newest.pull
    if not isfinite(pull):
        return Balanced(missing="nobody knows its decay")
    whole = balance.window.whole
    # A rate of 0 for a while is not this.
    if not pull > 0 and (whole is None or not whole.pulls > 0):
        return Balanced(missing="no decay acts on it")
    span = balance.window.newest_span(entries)
    if span is None:
        few_rows, turned_little = TOO_EARLY
        has_rows = len(balance.window.points) >= MATRIX_ROWS
        return Balanced(missing=turned_little if has_rows else few_rows)
    if not span.pulls > 0:
        return Balanced(missing="no decay acts on it now")
    share = nan
    if noise_coherence is not None:
        # As weight decays: the pull of a step is lr times it.
        share = span.loss_decay(noise_coherence) / (span.pulls / span.rates)
    return Balanced(
        ratio=span.ratio,
        loss_share=share,
        relaxation=1 / (power * pull) if pull > 0 else None,
        elapsed=power * balance.elapsed,
    )


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
    quantities = (
        "weight_norm",
        "angular_update",
        "equilibrium_angular_update",
        "expected_angular_update",
    )
    recorded = {quantity: history.curve(f"{quantity}/{name}") for quantity in quantities}
    steps, table = as_table(recorded)
    # A number of a single step that was not finite, after which the run went on, is no part of a
    # curve.
    usable = np.isfinite(table[:2]).all(axis=0)
    return _Curves(steps[usable].astype(np.float64), *table[:, usable])


def _in_optimizer_steps(curves: _Curves, course: Course) -> _Curves:
    """Its own optimizer may step more or less often than others."""
    if not course.step or not len(curves.steps):
        return curves
    return curves._replace(steps=curves.steps * (course.step / (curves.steps[-1] + 1)))


def _drift(curves: _Curves, course: Course) -> float:
    """d ln‖w‖² per step over the newest rows."""
    relaxation = None if course.latest is None else course.latest.relaxation
    steps = curves.steps
    recent = _window(steps, SHORT, relaxation, course.steady_since())
    longer = _window(steps, LONG, relaxation, course.steady_since())
    # A norm of 0 has no logarithm.
    growth = 2 * np.log(np.maximum(curves.norms, 1e-300))
    drift = _slope(steps[recent], growth[recent])
    if relaxation and abs(drift) * relaxation < WANDERING:
        drift = _common(drift, _slope(steps[longer], growth[longer]))
    return drift


def _ratio(
    angles: Doubles,
    foreseen: Doubles,
    recent: NDArray[np.bool_],
) -> float | None:
    """Measured over foreseen angle, as root mean squares; None where nothing is foreseen."""
    # Over the same rows: an angle that nothing was foreseen for belongs to neither mean.
    known = recent & (foreseen > 0)
    if not known.any():
        return None
    return _root_mean_square(angles[known]) / _root_mean_square(foreseen[known])


def _has_dropped(curves: _Curves, relaxation: float | None) -> bool:
    """Whether what the weight settles at has dropped so lately that its norm still shows it."""
    known = np.isfinite(curves.predicted)
    steps, aims = curves.steps[known], curves.predicted[known]
    if relaxation is None or len(aims) < LEAST_ROWS:
        return False
    was_constant = np.abs(aims[:-2] / aims[1:-1] - 1) <= SAME_AIM
    drops = steps[2:][was_constant & (aims[2:] < aims[1:-1] / DROP)]
    return bool(len(drops) and steps[-1] - drops[-1] < DROP_FELT * relaxation)


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
