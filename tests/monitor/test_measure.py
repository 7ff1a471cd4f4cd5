"""What is counted on the device: vectors that have collapsed, and none that only look so."""

from __future__ import annotations

import pytest
import torch
from models import convnet, fit, make
from monitoring import in_groups
from torch import Tensor
from walk import Walk, batches, noise, start

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.parametrizations import weight_standardization

SGD = torch.optim.SGD


class GuardedWalk(Walk):
    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return (noise * self.weight / (self.weight.norm(dim=1, keepdim=True) + 1e-12)).sum()


def test_collapsed_vectors_are_counted() -> None:
    weight = start((6, 5))
    weight[2] *= 1e-5
    weight[4] = 0.0
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(
        GuardedWalk(weight, lambda p: SGD(p, lr=1e-12)),
        [monitor],
        batches(noise(2, (6, 5))),
        max_epochs=1,
    )
    assert monitor.history[0]["normdyn/collapsed_vectors"] == 2


def test_an_infinite_vector_does_not_make_the_others_look_collapsed() -> None:
    weight = start((6, 5))
    weight[4] = 1e308
    monitor = NormDynamicsMonitor(1, tables=False)
    with pytest.warns(
        NormDynWarning, match="`weight` are not finite at step 0"
    ):  # its square overflows
        fit(
            Walk(weight, lambda p: SGD(p, lr=1e-12)),
            [monitor],
            batches(noise(2, (6, 5))),
            max_epochs=1,
        )
    assert monitor.history[0]["normdyn/collapsed_vectors"] == 0


def test_weight_standardization_of_this_package_is_safe_and_counted() -> None:
    """A guarded standardization gives no NaN; its dead filter is counted as collapsed."""
    module = make(
        net=convnet(),
        make_optimizer=in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)),
        dtype=torch.float32,
    )
    weight_standardization(module.net[3])
    with torch.no_grad():
        module.net[4].bias[1] = -30.0
        module.net[3].parametrizations.weight.original[1] *= 1e-5
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [monitor], max_epochs=2)
    assert monitor.history[-1]["normdyn/collapsed_vectors"] == 1
