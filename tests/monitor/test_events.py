"""Events are told by kind and step, a drop with its factor, and the callback that acts at it."""

from __future__ import annotations

import pytest

from lightning_normdyn.monitor.events import happenings, steps_by_kind
from lightning_normdyn.monitor.history import History


def run_with_a_drop(factor: float = 10.0) -> History:
    history = History()
    for step in range(0, 60, 10):
        rate = 0.1 if step < 30 else 0.1 / factor
        norm = 2.0 - step / 100
        row = {"effective_lr/a": rate / norm, "weight_norm/a": norm}
        history.append(step, row, optimizer_step=step + 1)
    history.mark(30, "lr_drop")
    return history


@pytest.mark.parametrize(("factor", "label"), [(10.0, "LR ÷ 10"), (2.5, "LR ÷ 2.5")])
def test_a_drop_says_by_how_much(factor, label):
    (drop,) = happenings(run_with_a_drop(factor))
    assert (drop.words, drop.steps, drop.labels) == ("LR drop", [30], [label])


def test_a_drop_of_which_no_curve_tells_is_a_drop():
    silent = History()
    silent.append(0, {"train_loss": 1.0}, optimizer_step=1)
    silent.mark(0, "lr_drop")
    # The rate did not fall where the mark stands, or the rows begin behind it.
    same = run_with_a_drop(1.0)
    early = run_with_a_drop()
    early.mark(0, "lr_drop")
    for history in (silent, same, early):
        assert happenings(history)[0].labels[0] == "LR drop"


def test_the_callback_that_acts_is_named():
    history = run_with_a_drop()
    history.mark(20, "rescale", "a")
    history.mark(40, "of_mine")
    history.meta["callbacks"] = {"LRDropRescaling": {}, "WeightRescaling": {}}
    told = {each.kind: each.words for each in happenings(history)}
    assert told == {
        "lr_drop": "LR drop (LRDropRescaling)",
        "rescale": "rescale (WeightRescaling)",
        "of_mine": "of mine",
    }
    history.meta["callbacks"] = ["anything"]
    assert happenings(history)[0].words == "LR drop"


def test_events_of_one_weight_are_its_own_and_those_about_all():
    history = run_with_a_drop()
    history.mark(20, "rescale", "a")
    history.mark(20, "rescale", "a")
    history.mark(10, "rescale", "b")
    assert steps_by_kind(history) == {"lr_drop": [30], "rescale": [10, 20]}
    assert steps_by_kind(history, "a") == {"lr_drop": [30], "rescale": [20]}
