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
from math import exp, expm1, inf, isfinite, log, log1p, nan, pi, sqrt, tan
from typing import NamedTuple

import numpy as np

from lightning_normdyn.functional import (
    coherence,
    coherence_error,
    loss_decay,
)

LEAST_STEPS = 50
"""Optimizer steps that a span must have before a coherence is shown."""

LEAST_ROWS = 4
"""Rows that it must have: with fewer, the interpolated angles are a guess."""

MOST_ERROR = 0.1
"""Relative standard error of the coherence from which on it is shown."""

PULL_DROP = 1.5
"""A pull that was constant and then changed by this factor aims at another norm; a schedule that
glides never does."""

SAME_PULL = 1e-3
"""Relative difference up to which two pulls are the same constant."""

MOST_POINTS = 64
"""Rows of a window that are kept; of older ones, every second is left out. Their sums are kept
exactly, so a window only loses places to begin at."""


class Passed(NamedTuple):
    """Sums over the steps between two rows, neither of the two included.

    Args:
        steps: how many they were.
        pull: ΣP.
        log_kept: Σ ln(1-P).
        lr: sum of the learning rates.
    """

    steps: int
    pull: float
    log_kept: float
    lr: float


class MatrixRow(NamedTuple):
    """What one measured step says of a weight matrix.

    Args:
        number: of the optimizer step, from 1.
        squared_norm: of the weight before the step, and before any callback of it.
        squared_angle: of the step, in radians squared.
        pull: relative decay of the step; NaN where nobody can tell.
        lr: its learning rate; NaN where nobody can tell.
        log_scale: Σ ln c over all steps before it, of callbacks that multiply the weight by c after
            each step; NaN where nobody can tell.
    """

    number: int
    squared_norm: float
    squared_angle: float
    pull: float
    lr: float
    log_scale: float = 0.0


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
    """The steps between two points of a window, as one measurement.

    Args:
        steps: how many they are.
        rows: points from the first to the last.
        growth: ln of the last norm over the first.
        scaled: the part of it that callbacks have made by multiplying the weight after each step.
        angles: sum of the squared angles.
        pulls: ΣP; NaN where nobody can tell.
        log_kept: Σ ln(1-P); NaN where nobody can tell.
        rates: sum of the learning rates.
    """

    steps: int
    rows: int
    growth: float
    scaled: float
    angles: float
    pulls: float
    log_kept: float
    rates: float

    @property
    def coherence(self) -> float:
        """κ; NaN where a pull is not known or nothing turned."""
        if not (self.angles > 0 and isfinite(self.log_kept)):
            return nan
        # All steps as one: the product of what each kept is what the span kept.
        pull = -expm1(self.log_kept)
        grown = exp(self.growth - self.scaled)
        return float(coherence(1.0, grown, [pull], [self.angles]))

    @property
    def ratio(self) -> float:
        """How fast the matrix turned against what would hold its norm: the root of κΣθ²/2ΣP; NaN
        without decay, and where the norm would shrink even without."""
        squared = self.coherence * self.angles
        if not (squared > 0 and self.pulls > 0):
            return nan
        return sqrt(squared / (2 * self.pulls))

    def loss_decay(self, noise_coherence: float) -> float:
        """How strongly the loss itself pulls the norm inwards, as weight decay, if pure noise would
        have the coherence ``noise_coherence``."""
        if not self.rates > 0:
            return nan
        steps = self.steps
        angle = sqrt(self.angles / steps)
        drift = (self.growth - self.scaled) / steps
        means = (self.pulls / steps, self.rates / steps, drift)
        return float(loss_decay(*means, angle, noise_coherence))


class BalanceWindow(NamedTuple):
    """Rows of one weight matrix since its norm was last set or its decay last changed by a jump.

    It never changes; `extended` gives the next one.

    Args:
        points: from old to new.

    Example:
        >>> window = BalanceWindow()
        >>> for number in range(1, 302, 50):
        ...     row = MatrixRow(number, 4.0, 1e-4, pull=1e-3, lr=0.1)
        ...     window = window.extended(row, Passed(49, 49e-3, 49 * log1p(-1e-3), 4.9))
        >>> span = window.newest_span(entries=10_000)
        >>> span.steps, round(span.coherence, 2)  # the norm stands still: 2P/θ²
        (150, 20.01)
    """

    points: tuple[Point, ...] = ()

    def extended(self, row: MatrixRow, passed: Passed | None) -> BalanceWindow:
        """With one more row; a new window where the old one ends.

        Args:
            row: the row.
            passed: what happened between the newest row and this one; None where that is not known,
                or the norm was set in between.
        """
        # A matrix of zeros has no direction, and what is not finite is no measurement.
        if not (isfinite(row.squared_norm) and row.squared_norm > 0):
            return NO_ROWS
        # Of vectors that are not those of the callback, nobody can tell what it took away.
        if not (isfinite(row.squared_angle) and isfinite(row.log_scale)):
            return NO_ROWS
        here = (row.number, log(row.squared_norm), row.squared_angle, row.pull, row.lr)
        if not self.points or passed is None or self._ends_at(row.pull):
            # A first row: all sums are 0.
            return BalanceWindow((Point(*here, log_scale=row.log_scale),))
        last = self.points[-1]
        between = passed.steps
        # The angle of the newest row counts once, those between lie on a line to the next one.
        angles = last.squared_angle + between * (last.squared_angle + row.squared_angle) / 2
        point = Point(
            *here,
            angles=last.angles + angles,
            pulls=last.pulls + last.pull + passed.pull,
            log_kept=last.log_kept + log_of_kept(last.pull) + passed.log_kept,
            rates=last.rates + last.lr + passed.lr,
            log_scale=row.log_scale,
        )
        return BalanceWindow(_thinned((*self.points, point)))

    def _ends_at(self, pull: float) -> bool:
        """Whether the pull was constant and has now jumped, in either direction, or is known from
        now on."""
        last = self.points[-1].pull
        # A sum with an unknown pull in it stays unknown for ever.
        if isfinite(last) != isfinite(pull):
            return True
        if len(self.points) < 2 or not last > 0:
            return False
        was_constant = abs(self.points[-2].pull - last) <= SAME_PULL * last
        return was_constant and not last / PULL_DROP < pull < last * PULL_DROP

    def newest_span(self, entries: int) -> Span | None:
        """The newest steps that are enough for a coherence; None if there are not enough.

        Args:
            entries: numbers in the matrix: the more, the smaller the error.
        """
        if len(self.points) < LEAST_ROWS:
            return None
        # All spans that end here at once, from short to long: the formulas take arrays, and a
        # hundred weights with 64 points each are not to cost a logging step.
        points = np.array(self.points[: 1 - LEAST_ROWS][::-1], dtype=np.float64)
        columns = dict(zip(Point._fields, points.T, strict=True))
        last = self.points[-1]
        steps = last.number - columns["number"]
        angles = last.angles - columns["angles"]
        growth = (last.log_norm - columns["log_norm"]) / 2
        growth -= last.log_scale - columns["log_scale"]
        pulls = -np.expm1(last.log_kept - columns["log_kept"])
        with np.errstate(all="ignore"):
            kappas = coherence(np.ones_like(growth), np.exp(growth), pulls[None], angles[None])
            errors = coherence_error(np.sqrt(angles / steps), kappas, steps, entries)
        # A comparison with NaN is false: without a known pull no span is enough.
        enough = np.flatnonzero((steps >= LEAST_STEPS) & (errors <= MOST_ERROR))
        if not len(enough):
            return None
        return self._span(len(points) - 1 - int(enough[0]))

    @property
    def whole(self) -> Span | None:
        """All of its steps; None with fewer than two rows."""
        return self._span(0) if len(self.points) > 1 else None

    @property
    def newest_step(self) -> Span | None:
        """From the last row but one to the last one, for the present drift of the norm."""
        return self._span(-2) if len(self.points) > 1 else None

    def _span(self, start: int) -> Span:
        first, last = self.points[start], self.points[-1]
        return Span(
            steps=last.number - first.number,
            rows=len(self.points[start:]),
            growth=(last.log_norm - first.log_norm) / 2,
            scaled=last.log_scale - first.log_scale,
            angles=last.angles - first.angles,
            pulls=last.pulls - first.pulls,
            log_kept=last.log_kept - first.log_kept,
            rates=last.rates - first.rates,
        )


NO_ROWS = BalanceWindow()


def log_of_kept(pull: float) -> float:
    """ln(1-P), what a decay leaves of a norm; NaN for one that leaves nothing."""
    return log1p(-pull) if pull < 1 else nan


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """At most `MOST_POINTS` of them: the first, and the more the newer they are."""
    if len(points) <= MOST_POINTS:
        return points
    half = MOST_POINTS // 2
    # Every second of the older half each time, so that old ones lie ever further apart.
    return (*points[:-half:2], *points[-half:])


__all__ = ["BalanceWindow", "MatrixRow", "Passed", "Point", "Span", "log_of_kept"]
