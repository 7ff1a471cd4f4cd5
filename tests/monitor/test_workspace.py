"""The W&B workspace as it would be sent: what each panel selects, and on which axes."""

from __future__ import annotations

import json
import re
import sys

import pytest

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.quantities import monitored
from lightning_normdyn.monitor.workspace import wandb_workspace

# wandb-workspaces declares its models in the old way of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")

NAMES = ("conv1.weight", "layer1.0.conv1.weight", "blocks.0.attn.qkv.weight")


@pytest.fixture(scope="module")
def spec():
    pytest.importorskip("wandb_workspaces")
    workspace = wandb_workspace("team", "normdyn")
    return json.loads(workspace._to_model().model_dump_json(by_alias=True))


def sections(spec):
    return spec["spec"]["section"]["panelBankConfig"]["sections"]


def panels(spec):
    """Settings of the line plots."""
    every = [panel for section in sections(spec) for panel in section["panels"]]
    return [panel["config"] for panel in every if "Line Plot" in panel["viewType"]]


def test_it_belongs_to_the_project(spec):
    assert (spec["entity"], spec["project"], spec["displayName"]) == (
        "team",
        "normdyn",
        "Weight dynamics",
    )


def test_panels_select_by_pattern_on_the_axis_that_lightning_logs(spec):
    for panel in panels(spec):
        assert panel["useMetricRegex"] is True
        assert panel["metrics"] == []
        assert panel["xAxis"] == "trainer/global_step"
    assert spec["spec"]["section"]["settings"]["xAxis"] == "trainer/global_step"


@pytest.mark.sampled(7)
@pytest.mark.parametrize("quantity", monitored(), ids=lambda quantity: quantity.name)
def test_each_quantity_has_one_panel_with_all_layers(spec, quantity):
    keys = [f"{quantity.name}/{name}" for name in NAMES]
    matching = [
        panel for panel in panels(spec) if any(re.search(panel["metricRegex"], key) for key in keys)
    ]
    assert len(matching) == 1
    assert all(re.search(matching[0]["metricRegex"], key) for key in keys)
    assert matching[0]["yLogScale"] is (quantity.scale != "linear")


def test_the_overview_and_few_charts_come_before_anything_of_a_layer(spec):
    first, glance, *others = sections(spec)
    assert (first["name"], first["isOpen"]) == ("Overview", True)
    assert len(first["panels"]) + len(glance["panels"]) <= 12
    assert all(panel["config"]["metricRegex"].startswith("^normdyn/") for panel in first["panels"])
    # What loggers get by default is open, the rest has no curves in most runs.
    is_open = [section["isOpen"] for section in others]
    assert is_open == sorted(is_open, reverse=True)
    assert is_open.count(True) == sum(quantity.logged for quantity in monitored())


@pytest.mark.parametrize("count", [30, 160])
def test_named_layers_come_in_the_order_of_the_network_with_padded_numbers(count):
    pytest.importorskip("wandb_workspaces")
    layers = [f"layers.{i}.conv.weight" for i in range(count)]
    workspace = wandb_workspace("team", "normdyn", layers=layers)
    spec = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    first, glance, angle, *_ = sections(spec)
    assert len(first["panels"]) + len(glance["panels"]) <= 12
    (panel,) = angle["panels"]
    assert panel["config"]["metrics"][:count] == [f"angular_update/{name}" for name in layers]
    titles = panel["config"]["overrideSeriesTitles"]
    shown = [titles[f"angular_update/{name}"] for name in layers]
    assert shown == sorted(shown)
    assert shown[8] == {30: "09", 160: "009"}[count] + " layers.8.conv.weight"


def test_a_prediction_stands_beside_what_it_predicts(spec):
    for prefix, suffix in (("", "/conv1.weight"), ("normdyn/", "")):
        keys = [
            f"{prefix}{quantity}{suffix}"
            for quantity in ("angular_update", "equilibrium_angular_update")
        ]
        assert [
            panel["chartTitle"]
            for panel in panels(spec)
            if all(re.search(panel["metricRegex"], key) for key in keys)
        ]


def test_no_panel_takes_histograms_or_the_tables_of_charts(spec):
    for key in (
        "weight_norm_histogram/conv1.weight",
        "normdyn_charts/effective_lr_table",
        "normdyn_pictures/effective_lr",
    ):
        assert not [panel for panel in panels(spec) if re.search(panel["metricRegex"], key)]


def test_saving_needs_a_login_and_says_so(monkeypatch, tmp_path):
    pytest.importorskip("wandb_workspaces")
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(wandb.errors.UsageError, match="wandb login"):
        wandb_workspace("team", "normdyn").save()


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(NormDynError, match=r"lightning-normdyn\[workspace\]"):
        wandb_workspace("team", "normdyn")
