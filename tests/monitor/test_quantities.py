"""The table of quantities: an entry that is added to it is found in every place, and nothing else
keeps a list of quantities."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L
import pytest
from cases import KeepsRows
from models import fit, make, weights_of

import lightning_normdyn
from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.functional import norm_from_sums
from lightning_normdyn.monitor.outcome import Outcome
from lightning_normdyn.monitor.plots.layers import plot_effective_lr, plot_overview, shared_limits
from lightning_normdyn.monitor.quantities import (
    QUANTITIES,
    Quantity,
    drawn_with,
    for_loggers,
    markdown_table,
    monitored,
    rate_followed,
    shown_in,
    to_measure,
)
from lightning_normdyn.monitor.report.page import write_report
from lightning_normdyn.monitor.workspace import wandb_workspace

PACKAGE = Path(lightning_normdyn.__file__).parent
NAMES = ("net.0.weight", "net.3.weight", "net.8.weight")
RELATIVE_UPDATE = Quantity(
    "relative_update",
    title="Relative update",
    meaning="‖Δ‖/‖w‖: the length of the step over that of the weight",
    symbol="‖Δ‖/‖w‖",
    unit="per step",
    average="rms",
    formula=lambda step: norm_from_sums(step.dd) / step.norm,
    logged=True,
    places=("curves", "chart", "map", "report map", "comparison"),
    histogram=True,
    callback_metric=True,
    progress_bar=("normdyn/step", 1e3),
)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(QUANTITIES, RELATIVE_UPDATE.name, RELATIVE_UPDATE)


class Watches(L.Callback):
    """The weights before and after the first step, and what other callbacks can see."""

    def on_train_start(self, trainer, pl_module):
        self.before = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after = weights_of(pl_module)
        self.metrics = {**trainer.callback_metrics}
        self.progress_bar = {**trainer.progress_bar_metrics}


def measured(**arguments):
    """A history of one step, the row that the logger got, and what other callbacks saw."""
    monitor = NormDynamicsMonitor(1, tables=False, **arguments)
    rows, watches = KeepsRows(), Watches()
    fit(make(), [monitor, watches], logger=rows, max_steps=1)
    logged = next(row for row in rows.rows if any("/net.0" in key for key in row))
    return monitor.history, logged, watches


@pytest.mark.usefixtures("added")
def test_an_added_quantity_is_measured_averaged_kept_logged_and_told():
    history, logged, watches = measured()
    squares, count = 0.0, 0
    for name in NAMES:
        before, after = watches.before[name].flatten(1), watches.after[name].flatten(1)
        relative = (after - before).norm(dim=1) / before.norm(dim=1)
        expected = float(relative.square().mean().sqrt())
        assert logged[f"relative_update/{name}"] == pytest.approx(expected)
        assert history[0][f"relative_update/{name}"] == pytest.approx(expected)
        if name != "net.8.weight":  # the head is not scale-invariant
            squares, count = squares + float(relative.square().sum()), count + len(relative)
    overview = (squares / count) ** 0.5
    assert logged["normdyn/relative_update"] == pytest.approx(overview)
    assert float(watches.metrics["normdyn/relative_update"]) == pytest.approx(overview)
    assert float(watches.progress_bar["normdyn/step"]) == pytest.approx(1e3 * overview)


@pytest.mark.usefixtures("added")
def test_an_added_quantity_can_be_asked_for_and_left_out():
    _, logged, _ = measured(quantities=["relative_update"])
    assert {key.split("/")[0] for key in logged} == {"relative_update", "normdyn"}
    history, logged, _ = measured(quantities=["weight_norm"])
    assert not any("relative_update" in key for key in logged)
    assert "relative_update/net.0.weight" in history[0]
    with pytest.raises(ValueError, match="relative_update"):
        NormDynamicsMonitor(quantities=["relative_updat"])


@pytest.mark.usefixtures("added")
def test_a_quantity_that_is_measured_only_by_name_is_silent_else(monkeypatch):
    from dataclasses import replace

    by_name = replace(RELATIVE_UPDATE, measured="by name")
    monkeypatch.setitem(QUANTITIES, "relative_update", by_name)
    history, _, _ = measured()
    assert not any("relative_update" in key for key in history.keys())  # noqa: SIM118
    history, _, _ = measured(quantities=["relative_update"])
    assert "relative_update/net.0.weight" in history[0]


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_an_added_quantity_has_its_pictures_charts_and_labels(tmp_path):
    pytest.importorskip("matplotlib")
    history, _, _ = measured()
    _, ax = plot_effective_lr(history, quantity="relative_update")
    assert ax.get_title() == "Relative update"
    assert ax.get_ylabel() == "‖Δ‖/‖w‖  (per step)"
    assert shared_limits([history], "relative_update") is not None
    _, panels = plot_overview(history)
    assert "Relative update" in {panel.get_title() for panel in panels}

    asked = [quantity.name for quantity in monitored()]
    outcome = Outcome(history, [], asked)
    assert {"relative_update", "heat_map_relative_update"} <= outcome.pictures.keys()
    assert "relative_update" in outcome.shown_in("chart")
    # A report draws every quantity that was recorded.
    few, _, _ = measured(quantities=["relative_update"])
    page = write_report({"one": few, "two": few}, tmp_path / "report.html", still=True).read_text()
    for alt in (
        "relative_update of one",
        "relative_update of one, layer by step",
        "relative_update of one, two",
    ):
        assert f'alt="{alt}"' in page


@pytest.mark.usefixtures("added")
@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_an_added_quantity_has_a_panel_in_the_workspace():
    pytest.importorskip("wandb_workspaces")
    spec = json.loads(wandb_workspace("team", "normdyn")._to_model().model_dump_json(by_alias=True))
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    every = [panel for section in sections for panel in section["panels"]]
    panels = [panel["config"] for panel in every if "Line Plot" in panel["viewType"]]
    for key in ("relative_update/net.0.weight", "normdyn/relative_update"):
        (panel,) = (panel for panel in panels if re.search(panel["metricRegex"], key))
        assert panel["chartTitle"] == "Relative update"
        assert panel["yAxisTitle"] == "‖Δ‖/‖w‖  (per step)"
        assert panel["yLogScale"] is True


@pytest.mark.usefixtures("added")
def test_an_added_quantity_stands_in_the_documentations_table():
    row = f"| `relative_update` | {RELATIVE_UPDATE.meaning} | per step |"
    assert row in markdown_table().splitlines()


def test_no_other_file_holds_a_list_of_quantities():
    """Names that no rule needs to know: a file that spells them keeps a list of its own."""
    only_logged = ("effective_step_size", "gradient_cosine", "radial_update")
    for path in PACKAGE.rglob("*.py"):
        if path.name == "quantities.py":
            continue
        text = path.read_text(encoding="utf-8")
        spelled = [name for name in only_logged if f'"{name}"' in text]
        # functional.py exports the formulas under the same names.
        assert not spelled or path.name == "functional.py", f"{path} spells {spelled}"


def test_every_entry_is_complete():
    for name, quantity in QUANTITIES.items():
        assert name == quantity.name
        assert quantity.title
        assert quantity.meaning
        assert quantity.symbol
        assert not quantity.drawn_with or quantity.drawn_with in QUANTITIES
        made_from = (quantity.formula, quantity.prediction, quantity.expectation)
        is_made = any(made is not None for made in made_from) or quantity.of_matrix
        assert is_made is (quantity in monitored())


def test_places_and_companions_come_in_the_tables_order():
    assert shown_in("map") == ["expected_ratio", "effective_lr", "direction_lr", "balance_ratio"]
    assert drawn_with("weight_norm") == ["weight_norm", "expected_weight_norm"]
    assert drawn_with("angular_update") == [
        "angular_update",
        "expected_angular_update",
        "equilibrium_angular_update",
    ]


@pytest.mark.parametrize(
    ("names", "standardized", "shrunk", "present", "absent"),
    [
        (None, False, False, "weight_norm", "weight_std"),
        (None, True, False, "weight_std", "equivalent_weight_decay"),
        (None, False, True, "equivalent_weight_decay", "weight_std"),
        (["weight_std"], False, False, "weight_std", "equivalent_weight_decay"),
        (["equivalent_weight_decay", "weight_norm"], False, False, "weight_norm", "equivalent_weight_decay"),
        (["equilibrium_ratio", "angular_update"], False, False, "angular_update", "equilibrium_ratio"),
    ],
)  # fmt: skip
def test_what_is_measured(names, standardized, shrunk, present, absent):
    chosen = to_measure(names, standardized=standardized, shrunk=shrunk)
    assert present in chosen
    assert absent not in chosen


def test_the_average_is_what_the_entry_says():
    assert RELATIVE_UPDATE.mean(18.0, 2) == 3.0
    assert QUANTITIES["radial_update"].mean(-18.0, 2) == -9.0


def test_loggers_get_five_of_each_weight_and_the_rest_by_name():
    every = [quantity.name for quantity in monitored()]
    row = {f"{name}/{weight}": 1.0 for name in every for weight in ("a", "b")}
    row |= {f"normdyn/{name}": 1.0 for name in (*every, "skipped_steps")}
    row |= {"balance_ratio/c": 1.0, "norm_drift/c": 1.0, "weight_norm/c": 1.0}
    del row["expected_ratio/b"]  # not scale-invariant
    five = ["angular_update", "effective_lr", "direction_lr", "weight_norm"]
    expected = {f"{name}/a" for name in (*five, "expected_ratio")}
    expected |= {f"{name}/b" for name in (*five, "balance_ratio")}
    expected |= {f"normdyn/{name}" for name in (*every, "skipped_steps")}
    of_c = {"weight_norm/c", "balance_ratio/c"}
    assert for_loggers(row, None).keys() == expected | of_c
    of_c = {"weight_norm/c", "norm_drift/c"}
    assert for_loggers(row, None, unbalanced={"c"}).keys() == expected | of_c
    assert for_loggers(row, ["coherence"]).keys() == {
        "coherence/a",
        "coherence/b",
        "normdyn/coherence",
        "normdyn/skipped_steps",
    }


def test_each_kind_of_steps_has_one_learning_rate():
    kinds = [quantity.steps for quantity in QUANTITIES.values() if quantity.steps]
    assert sorted(kinds) == ["normalized", "proportional"]
    assert rate_followed(proportional=True) == "direction_lr"
