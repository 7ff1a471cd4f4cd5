"""How far a fit will go, and what its learning rates will be on the way, as far as the Trainer
knows it before the first step.

A forecast rests on it. Where the Trainer does not know, less is said: nothing here loads data,
steps a scheduler of the fit, or ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_normdyn.engine.flavours import LightningModule, Trainer, classes
from lightning_normdyn.lr_schedules import WeightDecayEquivalentLR
from lightning_normdyn.optimizers.group_numbers import Group, group_number
from lightning_normdyn.optimizers.step_response import largest_rate, step_response
from lightning_normdyn.theory.schedule import Schedule, dry_schedule

__all__ = ["Horizon", "horizon_of", "schedules_of"]

MOST_STEPS = 200_000
"""Steps that a scheduler is stepped ahead: ten microseconds each, and more with many param
groups."""


@dataclass(frozen=True)
class Horizon:
    """How far a fit goes.

    Args:
        steps: of each optimizer, that are still to come; None where the Trainer does not know.
        per_epoch: optimizer steps of an epoch; None where it is not known.
        goes_on: whether steps were made before, in the run that this fit goes on with.
        accumulates: batches of an optimizer step.

    Example:
        >>> Horizon(1000, 100.0).every_n_steps("epoch", 2)
        200
    """

    steps: int | None
    per_epoch: float | None
    goes_on: bool = False
    accumulates: int = 1

    def every_n_steps(self, interval: str, frequency: int) -> int | None:
        """After how many optimizer steps Lightning steps a scheduler; None if that is not known.

        Args:
            interval: "step" or "epoch".
            frequency: of the scheduler's settings.
        """
        if interval == "step":
            # Lightning counts batches, and asks after those that end an optimizer step.
            return math.lcm(frequency, self.accumulates) // self.accumulates
        if self.per_epoch is None:
            return None
        return max(1, round(frequency * self.per_epoch))


def horizon_of(trainer: Trainer, optimizers: int = 1) -> Horizon:
    """How far the fit that is about to start goes.

    Args:
        trainer: at the start of training, when its data are there.
        optimizers: how many there are; Lightning counts the steps of all.
    """
    module = trainer.lightning_module
    shared = 1
    if not module.automatic_optimization:
        shared = max(1, optimizers)
    done = trainer.global_step // shared
    accumulates = max(1, trainer.accumulate_grad_batches)
    per_epoch = None
    # Asking for it would load the data, and earlier than Lightning does.
    has_data = trainer.train_dataloader is not None
    if has_data and math.isfinite(trainer.num_training_batches):
        per_epoch = math.ceil(trainer.num_training_batches / accumulates)
    total = _total_steps(trainer, shared, has_data=has_data)
    steps = None
    if total is not None:
        steps = max(0, total - done)
    return Horizon(steps, per_epoch or None, done > 0, accumulates)


def _total_steps(
    trainer: Trainer,
    optimizers: int,
    *,
    has_data: bool,
) -> int | None:
    """Steps of each optimizer from the first of the run on."""
    limit = trainer.max_steps
    total: float = limit
    if has_data:
        try:
            total = trainer.estimated_stepping_batches
        # Lightning refuses where the accumulation of gradients changes from epoch to epoch.
        except Exception:
            return None
    # -1 stands for no limit.
    if not math.isfinite(total) or total < 0:
        return None
    # By max_steps Lightning means the steps of all optimizers, by epochs the batches of each.
    if total == limit:
        return limit // optimizers
    return int(total)


def schedules_of(
    optimizer: Optimizer,
    configs: Sequence[Any],
    horizon: Horizon,
    trainer: Trainer,
    kind: type,
) -> list[Schedule]:
    """The numbers of each param group at every step that is still to come.

    Args:
        optimizer: before its next step.
        configs: Lightning's settings of all schedulers.
        horizon: how far the fit goes. If that is not known, for one relaxation time.
        trainer: of the fit.
        kind: the class whose predictions hold for the optimizer.

    Returns:
        One per param group; empty where no step is to come.
    """
    steps = horizon.steps
    if steps is None:
        steps = max(_relaxation(kind, group) for group in optimizer.param_groups)
    steps = min(steps, MOST_STEPS)
    if steps < 1:
        return []
    module = trainer.lightning_module
    scheduler, every = _scheduler_of(optimizer, configs, horizon, module)
    return dry_schedule(
        optimizer,
        scheduler,
        steps,
        every_n_steps=every,
        # A lambda may be a method of the module, and the module holds all weights and the Trainer.
        shared=(module, trainer),
    )


class _Unknowable:
    """Stands for a scheduler that cannot be stepped ahead: it has no ``step``."""


def _scheduler_of(
    optimizer: Optimizer, configs: Sequence[Any], horizon: Horizon, module: LightningModule
) -> tuple[Any, int]:
    """The scheduler of an optimizer, and after how many of its steps it steps."""
    # Then the module steps optimizers and schedulers itself, nobody knows when.
    is_manual = not module.automatic_optimization
    usual = [base.lr_scheduler_step for base in classes("", "LightningModule")]
    own_way = type(module).lr_scheduler_step not in usual
    if not configs:
        return None, 1
    # A strategy may have put another optimizer in the place of the one that a scheduler holds.
    mine = [c for c in configs if getattr(c.scheduler, "optimizer", None) is optimizer]
    if is_manual or own_way or len(mine) != 1:
        return _Unknowable(), 1
    (config,) = mine
    # It counts the optimizer's real steps, and those of a dummy never happen.
    if isinstance(config.scheduler, WeightDecayEquivalentLR):
        return _Unknowable(), 1
    every = horizon.every_n_steps(config.interval, config.frequency)
    if every is None:
        return _Unknowable(), 1
    return config.scheduler, every


def _relaxation(kind: type, group: Group) -> int:
    """Steps in which a norm relaxes under the largest rate that a param group names; 1 where
    nothing relaxes."""
    rate = largest_rate(group)
    response = step_response(kind, group, shape=(1, 1))
    decays = group_number(group, "weight_decay") != 0
    if response is None or response.effective_decay is None or not decays or rate is None:
        return 1
    pull = float(rate * response.effective_decay)
    if not pull > 0:
        return 1
    return math.ceil(1 / (response.power * pull))
