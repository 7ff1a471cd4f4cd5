"""Single vectors: how the norms of one weight spread over a run, and what the metrics' ``plot``
shows."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import Doubles
from lightning_normdyn.monitor.events import LR_DROP, happenings, steps_by_kind
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Floats

from .axes import (
    MOST_NAMED,
    add_grid,
    axes_or_new,
    depth_colours,
    draw_curve,
    event_look,
    event_words,
    legend_below,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_HILLS = 12
_PREFIX = "weight_norm/"


def plot_norm_ridge(
    history: History, ax: Axes | None = None, name: str | None = None
) -> tuple[Figure, Axes]:
    """How the norms of one weight's vectors are spread, at a dozen steps from the first (top) to
    the last.

    Rescalings and LR drops stand at the right edge, at their step.

    Args:
        history: a history with per-vector arrays (``NormDynamicsMonitor(per_vector=True)``).
        ax: where to draw; a new figure if None.
        name: the parameter, e.g. ``"layer1.0.conv1.weight"``; the one with the most vectors if
            None.

    Raises:
        NormDynError: where the history has no per-vector norms, or none of this parameter.
    """
    recorded = [key for key in history.vector_names() if key.startswith(_PREFIX)]
    if not recorded:
        raise NormDynError(
            "a ridge needs per-vector norms, and this history has none; record with "
            "`NormDynamicsMonitor(per_vector=True)`."
        )
    if name is None:
        largest = max(recorded, key=lambda key: history.vector_count(key) or 0)
        name = largest.removeprefix(_PREFIX)
    steps, norms = history.vectors(f"{_PREFIX}{name}")
    # Evenly spaced, and the last one always.
    every = ceil(len(steps) / _MOST_HILLS)
    chosen = [*range(0, len(steps) - every, every), len(steps) - 1]
    steps, norms = steps[chosen].astype(np.float64), norms[chosen]
    drawable = _drawable(norms)
    if not drawable.size:
        raise NormDynError(
            f"`{name}` has no vector with a finite norm above 0; there is nothing to draw."
        )

    # Where norms differ by more than a factor of 20, a linear axis would show the longest alone.
    logarithmic = drawable.max() > 20 * drawable.min()
    values = [_drawable(each) for each in norms]
    if logarithmic:
        values = [np.log(each) for each in values]
    grid = _grid(values)
    if not logarithmic:
        # A tail of a density may reach below 0; a norm does not.
        grid = grid[grid >= 0]
    x = np.exp(grid) if logarithmic else grid

    fig, ax = axes_or_new(ax, height=5.0)
    span = max(float(steps[-1] - steps[0]), 1.0)
    # Hills overlap by more than half, which shows how each grew out of the one before.
    height = 1.6 * span / max(len(steps), 2)
    colours = depth_colours(len(steps))
    for rank, (step, own, colour) in enumerate(zip(steps, values, colours, strict=True)):
        density = _density(own, grid)
        # Without its flat tails, which would draw a line across the whole picture.
        hill = density > 0.003
        # Steps grow downwards, so a hill stands on its step and reaches up, towards smaller ones.
        top = step - height * density[hill]
        ax.fill_between(
            x[hill],
            top,
            step,
            color=colour,
            alpha=0.75,
            linewidth=0,
            zorder=2 + rank,
        )
        ax.plot(
            x[hill],
            top,
            color="white",
            linewidth=0.8,
            zorder=2 + rank,
        )
    if logarithmic:
        ax.set_xscale("log")
    ax.set_ylim(steps[-1] + 0.03 * span, steps[0] - 1.1 * height)
    ax.set_yticks(steps, [str(int(step)) for step in steps])
    ax.set_xlabel(rf"$\Vert w\Vert$ of {short_name(name)}  (weight units)")
    ax.set_ylabel("step")
    ax.set_title(f"Norms of {norms.shape[1]} vectors", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    _mark_events_at_right(ax, history, name)
    return fig, ax


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


def _drawable(norms: Floats) -> Doubles:
    """The norms that an axis can show, as doubles."""
    return norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)


def _grid(values: list[Doubles]) -> Doubles:
    """Places at which densities are computed: all values, and the tails of their kernels."""
    together = np.concatenate(values)
    # Equal norms still need an axis of some width.
    margin = 0.05 * float(np.ptp(together)) or 0.05 * (abs(float(together[0])) or 1.0)
    margin = max(margin, 3 * max(_bandwidth(each) for each in values))
    return np.linspace(together.min() - margin, together.max() + margin, 400)


def _bandwidth(values: Doubles) -> float:
    """Scott's rule."""
    return float(values.std()) * values.size**-0.2 if values.size else 0.0


def _density(values: Doubles, grid: Doubles) -> Doubles:
    """A Gaussian kernel density on ``grid``, scaled to a height of 1."""
    if not values.size:
        return np.zeros_like(grid)
    # Not narrower than the picture can show.
    bandwidth = max(_bandwidth(values), float(grid[-1] - grid[0]) / 120)
    # Kernels that lie closer together than an eighth of their width look like one: thousands of
    # vectors become a few centres.
    places, counts = np.unique(np.round(8 * (values / bandwidth)), return_counts=True)
    distance = grid[:, None] / bandwidth - places[None, :] / 8
    density = np.exp(-0.5 * distance**2) @ counts
    return np.asarray(density / (density.max() or 1.0))


def _mark_events_at_right(
    ax: Axes,
    history: History,
    name: str,
) -> None:
    """Horizontal lines at the steps of the events: short ones, but for a drop of the learning rate,
    which concerns every weight."""
    handles = []
    words = {told.kind: event_words(told) for told in happenings(history)}
    for kind, steps in steps_by_kind(history, name).items():
        colour, _ = event_look(kind)
        left = 0.0 if kind == LR_DROP else 0.96
        for step in steps:
            line = ax.axhline(step, left, 1.0, color=colour, linewidth=1.2, zorder=1)
        # One entry in the legend for all of a kind.
        line.set_label(words[kind])
        handles.append(line)
    if handles:
        # Above the axes: inside, some hill would hide it.
        ax.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=8,
        )
