"""What a scheduler will do to the param groups of an optimizer, step by step, before it does it.

A copy of the scheduler is stepped on a dummy optimizer. Neither the scheduler nor the optimizer of
the fit is touched, and random states are put back.
"""

from __future__ import annotations

import copy
import io
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from lightning_normdyn.optimizers.group_numbers import Group, as_number, without_params

__all__ = ["MOST_ROWS", "Rows", "Schedule", "constant_schedule", "dry_schedule"]

MOST_ROWS = 5_000
"""Steps of a schedule that are kept; of longer ones every second, every third, ..."""


class Rows(Sequence[Mapping[str, Any]]):
    """A param group at many steps, of which mostly the learning rate alone differs.

    Whole dictionaries of a hundred param groups at 5,000 steps would fill half a gigabyte.
    """

    def __init__(self) -> None:
        self._rates: list[Any] = []
        self._settings: list[Mapping[str, Any]] = []

    def append(self, group: Group) -> None:
        """Add the param group as one more step finds it."""
        settings = without_params(group)
        self._rates.append(settings.pop("lr", None))
        # What did not change is kept once.
        if self._settings and self._settings[-1] == settings:
            self._settings.append(self._settings[-1])
        else:
            self._settings.append(settings)

    def __len__(self) -> int:
        return len(self._rates)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {**self._settings[index], "lr": self._rates[index]}


@dataclass(frozen=True)
class Schedule:
    """The numbers of one param group at every step, or at every so many steps of a long run.

    Args:
        groups: the param group, without its parameters, as the steps find it.
        is_assumed: whether the learning rate is only assumed to stay as it is, because nobody can
            step the scheduler dry.
        stride: for how many steps each of ``groups`` stands.
        steps: optimizer steps; None: ``stride`` for each of ``groups``.

    Example:
        >>> schedule = Schedule(({"lr": 0.1}, {"lr": 0.2}), stride=3, steps=5)
        >>> schedule.counts.tolist(), schedule.starts.tolist()
        ([3, 2], [0, 3])
    """

    groups: Sequence[Mapping[str, Any]]
    is_assumed: bool = False
    stride: int = 1
    steps: int | None = None

    @property
    def rates(self) -> list[float]:
        """The learning rate of each of `groups`; NaN where it is no number of the host."""
        rates = []
        for group in self.groups:
            lr = as_number(group.get("lr"))
            # A tensor lives on an accelerator, and reading it would wait for the device.
            rates.append(lr if isinstance(lr, float) else math.nan)
        return rates

    @property
    def counts(self) -> NDArray[np.int64]:
        """For how many steps each of `groups` stands."""
        # The last row stands for what is left.
        counts = np.full(len(self.groups), self.stride, dtype=np.int64)
        if self.steps is not None and len(counts):
            counts[-1] = self.steps - self.stride * (len(counts) - 1)
        return counts

    @property
    def starts(self) -> NDArray[np.int64]:
        """The steps before each of `groups`."""
        return self.stride * np.arange(len(self.groups), dtype=np.int64)

    def first(self, steps: int) -> Schedule:
        """The schedule of a run that ended early."""
        if steps >= int(self.counts.sum()):
            return self
        rows = math.ceil(steps / self.stride)
        return replace(self, groups=self.groups[:rows], steps=steps)


def constant_schedule(group: Group, steps: int) -> Schedule:
    """The group as it is, at each of ``steps`` steps.

    Example:
        >>> constant_schedule({"lr": 0.1}, 3).rates
        [0.1, 0.1, 0.1]
    """
    stride = max(1, math.ceil(steps / MOST_ROWS))
    rows = math.ceil(steps / stride)
    return Schedule((without_params(group),) * rows, stride=stride, steps=steps)


def dry_schedule(
    optimizer: Optimizer,
    scheduler: Any,
    steps: int,
    *,
    every_n_steps: int = 1,
    shared: Sequence[object] = (),
) -> list[Schedule]:
    """What a scheduler will do to each param group of ``optimizer``, without touching either.

    Args:
        optimizer: the optimizer, before its first step.
        scheduler: one of torch's, or anything alike that holds the optimizer and has a ``step()``;
            None: no schedule.
        steps: optimizer steps of the fit.
        every_n_steps: after how many of them the scheduler steps: those of an epoch for one that
            goes by epochs.
        shared: objects that a scheduler may hold and that are not to be copied with it: a
            LightningModule whose method is the lambda of a LambdaLR.

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
    constant = [constant_schedule(group, steps) for group in optimizer.param_groups]
    if scheduler is None:
        return constant
    try:
        return _stepped_dry(optimizer, scheduler, steps, every_n_steps, shared)
    # A scheduler is anybody's code, and a forecast must not end a fit.
    except Exception:
        return [replace(schedule, is_assumed=True) for schedule in constant]


def _stepped_dry(
    optimizer: Optimizer,
    scheduler: Any,
    steps: int,
    every_n_steps: int,
    shared: Sequence[object],
) -> list[Schedule]:
    dummy = _dummy(optimizer)
    # Wherever the scheduler holds the optimizer, its copy holds the dummy.
    memo: dict[int, Any] = {id(each): each for each in shared}
    memo[id(optimizer)] = dummy
    copied = copy.deepcopy(scheduler, memo)
    stride = max(1, math.ceil(steps / MOST_ROWS))
    columns = [Rows() for _ in dummy.param_groups]
    # The dummy fills its groups up with options of its own class.
    keys = [list(without_params(group)) for group in optimizer.param_groups]
    with _leaving_no_trace():
        for step in range(steps):
            if step % stride == 0:
                for column, group, own in zip(columns, dummy.param_groups, keys, strict=True):
                    column.append({key: group[key] for key in own})
            if (step + 1) % every_n_steps == 0:
                copied.step()
    return [Schedule(column, stride=stride, steps=steps) for column in columns]


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """Schedulers may warn, print and draw random numbers, which a fit must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            # The dummy never steps, of which torch's schedulers warn.
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _dummy(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same param groups over nothing worth mentioning."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
        # A copy, since schedulers write into groups.
        groups.append({**copy.deepcopy(without_params(group)), "params": [weight]})
    # Of which class does not matter: schedulers read and write param groups.
    return torch.optim.SGD(groups, lr=0.0)
