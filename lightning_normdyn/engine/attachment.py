"""Which optimizers step in a fit, and a bracket around each of them: also around those that take
the place of others while the fit is running. And which of their announced steps were skipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.placement import any_gradient
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_optimizer
from lightning_normdyn.optimizers.step import Bracket, Phase, Step
from lightning_normdyn.optimizers.views import accumulates, torch_optimizers
from lightning_normdyn.optimizers.wrappers import steps_in_two_phases, without_framework

from .flavours import Trainer
from .lightning_facts import wrapped_optimizers
from .member import Member
from .messages import show, warn_once
from .weights import Layout, LayoutReader, Weights, held_by

# The rank of what comes after whatever callbacks do in a phase.
LAST = 1000


class ReturnCheck:
    """Whether the step of an optimizer in two phases can be seen at all.

    SAM and its like take the gradient at other weights than those that they step from. Their step
    is the inner optimizer's only if they bring the weights back before it and leave them alone
    after it. Nothing announces that, so the weights' places are compared once, around the first
    step.

    Args:
        outer: the optimizer in two phases.
        inner: the optimizer that steps inside it.
        weights: of the network.
    """

    def __init__(
        self,
        outer: Any,
        inner: Optimizer,
        weights: Weights,
    ) -> None:
        self._outer, self._inner, self._weights = outer, inner, weights
        self._places: list[tuple[Tensor, Tensor]] = []
        self.has_stepped = False

    def begin_batch(self) -> None:
        """Before the first step: the weights must be back here when the inner optimizer steps."""
        if not self.has_stepped:
            self._remember()

    def stepped(self) -> None:
        """After the first step of the inner optimizer: the weights must still be here when the
        batch ends."""
        if not self.has_stepped:
            self.has_stepped = True
            self._remember()

    def refusal(self) -> NotSupportedError | None:
        """What speaks against this optimizer, judged by where its weights are now.

        Nothing is compared before the next call of `begin_batch` or `stepped`.
        """
        places, self._places = self._places, []
        for weight, place in places:
            if not _is_back(weight.detach(), place):
                outer, inner = type(self._outer).__name__, type(self._inner).__name__
                return NotSupportedError(
                    f"{outer} takes its gradient at other weights, and the step that {inner} makes "
                    f"inside it is not all that moves `{self._weights.name(weight)}`: it does not "
                    f"start where the weights were, or they are moved on after it. So the step of "
                    f"{outer} cannot be seen. Use a form that brings the weights back first and "
                    f"ends with the inner step."
                )
        return None

    def _remember(self) -> None:
        self._places = []
        for weight in self._weights.owned(self._inner):
            # A sharded weight cannot be compared without the other ranks.
            if weight.requires_grad and type(weight.data) is Tensor:
                self._places.append((weight, weight.detach().clone()))


def _is_back(weight: Tensor, before: Tensor) -> bool:
    """Whether a weight is where it was, but for the roundings of a way there and back."""
    distance = torch.linalg.vector_norm((weight - before).float())
    length = torch.linalg.vector_norm(before.float())
    return bool(distance <= 8 * torch.finfo(weight.dtype).eps * length)


@dataclass
class Attached:
    """One optimizer of a fit.

    Args:
        outer: what a person has made: the optimizer itself, or what steps through it.
        bracket: around the torch optimizer that steps.
        is_announced: whether Lightning announces its steps, so that skipped ones can be known.
        came_later: whether it came during the fit: then what is refused of it is no error.
        return_check: for one in two phases.
        removers: take the session's handlers away again.
        resolved_for: the verdicts and param groups that its plans were made for.
        steps_at_watch: of its bracket, when a forward pass was last watched.
        layout: reads which weights its param groups hold.
        optimizer: the torch optimizer that steps.
    """

    outer: Any
    bracket: StepBracket
    is_announced: bool
    came_later: bool
    return_check: ReturnCheck | None = None
    removers: list[Callable[[], None]] = field(default_factory=list)
    resolved_for: tuple[int, Layout] | None = None
    steps_at_watch: int = 0
    layout: LayoutReader = field(default_factory=LayoutReader)

    def __post_init__(self) -> None:
        self.optimizer: Optimizer = self.bracket.optimizer

    def detach(self) -> None:
        """Leave no handler behind; idempotent."""
        for remove in self.removers:
            remove()
        self.removers = []


def made_as(outer: Any, entries: Sequence[Attached]) -> list[Attached]:
    """What steps when ``outer`` does, the optimizer that a person has made; nothing for one that is
    not bracketed."""
    return [entry for entry in entries if entry.outer is outer]


class Attachment:
    """The optimizers of one fit, by the number that plans and checkpoints know them by.

    Args:
        trainer: of the fit.
        weights: of the network.
        members: the callbacks that act in the steps.
        resolve: called when a step is about to happen.
        note: told what a person should know, now and at the end.

    Attributes:
        entries: the optimizers that step. DeepSpeed steps an optimizer in parts, which are several
            here.
    """

    def __init__(
        self,
        trainer: Trainer,
        weights: Weights,
        members: Sequence[Member],
        resolve: Callable[[Step], None],
        note: Callable[[str], None],
    ) -> None:
        self._trainer, self._weights, self._members = trainer, weights, members
        self._resolve, self._note = resolve, note
        self.entries: list[Attached] = []
        # The Trainer's optimizers when they were last looked at.
        self._followed: list[Any] = []
        self._left_alone: list[Any] = []
        # Updates by optimizers that others have taken the place of.
        self._steps_of_gone = 0

    @property
    def brackets(self) -> list[StepBracket]:
        """One around each optimizer."""
        return [entry.bracket for entry in self.entries]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers that step."""
        return [entry.optimizer for entry in self.entries]

    def weights(self) -> list[Tensor]:
        """Weights of two or more dimensions that the optimizers hold."""
        weights = []
        for optimizer in self.optimizers:
            weights += self._weights.owned(optimizer)
        return weights

    def attach(self) -> None:
        """Bracket every optimizer of the fit; idempotent."""
        if self.entries:
            return
        self._followed = list(self._trainer.optimizers)
        for optimizer in self._followed:
            outer, parts = without_framework(optimizer), torch_optimizers(optimizer)
            for part in parts:
                self.entries.append(self._enter(part, outer, parts, came_later=False))

    def _enter(
        self,
        optimizer: Optimizer,
        outer: Any,
        parts: list[Optimizer],
        *,
        came_later: bool,
    ) -> Attached:
        bracket = StepBracket.of(optimizer)
        bracket.on_refusal = partial(self._refuse_acting, bracket)
        # Lightning does not hear of the steps of an optimizer in two phases, so none of them can be
        # known to have been skipped.
        in_two_phases = steps_in_two_phases(outer)
        is_announced = optimizer is parts[0] and not in_two_phases
        entry = Attached(outer, bracket, is_announced, came_later)
        entry.steps_at_watch = bracket.steps
        entry.removers.append(bracket.add(Phase.RESOLVE, self._resolve))
        if in_two_phases:
            check = ReturnCheck(outer, optimizer, self._weights)
            remover = bracket.add(
                Phase.RESCALE,
                lambda step: check.stepped(),
                rank=LAST,
                reads_gradients=lambda step: False,
            )
            entry.removers.append(remover)
            entry.return_check = check
        return entry

    def close(self) -> None:
        """Leave no hook behind; idempotent."""
        for entry in self.entries:
            entry.bracket.restore()
            # The fit may end in the middle of a step: leave no weight shrunk for an update that did
            # not come.
            try:
                entry.bracket.take_back()
            # A device may have failed; the error that ends the fit must come through.
            except Exception as error:
                warn_once(
                    f"What was done to weights for the step that failed could not be taken back: "
                    f"{type(error).__name__}: {error}"
                )
            entry.detach()

    def number_of(self, bracket: Bracket) -> int:
        """The number of the optimizer inside ``bracket``."""
        for index, entry in enumerate(self.entries):
            if entry.bracket is bracket:
                return index
        raise ValueError("a bracket of another fit")

    def is_stepping(self) -> bool:
        """Whether an optimizer is in the middle of a step."""
        return any(bracket.stepping for bracket in self.brackets)

    def updates(self) -> int:
        """Updates that happened, or of which a fused optimizer has not told yet that they did
        not."""
        updates = self._steps_of_gone
        for entry in self.entries:
            if entry.is_announced:
                updates += entry.bracket.steps + entry.bracket.unsettled
        return updates

    def _refuse_acting(
        self,
        bracket: StepBracket,
        error: NotSupportedError,
    ) -> None:
        """A step turns out to be one that nothing may act in, after others were handled: the
        callbacks that only look go on."""
        index = self.number_of(bracket)
        for member in self._members:
            if index in member.plans and not member.acts_around_steps:
                member.refuse(index, error, first=False)

    def check_return(self, index: int) -> None:
        """Refuse an optimizer in two phases whose inner step is not all that moves its weights."""
        entry = self.entries[index]
        error = None if entry.return_check is None else entry.return_check.refusal()
        if error is None:
            return
        if not entry.came_later:
            raise error
        for member in self._members:
            member.refuse(index, error, first=False)

    # -- optimizers that come during the fit
    # ------------------------------------------------------------------

    def knows(self, optimizer: Any) -> bool:
        """Whether the steps of ``optimizer`` are seen, or it was said that they are not."""
        for entry in self.entries:
            if optimizer is entry.optimizer or optimizer is entry.outer:
                return True
        return any(optimizer is other for other in self._left_alone)

    def check_new_optimizers(self) -> None:
        """Say which of the optimizers that have come since the last batch cannot be handled: nobody
        may be told when they step."""
        present = self._trainer.optimizers
        # By identity: two optimizers may be equal to each other.
        if len(present) == len(self._followed) and all(map(is_, present, self._followed)):
            return
        followed = set(map(id, self._followed))
        for optimizer in present:
            if id(optimizer) not in followed:
                self._supported(without_framework(optimizer))
        self._followed = list(present)

    def follow(self, optimizer: Optimizer) -> None:
        """``optimizer``, which nobody has bracketed, is about to step: go on with it if it has
        taken the place of another."""
        # Automatic optimization steps the wrapped ones; an entry of strategy.optimizers that was
        # exchanged alone is stepped by hand only.
        listed = list(map(without_framework, self._trainer.strategy.optimizers))
        for outer in [*listed, *map(without_framework, wrapped_optimizers(self._trainer))]:
            if self.knows(outer) and optimizer is not outer:
                continue
            parts = self._supported(outer)
            if optimizer is outer or any(optimizer is part for part in parts):
                self._take_up(parts, outer, listed)
                return

    def _supported(self, optimizer: Any) -> list[Optimizer]:
        """What steps when ``optimizer`` does; nothing, with a word, if that cannot be handled."""
        try:
            parts = torch_optimizers(optimizer)
            for part in parts:
                check_optimizer(part)
        except NotSupportedError as error:
            # Training goes on without us.
            self._left_alone.append(optimizer)
            self._note(
                f"Nothing acts on the steps of {type(optimizer).__name__}, which came during the "
                f"fit, or measures them: {error}"
            )
            return []
        return parts

    def _take_up(
        self,
        parts: list[Optimizer],
        outer: Any,
        listed: list[Any],
    ) -> None:
        """From their next step on ``parts`` have the numbers of those that are gone: what was
        counted for their predecessors goes on."""
        gone = []
        for index, entry in enumerate(self.entries):
            if not any(entry.outer is other for other in listed):
                gone.append(index)
        # Of several that were replaced at once, the one in the same place.
        gone.sort(key=lambda index: index >= len(listed) or listed[index] is not outer)
        for part in parts:
            entry = self._enter(part, outer, parts, came_later=True)
            index = gone.pop(0) if gone else len(self.entries)
            text = self._put(index, entry)
            steps = max((member.steps_of(index) for member in self._members), default=0)
            show(
                self._trainer,
                f"lightning-normdyn: {text} after {steps} steps. The callbacks go on with it, and "
                f"go on counting.",
            )

    def _put(
        self,
        index: int,
        entry: Attached,
    ) -> str:
        """Make it number ``index`` of the optimizers; returns that in words."""
        kind = type(entry.outer).__name__
        if index == len(self.entries):
            for member in self._members:
                member.replace_optimizer(index, None, entry.bracket)
            self.entries.append(entry)
            return f"{kind} has joined the optimizers"

        before = self.entries[index]
        before.bracket.settle()
        if before.is_announced:
            self._steps_of_gone += before.bracket.steps
        # While it is still in its place: its steps are counted now.
        for member in self._members:
            member.replace_optimizer(index, before.bracket, entry.bracket)
        before.detach()
        self.entries[index] = entry
        return f"{type(before.outer).__name__} was replaced by another {kind}"


class Attempts:
    """Counts the updates that were about to happen: those that Lightning announced and no bracket
    saw are the ones that a gradient scaler has skipped.

    Args:
        trainer: of the fit.
        attachment: its optimizers, which count the updates that did happen.

    Attributes:
        count: of attempts.
    """

    def __init__(self, trainer: Trainer, attachment: Attachment) -> None:
        self._trainer, self._attachment = trainer, attachment
        self.count = 0
        self._updates_before = 0  # before the newest attempt; -1 if it was none
        self._batch_of_newest = -1  # counted over the fit

    def announce(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, unless its scaler finds an inf or no weight has a
        gradient."""
        # An optimizer that takes two gradients in a step (SAM) has Lightning say so twice.
        entries = self._attachment.entries
        for entry in entries:
            if entry.bracket.evaluations > 1 and entry.bracket.stepping:
                return
        # What is known of it from when it was bracketed need not be found out in every step.
        attached = made_as(optimizer, entries)
        if not attached:
            optimizer = without_framework(optimizer)
            attached = made_as(optimizer, entries)
        if attached:
            in_two_phases = attached[0].return_check is not None
        else:
            in_two_phases = steps_in_two_phases(optimizer)
        if in_two_phases:
            return
        parts = [entry.optimizer for entry in attached] or torch_optimizers(optimizer)
        accumulating = accumulates(self._trainer.strategy.model)
        is_attempt = not accumulating and any(map(any_gradient, map(held_by, parts)))
        self.count += is_attempt
        self._updates_before = self._attachment.updates() if is_attempt else -1
        self._batch_of_newest = self._progress.total.ready
        for entry in entries:
            entry.bracket.close_in()

    def skipped(self) -> int:
        """Updates that a gradient scaler skipped in this fit."""
        # Not below 0: a raw optimizer.step() is an update that Lightning did not announce.
        return max(0, self.count - self._attachment.updates() - self._is_open())

    @property
    def _progress(self) -> Any:
        return self._trainer.fit_loop.epoch_loop.batch_progress

    def _is_open(self) -> bool:
        """Whether a step is being attempted right now: a checkpoint saved in the middle of it must
        not count it as skipped."""
        progress = self._progress
        is_of_this_batch = (
            self._batch_of_newest == progress.total.ready
            and progress.current.processed < progress.current.started
        )
        return is_of_this_batch and self._attachment.updates() == self._updates_before
