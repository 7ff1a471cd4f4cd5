"""The x axis of curves: as Lightning's loggers count it, and as a run without interruption
would."""

from collections.abc import Sequence
from typing import Any

from .flavours import Trainer
from .lightning_facts import accumulates_batch, batches_that_stepped, log_every


class Clock:
    """Where a fit stands.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # From Lightning's count of batches to that of a run without interruption.
        self._shift = 0
        self._last_ended = -1  # Lightning's count at the newest end of a batch

    @property
    def now(self) -> int:
        """Batches that stepped before this one, over resumes."""
        return batches_that_stepped(self._trainer) + self._shift

    @property
    def logging_step(self) -> int:
        """How many logging steps the Trainer has come to with this batch; 0 if it does not log."""
        every = log_every(self._trainer)
        return (self.now + 1) // every if every else 0

    @property
    def is_inside_batch(self) -> bool:
        """Whether a batch is being trained on; a fit that resumes from here trains on it again."""
        return bool(self._batch.processed < self._batch.ready)

    @property
    def is_last(self) -> bool:
        """Whether the fit is planned to end with this batch."""
        trainer = self._trainer
        if trainer.max_steps != -1:
            # Lightning counts a step of each optimizer.
            after = trainer.global_step + len(trainer.optimizers)
            if after >= trainer.max_steps:
                return True
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        return bool(is_last_epoch and trainer.is_last_batch)

    @property
    def _batch(self) -> Any:
        """Lightning's counts of this epoch's batches: ready, started, processed, completed."""
        return self._trainer.fit_loop.epoch_loop.batch_progress.current

    def end_batch(self) -> int:
        """The hooks of a batch's end are being called; Lightning counts it only after them.

        Returns:
            Lightning's count of batches that stepped before this one.
        """
        self._last_ended = batches_that_stepped(self._trainer)
        return self._last_ended

    def position(self) -> list[int]:
        """For a checkpoint: ``now`` of the next batch to be trained on, as a run without
        interruption counts it, and Lightning's count."""
        batch, counted = self._batch, batches_that_stepped(self._trainer)
        # Lightning counts a batch only after the hooks of its end and after a validation that
        # follows it.
        is_counted = batch.processed == batch.completed and counted != self._last_ended
        is_owed = (
            batch.ready > 0
            and not self.is_inside_batch
            and not is_counted
            and not accumulates_batch(self._trainer)
        )
        return [self.now + is_owed, counted]

    def go_on_from(self, position: Sequence[int]) -> bool:
        """Count on from the `position` of a checkpoint, from the first batch on.

        Returns:
            False where the loops were not restored with it: then their own count is right.
        """
        following, counted = position
        restored = batches_that_stepped(self._trainer)
        # Depending on the hook in which the checkpoint was saved, Lightning itself counts one batch
        # twice or not at all.
        if restored - counted not in (0, 1):
            return False
        self._shift = following - restored
        return True
