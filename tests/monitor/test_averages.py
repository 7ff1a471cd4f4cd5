"""Averages of all weights at once are those of the table of quantities, one by one."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from lightning_normdyn.monitor.averages import Averages
from lightning_normdyn.monitor.quantities import QUANTITIES
from lightning_normdyn.monitor.vector_numbers import UNLOGGED

NAMES = ["weight_norm", "angular_update", *UNLOGGED]


def test_each_average_is_that_of_its_quantity():
    generator = np.random.default_rng(0)
    totals = generator.random((len(NAMES), 4))
    totals[1, 2] = -1e-20  # rounding, of a sum of squares
    counts = generator.integers(0, 3, (len(NAMES), 4)).astype(np.float64)
    averages = Averages(NAMES, totals, counts)
    for j in range(4):
        expected = {}
        for i, name in enumerate(NAMES):
            if counts[i, j]:
                mean = totals[i, j] / counts[i, j]
                if name in QUANTITIES:
                    mean = QUANTITIES[name].mean(totals[i, j], counts[i, j])
                expected[name] = pytest.approx(mean)
        assert averages.of(j) == expected
        assert averages.are_finite[j]
        assert averages.sums_of(j)["lr"] == (totals[2, j], counts[2, j])
        assert averages.total_of("dead", j) == totals[NAMES.index("dead"), j]


@pytest.mark.parametrize("bad", [inf, nan])
def test_what_is_not_finite_is_told_apart_from_what_is_not_there(bad):
    totals, counts = np.ones((len(NAMES), 3)), np.ones((len(NAMES), 3))
    totals[0, 0] = bad
    counts[1, 1] = 0
    averages = Averages(NAMES, totals, counts)
    assert averages.are_finite == [False, True, True]
    assert "angular_update" not in averages.of(1)
