"""Where the history of one fit is written: a file beside the log of each logger, never in the place
of another fit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isnan
from pathlib import Path

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.storage import Location, exists, join


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
            taken: list[str] = []
            while exists(self._numbered(len(taken) + 1)):
                taken.append(self._numbered(len(taken) + 1))
            free = self._numbered(len(taken) + 1)
            # The newest first: fits that were repeated from the same start begin with the same row.
            own = None
            # A fit from the start with the same seed has the same first row, but is another fit.
            if self.continued:
                own = next((name for name in reversed(taken) if continues(name)), None)
            self._chosen[folder] = own or free
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
    same_keys = one.keys() == other.keys()
    return same_keys and all(
        one[key] == other[key] or (isnan(one[key]) and isnan(other[key])) for key in one
    )


__all__ = ["HistoryFiles"]
