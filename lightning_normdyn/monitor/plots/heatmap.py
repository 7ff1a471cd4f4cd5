"""A quantity of all layers as a map, layer by step: a layer that is off is the row that differs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.monitor.curves import (
    FARTHEST_RATIO,
    MOST_COLUMNS,
    Curves,
    Doubles,
    as_table,
    curves_of,
    deviations,
    farthest,
    over_layers,
)
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Ints
from lightning_normdyn.theory.words import AS_EXPECTED

from .axes import Limits, axes_or_new, drawn_as, layer_labels, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# The colours of ratios beyond the farthest one, on either side.
_BELOW, _ABOVE = "#1F4FD8", "#D7191C"
# Rows of a map that are named before all others, and how far off they are at least: for ratios what
# a verdict calls off, for other quantities twice the median or half of it.
_MOST_ABNORMAL = 8
_ABNORMAL = {"ratio": log(AS_EXPECTED[1]), "log": log(2.0), "linear": 6.0}
# Inches that the name of a layer takes.
_LINE = 0.13


def plot_heatmap(
    history: History,
    ax: Axes | None = None,
    quantity: str = "effective_lr",
    *,
    limits: Limits | None = None,
) -> tuple[Figure, Axes]:
    """Layer by step, the quantity as colour: the layer that is off is the row that differs.

    Args:
        history: what was recorded. Between two of its records a layer shows the earlier one.
        ax: where to draw; a new figure, taller for more layers, if None.
        quantity: any recorded quantity.
        limits: values that the colours reach at least, e.g. those of other runs beside this one
            (`shared_limits`).

    Raises:
        NormDynError: where the history has no curve of this quantity.
    """
    from matplotlib.colors import LogNorm

    curves = curves_of(history, quantity)
    look = drawn_as(quantity)
    labels = layer_labels(list(curves))
    # Taller for more layers, up to what a page can hold.
    height = min(9.0, 2.2 + 0.16 * len(labels))
    fig, ax = axes_or_new(ax, height)
    edges, table = cells_of(curves)
    values = np.concatenate([table.ravel(), limits or ()])
    norm, colours = _colouring(values, look.scale)

    # The colour of cells in which nothing was recorded.
    ax.set_facecolor("#D9D9D9")
    rows = np.arange(len(labels) + 1) - 0.5
    cells = np.ma.masked_invalid(table)
    mesh = ax.pcolormesh(
        edges,
        rows,
        cells,
        norm=norm,
        cmap=colours,
        rasterized=True,
    )
    # The first layer on top, as in a listing of the network.
    ax.invert_yaxis()

    # Of many layers, as many names as have room.
    room = ax.get_position().height * fig.get_figheight()
    abnormal = abnormal_rows(curves, look.scale)
    shown = named_rows(len(labels), abnormal, max(int(room / _LINE), 1))
    size = 8 if len(labels) <= 20 else 6
    ax.set_yticks(shown, [labels[row] for row in shown], fontsize=size)
    # Where not all rows are named, a reader must see which names are there for a reason.
    if len(shown) < len(labels):
        for row, text in zip(shown, ax.get_yticklabels(), strict=True):
            if row in abnormal:
                text.set_fontweight("bold")
    ax.set(xlabel="step", title=look.title)
    bar = fig.colorbar(
        mesh,
        ax=ax,
        label=look.axis,
        extend=_beyond(values, norm),
    )
    if isinstance(norm, LogNorm):
        plain_log_ticks(bar.ax.yaxis, *mesh.get_clim())
    return fig, ax


def _colouring(values: Doubles, scale: str) -> tuple[Normalize, Any]:
    """How values become colours: two hues around what is neutral, else from dark to bright."""
    from matplotlib import colormaps
    from matplotlib.colors import CenteredNorm, LogNorm, Normalize

    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    largest = float(np.abs(finite).max(initial=0.0))
    if scale == "ratio" and positive.size:
        # The same ends in every picture: the noise of a healthy run has to look like nothing.
        # What lies beyond has colours of its own, which the ends of the bar show.
        colours = colormaps["PuOr_r"].with_extremes(under=_BELOW, over=_ABOVE)
        return LogNorm(1 / FARTHEST_RATIO, FARTHEST_RATIO), colours
    if scale == "log" and positive.size and positive.max() > positive.min():
        return LogNorm(float(positive.min()), float(positive.max())), "viridis"
    if scale == "linear" and largest > 0:
        return CenteredNorm(0.0, largest), "PuOr_r"
    # A single number, or none: any colour does, but the ends must differ.
    if finite.size:
        return Normalize(finite.min() - 0.5, finite.max() + 0.5), "viridis"
    return Normalize(0, 1), "viridis"


def _beyond(values: Doubles, norm: Normalize) -> str:
    """Which ends of a colour bar something lies beyond."""
    finite = values[np.isfinite(values)]
    below = norm.vmin is not None and bool((finite < norm.vmin).any())
    above = norm.vmax is not None and bool((finite > norm.vmax).any())
    names = {(True, True): "both", (True, False): "min", (False, True): "max"}
    return names.get((below, above), "neither")


def abnormal_rows(curves: Curves, scale: str) -> list[int]:
    """Rows of a map that are far off at the end, the farthest first."""
    places = {name: row for row, name in enumerate(curves)}
    far = deviations(curves, scale)
    names = farthest(curves, scale, _MOST_ABNORMAL)
    return [places[name] for name in names if far[name] > _ABNORMAL[scale]]


def named_rows(
    count: int,
    abnormal: Sequence[int],
    room: int,
) -> list[int]:
    """Which of ``count`` rows are named: the abnormal ones, and of the others as many as have room
    beside them, evenly spaced."""
    every = ceil(count / room)
    named: list[int] = []
    for row in (*abnormal, *range(0, count, every)):
        # Two names closer than this would lie on each other.
        if all(abs(row - other) >= every for other in named):
            named.append(row)
    return sorted(named)


def cells_of(curves: Curves) -> tuple[Doubles, Doubles]:
    """What a map shows: column edges ``(c + 1,)`` and values ``(l, c)``, NaN where nothing was
    recorded. Between two of its records a layer shows the earlier one."""
    steps, table = as_table(curves)
    return _in_columns(steps, _fill_forward(table))


def _fill_forward(table: Doubles) -> Doubles:
    """Gaps between two values of a row take the earlier one; before the first and after the last
    value nothing is made up."""
    filled = table.copy()
    for row in filled:
        known = np.flatnonzero(~np.isnan(row))
        if known.size:
            inside = np.arange(known[0], known[-1] + 1)
            # For each place, the last known one that is not behind it.
            position = np.searchsorted(known, inside, side="right") - 1
            row[inside] = row[known[position]]
    return filled


def _in_columns(steps: Ints, table: Doubles) -> tuple[Doubles, Doubles]:
    """As many columns as a picture can show, each the median of neighbouring steps: column edges
    ``(c + 1,)``, values ``(l, c)``."""
    count = min(MOST_COLUMNS, len(steps))
    parts = np.array_split(np.arange(len(steps)), count)
    firsts = np.array([steps[part[0]] for part in parts], dtype=np.float64)
    # The last column is as wide as the others are on average; a single one has no other.
    width = (firsts[-1] - firsts[0]) / max(count - 1, 1) or 1.0
    edges = np.append(firsts, steps[-1] + width)

    # Over the steps of a part, as elsewhere over layers: the table stands on its side.
    columns = [over_layers(np.nanmedian, table[:, part].T) for part in parts]
    return edges, np.array(columns).T
