"""What the interactive charts of a report show, as plain data: curves thinned to what a screen can
show, maps, and what the legend and the events are.

The page's own script draws it. Numbers are rounded to four digits: a page has a hundred thousand of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from lightning_normdyn.monitor.angles import compared_angles
from lightning_normdyn.monitor.curves import (
    FARTHEST_RATIO,
    Curves,
    evenly_spaced,
    pictured,
    recorded_curves,
)
from lightning_normdyn.monitor.events import happenings
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import drawn_as, layer_labels, shortened
from lightning_normdyn.monitor.plots.compare import bands_of
from lightning_normdyn.monitor.plots.heatmap import abnormal_rows, cells_of, named_rows
from lightning_normdyn.monitor.quantities import drawn_with, shown_in

from .stills import Limits
from .thinning import thinned

Chart = dict[str, Any]

MOST_POINTS = 20_000
"""Of all measured curves of a chart together."""

# Fewest and most, whatever the number of curves: fewer would not show a course, and a chart is
# hardly wider in pixels.
_POINTS_OF_A_CURVE = (80, 400)
# Of a number: a chart cannot show more, and each digit is a byte in a hundred thousand numbers.
_DIGITS = 4
# Entries of a legend; of more layers, neighbours share one.
_LEAST_ENTRIES, _MOST_ENTRIES = 3, 16
_STRETCHES = 8
# Rows of a map that are named.
_NAMED_ROWS = 32


def run_data(
    history: History,
    layers: Sequence[str],
    limits: Limits,
) -> dict[str, Any]:
    """All that the charts of one run need.

    Args:
        history: of the run.
        layers: names, in the order of the network; data refer to them by their places.
        limits: of each quantity, the values that the axes of all runs hold.

    Returns:
        ``layers`` (names), ``groups`` (entries of the legend), ``span`` (first and last step),
        ``events``, ``charts``.
    """
    places = {name: place for place, name in enumerate(layers)}
    charts = []
    for quantity in pictured(history, "curves"):
        curves = recorded_curves(history, quantity)
        # Empty where all rows with it were thinned away.
        if curves:
            charts.append(_curves_chart(history, quantity, places, limits.get(quantity)))
    for quantity in pictured(history, "report map"):
        curves = recorded_curves(history, quantity)
        if curves:
            charts.append(_map_chart(curves, quantity, places, limits.get(quantity)))
    return {
        "layers": list(layers),
        "groups": legend_groups(layers),
        "span": [history[0]["step"], history[-1]["step"]],
        "events": [each._asdict() for each in happenings(history)],
        "charts": charts,
    }


def compared_data(runs: Mapping[str, History]) -> list[Chart]:
    """A chart for each quantity that at least two runs recorded: the median over layers of each
    run, and a band that holds the middle 80 % of them."""
    charts = []
    for quantity in shown_in("comparison"):
        recorded = {}
        for label, history in runs.items():
            if recorded_curves(history, quantity):
                recorded[label] = history
        # A comparison of one run would repeat its own chart.
        if len(recorded) > 1:
            charts.append(_bands_chart(recorded, quantity))
    return charts


def legend_groups(names: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of a legend: a layer each, or of many layers those of a module.

    Example:
        >>> names = [f"net.stage{i // 10}.{i}.weight" for i in range(30)]
        >>> [(group["label"], len(group["layers"])) for group in legend_groups(names)]
        [('net.stage0', 10), ('net.stage1', 10), ('net.stage2', 10)]
    """
    labels = layer_labels(names, shortened)
    if len(names) <= _MOST_ENTRIES:
        return [_entry(label, [place]) for place, label in enumerate(labels)]

    paths = [name.removesuffix(".weight").split(".") for name in names]
    deepest = max(map(len, paths))
    for depth in range(1, deepest + 1):
        together: dict[str, list[int]] = {}
        for place, path in enumerate(paths):
            together.setdefault(".".join(path[:depth]), []).append(place)
        if len(together) > _MOST_ENTRIES:
            break
        # An entry for nearly all layers would switch nothing.
        if len(together) >= _LEAST_ENTRIES:
            return [_entry(label, own) for label, own in together.items()]

    # Modules that are all alike, as the blocks of a transformer: neighbours share an entry.
    groups = []
    for own in np.array_split(np.arange(len(names)), _STRETCHES):
        first, last = labels[own[0]], labels[own[-1]]
        groups.append(_entry(f"{first} … {last}", own.tolist()))
    return groups


def _entry(label: str, layers: Sequence[int]) -> dict[str, Any]:
    return {"label": shortened(label, 60), "layers": list(layers)}


def _curves_chart(
    history: History, quantity: str, places: Mapping[str, int], limits: Sequence[float] | None
) -> Chart:
    """The curves of all layers, and what belongs to each of them."""
    curves = recorded_curves(history, quantity)
    fewest, most = _POINTS_OF_A_CURVE
    points = min(max(MOST_POINTS // len(curves), fewest), most)
    lines = _lines(curves, places, points, "")
    for beside in drawn_with(quantity)[1:]:
        # What is measured has more points: the rest is smooth, or hidden most of the time.
        others = recorded_curves(history, beside)
        lines += _lines(others, places, max(points // 2, fewest), beside.split("_")[0])
    chart = _chart("curves", quantity, limits)
    chart["lines"] = lines
    chart["medians"] = []
    if quantity == "angular_update":
        chart["medians"] = _medians(history, most)
    return chart


def _lines(
    curves: Curves, places: Mapping[str, int], points: int, beside: str
) -> list[dict[str, Any]]:
    lines = []
    for name, curve in curves.items():
        # A curve of another callback may be of a weight that the table does not have.
        if name in places:
            steps, values = thinned(*curve, points)
            line = {"layer": places[name], "x": steps.tolist(), "y": rounded(values)}
            lines.append({**line, "beside": beside})
    return lines


def _medians(history: History, points: int) -> list[dict[str, Any]]:
    """Measured, expected and predicted angles of the same layers, in one line each."""
    angles = compared_angles(history)
    known = {
        f"median, {angles.which}": angles.measured,
        "expected now, median": angles.expected,
        "prediction, median": angles.predicted,
    }
    lines = []
    for label, median in known.items():
        if median is not None and len(median):
            steps, values = thinned(angles.steps, median.astype(np.float32), points)
            lines.append({"label": label, "x": steps.tolist(), "y": rounded(values)})
    return lines


def _map_chart(
    curves: Curves, quantity: str, places: Mapping[str, int], limits: Sequence[float] | None
) -> Chart:
    """Layer by step, the quantity as colour."""
    # As in `_lines`: rows refer to layers of the table.
    known = {name: curve for name, curve in curves.items() if name in places}
    edges, cells = cells_of(known)
    labels = layer_labels(list(known), shortened)
    abnormal = abnormal_rows(known, drawn_as(quantity).scale)
    shown = named_rows(len(labels), abnormal, _NAMED_ROWS)
    chart = _chart("map", quantity, limits)
    # The ends of the colours of ratios; any other quantity reaches as far as its values do.
    chart["farthest"] = FARTHEST_RATIO if chart["scale"] == "ratio" else None
    chart["edges"] = edges.tolist()
    chart["cells"] = [rounded(row) for row in cells]
    chart["rows"] = [places[name] for name in known]
    chart["named"] = []
    for row in shown:
        named = {"row": row, "label": labels[row], "abnormal": row in abnormal}
        chart["named"].append(named)
    return chart


def _bands_chart(runs: Mapping[str, History], quantity: str) -> Chart:
    bands, of_which = bands_of(runs, quantity)
    chart = _chart("bands", quantity, None)
    chart["note"] = of_which
    chart["bands"] = []
    for label, band in bands.items():
        # Three lines of a band belong together: the same steps of each.
        chosen = evenly_spaced(len(band.steps), _POINTS_OF_A_CURVE[1])
        chart["bands"].append(
            {
                "label": label,
                "x": band.steps[chosen].tolist(),
                "low": rounded(band.low[chosen]),
                "middle": rounded(band.middle[chosen]),
                "high": rounded(band.high[chosen]),
                "layers": band.layers,
            }
        )
    return chart


def _chart(
    kind: str,
    quantity: str,
    limits: Sequence[float] | None,
) -> Chart:
    look = drawn_as(quantity)
    return {
        "kind": kind,
        "quantity": quantity,
        "title": look.title,
        "note": "",
        "axis": look.axis,
        "scale": look.scale,
        "limits": None if limits is None else rounded(np.array(limits)),
    }


def rounded(values: Any) -> list[float | None]:
    """Numbers as JSON can express them: four digits, and None where they are not finite.

    Example:
        >>> rounded(np.array([0.123456, np.nan, 20000.0]))
        [0.1235, None, 20000.0]
    """
    numbers: list[float | None] = []
    for value in np.asarray(values, dtype=np.float64).tolist():
        if isfinite(value):
            numbers.append(float(f"{value:.{_DIGITS}g}"))
        else:
            numbers.append(None)
    return numbers
