"""Notices steps that nobody saw: a targeted weight that moved without one is told to the person by
name.

Two looks that cost nothing on an ordinary step. torch calls a global hook for every optimizer that
steps: one that nobody brackets and that holds targeted weights is told at once. And at logging
steps: if no step of an optimizer was seen since the last look but one, the norms of its weights are
compared with those of that look; they must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_normdyn.invariance.names import parameter_names
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.scratch import is_scratch

from .attachment import Attachment
from .messages import named, warn_once
from .weights import Weights, held_by, weights_by_name


class Fit(Protocol):
    """What a witness must see of a fit."""

    closed: bool
    attachment: Attachment
    weights: Weights

    def is_targeted(self, weight: Tensor) -> bool:
        """Whether some callback's ``params`` let this weight in."""

    def note(self, text: str) -> None:
        """Say something once, now and in the end table."""


@dataclass
class _Mark:
    """How the weights of one optimizer were at a look.

    Args:
        steps: that were seen until then.
        names: of the weights.
        pieces: what this rank holds of them; none while the optimizer steps at every look.
        numbers: ``(2, weights)``: their norms and sums.
    """

    steps: int
    names: list[str] = field(default_factory=list)
    pieces: list[Tensor] = field(default_factory=list)
    numbers: Tensor | None = None


class Witness:
    """Notices that a targeted weight moves although no bracketed optimizer steps.

    Args:
        fit: whose brackets and targets; held weakly, since torch holds the hooks.

    Attributes:
        notes: what was told, for the end table.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = ref(fit)
        self._told: set[str] = set()
        self._strangers: WeakSet[Optimizer] = WeakSet()
        self.notes: list[str] = []
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        self._marks: dict[int, _Mark] = {}
        for index, bracket in enumerate(fit.attachment.brackets):
            self._marks[index] = self._new_mark(fit, bracket)

    def close(self) -> None:
        """Take the hooks away; idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._marks = [], {}

    # -- every optimizer that steps
    # ------------------------------------------------------------------------

    def _running(self, optimizer: Optimizer) -> Fit | None:
        """The fit, if ``optimizer`` is one whose steps nobody sees there."""
        fit = self._fit()
        if fit is None or fit.closed:  # its end came without ours
            self.close()
            return None
        if fit.attachment.knows(optimizer) or is_scratch(optimizer):
            return None
        return fit

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        fit = self._running(optimizer)
        if fit is not None:
            fit.attachment.follow(optimizer)  # its own hooks are called after this one

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        fit = self._running(optimizer)
        # An optimizer that steps inside another one is no stranger.
        if fit is None or optimizer in self._strangers or fit.attachment.is_stepping():
            return
        names = list(map(fit.weights.name, self._targeted(fit, optimizer)))
        # Asked again at its next step: it may hold targeted weights by then.
        if not names:
            return
        self._strangers.add(optimizer)
        verb = "is" if len(names) == 1 else "are"
        self._say(
            names,
            f"{named(names)} {verb} stepped by an optimizer that the Trainer does not hold "
            f"({type(optimizer).__name__}): nothing acts on these steps, and nothing measures "
            f"them. Return it from configure_optimizers.",
        )

    # -- weights that move by themselves
    # -------------------------------------------------------------------

    def look(self, *, last: bool = False) -> None:
        """At a logging step and at the end of a fit (``last``): did a weight move although no step
        of its optimizer was seen?"""
        fit = self._fit()
        if fit is None:
            return
        for index, bracket in enumerate(fit.attachment.brackets):
            mark = self._marks.get(index)
            if mark is None or mark.steps != bracket.steps:
                # It stepped since the last look, as it should.
                self._marks[index] = _Mark(bracket.steps)
            elif bracket.unsettled:
                continue  # a fused optimizer has not told yet whether it stepped
            elif mark.numbers is not None:
                self._compare(bracket, mark, mark.numbers)
            elif not last:
                self._marks[index] = self._new_mark(fit, bracket)

    def _targeted(
        self,
        fit: Fit,
        optimizer: Optimizer,
    ) -> list[Tensor]:
        held = held_by(optimizer)
        return [p for p in held if p in fit.weights.names and fit.is_targeted(p)]

    def _new_mark(
        self,
        fit: Fit,
        bracket: StepBracket,
    ) -> _Mark:
        mark = _Mark(bracket.steps)
        for weight in self._targeted(fit, bracket.optimizer):
            # FSDP's flat pieces and DeepSpeed's are moved about by their strategies.
            is_whole = tuple(weight.shape) == fit.weights.shapes[weight]
            if weight.requires_grad and is_whole and _is_dense(weight):
                mark.names.append(fit.weights.name(weight))
                mark.pieces.append(_plain(weight))
        if mark.pieces:
            mark.numbers = _numbers(mark.pieces)
        return mark

    def _compare(
        self,
        bracket: StepBracket,
        mark: _Mark,
        before: Tensor,
    ) -> None:
        mark.numbers = _numbers(mark.pieces)
        # NaN equals nothing, not even itself: a weight that is NaN would seem to move at each look.
        same = (mark.numbers == before) | (mark.numbers.isnan() & before.isnan())
        moved = []
        for name, is_unchanged in zip(mark.names, same.all(0).tolist(), strict=True):
            if not is_unchanged and name not in self._told:
                moved.append(name)
        if not moved:
            return
        kind = type(bracket.optimizer).__name__
        owner = "its" if len(moved) == 1 else "their"
        self._say(
            moved,
            f"{named(moved)} moved although no step of {owner} optimizer ({kind}) was seen: "
            f"nothing acted on that or measured it. Something else writes to the weights (an "
            f"update by hand, an object with a step of its own), or {kind} steps without torch's "
            f"step hooks. Step it by `optimizer.step()`.",
        )

    def look_for_replaced_weights(self) -> None:
        """Say so if a weight without a gradient has been replaced in the network, and the optimizer
        holds the old one."""
        fit = self._fit()
        if fit is None:
            return
        idle = []
        for weight in fit.attachment.weights():
            is_idle = weight.grad is None and weight.requires_grad
            if is_idle and type(weight.data) is Tensor and fit.is_targeted(weight):
                idle.append(weight)
        if not idle:
            return
        present = parameter_names(fit.weights.module)
        by_name = weights_by_name(present)
        for weight in idle:
            name = fit.weights.name(weight)
            replacement = by_name.get(name)
            if weight in present or replacement is None or replacement.grad is None:
                continue
            fit.note(
                f"`{name}` was replaced in the network by a parameter that no optimizer holds: it "
                f"is not trained, and nothing acts on it. Put it into a param group."
            )

    def _say(
        self,
        names: Sequence[str],
        text: str,
    ) -> None:
        self._told.update(names)
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
    # At least float32: rounded to bfloat16, two different norms are often the same number.
    dtype = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
    # The sum tells what a norm cannot: a change of sign, say, leaves every norm as it is.
    norms = [torch.linalg.vector_norm(p.to(dtype)).to(device) for p in pieces]
    sums = [p.sum(dtype=dtype).to(device) for p in pieces]
    return torch.stack([torch.stack(norms), torch.stack(sums)])
