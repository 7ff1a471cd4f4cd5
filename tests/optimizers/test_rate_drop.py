"""A drop of the learning rate comes out of the blue; no smooth schedule ever falls that way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from lightning_normdyn.optimizers.rate_drop import Rate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*OneCycleLR.*", "ignore:.*lr_scheduler.step.*:UserWarning"
)


def drops(rates: Sequence[float], min_drop: float = 1.5) -> list[float]:
    """What the rule makes of the rates of successive steps."""
    found, rate = [], Rate(rates[0])
    for lr in rates[1:]:
        k, rate = rate.then(lr, min_drop)
        found.append(k)
    return found


@pytest.mark.parametrize("length", [8, 11, 30, 100, 1000])
def test_no_smooth_schedule_of_any_length_ends_in_a_drop(length: int) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for schedule in (
        lambda o: lr_scheduler.CosineAnnealingLR(o, length),
        lambda o: lr_scheduler.CosineAnnealingLR(o, length, eta_min=1e-7),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 1e-4, length + 1),
        lambda o: lr_scheduler.PolynomialLR(o, length, 0.9),
        lambda o: lr_scheduler.PolynomialLR(o, length, 3.0),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=3 * length),
    ):
        optimizer = SGD([parameter], lr=0.1)
        scheduler = schedule(optimizer)
        rates = []
        for _ in range(length):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert set(drops(rates)) == {1.0}


def test_what_counts_as_a_drop() -> None:
    assert drops([0.1, 0.1, 0.01, 0.01, 0.001]) == pytest.approx([1, 10, 1, 10])
    assert drops([0.1, 0.01, 0.001]) == pytest.approx([10, 10])  # one right after the other
    assert drops([0.15, 0.1]) == pytest.approx([1.5])
    assert drops([0.149, 0.1]) == [1]
    assert drops([0.1, 0.04], min_drop=3) == [1]
    assert drops([0.1, 1.0, 0.1]) == pytest.approx([1, 10])
    assert drops([0.1, 0.0, 0.01]) == [1, 1]
    assert drops([0.1, float("nan"), 0.01, 0.001]) == pytest.approx([1, 1, 10])
    assert drops([float("inf"), 0.1]) == [1]
    assert drops([0.1, 0.0999, 0.0998, 0.00998]) == pytest.approx(
        [1, 1, 10]
    )  # on top of a slow decay
    assert drops([0.1, 0.08, 0.05]) == [1, 1]  # gathering speed
    assert drops([0.1, 0.08, 0.008]) == pytest.approx([1, 10])
