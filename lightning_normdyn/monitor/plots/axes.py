"""What all pictures share: figures without pyplot, colours, scales, event lines and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.labels import elide, in_legend, plain_text
from lightning_normdyn.monitor.quantities import QUANTITIES, Quantity
from lightning_normdyn.monitor.records import Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


MOST_NAMED = 8
"""Up to this many layers a legend names them; beyond, a colour bar tells the depth."""


OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours for runs: Okabe and Ito's palette, without the yellow that vanishes on white."""


EVENT_LINES = {"lr_drop": ("#555555", (0, (4, 2))), "rescale": ("#CC79A7", (0, (1, 1)))}


OTHER_EVENT = ("#999999", (0, (1, 1)))


_MOST_EVENT_LINES = 40
"""More lines of one kind would hide the curves; they become ticks at the upper edge."""


def drawn_as(quantity: str) -> Quantity:
    """Title, axis and scale of a quantity; one that is not in the table has its own name as its
    title."""
    if quantity in QUANTITIES:
        return QUANTITIES[quantity]
    label = plain_text(elide(quantity, 40))
    return Quantity(quantity, title=label, meaning="", symbol=label)


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

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def figure_of(ax: Axes) -> Figure:
    """The outermost figure that these axes are in."""
    figure: Any = ax.get_figure(root=True)
    return figure  # type: ignore[no-any-return]


def depth_colours(count: int) -> list[Any]:
    """One colour per layer: the first is dark, the last one bright."""
    from matplotlib import colormaps

    # The last tenth of viridis is too bright on white.
    return [colormaps["viridis"](position) for position in np.linspace(0.0, 0.9, max(count, 2))][
        :count
    ]


def finish(
    ax: Axes, quantity: str, values: NDArray[Any], limits: tuple[float, float] | None = None
) -> None:
    """Scale, labels and grid as the quantity asks; ``values`` are those drawn, ``limits`` those to hold."""
    look = drawn_as(quantity)
    if limits is not None:
        x = ax.dataLim.x0
        ax.update_datalim([(x, limits[0]), (x, limits[1])])
        values = np.concatenate([values, limits])
    positive = values[np.isfinite(values) & (values > 0)]
    if look.scale in ("log", "ratio") and positive.size:
        ax.set_yscale("log")
        if (
            positive.max() < 1.001 * positive.min()
        ):  # a log axis around one number has no tick to show
            ax.set_ylim(float(positive.min()) / 2, float(positive.max()) * 2)
        plain_log_ticks(ax.yaxis, *ax.get_ylim())
    if look.scale == "ratio":
        ax.axhline(1.0, color="black", linewidth=0.8, zorder=1)
    if look.scale == "linear":
        ax.axhline(0.0, color="black", linewidth=0.8, zorder=1)
    ax.set_xlabel("step")
    ax.set_ylabel(look.axis)
    ax.set_title(look.title)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def plain_log_ticks(axis: Axis, low: float, high: float) -> None:
    """On a log axis that spans little, ticks such as 0.5, 1, 2 in place of powers of ten that
    hardly occur; 0.1 in place of 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if high < 100 * low:
        subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        axis.set_major_locator(LogLocator(subs=subs) if high > 4 * low else MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    if high < 100 * low or (low > 1e-5 and high < 1e5):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def mark_events(ax: Axes, history: History) -> None:
    """Vertical lines where the history has events, which explain jumps of the curves."""
    for kind in dict.fromkeys(event.kind for event in history.events):
        steps = sorted({event.step for event in history.events if event.kind == kind})
        colour, dashes = EVENT_LINES.get(kind, OTHER_EVENT)
        reach = (0.0, 1.0) if len(steps) <= _MOST_EVENT_LINES else (0.97, 1.0)
        style = dashes if len(steps) <= _MOST_EVENT_LINES else "-"
        for i, step in enumerate(steps):
            label = event_label(kind) if i == 0 else None
            ax.axvline(
                step, *reach, color=colour, linestyle=style, linewidth=1.1, zorder=1, label=label
            )


def event_label(kind: str) -> str:
    """What a legend calls a kind of event."""
    return in_legend(
        plain_text(elide("LR drop" if kind == "lr_drop" else kind.replace("_", " "), 30))
    )


def legend_below(ax: Axes, title: str = "") -> None:
    """A legend below the axes, where no curve can run behind it."""
    from matplotlib.transforms import ScaledTranslation

    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    figure = figure_of(ax)
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


def legend_inside(ax: Axes) -> None:
    """A legend within the axes, for panels whose lower edge is taken by names."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8, framealpha=0.9)


def marker(steps: Ints | Sequence[str]) -> str | None:
    """A dot where there is a single point: a line through it would be invisible."""
    return "o" if len(steps) == 1 else None
