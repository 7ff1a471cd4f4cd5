"""A small curve as markup of the page: what it holds, and where its edges are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from histories import reported_run, run_with_three_faults

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.report.sparkline import HEIGHT, WIDTH, sparkline


def points(path: str) -> np.ndarray:
    pairs = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)
    return np.array(pairs, dtype=np.float64)


def test_a_curve_lies_within_its_drawing_beside_the_others():
    history = run_with_three_faults()
    names = [f"block{i}.weight" for i in range(12)]
    drawing = sparkline(history, "block3.weight", names)
    for path in (drawing.measured, drawing.expected, drawing.others):
        drawn = points(path)
        assert drawn[0, 0] == 0
        assert drawn[-1, 0] == WIDTH
        assert ((drawn >= 0) & (drawn <= [WIDTH, HEIGHT])).all()
    # It turns more slowly than the others: it lies below them.
    assert (points(drawing.measured)[:, 1] > points(drawing.others)[:, 1]).all()
    assert drawing.drops == [pytest.approx(WIDTH * 180 / 290, abs=0.1)]
    assert (drawing.first, drawing.last) == (0, 290)
    assert float(drawing.top) > float(drawing.bottom) > 0


def test_noise_within_a_decade_looks_like_noise():
    history = History()
    for step in range(20):
        history.append(step, {"angular_update/a": 1.0 + 0.01 * (step % 2)}, optimizer_step=step)
    drawn = points(sparkline(history, "a", ["a"]).measured)
    assert np.ptp(drawn[:, 1]) < 0.02 * HEIGHT


def test_gaps_zeros_and_single_points_are_drawn_as_what_they_are():
    history = History()
    for step, angle in enumerate([1.0, np.nan, 1e-12, 0.0, 1.0]):
        history.append(step, {"angular_update/a": angle}, optimizer_step=step)
    drawing = sparkline(history, "a", [])
    assert drawing.measured.count("M") == 2
    # What is far below everything runs along the lower edge.
    assert points(drawing.measured)[1:3, 1].tolist() == [HEIGHT, HEIGHT]
    assert drawing.others == drawing.expected == ""
    single = reported_run(1, 1)
    assert sparkline(single, "conv0.weight", []).measured.endswith("h0")


def test_what_cannot_be_drawn_is_none():
    history = History()
    history.append(0, {"angular_update/a": 0.0, "weight_norm/b": 1.0}, optimizer_step=1)
    assert sparkline(history, "a", []) is None
    assert sparkline(history, "b", []) is None
