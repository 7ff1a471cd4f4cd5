"""Averages over the vectors of each weight, made of the sums of one measured step: of all weights
at once, since Python takes ten times as long for each of them."""

from collections.abc import Sequence
from math import nan

import numpy as np

from .by_weight import Doubles, Flags
from .quantities import QUANTITIES


class Averages:
    """The averages of all weights of one measured step.

    Args:
        names: what was measured, in the order of the sums. What no logger gets has no entry in the
            table of quantities, and is averaged as it is.
        totals: ``(k, w)``, sums over the vectors of each weight.
        counts: ``(k, w)``, over how many vectors.

    Attributes:
        means: ``(k, w)``.
        are_there: ``(k, w)``. Where no vector had a gradient, or none has a number, there is no
            average: a NaN would say that the run has diverged.

    Example:
        >>> sums = np.array([[6.0, 8.0], [8.0, 0.0]])
        >>> averages = Averages(["weight_norm", "angular_update"], sums, np.array([[2, 2], [2, 0]]))
        >>> averages.of("weight_norm"), averages.has("angular_update")
        (array([3., 4.]), array([ True, False]))
    """

    def __init__(self, names: Sequence[str], totals: Doubles, counts: Doubles) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._totals = totals
        self._counts = counts
        with np.errstate(all="ignore"):
            self.means = totals / counts
            for name, row in self._rows.items():
                if name in QUANTITIES and QUANTITIES[name].average == "rms":
                    self.means[row] = np.sqrt(np.maximum(totals[row], 0.0) / counts[row])
        self.are_there: Flags = counts != 0
        # Nearly always; then nothing has to be chosen.
        self._all_are_there = bool(self.are_there.all())

    @property
    def are_finite(self) -> Flags:
        """``(w,)``, whether all averages of a weight are numbers."""
        finite = np.isfinite(self.means)
        if not self._all_are_there:
            finite |= ~self.are_there
        return np.asarray(finite.all(0))

    def has(self, name: str) -> Flags:
        """``(w,)``, which weights have an average of a quantity; none where it was not measured."""
        if name not in self._rows:
            return np.zeros(self.means.shape[1], dtype=np.bool_)
        there: Flags = self.are_there[self._rows[name]]
        return there

    def of(self, name: str, otherwise: float = nan) -> Doubles:
        """``(w,)``, the averages of a quantity; ``otherwise`` where there is none."""
        if name not in self._rows:
            return np.full(self.means.shape[1], otherwise, dtype=np.float64)
        row = self._rows[name]
        means: Doubles = self.means[row]
        return means if self._all_are_there else np.where(self.are_there[row], means, otherwise)

    def totals_of(self, name: str) -> Doubles:
        """``(w,)``, the sums of a quantity over the vectors of each weight."""
        totals: Doubles = self._totals[self._rows[name]]
        return totals

    def counts_of(self, name: str) -> Doubles:
        """``(w,)``, over how many vectors they are."""
        counts: Doubles = self._counts[self._rows[name]]
        return counts

    def sums_of(self, weight: int) -> dict[str, tuple[float, float]]:
        """By name, total and count over the vectors of one weight."""
        pairs = zip(self._totals[:, weight].tolist(), self._counts[:, weight].tolist(), strict=True)
        return dict(zip(self._rows, pairs, strict=True))
