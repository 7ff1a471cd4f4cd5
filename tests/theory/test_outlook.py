"""Words and alarms: what is said of a curve, and how long a vector without gradient has left,
against the optimizers themselves."""

import math
from typing import Any

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


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((1e-5, 100.0, 1.1), {}, "settled"),
        ((9e-4, 100.0, 1.32), {}, "settled"),
        ((0.0, 100.0, 1.7), {}, "settled, 1.7x the prediction (above)"),
        ((0.0, 100.0, 0.5), {}, "settled, 0.5x the prediction (below)"),
        ((0.0, 100.0, 1.0, 0.2), {}, "schedule faster than relaxation"),
        ((0.0, math.inf, 1.0), {}, "schedule faster than relaxation"),
        ((0.0, None, None), {}, "no prediction"),
        ((None, 100.0, 1.0), {}, "no prediction"),
        ((math.nan, 100.0, 1.0), {}, "no prediction"),
        ((0.0, 100.0, math.nan), {}, "no prediction"),
        ((0.0, None, None), {"angular_update": 0.0}, "frozen"),
        ((0.0, 100.0, 0.0), {}, "frozen"),
        ((-1e-3, 100.0, 1e-6), {"angular_update": 3e-8}, "collapsing"),
        (
            (-5e-3, 100.0, 1e-4),
            {"angular_update": 1e-6},
            "approaching, about 1 980 steps left",
        ),  # far above: the decay has to bring it down
    ],
)
def test_verdicts(arguments: tuple[Any, ...], options: dict[str, Any], says: str) -> None:
    assert verdicts.reading(*arguments, **options) == says


@pytest.mark.parametrize("start", [0.5, 0.8, 1.3, 2.0])
def test_steps_left_are_those_of_the_transient(start: float) -> None:
    relaxation, power = 400.0, 4

    def drift(step: float) -> float:
        norms = [
            eq.norm_transient(s, start, 1.0, relaxation, power) for s in (step - 0.5, step + 0.5)
        ]
        return 2 * math.log(norms[1] / norms[0])

    text = verdicts.reading(
        drift(0.5), relaxation, eq.norm_transient(0.5, start, 1.0, relaxation) ** -2
    )
    assert text.startswith("approaching, about ")
    left = float(
        text.removeprefix("approaching, about ").removesuffix(" steps left").replace(" ", "")
    )
    assert abs(drift(left)) * relaxation == pytest.approx(0.1, rel=0.02)
