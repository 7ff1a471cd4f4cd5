"""A quantity of all layers as a chart that one can zoom into and point at, for loggers that show
such charts: curves, and a map of layer by step. Needs plotly."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .curves import (
    FARTHEST_RATIO,
    MOST_COLUMNS,
    Curves,
    as_table,
    evenly_spaced,
    recorded_curves,
    thinned_evenly,
)
from .history import History
from .quantities import QUANTITIES, Quantity, drawn_with

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def can_interact() -> bool:
    """Whether plotly is installed."""
    # Found, not imported: a fit whose loggers show no charts must not wait for it.
    return find_spec("plotly") is not None


def interactive_curves(
    history: History,
    name: str,
    most: int,
) -> Figure:
    """The curves of a quantity, one per layer in the order of the network, coloured by depth, with
    what belongs to them dashed.

    Args:
        history: what was recorded.
        name: the quantity.
        most: points of all curves together.
    """
    from plotly.colors import sample_colorscale
    from plotly.graph_objects import Figure, Scatter

    families = [recorded_curves(history, each) for each in drawn_with(name)]
    layers = list(families[0])
    # The last tenth of the scale is too bright on white.
    depths = np.linspace(0.0, 0.9, len(layers)).tolist()
    colours = dict(zip(layers, sample_colorscale("Viridis", depths), strict=True))

    figure = Figure()
    for place, family in enumerate(families):
        shown: Curves = {layer: family[layer] for layer in layers if layer in family}
        for layer, (steps, values) in thinned_evenly(shown, most // len(families)).items():
            line = Scatter(
                x=steps.tolist(),
                y=_plain(values),
                name=layer,
                legendgroup=layer,
                showlegend=place == 0,
                mode="lines" if len(steps) > 1 else "markers",
                line={
                    "color": colours[layer],
                    "width": 1.5 if place == 0 else 0.8,
                    "dash": "solid" if place == 0 else "dash",
                },
                hovertemplate="%{fullData.name}<br>step %{x}<br>%{y:.3g}<extra></extra>",
            )
            figure.add_trace(line)
    quantity = QUANTITIES[name]
    figure.update_layout(**_look(quantity))
    figure.update_yaxes(
        title_text=quantity.axis, type="linear" if quantity.scale == "linear" else "log"
    )
    return figure


def interactive_map(history: History, name: str) -> Figure:
    """A quantity by layer and step, as colour; what one points at is told as a number.

    Args:
        history: what was recorded.
        name: the quantity.
    """
    from plotly.graph_objects import Figure, Heatmap

    quantity = QUANTITIES[name]
    curves = recorded_curves(history, name)
    steps, table = as_table(curves)
    chosen = evenly_spaced(len(steps), MOST_COLUMNS)
    steps, table = steps[chosen], table[:, chosen]

    colours: dict[str, Any] = {"colorscale": "Viridis", "colorbar": {"title": quantity.axis}}
    shown = table
    if quantity.scale != "linear":
        # A colour scale of plotly is linear; what is not above 0 has no logarithm, and no colour.
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = np.where(table > 0, np.log10(table), np.nan)
        colours["colorbar"] = {"title": f"log10 {quantity.axis}"}
    if quantity.scale == "ratio":
        # The same ends in every picture: the noise of a healthy run has to look like nothing.
        end = float(np.log10(FARTHEST_RATIO))
        colours |= {"colorscale": "PuOr_r", "zmin": -end, "zmax": end}
        # The bar tells ratios, and not their logarithms.
        ticks = np.array([1 / FARTHEST_RATIO, 0.3, 1.0, 3.0, FARTHEST_RATIO])
        colours["colorbar"] = {
            "title": quantity.axis,
            "tickvals": np.log10(ticks).tolist(),
            "ticktext": [f"{tick:g}" for tick in ticks],
        }
    rows = Heatmap(
        x=steps.tolist(),
        y=list(curves),
        z=[_plain(row) for row in shown],
        customdata=[_plain(row) for row in table],
        hovertemplate="%{y}<br>step %{x}<br>%{customdata:.3g}<extra></extra>",
        **colours,
    )
    figure = Figure(rows)
    figure.update_layout(**_look(quantity))
    # The first layer on top, as in a listing of the network.
    figure.update_yaxes(autorange="reversed")
    return figure


def _look(quantity: Quantity) -> dict[str, Any]:
    return {
        "title": quantity.title,
        "xaxis_title": "step",
        "template": "plotly_white",
        "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    }


def _plain(values: Any) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]
