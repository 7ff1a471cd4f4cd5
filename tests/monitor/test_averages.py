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
    assert averages.are_finite.all()
    for i, name in enumerate(NAMES):
        assert averages.totals_of(name).tolist() == totals[i].tolist()
        assert averages.counts_of(name).tolist() == counts[i].tolist()
        for j in range(4):
            assert averages.has(name)[j] == bool(counts[i, j])
            expected = -1.0
            if counts[i, j]:
                expected = totals[i, j] / counts[i, j]
                if name in QUANTITIES:
                    expected = QUANTITIES[name].mean(totals[i, j], counts[i, j])
            assert averages.of(name, otherwise=-1.0)[j] == pytest.approx(expected)
    assert averages.sums_of(3)["lr"] == (totals[2, 3], counts[2, 3])


@pytest.mark.parametrize("bad", [inf, nan])
def test_what_is_not_finite_is_told_apart_from_what_is_not_there(bad):
    totals, counts = np.ones((len(NAMES), 3)), np.ones((len(NAMES), 3))
    totals[0, 0] = bad
    counts[1, 1] = 0
    averages = Averages(NAMES, totals, counts)
    assert averages.are_finite.tolist() == [False, True, True]
    assert averages.has("angular_update").tolist() == [True, False, True]


def test_what_was_not_measured_is_of_no_weight():
    averages = Averages(["weight_norm"], np.ones((1, 2)), np.ones((1, 2)))
    assert not averages.has("weight_std").any()
    assert averages.of("weight_std", otherwise=0.0).tolist() == [0.0, 0.0]
