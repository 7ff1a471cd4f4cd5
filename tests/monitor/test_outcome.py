"""What came of a fit: charts of any length and tables of any text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.outcome import Outcome, markdown

pytestmark = pytest.mark.usefixtures("_no_run_left")


def test_charts_are_thinned_to_what_wandb_draws():
    history = History()
    for step in range(400):
        history.append(
            step,
            {f"effective_lr/{i}.weight": 1.0 + step for i in range(160)},
            optimizer_step=step + 1,
        )
    xs, ys, names = Outcome(history, [], ["effective_lr"]).chart("effective_lr")
    assert names == [f"{i}.weight" for i in range(160)]
    assert sum(map(len, xs)) <= 10_000
    for x, y in zip(xs, ys, strict=True):
        assert (x[0], x[-1]) == (0, 399)
        assert y == [1.0 + step for step in x]
        assert max(b - a for a, b in pairwise(x)) <= math.ceil(400 / len(x)) + 1


def test_markdown_escapes_what_would_break_a_row():
    assert markdown(
        [{"weight": "a|b", "norm": 0.12345, "prediction": None, "shape": [3, 4]}]
    ).splitlines() == [
        "| weight | norm | prediction | shape |",
        "| --- | --- | --- | --- |",
        r"| a\|b | 0.123 | – | 3, 4 |",
    ]
    assert markdown([]) == ""
