"""Averages over the vectors of each weight, made of the sums of one measured step: of all weights
at once, since Python takes ten times as long for each of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .quantities import QUANTITIES


class Averages:
    """The averages of all weights of one measured step.

    Args:
        names: what was measured, in the order of the sums. What no logger gets has no entry in the
            table of quantities, and is averaged as it is.
        totals: ``(k, w)``, sums over the vectors of each weight.
        counts: ``(k, w)``, over how many vectors.

    Attributes:
        are_finite: for each weight whether all of its averages are numbers.

    Example:
        >>> sums = np.array([[6.0, 8.0], [8.0, 0.0]])
        >>> averages = Averages(["weight_norm", "angular_update"], sums, np.array([[2, 2], [2, 0]]))
        >>> averages.of(0), averages.of(1)
        ({'weight_norm': 3.0, 'angular_update': 2.0}, {'weight_norm': 4.0})
    """

    def __init__(
        self,
        names: Sequence[str],
        totals: NDArray[np.float64],
        counts: NDArray[np.float64],
    ) -> None:
        self._names = list(names)
        with np.errstate(all="ignore"):
            means = totals / counts
            for row, name in enumerate(names):
                if name in QUANTITIES and QUANTITIES[name].average == "rms":
                    means[row] = np.sqrt(np.maximum(totals[row], 0.0) / counts[row])
        # A count of 0: no vector had a gradient, or none has a number. Then there is no key at all,
        # because a NaN would say that the run has diverged.
        is_there = counts != 0
        self.are_finite: list[bool] = (np.isfinite(means) | ~is_there).all(0).tolist()
        # Lists, by weight: a number of an array is read ten times as slowly.
        self._are_all_there: list[bool] = is_there.all(0).tolist()
        self._means: list[list[float]] = means.T.tolist()
        self._is_there: list[list[bool]] = is_there.T.tolist()
        self._totals: list[list[float]] = totals.T.tolist()
        self._counts: list[list[float]] = counts.T.tolist()

    def of(self, weight: int) -> dict[str, float]:
        """By name, the averages of the weight at this position, as far as they are there."""
        pairs = zip(self._names, self._means[weight], strict=True)
        if self._are_all_there[weight]:
            return dict(pairs)
        is_there = self._is_there[weight]
        return {name: mean for (name, mean), there in zip(pairs, is_there, strict=True) if there}

    def total_of(self, name: str, weight: int) -> float:
        """The sum of ``name`` over the vectors of a weight."""
        return self._totals[weight][self._names.index(name)]

    def sums_of(self, weight: int) -> dict[str, tuple[float, float]]:
        """By name, total and count over the vectors of a weight."""
        pairs = zip(self._totals[weight], self._counts[weight], strict=True)
        return dict(zip(self._names, pairs, strict=True))
