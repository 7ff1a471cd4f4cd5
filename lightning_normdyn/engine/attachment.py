"""Which optimizers step in a fit, and a bracket around each of them: also around those that take
the place of others while the fit is running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_normdyn.engine.lightning_facts import wrapped_optimizers
from lightning_normdyn.engine.member import Member
from lightning_normdyn.engine.messages import show
from lightning_normdyn.engine.two_phases import ReturnCheck
from lightning_normdyn.engine.weights import Weights
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_optimizer
from lightning_normdyn.optimizers.step import Bracket, Phase, Step
from lightning_normdyn.optimizers.views import torch_optimizers
from lightning_normdyn.optimizers.wrappers import steps_in_two_phases, without_framework

# The rank of what comes after whatever callbacks do in a phase.
LAST = 1000


class Listener(Protocol):
    """Who is told what happens to the optimizers of a fit."""

    def note(self, text: str) -> None:
        """Something that a person should know, now and at the end."""

    def resolve(self, step: Step) -> None:
        """A step is about to happen."""

    def optimizer_came(self, index: int) -> None:
        """Another optimizer is number ``index`` from its next step on."""


class Attachment:
    """The optimizers of one fit, by the number that plans and checkpoints know them by.

    Args:
        trainer: of the fit.
        weights: of the network.
        members: the callbacks that act in the steps.
        listener: who is told.

    Attributes:
        optimizers: the torch optimizers that step. DeepSpeed steps an optimizer in parts, which
            are several here.
        outers: for each of them what a person has made: itself, or what steps through it.
        brackets: one around each.
        return_checks: of those in two phases.
        replaced: numbers of optimizers that came during the fit: what is refused of them is no
            error.
        known: ids of the optimizers whose steps are seen, and of those around them.
    """

    def __init__(
        self, trainer: Trainer, weights: Weights, members: Sequence[Member], listener: Listener
    ) -> None:
        self._trainer, self._weights, self._members = trainer, weights, members
        self._listener = listener
        self.optimizers: list[Optimizer] = []
        self.outers: list[Any] = []
        self.brackets: list[StepBracket] = []
        self.return_checks: dict[int, ReturnCheck] = {}
        self.replaced: set[int] = set()
        self.known: set[int] = set()
        # One bracket for each optimizer whose steps Lightning announces.
        self._leading: list[StepBracket] = []
        self._removers: dict[StepBracket, list[Callable[[], None]]] = {}
        self._followed: list[Any] = []  # the Trainer's optimizers when they were last looked at
        self._left_alone: list[Any] = []  # held, so that nothing else gets their ids
        self._steps_of_gone = 0  # of optimizers that others have taken the place of

    def attach(self) -> None:
        """Bracket every optimizer of the fit."""
        self._followed = list(self._trainer.optimizers)
        for optimizer in self._followed:
            outer = without_framework(optimizer)
            parts = torch_optimizers(optimizer)
            for part in parts:
                self.optimizers.append(part)
                self.outers.append(outer)
                self.brackets.append(StepBracket.of(part))
            # Lightning does not hear of the steps of an optimizer in two phases, so none of them
            # can be known to have been skipped.
            if parts and not steps_in_two_phases(outer):
                self._leading.append(StepBracket.of(parts[0]))
        for index in range(len(self.brackets)):
            self._listen(index)
        self.known = {id(o) for o in [*self.optimizers, *self.outers]}

    def close(self) -> None:
        """Leave no hook behind; idempotent."""
        for removers in self._removers.values():
            for remove in removers:
                remove()
        self._removers = {}

    def number_of(self, bracket: Bracket) -> int:
        """The number of the optimizer inside ``bracket``."""
        return next(i for i, known in enumerate(self.brackets) if known is bracket)

    def is_stepping(self) -> bool:
        """Whether an optimizer is in the middle of a step."""
        return any(bracket.stepping for bracket in self.brackets)

    def updates(self) -> int:
        """Updates that happened, or of which a fused optimizer has not told yet that they did
        not."""
        return self._steps_of_gone + sum(b.steps + b.unsettled for b in self._leading)

    def _listen(self, index: int) -> None:
        bracket, optimizer = self.brackets[index], self.optimizers[index]
        removers = [bracket.add(Phase.RESOLVE, self._listener.resolve)]
        bracket.on_refusal = partial(self._refuse_acting, bracket)
        self.return_checks.pop(index, None)
        if steps_in_two_phases(self.outers[index]):
            check = ReturnCheck(
                self.outers[index],
                optimizer,
                lambda: self._weights.owned(optimizer),
                self._weights.name,
            )
            self.return_checks[index] = check
            removers.append(bracket.add(Phase.RESCALE, lambda step: check.stepped(), rank=LAST))
        self._removers[bracket] = removers

    def _refuse_acting(self, bracket: StepBracket, error: NotSupportedError) -> None:
        """A step turns out to be one that nothing may act in, after others were handled: the
        callbacks that only look go on."""
        index = self.number_of(bracket)
        for member in self._members:
            if index in member.plans and not member.acts_around_steps:
                member.refuse(index, error, first=False)

    def check_return(self, index: int) -> None:
        """Refuse an optimizer in two phases whose inner step is not all that moves its weights."""
        check = self.return_checks.get(index)
        error = None if check is None else check.refusal()
        if error is None:
            return
        if index not in self.replaced:
            raise error
        for member in self._members:
            member.refuse(index, error, first=False)

    # -- optimizers that come during the fit
    # ------------------------------------------------------------------

    def check_new_optimizers(self) -> None:
        """Say which of the optimizers that have come since the last batch cannot be handled: nobody
        may be told when they step."""
        present = self._trainer.optimizers
        if len(present) == len(self._followed) and all(map(is_, present, self._followed)):
            return
        for optimizer in present:
            if not any(optimizer is known for known in self._followed):
                self._supported(without_framework(optimizer))
        self._followed = list(present)

    def follow(self, optimizer: Optimizer) -> None:
        """``optimizer``, which nobody has bracketed, is about to step: go on with it if it has
        taken the place of another."""
        held = self._held()
        for outer in held:
            if id(outer) in self.known and id(optimizer) != id(outer):
                continue
            parts = self._supported(outer)
            if not any(optimizer is part or optimizer is outer for part in parts):
                continue
            self.known.add(id(outer))
            listed = held[: len(self._trainer.optimizers)]
            gone = [i for i, o in enumerate(self.outers) if not any(o is h for h in listed)]
            # Of several that were replaced at once, the one in the same place.
            gone.sort(key=lambda i: not (i < len(listed) and listed[i] is outer))
            for part in parts:
                self._take_up(part, outer, gone.pop(0) if gone else len(self.optimizers))
            return

    def _held(self) -> list[Any]:
        """The optimizers that Lightning holds now, each as a person has made it."""
        # Automatic optimization steps the wrapped ones; an entry of strategy.optimizers that was
        # exchanged alone is stepped by hand only.
        held = [*self._trainer.strategy.optimizers, *wrapped_optimizers(self._trainer)]
        return [without_framework(optimizer) for optimizer in held]

    def _supported(self, optimizer: Any) -> list[Optimizer]:
        """What steps when ``optimizer`` does; nothing, with a word, if that cannot be handled."""
        try:
            parts = torch_optimizers(optimizer)
            for part in parts:
                check_optimizer(part)
        except NotSupportedError as error:  # training goes on without us
            self.known.add(id(optimizer))
            self._left_alone.append(optimizer)
            self._listener.note(
                f"Nothing acts on the steps of {type(optimizer).__name__}, which came during the "
                f"fit, or measures them: {error}"
            )
            return []
        return parts

    def _take_up(self, optimizer: Optimizer, outer: Any, index: int) -> None:
        """From its next step on ``optimizer`` is number ``index``: what was counted for its
        predecessor goes on."""
        self.replaced.add(index)
        bracket, kind = StepBracket.of(optimizer), type(outer).__name__
        if index < len(self.optimizers):
            before = type(self.outers[index]).__name__
            self._let_go(index, bracket)
            self.optimizers[index], self.outers[index] = optimizer, outer
            self.brackets[index] = bracket
            text = f"{before} was replaced by another {kind}"
        else:
            for member in self._members:
                member.replace_optimizer(index, None, bracket)
            self.optimizers.append(optimizer)
            self.outers.append(outer)
            self.brackets.append(bracket)
            text = f"{kind} has joined the optimizers"
        self.known.add(id(optimizer))
        if not steps_in_two_phases(outer):
            self._leading.append(bracket)
        self._listener.optimizer_came(index)
        self._listen(index)
        steps = max((member.steps_of(index) for member in self._members), default=0)
        show(
            self._trainer,
            f"lightning-normdyn: {text} after {steps} steps. The callbacks go on with it, and go "
            f"on counting.",
        )

    def _let_go(self, index: int, successor: StepBracket) -> None:
        """Another optimizer takes the place of number ``index``."""
        bracket = self.brackets[index]
        self.known -= {id(self.outers[index]), id(bracket.optimizer)}
        bracket.settle()
        if any(bracket is leading for leading in self._leading):
            self._leading = [leading for leading in self._leading if leading is not bracket]
            self._steps_of_gone += bracket.steps
        for member in self._members:
            member.replace_optimizer(index, bracket, successor)
        for remove in self._removers.pop(bracket, []):
            remove()


__all__ = ["Attachment", "Listener"]
