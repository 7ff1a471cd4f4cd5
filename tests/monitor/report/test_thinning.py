"""Thinned curves keep their ends, their spikes and their gaps."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.monitor.report.thinning import thinned


@pytest.mark.parametrize("count", [5, 21, 100, 1001, 4096])
@pytest.mark.parametrize("most", [4, 20, 99])
def test_no_more_than_asked_for_and_spikes_are_kept(count, most):
    rng = np.random.default_rng(count)
    steps = 10 * np.arange(count)
    values = rng.normal(size=count).astype(np.float32)
    values[count // 3], values[count // 2] = 50.0, -50.0
    few_steps, few = thinned(steps, values, most)
    assert len(few_steps) == len(few) <= max(most, 4)
    assert (few_steps[0], few_steps[-1]) == (0, steps[-1])
    assert (few.max(), few.min()) == (50.0, -50.0)
    assert (np.diff(few_steps) > 0).all()
    np.testing.assert_array_equal(few, values[few_steps // 10])


def test_a_short_curve_stays_as_it_is():
    steps, values = np.arange(9), np.ones(9, np.float32)
    assert thinned(steps, values, 9)[0] is steps


def test_a_stretch_without_a_number_stays_a_gap():
    steps, values = np.arange(1000), np.ones(1000, np.float32)
    values[400:600] = np.nan
    values[700] = np.inf
    few_steps, few = thinned(steps, values, 40)
    inside = (few_steps > 420) & (few_steps < 580)
    assert inside.any()
    assert np.isnan(few[inside]).all()
    assert np.isfinite(few[(few_steps > 600)]).all()
