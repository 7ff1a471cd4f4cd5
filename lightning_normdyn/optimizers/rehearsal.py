"""A step as it will be, before anything has been copied: for who has to know what a step takes and
not what comes of it."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.optim import Optimizer

from .decay import DecayOwner
from .step import Bracket, Phase, Step


class _Rehearsed(Bracket):
    """A bracket whose weights are their own copies."""

    def __init__(self, bracket: Bracket, storages: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._bracket = bracket
        # As if they had been taken: nothing is written, so the weights will do.
        for weight, storage in storages.items():
            self._copies[id(weight)] = storage

    @property
    def optimizer(self) -> Optimizer:
        return self._bracket.optimizer

    def decay_owners(self) -> dict[Tensor, DecayOwner]:
        return self._bracket.decay_owners()

    def acts_between(self, first: Phase, last: Phase, *, before_rank: int | None = None) -> bool:
        return self._bracket.acts_between(first, last, before_rank=before_rank)


def rehearsed(step: Step, storages: Mapping[Tensor, Tensor]) -> Step:
    """A step like ``step`` in which copies may be asked for, and each is the weight itself; its own
    bracket hears nothing of it.

    Args:
        step: the step.
        storages: as for `StepBracket.request_snapshot`.

    Example:
        >>> import torch
        >>> from lightning_normdyn import StepBracket
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> step = rehearsed(Step(StepBracket(optimizer), 1), {weight: weight})
        >>> step.bracket.snapshot(weight) is weight
        True
    """
    return replace(step, bracket=_Rehearsed(step.bracket, storages))
