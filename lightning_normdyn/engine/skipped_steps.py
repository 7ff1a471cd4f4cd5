"""How many updates a gradient scaler has skipped: attempts that Lightning announced and no bracket
saw."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_normdyn.engine.attachment import Attachment
from lightning_normdyn.engine.weights import held_by
from lightning_normdyn.geometry.placement import has_gradient
from lightning_normdyn.optimizers.views import accumulates, torch_optimizers
from lightning_normdyn.optimizers.wrappers import steps_in_two_phases, without_framework


class Attempts:
    """Counts the updates that were about to happen.

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
        brackets = self._attachment.brackets
        is_second = any(b.stepping and b.evaluations > 1 for b in brackets)
        if is_second or steps_in_two_phases(without_framework(optimizer)):
            return
        weights = (p for part in torch_optimizers(optimizer) for p in held_by(part))
        accumulating = accumulates(self._trainer.strategy.model)
        is_attempt = not accumulating and any(map(has_gradient, weights))
        self.count += is_attempt
        self._updates_before = self._attachment.updates() if is_attempt else -1
        self._batch_of_newest = self._progress.total.ready
        for bracket in brackets:
            bracket.close_in()

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
