"""Curves over the steps of one run: a quantity of all layers, and angular updates with their
prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import (
    MOST_NAMED,
    OKABE_ITO,
    axes_or_new,
    depth_colours,
    drawn_as,
    finish,
    legend_below,
    mark_events,
    marker,
)
from lightning_normdyn.monitor.plots.curves import (
    as_table,
    curves_of,
    invariant_among,
    layer_names,
    over_layers,
    recorded_curves,
)
from lightning_normdyn.monitor.plots.labels import in_legend, layer_labels
from lightning_normdyn.monitor.quantities import drawn_with
from lightning_normdyn.monitor.records import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_effective_lr(
    history: History,
    ax: Axes | None = None,
    quantity: str = "effective_lr",
    *,
    limits: tuple[float, float] | None = None,
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
    finish(ax, quantity, np.concatenate([values for _, values in curves.values()]), limits)
    mark_events(ax, history)
    legend_below(ax)
    return fig, ax


def plot_angular_update(
    history: History, ax: Axes | None = None, *, limits: tuple[float, float] | None = None
) -> tuple[Figure, Axes]:
    """The angular updates of all layers as a bundle, and the median of those that have a prediction
    beside the prediction's median.

    Only scale-invariant layers have a prediction. A classifier's head turns as its own loss asks:
    in the median it would move the curve
    away from a prediction that was never about it. Layers outside the median are drawn dotted. A
    history without predictions shows the
    median of its scale-invariant layers, or of all layers where it does not say which these are.

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
    predictions = {
        name: curve
        for name, curve in recorded_curves(history, "equilibrium_angular_update").items()
        if name in curves
    }
    if predictions:
        compared, which = list(predictions), "predicted layers"
    else:
        compared, which = invariant_among(curves, history)

    fig, ax = axes_or_new(ax)
    faint = max(
        0.3, min(0.8, 8 / len(curves))
    )  # a single layer far from the others must still be seen
    labelled: set[str] = set()
    for name, (steps, values) in curves.items():
        label, colour, line = (
            (which, "#8C8C8C", "-") if name in compared else ("other layers", "#5F7F5F", ":")
        )
        ax.plot(
            steps,
            values,
            color=colour,
            linestyle=line,
            linewidth=0.8,
            alpha=faint,
            label=None if label in labelled else label,
        )
        labelled.add(label)

    steps, table = as_table({name: curves[name] for name in compared})
    seen = [as_table(curves)[1].ravel()]
    if predictions:
        predicted_steps, predicted = as_table(predictions)
        common, here, there = np.intersect1d(steps, predicted_steps, return_indices=True)
        # Where a layer has no prediction at a step (its rate was 0), its angle has no part in the
        # median either.
        table = np.where(np.isnan(predicted[:, there]), np.nan, table[:, here])
        steps = common
    ax.plot(
        steps,
        over_layers(np.nanmedian, table),
        color=OKABE_ITO[0],
        linewidth=2.0,
        label=f"median, {which}",
        marker=marker(steps),
    )
    if predictions:
        low, high = (
            0.9 * over_layers(np.nanmin, predicted),
            1.1 * over_layers(np.nanmax, predicted),
        )
        middle = over_layers(np.nanmedian, predicted)
        ax.fill_between(
            predicted_steps,
            low,
            high,
            color=OKABE_ITO[1],
            alpha=0.2,
            linewidth=0,
            label="all predictions ± 10 %",
        )
        ax.plot(
            predicted_steps,
            middle,
            color=OKABE_ITO[1],
            linewidth=1.6,
            linestyle="--",
            label="prediction, median",
        )
        seen.append(predicted.ravel())
    finish(ax, "angular_update", np.concatenate(seen), limits)
    mark_events(ax, history)
    legend_below(ax)
    return fig, ax


def shared_limits(histories: Sequence[History], quantity: str) -> tuple[float, float] | None:
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
    curves = [
        history.column(f"{each}/{name}")[1]
        for history in histories
        for each in drawn_with(quantity)
        for name in layer_names(history, each)
    ]
    values = np.concatenate(curves) if curves else np.zeros(0, dtype=np.float32)
    drawn = values[np.isfinite(values) & ((values > 0) | (drawn_as(quantity).scale == "linear"))]
    return (float(drawn.min()), float(drawn.max())) if drawn.size else None


def _draw_by_depth(fig: Figure, ax: Axes, curves: Mapping[str, tuple[Ints, Floats]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = depth_colours(len(curves))
    many = len(curves) > MOST_NAMED
    order = (
        np.random.default_rng(0).permutation(len(curves)) if many else range(len(curves))
    )  # else the deepest would cover all others
    names, labels = list(curves), [in_legend(label) for label in layer_labels(list(curves))]
    for i in order:
        steps, values = curves[names[i]]
        ax.plot(
            steps,
            values,
            color=colours[i],
            linewidth=0.7 if many else 1.5,
            label=None if many else labels[i],
            marker=marker(steps),
        )
    if many:
        mappable = ScalarMappable(Normalize(1, len(curves)), ListedColormap(depth_colours(256)))
        bar = fig.colorbar(mappable, ax=ax, label="depth (layer number)")
        bar.set_ticks(np.unique(np.linspace(1, len(curves), 5).round()).tolist())
