"""Forecasts of underflow and overflow, against closed forms and against what was measured."""

from __future__ import annotations

from math import log

import pytest
import torch

from lightning_normdyn.engine.effect import Effects, Rescaling, Shrink
from lightning_normdyn.monitor.forecasts import (
    least_of,
    log_smallest,
    steps_to_collapse,
    steps_until_overflow,
    urgency,
)

SGD = torch.optim.SGD


ADAM = torch.optim.Adam


NOTHING = Effects()


def test_the_smallest_of_several_comes_from_a_sum() -> None:
    left = torch.tensor([31.0, 49.0, 40.0, 33.0], dtype=torch.float64)
    assert least_of(urgency(left).sum().item()) == pytest.approx(31, rel=0.01)
    assert least_of(urgency(left.float()).sum().item(), torch.float32) == pytest.approx(
        31, rel=0.05
    )
    assert least_of(
        urgency(torch.full((10,), 52.0, dtype=torch.float64)).sum().item()
    ) == pytest.approx(52, rel=0.05)
    assert least_of(
        urgency(torch.tensor([-float("inf"), 3.0], dtype=torch.float64)).sum().item()
    ) == pytest.approx(1)


def test_steps_to_collapse() -> None:
    left = log(0.17) - log_smallest(torch.float32)
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 1e-2}
    # Measured: the first look at a variance of 0, every 10 steps.
    assert steps_to_collapse(SGD, group, NOTHING, left, 1.0) == pytest.approx(4490, abs=10)
    assert steps_to_collapse(
        SGD, {**group, "weight_decay": 1e-3}, NOTHING, left, 1.0
    ) == pytest.approx(49650, rel=0.003)
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    assert steps_to_collapse(ADAM, adam, NOTHING, 48.0, 0.016) == pytest.approx(3000)
    assert steps_to_collapse(
        SGD, group, Effects(shrink=Shrink(0.1, "norm", True)), left, 0.01
    ) == float("inf")
    # AWS fades with the length, a decay that is kept beside it does not.
    kept = Effects(shrink=Shrink(0.1, "norm", False))
    assert steps_to_collapse(SGD, group, kept, left, 1.0) == steps_to_collapse(
        SGD, group, NOTHING, left, 1.0
    )
    assert steps_to_collapse(SGD, {**group, "weight_decay": 0}, kept, left, 1.0) == float("inf")
    later, over = (
        Effects(rescaling=Rescaling(2, 1.0, True, window)) for window in ("later", "over")
    )
    assert steps_to_collapse(SGD, group, later, left, 0.01) == float("inf")
    assert steps_to_collapse(SGD, group, Effects(underived=("MyRule",)), left, 0.01) == float("inf")
    assert steps_to_collapse(SGD, group, over, left, 1.0) == steps_to_collapse(
        SGD, group, NOTHING, left, 1.0
    )
    assert log_smallest(torch.bfloat16) == log_smallest(torch.float32) > log_smallest(torch.float64)


def test_what_counts_as_running_away() -> None:
    steps = [0, 50, 60, 70, 80]
    assert steps_until_overflow(
        steps, [1.0, *(1e5 * 2.0 ** (i / 10) for i in (0, 10, 20, 30))]
    ) == pytest.approx(10 * (log(1.84e19) - log(8e5)) / log(2), rel=0.01)
    assert steps_until_overflow(steps, [1.0, 1e5, 2e5, 2.2e5, 2.21e5]) == float(
        "inf"
    )  # slowing down
    assert steps_until_overflow(steps, [1.0, 1e5, 1e5, 1e5, 1e5]) == float("inf")
    assert steps_until_overflow(steps[:3], [1.0, 1e5, 2e5]) == float("inf")
    assert steps_until_overflow(steps, [1.0, 1e5, 2e5, 4e5, float("inf")]) == float("inf")
    assert steps_until_overflow(steps, [0.0, 1e5, 2e5, 4e5, 8e5]) == float("inf")
