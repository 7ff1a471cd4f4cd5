"""Curves over the steps of one run: a quantity of all layers, and angular updates with their
prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import (
    MOST_NAMED,
    OKABE_ITO,
    Limits,
    axes_or_new,
    depth_colours,
    draw_curve,
    drawn_as,
    finish,
    legend_below,
    mark_events,
)
from lightning_normdyn.monitor.plots.curves import (
    Curves,
    as_table,
    curves_of,
    invariant_among,
    over_layers,
    recorded_curves,
)
from lightning_normdyn.monitor.plots.labels import layer_labels
from lightning_normdyn.monitor.quantities import drawn_with

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    _draw_by_depth(fig, ax, curves)
    drawn = np.concatenate([values for _, values in curves.values()])
    finish(ax, quantity, drawn, limits)
    mark_events(ax, history)
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
    predictions = {}
    for name, curve in recorded_curves(history, "equilibrium_angular_update").items():
        if name in curves:
            predictions[name] = curve
    # The best that is known of the layers decides which of them are compared.
    if predictions:
        compared, which = list(predictions), "predicted layers"
    else:
        compared, which = invariant_among(curves, history)

    fig, ax = axes_or_new(ax)
    _draw_bundle(ax, curves, compared, which)
    drawn = [as_table(curves)[1].ravel()]
    steps, table = as_table({name: curves[name] for name in compared})
    if predictions:
        predicted_steps, predicted = as_table(predictions)
        # Where a layer has no prediction at a step (its rate was 0), its angle has no part in the
        # median either: the two medians are of the same layers.
        steps, measured_at, predicted_at = np.intersect1d(
            steps, predicted_steps, return_indices=True
        )
        unpredicted = np.isnan(predicted[:, predicted_at])
        table = np.where(unpredicted, np.nan, table[:, measured_at])

    # The median, not the mean: one layer that turns a thousand times faster must not move it.
    median = over_layers(np.nanmedian, table)
    draw_curve(
        ax,
        steps,
        median,
        color=OKABE_ITO[0],
        linewidth=2.0,
        label=f"median, {which}",
    )
    if predictions:
        lowest = 0.9 * over_layers(np.nanmin, predicted)
        highest = 1.1 * over_layers(np.nanmax, predicted)
        colour = OKABE_ITO[1]
        label = "all predictions ± 10 %"
        ax.fill_between(
            predicted_steps, lowest, highest, color=colour, alpha=0.2, linewidth=0, label=label
        )
        median = over_layers(np.nanmedian, predicted)
        label = "prediction, median"
        ax.plot(
            predicted_steps,
            median,
            color=colour,
            linewidth=1.6,
            linestyle="--",
            label=label,
        )
        # The axis has to hold the predictions too, where no layer is near them.
        drawn.append(predicted.ravel())
    finish(ax, "angular_update", np.concatenate(drawn), limits)
    mark_events(ax, history)
    legend_below(ax)
    return fig, ax


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


def _draw_bundle(ax: Axes, curves: Curves, compared: Sequence[str], which: str) -> None:
    """All layers in grey, those outside the comparison dotted, with one legend entry for each
    kind."""
    # Fainter the more there are; but a single layer far from the others must still be seen.
    faint = max(0.3, min(0.8, 8 / len(curves)))
    labelled: set[str] = set()
    for name, (steps, values) in curves.items():
        label, colour, dashes = "other layers", "#5F7F5F", ":"
        if name in compared:
            label, colour, dashes = which, "#8C8C8C", "-"
        (line,) = ax.plot(
            steps,
            values,
            color=colour,
            ls=dashes,
            linewidth=0.8,
            alpha=faint,
        )
        if label not in labelled:
            line.set_label(label)
            labelled.add(label)


def _draw_by_depth(fig: Figure, ax: Axes, curves: Curves) -> None:
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
            linewidth=0.7,
        )
    mappable = ScalarMappable(Normalize(1, len(names)), ListedColormap(depth_colours(256)))
    bar = fig.colorbar(mappable, ax=ax, label="depth (layer number)")
    bar.set_ticks(np.unique(np.linspace(1, len(names), 5).round()).tolist())
