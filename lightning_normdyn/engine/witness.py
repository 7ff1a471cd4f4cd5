"""Whether every step that moved a weight was seen: a weight that moved without one is told to the
person by name.

Two looks that cost nothing on an ordinary step. torch calls a global hook for every optimizer that
steps: one that nobody brackets and that
holds targeted weights is told at once. And at logging steps: if no step of an optimizer was seen
since the last look but one, the norms of
its weights are compared with those of that look; they must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_normdyn.engine.attachment import Attachment
from lightning_normdyn.engine.messages import named, warn_once
from lightning_normdyn.engine.weights import Weights, held_by
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.scratch import is_scratch

__all__ = ["Witness"]


class Fit(Protocol):
    """What a witness must see of a fit."""

    closed: bool
    attachment: Attachment
    weights: Weights

    def is_targeted(self, weight: Tensor) -> bool:
        """Whether some callback's ``params`` let this weight in."""


@dataclass
class _Mark:
    """How the weights of one optimizer were at a look.

    Args:
        steps: that were seen until then.
        weights: this rank's plain pieces.
        names: theirs.
        numbers: ``(2, weights)``: their norms and sums.
    """

    steps: int
    weights: list[Tensor]
    names: list[str]
    numbers: Tensor


class Witness:
    """Notices that a targeted weight moves although no bracketed optimizer steps.

    Args:
        fit: whose brackets and targets; held weakly, since torch holds the hooks.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = ref(fit)
        self._told: set[str] = set()
        self._strangers: WeakSet[Optimizer] = WeakSet()
        self._marks: dict[int, _Mark] = {}
        self._steps: dict[int, int] = {}
        self.notes: list[str] = []
        """What was told, for the end table."""
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        for index in range(len(fit.attachment.brackets)):
            self._remember(fit, index)

    def close(self) -> None:
        """Take the hooks away; idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._marks = [], {}

    # -- every optimizer that steps
    # ------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        fit = self._fit()
        if fit is None or fit.closed:  # a fit whose end came without ours
            self.close()
        elif id(optimizer) not in fit.attachment.known and not is_scratch(optimizer):
            fit.attachment.follow(optimizer)  # its own hooks are called after this one

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        fit = self._fit()
        if (
            fit is None
            or fit.closed
            or id(optimizer) in fit.attachment.known
            or optimizer in self._strangers
        ):
            return
        if is_scratch(optimizer):
            return
        if fit.attachment.is_stepping():
            return  # an optimizer inside another one
        held = held_by(optimizer)
        names = [fit.weights.name(p) for p in held if p in fit.weights.names and fit.is_targeted(p)]
        if not names:
            return
        self._strangers.add(optimizer)
        self._told.update(names)
        self._say(
            f"{named(names)} {'is' if len(names) == 1 else 'are'} stepped by an optimizer that the "
            f"Trainer does not hold "
            f"({type(optimizer).__name__}): nothing acts on these steps, and nothing measures "
            f"them. "
            "Return it from configure_optimizers."
        )

    # -- weights that move by themselves
    # -------------------------------------------------------------------------------

    def look(self, *, last: bool = False) -> None:
        """At a logging step and at the end of a fit (``last``): did a weight move although no step
        of its optimizer was seen?"""
        fit = self._fit()
        if fit is None:
            return
        for index, bracket in enumerate(fit.attachment.brackets):
            mark, seen = self._marks.get(index), self._steps.get(index)
            self._steps[index] = bracket.steps
            if bracket.unsettled or (mark is None and seen != bracket.steps):
                continue  # it stepped since the last look
            if mark is not None and mark.steps == bracket.steps:
                self._compare(fit, bracket, mark)
            elif seen == bracket.steps and not last:
                self._remember(fit, index)
            else:
                self._marks.pop(index, None)

    def _remember(self, fit: Fit, index: int) -> None:
        bracket = fit.attachment.brackets[index]
        held = held_by(bracket.optimizer)
        targeted = [
            p for p in held if p in fit.weights.names and fit.is_targeted(p) and p.requires_grad
        ]
        # FSDP's flat pieces and DeepSpeed's are moved about by their strategies.
        whole = [p for p in targeted if tuple(p.shape) == fit.weights.shapes[p] and _is_dense(p)]
        pieces = [_plain(p) for p in whole]
        names = [fit.weights.name(p) for p in whole]
        self._steps[index] = bracket.steps
        self._marks.pop(index, None)
        if pieces:
            self._marks[index] = _Mark(bracket.steps, pieces, names, _numbers(pieces))

    def _compare(self, fit: Fit, bracket: StepBracket, mark: _Mark) -> None:
        now = _numbers(mark.weights)
        same = ((now == mark.numbers) | (now.isnan() & mark.numbers.isnan())).all(0).tolist()
        moved = [
            name
            for name, unchanged in zip(mark.names, same, strict=True)
            if not unchanged and name not in self._told
        ]
        mark.numbers = now
        if not moved:
            return
        self._told.update(moved)
        kind = type(bracket.optimizer).__name__
        owner = "its" if len(moved) == 1 else "their"
        self._say(
            f"{named(moved)} moved although no step of {owner} optimizer ({kind}) was seen: "
            f"nothing acted on that or measured it. "
            "Something else writes to the weights (an update by hand, an object with a step of its "
            "own), or "
            f"{kind} steps without torch's step hooks. Step it by `optimizer.step()`."
        )

    def _say(self, text: str) -> None:
        self.notes.append(text)
        warn_once(text)


def _is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.layout == torch.strided and not weight.is_quantized


def _plain(weight: Tensor) -> Tensor:
    local = weight.detach()
    return local.to_local() if hasattr(local, "to_local") else local


def _numbers(pieces: Sequence[Tensor]) -> Tensor:
    """Norm and sum of each piece, ``(2, pieces)`` on the device of the first: the same numbers as
    long as nothing moves."""
    device = pieces[0].device
    dtype = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(p.to(dtype)).to(device) for p in pieces]
    sums = [p.sum(dtype=dtype).to(device) for p in pieces]
    return torch.stack([torch.stack(norms), torch.stack(sums)])
