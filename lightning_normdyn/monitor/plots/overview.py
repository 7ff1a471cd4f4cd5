"""The pictures that a run is usually first judged by, as panels of one figure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import figure_of, new_figure
from lightning_normdyn.monitor.plots.curves import curves_of, layer_names
from lightning_normdyn.monitor.plots.heat_map import plot_heatmap
from lightning_normdyn.monitor.plots.layers import plot_curves
from lightning_normdyn.monitor.quantities import shown_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    panels = [quantity for quantity in shown_in("curves") if layer_names(history, quantity)]
    if len(panels) > 3 and "weight_std" in panels:  # leave room for the map
        panels.remove("weight_std")
    # One map. The last in the table, the ratio to the prediction, tells most where it is known.
    maps = [quantity for quantity in shown_in("map") if layer_names(history, quantity)][-1:]
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
