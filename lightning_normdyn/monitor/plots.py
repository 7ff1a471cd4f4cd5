"""Pictures of a run, drawn from its history: ``plot_*(history, ax=None) -> (fig, ax)``.

Colour is depth: the first layer is dark, the last one bright, so that 160 layers need no legend.
Colours stay apart for the colour-blind.
Matplotlib is imported when a picture is drawn, without pyplot, so that drawing needs no screen and
leaves no global state behind.

Legend: ``l`` layers (parameters), ``s`` recorded steps, ``n`` weight vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import Floats, History, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Doubles = NDArray[np.float64]

MOST_NAMED = 8
"""Up to this many layers a legend names them; beyond, a colour bar tells the depth."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours for runs: Okabe and Ito's palette, without the yellow that vanishes on white."""


class _Quantity(NamedTuple):
    title: str
    axis: str
    scale: str
    """``"log"``, ``"linear"``, or ``"ratio"``: logarithmic around 1."""


_QUANTITIES = {
    "weight_norm": _Quantity("Weight norm", r"$\Vert w\Vert$  (weight units)", "log"),
    "weight_std": _Quantity("Weight standard deviation", r"std$(w)$  (weight units)", "log"),
    "effective_lr": _Quantity("Effective learning rate", r"$\eta/\Vert w\Vert$", "log"),
    "direction_lr": _Quantity("Learning rate of the direction", r"$\eta/\Vert w\Vert^2$", "log"),
    "angular_update": _Quantity("Angular update", "angle  (radians per step)", "log"),
    "effective_step_size": _Quantity("Effective step size", "chord  (per step)", "log"),
    "gradient_cosine": _Quantity("Gradient-weight cosine", r"cos$(w, g)$", "linear"),
    "radial_update": _Quantity(
        "Radial update", r"$\Delta$ along $w$, over $\Vert w\Vert$  (per step)", "linear"
    ),
    "equivalent_weight_decay": _Quantity("Equivalent weight decay", r"$\alpha\Vert w\Vert$", "log"),
    "equilibrium_angular_update": _Quantity(
        "Predicted angular update", "angle  (radians per step)", "log"
    ),
    "equilibrium_ratio": _Quantity("Angular update over its prediction", "ratio", "ratio"),
    "input_span_energy": _Quantity("Weight energy inside the input span", "share", "linear"),
    "input_span_noise": _Quantity("Weight noise outside the input span", "share", "linear"),
    "input_span_rank": _Quantity("Rank of the inputs", "directions", "log"),
    "ggd_shape_input": _Quantity(
        "Shape of the weights in input space", r"$\beta$  (2: Gaussian, 1: Laplace)", "log"
    ),
    "ggd_shape_parameter": _Quantity(
        "Shape of the weights as they are", r"$\beta$  (2: Gaussian, 1: Laplace)", "log"
    ),
}

_EVENT_LINES = {"lr_drop": ("#555555", (0, (4, 2))), "rescale": ("#CC79A7", (0, (1, 1)))}
_OTHER_EVENT = ("#999999", (0, (1, 1)))
_MOST_EVENT_LINES = 40
"""More lines of one kind would hide the curves; they become ticks at the upper edge."""


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
    curves = _curves(history, quantity)
    fig, ax = _axes(ax)
    _draw_by_depth(fig, ax, curves)
    _finish(ax, quantity, np.concatenate([values for _, values in curves.values()]), limits)
    _mark_events(ax, history)
    _legend(ax)
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
    curves = _curves(history, "angular_update")
    predictions = {
        name: curve
        for name, curve in _all_curves(history, "equilibrium_angular_update").items()
        if name in curves
    }
    if predictions:
        compared, which = list(predictions), "predicted layers"
    else:
        compared, which = _scale_invariant_among(curves, history)

    fig, ax = _axes(ax)
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

    steps, table = _table({name: curves[name] for name in compared})
    seen = [_table(curves)[1].ravel()]
    if predictions:
        predicted_steps, predicted = _table(predictions)
        common, here, there = np.intersect1d(steps, predicted_steps, return_indices=True)
        # Where a layer has no prediction at a step (its rate was 0), its angle has no part in the
        # median either.
        table = np.where(np.isnan(predicted[:, there]), np.nan, table[:, here])
        steps = common
    ax.plot(
        steps,
        _over_layers(np.nanmedian, table),
        color=OKABE_ITO[0],
        linewidth=2.0,
        label=f"median, {which}",
        marker=_marker(steps),
    )
    if predictions:
        low, high = (
            0.9 * _over_layers(np.nanmin, predicted),
            1.1 * _over_layers(np.nanmax, predicted),
        )
        middle = _over_layers(np.nanmedian, predicted)
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
    _finish(ax, "angular_update", np.concatenate(seen), limits)
    _mark_events(ax, history)
    _legend(ax)
    return fig, ax


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

    curves = _curves(history, quantity)
    names = list(curves)
    fig, ax = _axes(ax, height=min(9.0, 2.2 + 0.16 * len(names)))
    steps, table = _table(curves)
    table = _fill_forward(table)
    edges, table = _bin_columns(steps, table)

    finite = np.concatenate([table[np.isfinite(table)], limits or ()])
    positive = finite[finite > 0]
    scale = _about(quantity).scale
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
        range(0, len(names), every), _labels(names)[::every], fontsize=8 if len(names) <= 20 else 6
    )
    ax.set_xlabel("step")
    ax.set_title(_about(quantity).title)
    bar = fig.colorbar(mesh, ax=ax, label=_about(quantity).axis)
    if isinstance(norm, LogNorm):
        _plain_log_ticks(bar.ax.yaxis, *mesh.get_clim())
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
    wanted = (
        [quantity, "equilibrium_angular_update"] if quantity == "angular_update" else [quantity]
    )
    curves = [
        history.column(f"{each}/{name}")[1]
        for history in histories
        for each in wanted
        for name in _names(history, each)
    ]
    values = np.concatenate(curves) if curves else np.zeros(0, dtype=np.float32)
    drawn = values[np.isfinite(values) & ((values > 0) | (_about(quantity).scale == "linear"))]
    return (float(drawn.min()), float(drawn.max())) if drawn.size else None


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
    recorded = [
        key.removeprefix("weight_norm/")
        for key in history.vector_names()
        if key.startswith("weight_norm/")
    ]
    if not recorded:
        raise NormDynError(
            "a ridge needs per-vector norms, and this history has none; record with "
            "`NormDynamicsMonitor(per_vector=True)`."
        )
    if name is None:
        name = max(recorded, key=lambda each: history.vectors(f"weight_norm/{each}")[1].shape[1])
    steps, norms = history.vectors(f"weight_norm/{name}")
    fig, ax = _axes(ax, height=5.0)
    every = -(-len(steps) // 12)
    chosen = np.append(
        np.arange(0, len(steps) - every, every), len(steps) - 1
    )  # evenly spaced, and the last one always
    finite = norms[chosen][np.isfinite(norms[chosen]) & (norms[chosen] > 0)].astype(np.float64)
    if not finite.size:
        raise NormDynError(
            f"`{name}` has no vector with a finite norm above 0; there is nothing to draw."
        )

    span = max(float(steps[-1] - steps[0]), 1.0)
    height = 1.6 * span / max(len(chosen), 2)
    logarithmic = finite.max() > 20 * finite.min()
    scaled = np.log(finite) if logarithmic else finite
    margin = 0.05 * float(np.ptp(scaled)) or 0.05 * (abs(float(scaled[0])) or 1.0)
    widest = max(_bandwidth(_seen(norms[i], logarithmic)) for i in chosen)
    grid = np.linspace(
        scaled.min() - max(margin, 3 * widest), scaled.max() + max(margin, 3 * widest), 400
    )
    grid = grid if logarithmic else grid[grid >= 0]
    colours = _depth_colours(len(chosen))
    for rank, (i, colour) in enumerate(zip(chosen, colours, strict=True)):
        density = _density(_seen(norms[i], logarithmic), grid)
        base = float(steps[i])
        hill = density > 0.003
        x, density = (np.exp(grid) if logarithmic else grid)[hill], density[hill]
        # Steps grow downwards, so a hill stands on its step and reaches up, towards smaller ones.
        ax.fill_between(
            x, base - height * density, base, color=colour, alpha=0.75, linewidth=0, zorder=2 + rank
        )
        ax.plot(x, base - height * density, color="white", linewidth=0.8, zorder=2 + rank)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_ylim(float(steps[-1]) + 0.03 * span, float(steps[0]) - 1.1 * height)
    ax.set_yticks([float(steps[i]) for i in chosen], [str(int(steps[i])) for i in chosen])
    ax.set_xlabel(rf"$\Vert w\Vert$ of {_short(name)}  (weight units)")
    ax.set_ylabel("step")
    ax.set_title(f"Norms of {norms.shape[1]} vectors", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    _mark_events_at_right(ax, history, name)
    return fig, ax


def plot_overview(history: History, ax: Sequence[Axes] | None = None) -> tuple[Figure, list[Axes]]:
    """What is usually looked at first: effective LR, angular update, weight norm, and the ratio to
    the prediction, as far as recorded.

    Args:
        history: what was recorded.
        ax: axes for the panels, in this order; a new figure if None. Axes that are left over stay
            empty.

    Returns:
        the figure and the axes of the panels drawn.

    Raises:
        NormDynError: where none of them was recorded.
    """
    panels = [
        quantity
        for quantity in ("effective_lr", "angular_update", "weight_norm", "weight_std")
        if _names(history, quantity)
    ]
    if len(panels) == 4:
        panels.remove("weight_std")
    maps = [
        quantity for quantity in ("equilibrium_ratio", "effective_lr") if _names(history, quantity)
    ][:1]
    if not panels and not maps:
        _curves(history, "effective_lr")
    count = len(panels) + len(maps)
    if ax is None:
        rows = -(-count // 2)
        fig = _new_figure(13.0, 4.4 * rows)
        ax = fig.subplots(rows, min(count, 2), squeeze=False).ravel().tolist()
        for unused in ax[count:]:
            unused.set_axis_off()
    elif len(ax) < count:
        raise NormDynError(
            f"the overview of this history has {count} panels, and `ax` holds {len(ax)} axes; pass "
            f"{count} or None."
        )
    for quantity, panel in zip(panels, ax, strict=False):
        if quantity == "angular_update":
            plot_angular_update(history, panel)
        else:
            plot_effective_lr(history, panel, quantity)
    for quantity, panel in zip(maps, ax[len(panels) :], strict=False):
        plot_heatmap(history, panel, quantity)
    return _figure_of(ax[0]), list(ax[:count])


def plot_compare(
    histories: Mapping[str, History], quantity: str = "effective_lr", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Several runs in one picture: the median over layers, and a band that holds the middle 80 % of
    them.

    The layers are the scale-invariant ones that all runs have, as far as the runs say which these
    are; the title of the legend says over
    which layers the median was taken. Runs that share no layer are each shown with their own.

    Args:
        histories: by the label of each run.
        quantity: any recorded quantity; a run without layers' curves shows its
            ``normdyn/<quantity>``.
        ax: where to draw; a new figure if None.

    Raises:
        NormDynError: where there is no run, or one of them has not recorded the quantity.
    """
    if not histories:
        raise NormDynError("a comparison needs at least one run, got none.")
    curves: dict[str, dict[str, tuple[Ints, Floats]]] = {}
    for label, history in histories.items():
        overview = f"normdyn/{quantity}"
        only_overview = overview in history.keys() and not _names(history, quantity)  # noqa: SIM118
        if not only_overview:
            curves[label] = _curves(history, quantity)
    curves, of_which = _alike(curves, histories)

    fig, ax = _axes(ax)
    seen = []
    for i, (label, history) in enumerate(histories.items()):
        ours = curves.get(label) or {"all": history.column(f"normdyn/{quantity}")}
        steps, table = _table(ours)
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        line = ("-", (0, (5, 2)), "-.", (0, (1, 1)))[
            i % 4
        ]  # so that two runs that agree are both seen
        low, middle, high = _over_layers(partial(np.nanpercentile, q=[10, 50, 90]), table)
        if len(ours) > 1:
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(
            steps,
            middle,
            color=colour,
            linestyle=line,
            linewidth=1.8,
            label=_in_legend(_plain(_elide(label, 40))),
            marker=_marker(steps),
        )
        seen.append(np.concatenate([low, middle, high]))
    _finish(ax, quantity, np.concatenate(seen))
    _legend(ax, title=of_which)
    return fig, ax


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
    runs = _runs(histories)
    if ax is None:
        ax = _new_figure(15.0, 4.4).subplots(1, 3).tolist()
    elif len(ax) < 3:
        raise NormDynError(
            f"the input span has 3 panels, and `ax` holds {len(ax)} axes; pass 3 or None."
        )
    # One order of layers for all panels and runs, and a layer that has no shape (constant inputs)
    # keeps its place.
    names = list(
        dict.fromkeys(
            name for history in runs.values() for name in _curves(history, "input_span_noise")
        )
    )
    for quantity, panel in zip(
        ("ggd_shape_input", "ggd_shape_parameter", "input_span_noise"), ax, strict=False
    ):
        seen = []
        for i, (label, history) in enumerate(runs.items()):
            found = _curves(history, quantity)
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
                marker="osD^"[i % 4] if len(names) <= 40 else _marker(names),
                markersize=4,
                label=_in_legend(_plain(_elide(label, 40))) if len(runs) > 1 else None,
            )
            seen.append(values)
        _finish(panel, quantity, np.concatenate(seen))
        if quantity != "input_span_noise":
            panel.axhline(
                2.0, color="black", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1
            )  # a Gaussian
        panel.set_xlabel("layer")
        every = -(-len(names) // 20)
        panel.set_xticks(
            range(0, len(names), every),
            _labels(names)[::every],
            rotation=60,
            ha="right",
            fontsize=7,
        )
    _inside_legend(ax[2])
    return _figure_of(ax[0]), list(ax[:3])


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
    runs = _runs(histories)
    name = _middle_layer(next(iter(runs.values()))) if name is None else name
    fig, ax = _axes(ax)
    seen = []
    for i, (label, history) in enumerate(runs.items()):
        for quantity, line, where in (
            ("ggd_shape_input", "-", "input space"),
            ("ggd_shape_parameter", "--", "as they are"),
        ):
            steps, values = history.column(f"{quantity}/{name}")
            text = _in_legend(_plain(_elide(f"{label}, {where}" if label else where, 40)))
            ax.plot(
                steps,
                values,
                color=OKABE_ITO[i % len(OKABE_ITO)],
                linestyle=line,
                linewidth=1.6,
                label=text,
                marker=_marker(steps),
            )
            seen.append(values)
    _finish(ax, "ggd_shape_input", np.concatenate(seen))
    ax.set_title(f"Shape of the weights of {_short(name)}")
    _legend(ax)
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
    fig, ax = _axes(ax)
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
    ax.set_title(f"Weights of {_short(name)}")
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    _inside_legend(ax)
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
    fig, ax = _axes(ax)
    colours = _depth_colours(values.shape[1])
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
                marker=_marker(steps),
                label=f"vector {i}" if named else None,
            )
        ax.set_xlabel("update")
        _legend(ax)
    ax.set_ylabel(label)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    return fig, ax


# --------------------------------------------------------------------------------------- the curves


def _names(history: History, quantity: str) -> list[str]:
    recorded = history.keys()
    return [key[len(quantity) + 1 :] for key in recorded if key.startswith(f"{quantity}/")]


def _curves(history: History, quantity: str) -> dict[str, tuple[Ints, Floats]]:
    """The curves of a quantity by parameter name, in the order of the network."""
    curves = _all_curves(history, quantity)
    if not curves:
        keys = history.keys()
        recorded = sorted(
            {key.split("/")[0] for key in keys if "/" in key and not key.startswith("normdyn/")}
        )
        found = f"it has {', '.join(recorded)}" if recorded else "it has no curves of layers at all"
        raise NormDynError(
            f"curves of `{quantity}` were asked for, and this history has none: {found}."
        )
    return curves


def _all_curves(history: History, quantity: str) -> dict[str, tuple[Ints, Floats]]:
    """The curves of a quantity by parameter name, in the order of the network; empty where the
    history has none."""
    curves = {name: history.column(f"{quantity}/{name}") for name in _names(history, quantity)}
    return {name: curve for name, curve in curves.items() if len(curve[0])}


def _invariant(history: History) -> set[str] | None:
    """Names of the layers that the run knows to be scale-invariant; None where it does not say (a
    CSV log without predictions)."""
    targets = history.meta.get("targets")
    known: set[str] = set()
    invariant: set[str] = set()
    for name, about in (targets if isinstance(targets, dict) else {}).items():
        kind = about.get("scale_invariant") if isinstance(about, dict) else None
        if isinstance(kind, str):
            known.add(name)
            if kind not in ("no", "unknown"):
                invariant.add(name)
    if known:
        return invariant
    return (
        set(_names(history, "equilibrium_angular_update")) or None
    )  # predictions are made of scale-invariant layers only


def _scale_invariant_among(names: Iterable[str], history: History) -> tuple[list[str], str]:
    """Those of these layers that are scale-invariant, or all of them where that leaves none; and
    what to call them."""
    invariant = _invariant(history) or set()
    chosen = [name for name in names if name in invariant]
    return (chosen, "scale-invariant layers") if chosen else (list(names), "all layers")


def _alike(
    curves: Mapping[str, Mapping[str, tuple[Ints, Floats]]], histories: Mapping[str, History]
) -> tuple[dict[str, dict[str, tuple[Ints, Floats]]], str]:
    """Like with like: of each run's curves those of the scale-invariant layers that all runs have;
    and what to say of them."""
    invariant: set[str] = set()
    for label in curves:
        invariant |= _invariant(histories[label]) or set()
    chosen: dict[str, list[str]] = {}
    for label, ours in curves.items():
        own = _invariant(histories[label])
        wanted = (
            invariant if own is None else own
        )  # a run that does not say is believed to be as the others
        chosen[label] = [name for name in ours if name in wanted] or list(ours)
    common = set.intersection(*map(set, chosen.values())) if chosen else set()
    if not common:
        text = "median and middle 80 % of each run's layers" if len(curves) > 0 else ""
        return {
            label: {name: curves[label][name] for name in names} for label, names in chosen.items()
        }, text
    kind = "scale-invariant layers" if common <= invariant else "layers"
    text = f"median and middle 80 % of {len(common)} {kind}" if len(common) > 1 else ""
    return {
        label: {name: ours[name] for name in ours if name in common}
        for label, ours in curves.items()
    }, text


def _over_layers(reduce: Callable[..., Any], table: Doubles) -> Doubles:
    """``reduce`` over the layers of a table ``(l, s)``, with NaN (and without numpy's warning) at
    steps where no layer has a value."""
    known = ~np.isnan(table).all(axis=0)
    found = np.asarray(reduce(table[:, known], axis=0))
    result = np.full((*found.shape[:-1], table.shape[1]), np.nan)
    result[..., known] = found
    return result


def _runs(histories: History | Mapping[str, History]) -> Mapping[str, History]:
    runs = {"": histories} if isinstance(histories, History) else histories
    if not runs:
        raise NormDynError("a picture of runs needs at least one, got none.")
    return runs


def _middle_layer(history: History) -> str:
    names = list(_curves(history, "ggd_shape_parameter"))
    return names[len(names) // 2]


def _table(curves: Mapping[str, tuple[Ints, Floats]]) -> tuple[Ints, Doubles]:
    """All curves on the union of their steps: steps ``(s,)``, values ``(l, s)`` with NaN where a
    layer has none."""
    steps = np.unique(np.concatenate([steps for steps, _ in curves.values()]))
    table = np.full((len(curves), len(steps)), np.nan)
    for row, (at, values) in zip(table, curves.values(), strict=True):
        row[np.searchsorted(steps, at)] = values
    return steps, table


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


def _seen(norms: Floats, logarithmic: bool) -> Doubles:
    """The norms that can be drawn, on the axis that they are drawn on."""
    values = norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)
    return np.log(values) if logarithmic else values


def _bandwidth(values: Doubles) -> float:
    return float(values.std()) * values.size**-0.2 if values.size else 0.0


def _density(values: Doubles, grid: Doubles) -> Doubles:
    """A Gaussian kernel density on ``grid``, scaled to a height of 1; never narrower than the
    picture can show."""
    if not values.size:
        return np.zeros_like(grid)
    bandwidth = max(_bandwidth(values), float(grid[-1] - grid[0]) / 120)
    centres, counts = np.unique(
        np.round(values / bandwidth * 8) / 8 * bandwidth, return_counts=True
    )  # a kernel cannot tell closer ones apart
    density = np.exp(-0.5 * ((grid[:, None] - centres[None, :]) / bandwidth) ** 2) @ counts
    return np.asarray(density / density.max() if density.max() > 0 else density)


# ------------------------------------------------------------------------------------------ drawing


def _about(quantity: str) -> _Quantity:
    return _QUANTITIES.get(
        quantity, _Quantity(_plain(_elide(quantity, 40)), _plain(_elide(quantity, 40)), "log")
    )


def _axes(ax: Axes | None, height: float = 4.2) -> tuple[Figure, Axes]:
    if ax is not None:
        return _figure_of(ax), ax
    fig = _new_figure(7.5, height)
    return fig, fig.add_subplot()


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def _figure_of(ax: Axes) -> Figure:
    figure: Any = ax.get_figure(root=True)
    return figure  # type: ignore[no-any-return]


def _depth_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    # The last tenth of viridis is too bright on white.
    return [colormaps["viridis"](position) for position in np.linspace(0.0, 0.9, max(count, 2))][
        :count
    ]


def _draw_by_depth(fig: Figure, ax: Axes, curves: Mapping[str, tuple[Ints, Floats]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = _depth_colours(len(curves))
    many = len(curves) > MOST_NAMED
    order = (
        np.random.default_rng(0).permutation(len(curves)) if many else range(len(curves))
    )  # else the deepest would cover all others
    names, labels = list(curves), [_in_legend(label) for label in _labels(list(curves))]
    for i in order:
        steps, values = curves[names[i]]
        ax.plot(
            steps,
            values,
            color=colours[i],
            linewidth=0.7 if many else 1.5,
            label=None if many else labels[i],
            marker=_marker(steps),
        )
    if many:
        mappable = ScalarMappable(Normalize(1, len(curves)), ListedColormap(_depth_colours(256)))
        bar = fig.colorbar(mappable, ax=ax, label="depth (layer number)")
        bar.set_ticks(np.unique(np.linspace(1, len(curves), 5).round()).tolist())


def _finish(
    ax: Axes, quantity: str, values: NDArray[Any], limits: tuple[float, float] | None = None
) -> None:
    about = _about(quantity)
    if limits is not None:
        x = ax.dataLim.x0
        ax.update_datalim([(x, limits[0]), (x, limits[1])])
        values = np.concatenate([values, limits])
    positive = values[np.isfinite(values) & (values > 0)]
    if about.scale in ("log", "ratio") and positive.size:
        ax.set_yscale("log")
        if (
            positive.max() < 1.001 * positive.min()
        ):  # a log axis around one number has no tick to show
            ax.set_ylim(float(positive.min()) / 2, float(positive.max()) * 2)
        _plain_log_ticks(ax.yaxis, *ax.get_ylim())
    if about.scale == "ratio":
        ax.axhline(1.0, color="black", linewidth=0.8, zorder=1)
    if about.scale == "linear":
        ax.axhline(0.0, color="black", linewidth=0.8, zorder=1)
    ax.set_xlabel("step")
    ax.set_ylabel(about.axis)
    ax.set_title(about.title)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _plain_log_ticks(axis: Axis, low: float, high: float) -> None:
    """On a log axis that spans little, ticks such as 0.5, 1, 2 in place of powers of ten that
    hardly occur; 0.1 in place of 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if high < 100 * low:
        subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.set_major_locator(LogLocator(subs=subs) if high > 4 * low else MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    if high < 100 * low or (low > 1e-5 and high < 1e5):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_events(ax: Axes, history: History) -> None:
    for kind in dict.fromkeys(event.kind for event in history.events):
        steps = sorted({event.step for event in history.events if event.kind == kind})
        colour, dashes = _EVENT_LINES.get(kind, _OTHER_EVENT)
        reach = (0.0, 1.0) if len(steps) <= _MOST_EVENT_LINES else (0.97, 1.0)
        style = dashes if len(steps) <= _MOST_EVENT_LINES else "-"
        for i, step in enumerate(steps):
            label = _event_label(kind) if i == 0 else None
            ax.axvline(
                step, *reach, color=colour, linestyle=style, linewidth=1.1, zorder=1, label=label
            )


def _mark_events_at_right(ax: Axes, history: History, name: str) -> None:
    handles: list[Any] = []
    for kind in dict.fromkeys(event.kind for event in history.events):
        steps = sorted(
            {
                event.step
                for event in history.events
                if event.kind == kind and event.name in ("", name)
            }
        )
        colour, _ = _EVENT_LINES.get(kind, _OTHER_EVENT)
        for step in steps:
            line = ax.axhline(
                step,
                *((0.96, 1.0) if kind != "lr_drop" else (0.0, 1.0)),
                color=colour,
                linewidth=1.2,
                zorder=1,
            )
        if steps:
            line.set_label(_event_label(kind))
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


def _event_label(kind: str) -> str:
    return _in_legend(
        _plain(_elide("LR drop" if kind == "lr_drop" else kind.replace("_", " "), 30))
    )


def _legend(ax: Axes, title: str = "") -> None:
    """A legend below the axes, where no curve can run behind it."""
    from matplotlib.transforms import ScaledTranslation

    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    figure = _figure_of(ax)
    below = ax.transAxes + ScaledTranslation(
        0, -0.48, figure.dpi_scale_trans
    )  # inches: the room of the ticks and of "step"
    inches = ax.get_position().width * figure.get_figwidth()
    columns = max(1, min(4, int(inches / (0.55 + 0.066 * max(map(len, labels))))))
    legend = ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=below,
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    if title:
        legend.set_title(title)
        legend.get_title().set_fontsize(8)
    for handle in legend.legend_handles:
        if handle is not None and (handle.get_alpha() or 1.0) < 0.2:
            handle.set_alpha(0.4)


def _inside_legend(ax: Axes) -> None:
    """A legend within the axes, for panels whose lower edge is taken by names."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, framealpha=0.9)


def _marker(steps: Ints | Sequence[str]) -> str | None:
    return "o" if len(steps) == 1 else None  # a line through one point is invisible


def _short(name: str) -> str:
    """A parameter's name as a label: without the ``.weight`` that all of them end in, and not
    longer than a label can be."""
    return _plain(_elide(name.removesuffix(".weight"), 28))


def _labels(names: Sequence[str]) -> list[str]:
    """Labels that tell these names apart: of long ones, what all of them begin with is left out
    before anything else is."""
    texts = [name.removesuffix(".weight") for name in names]
    parts = [text.split(".") for text in texts]
    shared = 0
    if len(names) > 1 and max(map(len, texts)) > 28:
        while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
            shared += 1
    texts = [".".join(each[shared:]) for each in parts]
    for length in (28, 40, 60):
        labels = [_plain(_elide(text, length)) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def _in_legend(text: str) -> str:
    """Matplotlib leaves labels that begin with an underscore out of legends; one with a blank
    before it is shown."""
    return f" {text}" if text.startswith("_") else text


def _elide(text: str, length: int) -> str:
    return (
        text
        if len(text) <= length
        else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    )


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: no formula between dollar signs, nothing
    unprintable."""
    return "".join(character if character.isprintable() else "?" for character in text).replace(
        "$", r"\$"
    )
