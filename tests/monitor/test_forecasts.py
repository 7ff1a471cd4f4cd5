"""The numbers of a forecast are those of the fit: which weights they are of, and what a run has
shown of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import make, trainer
from torch import nn

from lightning_normdyn.monitor.forecasts import line_of, look_ahead, title_of
from lightning_normdyn.monitor.horizon import MOST_STEPS, Horizon
from lightning_normdyn.theory.forecast import GroupWeights, Measured

WEIGHTS = GroupWeights([0.5], [64])


def ahead_of(*optimizers: Any, horizon: Horizon = Horizon(100, 10.0)) -> Any:  # noqa: B008
    runner = trainer()
    runner.strategy.connect(make())
    return look_ahead(optimizers, [], horizon, runner)


def adamw(groups: int = 1, **options: Any) -> Any:
    parameters = [{"params": [nn.Parameter(torch.ones(4, 16))]} for _ in range(groups)]
    return torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def test_param_groups_are_called_by_what_tells_them_apart() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    assert [each.names for each in ahead_of(adamw(), sgd)] == [["AdamW"], ["SGD"]]
    assert [each.names for each in ahead_of(adamw(2), adamw())] == [
        ["AdamW-0 0", "AdamW-0 1"],
        ["AdamW-1"],
    ]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (1234, "forecast for 1,234 optimizer steps"),
        (None, "forecast for one relaxation time, since nobody knows how many steps will come"),
        (MOST_STEPS + 1, "forecast for the first 200,000 of 200,001 optimizer steps"),
    ],
)
def test_the_title_says_how_far_it_looks(steps: int | None, said: str) -> None:
    assert title_of(Horizon(steps, None)) == f"lightning-normdyn: {said}"


def test_a_line_has_the_numbers_of_its_group() -> None:
    (ahead,) = ahead_of(adamw(2, weight_decay=0.3))
    (line,) = line_of(ahead, 1, 7, WEIGHTS)
    assert (line.name, line.weights, line.decay) == ("AdamW 1", 7, 0.3)
    assert (line.forecast.steps, line.steps_per_epoch, line.is_whole) == (100, 10.0, True)
    assert line.forecast.timescale == pytest.approx(1 / 3e-3)
    assert line.forecast.norms.shape == (101, 1)


def test_a_run_that_ended_early_is_forecast_as_far_as_it_went() -> None:
    (ahead,) = ahead_of(adamw())
    measured = Measured([19.0], [3.0])
    (line,) = line_of(ahead, 0, 1, WEIGHTS, measured=measured, steps=30)
    assert line.forecast.steps == 30
    square = 0.25
    for _ in range(30):
        square = (1 - 1e-3) ** 2 * square + 19.0 * 1e-4 * 3.0
    assert line.forecast.norms[-1] == pytest.approx([math.sqrt(square)])


def test_without_a_known_number_of_steps_there_is_no_share_of_a_run() -> None:
    (ahead,) = ahead_of(adamw(), horizon=Horizon(None, None))
    (line,) = line_of(ahead, 0, 1, WEIGHTS)
    assert not line.is_whole
    assert line.forecast.steps == 500


@pytest.mark.parametrize("horizon", [Horizon(0, None), Horizon(100, None)])
def test_no_line_where_nothing_can_be_read_ahead(horizon: Horizon) -> None:
    optimizer = adamw()
    if horizon.steps:
        # As a schedule that writes what is no number.
        optimizer.param_groups[0]["lr"] = math.nan
    (ahead,) = ahead_of(optimizer, horizon=horizon)
    assert line_of(ahead, 0, 1, WEIGHTS) == []
    assert line_of(ahead, 5, 1, WEIGHTS) == []


def test_an_assumed_rate_is_said() -> None:
    (ahead,) = ahead_of(adamw())
    assumed = [schedule.__class__(schedule.groups, is_assumed=True) for schedule in ahead.schedules]
    (line,) = line_of(ahead._replace(schedules=assumed), 0, 1, WEIGHTS)
    assert line.note.startswith("the learning rate is taken to stay")
    (noted,) = line_of(ahead._replace(schedules=assumed), 0, 1, WEIGHTS, note="otherwise")
    assert noted.note == "otherwise"
