"""Expectations of many weights are those of each, over a checkpoint too."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.monitor.expectations import (
    STATE,
    Expectation,
    ExpectationTable,
    expectations_from,
    state_of,
)
from lightning_normdyn.optimizers.rate_drop import Rate


def expectation(number=4, ww=1.0, effects="", **numbers):
    course = {
        **{key: [0.5] for key in ("wm", "mm", "moment", "angle", "scale")},
        **{"ww": [ww], "steps": number, "carried": 1.0, "largest_rate": 0.1},
        **{"moment_is_new": False, "in_real_units": False, "rough": False},
    }
    return Expectation(number, course, Rate(0.1), ww, effects, **numbers)


EACH = {
    "a": expectation(ww=1.0, scales=(1.0, 2.0)),
    "later": expectation(number=9, ww=3.0),
    "b": expectation(ww=2.0, silent_until=100, energies=(3.0,)),
    "treated": expectation(effects="Shrink"),
}


@pytest.fixture
def table():
    names = ("a", "later", "new", "b", "treated")
    return ExpectationTable.from_values(names, [EACH.get(name) for name in names])


def test_what_shares_all_other_numbers_lies_together(table):
    assert [lot.weights.tolist() for lot in table.lots] == [[0, 3], [1], [4]]
    assert table.known.tolist() == [True, True, False, True, True]
    for place, name in enumerate(table.names):
        if name in EACH:
            assert table.of(place) == EACH[name]


def test_a_part_of_a_lot_has_the_numbers_of_its_weights(table):
    lot = table.lots[0]
    assert lot.without(np.array([True, True, False, False, False])).course["ww"].tolist() == [2.0]
    assert lot.without(np.array([False, True, True, False, False])) is lot
    assert not len(lot.without(np.array([True, False, False, True, False])).weights)


def test_a_checkpoint_gives_them_back(table):
    known = {name: table.of(place) for place, name in enumerate(table.names) if name in EACH}
    state = state_of(known)
    STATE(state, "it")
    assert expectations_from(state) == EACH
