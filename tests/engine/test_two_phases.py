"""Optimizers in two phases: their step is the inner one's only if weights come back before it and
stay after it. Fits with such optimizers are in tests/optimizers/test_wrappers.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.engine.two_phases import ReturnCheck


def check_of(weight: nn.Parameter) -> ReturnCheck:
    inner = torch.optim.SGD([weight], lr=0.1)
    return ReturnCheck(object(), inner, lambda: [weight], lambda w: "layer.weight")


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


def test_a_way_there_and_back_is_forgiven_its_roundings(weight):
    check = check_of(weight)
    check.begin_batch()
    with torch.no_grad():
        weight.add_(0.1).sub_(0.1)
    assert check.refusal() is None


def test_a_step_that_starts_elsewhere_is_refused(weight):
    check = check_of(weight)
    check.begin_batch()
    with torch.no_grad():
        weight.add_(0.1)
    refusal = check.refusal()
    assert "SGD" in str(refusal)
    assert "`layer.weight`" in str(refusal)
    assert check.refusal() is None  # said once


def test_weights_that_are_moved_on_after_the_step_are_refused(weight):
    check = check_of(weight)
    check.begin_batch()
    assert check.refusal() is None
    with torch.no_grad():
        weight.sub_(0.1)
    check.stepped()
    assert check.has_stepped
    with torch.no_grad():
        weight.sub_(0.1)
    assert check.refusal() is not None


def test_later_steps_cost_nothing(weight):
    check = check_of(weight)
    check.stepped()
    assert check.refusal() is None
    check.begin_batch()
    check.stepped()
    with torch.no_grad():
        weight.add_(1.0)
    assert check.refusal() is None
