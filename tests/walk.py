"""A scale-invariant weight driven by noise alone: the one model for which the equilibrium is known
in closed form.

Each row of the weight is a vector; the loss is <noise, w/‖w‖>, so its gradient is P noise / ‖w‖, at
right angles to w. `settled` runs an optimizer in plain torch until the walk is at its equilibrium
and hands it over in mid-flight; a Trainer takes it from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_normdyn import AdaptiveWeightShrink, RadialProjection
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update, equilibrium_norm

MakeOptimizer = Callable[[Any], Optimizer]
MakeScheduler = Callable[[Optimizer], Any]


class Walk(L.LightningModule):
    """One weight of shape (vectors, entries). A batch is the noise of one step.

    Args:
        weight: where it starts.
        make_optimizer: from parameters; or an optimizer that already holds ``weight``.
        make_scheduler: from the optimizer.
        interval: when Lightning steps the scheduler.
    """

    def __init__(
        self,
        weight: Tensor,
        make_optimizer: MakeOptimizer | Optimizer,
        make_scheduler: MakeScheduler | None = None,
        interval: str = "step",
    ) -> None:
        super().__init__()
        self.weight = (
            weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight.clone())
        )
        self._optimizer, self.make_scheduler, self.interval = (
            [make_optimizer],
            make_scheduler,
            interval,
        )

    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return (noise * self.weight / self.weight.norm(dim=1, keepdim=True)).sum()

    def configure_optimizers(self) -> Any:
        (given,) = self._optimizer
        optimizer = given if isinstance(given, Optimizer) else given(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [
            {"scheduler": self.make_scheduler(optimizer), "interval": self.interval}
        ]


def noise(
    steps: int, shape: Sequence[int], seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """What the walk is driven by, step after step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(steps)
    ]


def batches(noises: Sequence[Tensor]) -> DataLoader[Any]:
    """A noise per batch, in order."""
    return DataLoader(list(noises), batch_size=None)


def by_rates(rates: Sequence[float]) -> MakeScheduler:
    """The learning rates of the steps, one after the other; the last one stays."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rates[min(step, len(rates) - 1)] / optimizer.param_groups[0]["initial_lr"],
    )


class Angles(L.Callback):
    """RMS angle of every batch's step over the rows of ``weight``."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.before = pl_module.weight.detach().clone()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(turned(self.before, pl_module.weight.detach()))


def turned(before: Tensor, after: Tensor) -> float:
    """RMS angle between rows, by atan2."""
    radial = (before * after).sum(1) / before.norm(dim=1)
    return float(torch.atan2(tangential(after, before).norm(dim=1), radial).square().mean().sqrt())


def tangential(x: Tensor, w: Tensor) -> Tensor:
    """Rows of ``x`` without their part along the rows of ``w``."""
    return x - w * ((x * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True))


@dataclass(frozen=True)
class Setting:
    """An optimizer and what a callback adds to it.

    Args:
        name: for the test's id.
        optimizer: its class.
        hyper: its arguments, ``lr`` among them.
        exponent: what weights are divided by when the learning rate falls by k: k to this power.
        alpha: of AdaptiveWeightShrink.
        ratio: ``weight_decay_ratio`` of RadialProjection.
    """

    name: str
    optimizer: type[Optimizer]
    hyper: dict[str, Any] = field(default_factory=dict)
    exponent: float = 0.25
    alpha: float | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def adaptive(self) -> bool:
        """Whether the size of the gradient cancels."""
        return not issubclass(self.optimizer, torch.optim.SGD)

    def callbacks(self) -> list[Any]:
        if self.alpha is not None:
            return [AdaptiveWeightShrink(self.alpha)]
        return [] if self.ratio is None else [RadialProjection(weight_decay_ratio=self.ratio)]

    def projected_decay(self) -> float | None:
        """λ of RadialProjection as it is applied: decoupled."""
        if self.ratio is None:
            return None
        return (
            self.hyper["weight_decay"]
            * self.ratio
            / (1 - self.hyper.get("momentum", 0.0) if not self.adaptive else 1)
        )

    def equilibrium(self, dim: int, lr: float | None = None) -> tuple[float, float]:
        """Angle and norm that theory predicts for noise of variance 1, at another learning rate if
        asked."""
        group = {**self.optimizer([torch.zeros(1)], **self.hyper).param_groups[0]}
        group["lr"] = group["lr"] if lr is None else lr
        options: dict[str, Any] = {
            "projected": self.ratio is not None,
            "decay": self.projected_decay(),
        }
        if self.alpha is None:
            norm = equilibrium_norm(self.optimizer, group, dim - 1, dim=dim, **options)
        else:
            norm = equilibrium_norm(
                self.optimizer, group, dim - 1, dim=dim, norm=1.0, shrink=self.alpha, **options
            )
            options.update(shrink=self.alpha * norm, norm=norm)
        angle = equilibrium_angular_update(
            self.optimizer, group, gradient_scale=dim - 1, dim=dim, **options
        )
        assert norm is not None
        assert angle is not None
        return float(angle), float(norm)


SETTINGS = [
    Setting("SGD", torch.optim.SGD, {"lr": 0.1, "weight_decay": 5e-3}),
    Setting("SGDM", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 2e-3}),
    Setting(
        "AdamW", torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.99)}, 1 / 2
    ),
    Setting(
        "Adam + L2",
        torch.optim.Adam,
        {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        1 / 3,
    ),
    Setting("AWS on SGD", torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-3}, 1 / 5, alpha=2e-3),
    Setting("AWS on SGDM", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, 1 / 5, alpha=2e-3),
    Setting("AWS on Adam", torch.optim.Adam, {"lr": 3e-3, "betas": (0.9, 0.99)}, 1 / 3, alpha=0.1),
    Setting(
        "projection on SGDM (SGDP)",
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
        ratio=0.1,
    ),
    Setting(
        "projection on AdamW (AdamP)",
        torch.optim.AdamW,
        {"lr": 1e-3, "weight_decay": 0.5, "betas": (0.9, 0.99)},
        1 / 2,
        ratio=0.1,
    ),
]


def settled(setting: Setting) -> tuple[torch.nn.Parameter, Optimizer]:
    """A weight at its equilibrium and the optimizer that holds it, buffers and all; no callback of
    the package has been near it."""
    return copy.deepcopy(_settled(SETTINGS.index(setting)))


@lru_cache
def _settled(
    number: int, shape: tuple[int, int] = (192, 64), steps: int = 400
) -> tuple[torch.nn.Parameter, Optimizer]:
    setting, generator = SETTINGS[number], torch.Generator().manual_seed(0)
    start = torch.randn(*shape, generator=generator, dtype=torch.float64)
    _, norm = setting.equilibrium(shape[1])
    weight = torch.nn.Parameter(start * (norm / start.norm(dim=1, keepdim=True)))
    optimizer = setting.optimizer([weight], **setting.hyper)
    (group,) = optimizer.param_groups
    own, decay = group["weight_decay"], setting.projected_decay()
    if setting.alpha is not None or decay is not None:
        group["weight_decay"] = 0.0
    with torch.no_grad():
        for _ in range(steps):
            length = weight.norm(dim=1, keepdim=True)
            weight.grad = (
                tangential(torch.randn(*shape, generator=generator, dtype=torch.float64), weight)
                / length
            )
            anchor = weight.clone()
            if setting.alpha is not None:
                weight.mul_(1 - group["lr"] * setting.alpha * length)
            optimizer.step()
            if decay is not None:
                weight.copy_(
                    anchor + tangential(weight - anchor, anchor) - group["lr"] * decay * anchor
                )
    group["weight_decay"] = own
    weight.grad = None
    return weight, optimizer


SHAPE = (3, 5)


def start(
    shape: Sequence[int] = SHAPE, norm: float | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Rows of a weight to walk from, of length ``norm`` if it is given."""
    weight = torch.randn(
        *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).to(dtype)
    return weight if norm is None else weight * (norm / weight.norm(dim=1, keepdim=True))
