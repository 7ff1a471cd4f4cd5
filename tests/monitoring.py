"""What several tests of the monitor use: a logger in memory, a network whose optimizers take turns, and
weights after every batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from models import ManualNet, Net, weights_of
from replay import Recorder

from lightning_normdyn import NormDynamicsMonitor


class KeepsRowsWithSteps(Logger):
    """A logger in memory."""

    name, version = "rows", "0"

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def ours(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if "normdyn/weight_norm" in row]


def monitor(every: int | None = 1, **arguments: Any) -> NormDynamicsMonitor:
    return NormDynamicsMonitor(every, tables=False, **arguments)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


class Trajectory(Recorder):
    """The weights after every batch, beside what the optimizers received."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.weights = [self.start]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(weights_of(pl_module))


class Turns(ManualNet):
    """A GAN's way: the first half steps in every batch, ``repeats`` times, the second one in every
    ``n_critic``-th batch."""

    n_critic, offset, repeats = 5, 0, 1

    def training_step(self, batch, batch_idx=0):
        for index, optimizer in enumerate(self.optimizers()):
            turns = self.repeats if index == 0 else int(batch_idx % self.n_critic == self.offset)
            for _ in range(turns):
                loss = Net.training_step(self, batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()


def in_groups(make_optimizer: Any) -> Any:
    """Decay for the standardized weights alone, so that the bias that keeps the filter dead stays
    where it is."""

    def make_it(parameters: Any) -> Any:
        weights, others = [], []
        for p in parameters:
            (weights if p.ndim == 4 else others).append(p)
        return make_optimizer(
            [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 1e-4}]
        )

    return make_it
