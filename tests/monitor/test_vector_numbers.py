"""Numbers of each vector, worked out in one formula or by torch alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import fit
from walk import Walk, batches, noise, start

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor import measure
from lightning_normdyn.monitor.vector_numbers import (
    DEAD_AFTER,
    Idle,
    collapsed,
    kept_by_name,
    values_of,
)


def sums_of_idle(radial: float):
    """Of two vectors, the second without a gradient, which shorten by a share of themselves."""
    one = torch.ones(2, dtype=torch.float64)
    gg = torch.tensor([1.0, 0.0], dtype=torch.float64)
    plain = torch.zeros(2, dtype=torch.bool)
    sums = one, one, 0 * one, gg, one, radial * one, radial**2 * one
    return measure.StepSums(*sums, None, one, None, one * torch.nan, plain)


def test_a_vector_is_dead_after_enough_steps_without_a_gradient():
    idle = Idle(torch.zeros(2, dtype=torch.float64), torch.full((2,), -50.0, dtype=torch.float64))
    for look in range(4):
        values, steps = values_of(["weight_norm"], sums_of_idle(-1e-3), 25, idle)
        idle.steps.copy_(steps)
        dead = values[3]
        assert dead.tolist() == [0, float(25 * (look + 1) >= DEAD_AFTER)]
    values, _ = values_of([], sums_of_idle(+1e-3), 25, idle)
    assert values[2].tolist() == [0, 0]  # it grows: something trains it


def test_collapsed_vectors_are_far_shorter_than_the_mean_of_their_weight():
    size = torch.tensor([1.0, 1e-4, 1e-4, 1e-4], dtype=torch.float64)
    means, weight_of = torch.tensor([0.5, 1e-4]), torch.tensor([0, 0, 1, 1])
    assert collapsed(size, means, weight_of, 1e-3, None)[0].tolist() == [0, 1, 0, 0]
    active = torch.tensor([True, False, True, True])
    assert not collapsed(size, means, weight_of, 1e-3, active)[0].any()


@pytest.mark.parametrize("rules", [[], [AdaptiveWeightShrink(0.1)]], ids=["alone", "shrunk"])
def test_one_formula_tells_the_same_as_torch_alone(monkeypatch, rules):
    """Beside vectors of length zero, and one that is not finite."""
    histories = []
    for at_once in (False, True):
        monkeypatch.setattr(measure, "fuses_formulas", lambda _, answer=at_once: answer)
        weight = start((6, 5))
        weight[2], weight[3] = 0.0, 1e308
        monitor = NormDynamicsMonitor(1, tables=False)
        with pytest.warns(NormDynWarning, match="not finite"):
            fit(
                Walk(weight, lambda p: torch.optim.AdamW(p, lr=1e-3)),
                [*rules, monitor],
                batches(noise(3, (6, 5))),
                max_epochs=1,
            )
        histories.append(monitor.history)
    assert len(histories[0]) == 3
    for mine, theirs in zip(*histories, strict=True):
        assert mine.keys() == theirs.keys()
        numbers = [torch.tensor([float(v) for v in row.values()]) for row in (mine, theirs)]
        torch.testing.assert_close(*numbers, rtol=1e-12, atol=0, equal_nan=True)


def test_what_is_kept_of_each_vector_comes_by_weight():
    targets = [
        SimpleNamespace(
            name=name, weight=torch.zeros(n, 3, dtype=dtype), partition=SimpleNamespace(n=n)
        )
        for name, n, dtype in (("a", 2, torch.float32), ("b", 1, torch.float64))
    ]
    kept = kept_by_name(targets, np.array([1.0, 2.0, 3.0 + 1e-9, 0.1, 0.2, np.nan]))
    assert kept["weight_norm/a"].tolist() == [1, 2]
    assert kept["decay/a"] == pytest.approx([0.1, 0.2])
    assert np.isnan(kept["decay/b"]).all()
    assert all(values.dtype == np.float32 for values in kept.values())
    # Together they are the norm in float64; a weight in float32 has no more digits.
    assert "weight_norm_rest/a" not in kept
    total = kept["weight_norm/b"].astype(np.float64) + kept["weight_norm_rest/b"]
    assert total == pytest.approx([3 + 1e-9], abs=1e-14)
