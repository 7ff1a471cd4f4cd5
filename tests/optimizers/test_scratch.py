"""What may and what may not be copied of an optimizer to try it."""

from __future__ import annotations

import doubles
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_normdyn.optimizers.scratch import CannotTryError, ScratchOptimizer, is_scratch


def plain():
    return doubles.Plain([nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5))])


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (lambda o: nn.Linear(2, 2), "holds a Linear"),
        (lambda o: torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), "holds a SGD"),
        (lambda o: torch.zeros(10_000), "large tensors"),
        (lambda o: [lambda: o], "function around itself"),
    ],
)
def test_what_cannot_be_copied_is_said(held, reason):
    optimizer = plain()
    optimizer.extra = held(optimizer)
    with pytest.raises(CannotTryError, match=reason), ScratchOptimizer.untouched(optimizer):
        ScratchOptimizer(optimizer)


def test_who_listens_to_all_optimizers_hears_no_trial():
    weight, heard = nn.Parameter(torch.randn(5, 7)), []
    wrapping, plainly = doubles.LoggingSGD([weight], lr=0.1), doubles.Plain([weight])
    torch.optim.SGD(
        [weight], lr=0.1
    )  # from its first instance on, torch calls hooks around the step that LoggingSGD wraps
    handle = register_optimizer_step_pre_hook(lambda *_: heard.append(1))
    try:
        with pytest.raises(CannotTryError, match="listens"), ScratchOptimizer.untouched(wrapping):
            pass
        with ScratchOptimizer.untouched(plainly):
            scratch = ScratchOptimizer(plainly)
            scratch.set_gradients(0)
            scratch.step()
    finally:
        handle.remove()
    assert not heard
    assert is_scratch(scratch.optimizer)
    assert not is_scratch(plainly)


def test_a_learning_rate_keeps_its_form():
    optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.randn(5, 7))], lr=torch.tensor(0.1, dtype=torch.float64)
    )
    scratch = ScratchOptimizer(optimizer, lr=0.02)
    assert scratch.groups[0]["lr"].dtype == torch.float64
    assert scratch.groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["lr"] == 0.1
