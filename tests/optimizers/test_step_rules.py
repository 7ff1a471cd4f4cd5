"""The arithmetic of each rule, against the coefficients that the optimizer's own step applies."""

from __future__ import annotations

import pytest
import torch
from paper_optimizers import group_of
from torch import nn

from lightning_normdyn.optimizers import step_rules

CASES = {
    "plain": (step_rules.sgd, torch.optim.SGD, {}),
    "momentum": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.9}),
    "dampening": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
    "nesterov": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_coefficients_are_those_of_the_step(name):
    """One gradient of 1 among zeros: how far each later step moves the weight is a coefficient."""
    rule, kind, options = CASES[name]
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = kind([weight], lr=1.0, **options)
    moved = []
    # The first step fills the buffer without dampening, so the gradient comes in the second.
    for gradient in (0.0, 1.0, *[0.0] * 300):
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        moved.append(before - weight.item())
    response = rule(group_of(kind, lr=1.0, **options))
    assert (response.newest, response.older) == pytest.approx((moved[1], moved[2]))
    assert response.total == pytest.approx(sum(moved))
    assert response.turn == pytest.approx(sum(c**2 for c in moved))


def test_a_projected_step_grows_the_norm_by_its_length_alone():
    response = step_rules.sgd(group_of(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert response.norm_growth == pytest.approx(100.0)
    assert response.projected().norm_growth == pytest.approx(1 / (1 - 0.9**2))


def test_a_coupled_decay_acts_as_often_as_a_gradient():
    group = group_of(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3)
    assert step_rules.sgd(group).effective_decay == pytest.approx(0.05)
    group = group_of(torch.optim.AdamW, lr=0.1, weight_decay=5e-3)
    assert step_rules.adamw(group).effective_decay == 5e-3


def test_settings_that_nobody_has_derived_have_no_response():
    assert step_rules.adam(group_of(torch.optim.Adam, amsgrad=True)) is None
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "wd_ratio": 0.1}
    assert step_rules.sgdp({**group, "nesterov": True, "dampening": 0.5}) is None
    assert step_rules.sgdp({**group, "nesterov": False, "dampening": 0.5}) is not None
