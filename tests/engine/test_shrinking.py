"""Factors a little below 1 right before a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import fit, make
from walk import SHAPE, Walk, batches, start

from lightning_normdyn import NormDynCallback, Phase
from lightning_normdyn.engine.shrinking import Shrinker
from lightning_normdyn.engine.worker import Worker, during

SHARE, STEPS = 2.0**-11, 64


class ShrinkingWorker(Worker["Shrinking"]):
    def prepare(self) -> None:
        self.shrinker = Shrinker(self.plan)

    @during(Phase.SHRINK)
    def shrink(self, step: Any) -> None:
        factor = torch.full_like(self.plan.vectors.length, 1 - SHARE)
        self.shrinker.shrink(step, factor)


class Shrinking(NormDynCallback):
    worker = ShrinkingWorker


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_that_rounding_would_swallow_come_to_their_product(dtype: torch.dtype) -> None:
    module = Walk(start(dtype=dtype), lambda p: torch.optim.SGD(p, lr=0.0))
    precision = "bf16-true" if dtype is torch.bfloat16 else "64-true"
    gradients = [torch.zeros(SHAPE, dtype=dtype)] * STEPS
    fit(module, [Shrinking()], batches(gradients), precision=precision, max_epochs=1)
    after, before = module.weight.detach().double().norm(), start(dtype=dtype).double().norm()
    tolerance = 2.0**-8 if dtype is torch.bfloat16 else 1e-12
    assert float(after / before) == pytest.approx((1 - SHARE) ** STEPS, rel=tolerance)


def test_what_is_owed_is_state_of_the_vectors_of_short_weights_only() -> None:
    callbacks = [Shrinking(), Shrinking()]
    fit(make(), [callbacks[0]], max_steps=1)
    module = make(dtype=torch.bfloat16)
    fit(module, [callbacks[1]], precision="bf16-true", max_steps=1)
    kept = [set(callback.state_dict()["per_vector"]) for callback in callbacks]
    assert kept == [set(), {"owed"}]
