"""Charts that one can zoom into say what the history says, in the order of the network."""

from __future__ import annotations

import json

import numpy as np
import pytest
from histories import expected_run

from lightning_normdyn.monitor import interactive
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.interactive import interactive_curves, interactive_map

pytest.importorskip("plotly")


def test_curves_are_those_of_the_history_with_what_belongs_to_them_dashed():
    history = expected_run()
    figure = interactive_curves(history, "angular_update", 10_000)
    layers = [key.split("/", 1)[1] for key in history.keys() if key.startswith("angular_update/")]  # noqa: SIM118
    measured = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name for trace in measured] == layers
    steps, values = history.column(f"angular_update/{layers[1]}")
    assert list(measured[1].x) == steps.tolist()
    assert list(measured[1].y) == pytest.approx(values.tolist())
    dashed = [trace for trace in figure.data if not trace.showlegend]
    assert {trace.line.dash for trace in dashed} == {"dash"}
    assert {trace.legendgroup for trace in dashed} <= set(layers)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.text == "Angular update"
    json.loads(figure.to_json())


def test_many_points_are_thinned_with_the_first_and_the_last():
    history = History()
    for step in range(500):
        values = {f"weight_norm/{i}.weight": 1.0 + step for i in range(20)}
        history.append(step, values, optimizer_step=step + 1)
    figure = interactive_curves(history, "weight_norm", 1000)
    assert sum(len(trace.x) for trace in figure.data) <= 1000
    assert all((trace.x[0], trace.x[-1]) == (0, 499) for trace in figure.data)
    rows = interactive_map(history, "weight_norm").data[0]
    assert len(rows.x) == interactive.MOST_COLUMNS
    assert len(rows.y) == 20


def test_a_map_of_ratios_has_the_same_ends_always_and_tells_numbers():
    history = History()
    for step, ratio in enumerate((1.0, 0.01, 100.0, 0.0, float("nan"))):
        history.append(step, {"expected_ratio/b": ratio, "expected_ratio/a": 1.0}, optimizer_step=1)
    figure = interactive_map(history, "expected_ratio")
    (rows,) = figure.data
    assert list(rows.y) == ["b", "a"]
    assert (rows.zmin, rows.zmax) == (-1.0, 1.0)
    assert list(rows.z[0][:3]) == pytest.approx([0.0, -2.0, 2.0], abs=1e-6)
    # What has no logarithm has no colour, and JSON has no NaN.
    assert list(rows.z[0][3:]) == [None, None]
    assert list(rows.customdata[0][:4]) == pytest.approx([1.0, 0.01, 100.0, 0.0])
    assert figure.layout.yaxis.autorange == "reversed"
    assert "NaN" not in figure.to_json()


def test_a_quantity_with_a_sign_has_a_linear_axis():
    history = History()
    history.append(0, {"radial_update/a": -0.5}, optimizer_step=1)
    figure = interactive_curves(history, "radial_update", 100)
    assert figure.layout.yaxis.type == "linear"
    assert figure.data[0].mode == "markers"  # a line through one point is invisible
    assert np.allclose(interactive_map(history, "radial_update").data[0].z[0], [-0.5])
