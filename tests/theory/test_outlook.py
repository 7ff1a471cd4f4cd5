"""Words and alarms: what is said of a curve, and how long a vector without gradient has left,
against the optimizers themselves."""

import math

import pytest
import torch
from paper_optimizers import group_of

from lightning_normdyn.theory import equilibrium as eq
from lightning_normdyn.theory import outlook as verdicts

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("hyper", "tolerance"),
    [
        ({"weight_decay": 0.05}, 0.001),
        ({"weight_decay": 0.02, "momentum": 0.9}, 0.01),
        ({"weight_decay": 0.02, "momentum": 0.8, "nesterov": True}, 0.01),
        ({"weight_decay": 0.04, "momentum": 0.8, "dampening": 0.5}, 0.01),
        (
            {"weight_decay": 0.05, "momentum": 0.9},
            0.07,
        ),  # complex roots: the size oscillates below its envelope
    ],
)
def test_a_dead_filter_underflows_when_predicted(hyper: dict[str, float], tolerance: float) -> None:
    rate = verdicts.free_decay_rate(SGD, group_of(SGD, lr=0.1, **hyper))
    weight = torch.full((1,), 0.17, dtype=torch.float64)
    weight.grad = torch.zeros_like(weight)
    optimizer = SGD([weight], lr=0.1, **hyper)
    steps = 0
    while weight.float().square().item() > 0:  # the square of a float32 weight
        optimizer.step()
        steps += 1
    assert steps == pytest.approx(verdicts.steps_to_underflow(0.17, rate), rel=tolerance)


def test_free_decay_of_the_other_optimizers() -> None:
    assert verdicts.free_decay_rate(
        ADAMW, group_of(ADAMW, lr=0.1, weight_decay=0.2)
    ) == pytest.approx(-math.log(0.98))
    assert verdicts.free_decay_rate(ADAM, group_of(ADAM, lr=0.1, weight_decay=0.2)) is None
    assert verdicts.free_decay_rate(
        SGD, group_of(SGD, lr=0.1, momentum=0.9), decay=0.2
    ) == pytest.approx(-math.log(0.98))
    assert verdicts.free_decay_rate(ADAMW, group_of(ADAMW, lr=1.0, weight_decay=1.0)) == math.inf
    assert verdicts.free_decay_rate(SGD, group_of(SGD, lr=1.0, weight_decay=1.0)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_underflow_and_overflow_limits_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    lowest = math.exp(-verdicts.steps_to_underflow(1.0, 1.0, dtype))
    assert torch.tensor(0.999 * lowest, dtype=torch.float64).square().to(dtype) == 0
    assert (
        torch.tensor(1.001 * lowest, dtype=torch.float64).square().to(dtype) > 0
        or dtype == torch.float64
    )  # the square is subnormal there
    highest = math.exp(verdicts.steps_to_overflow(1.0, 1.0, dtype))
    assert torch.tensor(0.99 * highest, dtype=torch.float64).square().to(dtype) < math.inf
    assert torch.tensor(1.01 * highest, dtype=torch.float64).square().to(dtype) == math.inf


def test_what_does_not_shrink_or_grow_never_arrives() -> None:
    assert verdicts.steps_to_underflow(1.0, -0.1) == math.inf
    assert verdicts.steps_to_overflow(1.0, -0.1) == math.inf
    assert verdicts.steps_to_underflow(0.0, 0.1) == 0
    assert verdicts.steps_to_overflow(math.inf, 0.1) == 0
    assert verdicts.e_foldings(10, None) is None


def test_total_decay_says_when_decay_cannot_act() -> None:
    assert verdicts.total_decay(
        SGD, group_of(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4), 1000
    ) == pytest.approx(0.5)
    assert verdicts.total_decay(
        ADAMW, group_of(ADAMW, lr=1e-3, weight_decay=5e-4), 30_000
    ) == pytest.approx(0.015)
    assert verdicts.total_decay(ADAM, group_of(ADAM, lr=1e-3, weight_decay=5e-4), 30_000) is None


@pytest.mark.parametrize("start", [0.5, 0.8, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("power", [2, 4])
def test_steps_to_go_are_those_of_the_transient(start: float, power: int) -> None:
    """Under constant hyperparameters, from the ratio of the angle at the start alone."""
    relaxation = 400.0
    # Steps of a constant size turn by it over the norm; SGD's fall with the norm too.
    ratio = start ** (-power / 2)
    left = verdicts.steps_to_go(ratio, relaxation)
    norm = eq.norm_transient(left, start, 1.0, relaxation, power)
    assert abs(norm**power - 1) == pytest.approx(verdicts.SETTLED, rel=1e-6)


def test_steps_to_go_at_the_ends() -> None:
    assert verdicts.steps_to_go(1.04, 100.0) == 0
    assert verdicts.steps_to_go(0.0, 100.0) == math.inf
    assert verdicts.steps_to_go(2.0, math.inf) == math.inf
    assert math.isnan(verdicts.steps_to_go(math.nan, 100.0))
