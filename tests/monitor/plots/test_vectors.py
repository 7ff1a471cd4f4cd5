"""Single vectors: the spread of their norms over a run, and what the metrics' ``plot`` shows."""

from __future__ import annotations

import numpy as np
import pytest
from histories import converging_run

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.plots import draw_metric

pytest.importorskip("matplotlib")


def test_ridge_draws_hills_where_the_norms_are():
    history = converging_run()
    _, ax = plots.plot_norm_ridge(history, name="network.layer1.0.conv1.weight")
    steps, norms = history.vectors("weight_norm/network.layer1.0.conv1.weight")
    hills = [collection.get_datalim(ax.transData) for collection in ax.collections]
    assert 5 <= len(hills) <= 12
    assert hills[0].y1 == steps[0]
    assert hills[-1].y1 == steps[-1]
    assert hills[0].x0 < norms[0].min() < norms[0].max() < hills[0].x1
    assert hills[-1].x1 < hills[0].x1
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"rescale", "LR drop"}


@pytest.mark.parametrize(
    "norms",
    [np.ones(8), np.eye(8)[0], np.logspace(-3, 3, 8), np.array([1, np.nan, np.inf, 0, 2, 3, 4, 5])],
)
def test_ridge_takes_equal_zero_wide_and_broken_norms(norms):
    history = History()
    for step in range(3):
        history.append_vectors(step, {"weight_norm/conv.weight": norms})
    fig, _ = plots.plot_norm_ridge(history)
    fig.canvas.draw()


def test_an_unknown_weight_is_answered_with_the_closest():
    with pytest.raises(NormDynError, match=r"closest: weight_norm/network\.layer1\.0\.conv"):
        plots.plot_norm_ridge(converging_run(), name="network.layer1.0.conv")


def test_norms_none_of_which_can_be_drawn_are_refused():
    history = History()
    history.append_vectors(0, {"weight_norm/conv.weight": np.array([np.nan, np.inf, 0.0])})
    with pytest.raises(NormDynError, match="no vector with a finite norm above 0"):
        plots.plot_norm_ridge(history)


def test_a_single_value_is_a_dot_per_vector():
    _, ax = draw_metric(np.array([[1.0, 2.0, 3.0]]), "norm", single=True)
    (dots,) = ax.collections
    assert dots.get_offsets().tolist() == [[0, 1], [1, 2], [2, 3]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("weight vector", "norm")


@pytest.mark.parametrize(("vectors", "named"), [(1, 0), (3, 3), (20, 0)])
def test_a_series_is_a_line_per_vector_with_names_for_a_few(vectors, named):
    values = np.arange(5.0 * vectors).reshape(5, vectors)
    _, ax = draw_metric(values, "norm", single=False)
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == values.T.tolist()
    legend = ax.get_legend()
    assert (len(legend.get_texts()) if legend else 0) == named
