"""Several runs in one picture, over the layers that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import (
    Curves,
    Doubles,
    as_table,
    curves_of,
    invariant_layers,
    layer_names,
    over_layers,
)
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Ints

from .axes import axes_or_new, draw_curve, finish, legend_below, run_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_compare(
    histories: Mapping[str, History], quantity: str = "effective_lr", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Several runs in one picture: the median over layers, and a band that holds the middle 80 % of
    them.

    The layers are the scale-invariant ones that all runs have, as far as the runs say which these
    are; the title of the legend says over which layers the median was taken. Runs that share no
    layer are each shown with their own.

    Args:
        histories: by the label of each run.
        quantity: any recorded quantity; a run without layers' curves shows its
            ``normdyn/<quantity>``.
        ax: where to draw; a new figure if None.

    Raises:
        NormDynError: where there is no run, or one of them has not recorded the quantity.
    """
    bands, of_which = bands_of(histories, quantity)
    fig, ax = axes_or_new(ax)
    drawn = []
    for i, (label, band) in enumerate(bands.items()):
        # The band of a single layer would lie under its own line.
        style = run_style(i, label)
        if band.layers > 1:
            ax.fill_between(
                band.steps,
                band.low,
                band.high,
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
        draw_curve(ax, band.steps, band.middle, linewidth=1.8, **style)
        drawn += [band.low, band.middle, band.high]
    finish(ax, quantity, np.concatenate(drawn))
    legend_below(ax, title=of_which)
    return fig, ax


class Band(NamedTuple):
    """A quantity over the layers of one run.

    Args:
        steps: ``(s,)``.
        low: ``(s,)``, a tenth of the layers is below it.
        middle: ``(s,)``, the median.
        high: ``(s,)``, a tenth of the layers is above it.
        layers: how many there are.
    """

    steps: Ints
    low: Doubles
    middle: Doubles
    high: Doubles
    layers: int


def bands_of(histories: Mapping[str, History], quantity: str) -> tuple[dict[str, Band], str]:
    """What `plot_compare` draws: a band for each run, and over which layers they are taken.

    Raises:
        NormDynError: as `plot_compare`.
    """
    if not histories:
        raise NormDynError("a comparison needs at least one run, got none.")
    curves: dict[str, Curves] = {}
    overviews: dict[str, Curves] = {}
    for label, history in histories.items():
        overview = f"normdyn/{quantity}"
        if history.has(overview) and not layer_names(history, quantity):
            overviews[label] = {"all": history.column(overview)}
        else:
            curves[label] = curves_of(history, quantity)
    curves, of_which = _comparable(curves, histories)

    bands = {}
    for label in histories:
        layers = overviews.get(label) or curves[label]
        steps, table = as_table(layers)
        low, middle, high = over_layers(partial(np.nanpercentile, q=[10, 50, 90]), table)
        bands[label] = Band(steps, low, middle, high, len(layers))
    return bands, of_which


def _comparable(
    curves: Mapping[str, Curves], histories: Mapping[str, History]
) -> tuple[dict[str, Curves], str]:
    """Like with like: of each run's curves those of the scale-invariant layers that all runs have;
    and what to say of them."""
    if not curves:
        return {}, ""
    invariant_of = {label: invariant_layers(histories[label]) for label in curves}
    # What one run says of a layer holds for the others, which may not say.
    invariant: set[str] = set()
    for layers in invariant_of.values():
        invariant |= layers or set()
    chosen: dict[str, set[str]] = {}
    for label, ours in curves.items():
        own = invariant_of[label]
        # A run that does not say which of its layers these are is believed to be as the others.
        wanted = invariant if own is None else own
        chosen[label] = set(ours) & wanted or set(ours)

    common = set.intersection(*chosen.values())
    if common:
        kind = "scale-invariant layers" if common <= invariant else "layers"
        chosen = dict.fromkeys(chosen, common)
        # The quantiles of a single layer are its curve.
        text = f"median and middle 80 % of {len(common)} {kind}" if len(common) > 1 else ""
    else:
        text = "median and middle 80 % of each run's layers"

    compared: dict[str, Curves] = {}
    for label, ours in curves.items():
        # In the order of the network, which a set does not keep.
        compared[label] = {name: ours[name] for name in ours if name in chosen[label]}
    return compared, text
