"""A quantity of all layers of one run: as curves, as a map, and both as panels of an overview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import (
    Curves,
    Doubles,
    as_table,
    curves_of,
    deviations,
    farthest,
    invariant_among,
    layer_names,
    over_layers,
    recorded_curves,
)
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import drawn_with, shown_in
from lightning_normdyn.monitor.records import Floats, Ints
from lightning_normdyn.theory.words import AS_EXPECTED

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
    plain_log_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# Layers that a picture names at their curves.
MOST_EXTREME = 3
# Layers that the bar of depths names.
_DEPTHS_NAMED = 5
# Columns of a map.
_MOST_COLUMNS = 300
# A ratio beyond which all are of one colour, and the colours on either side.
_FARTHEST = 10.0
_BELOW, _ABOVE = "#1F4FD8", "#D7191C"
# Rows of a map that are named before all others, and how far off they are at least: for ratios what
# a verdict calls off, for other quantities twice the median or half of it.
_MOST_ABNORMAL = 8
_ABNORMAL = {"ratio": log(AS_EXPECTED[1]), "log": log(2.0), "linear": 6.0}
# Inches that the name of a layer takes.
_LINE = 0.13


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
    extreme = farthest(curves, "log", MOST_EXTREME)
    _draw_bundle(ax, curves, compared, which, extreme)
    drawn = [as_table(curves)[1].ravel()]
    expected = _of_layers(recorded_curves(history, "expected_angular_update"), compared)
    steps, measured, foreseen = _over_the_same(
        _of_layers(curves, compared), {"prediction": predictions, "expected": expected}
    )
    # The median, not the mean: one layer that turns a thousand times faster must not move it.
    draw_curve(
        ax,
        steps,
        over_layers(np.nanmedian, measured),
        color=OKABE_ITO[0],
        linewidth=2.0,
        label=f"median, {which}",
    )
    if expected:
        draw_curve(
            ax,
            steps,
            over_layers(np.nanmedian, foreseen["expected"]),
            color="black",
            linewidth=1.0,
            # Of a healthy run it runs along the measured median, and would hide it.
            linestyle=(0, (3, 2)),
            label="expected now, median",
        )
        drawn.append(as_table(expected)[1].ravel())
    if predictions:
        predicted_steps, predicted = as_table(predictions)
        lowest = 0.9 * over_layers(np.nanmin, predicted)
        highest = 1.1 * over_layers(np.nanmax, predicted)
        colour = OKABE_ITO[1]
        label = "all predictions ± 10 %"
        ax.fill_between(
            predicted_steps, lowest, highest, color=colour, alpha=0.2, linewidth=0, label=label
        )
        ax.plot(
            steps,
            over_layers(np.nanmedian, foreseen["prediction"]),
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


def _over_the_same(
    measured: Curves, foreseen: Mapping[str, Curves]
) -> tuple[Ints, Doubles, dict[str, Doubles]]:
    """Measured and foreseen angles of the same layers at the same steps, so that their medians are
    of the same weights.

    Where a layer has no prediction at a step (its rate was 0), its angle has no part in a median
    there; at a step at which nothing is foreseen of any layer, all of them have one.

    Args:
        measured: angles by layer.
        foreseen: curves of some of these layers, by what they are.

    Returns:
        steps ``(s,)``, the measured table ``(l, s)``, and the foreseen ones ``(l, s)``, with NaN
        at the same places.
    """
    steps, table = as_table(measured)
    tables = {}
    for kind, curves in foreseen.items():
        tables[kind] = np.full_like(table, np.nan)
        for row, name in enumerate(measured):
            own_steps, values = curves.get(name, (steps[:0], steps[:0]))
            _, places, own_places = np.intersect1d(steps, own_steps, return_indices=True)
            tables[kind][row, places] = values[own_places]

    compared = ~np.isnan(table)
    for kind, other in tables.items():
        both = compared & ~np.isnan(other)
        if kind == "prediction" and foreseen[kind]:
            # A step without any prediction is no part of a comparison with it.
            compared = both
        else:
            # An expectation may end; what is left is compared with the prediction alone.
            compared = np.where(both.any(axis=0), both, compared)
    kept = compared.any(axis=0)
    masked = np.where(compared, table, np.nan)[:, kept]
    for kind, other in tables.items():
        tables[kind] = np.where(compared, other, np.nan)[:, kept]
    return steps[kept], masked, tables


def _name_extreme(ax: Axes, curves: Curves, extreme: Sequence[str]) -> None:
    """Names at the ends of the curves of these layers."""
    labels = dict(zip(curves, layer_labels(list(curves)), strict=True))
    label_ends(ax, curves, extreme, [labels[name] for name in extreme])


def _of_layers(curves: Curves, names: Sequence[str]) -> Curves:
    return {name: curves[name] for name in names if name in curves}


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
    steps, table = as_table(curves)
    edges, table = _in_columns(steps, _fill_forward(table))
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
    abnormal = _abnormal_rows(curves, look.scale)
    shown = _named_rows(len(labels), abnormal, max(int(room / _LINE), 1))
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


def plot_overview(history: History, ax: Sequence[Axes] | None = None) -> tuple[Figure, list[Axes]]:
    """What is usually looked at first: effective LR, angular update, weight norm, and how far each
    layer is from what is expected now, or from its balance, as far as recorded.

    Args:
        history: what was recorded.
        ax: axes for the panels, in this order; a new figure if None. Axes that are left over stay
            empty.

    Returns:
        the figure and the axes of the panels drawn.

    Raises:
        NormDynError: where none of them was recorded.
    """
    panels = [quantity for quantity in shown_in("curves") if layer_names(history, quantity)]
    # Ratios are of two kinds of weights: what is expected of scale-invariant ones, and the balance
    # of the rest. Where nothing is compared, a map of the effective LR.
    known = [quantity for quantity in shown_in("map") if layer_names(history, quantity)]
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
        (line,) = ax.plot(
            steps,
            values,
            color="#333333" if is_extreme else colour,
            ls=dashes,
            linewidth=1.2 if is_extreme else 0.8,
            alpha=1.0 if is_extreme else faint,
        )
        # The sample in the legend is that of the others.
        if label not in labelled and not is_extreme:
            line.set_label(label)
            labelled.add(label)


def _draw_by_depth(fig: Figure, ax: Axes, curves: Curves, extreme: Sequence[str]) -> None:
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
    shown = np.unique(np.linspace(0, len(names) - 1, _DEPTHS_NAMED).round().astype(int)).tolist()
    bar.set_ticks(shown, labels=[labels[place] for place in shown], fontsize=7)
    # The first layer on top, as in a heat map and in a listing of the network.
    bar.ax.invert_yaxis()


def _draw_behind(ax: Axes, curves: Curves, beside: Curves, quantity: str) -> list[Floats]:
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
        return LogNorm(1 / _FARTHEST, _FARTHEST), colours
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
    if below and above:
        return "both"
    if below:
        return "min"
    return "max" if above else "neither"


def _abnormal_rows(curves: Curves, scale: str) -> list[int]:
    """Rows of a map that are far off at the end, the farthest first."""
    places = {name: row for row, name in enumerate(curves)}
    far = deviations(curves, scale)
    names = farthest(curves, scale, _MOST_ABNORMAL)
    return [places[name] for name in names if far[name] > _ABNORMAL[scale]]


def _named_rows(count: int, abnormal: Sequence[int], room: int) -> list[int]:
    """Which of ``count`` rows are named: the abnormal ones, and of the others as many as have room
    beside them, evenly spaced."""
    every = ceil(count / room)
    named: list[int] = []
    for row in (*abnormal, *range(0, count, every)):
        # Two names closer than this would lie on each other.
        if all(abs(row - other) >= every for other in named):
            named.append(row)
    return sorted(named)


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
    count = min(_MOST_COLUMNS, len(steps))
    parts = np.array_split(np.arange(len(steps)), count)
    firsts = np.array([steps[part[0]] for part in parts], dtype=np.float64)
    # The last column is as wide as the others are on average; a single one has no other.
    width = (firsts[-1] - firsts[0]) / max(count - 1, 1) or 1.0
    edges = np.append(firsts, steps[-1] + width)

    # Over the steps of a part, as elsewhere over layers: the table stands on its side.
    columns = [over_layers(np.nanmedian, table[:, part].T) for part in parts]
    return edges, np.array(columns).T
