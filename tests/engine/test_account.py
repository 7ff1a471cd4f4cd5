"""What a callback has done in a fit, counted."""

from __future__ import annotations

import lightning as L
import torch
from cases import targets_of
from lightning.pytorch.plugins import MixedPrecision
from models import (
    fit,
    make,
)

from lightning_normdyn import (
    AdaptiveWeightShrink,
)


def test_counts_survive_targets_that_join():
    class Joins(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.optimizers[0].add_param_group({"params": [pl_module.net[0].weight]})

    def without_first(parameters):
        return torch.optim.SGD([p for p in parameters if tuple(p.shape) != (4, 1, 3, 3)], lr=0.1)

    callback = AdaptiveWeightShrink(1e6)
    fit(make(make_optimizer=without_first), [callback, Joins()])
    assert targets_of(callback) == ["net.3.weight", "net.0.weight"]
    assert callback.plans[0].counters["clamped"].tolist() == [8.0] * 6 + [3.0] * 4


def test_the_only_step_of_a_fused_optimizer_counts_before_a_callback_says_what_it_did():
    """Whether it was skipped is still on its way when the fit ends."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module = make(
        make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, fused=True),
        dtype=torch.float32,
    )
    callback = AdaptiveWeightShrink(0.5)
    fit(module, [callback], max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.steps_of(0) == 1
