"""What came of a fit, as any logger may show it: pictures, charts and a table of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.curves import layer_names
from lightning_normdyn.monitor.plots.layers import plot_curves, plot_heatmap
from lightning_normdyn.monitor.plots.vectors import plot_norm_ridge
from lightning_normdyn.monitor.quantities import Place, shown_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# W&B draws no more of a custom chart than this.
MOST_CHART_ROWS = 10_000
DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Outcome:
    """What came of a fit.

    Args:
        history: all rows.
        layers: one row per weight, the same keys in each; None where a number is not known.
        quantities: the quantities that were asked for; pictures show these.
        label: appended to names, so that a second monitor does not overwrite the first one's.
    """

    history: History
    layers: list[dict[str, Any]]
    quantities: Sequence[str]
    label: str = ""

    @property
    def step(self) -> int:
        """The x value: the last row's."""
        return int(self.history[-1]["step"])

    @property
    def final(self) -> dict[str, float]:
        """The overview at the last row, by log key."""
        return {key: value for key, value in self.history[-1].items() if key.startswith("normdyn/")}

    @cached_property
    def pictures(self) -> dict[str, Any]:
        """By name, each ``(height, width, 3)`` uint8: drawn once for all loggers. Empty without
        matplotlib."""
        if not can_draw():
            return {}
        return {name: _pixels(figure) for name, figure in self._figures()}

    def _figures(self) -> Iterator[tuple[str, Figure]]:
        for quantity in self.shown_in("curves"):
            figure, _ = plot_curves(self.history, quantity)
            yield f"{quantity}{self.label}", figure
        for quantity in self.shown_in("map"):
            figure, _ = plot_heatmap(self.history, quantity=quantity)
            yield f"heat_map_{quantity}{self.label}", figure
        # A ridge shows single vectors, which the history keeps only if they were asked for.
        if any(name.startswith("weight_norm/") for name in self.history.vector_names()):
            figure, _ = plot_norm_ridge(self.history)
            yield f"norm_ridge{self.label}", figure

    def shown_in(self, place: Place) -> list[str]:
        """The quantities for a place that were asked for and recorded."""
        asked_for = [quantity for quantity in shown_in(place) if quantity in self.quantities]
        return [quantity for quantity in asked_for if layer_names(self.history, quantity)]

    def chart(self, quantity: str) -> tuple[list[list[int]], list[list[float]], list[str]]:
        """Steps, values and names of all layers' curves, thinned alike to what W&B draws."""
        names = layer_names(self.history, quantity)
        # All curves share the limit: with hundreds of layers, W&B would leave out whole curves.
        most = max(2, MOST_CHART_ROWS // max(1, len(names)))
        xs = []
        ys = []
        for name in names:
            steps, values = self.history.column(f"{quantity}/{name}")
            # Evenly spaced, and the first and the last row always.
            evenly = np.linspace(0, max(len(steps) - 1, 0), min(most, len(steps)))
            chosen = np.unique(evenly.round().astype(int))
            xs.append(steps[chosen].tolist())
            ys.append(values[chosen].tolist())
        return xs, ys, names


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    # Found, not imported: the import takes a second, even for a fit that draws nothing.
    return find_spec("matplotlib") is not None


def _pixels(figure: Figure) -> Any:
    figure.set_dpi(DOTS_PER_INCH)
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        # A weight's name may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    # A copy without the alpha channel: a view would keep the whole canvas in memory.
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return ""
    cells = [list(map(str, rows[0])), ["---"] * len(rows[0])]
    for row in rows:
        cells.append([_cell(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
    # A bar would begin another column.
    return text.replace("|", "\\|")
