"""What all pictures share: with 3 and with 160 layers they can be read, which is checked on the
laid-out picture; hostile names are text; pyplot is left alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from histories import converging_run, run_of_underscored_layers

from lightning_normdyn import plots
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots import axes
from lightning_normdyn.monitor.plots.axes import fitted, in_legend, layer_labels

pytest.importorskip("matplotlib")


ALL = [
    plots.plot_effective_lr,
    plots.plot_angular_update,
    plots.plot_heatmap,
    plots.plot_norm_ridge,
    plots.plot_overview,
]


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


@pytest.mark.sampled(7)
@pytest.mark.parametrize("layers", [1, 3, 8, 9, 160])
@pytest.mark.parametrize("plot", ALL, ids=lambda plot: plot.__name__)
def test_no_text_overlaps_or_leaves_the_picture(plot, layers):
    fig, _ = plot(converging_run(layers, steps=20))
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
    _, axes = plot(converging_run())
    for ax in axes if isinstance(axes, list) else [axes]:
        assert ax.get_xlabel()
        assert len(ax.get_title() or ax.get_title(loc="left")) in range(5, 40)


@pytest.mark.parametrize("plot", ALL[:4], ids=lambda plot: plot.__name__)
def test_given_axes_are_used(plot):
    from matplotlib.figure import Figure

    outer = Figure()
    left, right = outer.subplots(1, 2)
    fig, ax = plot(converging_run(), ax=left)
    assert (fig, ax) == (outer, left)
    assert left.has_data()
    assert not right.has_data()


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
    shown = [
        text.get_text().strip()
        for text in draw(run_of_underscored_layers()).get_legend().get_texts()
    ]
    assert label in shown


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


@pytest.mark.sampled(4)
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


def test_drawing_leaves_no_figure_open_in_pyplot():
    from matplotlib import pyplot

    before = pyplot.get_fignums(), pyplot.rcParams.copy()
    for plot in ALL:
        rendered(plot(converging_run())[0])
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


def test_texts_are_short_and_drawn_as_they_stand():
    assert fitted("abcdefghij", 10) == "abcdefghij"
    assert fitted("abcdefghijk", 6) == "ab…ijk"
    assert fitted("abcdefghijk", 7) == "ab…hijk"
    assert fitted("a$b\x00", 10) == r"a\$b?"
    assert (in_legend("_run"), in_legend("run")) == (" _run", "run")
