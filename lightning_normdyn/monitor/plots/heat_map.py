"""A quantity of all layers as colours, layer by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import axes_or_new, drawn_as, plain_log_ticks
from lightning_normdyn.monitor.plots.curves import Doubles, as_table, curves_of
from lightning_normdyn.monitor.plots.labels import layer_labels
from lightning_normdyn.monitor.records import Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_heatmap(
    history: History,
    ax: Axes | None = None,
    quantity: str = "effective_lr",
    *,
    limits: tuple[float, float] | None = None,
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
    from matplotlib.colors import CenteredNorm, LogNorm, Normalize

    curves = curves_of(history, quantity)
    names = list(curves)
    fig, ax = axes_or_new(ax, height=min(9.0, 2.2 + 0.16 * len(names)))
    steps, table = as_table(curves)
    table = _fill_forward(table)
    edges, table = _bin_columns(steps, table)

    finite = np.concatenate([table[np.isfinite(table)], limits or ()])
    positive = finite[finite > 0]
    scale = drawn_as(quantity).scale
    norm: Normalize
    if scale == "ratio" and positive.size:
        reach = max(float(np.exp(np.abs(np.log(positive)).max())), 1.05)
        norm, colours = LogNorm(1 / reach, reach), "PuOr_r"
    elif scale == "log" and positive.size and positive.max() > positive.min():
        norm, colours = LogNorm(float(positive.min()), float(positive.max())), "viridis"
    elif scale == "linear" and finite.size and np.abs(finite).max() > 0:
        norm, colours = CenteredNorm(0.0, float(np.abs(finite).max())), "PuOr_r"
    else:
        norm, colours = (
            Normalize(*((finite.min() - 0.5, finite.max() + 0.5) if finite.size else (0, 1))),
            "viridis",
        )

    ax.set_facecolor("#D9D9D9")  # nothing recorded
    rows = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(
        edges, rows, np.ma.masked_invalid(table), norm=norm, cmap=colours, rasterized=True
    )
    ax.invert_yaxis()
    inches = ax.get_position().height * fig.get_figheight()
    every = -(-len(names) // max(int(inches / 0.13), 1))
    ax.set_yticks(
        range(0, len(names), every),
        layer_labels(names)[::every],
        fontsize=8 if len(names) <= 20 else 6,
    )
    ax.set_xlabel("step")
    ax.set_title(drawn_as(quantity).title)
    bar = fig.colorbar(mesh, ax=ax, label=drawn_as(quantity).axis)
    if isinstance(norm, LogNorm):
        plain_log_ticks(bar.ax.yaxis, *mesh.get_clim())
    return fig, ax


def _fill_forward(table: Doubles) -> Doubles:
    """Gaps between two values of a row take the earlier one; before the first and after the last
    value nothing is made up."""
    filled = table.copy()
    for row in filled:
        known = np.flatnonzero(~np.isnan(row))
        if known.size:
            inside = np.arange(known[0], known[-1] + 1)
            row[inside] = row[known[np.searchsorted(known, inside, side="right") - 1]]
    return filled


def _bin_columns(steps: Ints, table: Doubles, most: int = 300) -> tuple[Doubles, Doubles]:
    """At most ``most`` columns, each the median of neighbouring steps: column edges ``(c + 1,)``,
    values ``(l, c)``."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    firsts = np.array([steps[part[0]] for part in parts], dtype=np.float64)
    width = float(firsts[-1] - firsts[0]) / (len(firsts) - 1) if len(firsts) > 1 else 1.0
    edges = np.append(firsts, max(float(steps[-1]), firsts[-1]) + width)
    # The median of nothing is NaN without a warning only if it is never asked for.
    columns = [
        [
            np.median(cells[~np.isnan(cells)]) if not np.isnan(cells).all() else np.nan
            for cells in table[:, part]
        ]
        for part in parts
    ]
    return edges, np.array(columns).T
