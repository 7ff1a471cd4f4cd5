"""Which optimizers step when an object does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_normdyn import NotSupportedError, torch_optimizers


def test_torch_optimizers_unwraps():
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    assert torch_optimizers(LightningOptimizer(optimizer)) == [optimizer]
    with pytest.raises(NotSupportedError, match="Wrapper is not a torch optimizer"):
        torch_optimizers(Wrapper(optimizer))  # what it does around the inner step is not known
