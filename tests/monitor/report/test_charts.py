"""The data of interactive charts: what was recorded, thinned and rounded, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from histories import converging_run, reported_run, run_with_faults, run_with_heads

from lightning_normdyn.monitor.curves import FARTHEST_RATIO
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report.charts import (
    MOST_POINTS,
    compared_data,
    legend_groups,
    rounded,
    run_data,
)
from lightning_normdyn.monitor.report.stills import common_limits


def data_of(history: History):
    names = list(dict.fromkeys(k.split("/", 1)[1] for k in history.keys() if "/" in k))  # noqa: SIM118
    return names, run_data(history, names, common_limits({"run": history}))


def test_a_chart_holds_the_curves_and_what_belongs_to_them():
    history = converging_run(3)
    names, data = data_of(history)
    assert data["layers"] == names
    assert data["span"] == [0, 390]
    assert [event["labels"] for event in data["events"]] == [[""] * 4, ["LR ÷ 10"]]
    kinds = [(chart["kind"], chart["quantity"]) for chart in data["charts"]]
    assert kinds[:2] == [("curves", "angular_update"), ("curves", "effective_lr")]
    assert ("map", "angular_update") in kinds
    angles = data["charts"][0]
    assert {line["beside"] for line in angles["lines"]} == {"", "equilibrium"}
    steps, values = history.column(f"angular_update/{names[1]}")
    (line,) = (each for each in angles["lines"] if each["layer"] == 1 and not each["beside"])
    assert line["x"] == steps.tolist()
    np.testing.assert_allclose(line["y"], values, rtol=1e-3)
    assert [each["label"] for each in angles["medians"]] == [
        "median, predicted layers",
        "prediction, median",
    ]


def test_many_layers_of_many_rows_are_thinned():
    history = History()
    for step in range(1000):
        row = {f"weight_norm/{i}.weight": 1.0 + step for i in range(80)}
        history.append(step, row, optimizer_step=step)
    _, data = data_of(history)
    (chart,) = data["charts"]
    assert len(chart["lines"]) == 80
    points = sum(len(line["x"]) for line in chart["lines"])
    assert MOST_POINTS / 2 < points <= MOST_POINTS
    assert {line["x"][-1] for line in chart["lines"]} == {999}


def test_a_map_names_its_abnormal_rows_and_refers_to_layers():
    _, data = data_of(run_with_faults())
    chart = next(chart for chart in data["charts"] if chart["quantity"] == "expected_ratio")
    abnormal = {entry["label"] for entry in chart["named"] if entry["abnormal"]}
    assert abnormal == {"block40", "block80", "block120"}
    assert chart["farthest"] == FARTHEST_RATIO
    assert len(chart["cells"]) == len(chart["rows"]) == 160
    assert len(chart["edges"]) == len(chart["cells"][0]) + 1


def test_a_comparison_needs_two_runs_that_recorded_a_quantity():
    one, two = reported_run(), run_with_heads(kinds=True)
    (chart,) = compared_data({"one": one, "two": two})
    assert (chart["kind"], chart["quantity"]) == ("bands", "angular_update")
    assert [band["label"] for band in chart["bands"]] == ["one", "two"]
    assert compared_data({"one": one}) == []


def test_a_legend_has_an_entry_for_each_layer_or_for_each_module():
    assert [group["label"] for group in legend_groups(["a.weight", "$b"])] == ["a", "$b"]
    blocks = [f"blocks.{i}.{part}.weight" for i in range(24) for part in ("attn", "mlp")]
    groups = legend_groups(blocks)
    # Of 24 modules that are alike, neighbours share an entry.
    assert len(groups) == 8
    assert groups[0]["label"] == "blocks.0.attn … blocks.2.mlp"
    assert [place for group in groups for place in group["layers"]] == list(range(48))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_express_is_none(value):
    assert json.dumps(rounded(np.array([1.0, value]))) == "[1.0, null]"
