"""What the metrics' ``plot`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.monitor.plots.axes import (
    MOST_NAMED,
    add_grid,
    axes_or_new,
    depth_colours,
    draw_curve,
    legend_below,
)
from lightning_normdyn.monitor.plots.curves import Doubles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_metric(
    values: Doubles, label: str, single: bool, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """What the metrics' ``plot`` shows: one dot per vector for a single value, one line per vector
    for the values of several steps.

    Args:
        values: ``(s, n)``.
        label: of the y axis.
        single: whether this is the value of one moment, and not a series of one.
        ax: where to draw; a new figure if None.
    """
    fig, ax = axes_or_new(ax)
    steps, vectors = values.shape
    colours = depth_colours(vectors)
    if single:
        # Small dots where large ones would touch.
        size = 20 if vectors <= 100 else 6
        ax.scatter(
            np.arange(vectors),
            values[0],
            c=colours,
            s=size,
        )
        ax.set_xlabel("weight vector")
    else:
        # A single vector needs no name, and more than a few have no room for one.
        named = 1 < vectors <= MOST_NAMED
        for i, colour in enumerate(colours):
            name = f"vector {i}" if named else None
            draw_curve(
                ax,
                np.arange(steps),
                values[:, i],
                color=colour,
                linewidth=1.2,
                label=name,
            )
        ax.set_xlabel("update")
        legend_below(ax)
    ax.set_ylabel(label)
    add_grid(ax)
    return fig, ax
