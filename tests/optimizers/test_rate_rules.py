"""The rate that a step really applies, compared with what the step does."""

from __future__ import annotations

import math

import doubles
import numpy as np
import pytest
import torch
from torch import nn

from lightning_normdyn.optimizers.recognition import applied_rate

RATES = {
    "plain": (doubles.Plain, {"lr": 0.1}),
    "numpy": (doubles.Plain, {"lr": np.float32(0.1)}),
    "d·lr": (doubles.Prodigy, {"lr": 0.5}),
    "relative step": (doubles.RelativeStep, {"scale_parameter": False}),
    "relative step, scaled": (doubles.RelativeStep, {}),
    "a warmup of something else": (doubles.WarmsUpSomethingElse, {"weight_decay": 1e-9}),
    "torch's sgd": (torch.optim.SGD, {"lr": 0.1}),
    "torch's adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5}),
    "torch's asgd": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.0, "alpha": 0.75}),
}


@pytest.mark.parametrize("name", RATES)
def test_the_rate_is_what_the_step_multiplies_its_update_by(name):
    kind, options = RATES[name]
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = kind([weight], **options)
    for number in range(5):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 1.0 + number)
        told = float(applied_rate(optimizer, optimizer.param_groups[0], weight))
        optimizer.step()
        update = weight.grad
        if kind is torch.optim.Adagrad:
            update = weight.grad / (optimizer.state[weight]["sum"].sqrt() + 1e-10)
        applied = ((before - weight.detach()) / update).mean()
        assert told == pytest.approx(float(applied), rel=1e-6)


def test_torchs_adafactor_scales_by_the_size_of_the_weight():
    weight = nn.Parameter(torch.full((3, 4), 2.0))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    assert float(applied_rate(optimizer, optimizer.param_groups[0], weight)) == pytest.approx(0.2)
    optimizer.state[weight] = {"step": torch.tensor(399.0)}
    assert float(applied_rate(optimizer, optimizer.param_groups[0], weight)) == pytest.approx(
        2 / math.sqrt(400)
    )


def test_heavyball_warms_up_inside_of_its_step():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = doubles.Plain([weight], lr=0.1, warmup_steps=4, step_count=0)
    group = optimizer.param_groups[0]
    rates = []
    for count in (0, 1, 4, 9):
        group["step_count"] = torch.tensor(count)
        rates.append(applied_rate(optimizer, group, weight))
    assert rates == pytest.approx([0.02, 0.04, 0.1, 0.1])
