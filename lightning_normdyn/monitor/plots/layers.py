"""A quantity of all layers of one run as curves, and curves and maps as panels of an overview."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.angles import compared_angles
from lightning_normdyn.monitor.curves import (
    Curves,
    as_table,
    curves_of,
    evenly_spaced,
    farthest,
    over_layers,
    pictured,
    recorded_curves,
)
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import drawn_with
from lightning_normdyn.monitor.records import Floats

from .axes import (
    MOST_NAMED,
    OKABE_ITO,
    Limits,
    axes_or_new,
    depth_colours,
    draw_curve,
    drawn_as,
    figure_of,
    finish,
    label_ends,
    layer_labels,
    legend_below,
    mark_events,
    new_figure,
)
from .heatmap import plot_heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Layers that a picture names at their curves.
MOST_EXTREME = 3
# Layers that the bar of depths names.
_DEPTHS_NAMED = 5


def plot_effective_lr(
    history: History,
    ax: Axes | None = None,
    quantity: str = "effective_lr",
    *,
    limits: Limits | None = None,
) -> tuple[Figure, Axes]:
    """Curves of a quantity, one per layer, coloured by depth.

    Args:
        history: what was recorded.
        ax: where to draw; a new figure if None.
        quantity: any recorded quantity, e.g. ``"direction_lr"``, ``"weight_norm"``.
        limits: values that the axis holds at least, e.g. those of other runs beside this one
            (`shared_limits`).

    Raises:
        NormDynError: where the history has no curve of this quantity.

    Example:
        >>> history = History()
        >>> for step in range(20):
        ...     values = {f"effective_lr/conv{i}.weight": 0.1 / (1 + i + step) for i in range(3)}
        ...     history.append(step, values, optimizer_step=step + 1)
        >>> fig, ax = plot_effective_lr(history)
        >>> len(ax.get_lines())
        3
    """
    curves = curves_of(history, quantity)
    fig, ax = axes_or_new(ax)
    # Where a legend names all of them, no name has to stand at a curve.
    extreme: list[str] = []
    if len(curves) > MOST_NAMED:
        extreme = farthest(curves, drawn_as(quantity).scale, MOST_EXTREME)
    _draw_by_depth(fig, ax, curves, extreme)
    drawn = [values for _, values in curves.values()]
    for beside in drawn_with(quantity)[1:]:
        drawn += _draw_behind(ax, curves, recorded_curves(history, beside), beside)
    finish(ax, quantity, np.concatenate(drawn), limits)
    mark_events(ax, history)
    _name_extreme(ax, curves, extreme)
    legend_below(ax)
    return fig, ax


def plot_angular_update(
    history: History, ax: Axes | None = None, *, limits: Limits | None = None
) -> tuple[Figure, Axes]:
    """The angular updates of all layers as a bundle, and the median of those that have a prediction
    beside the prediction's median.

    Only scale-invariant layers have a prediction. A classifier's head turns as its own loss asks:
    in the median it would move the curve away from a prediction that was never about it. Layers
    outside the median are drawn dotted. A history without predictions shows the median of its
    scale-invariant layers, or of all layers where it does not say which these are.

    The band is 10 % around the predictions: from below the smallest to above the largest of all
    layers.

    Args:
        history: what was recorded.
        ax: where to draw; a new figure if None.
        limits: as in `plot_effective_lr`.

    Raises:
        NormDynError: where the history has no angular updates.
    """
    curves = curves_of(history, "angular_update")
    fig, ax = axes_or_new(ax)
    extreme = farthest(curves, "log", MOST_EXTREME)
    angles = compared_angles(history)
    _draw_bundle(ax, curves, angles.names, angles.which, extreme)
    drawn = [as_table(curves)[1].ravel()]
    draw_curve(
        ax,
        angles.steps,
        angles.measured,
        color=OKABE_ITO[0],
        linewidth=2.0,
        label=f"median, {angles.which}",
    )
    if angles.expected is not None:
        draw_curve(
            ax,
            angles.steps,
            angles.expected,
            color="black",
            linewidth=1.0,
            # Of a healthy run it runs along the measured median, and would hide it.
            linestyle=(0, (3, 2)),
            label="expected now, median",
        )
        drawn.append(angles.expected)
    if angles.predicted is not None:
        predicted_steps, predicted = as_table(angles.predictions)
        lowest = 0.9 * over_layers(np.nanmin, predicted)
        highest = 1.1 * over_layers(np.nanmax, predicted)
        colour = OKABE_ITO[1]
        label = "all predictions ± 10 %"
        ax.fill_between(
            predicted_steps, lowest, highest, color=colour, alpha=0.2, linewidth=0, label=label
        )
        ax.plot(
            angles.steps,
            angles.predicted,
            color=colour,
            linewidth=1.6,
            linestyle="--",
            label="prediction, median",
        )
        # The axis has to hold the predictions too, where no layer is near them.
        drawn.append(predicted.ravel())
    finish(ax, "angular_update", np.concatenate(drawn), limits)
    mark_events(ax, history)
    _name_extreme(ax, curves, extreme)
    legend_below(ax)
    return fig, ax


def _name_extreme(
    ax: Axes,
    curves: Curves,
    extreme: Sequence[str],
) -> None:
    """Names at the ends of the curves of these layers."""
    labels = dict(zip(curves, layer_labels(list(curves)), strict=True))
    label_ends(ax, curves, extreme, [labels[name] for name in extreme])


def plot_curves(
    history: History, quantity: str, ax: Axes | None = None, limits: Limits | None = None
) -> tuple[Figure, Axes]:
    """The curves of a quantity in the picture that suits it: angular updates beside their
    prediction."""
    if quantity == "angular_update":
        return plot_angular_update(history, ax, limits=limits)
    return plot_effective_lr(history, ax, quantity, limits=limits)


def shared_limits(histories: Sequence[History], quantity: str) -> Limits | None:
    """The smallest and the largest value that any run has of a quantity, its prediction included;
    None where there is none to draw.

    Pictures of several runs side by side are compared by eye, which needs one scale for all of
    them.

    Args:
        histories: the runs.
        quantity: any quantity; runs that have not recorded it do not count.

    Example:
        >>> runs = [History(), History()]
        >>> for run, value in zip(runs, (2.0, 8.0)):
        ...     run.append(0, {"weight_norm/conv.weight": value}, optimizer_step=1)
        >>> shared_limits(runs, "weight_norm")
        (2.0, 8.0)
    """
    curves = [np.zeros(0, dtype=np.float32)]
    for history in histories:
        for drawn in drawn_with(quantity):
            curves += [values for _, values in recorded_curves(history, drawn).values()]
    values = np.concatenate(curves)
    # A log axis cannot show what is not above 0.
    on_axis = np.isfinite(values) & ((values > 0) | (drawn_as(quantity).scale == "linear"))
    if not on_axis.any():
        return None
    return float(values[on_axis].min()), float(values[on_axis].max())


def plot_overview(history: History, ax: Sequence[Axes] | None = None) -> tuple[Figure, list[Axes]]:
    """What is usually looked at first: angular update, the learning rate of the direction (lr/‖w‖²
    under SGD, else lr/‖w‖), weight norm, and how far each layer is from what is expected now, or
    from its balance, as far as recorded.

    Args:
        history: what was recorded.
        ax: axes for the panels, in this order; a new figure if None. Axes that are left over stay
            empty.

    Returns:
        the figure and the axes of the panels drawn.

    Raises:
        NormDynError: where none of them was recorded.
    """
    panels = pictured(history, "curves")
    # Ratios are of two kinds of weights: what is expected of scale-invariant ones, and the balance
    # of the rest. Where nothing is compared, a map of the effective LR.
    known = pictured(history, "map")
    ratios = [quantity for quantity in known if drawn_as(quantity).scale == "ratio"]
    maps = ratios or known[:1]
    # Two rows of two, or three rows where there are two maps.
    room = 4 if len(maps) > 1 else 3
    for dispensable in ("weight_std", "matrix_angle"):
        if len(panels) > room and dispensable in panels:
            panels.remove(dispensable)
    if not panels and not maps:
        # Raises, and says what the history has instead.
        curves_of(history, "effective_lr")
    count = len(panels) + len(maps)
    if ax is None:
        # Two panels in a row: more would be too small for their legends.
        rows = ceil(count / 2)
        fig = new_figure(13.0, 4.4 * rows)
        ax = fig.subplots(rows, min(count, 2), squeeze=False).ravel().tolist()
        for unused in ax[count:]:
            unused.set_axis_off()
    elif len(ax) < count:
        raise NormDynError(
            f"the overview of this history has {count} panels, and `ax` holds {len(ax)} axes; pass "
            f"{count} or None."
        )
    for quantity, panel in zip(panels, ax, strict=False):
        plot_curves(history, quantity, panel)
    for quantity, panel in zip(maps, ax[len(panels) :], strict=False):
        plot_heatmap(history, panel, quantity)
    # Without the axes that stayed empty.
    return figure_of(ax[0]), list(ax[:count])


def _draw_bundle(
    ax: Axes, curves: Curves, compared: Sequence[str], which: str, extreme: Sequence[str]
) -> None:
    """All layers in grey, those outside the comparison dotted, with one legend entry for each
    kind; the extreme ones darker."""
    # Fainter the more there are; but a single layer far from the others must still be seen.
    faint = max(0.3, min(0.8, 8 / len(curves)))
    labelled: set[str] = set()
    for name, (steps, values) in curves.items():
        label, colour, dashes = "other layers", "#5F7F5F", ":"
        if name in compared:
            label, colour, dashes = which, "#8C8C8C", "-"
        is_extreme = name in extreme
        style: dict[str, Any] = {"color": colour, "linewidth": 0.8, "alpha": faint}
        if is_extreme:
            style = {"color": "#333333", "linewidth": 1.2}
        (line,) = ax.plot(
            steps,
            values,
            ls=dashes,
            **style,
        )
        # The sample in the legend is that of the others.
        if label not in labelled and not is_extreme:
            line.set_label(label)
            labelled.add(label)


def _draw_by_depth(
    fig: Figure,
    ax: Axes,
    curves: Curves,
    extreme: Sequence[str],
) -> None:
    """One line for each layer; of many, the extreme ones bold, and names of depths at the bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    names, labels = list(curves), layer_labels(list(curves))
    colours = depth_colours(len(names))
    if len(names) <= MOST_NAMED:
        for name, label, colour in zip(names, labels, colours, strict=True):
            draw_curve(
                ax,
                *curves[name],
                color=colour,
                linewidth=1.5,
                label=label,
            )
        return

    # In random order: otherwise the deepest layers would cover all others.
    for i in np.random.default_rng(0).permutation(len(names)):
        draw_curve(
            ax,
            *curves[names[i]],
            color=colours[i],
            linewidth=1.6 if names[i] in extreme else 0.7,
        )
    mappable = ScalarMappable(Normalize(0, len(names) - 1), ListedColormap(depth_colours(256)))
    bar = fig.colorbar(mappable, ax=ax, label="depth")
    # Names, since nobody knows which the 38th layer is.
    shown = evenly_spaced(len(names), _DEPTHS_NAMED).tolist()
    bar.set_ticks(shown, labels=[labels[place] for place in shown], fontsize=7)
    # The first layer on top, as in a heat map and in a listing of the network.
    bar.ax.invert_yaxis()


def _draw_behind(
    ax: Axes,
    curves: Curves,
    beside: Curves,
    quantity: str,
) -> list[Floats]:
    """What belongs to the curves of `_draw_by_depth`, as thin lines of the same colours behind
    them, with one entry in the legend; returns the values."""
    drawn: list[Floats] = []
    for name, colour in zip(curves, depth_colours(len(curves)), strict=True):
        if name not in beside:
            continue
        steps, values = beside[name]
        style = {"color": colour, "linewidth": 0.7, "linestyle": (0, (4, 1.5)), "alpha": 0.7}
        # A longer label would make a legend of one column.
        label = None if drawn else quantity.split("_")[0]
        draw_curve(ax, steps, values, zorder=1.5, label=label, **style)
        drawn.append(values)
    return drawn
