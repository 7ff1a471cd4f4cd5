"""The files of a fit's history: beside the log of each logger, and one by which it comes back from
the processes that a Trainer starts by ``ddp_spawn``, ``ddp_fork`` or ``ddp_notebook``.

Such a Trainer trains in processes of its own, each with a copy of the callbacks. Lightning brings
back the weights and the metrics and nothing else, so the caller's monitor would look as if it had
never seen a fit.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lightning_normdyn.engine.flavours import Trainer
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.storage import Location, exists, join

from .history import History, load_history


class HistoryFiles:
    """Where the history of one fit lies: one file beside the log of each logger, never in the place
    of another fit's.

    A run may be fitted twice, and a script run again into the same folder. The second fit's file
    then has a number. A fit that goes on from a checkpoint goes on in the file of the fit that it
    continues, which is the one that begins with the same row.

    Args:
        label: as in `Outcome`.
        continued: whether this fit goes on from a checkpoint that held a history.
    """

    def __init__(self, label: str = "", *, continued: bool = False) -> None:
        self.label = label
        self.continued = continued
        self._chosen: dict[str, str] = {}

    def name(
        self,
        folder: str,
        exists: Callable[[str], bool],
        continues: Callable[[str], bool],
    ) -> str:
        """The file's name in ``folder``, chosen at the first call and kept from then on.

        Args:
            folder: what tells the places of several loggers apart.
            exists: whether there is a file of a name.
            continues: whether this fit continues the one whose file has a name.
        """
        # Chosen once: after the first save the file exists and would pass for another fit's.
        if folder not in self._chosen:
            taken = list(takewhile(exists, map(self._numbered, count(1))))
            own = None
            # A fit from the start with the same seed has the same first row, but is another fit.
            if self.continued:
                # The newest: fits that were repeated from the same start begin with the same row.
                own = next(filter(continues, reversed(taken)), None)
            self._chosen[folder] = own or self._numbered(len(taken) + 1)
        return self._chosen[folder]

    def place(self, folder: Location, history: History) -> str | Path:
        """The file of this fit in a folder or at a URL."""

        def continues(name: str) -> bool:
            try:
                earlier = load_history(join(folder, name))
            # A file that cannot be read is no reason to lose this history: it gets another name.
            except NormDynError:
                return False
            # Thinning never drops the first row; any later one may be missing in either history.
            return len(earlier) > 0 and _same_row(earlier[0], history[0])

        name = self.name(str(folder), lambda name: exists(join(folder, name)), continues)
        return join(folder, name)

    def _numbered(self, number: int) -> str:
        return f"history{self.label}.npz" if number == 1 else f"history{self.label}.fit{number}.npz"


def _same_row(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two rows hold the same numbers under the same keys; NaN is the same as NaN."""
    if one.keys() != other.keys():
        return False
    return np.array_equal([*one.values()], [other[key] for key in one], equal_nan=True)


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

    @property
    def own_history(self) -> History:
        """As `history`, for one who records in this very process: looking for what another one may
        have sent asks the file system."""
        return self._history

    def send_history(self, trainer: Trainer) -> None:
        """Rank zero of processes that the Trainer started: send the history to the process that
        called ``fit``."""
        if trainer.is_global_zero:
            self._mailbox.send(self._history)
