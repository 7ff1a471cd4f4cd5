"""A quantity of all layers: curves, angular updates beside their prediction, a map in which the layer
that is off is the row that differs, and the overview."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from histories import converging_run, expected_run, run_with_faults, run_with_heads

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.layers import plot_curves

pytest.importorskip("matplotlib")


def test_curves_hold_the_numbers_in_depth_order():
    from matplotlib.colors import to_rgb

    history = converging_run(3)
    _, ax = plots.plot_effective_lr(history)
    for line, key in zip(
        [line for line in ax.get_lines() if len(line.get_xdata()) > 2],
        history.keys()[1::6],
        strict=True,
    ):
        steps, values = history.column(key)
        assert key.startswith("effective_lr/")
        np.testing.assert_array_equal(line.get_xdata(), steps)
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert ax.get_yscale() == "log"
    brightness = [
        np.dot(to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722]) for line in ax.get_lines()[:3]
    ]
    assert brightness == sorted(brightness)


@pytest.mark.parametrize(("layers", "named"), [(3, True), (8, True), (9, False), (160, False)])
def test_few_layers_are_named_and_many_get_a_colour_bar(layers, named):
    fig, ax = plots.plot_effective_lr(converging_run(layers))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(fig.axes) == (1 if named else 2)
    assert len(labels) == (layers if named else 0) + 2
    assert labels[-2:] == ["rescale", "LR drop"]
    assert any("conv1" in label for label in labels) == named
    if not named:
        assert "depth" in fig.axes[1].get_ylabel()


@pytest.mark.parametrize("quantity", ["weight_norm", "gradient_cosine", "equilibrium_ratio"])
def test_any_recorded_quantity_can_be_drawn(quantity):
    assert plots.plot_effective_lr(converging_run(), quantity=quantity)[1].get_yscale() == (
        "linear" if quantity == "gradient_cosine" else "log"
    )
    plots.plot_heatmap(converging_run(), quantity=quantity)
    plots.plot_compare({"one": converging_run()}, quantity)


def test_angular_update_draws_the_median_and_its_prediction():
    history = converging_run(5)
    _, ax = plots.plot_angular_update(history)
    lines = {line.get_label(): line for line in ax.get_lines()}
    keys = [key for key in list(history.keys()) if key.startswith("angular_update/")]
    expected = np.median([history.column(key)[1] for key in keys], axis=0)
    np.testing.assert_allclose(lines["median, predicted layers"].get_ydata(), expected, rtol=1e-6)
    assert lines["prediction, median"].get_ydata()[0] == pytest.approx(0.01)
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).y1 == pytest.approx(0.011)
    _, ax = plots.plot_angular_update(converging_run(5, predictions=False))
    assert "median, all layers" in {line.get_label() for line in ax.get_lines()}
    assert "prediction, median" not in {line.get_label() for line in ax.get_lines()}
    assert not ax.collections


@pytest.mark.parametrize("kinds", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
def test_the_median_beside_a_prediction_is_of_the_layers_it_is_about(kinds, predicted):
    _, ax = plots.plot_angular_update(run_with_heads(kinds, predicted))
    (median,) = (line for line in ax.get_lines() if str(line.get_label()).startswith("median"))
    known = kinds or predicted
    assert median.get_ydata().tolist() == pytest.approx(
        [0.01 if known else 1.0] * (19 if predicted else 20)
    )
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("other layers" in labels) == known
    assert (("median, all layers" in labels), ("prediction, median" in labels)) == (
        not known,
        predicted,
    )


def test_one_layer_far_from_160_others_is_seen():
    history = converging_run(160)
    _, ax = plots.plot_angular_update(history)
    assert all((line.get_alpha() or 1.0) >= 0.3 for line in ax.get_lines())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "quantity", ["effective_lr", "angular_update", "equilibrium_ratio", "gradient_cosine"]
)
def test_pictures_side_by_side_share_a_scale(quantity):
    low, high = converging_run(), History()
    for row in converging_run():
        values = {key: 8 * value for key, value in row.items() if "/" in key}
        high.append(int(row["step"]), values, optimizer_step=int(row["optimizer_step"]))
    limits = plots.shared_limits([low, high, History()], quantity)
    curves = functools.partial(plots.plot_effective_lr, quantity=quantity)
    draw = plots.plot_angular_update if quantity == "angular_update" else curves
    views = [draw(history, limits=limits)[1].get_ylim() for history in (low, high)]
    assert views[0] == pytest.approx(views[1])
    assert views[0][0] <= limits[0] < limits[1] <= views[0][1]
    assert draw(low)[1].get_ylim() != pytest.approx(views[0])
    colours = [
        plots.plot_heatmap(history, quantity=quantity, limits=limits)[1].collections[0].get_clim()
        for history in (low, high)
    ]
    assert colours[0] == pytest.approx(colours[1])
    assert plots.shared_limits([History()], quantity) is None
    assert plots.shared_limits([], quantity) is None


@pytest.mark.parametrize("layers", [3, 30])
@pytest.mark.parametrize(
    ("quantity", "beside"),
    [("weight_norm", "expected"), ("matrix_angle", "balanced")],
)
def test_what_belongs_to_a_curve_lies_behind_it_as_a_thin_line(quantity, beside, layers):
    _, ax = plots.plot_effective_lr(expected_run(layers), quantity=quantity)
    measured = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    behind = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert len(measured) == len(behind) == (layers - 1 if quantity == "weight_norm" else 1)
    assert [label for label in ax.get_legend_handles_labels()[1] if label == beside] == [beside]
    assert max(line.get_zorder() for line in behind) < min(line.get_zorder() for line in measured)
    shown = {tuple(line.get_color()) for line in measured}
    assert {tuple(line.get_color()) for line in behind} == shown
    low, high = ax.get_ylim()
    for line in behind:
        assert low <= min(line.get_ydata()) <= max(line.get_ydata()) <= high


def test_angular_updates_are_shown_beside_what_is_expected_now():
    _, ax = plots.plot_angular_update(expected_run())
    lines = {line.get_label(): line for line in ax.get_lines()}
    line = lines["expected now, median"]
    assert line.get_ydata() == pytest.approx(np.full(20, 0.01))
    # In a healthy run it lies on the measured median, which must still be seen.
    assert line.is_dashed()


def test_samples_in_a_legend_are_seen_however_faint_the_lines():
    _, ax = plots.plot_angular_update(converging_run(160))
    drawn = min(line.get_alpha() or 1.0 for line in ax.get_lines())
    samples = [handle.get_alpha() or 1.0 for handle in ax.get_legend().legend_handles]
    assert drawn < 0.4 < min(samples)


@pytest.mark.parametrize("quantity", ["angular_update", "weight_norm"])
def test_the_three_most_extreme_layers_are_named_at_their_curves(quantity):
    _, ax = plot_curves(run_with_faults(), quantity)
    assert sorted(text.get_text() for text in ax.texts) == ["block120", "block40", "block80"]


def test_layers_that_lie_on_each_other_have_no_names_at_their_curves():
    history = History()
    history.append(0, {f"weight_norm/{i}": 1.0 for i in range(12)}, optimizer_step=1)
    _, ax = plots.plot_effective_lr(history, quantity="weight_norm")
    assert not ax.texts


def test_names_at_curves_do_not_lie_on_each_other():
    history = History()
    values = {f"weight_norm/{i}": 1.0 for i in range(12)}
    # Three that end at nearly the same height.
    values |= {"weight_norm/0": 50.0, "weight_norm/1": 50.1, "weight_norm/2": 50.2}
    history.append(0, values, optimizer_step=1)
    fig, ax = plots.plot_effective_lr(history, quantity="weight_norm")
    fig.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    for lower, upper in itertools.pairwise(boxes):
        assert upper.y0 >= lower.y0 + 0.7 * lower.height


def test_the_bar_of_depths_has_names_from_the_first_layer_on_top():
    fig, _ = plots.plot_effective_lr(run_with_faults(), quantity="weight_norm")
    bar = fig.axes[1]
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert labels == ["block0", "block40", "block80", "block119", "block159"]
    assert bar.yaxis_inverted()


def test_a_drop_of_the_rate_stands_at_its_line_with_its_factor():
    _, ax = plots.plot_effective_lr(converging_run(3))
    assert "LR ÷ 10" in [text.get_text() for text in ax.texts]


def test_panels_are_what_was_recorded():
    _, axes = plots.plot_overview(converging_run())
    assert [ax.get_title() for ax in axes] == [
        "Angular update",
        "Effective learning rate",
        "Weight norm",
        "Effective learning rate",
    ]
    _, axes = plots.plot_overview(expected_run())
    assert [ax.get_title() for ax in axes] == [
        "Angular update",
        "Effective learning rate",
        "Weight norm",
        "Angle of the whole matrix",
        "Angular update over what is expected now",
        "Angle over its balance",
    ]
    only_norms = History()
    only_norms.append(0, {"weight_norm/a": 1.0}, optimizer_step=1)
    fig, axes = plots.plot_overview(only_norms)
    assert [ax.get_title() for ax in axes] == ["Weight norm"]
    assert len(fig.axes) == 1


def test_too_few_axes_are_refused():
    with pytest.raises(NormDynError, match="4 panels, and `ax` holds 0"):
        plots.plot_overview(converging_run(), ax=[])
