"""The curves of a history as tables: which layers, on which steps."""

from __future__ import annotations

import numpy as np
import pytest
from histories import converging_run, run_with_heads

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import (
    as_table,
    curves_of,
    deviations,
    farthest,
    invariant_among,
    invariant_layers,
    late_value,
    over_layers,
    pictured,
    rates_followed,
)
from lightning_normdyn.monitor.history import History


def test_what_is_missing_is_answered_with_what_there_is():
    with pytest.raises(
        NormDynError, match=r"`direction_lr` were asked for.* it has angular_update, effective_lr"
    ):
        curves_of(converging_run(), "direction_lr")
    with pytest.raises(NormDynError, match="no curves of layers at all"):
        curves_of(History(), "effective_lr")


def test_a_table_has_the_steps_of_all_layers_and_gaps_where_one_has_none():
    history = History()
    for step, name in ((0, "a"), (1, "b"), (3, "a")):
        history.append(step, {f"weight_norm/{name}": float(step)}, optimizer_step=step)
    steps, table = as_table(curves_of(history, "weight_norm"))
    assert steps.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(table, [[0, np.nan, 3], [np.nan, 1, np.nan]])


def test_a_step_at_which_no_layer_has_a_value_stays_a_gap_without_a_warning():
    table = np.array([[1.0, np.nan, np.nan], [3.0, np.nan, 5.0]])
    np.testing.assert_array_equal(over_layers(np.nanmedian, table), [2, np.nan, 5])


def test_the_scale_invariant_layers_are_those_that_the_run_says_or_predicts():
    convolutions = [f"conv{i}.weight" for i in range(3)]
    for kinds, predicted in ((True, False), (False, True)):
        assert invariant_layers(run_with_heads(kinds, predicted)) == set(convolutions)
    silent = run_with_heads(kinds=False, predicted=False)
    assert invariant_layers(silent) is None
    assert invariant_among(["a", "b"], silent) == (["a", "b"], "all layers")
    chosen = invariant_among([*convolutions, "head0.weight"], run_with_heads(kinds=True))
    assert chosen == (convolutions, "scale-invariant layers")


def constant(values: dict[str, float], rows: int = 20) -> dict[str, tuple]:
    steps = np.arange(rows)
    return {name: (steps, np.full(rows, value, np.float32)) for name, value in values.items()}


def test_the_late_value_is_a_median_of_what_is_finite():
    assert late_value(np.array([9.0] * 27 + [1.0, 2.0, np.nan], np.float32)) == 1.5
    assert np.isnan(late_value(np.full(3, np.nan, np.float32)))


def test_the_farthest_layers_are_those_far_from_the_median():
    curves = constant({"a": 1.0, "b": 1.0, "c": 1.0, "long": 20.0, "dead": 0.0, "off": 0.1})
    assert farthest(curves, "log", 3) == ["dead", "long", "off"]
    assert deviations(curves, "log")["long"] == pytest.approx(np.log(20))
    # A ratio is held against 1, whatever the others are.
    assert farthest(constant({"a": 3.0, "b": 3.0, "c": 1.0}), "ratio", 2) == ["a", "b"]
    assert farthest(constant({"a": -0.1, "b": 0.1, "c": 0.0, "d": -5.0}), "linear", 1) == ["d"]


def test_layers_without_a_late_value_or_all_alike_are_not_far():
    assert farthest(constant({"a": 1.0, "b": 1.0}), "log", 3) == []
    assert farthest(constant({"a": 1.0, "b": float("nan")}), "log", 3) == []
    assert farthest(constant({"a": 0.0, "b": 0.0}), "linear", 3) == []


def test_of_the_two_learning_rates_pictures_show_what_the_layers_follow():
    history = History()
    values = {f"{name}/{layer}": 1.0 for name in ("direction_lr", "effective_lr") for layer in "ab"}
    history.append(0, {**values, "weight_norm/a": 1.0}, optimizer_step=1)
    assert pictured(history, "curves") == ["effective_lr", "weight_norm"]
    history.meta["targets"] = {"a": {"follows": "direction_lr"}}
    assert pictured(history, "curves") == ["direction_lr", "weight_norm"]
    history.meta["targets"]["b"] = {"follows": "effective_lr"}
    assert rates_followed(history) == ["effective_lr", "direction_lr"]
    # Whoever names one gets it.
    assert pictured(history, "curves", ["effective_lr"]) == ["effective_lr"]
