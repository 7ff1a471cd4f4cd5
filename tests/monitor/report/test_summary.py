"""A row per layer says what its curves say, and the monitor's verdict comes first."""

from __future__ import annotations

import pytest
from histories import reported_run

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report.runs import load_run
from lightning_normdyn.monitor.report.summary import COLUMNS, LayerSummary, summaries


def test_a_column_shows_a_field_of_a_row():
    fields = [column.field for column in COLUMNS]
    assert fields == list(LayerSummary._fields)


def test_the_verdict_is_what_the_monitor_said():
    history = reported_run()
    history.meta["targets"] = {
        "conv0.weight": {"verdict": "as expected now (1.0x); settled"},
        "conv1.weight": {"verdict": "-"},
        "conv2.weight": {"verdict": 3},
    }
    layers = summaries("run", history)
    assert [layer.verdict for layer in layers] == [
        "as expected now (1.0x); settled",
        "as predicted",
        "turns too fast: 1.5x what is predicted",
    ]
    assert [layer.is_off for layer in layers] == [False, False, True]


def test_what_is_expected_now_comes_before_the_prediction():
    history = History()
    for step in range(20):
        row = {"angular_update/a": 2.0, "equilibrium_angular_update/a": 4.0}
        # Not of the first half, nor of a weight whose expectation has ended.
        if step >= 10:
            row["expected_angular_update/a"] = 2.0
        history.append(
            step, {**row, "angular_update/b": 1.0, "balance_ratio/b": 1.6}, optimizer_step=step
        )
    invariant, other = summaries("run", history)
    assert (invariant.ratio, invariant.now, invariant.verdict) == (0.5, 1.0, "as expected")
    assert (other.ratio, other.now) == (None, pytest.approx(1.6))
    assert other.is_off
    for step in range(20, 40):
        history.append(step, {"angular_update/a": 2.0}, optimizer_step=step)
    (ended, _) = summaries("run", history)
    assert (ended.ratio, ended.now) == (None, None)


def test_averages_are_of_the_last_tenth_and_of_finite_numbers():
    history = History()
    for step in range(40):
        angle = {37: float("nan"), 38: 3.0, 39: 4.0}.get(step, 1.0)
        row = {"angular_update/a": angle, "effective_lr/a": angle, "weight_norm/a": step + 1.0}
        history.append(step, row, optimizer_step=step)
    (layer,) = summaries("run", history)
    assert layer.effective_lr == pytest.approx((1 + 3 + 4) / 3)
    assert layer.angular_update == pytest.approx(((1 + 9 + 16) / 3) ** 0.5)
    assert (layer.first_norm, layer.last_norm, layer.ratio) == (1.0, 40.0, None)
    assert layer.verdict == "–"


@pytest.mark.parametrize(
    "number",
    [10**4000, -(10**4000), 1.5, "7", None],
    ids=["huge", "negative", "float", "text", "none"],
)
def test_a_number_in_the_notes_of_a_run_that_is_none_is_left_out(number, tmp_path):
    history = reported_run(1, 2)
    history.meta["targets"] = {
        "conv0.weight": {"vectors": number, "scale_invariant": number, "verdict": number}
    }
    (layer,) = summaries("run", load_run(history.save(tmp_path / "run.npz")))
    assert layer.vectors is None


@pytest.mark.parametrize("targets", [[], "text", {"conv0.weight": 3}])
def test_notes_of_any_shape_are_no_obstacle(targets):
    history = reported_run(1)
    history.meta["targets"] = targets
    (layer,) = summaries("run", history)
    assert (layer.kind, layer.vectors) == ("–", None)
