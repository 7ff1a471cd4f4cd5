"""What a scheduler will do to the param groups of an optimizer, step by step, before it does it.

A copy of the scheduler is stepped on a dummy optimizer; neither the scheduler nor the optimizer of
the fit is touched.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_normdyn.optimizers.group_numbers import Group, as_number, without_params

__all__ = ["Schedule", "constant_schedule", "dry_schedule"]


@dataclass(frozen=True)
class Schedule:
    """The numbers of one param group at every step.

    Args:
        groups: the param group, without its parameters, as each step finds it.
        is_assumed: whether the learning rate is only assumed to stay as it is, because nobody can
            step the scheduler dry.
    """

    groups: tuple[Mapping[str, Any], ...]
    is_assumed: bool = False

    @property
    def rates(self) -> list[float]:
        """The learning rate of every step; NaN where it is no number of the host."""
        rates = []
        for group in self.groups:
            lr = as_number(group.get("lr"))
            rates.append(lr if isinstance(lr, float) else math.nan)
        return rates


def constant_schedule(group: Group, steps: int) -> Schedule:
    """The group as it is, at each of ``steps`` steps.

    Example:
        >>> constant_schedule({"lr": 0.1}, 3).rates
        [0.1, 0.1, 0.1]
    """
    return Schedule((without_params(group),) * steps)


def dry_schedule(
    optimizer: Optimizer,
    scheduler: Any,
    steps: int,
    *,
    every_n_steps: int = 1,
) -> list[Schedule]:
    """What a scheduler will do to each param group of ``optimizer``, without touching either.

    Args:
        optimizer: the optimizer, before its first step.
        scheduler: one of torch's, or anything alike that holds the optimizer and has a ``step()``;
            None: no schedule.
        steps: optimizer steps of the fit.
        every_n_steps: after how many of them the scheduler steps: those of an epoch for one that
            goes by epochs.

    Returns:
        One per param group. Where a scheduler needs more than to be stepped (a metric), or cannot
        be copied, the learning rates are assumed to stay, and the schedules say so.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=1.0)
        >>> halving = torch.optim.lr_scheduler.StepLR(sgd, step_size=1, gamma=0.5)
        >>> (schedule,) = dry_schedule(sgd, halving, 4, every_n_steps=2)
        >>> schedule.rates, sgd.param_groups[0]["lr"]
        ([1.0, 1.0, 0.5, 0.5], 1.0)
    """
    if scheduler is None:
        return [constant_schedule(group, steps) for group in optimizer.param_groups]
    try:
        return _stepped_dry(optimizer, scheduler, steps, every_n_steps)
    # A scheduler is anybody's code, and a forecast must not end a fit.
    except Exception:
        assumed = [constant_schedule(group, steps) for group in optimizer.param_groups]
        return [Schedule(schedule.groups, is_assumed=True) for schedule in assumed]


def _stepped_dry(
    optimizer: Optimizer, scheduler: Any, steps: int, every_n_steps: int
) -> list[Schedule]:
    dummy = _dummy(optimizer)
    # Wherever the scheduler holds the optimizer, its copy holds the dummy.
    copied = copy.deepcopy(scheduler, {id(optimizer): dummy})
    columns: list[list[Mapping[str, Any]]] = [[] for _ in dummy.param_groups]
    with warnings.catch_warnings():
        # The dummy never steps, of which torch's schedulers warn.
        warnings.simplefilter("ignore")
        for step in range(1, steps + 1):
            for column, group in zip(columns, dummy.param_groups, strict=True):
                column.append(without_params(group))
            if step % every_n_steps == 0:
                copied.step()
    return [Schedule(tuple(column)) for column in columns]


def _dummy(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same param groups over nothing worth mentioning."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
        # A copy, since schedulers write into groups.
        groups.append({**copy.deepcopy(without_params(group)), "params": [weight]})
    # Of which class does not matter: schedulers read and write param groups.
    return torch.optim.SGD(groups, lr=0.0)
