"""A schedule stepped dry is the schedule."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_normdyn.theory import schedule as schedules
from lightning_normdyn.theory.schedule import Rows, Schedule, constant_schedule, dry_schedule


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


# --- long runs and strange schedulers


def test_a_long_schedule_keeps_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MOST_ROWS", 4)
    optimizer = optimizer_of(momentum=0.9)
    whole, _ = dry_schedule(optimizer, SCHEDULERS["cosine"](optimizer), 4)
    thinned, _ = dry_schedule(optimizer, SCHEDULERS["cosine"](optimizer), 10)
    assert (thinned.stride, len(thinned.groups)) == (3, 4)
    assert thinned.counts.tolist() == [3, 3, 3, 1]
    assert thinned.starts.tolist() == [0, 3, 6, 9]
    assert thinned.rates[:2] == [whole.rates[0], whole.rates[3]]
    assert constant_schedule({"lr": 0.1}, 10).counts.tolist() == [3, 3, 3, 1]


def test_a_run_that_ended_early_has_its_first_steps_only() -> None:
    schedule = Schedule(tuple({"lr": float(i)} for i in range(4)), stride=3, steps=10)
    assert schedule.first(10) is schedule
    early = schedule.first(5)
    assert (early.rates, early.counts.tolist()) == ([0.0, 1.0], [3, 2])


def test_rows_share_what_does_not_change() -> None:
    rows = Rows()
    for step in range(100):
        rows.append({"params": [], "lr": float(step), "betas": (0.9, 0.99 if step < 50 else 0.95)})
    assert len(rows) == 100
    assert rows[3] == {"lr": 3.0, "betas": (0.9, 0.99)}
    assert [row["betas"][1] for row in rows[49:51]] == [0.99, 0.95]
    assert len({id(settings) for settings in rows._settings}) == 2


class Telling(lr_scheduler.LRScheduler):
    """Prints, warns and draws at every step."""

    def get_lr(self) -> list[float]:
        print("a step")
        warnings.warn("a step", stacklevel=2)
        return [torch.rand(1).item() + random.random() + np.random.rand() for _ in self.base_lrs]


def test_nothing_of_the_process_shows_that_a_scheduler_was_stepped_dry(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    optimizer = optimizer_of()
    scheduler = Telling(optimizer)
    capsys.readouterr()
    recwarn.clear()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    schedule, _ = dry_schedule(optimizer, scheduler, 5)
    assert len(set(schedule.rates)) == 5
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert capsys.readouterr().out == ""
    assert not recwarn.list


class Module:
    """Has the lambda of its scheduler as a method, and must not be copied."""

    def half(self, step: int) -> float:
        return 0.5**step

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError


def test_what_a_scheduler_holds_besides_is_shared() -> None:
    optimizer, module = optimizer_of(), Module()
    scheduler = lr_scheduler.LambdaLR(optimizer, module.half)
    schedule, _ = dry_schedule(optimizer, scheduler, 3, shared=(module,))
    assert schedule.rates == pytest.approx([0.1, 0.05, 0.025])
    assert not schedule.is_assumed


def test_a_group_has_no_options_that_its_optimizer_has_not() -> None:
    optimizer = optimizer_of(torch.optim.AdamW)
    schedule, _ = dry_schedule(optimizer, SCHEDULERS["cosine"](optimizer), 2)
    assert set(schedule.groups[0]) == set(optimizer.param_groups[0]) - {"params"}
