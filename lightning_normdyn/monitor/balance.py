r"""The measured balance of a weight matrix: what the loss and the optimizer do to its norm, against
what weight decay does.

The whole matrix counts as one vector w. Over the steps a, ..., b-1 its squared norm N, its angles
:math:`\theta_t` and the pulls :math:`P_t` (the relative decay of each step) give the coherence

.. math:: \kappa = \frac{\ln(N_b/N_a) - 2 \sum \ln(1-P_t)}{\sum \theta_t^2},

the growth of ln N per squared angle turned. Where the norm has settled, growth and decay balance:
:math:`\theta = \sqrt{2P/\kappa}`. Neither scale invariance nor a known optimizer is needed.

Angles and norms are measured at logging steps only, so that all other steps cost nothing; the
squared angles of the steps between are interpolated. Numbers of the host, in float64. Formulas:
`lightning_normdyn.functional`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, nan, pi, sqrt, tan
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.functional import coherence, loss_decay

from .by_weight import Doubles, Flags, Ints

Numbers = Any
"""A float, or ``(w,)`` of many weights."""

LEAST_STEPS = 50
"""Optimizer steps that a span must have before a coherence is shown."""

LEAST_ROWS = 4
"""Rows that it must have: with fewer, the interpolated angles are a guess."""

MOST_ERROR = 0.1
"""Relative standard error of the coherence from which on it is shown."""


class Passed(NamedTuple):
    """Sums over the steps between two rows, neither of the two included; of one weight, or
    ``(w,)``.

    Args:
        steps: how many they were.
        pull: ΣP.
        log_kept: Σ ln(1-P).
        lr: sum of the learning rates.
    """

    steps: Numbers
    pull: Numbers
    log_kept: Numbers
    lr: Numbers


class Point(NamedTuple):
    """A row of a window, with sums over the steps from the window's first row up to, but not
    including, its own; ``log_scale`` is that of the row."""

    number: int
    log_norm: float
    squared_angle: float
    pull: float
    lr: float
    angles: float = 0.0
    pulls: float = 0.0
    log_kept: float = 0.0
    rates: float = 0.0
    log_scale: float = 0.0

    @property
    def squared_norm(self) -> float:
        """‖w‖²; infinite where a run has diverged that far."""
        return exp(self.log_norm) if self.log_norm < 700 else inf

    @property
    def energy(self) -> float:
        """tan²θ ‖w‖²/lr², the squared length of the step at right angles to the weight, over lr²;
        NaN at a rate of 0, and for a step by a quarter turn, which is an accident."""
        if not (self.lr > 0 and 0 < self.squared_angle < (pi / 2) ** 2):
            return nan
        return tan(sqrt(self.squared_angle)) ** 2 * self.squared_norm / self.lr**2


@dataclass(frozen=True)
class Span:
    """The steps between two points of a window, as one measurement; of one weight, or ``(w,)``.

    Args:
        steps: how many they are.
        growth: ln of the last norm over the first.
        scaled: the part of it that callbacks have made by multiplying the weight after each step.
        angles: sum of the squared angles.
        pulls: ΣP; NaN where nobody can tell.
        log_kept: Σ ln(1-P); NaN where nobody can tell.
        rates: sum of the learning rates.
    """

    steps: Numbers
    growth: Numbers
    scaled: Numbers
    angles: Numbers
    pulls: Numbers
    log_kept: Numbers
    rates: Numbers

    @cached_property
    def coherence(self) -> Numbers:
        """κ; NaN where a pull is not known or nothing turned."""
        with np.errstate(all="ignore"):
            # All steps as one: the product of what each kept is what the span kept.
            pull = -np.expm1(self.log_kept)
            grown = np.exp(self.growth - self.scaled)
            first = np.ones_like(grown)
            kappa = coherence(first, grown, np.asarray(pull)[None], np.asarray(self.angles)[None])
        is_known = np.isfinite(self.log_kept) & (self.angles > 0)
        return np.where(is_known, kappa, nan)[()]

    @property
    def ratio(self) -> Numbers:
        """How fast the matrix turned against what would hold its norm: the root of κΣθ²/2ΣP; NaN
        without decay, and where the norm would shrink even without."""
        squared = self.coherence * self.angles
        with np.errstate(all="ignore"):
            ratio = np.sqrt(squared / (2 * np.asarray(self.pulls)))
        return np.where((squared > 0) & (self.pulls > 0), ratio, nan)[()]

    def loss_decay(self, noise_coherence: Numbers) -> Numbers:
        """How strongly the loss itself pulls the norm inwards, as weight decay, if pure noise would
        have the coherence ``noise_coherence``; NaN where nothing was trained at any rate."""
        steps = self.steps
        with np.errstate(all="ignore"):
            angle = np.sqrt(self.angles / steps)
            drift = (self.growth - self.scaled) / steps
            means = (self.pulls / steps, self.rates / steps, drift)
            decay = loss_decay(*means, angle, noise_coherence)
        return np.where(self.rates > 0, decay, nan)[()]


class BalanceWindow(NamedTuple):
    """Rows of one weight matrix since its norm was last set or its decay last changed by a jump;
    `lightning_normdyn.monitor.balance_windows` has those of many.

    Args:
        points: from old to new.
    """

    points: tuple[Point, ...] = ()

    def newest_span(self, entries: int) -> Span | None:
        """The newest steps that are enough for a coherence; None if there are not enough.

        Args:
            entries: numbers in the matrix: the more, the smaller the error.
        """
        if len(self.points) < LEAST_ROWS:
            return None
        numbers = np.array([point.number for point in self.points], dtype=np.float64)
        rows = np.array([point[1:] for point in self.points], dtype=np.float64)[:, :, None]
        (start,) = newest_starts(numbers, rows, np.array([entries], dtype=np.float64)).tolist()
        return None if start < 0 else self._span(start)

    @property
    def whole(self) -> Span | None:
        """All of its steps; None with fewer than two rows."""
        return self._span(0) if len(self.points) > 1 else None

    def _span(self, start: int) -> Span:
        first, last = self.points[start], self.points[-1]
        return Span(
            steps=last.number - first.number,
            growth=(last.log_norm - first.log_norm) / 2,
            scaled=last.log_scale - first.log_scale,
            angles=last.angles - first.angles,
            pulls=last.pulls - first.pulls,
            log_kept=last.log_kept - first.log_kept,
            rates=last.rates - first.rates,
        )


NO_ROWS = BalanceWindow()

# The columns of a point, but for its number.
(LOG_NORM, SQUARED_ANGLE, PULL, LR, ANGLES, PULLS, LOG_KEPT, RATES, LOG_SCALE) = range(9)


def newest_starts(numbers: Doubles, rows: Doubles, entries: Doubles) -> Ints:
    """Where the newest steps begin that are enough for a coherence.

    Args:
        numbers: of the ``p`` steps of a window, from old to new, ``(p,)``.
        rows: its points but for the number, of ``w`` weights, ``(p, 9, w)``.
        entries: numbers in each matrix, ``(w,)``.

    Returns:
        ``(w,)``, places in the window; -1 where no steps are enough.
    """
    # All spans that end here at once, from short to long: the formulas take arrays, and a hundred
    # weights with 64 points each are not to cost a logging step.
    starts = rows[: 1 - LEAST_ROWS][::-1]
    if not len(starts):
        return np.full(rows.shape[2], -1, dtype=np.int64)
    last = rows[-1]
    steps = numbers[-1] - numbers[: 1 - LEAST_ROWS][::-1, None]
    turns = last[ANGLES] > starts[:, ANGLES]
    # A comparison with NaN is false: without a known pull no span is enough.
    growth = np.abs(coherent_growth(last) - coherent_growth(starts.swapaxes(0, 1)))
    are_enough = turns & is_enough(steps, growth, entries)
    shortest = len(starts) - 1 - are_enough.argmax(0)
    return np.where(are_enough.any(0), shortest, -1)


def coherent_growth(rows: Doubles) -> Doubles:
    """ln N, less what callbacks have made of it, and without what decay has taken away: between two
    rows it changes by κΣθ².

    Args:
        rows: of windows, ``(9, ...)``.

    Returns:
        ``(...)``, up to a number that is the same of all rows of a window.
    """
    grown: Doubles = rows[LOG_NORM] - 2 * (rows[LOG_SCALE] + rows[LOG_KEPT])
    return grown


def is_enough(steps: Numbers, growth: Doubles, entries: Doubles) -> Flags:
    """Whether steps tell κ well enough to be shown.

    Args:
        steps: how many they are.
        growth: the size of the change of `coherent_growth` in them.
        entries: numbers in each matrix.

    Example:
        >>> from lightning_normdyn.functional import coherence_error
        >>> angle, steps, entries = 1e-2, 400, 10_000
        >>> growths = np.array([0.0399, 0.0401])
        >>> coherence_error(angle, growths / (angle**2 * steps), steps, entries).round(4).tolist()
        [0.1001, 0.0999]
        >>> is_enough(steps, growths, np.array(entries)).tolist()
        [False, True]
    """
    # The error of κ is 2/sqrt(κΣθ²d), `lightning_normdyn.functional.coherence_error` with the
    # root of the mean square angle: only the product κΣθ² is left of angles, κ and steps.
    is_sure = growth * entries >= (2 / MOST_ERROR) ** 2
    return np.asarray(is_sure & (steps >= LEAST_STEPS))


def log_of_kept(pull: Numbers) -> Numbers:
    """ln(1-P), what a decay leaves of a norm; NaN for one that leaves nothing."""
    with np.errstate(all="ignore"):
        return np.where(pull < 1, np.log1p(-pull), nan)[()]


__all__ = [
    "BalanceWindow",
    "Passed",
    "Point",
    "Span",
    "coherent_growth",
    "is_enough",
    "log_of_kept",
    "newest_starts",
]
