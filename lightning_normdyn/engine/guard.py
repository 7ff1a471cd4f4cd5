"""Ends the watch of a forward pass whatever goes wrong in it."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_normdyn.engine.lightning_facts import callbacks_of, set_callbacks


class Guard(Callback):
    """Stands first among the Trainer's callbacks while a forward pass is watched.

    Watching sets switches of the whole process. Another callback's ``on_exception`` may raise, and
    what stands behind it in the list is then never called.

    Args:
        stop: ends the watch; a method, held weakly, since the Trainer holds this callback.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = WeakMethod(stop)

    def stand_first(self, trainer: Trainer) -> None:
        """Put it in front of the Trainer's list."""
        callbacks = callbacks_of(trainer)
        if self not in callbacks:
            # Another list, not a change of this one: Lightning may be going through it right now.
            set_callbacks(trainer, [self, *callbacks])

    def leave(self, trainer: Trainer) -> None:
        """Take it out of the list again; idempotent."""
        callbacks = callbacks_of(trainer)
        if self in callbacks:
            set_callbacks(trainer, [c for c in callbacks if c is not self])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Before any other callback's."""
        self._end()

    def teardown(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        """Before any other callback's; where the tuner ends a fit, it is all that is called."""
        self._end()

    def _end(self) -> None:
        stop = self._stop()
        if stop is not None:
            stop()
