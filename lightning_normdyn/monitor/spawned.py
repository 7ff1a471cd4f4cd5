"""A history that comes back from the processes that a Trainer starts by ``ddp_spawn``, ``ddp_fork``
or ``ddp_notebook``.

Such a Trainer trains in processes of its own, each with a copy of the callbacks. Lightning brings
back the weights and the metrics and nothing else, so the caller's monitor would look as if it had
never seen a fit.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch import Trainer

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History, load_history


class _Mailbox:
    """A file by which a child process sends one history to the process that made the mailbox.

    A file, and no queue, because nobody waits for it: the caller may look at once, much later, or
    never. Its name cannot be guessed.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.path = Path(tempfile.gettempdir()) / f"lightning-normdyn-{uuid4().hex}.npz"
        weakref.finalize(self, _remove, self.path, self.owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mailbox:
        """A copy of a callback is another callback, whose history is its own."""
        return _Mailbox()

    def send(self, history: History) -> None:
        """In a process that the owner started: leave the history for it. Elsewhere nothing
        happens."""
        # A process of a launcher made this mailbox itself: its history is where it is looked for.
        parent = multiprocessing.parent_process()
        if os.getpid() != self.owner and parent is not None and parent.pid == self.owner:
            history.save(self.path)

    def receive(self) -> History | None:
        """In the owner's process: what a child sent since the last call."""
        if os.getpid() != self.owner or not self.path.exists():
            return None
        try:
            return load_history(self.path)
        # Another thread was faster.
        except NormDynError:
            return None
        # Whether it could be read or not: nobody else tidies up the temporary folder.
        finally:
            self.path.unlink(missing_ok=True)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy goes away long before the owner has looked
        path.unlink(missing_ok=True)


class KeepsHistory:
    """Part of a callback that keeps a `History`; stands behind `NormDynCallback` in the list of
    bases.

    A subclass calls `send_history` when a fit has ended or was interrupted.
    """

    def __init__(self) -> None:
        self._history = History()
        self._mailbox = _Mailbox()

    @property
    def history(self) -> History:
        """The rows of the last fit, on rank zero; after ``ddp_spawn`` or ``ddp_fork`` those that
        came back from there."""
        returned = self._mailbox.receive()
        if returned is not None:
            self._history = returned
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        self._history = history

    def send_history(self, trainer: Trainer) -> None:
        """Rank zero of processes that the Trainer started: send the history to the process that
        called ``fit``."""
        if trainer.is_global_zero:
            self._mailbox.send(self._history)


__all__ = ["KeepsHistory"]
