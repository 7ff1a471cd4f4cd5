"""What all pictures share: figures without pyplot, names that fit, colours, scales, event lines and
legends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.monitor.curves import Curves
from lightning_normdyn.monitor.events import Happenings, happenings
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import QUANTITIES, Quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Limits = tuple[float, float]

# Up to this many layers a legend names them; beyond, a colour bar tells the depth.
MOST_NAMED = 8
# Characters of a layer's name in a legend.
_LONG = 28

# Colours for runs: Okabe and Ito's palette, without the yellow that vanishes on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Solid first: a single run looks as usual.
_RUN_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), "-.", (0, (1, 1)))
# Colour and dashes of each kind of event.
_EVENT_LINES = {"lr_drop": ("#555555", (0, (4, 2))), "rescale": ("#CC79A7", (0, (1, 1)))}
_OTHER_EVENT = ("#999999", (0, (1, 1)))
# More lines of one kind would hide the curves; they become ticks at the upper edge.
_MOST_EVENT_LINES = 40
# More words than these would lie on each other.
_MOST_EVENT_LABELS = 6
# Points that the name of a curve takes, and that it stands above its end.
_NAME_HEIGHT = 9.0
_NAME_ABOVE = 6.0


# ------------------------------------------------------------------------------------------ figures


def axes_or_new(ax: Axes | None, height: float = 4.2) -> tuple[Figure, Axes]:
    """The axes to draw in, and their figure: a new one if None were given."""
    if ax is not None:
        return figure_of(ax), ax
    fig = new_figure(7.5, height)
    return fig, fig.add_subplot()


def new_figure(width: float, height: float) -> Figure:
    """A figure of this many inches that pyplot knows nothing of: no screen, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Constrained: legends and colour bars get their room without a call after drawing.
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def figure_of(ax: Axes) -> Figure:
    """The outermost figure that these axes are in."""
    # root: axes may lie in a subfigure, which cannot be saved.
    figure: Any = ax.get_figure(root=True)
    return figure  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------- names


def short_name(name: str) -> str:
    """A parameter's name as a label: without the ``.weight`` that all of them end in, and not
    longer than a label can be."""
    return fitted(name.removesuffix(".weight"), _LONG)


def layer_labels(names: Sequence[str], fit: Callable[[str, int], str] | None = None) -> list[str]:
    """Labels that tell these names apart: of long ones, what all of them begin with is left out
    before anything else is.

    Args:
        names: of parameters.
        fit: makes a text at most so many characters long; `fitted`, for Matplotlib, if None.
    """
    fit = fit or fitted
    texts = [name.removesuffix(".weight") for name in names]
    if len(texts) > 1 and max(map(len, texts)) > _LONG:
        paths = [text.split(".") for text in texts]
        # Without their last parts: each name must keep something. Prefixes of lists, part by part.
        shared = commonprefix([path[:-1] for path in paths])  # noqa: RUF071
        texts = [".".join(path[len(shared) :]) for path in paths]

    labels: list[str] = []
    # Names that differ in the middle alone need more room to stay apart.
    for length in (_LONG, 40, 60):
        labels = [fit(text, length) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def in_legend(text: str) -> str:
    """A label that a legend shows: matplotlib leaves out those that begin with an underscore, but
    not those with a blank before it."""
    return f" {text}" if text.startswith("_") else text


def fitted(text: str, length: int) -> str:
    """At most ``length`` characters, drawn as they stand by Matplotlib."""
    # Matplotlib takes what stands between two dollar signs for a formula.
    return shortened(text, length).replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters: of a longer text the middle is left out."""
    if len(text) > length:
        half = length // 2
        text = f"{text[: half - 1]}…{text[half - length :]}"
    for character in set(text):
        # No font has a glyph for it, and a line break would move everything below.
        if not character.isprintable():
            text = text.replace(character, "?")
    return text


# ------------------------------------------------------------------------------------------- curves


def depth_colours(count: int) -> list[Any]:
    """One colour per layer: the first is dark, the last one bright."""
    from matplotlib import colormaps

    # The last tenth of viridis is too bright on white.
    positions = np.linspace(0.0, 0.9, max(count, 2))
    return [colormaps["viridis"](position) for position in positions[:count]]


def draw_curve(
    ax: Axes,
    steps: Sequence[Any] | NDArray[Any],
    values: Any,
    **style: Any,
) -> None:
    """One line, with its label as it stands."""
    # A line through a single point is invisible.
    style.setdefault("marker", "o" if len(steps) == 1 else None)
    label = style.pop("label", None)
    ax.plot(
        steps,
        values,
        label=label and in_legend(label),
        **style,
    )


def run_style(index: int, label: str = "") -> dict[str, Any]:
    """Colour, line and label of a run. The lines differ too, so that two runs that agree are both
    seen."""
    return {
        "color": OKABE_ITO[index % len(OKABE_ITO)],
        "linestyle": _RUN_LINES[index % len(_RUN_LINES)],
        "label": fitted(label, 40),
    }


# --------------------------------------------------------------------------------- scales and ticks


def drawn_as(quantity: str) -> Quantity:
    """Title, axis and scale of a quantity; one that is not in the table has its own name as its
    title."""
    if quantity in QUANTITIES:
        return QUANTITIES[quantity]
    label = fitted(quantity, 40)
    return Quantity(quantity, title=label, meaning="", symbol=label)


def finish(
    ax: Axes,
    quantity: str,
    values: NDArray[Any],
    limits: Limits | None = None,
) -> None:
    """Give the axes the scale, labels and grid of a quantity.

    Args:
        ax: with all curves drawn.
        quantity: what they show.
        values: of all curves.
        limits: values that the axis has to hold as well.
    """
    look = drawn_as(quantity)
    if limits is not None:
        # Invisible points: matplotlib then chooses the view as it does for curves.
        ax.update_datalim([(ax.dataLim.x0, limit) for limit in limits])
        values = np.concatenate([values, limits])

    positive = values[np.isfinite(values) & (values > 0)]
    if look.scale != "linear" and positive.size:
        low, high = float(positive.min()), float(positive.max())
        ax.set_yscale("log")
        # A log axis around one number has no tick to show.
        if high < 1.001 * low:
            ax.set_ylim(low / 2, high * 2)
        plain_log_ticks(ax.yaxis, *ax.get_ylim())

    # Where a ratio is as predicted, and a signed quantity changes its sign.
    neutral = {"ratio": 1.0, "linear": 0.0}
    if look.scale in neutral:
        ax.axhline(
            neutral[look.scale],
            color="black",
            linewidth=0.8,
            zorder=1,
        )
    ax.set(xlabel="step", ylabel=look.axis, title=look.title)
    add_grid(ax)
    # Two sides are enough to read values by.
    ax.spines[["top", "right"]].set_visible(False)


def add_grid(ax: Axes) -> None:
    """Faint lines behind the curves."""
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)


def plain_log_ticks(
    axis: Axis,
    low: float,
    high: float,
) -> None:
    """On a log axis that spans little, ticks such as 0.5, 1, 2 in place of powers of ten that
    hardly occur; 0.1 in place of 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    spans_little = high < 100 * low
    if spans_little:
        if high > 10 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        elif high > 4 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        else:
            axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    # Beyond five digits a power of ten is easier to read.
    if spans_little or (low > 1e-5 and high < 1e5):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# ------------------------------------------------------------------------------------------- events


def event_look(kind: str) -> tuple[str, Any]:
    """Colour and line of a kind of event."""
    return _EVENT_LINES.get(kind, _OTHER_EVENT)


def event_words(told: Happenings) -> str:
    """What a legend says of a kind of event."""
    return in_legend(fitted(told.words, 40))


def mark_events(ax: Axes, history: History) -> None:
    """Vertical lines where the history has events, which explain jumps of the curves, with what
    they are: a drop of the learning rate with its factor beside the line, everything in the
    legend."""
    for told in happenings(history):
        colour, line = event_look(told.kind)
        lowest = 0.0
        if len(told.steps) > _MOST_EVENT_LINES:
            lowest, line = 0.97, "-"
        for step in told.steps:
            ax.axvline(
                step,
                lowest,
                1.0,
                color=colour,
                linestyle=line,
                linewidth=1.1,
                zorder=1,
                # One entry in the legend for all of a kind.
                label=event_words(told) if step == told.steps[0] else None,
            )
        # The words beside many lines would lie on each other.
        if len(told.steps) <= _MOST_EVENT_LABELS:
            _label_events(ax, told, colour)


def _label_events(
    ax: Axes,
    told: Happenings,
    colour: str,
) -> None:
    """The label of each event at the top of its line."""
    for step, label in zip(told.steps, told.labels, strict=True):
        if not label:
            continue
        ax.annotate(
            label,
            xy=(step, 1.0),
            # In units of the step along x, and of the axes' height along y.
            xycoords=ax.get_xaxis_transform(),
            xytext=(3, -3),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=7,
            color=colour,
            path_effects=_halo(),
            # Outside the axes it would stretch the figure.
            annotation_clip=True,
        )


# ------------------------------------------------------------------------------- names at curves


def label_ends(
    ax: Axes,
    curves: Curves,
    names: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Name some of the curves at their ends.

    Args:
        ax: with its final limits and scale.
        curves: by layer.
        names: of the layers to name.
        labels: what to call each.
    """
    ends = []
    for name, label in zip(names, labels, strict=True):
        steps, values = curves[name]
        drawable = np.isfinite(values)
        # A log axis has no place for what is not above 0.
        if ax.get_yscale() == "log":
            drawable &= values > 0
        if drawable.any():
            last = np.flatnonzero(drawable)[-1]
            ends.append((float(steps[last]), float(values[last]), label))
    ends.sort(key=lambda end: end[1])

    points = 72 * ax.get_position().height * figure_of(ax).get_figheight()
    heights = []
    for step, value, _ in ends:
        _, height = ax.transLimits.transform(ax.transScale.transform((step, value)))
        heights.append(float(height) * points)
    # Just above the curves' ends.
    places = _spread([height + _NAME_ABOVE for height in heights], points)
    for (step, value, label), height, place in zip(ends, heights, places, strict=True):
        ax.annotate(
            label,
            xy=(step, value),
            xytext=(-2, place - height),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            # Above all curves, which run behind it.
            zorder=5,
            path_effects=_halo(),
        )


def _spread(wanted: Sequence[float], top: float) -> list[float]:
    """Places for names, as near as possible to those wanted, none on another one; both in points
    from below, in order."""
    places: list[float] = []
    lowest = 0.0
    for place in wanted:
        places.append(max(place, lowest))
        lowest = places[-1] + _NAME_HEIGHT
    # What has been moved beyond the upper edge comes back, and moves those below it.
    highest = top - _NAME_HEIGHT / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], highest)
        highest = places[i] - _NAME_HEIGHT
    return places


def _halo() -> list[Any]:
    """White around letters, so that they are read on top of curves."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


# ------------------------------------------------------------------------------------------ legends


def legend_below(ax: Axes, title: str = "") -> None:
    """A legend below the axes, where no curve can run behind it."""
    from matplotlib.transforms import ScaledTranslation

    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    figure = figure_of(ax)
    # In inches: the room that the ticks and the word "step" take.
    below = ax.transAxes + ScaledTranslation(0, -0.48, figure.dpi_scale_trans)
    # As many columns as fit: inches for the line of a sample, and for each character behind it.
    width = ax.get_position().width * figure.get_figwidth()
    column_width = 0.55 + 0.066 * max(map(len, labels))
    legend = ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=below,
        ncols=max(1, min(4, int(width / column_width))),
        frameon=False,
        fontsize=8,
        title=title or None,
        title_fontsize=8,
    )
    # Bands and lines that are faint in the picture would be invisible as samples.
    for handle in legend.legend_handles:
        if handle is not None and (handle.get_alpha() or 1.0) < 0.4:
            handle.set_alpha(0.6)


def legend_inside(ax: Axes) -> None:
    """A legend within the axes, for panels whose lower edge is taken by names."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, framealpha=0.9)
