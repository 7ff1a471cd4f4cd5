"""Every optimizer class that a few packages have, each on a small network for a few steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from trained_by_packages import TRAINER

STEPS, RATE = 5, 1e-2
# Where each package keeps its optimizers.
MODULES = {
    "pytorch_optimizer": "pytorch_optimizer",
    "heavyball": "heavyball",
    "bitsandbytes": "bitsandbytes.optim",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "lion-pytorch": "lion_pytorch",
}


def classes_of(package: str) -> Iterator[tuple[str, type[Optimizer]]]:
    """Its public optimizers by name; one class under two names comes once."""
    module = import_module(MODULES[package])
    if package == "heavyball":
        # Compiling takes a minute per class, and changes no number that is compared here.
        import_module("heavyball.utils").compile_mode = None
    seen = set()
    for name, found in sorted(vars(module).items()):
        if not inspect.isclass(found) or not issubclass(found, Optimizer) or found in seen:
            continue
        # What torch itself brings, and bases without a step, are no optimizers of the package.
        if found.__module__.startswith("torch.") or "Base" in name or name.startswith("_"):
            continue
        seen.add(found)
        yield name, found


class Net(LightningModule):
    """Three layers, two of them in front of a normalization."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], *, second_order: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.LayerNorm(16), nn.ReLU(),
            nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.ReLU(),
            nn.Linear(16, 4, bias=False),
        )  # fmt: skip
        self.make, self.second_order = make, second_order

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return (self.net(batch) - batch[:, :4]).square().mean()

    def backward(self, loss: Any) -> None:
        loss.backward(create_graph=self.second_order)

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.make(self.net)
        # Schedule-free ones want to be told that training begins.
        begin = getattr(optimizer, "train", None)
        if begin is not None:
            begin()
        return optimizer


def fit(make: Callable[[nn.Module], Optimizer], callbacks: list[Any], second_order: bool) -> None:
    """A few steps; the same at every call."""
    torch.manual_seed(0)
    batches = torch.randn(STEPS, 8, 8)
    module = Net(make, second_order=second_order)
    Trainer(**TRAINER, callbacks=callbacks).fit(module, DataLoader(batches, batch_size=None))


def ways_to_make(optimizer_class: type[Optimizer]) -> list[Callable[[nn.Module], Optimizer]]:
    """How an optimizer may want to be constructed, the usual ways first."""

    def with_rate(net: nn.Module) -> Optimizer:
        return optimizer_class(net.parameters(), lr=RATE)

    def plain(net: nn.Module) -> Optimizer:
        return optimizer_class(net.parameters())

    def with_momentum(net: nn.Module) -> Optimizer:
        return optimizer_class(net.parameters(), lr=RATE, momentum=0.9)

    def of_matrices(net: nn.Module) -> Optimizer:
        # Muon and its relatives: matrices by the new rule, the others by Adam's.
        groups = [
            {"params": [p for p in net.parameters() if p.ndim > 1], "use_muon": True},
            {"params": [p for p in net.parameters() if p.ndim < 2], "use_muon": False},
        ]
        return optimizer_class(groups, lr=RATE)

    def around(net: nn.Module) -> Optimizer:
        return optimizer_class(torch.optim.SGD(net.parameters(), lr=RATE))

    def around_class(net: nn.Module) -> Optimizer:
        return optimizer_class(net.parameters(), torch.optim.SGD, lr=RATE)

    def with_steps(net: nn.Module) -> Optimizer:
        return optimizer_class(net.parameters(), lr=RATE, num_iterations=STEPS)

    def of_model(net: nn.Module) -> Optimizer:
        return optimizer_class(net, lr=RATE)

    return [
        with_rate,
        plain,
        with_momentum,
        of_matrices,
        around,
        around_class,
        with_steps,
        of_model,
    ]
