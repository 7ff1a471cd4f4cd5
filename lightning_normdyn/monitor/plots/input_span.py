"""How weights lie in the space of their inputs: what `InputSpanMonitor` recorded, as the WRS paper's
figures show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import (
    OKABE_ITO,
    axes_or_new,
    figure_of,
    finish,
    legend_below,
    legend_inside,
    marker,
    new_figure,
)
from lightning_normdyn.monitor.plots.curves import curves_of
from lightning_normdyn.monitor.plots.labels import (
    elide,
    in_legend,
    layer_labels,
    plain_text,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        >>> row = {f"{q}/conv{i}.weight": 1.0 for q in ("ggd_shape_input", "ggd_shape_parameter", "input_span_noise") for i in range(3)}
        >>> history.append(0, row, optimizer_step=1)
        >>> fig, axes = plot_input_span(history)
        >>> len(axes)
        3
    """
    runs = _labelled_runs(histories)
    if ax is None:
        ax = new_figure(15.0, 4.4).subplots(1, 3).tolist()
    elif len(ax) < 3:
        raise NormDynError(
            f"the input span has 3 panels, and `ax` holds {len(ax)} axes; pass 3 or None."
        )
    # One order of layers for all panels and runs, and a layer that has no shape (constant inputs)
    # keeps its place.
    names = list(
        dict.fromkeys(
            name for history in runs.values() for name in curves_of(history, "input_span_noise")
        )
    )
    for quantity, panel in zip(
        ("ggd_shape_input", "ggd_shape_parameter", "input_span_noise"), ax, strict=False
    ):
        seen = []
        for i, (label, history) in enumerate(runs.items()):
            found = curves_of(history, quantity)
            values = np.array(
                [found[name][1][-1] if name in found else np.nan for name in names],
                dtype=np.float64,
            )
            line = ("-", (0, (5, 2)), "-.", (0, (1, 1)))[i % 4]
            panel.plot(
                np.arange(len(names)),
                values,
                color=OKABE_ITO[i % len(OKABE_ITO)],
                linestyle=line,
                linewidth=1.6 if len(names) <= 40 else 0.9,
                marker="osD^"[i % 4] if len(names) <= 40 else marker(names),
                markersize=4,
                label=in_legend(plain_text(elide(label, 40))) if len(runs) > 1 else None,
            )
            seen.append(values)
        finish(panel, quantity, np.concatenate(seen))
        if quantity != "input_span_noise":
            panel.axhline(
                2.0, color="black", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1
            )  # a Gaussian
        panel.set_xlabel("layer")
        every = -(-len(names) // 20)
        panel.set_xticks(
            range(0, len(names), every),
            layer_labels(names)[::every],
            rotation=60,
            ha="right",
            fontsize=7,
        )
    legend_inside(ax[2])
    return figure_of(ax[0]), list(ax[:3])


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
    runs = _labelled_runs(histories)
    name = _middle_layer(next(iter(runs.values()))) if name is None else name
    fig, ax = axes_or_new(ax)
    seen = []
    for i, (label, history) in enumerate(runs.items()):
        for quantity, line, where in (
            ("ggd_shape_input", "-", "input space"),
            ("ggd_shape_parameter", "--", "as they are"),
        ):
            steps, values = history.column(f"{quantity}/{name}")
            text = in_legend(plain_text(elide(f"{label}, {where}" if label else where, 40)))
            ax.plot(
                steps,
                values,
                color=OKABE_ITO[i % len(OKABE_ITO)],
                linestyle=line,
                linewidth=1.6,
                label=text,
                marker=marker(steps),
            )
            seen.append(values)
    finish(ax, "ggd_shape_input", np.concatenate(seen))
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
    if not isinstance(reach, float | int) or not 0 < reach < 1e6:  # the file may say anything
        reach = 6.0
    drawn = (
        ("histogram_input", "ggd_shape_input", "input space", "-"),
        ("histogram_parameter", "ggd_shape_parameter", "as they are", "--"),
    )
    for i, (kind, quantity, where, line) in enumerate(drawn):
        if f"{kind}/{name}" not in history.vector_names() and kind == "histogram_input":
            continue  # too large a layer to be rotated
        counts = history.vectors(f"{kind}/{name}")[1][-1].astype(np.float64)
        edges = np.linspace(-reach, reach, len(counts) + 1)
        shape = history.column(f"{quantity}/{name}")[1][-1]
        density = counts / counts.sum() / (edges[1] - edges[0])
        ax.stairs(
            density,
            edges,
            color=OKABE_ITO[i],
            linestyle=line,
            linewidth=1.6,
            label=rf"{where}: $\beta$ = {shape:.2f}",
        )
    ax.set_yscale("log")  # tails are what tells the shapes apart
    ax.set_xlabel("weight, in units of the layer's root mean square")
    ax.set_ylabel("density")
    ax.set_title(f"Weights of {short_name(name)}")
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    legend_inside(ax)
    return fig, ax


def _labelled_runs(histories: History | Mapping[str, History]) -> Mapping[str, History]:
    runs = {"": histories} if isinstance(histories, History) else histories
    if not runs:
        raise NormDynError("a picture of runs needs at least one, got none.")
    return runs


def _middle_layer(history: History) -> str:
    names = list(curves_of(history, "ggd_shape_parameter"))
    return names[len(names) // 2]
