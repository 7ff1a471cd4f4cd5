"""What the metrics' ``plot`` shows."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.plots import draw_metric

pytest.importorskip("matplotlib")


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
