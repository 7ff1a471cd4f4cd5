"""A schedule stepped dry is the schedule."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_normdyn.theory.schedule import dry_schedule


def optimizer_of(kind: type = torch.optim.SGD, **hyper: Any) -> Any:
    parameters = [{"params": [nn.Parameter(torch.ones(2, 3))], "lr": lr} for lr in (0.1, 0.4)]
    return kind(parameters, lr=0.1, **hyper)


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.6], total_steps=11),
    "in sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.StepLR(o, 3)], [4]
    ),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_stepped_dry_is_the_schedule(name: str, every: int) -> None:
    optimizer = optimizer_of(momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    schedules = dry_schedule(optimizer, scheduler, 10, every_n_steps=every)
    assert str((optimizer.state_dict(), scheduler.state_dict())) == str(before)
    assert not any(schedule.is_assumed for schedule in schedules)
    for step in range(10):
        for schedule, group in zip(schedules, optimizer.param_groups, strict=True):
            expected = {key: value for key, value in group.items() if key != "params"}
            assert schedule.groups[step] == expected
        optimizer.step()
        if (step + 1) % every == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()


class NoCopies:
    """A scheduler that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError

    def step(self) -> None: ...


@pytest.mark.parametrize(
    "make", [lr_scheduler.ReduceLROnPlateau, lambda optimizer: NoCopies(), lambda optimizer: 3]
)
def test_rates_are_assumed_to_stay_where_a_scheduler_cannot_be_stepped_dry(make: Any) -> None:
    optimizer = optimizer_of()
    for schedule, lr in zip(dry_schedule(optimizer, make(optimizer), 4), (0.1, 0.4), strict=True):
        assert schedule.is_assumed
        assert schedule.rates == [lr] * 4


def test_without_a_scheduler_the_rate_stays_and_nothing_is_assumed() -> None:
    schedule, _ = dry_schedule(optimizer_of(), None, 3)
    assert schedule.rates == [0.1] * 3
    assert not schedule.is_assumed
