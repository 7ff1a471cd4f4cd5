"""Pictures of a report that are part of its file, drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import pictured, recorded_curves
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.compare import plot_compare
from lightning_normdyn.monitor.plots.heatmap import plot_heatmap
from lightning_normdyn.monitor.plots.layers import plot_curves, shared_limits
from lightning_normdyn.monitor.plots.vectors import plot_norm_ridge
from lightning_normdyn.monitor.quantities import shown_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Limits = Mapping[str, tuple[float, float] | None]


class Picture(NamedTuple):
    """An image that is part of the page."""

    alt: str
    png: str
    """Base64; empty where there is none, and ``alt`` says why."""


def common_limits(runs: Mapping[str, History]) -> Limits:
    """Of each quantity, the values that the axes of all runs hold: pictures side by side are
    compared by eye."""
    histories = list(runs.values())
    shown = (*shown_in("curves"), *shown_in("report map"))
    return {quantity: shared_limits(histories, quantity) for quantity in shown}


def pictures_of_all(runs: Mapping[str, History], say: Callable[[str], None]) -> Iterator[Picture]:
    """Several runs in one picture, a quantity each."""
    for quantity in shown_in("comparison"):
        recorded = {}
        for label, history in runs.items():
            if recorded_curves(history, quantity):
                recorded[label] = history
        # A comparison of one run would repeat its own picture.
        if len(recorded) > 1:
            say(f"comparing {quantity}")
            fig, _ = plot_compare(recorded, quantity)
            yield _picture(fig, f"{quantity} of {', '.join(recorded)}")


def pictures_of(
    label: str,
    history: History,
    limits: Limits,
) -> Iterator[Picture]:
    """The curves, heat maps and the ridge of one run, as far as it recorded them."""
    for quantity in pictured(history, "curves"):
        fig, _ = plot_curves(history, quantity, limits=limits[quantity])
        yield _picture(fig, f"{quantity} of {label}")
    for quantity in pictured(history, "report map"):
        fig, _ = plot_heatmap(
            history,
            quantity=quantity,
            limits=limits[quantity],
        )
        yield _picture(fig, f"{quantity} of {label}, layer by step")
    yield from ridge_of(label, history)


def ridge_of(label: str, history: History) -> Iterator[Picture]:
    """How the norms of single vectors are spread, where a run recorded them."""
    if any(name.startswith("weight_norm/") for name in history.vector_names()):
        try:
            fig, _ = plot_norm_ridge(history)
            yield _picture(fig, f"norms of single vectors of {label}")
        # No norm in it is finite. The other pictures of a run that diverged still tell something.
        except NormDynError as error:
            yield Picture(str(error), png="")


def _picture(fig: Figure, alt: str) -> Picture:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # PNG, not SVG: the lines of 160 layers would make a page of many megabytes.
        fig.savefig(file, format="png", dpi=110)
    return Picture(alt, base64.b64encode(file.getvalue()).decode())
