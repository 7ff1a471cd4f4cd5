"""The WRS paper's figures, from what InputSpanMonitor recorded."""

from __future__ import annotations

import numpy as np
import pytest
from histories import run_of_underscored_layers

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History

pytest.importorskip("matplotlib")


def test_layers_stand_in_one_order_and_keep_their_place_without_a_shape():
    history = History()
    row = {f"input_span_noise/{name}": 0.1 for name in "abc"}
    row |= {f"{quantity}/{name}": 2.0 for quantity in SHAPES for name in "ac"}
    history.append(0, row, optimizer_step=1)
    _, (shape, as_they_are, noise) = plots.plot_input_span(history)
    for panel in (shape, as_they_are):
        np.testing.assert_array_equal(panel.get_lines()[0].get_ydata(), [2, np.nan, 2])
    assert noise.get_lines()[0].get_ydata() == pytest.approx([0.1] * 3)
    assert [label.get_text() for label in noise.get_xticklabels()] == ["a", "b", "c"]


SHAPES = ("ggd_shape_input", "ggd_shape_parameter")


def test_shapes_over_time_are_of_the_middle_layer_unless_one_is_named():
    _, ax = plots.plot_weight_shape(run_of_underscored_layers())
    assert ax.get_title() == "Shape of the weights of _stem1"
    assert [line.get_ydata().tolist() for line in ax.get_lines()[:2]] == [[2.0] * 3] * 2
    _, ax = plots.plot_weight_shape(run_of_underscored_layers(), "_stem2.weight")
    assert ax.get_lines()[0].get_ydata().tolist() == [3.0] * 3


def test_a_histogram_is_a_density_in_units_of_the_reach():
    history = History()
    history.append(0, {f"{quantity}/a.weight": 1.5 for quantity in SHAPES}, optimizer_step=1)
    history.append_vectors(0, {"histogram_parameter/a.weight": np.array([1.0, 2.0, 1.0])})
    for reach, half in ((3.0, 3.0), ("far", 6.0), (-1, 6.0), (1e9, 6.0)):
        history.meta["histogram_reach"] = reach
        _, ax = plots.plot_weight_histogram(history)
        (stairs,) = ax.patches
        values, edges, _ = stairs.get_data()
        assert edges.tolist() == pytest.approx([-half, -half / 3, half / 3, half])
        assert (values * np.diff(edges)).tolist() == [0.25, 0.5, 0.25]


def test_without_a_run_or_room_it_is_said():
    with pytest.raises(NormDynError, match="needs at least one, got none"):
        plots.plot_weight_shape({})
    with pytest.raises(NormDynError, match="3 panels, and `ax` holds 0"):
        plots.plot_input_span(run_of_underscored_layers(), [])
