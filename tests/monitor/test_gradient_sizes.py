"""Sizes of gradients are averaged until their mean is sure."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from lightning_normdyn.monitor.gradient_sizes import (
    FEWEST_ROWS,
    MOST_ROWS,
    Sizes,
    averages,
)


def averaged(sizes, most):
    (average,) = averages(Sizes.from_values([sizes], MOST_ROWS), most)
    return average


def kept(sizes):
    known = Sizes.from_values([()], MOST_ROWS)
    for size in sizes:
        known = known.with_one_more(np.array([size]))
    return known.of(0)


@pytest.mark.parametrize("unit", [1.0, 1e-200, 1e200])
def test_the_more_they_scatter_the_more_rows_are_taken(unit):
    steady = kept(unit * (1 + 0.02 * (-1) ** i) for i in range(30))
    uneven = kept(unit * (1 + 0.25 * (-1) ** i) for i in range(30))
    falling = kept(unit * 0.9**i for i in range(30))
    bursts = kept(unit * (9.0 if i % 10 == 0 else 0.5) for i in range(30))
    assert averaged(steady, MOST_ROWS) == pytest.approx(fmean(steady[-FEWEST_ROWS:]))
    assert averaged(falling, MOST_ROWS) == pytest.approx(fmean(falling[-FEWEST_ROWS:]))
    # Neighbours are .5 apart, which is .35 for one row, and over the root of 12 rows a tenth.
    assert averaged(uneven, MOST_ROWS) == pytest.approx(fmean(uneven[-12:]))
    # The newest 5 are alike, because the last burst was before them.
    assert averaged(bursts, MOST_ROWS) == pytest.approx(fmean(bursts[-20:]))
    assert averaged(bursts, FEWEST_ROWS) == pytest.approx(fmean(bursts[-5:]))


def test_of_few_rows_all_are_taken():
    assert averaged((3.0,), MOST_ROWS) == 3.0
    assert averaged((3.0, 5.0, 1.0), MOST_ROWS) == pytest.approx(3.0)


def test_what_is_no_size_is_left_out_and_old_ones_are_forgotten():
    assert kept([1.0, 0.0, math.inf, math.nan, 2.0]) == (1.0, 2.0)
    assert kept(float(i) for i in range(1, 41)) == tuple(map(float, range(21, 41)))


def test_many_weights_at_once_give_what_each_gives_alone():
    of_weights = [(3.0,), (3.0, 5.0, 1.0), kept(0.9**i for i in range(30)), kept([1.0, 9.0] * 9)]
    together = averages(Sizes.from_values(of_weights, MOST_ROWS), MOST_ROWS)
    assert together.tolist() == [averaged(sizes, MOST_ROWS) for sizes in of_weights]


def test_means_and_new_sizes_are_of_each_weight_by_itself():
    sizes = Sizes.from_values([(1.0, 2.0), (), (4.0,)], most=3)
    more = sizes.with_one_more(np.array([3.0, math.nan, 0.0]))
    assert [more.of(place) for place in range(3)] == [(1.0, 2.0, 3.0), (), (4.0,)]
    assert more.means()[[0, 2]].tolist() == [2.0, 4.0]
    assert math.isnan(more.means()[1])
    later = more.with_one_more(np.array([5.0, 6.0, 7.0]))
    assert [later.of(place) for place in range(3)] == [(2.0, 3.0, 5.0), (6.0,), (4.0, 7.0)]
