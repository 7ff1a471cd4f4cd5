"""How weights lie in the space of their inputs: what `InputSpanMonitor` recorded, as the WRS
paper's figures show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import curves_of
from lightning_normdyn.monitor.history import History

from .axes import (
    OKABE_ITO,
    add_grid,
    axes_or_new,
    draw_curve,
    figure_of,
    finish,
    layer_labels,
    legend_below,
    legend_inside,
    new_figure,
    run_style,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = ("ggd_shape_input", "ggd_shape_parameter", "input_span_noise")
# Quantity and histogram of each view of a weight, its line, and what a legend calls it.
_VIEWS = (
    ("ggd_shape_input", "histogram_input", "-", "input space"),
    ("ggd_shape_parameter", "histogram_parameter", "--", "as they are"),
)
_GAUSSIAN = 2.0


def plot_input_span(
    histories: History | Mapping[str, History], ax: Sequence[Axes] | None = None
) -> tuple[Figure, list[Axes]]:
    """Layer by layer, at the newest record: the shape of the weights in input space, their shape as
    they are, and their noise share.

    The first two panels are the WRS paper's Figure 5; `plot_weight_shape` is its Figure 6.

    Args:
        histories: of `InputSpanMonitor`, by the label of each run; or one of them.
        ax: three axes; a new figure if None.

    Returns:
        the figure and the axes of the three panels.

    Raises:
        NormDynError: where a history was not recorded by InputSpanMonitor, or ``ax`` holds fewer
            than three axes.

    Example:
        >>> history = History()
        >>> quantities = ("ggd_shape_input", "ggd_shape_parameter", "input_span_noise")
        >>> row = {f"{quantity}/conv{i}.weight": 1.0 for quantity in quantities for i in range(3)}
        >>> history.append(0, row, optimizer_step=1)
        >>> fig, axes = plot_input_span(history)
        >>> len(axes)
        3
    """
    runs = _labelled(histories)
    if ax is None:
        ax = new_figure(15.0, 4.4).subplots(1, 3).tolist()
    elif len(ax) < 3:
        raise NormDynError(
            f"the input span has 3 panels, and `ax` holds {len(ax)} axes; pass 3 or None."
        )
    # One order of layers for all panels and runs, and a layer that has no shape (constant inputs)
    # keeps its place.
    names: dict[str, None] = {}
    for history in runs.values():
        names.update(dict.fromkeys(curves_of(history, "input_span_noise")))
    for quantity, panel in zip(_PANELS, ax, strict=False):
        _draw_by_layer(panel, runs, quantity, list(names))
    legend_inside(ax[2])
    return figure_of(ax[0]), list(ax[:3])


def _draw_by_layer(
    ax: Axes, runs: Mapping[str, History], quantity: str, names: Sequence[str]
) -> None:
    """One panel: the newest value of each layer, a line for each run."""
    places = np.arange(len(names))
    few = len(names) <= 40
    drawn = []
    for i, (label, history) in enumerate(runs.items()):
        # NaN leaves a gap in the line.
        values = np.full(len(names), np.nan)
        curves = curves_of(history, quantity)
        for place, name in enumerate(names):
            if name in curves:
                values[place] = curves[name][1][-1]
        style = run_style(i, label if len(runs) > 1 else "")
        # Dots tell the layers apart, as long as they do not touch.
        if few:
            style["marker"] = "osD^"[i % 4]
        draw_curve(
            ax,
            places,
            values,
            linewidth=1.6 if few else 0.9,
            markersize=4,
            **style,
        )
        drawn.append(values)
    finish(ax, quantity, np.concatenate(drawn))
    if quantity != "input_span_noise":
        ax.axhline(
            _GAUSSIAN,
            color="black",
            linewidth=0.8,
            linestyle=(0, (2, 2)),
            zorder=1,
        )
    ax.set_xlabel("layer")
    # As many names as have room below a panel.
    every = ceil(len(names) / 20)
    labels = layer_labels(names)[::every]
    ax.set_xticks(
        places[::every],
        labels,
        rotation=60,
        ha="right",
        fontsize=7,
    )


def plot_weight_shape(
    histories: History | Mapping[str, History], name: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """The shape of one layer's weights over time, in input space (solid) and as they are (dashed):
    the WRS paper's Figure 6.

    Args:
        histories: of `InputSpanMonitor`, by the label of each run; or one of them.
        name: the parameter; the middle layer if None.
        ax: where to draw; a new figure if None.

    Raises:
        NormDynError: where a history has no shapes, or none of this parameter.
    """
    runs = _labelled(histories)
    name = _middle_layer(next(iter(runs.values()))) if name is None else name
    fig, ax = axes_or_new(ax)
    drawn = []
    for i, (label, history) in enumerate(runs.items()):
        for quantity, _, line, view in _VIEWS:
            steps, values = history.column(f"{quantity}/{name}")
            style = run_style(i, f"{label}, {view}" if label else view)
            # The line tells the view, so that colour alone tells the run.
            style["linestyle"] = line
            draw_curve(ax, steps, values, linewidth=1.6, **style)
            drawn.append(values)
    finish(ax, "ggd_shape_input", np.concatenate(drawn))
    ax.set_title(f"Shape of the weights of {short_name(name)}")
    legend_below(ax)
    return fig, ax


def plot_weight_histogram(
    history: History, name: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """How one layer's weights are distributed, in input space and as they are, at the newest record
    (WRS paper, Figure S2).

    Args:
        history: of `InputSpanMonitor`.
        name: the parameter; the middle layer if None.
        ax: where to draw; a new figure if None.

    Raises:
        NormDynError: where the history has no histograms, or none of this parameter.
    """
    name = _middle_layer(history) if name is None else name
    fig, ax = axes_or_new(ax)
    reach = history.meta.get("histogram_reach")
    # The file may say anything.
    if not isinstance(reach, float | int) or not 0 < reach < 1e6:
        reach = 6.0
    for colour, (quantity, kind, line, view) in zip(OKABE_ITO, _VIEWS, strict=False):
        key = f"{kind}/{name}"
        # A layer may be too large to be rotated into input space.
        if kind == "histogram_input" and history.vector_count(key) is None:
            continue
        counts = history.vectors(key)[1][-1].astype(np.float64)
        edges = np.linspace(-reach, reach, len(counts) + 1)
        density = counts / counts.sum() / (edges[1] - edges[0])
        shape = history.column(f"{quantity}/{name}")[1][-1]
        label = rf"{view}: $\beta$ = {shape:.2f}"
        ax.stairs(
            density,
            edges,
            color=colour,
            linestyle=line,
            linewidth=1.6,
            label=label,
        )
    # Tails are what tells the shapes apart.
    ax.set_yscale("log")
    ax.set(
        xlabel="weight, in units of the layer's root mean square",
        ylabel="density",
        title=f"Weights of {short_name(name)}",
    )
    add_grid(ax)
    ax.spines[["top", "right"]].set_visible(False)
    legend_inside(ax)
    return fig, ax


def _labelled(histories: History | Mapping[str, History]) -> Mapping[str, History]:
    """Runs by label; a single one needs none."""
    if isinstance(histories, History):
        return {"": histories}
    if not histories:
        raise NormDynError("a picture of runs needs at least one, got none.")
    return histories


def _middle_layer(history: History) -> str:
    names = list(curves_of(history, "ggd_shape_parameter"))
    return names[len(names) // 2]
