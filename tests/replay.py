"""Record what the optimizers of a run received, and run the papers' algorithm (reference.py) on it.

The gradients of a mixed-precision, clipped, accumulated or distributed run cannot be computed a
second time to the last bit. So they are taken from the run itself, as the optimizer got them, and
everything else is done naively: if a callback does what its paper says in that mode, both end at
the same weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import reference
import torch
from models import weights_of
from torch import Tensor


class Recorder(L.Callback):
    """Keeps, for every real step of every optimizer, each weight's gradient and the settings of its
    param group."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = weights_of(pl_module)
        self.names = {p: name for name, p in pl_module.named_parameters()}
        self.optimizers = [type(o) for o in trainer.optimizers]
        self.steps: list[list[dict[str, tuple[Tensor | None, dict[str, Any]]]]] = [
            [] for _ in trainer.optimizers
        ]
        for optimizer, steps in zip(trainer.optimizers, self.steps, strict=True):
            optimizer.register_step_post_hook(partial(self._record, steps))

    def _record(self, steps: list[Any], optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if float(getattr(optimizer, "found_inf", 0.0) or 0.0):
            return  # a fused optimizer skipped this step inside its kernel
        received = {}
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            settings["lr"] = float(settings["lr"])
            sign = -1 if group.get("maximize") else 1
            for p in group["params"]:
                received[self.names[p]] = (
                    None if p.grad is None else sign * p.grad.detach().clone(),
                    settings,
                )
        steps.append(received)


def reference_optimizer(
    kind: type[torch.optim.Optimizer], group: dict[str, Any]
) -> reference.SGD | reference.Adam:
    """The reference's optimizer with the settings of one of torch's param groups."""
    if issubclass(kind, torch.optim.SGD):
        return reference.SGD(
            group["momentum"], group["dampening"], group["nesterov"], group["weight_decay"]
        )
    make = reference.AdamW if issubclass(kind, torch.optim.AdamW) else reference.Adam
    return make(group["betas"], group["eps"], group["weight_decay"])


def replay(recorder: Recorder, targets: list[str], **rules: Any) -> dict[str, Tensor]:
    """The weights after the recorded run under ``rules`` (as `reference.train` takes them), which
    act on ``targets`` only."""
    end = dict(recorder.start)
    for kind, steps in zip(recorder.optimizers, recorder.steps, strict=True):
        for name in {name: None for received in steps for name in received}:
            settings = [received[name][1] for received in steps if name in received]
            rates = [received[name][1]["lr"] if name in received else 0.0 for received in steps]

            def gradients(
                weights: dict[str, Tensor], t: int, name: str = name, steps: Any = steps
            ) -> dict[str, Any]:
                return {name: steps[t][name][0] if name in steps[t] else None}

            end[name] = reference.train(
                {name: end[name]},
                gradients,
                reference_optimizer(kind, settings[0]),
                lr=lambda t, rates=rates: rates[t],
                steps=len(steps),
                targets=[name] if name in targets else [],
                **rules,
            )[-1][name]
    return end
