"""One run against another, weight by weight, at equal fractions of both: do weights turn as far per
step, and does decay take as much of them?

A transfer of hyperparameters to another width or length of a run keeps angles where they were; what
angles are at the end depends on the pull of the decay as well. Numbers of the host, out of two
histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, log
from statistics import median
from typing import NamedTuple

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.tables import MOST_ROWS, paragraph, render

from .curves import layer_names
from .history import History

PARTS = 4
"""Equal parts of a run: enough to tell a warm-up from what follows, and few enough for a line."""

LEGEND = (
    "Over the same quarters of both runs; angle: RMS of the steps' angles, pull: lr x decay, the "
    "share that decay takes of a weight in a step. Where weights have settled and their steps are "
    "as coherent in both runs, the ratio of angles is the root of the ratio of pulls."
)

UNKNOWN = "-"

MEDIAN = "(median)"
"""In the place of a weight's name."""

Ratios = tuple[float | None, ...]


class WeightRatios(NamedTuple):
    """A weight of one run over the same weight of another, part by part; None where one of the two
    has no number, or a 0.

    Args:
        name: of the weight; empty for the medians over all.
        angles: of its RMS angles.
        pulls: of the mean pull of its decay.
    """

    name: str
    angles: Ratios
    pulls: Ratios

    @property
    def distance(self) -> float:
        """How far its angles are from those of the other run: the largest |ln ratio|."""
        farthest = -inf
        for ratio in self.angles:
            # A ratio of 0 has no logarithm, and none is not far from anything.
            if ratio:
                farthest = max(farthest, abs(log(ratio)))
        return farthest


class RunRatios(NamedTuple):
    """A run over another.

    Args:
        weights: those that both runs have, in the order of the network.
        only_here: how many weights the first run alone has.
        only_there: how many the other alone has.
    """

    weights: list[WeightRatios]
    only_here: int
    only_there: int

    @property
    def medians(self) -> WeightRatios:
        """Over all weights."""
        _, angles, pulls = zip(*self.weights, strict=True)
        return WeightRatios("", _medians(angles), _medians(pulls))

    @property
    def farthest_first(self) -> list[WeightRatios]:
        """The weights whose angles differ most come first."""
        return sorted(self.weights, key=lambda weight: weight.distance, reverse=True)

    @property
    def left_out(self) -> str:
        """What is not compared, in words; empty where there is nothing."""
        parts = []
        if self.only_here:
            parts.append(f"{self.only_here} of the first run alone")
        if self.only_there:
            parts.append(f"{self.only_there} of the other run alone")
        if not parts:
            return ""
        return f"Not compared: weights that have no namesake, {' and '.join(parts)}."


def run_ratios(run: History, other: History) -> RunRatios:
    """Angles and pulls of a run over those of another.

    Args:
        run: what is above the fraction bar.
        other: what is below it.

    Raises:
        NormDynError: where no weight is in both of them.

    Example:
        >>> runs = [History(), History()]
        >>> for times, history in enumerate(runs, 1):
        ...     for step in range(8):
        ...         row = {"angular_update/fc": 0.01 * times, "pull/fc": 1e-4}
        ...         history.append(step, row, optimizer_step=step + 1)
        >>> run_ratios(runs[1], runs[0]).weights
        [WeightRatios(name='fc', angles=(2.0, 2.0, 2.0, 2.0), pulls=(1.0, 1.0, 1.0, 1.0))]
    """
    here = layer_names(run, "angular_update")
    there = layer_names(other, "angular_update")
    shared = set(here).intersection(there)
    if not shared:
        raise NormDynError(
            f"the runs have no weight in common to compare: one has "
            f"{_some(here)}, the other {_some(there)}."
        )
    weights = []
    # In the order of the network, which a set has not.
    for name in filter(shared.__contains__, here):
        # Predictions of angles are about the root mean square, and decays of steps add up.
        angles = _ratios(run, other, f"angular_update/{name}", power=2)
        pulls = _ratios(run, other, f"pull/{name}", power=1)
        weights.append(WeightRatios(name, angles, pulls))
    return RunRatios(weights, len(here) - len(shared), len(there) - len(shared))


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none with angular updates"
    more = ", ..." if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _of_parts(
    history: History,
    key: str,
    power: int,
) -> list[float | None]:
    """The power mean of a curve over each part of the run; None where it has no number."""
    steps, values = history.curve(key)
    # The run ends with its last row, whether this curve is in it or not.
    end = int(history[-1]["step"]) + 1
    parts = steps * PARTS // end
    means: list[float | None] = []
    for part in range(PARTS):
        inside = values[parts == part].astype(np.float64)
        known = inside[np.isfinite(inside)]
        mean = None
        # A run that has diverged has parts without any number.
        if known.size:
            mean = float((known**power).mean() ** (1 / power))
        means.append(mean)
    return means


def _ratios(
    run: History,
    other: History,
    key: str,
    power: int,
) -> Ratios:
    """The power means of a curve over those of another run, part by part."""
    these = _of_parts(run, key, power)
    those = _of_parts(other, key, power)
    ratios: list[float | None] = []
    for above, below in zip(these, those, strict=True):
        # Nothing can be said of how much larger something is than nothing.
        if above and below and isfinite(above / below):
            ratios.append(above / below)
        else:
            ratios.append(None)
    return tuple(ratios)


def _medians(rows: Sequence[Ratios]) -> Ratios:
    medians: list[float | None] = []
    for part in zip(*rows, strict=True):
        known = [ratio for ratio in part if ratio is not None]
        # Of no number there is no median, and statistics raises.
        medians.append(median(known) if known else None)
    return tuple(medians)


# -- in a terminal


def heads() -> list[str]:
    """The heads of the columns with ratios.

    Example:
        >>> heads()[:2]
        ['angle 1/4', 'angle 2/4']
    """
    parts = [f"{part}/{PARTS}" for part in range(1, PARTS + 1)]
    return [f"{quantity} {part}" for quantity in ("angle", "pull") for part in parts]


def cells_of(weight: WeightRatios) -> list[str]:
    """A weight's ratios, in the order of `heads`."""
    return [_shown(ratio) for ratio in (*weight.angles, *weight.pulls)]


def _shown(ratio: float | None) -> str:
    """A ratio to two places, or to three digits where that is less.

    Example:
        >>> _shown(0.5), _shown(12.345), _shown(None)
        ('0.50', '12.3', '-')
    """
    if ratio is None:
        return UNKNOWN
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


def as_text(
    title: str,
    ratios: RunRatios,
    width: int | None = None,
) -> str:
    """The table in a terminal, the weights that differ most first.

    Args:
        title: a line above.
        ratios: from `run_ratios`.
        width: columns; None: what the terminal has, and no more weights than one would read.
    """
    rows = [[weight.name, *cells_of(weight)] for weight in ratios.farthest_first]
    if len(rows) > 1:
        rows.insert(0, [MEDIAN, *cells_of(ratios.medians)])
    most = MOST_ROWS if width is None else None
    table = render(title, ["weight", *heads()], rows, width=width, most_rows=most)
    sentences = [LEGEND, ratios.left_out]
    return table + "".join(paragraph(each, width) for each in sentences if each)


__all__ = [
    "LEGEND",
    "MEDIAN",
    "RunRatios",
    "WeightRatios",
    "as_text",
    "cells_of",
    "heads",
    "run_ratios",
]
