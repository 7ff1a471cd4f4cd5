"""What all pictures share: figures without pyplot, names that fit, colours, scales, event lines and
legends."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that tell these names apart: of long ones, what all of them begin with is left out
    before anything else is."""
    texts = [name.removesuffix(".weight") for name in names]
    if len(texts) > 1 and max(map(len, texts)) > _LONG:
        paths = [text.split(".") for text in texts]
        # Without their last parts: each name must keep something. Prefixes of lists, part by part.
        shared = commonprefix([path[:-1] for path in paths])  # noqa: RUF071
        texts = [".".join(path[len(shared) :]) for path in paths]

    labels: list[str] = []
    # Names that differ in the middle alone need more room to stay apart.
    for length in (_LONG, 40, 60):
        labels = [fitted(text, length) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def in_legend(text: str) -> str:
    """A label that a legend shows: matplotlib leaves out those that begin with an underscore, but
    not those with a blank before it."""
    return f" {text}" if text.startswith("_") else text


def fitted(text: str, length: int) -> str:
    """At most ``length`` characters, drawn as they stand: of a longer text the middle is left
    out."""
    if len(text) > length:
        half = length // 2
        text = f"{text[: half - 1]}…{text[half - length :]}"
    for character in set(text):
        # No font has a glyph for it, and a line break would move everything below.
        if not character.isprintable():
            text = text.replace(character, "?")
    # Matplotlib takes what stands between two dollar signs for a formula.
    return text.replace("$", r"\$")


# ------------------------------------------------------------------------------------------- curves


def depth_colours(count: int) -> list[Any]:
    """One colour per layer: the first is dark, the last one bright."""
    from matplotlib import colormaps

    # The last tenth of viridis is too bright on white.
    positions = np.linspace(0.0, 0.9, max(count, 2))
    return [colormaps["viridis"](position) for position in positions[:count]]


def draw_curve(ax: Axes, steps: Sequence[Any] | NDArray[Any], values: Any, **style: Any) -> None:
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


def finish(ax: Axes, quantity: str, values: NDArray[Any], limits: Limits | None = None) -> None:
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


def plain_log_ticks(axis: Axis, low: float, high: float) -> None:
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


def steps_by_kind(history: History, name: str | None = None) -> dict[str, list[int]]:
    """The steps of the events of each kind, in order; with a name, of those about it or about
    all."""
    steps: dict[str, set[int]] = {}
    for event in history.events:
        if name is None or event.name in ("", name):
            steps.setdefault(event.kind, set()).add(event.step)
    return {kind: sorted(own) for kind, own in steps.items()}


def event_look(kind: str) -> tuple[str, Any, str]:
    """Colour, line and label of a kind of event."""
    colour, line = _EVENT_LINES.get(kind, _OTHER_EVENT)
    words = "LR drop" if kind == "lr_drop" else kind.replace("_", " ")
    return colour, line, in_legend(fitted(words, 30))


def mark_events(ax: Axes, history: History) -> None:
    """Vertical lines where the history has events, which explain jumps of the curves."""
    for kind, steps in steps_by_kind(history).items():
        colour, line, label = event_look(kind)
        lowest = 0.0
        if len(steps) > _MOST_EVENT_LINES:
            lowest, line = 0.97, "-"
        for step in steps:
            ax.axvline(
                step,
                lowest,
                1.0,
                color=colour,
                linestyle=line,
                linewidth=1.1,
                zorder=1,
                # One entry in the legend for all of a kind.
                label=label if step == steps[0] else None,
            )


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
