"""Several runs in one picture, over the layers that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import (
    OKABE_ITO,
    axes_or_new,
    finish,
    legend_below,
    marker,
)
from lightning_normdyn.monitor.plots.curves import (
    as_table,
    curves_of,
    invariant_layers,
    layer_names,
    over_layers,
)
from lightning_normdyn.monitor.plots.labels import elide, in_legend, plain_text
from lightning_normdyn.monitor.records import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        only_overview = overview in history.keys() and not layer_names(history, quantity)  # noqa: SIM118
        if not only_overview:
            curves[label] = curves_of(history, quantity)
    curves, of_which = _alike(curves, histories)

    fig, ax = axes_or_new(ax)
    seen = []
    for i, (label, history) in enumerate(histories.items()):
        ours = curves.get(label) or {"all": history.column(f"normdyn/{quantity}")}
        steps, table = as_table(ours)
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        line = ("-", (0, (5, 2)), "-.", (0, (1, 1)))[
            i % 4
        ]  # so that two runs that agree are both seen
        low, middle, high = over_layers(partial(np.nanpercentile, q=[10, 50, 90]), table)
        if len(ours) > 1:
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(
            steps,
            middle,
            color=colour,
            linestyle=line,
            linewidth=1.8,
            label=in_legend(plain_text(elide(label, 40))),
            marker=marker(steps),
        )
        seen.append(np.concatenate([low, middle, high]))
    finish(ax, quantity, np.concatenate(seen))
    legend_below(ax, title=of_which)
    return fig, ax


def _alike(
    curves: Mapping[str, Mapping[str, tuple[Ints, Floats]]], histories: Mapping[str, History]
) -> tuple[dict[str, dict[str, tuple[Ints, Floats]]], str]:
    """Like with like: of each run's curves those of the scale-invariant layers that all runs have;
    and what to say of them."""
    invariant: set[str] = set()
    for label in curves:
        invariant |= invariant_layers(histories[label]) or set()
    chosen: dict[str, list[str]] = {}
    for label, ours in curves.items():
        own = invariant_layers(histories[label])
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
