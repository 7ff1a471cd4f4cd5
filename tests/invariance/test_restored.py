"""Forward passes without a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_normdyn.invariance.restored import restored


class Moves(nn.Module):
    """Changes all that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        with torch.no_grad():
            self.fc.weight.add_(random.random() + np.random.rand())
        return self.fc(self.norm(x + torch.rand_like(x)))


@pytest.mark.parametrize("weights", [True, False])
def test_everything_is_put_back_also_after_an_exception(weights):
    module = Moves()
    module.norm.eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    calls, states = module.calls, (random.getstate(), str(np.random.get_state()))
    torch_state = torch.get_rng_state()

    def go() -> None:
        with restored(module, weights=weights):
            module.norm.train()
            module(torch.randn(4, 3))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        go()
    after = module.state_dict()
    changed = [name for name, t in after.items() if not torch.equal(t, before[name])]
    assert changed == ([] if weights else ["fc.weight"])
    assert module.calls is calls
    assert not module.norm.training
    assert (random.getstate(), str(np.random.get_state())) == states
    assert torch.equal(torch.get_rng_state(), torch_state)
