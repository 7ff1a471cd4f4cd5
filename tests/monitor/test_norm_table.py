"""The newest norms and rates of many weights are those of each."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from lightning_normdyn.monitor.norm_table import Norms, NormTable, RateTable


@pytest.mark.parametrize(
    ("before", "rate", "dropped"),
    [
        ((0.1, 0.1), 0.01, True),
        ((0.1,), 0.05, True),
        (None, 0.01, False),  # the first row of a run
        ((0.1, 0.09), 0.01, False),  # a schedule that glides
        ((0.1, 0.1), 0.09, False),
        ((0.1, 0.1), 0.0, False),  # an end at 0 is no drop
        ((0.1, 0.1), nan, False),
    ],
)
def test_only_a_jump_from_a_constant_rate_is_a_drop(before, rate, dropped):
    table = RateTable.from_values(("a",), [before])
    assert table.have_dropped(np.array([rate])).tolist() == [dropped]


def test_two_rates_are_kept_of_each_weight():
    table = RateTable.from_values(("a", "b"), [None, (0.3,)])
    for rate in (0.1, 0.2, 0.4):
        table = table.then(np.array([rate, nan]), np.array([True, False]))
    assert table.of(0) == (0.2, 0.4)
    assert table.of(1) == (0.3,)
    assert RateTable.from_values(("a", "b"), [table.of(0), table.of(1)]).of(0) == (0.2, 0.4)


def test_the_first_norm_and_four_more_are_kept_of_each_weight():
    values = [None, Norms(2.0, (1.0,), (3.0,)), Norms(5.0)]
    table = NormTable.from_values(("new", "known", "absent"), values)
    for step in range(2, 8):
        norms = np.array([10.0 * step, 20.0 * step, nan])
        table = table.seen_at(step, norms, np.array([step > 3, True, False]))
    assert table.of(0) == Norms(40.0, (4.0, 5.0, 6.0, 7.0), (40.0, 50.0, 60.0, 70.0))
    assert table.of(1).first == 2.0
    assert table.of(1).norms == (80.0, 100.0, 120.0, 140.0)
    assert table.of(2) == Norms(5.0)
    again = NormTable.from_values(table.names, [table.of(place) for place in range(3)])
    assert [again.of(place) for place in range(3)] == [table.of(place) for place in range(3)]


def test_who_has_grown_is_found_among_all():
    steps = (1.0, 2.0, 3.0, 4.0)
    values = [
        Norms(1.0, steps, (1.0, 2.0, 3.0, 2e4)),
        Norms(1.0, steps, (1.0, 2.0, 3.0, 4.0)),
        Norms(1.0, steps, (1.0, 2.0, 3.0, inf)),
        Norms(1.0, (1.0,), (2e4,)),
        None,
    ]
    table = NormTable.from_values(tuple("abcde"), values)
    assert table.grown_beyond(1e4).tolist() == [0]
