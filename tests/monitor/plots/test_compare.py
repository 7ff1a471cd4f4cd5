"""Several runs in one picture: like is compared with like."""

from __future__ import annotations

import numpy as np
import pytest
from histories import converging_run, run_with_heads

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_runs_are_compared_by_the_scale_invariant_layers_that_all_of_them_have(kinds):
    one, two = (
        run_with_heads(kind, predicted=False, factor=f, heads=h)
        for kind, f, h in zip(kinds, (1.0, 3.0), (4, 9), strict=True)
    )
    two.append(
        20, {"angular_update/conv9.weight": 1.0}, optimizer_step=21
    )  # a layer that only one run has
    _, ax = plots.plot_compare({"one": one, "two": two}, "angular_update")
    middles = [line.get_ydata() for line in ax.get_lines()]
    assert [len(values) for values in middles] == [20, 20]
    assert [values[-1] for values in middles] == pytest.approx([0.01, 0.03])
    assert (
        ax.get_legend().get_title().get_text()
        == "median and middle 80 % of 3 scale-invariant layers"
    )


def test_runs_that_say_nothing_of_their_layers_are_compared_by_those_that_they_share():
    _, ax = plots.plot_compare(
        {"one": run_with_heads(False, False), "two": run_with_heads(False, False, heads=9)},
        "angular_update",
    )
    assert ax.get_legend().get_title().get_text() == "median and middle 80 % of 7 layers"
    other = History()
    other.append(0, {"angular_update/x": 0.5, "angular_update/y": 0.5}, optimizer_step=1)
    _, ax = plots.plot_compare({"one": run_with_heads(True), "two": other}, "angular_update")
    assert ax.get_legend().get_title().get_text() == "median and middle 80 % of each run's layers"
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(0.01)


def test_comparison_has_one_colour_per_run_and_says_which():
    runs = {f"run {i}": converging_run(4, seed=i) for i in range(9)}
    _, ax = plots.plot_compare(runs)
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(styles) == 9
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(runs)


def test_comparison_falls_back_to_the_overview():
    history = History()
    for step in range(3):
        history.append(step, {"normdyn/angular_update": 0.1 + step}, optimizer_step=step)
    _, ax = plots.plot_compare({"run": history}, "angular_update")
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [0.1, 1.1, 2.1], rtol=1e-6)


def test_a_comparison_of_no_runs_is_refused():
    with pytest.raises(NormDynError, match="at least one run"):
        plots.plot_compare({})
