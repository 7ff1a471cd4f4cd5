"""Which weights loggers get `norm_drift` of, because there is nothing to hold their angle against.

Loggers get five numbers of each weight. Four are always there. The fifth says whether the weight
turns as it should: `expected_ratio`, or `balance_ratio` where nothing is expected. A balance is
shown once it is known to 10 %, which small matrices never come to in a short fit, and a weight that
nothing decays has none at all. How fast the norm moves can be said of these, too.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_normdyn.engine.flavours import Trainer

from .history import History
from .horizon import horizon_of

__all__ = ["StandIns"]


class StandIns:
    """The choice for each weight of one fit, on rank zero. Once made, it stays: of two charts, one
    would break off where the other begins.

    Nothing of it is in a checkpoint: after a resume, the same rows lead to the same choices.

    Args:
        trainer: of the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # Weights that it is decided of, and those among them that have a stand-in.
        self._decided: set[str] = set()
        self._chosen: set[str] = set()
        self._has_begun = False
        # The step in the middle of the run; None where nobody knows how far it goes.
        self._middle: float | None = None

    def after(self, step: int, values: Mapping[str, float], history: History) -> set[str]:
        """The weights that have a stand-in, now that a row is recorded.

        Args:
            step: of the row.
            values: the row, by log key.
            history: all rows so far, this one included.
        """
        if not self._has_begun:
            self._has_begun = True
            to_come = horizon_of(self._trainer, len(self._trainer.optimizers)).steps
            if to_come is not None:
                self._middle = (step + 1 + to_come) / 2
        for key in values:
            if key.startswith("norm_drift/"):
                name = key.removeprefix("norm_drift/")
                if name not in self._decided:
                    self._decide(name, step, values, history)
        return self._chosen

    def _decide(self, name: str, step: int, values: Mapping[str, float], history: History) -> None:
        """Decide of a weight, if it is time to."""
        if history.has(f"expected_ratio/{name}"):
            self._decided.add(name)
            return
        # At a learning rate of 0 nothing has a pull, whatever decays it at others.
        if values.get(f"effective_lr/{name}") == 0:
            return
        is_decayed = values.get(f"pull/{name}", 0.0) > 0
        if not is_decayed and not (history.curve(f"pull/{name}")[1] > 0).any():
            self._decided.add(name)
            self._chosen.add(name)
            return
        # In the first half, a balance that is not there may be on its way.
        if self._middle is None or step < self._middle:
            return
        known_at, _ = history.curve(f"balance_ratio/{name}")
        # One that came later was too late before a resume as well.
        is_in_time = len(known_at) > 0 and bool(known_at[0] < self._middle)
        self._decided.add(name)
        if not is_in_time:
            self._chosen.add(name)
