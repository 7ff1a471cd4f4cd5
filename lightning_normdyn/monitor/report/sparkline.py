"""A small curve of one layer as part of the page's own markup: it needs no script, takes the page's
colours in light and dark, and is sharp on any screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_normdyn.monitor.curves import Curves, Doubles, as_table, over_layers, recorded_curves
from lightning_normdyn.monitor.events import LR_DROP, steps_by_kind
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Floats, Ints

from .thinning import thinned

WIDTH, HEIGHT = 300, 80
"""Of the drawing, in units that the page stretches to the room there is."""

# Points of a curve: more than the pixels of a phone show nothing more.
_MOST_POINTS = 160
_LEAST_OTHERS = 3
# Factors of ten below the largest value; what is smaller runs along the lower edge.
_MOST_DECADES = 6
# What a layer is held against, the best that may be known first.
_EXPECTATIONS = (
    "expected_angular_update",
    "equilibrium_angular_update",
    "balanced_angular_update",
)


class Sparkline(NamedTuple):
    """A drawing: paths of SVG, and what stands at its edges.

    Args:
        measured: the angles of the layer.
        expected: what is expected of them; empty where nothing is.
        others: the median of the layers that it is compared with; empty where there are too few.
        drops: x of each drop of the learning rate.
        top: the value at the upper edge.
        bottom: the value at the lower edge.
        first: the first step.
        last: the last step.
    """

    measured: str
    expected: str
    others: str
    drops: list[float]
    top: str
    bottom: str
    first: int
    last: int


def sparkline(
    history: History,
    name: str,
    others: Sequence[str],
) -> Sparkline | None:
    """The angles of a layer, logarithmic, beside what is expected and the median of other layers;
    None where nothing of it can be drawn.

    Args:
        history: of the run.
        name: of the layer.
        others: names of the layers that it is compared with.
    """
    # Of a weight that has both, the angle of its vectors is the one that others are compared by.
    angles = recorded_curves(history, "matrix_angle")
    angles |= recorded_curves(history, "angular_update")
    if name not in angles:
        return None
    steps, values = angles[name]
    curves = {"measured": (steps, values)}
    for quantity in _EXPECTATIONS:
        expected = recorded_curves(history, quantity)
        if name in expected:
            curves["expected"] = expected[name]
            break
    # Without the layer itself: of few layers it would pull the median towards its own curve.
    among = {}
    for other in others:
        if other in angles and other != name:
            among[other] = angles[other]
    # The median of two is neither of them.
    if len(among) >= _LEAST_OTHERS:
        curves["others"] = _median_of(among)

    view = _View.of(curves)
    if view is None:
        return None
    paths = {kind: view.path(*curve) for kind, curve in curves.items()}
    drops = []
    for step in steps_by_kind(history).get(LR_DROP, []):
        # The layer may have been measured later, or not to the end.
        if view.first <= step <= view.last:
            drops.append(view.x(step))
    return Sparkline(
        measured=paths["measured"],
        expected=paths.get("expected", ""),
        others=paths.get("others", ""),
        drops=drops,
        top=f"{view.high:.1e}",
        bottom=f"{view.low:.1e}",
        first=view.first,
        last=view.last,
    )


def _median_of(curves: Curves) -> tuple[Ints, Floats]:
    steps, table = as_table(curves)
    return steps, over_layers(np.nanmedian, table).astype(np.float32)


class _View(NamedTuple):
    """What of steps and values the drawing shows."""

    first: int
    last: int
    low: float
    high: float

    @classmethod
    def of(cls, curves: Curves) -> _View | None:
        """The smallest that holds these curves; None where none of their values is above 0."""
        values = np.concatenate([values for _, values in curves.values()]).astype(np.float64)
        drawable = values[np.isfinite(values) & (values > 0)]
        if not drawable.size:
            return None
        steps, _ = curves["measured"]
        high = float(drawable.max())
        low = max(float(drawable.min()), high / 10**_MOST_DECADES)
        # Within less than a decade, noise would look like the curve's course.
        if high < 10 * low:
            middle = np.sqrt(low * high)
            low, high = float(middle / 10**0.5), float(middle * 10**0.5)
        return cls(int(steps[0]), int(steps[-1]), low, high)

    def x(self, step: float) -> float:
        """Where a step is from the left."""
        return round(WIDTH * (step - self.first) / max(self.last - self.first, 1), 1)

    def path(self, steps: Ints, values: Floats) -> str:
        """A curve as the ``d`` of an SVG path, interrupted where it has no value."""
        steps, values = thinned(steps, values, _MOST_POINTS)
        ys = self._ys(values.astype(np.float64))
        parts: list[str] = []
        pen = "M"
        for step, y in zip(steps.tolist(), ys.tolist(), strict=True):
            if not np.isfinite(y):
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(step):g} {y:g}")
            pen = "L"
        # A path of one point shows nothing; a line of length zero with round ends is a dot.
        if len(parts) == 1:
            parts.append("h0")
        return "".join(parts)

    def _ys(self, values: Doubles) -> Doubles:
        """From the top; what is too small to be shown runs along the lower edge."""
        clipped = np.clip(values, self.low, self.high)
        share = np.log(clipped / self.low) / np.log(self.high / self.low)
        return np.asarray((HEIGHT * (1 - share)).round(1))
