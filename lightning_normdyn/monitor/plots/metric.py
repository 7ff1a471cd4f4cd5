"""What the metrics' ``plot`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.monitor.plots.axes import (
    MOST_NAMED,
    axes_or_new,
    depth_colours,
    legend_below,
    marker,
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
    colours = depth_colours(values.shape[1])
    if single:
        ax.scatter(
            np.arange(values.shape[1]), values[0], c=colours, s=20 if values.shape[1] <= 100 else 6
        )
        ax.set_xlabel("weight vector")
    else:
        for i, colour in enumerate(colours):
            steps = np.arange(len(values))
            named = 1 < values.shape[1] <= MOST_NAMED
            ax.plot(
                steps,
                values[:, i],
                color=colour,
                linewidth=1.2,
                marker=marker(steps),
                label=f"vector {i}" if named else None,
            )
        ax.set_xlabel("update")
        legend_below(ax)
    ax.set_ylabel(label)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    return fig, ax
