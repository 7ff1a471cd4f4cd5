"""ledger.py: what a row changes is changed at once, comes back from a checkpoint as it was, and can
be taken back."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.balance import BalanceWindow, Point
from lightning_normdyn.monitor.expectations import Expectation
from lightning_normdyn.monitor.ledger import Ledger, Row
from lightning_normdyn.monitor.measured_balance import Balance
from lightning_normdyn.monitor.norm_table import Norms
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.pulls import End
from lightning_normdyn.monitor.verdicts import Course
from lightning_normdyn.optimizers.rate_drop import Rate

COURSE = {
    **{key: [1.0] for key in ("ww", "wm", "mm", "moment", "angle", "scale")},
    **{"steps": 4, "carried": 1.0, "largest_rate": 0.1},
    **{"moment_is_new": False, "in_real_units": False, "rough": False},
}
POINTS = (
    Point(1, 0.0, 1e-4, 1e-3, 0.1),
    Point(4, 0.1, 1e-4, math.nan, 0.1, 3e-4, math.nan, math.nan, 0.3),
)


def filled() -> Ledger:
    ledger = Ledger()
    for step in range(4):
        values = {"weight_norm/a": 1.0 + step, "lr/a": 0.1}
        vectors = {"weight_norm/a": np.ones(3, dtype=np.float32)}
        ledger = ledger.with_row(Row(step, step + 1, values, ("rescale",), vectors))
    course = Course(Prediction(0.01, 500.0, 4.0, 1e-3), 3, 3 / 500, [(3, 1e-3)])
    return replace(
        ledger,
        courses={"a": course},
        expectations={
            "a": Expectation(4, COURSE, Rate(0.1), 1.0, "", scales=(2.0,), energies=(3.0,))
        },
        balances={"a": Balance(BalanceWindow(POINTS), End(4, 0.1, 0.0), 0.5, was_set=True)},
        norms={"a": Norms(1.0, (1.0,), (2.0,))},
        rates={"a": (0.1, 0.1)},
        measured={0: 3},
        counted={0: 4},
        jumped=frozenset({1}),
        events=("lr_drop",),
        promised={"normdyn/angular_update": math.nan},
    )


def test_a_jump_is_remembered_until_the_optimizer_has_a_row():
    ledger = replace(filled(), marked={(0, 0, "rescale"): 2, (0, 1, "rescale"): 1})
    assert ledger.new_jumps({(0, 0, "rescale"): 2}) == {1}
    assert ledger.new_jumps({(0, 0, "rescale"): 3, (2, 5, "rescale"): 1}) == {0, 1, 5}


def read_back(state) -> Ledger:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return Ledger.from_state(torch.load(file, weights_only=True))


def test_a_row_changes_nothing_that_somebody_holds():
    before = filled()
    rows, vectors = list(before.history), before.history.vectors("weight_norm/a")[1].shape
    after = before.with_row(Row(9, 9, {"new": 1.0}, ("x",), {"weight_norm/a": np.ones(5)}))
    assert list(before.history) == rows
    assert before.history.vectors("weight_norm/a")[1].shape == vectors
    assert after.history[-1] == {"step": 9, "optimizer_step": 9, "new": 1.0}
    assert after.history.vectors("weight_norm/a")[1].shape == (1, 5)  # cut into other vectors
    assert after.history.events[-1].kind == "x"


def test_a_checkpoint_gives_back_what_was_there():
    ledger = filled()
    again = read_back(ledger.state())
    assert list(again.history) == list(ledger.history)
    exact = ("last_step", "courses", "expectations", "norms", "rates", "measured", "counted")
    for name in (*exact, "jumped", "events"):
        assert getattr(again, name) == getattr(ledger, name)
    # By text: a NaN equals nothing.
    assert repr(again.balances) == repr(ledger.balances)
    assert math.isnan(again.promised["normdyn/angular_update"])


@pytest.mark.parametrize("amends", [False, True])
def test_a_row_of_the_end_is_there_after_a_checkpoint_and_gone_when_the_run_goes_on(amends):
    before = filled()
    row = Row(3 if amends else 7, 8, {"weight_norm/b": 2.0}, amends=amends)
    ended = before.with_row(row).ending_with(row, before)
    for one in (ended, read_back(ended.state())):
        assert one.history[-1]["weight_norm/b"] == 2.0
        assert one.history[-1]["step"] == row.step
        assert ("weight_norm/a" in one.history[-1]) == amends
        assert list(one.lasting.history) == list(before.history)
        assert list(one.going_on_at(8).history) == list(before.history)


def test_a_loop_that_was_set_back_forgets_what_lies_ahead():
    ledger = filled().going_on_at(2)
    assert [row["step"] for row in ledger.history] == [0, 1]
    assert (ledger.last_step, ledger.measured) == (1, {})
    ledger = filled().with_row(Row(1, 9, {"weight_norm/a": 5.0}))  # not even said before
    assert [row["step"] for row in ledger.history] == [0, 1]
    assert ledger.history[-1]["weight_norm/a"] == 5.0


@pytest.mark.parametrize(
    "damage",
    [
        {"history": None}, {"history": {"header": "{}"}}, {"last_step": math.nan}, {"last_step": 2**60}, {"last_step": True},
        {"elapsed": {"a": [1]}},
        {"norms": {"a": [1.0, 2, 3]}}, {"rates": 3}, {"measured": {0: "x"}}, {"counted": [1]}, {"promised": {"k": "x"}},
        {"predictions": {"a": [1]}}, {"pulls": {"a": torch.ones(3)}}, {"ending": {"step": 3}}, {"events": 3},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(damage):
    with pytest.raises(NormDynError):
        read_back({**filled().state(), **damage})


@pytest.mark.sampled(15)
@pytest.mark.parametrize("of_the_end", [False, True], ids=["row", "row of the end"])
@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("expectations", {"course": {**COURSE, "ww": [1.0, 2.0]}}),
        ("expectations", {"course": {key: COURSE[key] for key in ("ww", "steps")}}),
        ("expectations", {"course": {**COURSE, "steps": 1.5}}),
        ("expectations", {"course": {**COURSE, "rough": 1}}),
        ("expectations", {"course": {**COURSE, "ww": torch.ones(1)}}),
        ("expectations", {"number": -1}),
        ("expectations", {"rate": [0.1]}),
        ("expectations", {"start": math.nan}),
        ("expectations", {"effects": None}),
        ("expectations", {"scales": ["x"]}),
        ("expectations", {"foreign": 1}),
        ("balances", {"points": torch.ones(2, 4, dtype=torch.float64)}),
        ("balances", {"points": torch.tensor(POINTS, dtype=torch.float32)}),
        ("balances", {"points": torch.tensor(POINTS[::-1], dtype=torch.float64)}),
        ("balances", {"points": torch.tensor(POINTS, dtype=torch.float64) * 1.5}),
        ("balances", {"points": torch.full((1, 9), math.nan, dtype=torch.float64)}),
        ("balances", {"points": torch.full((1, 9), -1.0, dtype=torch.float64)}),
        ("balances", {"points": torch.full((1, 9), 1e6, dtype=torch.float64)}),
        ("balances", {"end": [1.0, 2.0]}),
        ("balances", {"end": [math.inf, 0.1, 0.0]}),
        ("balances", {"elapsed": math.inf}),
        ("balances", {"was_set": 0}),
    ],
)
def test_damage_that_would_be_found_in_a_later_step_is_found_at_once(part, damage, of_the_end):
    before = filled()
    row = Row(7, 8, {"weight_norm/b": 2.0})
    state = before.with_row(row).ending_with(row, before).state()
    read_back(state)
    holder = state["ending"] if of_the_end else state
    holder[part] = {"a": {**holder[part]["a"], **damage}}
    with pytest.raises(NormDynError):
        read_back(state)
