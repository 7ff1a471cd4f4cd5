"""plots.py: what is drawn, with 3 and with 160 layers; that it can be read is checked on the
laid-out picture."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots import axes
from lightning_normdyn.monitor.plots.labels import layer_labels

pytest.importorskip("matplotlib")

ALL = [
    plots.plot_effective_lr,
    plots.plot_angular_update,
    plots.plot_heatmap,
    plots.plot_norm_ridge,
    plots.plot_overview,
]


def synthetic(
    layers: int = 3, steps: int = 40, *, predictions: bool = True, seed: int = 0
) -> History:
    """A run whose norms shrink towards an equilibrium; its learning rate drops at 60 %."""
    rng = np.random.default_rng(seed)
    history = History()
    names = [
        f"network.layer{1 + i // 6}.{i % 6 // 2}.conv{1 + i % 2}.weight" for i in range(layers)
    ]
    for step in range(steps):
        lr = 0.1 if step < 0.6 * steps else 0.01
        row = {}
        for i, name in enumerate(names):
            norm = (1 + i / layers) * (0.3 + np.exp(-3 * step / steps))
            row[f"weight_norm/{name}"] = norm
            row[f"effective_lr/{name}"] = lr / norm
            row[f"gradient_cosine/{name}"] = 0.01 * rng.normal()
            row[f"angular_update/{name}"] = np.sqrt(lr * 1e-3) * np.exp(0.1 * rng.normal())
            if predictions:
                row[f"equilibrium_angular_update/{name}"] = np.sqrt(lr * 1e-3)
                row[f"equilibrium_ratio/{name}"] = np.exp(0.1 * rng.normal())
        history.append(10 * step, row, optimizer_step=step + 1)
        history.append_vectors(
            10 * step,
            {
                f"weight_norm/{name}": row[f"weight_norm/{name}"]
                * np.exp(0.1 * rng.normal(size=16))
                for name in names[:2]
            },
        )
        if step % 10 == 0:
            history.mark(10 * step, "rescale")
    history.mark(6 * steps, "lr_drop")
    return history


def rendered(fig):
    fig.canvas.draw()
    return fig.canvas.get_renderer()


def texts(fig):
    """Every visible text of a picture, with its place."""
    from matplotlib.text import Text

    renderer = rendered(fig)
    found = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in found]
    canvas = fig.bbox.padded(0)
    # Ticks beyond the axis limits exist but are not drawn.
    hidden = {
        id(label) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for label in beyond(ax, axis)
    }
    return canvas, [
        (word, box)
        for text, (word, box) in zip(found, boxes, strict=True)
        if id(text) not in hidden
    ]


def beyond(ax, axis):
    low, high = sorted(axis.get_view_interval())
    for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("layers", [1, 3, 8, 9, 160])
@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_no_text_overlaps_or_leaves_the_picture(plot, layers):
    fig, _ = plot(synthetic(layers, steps=20))
    canvas, found = texts(fig)
    assert len(found) > 4
    for word, box in found:
        assert canvas.x0 - 1 <= box.x0, word
        assert box.x1 <= canvas.x1 + 1, word
        assert canvas.y0 - 1 <= box.y0, word
        assert box.y1 <= canvas.y1 + 1, word
    for (one, a), (two, b) in itertools.combinations(found, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1, (
            one,
            two,
        )


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_axes_have_labels_and_short_titles(plot):
    _, axes = plot(synthetic())
    for ax in axes if isinstance(axes, list) else [axes]:
        assert ax.get_xlabel()
        assert len(ax.get_title() or ax.get_title(loc="left")) in range(5, 40)


@pytest.mark.parametrize("plot", ALL[:4], ids=lambda plot: plot.__name__)
def test_given_axes_are_used(plot):
    from matplotlib.figure import Figure

    outer = Figure()
    left, right = outer.subplots(1, 2)
    fig, ax = plot(synthetic(), ax=left)
    assert (fig, ax) == (outer, left)
    assert left.has_data()
    assert not right.has_data()


def test_curves_hold_the_numbers_in_depth_order():
    from matplotlib.colors import to_rgb

    history = synthetic(3)
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
    fig, ax = plots.plot_effective_lr(synthetic(layers))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(fig.axes) == (1 if named else 2)
    assert len(labels) == (layers if named else 0) + 2
    assert labels[-2:] == ["rescale", "LR drop"]
    assert any("conv1" in label for label in labels) == named
    if not named:
        assert "depth" in fig.axes[1].get_ylabel()


@pytest.mark.parametrize("quantity", ["weight_norm", "gradient_cosine", "equilibrium_ratio"])
def test_any_recorded_quantity_can_be_drawn(quantity):
    assert plots.plot_effective_lr(synthetic(), quantity=quantity)[1].get_yscale() == (
        "linear" if quantity == "gradient_cosine" else "log"
    )
    plots.plot_heatmap(synthetic(), quantity=quantity)
    plots.plot_compare({"one": synthetic()}, quantity)


def test_angular_update_draws_the_median_and_its_prediction():
    history = synthetic(5)
    _, ax = plots.plot_angular_update(history)
    lines = {line.get_label(): line for line in ax.get_lines()}
    keys = [key for key in list(history.keys()) if key.startswith("angular_update/")]
    expected = np.median([history.column(key)[1] for key in keys], axis=0)
    np.testing.assert_allclose(lines["median, predicted layers"].get_ydata(), expected, rtol=1e-6)
    assert lines["prediction, median"].get_ydata()[0] == pytest.approx(0.01)
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).y1 == pytest.approx(0.011)
    _, ax = plots.plot_angular_update(synthetic(5, predictions=False))
    assert "median, all layers" in {line.get_label() for line in ax.get_lines()}
    assert "prediction, median" not in {line.get_label() for line in ax.get_lines()}
    assert not ax.collections


def with_heads(kinds: bool, predicted: bool = True, factor: float = 1.0, heads: int = 4) -> History:
    """Three scale-invariant layers that turn by 0.01, as predicted, and more heads that turn by 1:
    the median of all would be a head's."""
    history = History()
    for step in range(20):
        row = {f"angular_update/conv{i}.weight": 0.01 * factor for i in range(3)}
        row |= {f"angular_update/head{i}.weight": 1.0 for i in range(heads)}
        if predicted and step:  # at step 0 the rate was 0, and nothing was predicted
            row |= {f"equilibrium_angular_update/conv{i}.weight": 0.01 for i in range(3)}
        history.append(step, row, optimizer_step=step + 1)
    if kinds:
        names = [*[f"conv{i}.weight" for i in range(3)], *[f"head{i}.weight" for i in range(heads)]]
        history.meta["targets"] = {
            name: {"scale_invariant": "filter" if name.startswith("conv") else "no"}
            for name in names
        }
    return history


@pytest.mark.parametrize("kinds", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
def test_the_median_beside_a_prediction_is_of_the_layers_it_is_about(kinds, predicted):
    _, ax = plots.plot_angular_update(with_heads(kinds, predicted))
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


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_runs_are_compared_by_the_scale_invariant_layers_that_all_of_them_have(kinds):
    one, two = (
        with_heads(kind, predicted=False, factor=f, heads=h)
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
        {"one": with_heads(False, False), "two": with_heads(False, False, heads=9)},
        "angular_update",
    )
    assert ax.get_legend().get_title().get_text() == "median and middle 80 % of 7 layers"
    other = History()
    other.append(0, {"angular_update/x": 0.5, "angular_update/y": 0.5}, optimizer_step=1)
    _, ax = plots.plot_compare({"one": with_heads(True), "two": other}, "angular_update")
    assert ax.get_legend().get_title().get_text() == "median and middle 80 % of each run's layers"
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(0.01)


def named_layers() -> History:
    history = History()
    for step in range(3):
        values = {
            f"{q}/_stem{i}.weight": 1.0 + i
            for i in range(3)
            for q in ("effective_lr", "ggd_shape_input", "ggd_shape_parameter")
        }
        history.append(
            step,
            values | {f"input_span_noise/_stem{i}.weight": 0.1 for i in range(3)},
            optimizer_step=step + 1,
        )
    return history


@pytest.mark.parametrize(
    ("draw", "label"),
    [
        (lambda h: plots.plot_effective_lr(h)[1], "_stem1"),
        (lambda h: plots.plot_compare({"_run": h, "b": h})[1], "_run"),
        (lambda h: plots.plot_input_span({"_run": h, "b": h})[1][2], "_run"),
        (lambda h: plots.plot_weight_shape({"_run": h, "b": h})[1], "_run, input space"),
    ],
    ids=["layers", "runs", "input span", "weight shape"],
)
def test_names_that_begin_with_an_underscore_stand_in_the_legend(draw, label):
    shown = [text.get_text().strip() for text in draw(named_layers()).get_legend().get_texts()]
    assert label in shown


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


def test_ridge_draws_hills_where_the_norms_are():
    history = synthetic()
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
    rendered(fig)


def test_comparison_has_one_colour_per_run_and_says_which():
    runs = {f"run {i}": synthetic(4, seed=i) for i in range(9)}
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


def test_colours_of_runs_stay_apart_for_the_colour_blind():
    from matplotlib.colors import to_rgb

    # Machado, Oliveira and Fernandes (2009), severity 1.
    protan = np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    )
    deutan = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    colours = np.array([to_rgb(colour) for colour in axes.OKABE_ITO])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for seen in (linear @ protan.T, linear @ deutan.T):
        shown = np.clip(seen, 0, 1) ** (1 / 2.2)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(shown, 2)) > 0.1


def test_hostile_names_are_drawn_as_they_stand():
    history = History()
    names = [r"$\frac{$", "a$b", "x\ny\x00", "<script>alert(1)</script>", "y" * 500]
    for step in range(3):
        history.append(
            step, {f"effective_lr/{name}": 1.0 + step for name in names}, optimizer_step=step
        )
        history.append_vectors(step, {f"weight_norm/{names[0]}": np.arange(1, 4) + step})
    history.mark(1, r"$\bad{")
    for fig, _ in (
        plots.plot_effective_lr(history),
        plots.plot_heatmap(history),
        plots.plot_norm_ridge(history),
        plots.plot_compare(dict.fromkeys(names, history)),
        plots.plot_effective_lr(history, quantity="effective_lr"),
    ):
        rendered(fig)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0, float("inf")])
@pytest.mark.parametrize("plot", [plots.plot_effective_lr, plots.plot_heatmap, plots.plot_overview])
def test_one_constant_or_broken_value_is_drawn(plot, value):
    history = History()
    history.append(5, {"effective_lr/a.weight": value}, optimizer_step=1)
    rendered(plot(history)[0])


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_nothing_recorded_is_said(plot):
    with pytest.raises(NormDynError, match="this history has none"):
        plot(History())


def test_what_is_missing_is_answered_with_what_there_is():
    with pytest.raises(
        NormDynError, match=r"`direction_lr` were asked for.* it has angular_update, effective_lr"
    ):
        plots.plot_effective_lr(synthetic(), quantity="direction_lr")
    with pytest.raises(NormDynError, match="at least one run"):
        plots.plot_compare({})
    with pytest.raises(NormDynError, match="4 panels, and `ax` holds 0"):
        plots.plot_overview(synthetic(), ax=[])
    with pytest.raises(NormDynError, match=r"closest: weight_norm/network\.layer1\.0\.conv"):
        plots.plot_norm_ridge(synthetic(), name="network.layer1.0.conv")


def test_drawing_leaves_no_figure_open_in_pyplot():
    from matplotlib import pyplot

    before = pyplot.get_fignums(), pyplot.rcParams.copy()
    for plot in ALL:
        rendered(plot(synthetic())[0])
    assert (pyplot.get_fignums(), pyplot.rcParams.copy()) == before


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["net.0.weight", "net.8.weight"], ["net.0", "net.8"]),
        (["x.weight", "x.weight_v"], ["x", "x.weight_v"]),
        ([f"a.{'b' * 30}.c.weight", f"a.{'b' * 30}.d.weight"], ["c", "d"]),
        (
            [f"{'a' * 30}.weight", f"{'a' * 30}.d.weight"],
            [f"{'a' * 13}…{'a' * 14}", f"{'a' * 13}…{'a' * 12}.d"],
        ),
        (
            [f"x.{i}{'y' * 99}.weight" for i in range(3)],
            [f"{i}{'y' * 12}…{'y' * 14}" for i in range(3)],
        ),
    ],
)
def test_labels_of_long_names_leave_out_what_all_of_them_begin_with(names, labels):
    assert layer_labels(names) == labels


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


def test_one_layer_far_from_160_others_is_seen():
    history = synthetic(160)
    _, ax = plots.plot_angular_update(history)
    assert all((line.get_alpha() or 1.0) >= 0.3 for line in ax.get_lines())


@pytest.mark.parametrize(
    "quantity", ["effective_lr", "angular_update", "equilibrium_ratio", "gradient_cosine"]
)
def test_pictures_side_by_side_share_a_scale(quantity):
    low, high = synthetic(), History()
    for row in synthetic():
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
