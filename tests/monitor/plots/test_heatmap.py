"""A map, layer by step: the row that differs is the layer that is off, and it has its name."""

from __future__ import annotations

import numpy as np
import pytest
from histories import expected_run, run_with_faults

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


def test_abnormal_rows_of_160_are_named_in_a_map_and_what_lies_beyond_is_marked():
    _, ax = plots.plot_heatmap(run_with_faults(), quantity="expected_ratio")
    bold = {text.get_text() for text in ax.get_yticklabels() if text.get_fontweight() == "bold"}
    assert bold == {"block40", "block80", "block120"}
    assert 20 < len(ax.get_yticklabels()) < 60
    (mesh,) = ax.collections
    assert mesh.get_clim() == pytest.approx((0.1, 10.0))
    colours = mesh.to_rgba(np.array([0.05, 0.1, 10.0, 20.0]))
    assert not np.allclose(colours[0], colours[1])
    assert not np.allclose(colours[2], colours[3])
    # The bar has a pointed end where something lies, and none where nothing does.
    assert mesh.colorbar.extend == "min"


@pytest.mark.parametrize("quantity", ["expected_ratio", "balance_ratio"])
def test_maps_of_ratios_have_the_same_ends_in_every_run(quantity):
    _, ax = plots.plot_heatmap(expected_run(), quantity=quantity)
    (mesh,) = ax.collections
    assert mesh.get_clim() == pytest.approx((0.1, 10.0))
