"""Layer by step: the layer that is off is the row that differs."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn import plots
from lightning_normdyn.monitor.history import History

pytest.importorskip("matplotlib")


def test_heatmap_shows_the_layer_that_is_off():
    history = History()
    for step in range(1000):
        history.append(
            step,
            {f"weight_norm/{name}": 9.0 if name == "c" else 1.0 for name in "abcd"},
            optimizer_step=step,
        )
    _, ax = plots.plot_heatmap(history, quantity="weight_norm")
    cells = ax.collections[0].get_array()
    assert cells.shape == (4, 300)
    assert (cells[2] == 9).all()
    assert (np.delete(cells, 2, axis=0) == 1).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == list("abcd")


def test_heatmap_of_alternating_optimizers_has_no_stripes():
    history = History()
    for step in range(20):
        history.append(
            step, {f"weight_norm/{'b' if step % 2 else 'a'}": float(step + 1)}, optimizer_step=step
        )
    cells = plots.plot_heatmap(history, quantity="weight_norm")[1].collections[0].get_array()
    assert cells[0, :4].tolist() == [1, 1, 3, 3]
    assert cells.mask.sum() == 2  # "b" before its first step, "a" after its last


def test_long_names_of_many_layers_stay_apart_in_a_heat_map():
    names = [
        f"model.transformer.encoder.layers.{i}.attention.self.{part}.weight"
        for i in range(40)
        for part in ("query", "key")
    ]
    history = History()
    history.append(
        0, {f"effective_lr/{name}": 1.0 + i for i, name in enumerate(names)}, optimizer_step=1
    )
    _, ax = plots.plot_heatmap(history)
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert len(shown) > 20
    assert len(set(shown)) == len(shown)
    assert shown[0] == "0.attention.self.query"
