"""The size of gradients at the rows of a run, averaged so far that the noise of single batches is
not taken for the course of a norm. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np

from .by_weight import Doubles, Ints, Places

FEWEST_ROWS = 5
"""Rows over which a measured size of the gradients or of the steps is averaged: of single ones the
noise would be taken for the course of the norm."""

MOST_ROWS = 20
"""The same, at most, where steps are divided by the mean size of many gradients. There the course
follows the ratio of the present size to that mean, and most of what an average over more rows is
late by is in both of them."""

MOST_ERROR = 0.1
"""Relative standard error of an averaged size, above which more rows are taken: gradients may come
in bursts, and then a few rows say little."""


class Sizes(NamedTuple):
    """The newest sizes of many weights.

    Args:
        table: ``(k, w)``, from old to new; the newest stand last.
        counts: ``(w,)``, how many of the ``k`` there are.
    """

    table: Doubles
    counts: Ints

    @classmethod
    def from_values(cls, values: Sequence[Sequence[float]], most: int) -> Sizes:
        """Of each weight at most so many, as `of` gave them."""
        table = np.full((most, len(values)), nan, dtype=np.float64)
        counts = np.zeros(len(values), dtype=np.int64)
        for place, of_weight in enumerate(values):
            newest = of_weight[-most:]
            counts[place] = len(newest)
            table[most - len(newest) :, place] = newest
        return cls(table, counts)

    def of(self, place: int) -> tuple[float, ...]:
        """Those of one weight."""
        start = len(self.table) - int(self.counts[place])
        return tuple(self.table[start:, place].tolist())

    def at(self, weights: Places) -> Sizes:
        """Those of some weights."""
        return Sizes(self.table[:, weights], self.counts[weights])

    def copy(self) -> Sizes:
        """The same, to be written to."""
        return Sizes(self.table.copy(), self.counts.copy())

    def none(self) -> Sizes:
        """Of as many weights, none yet."""
        return Sizes(np.full_like(self.table, nan), np.zeros_like(self.counts))

    def put(self, weights: Places, sizes: Sizes) -> None:
        """Write those of some weights; only before anybody else has seen these."""
        self.table[:, weights] = sizes.table
        self.counts[weights] = sizes.counts

    def with_one_more(self, sizes: Doubles) -> Sizes:
        """With one more of each, ``(w,)``; 0 (no gradient at all) and what is not finite are none.

        Example:
            >>> known = Sizes.from_values([(1.0, 2.0), (1.0, 2.0)], most=3)
            >>> more = known.with_one_more(np.array([3.0, 0.0]))
            >>> more.of(0), more.of(1)
            ((1.0, 2.0, 3.0), (1.0, 2.0))
        """
        are_sizes = (sizes > 0) & np.isfinite(sizes)
        table = np.concatenate([self.table[1:], sizes[None]])
        counts = np.minimum(self.counts + are_sizes, len(table))
        # Mostly all are, and 20 numbers of each weight need not be chosen.
        if not are_sizes.all():
            table = np.where(are_sizes, table, self.table)
        return Sizes(table, counts)

    def means(self) -> Doubles:
        """``(w,)``, of all that are kept of each; NaN of none."""
        found = np.full(len(self.counts), nan, dtype=np.float64)
        for count in np.unique(self.counts[self.counts > 0]).tolist():
            weights = self.counts == count
            found[weights] = self.table[-count:, weights].mean(0)
        return found


def averages(sizes: Sizes, most: int) -> Doubles:
    """The means of as many of the newest sizes as make them sure.

    Args:
        sizes: of each weight at least one.
        most: the number that it is never more than; at least `FEWEST_ROWS`.

    Returns:
        ``(weights,)``.

    Example:
        >>> of_weights = [(7.0, 1.0, 1.01, 0.99, 1.0, 1.0), (9.0, 8.0, 7.0, 6.0, 5.0, 4.0)]
        >>> averages(Sizes.from_values(of_weights, 20), most=5).tolist()  # one falls evenly
        [1.0, 6.0]
        >>> averages(Sizes.from_values([(16.0, 1.0, 1.0, 1.0, 1.0, 1.0), (2.0,)], 20), 20).tolist()
        [3.5, 2.0]
    """
    # Of all weights at once that have as many rows: nearly always that is all of them.
    length = int(sizes.counts[0])
    if (sizes.counts == length).all():
        return _averages_of(sizes.table[-length:], most)
    found = np.empty(len(sizes.counts), dtype=np.float64)
    for length in np.unique(sizes.counts).tolist():
        weights = sizes.counts == length
        found[weights] = _averages_of(sizes.table[-length:, weights], most)
    return found


def _averages_of(table: Doubles, most: int) -> Doubles:
    """From ``(rows, weights)`` sizes the average of each weight."""
    if len(table) < 2:
        newest: Doubles = table[-1]
        return newest
    # A size that is too far from the others makes infinities, and then the longest average.
    with np.errstate(all="ignore"):
        # In units of the newest: squares of the sizes themselves may be no numbers any more.
        shares = table / table[-1]
        # Of all that is known, since between two bursts the newest rows alone look steady; and
        # between neighbours, since a size that falls evenly does not scatter.
        squares = np.square(shares[1:] - shares[:-1])
        variance = squares.mean(0) / 2 / np.square(shares.mean(0))
        rows = variance / MOST_ERROR**2
        # A variance that is no number is none that few rows would do for.
        rows = np.where(rows <= most, np.maximum(rows, FEWEST_ROWS), most)
    counts = np.minimum(np.rint(rows).astype(np.int64), len(table))
    count = int(counts[0])
    if (counts == count).all():
        alike: Doubles = table[-count:].mean(0)
        return alike
    means = np.empty(table.shape[1], dtype=np.float64)
    for count in np.unique(counts).tolist():
        means[counts == count] = table[-count:, counts == count].mean(0)
    return means


__all__ = ["FEWEST_ROWS", "MOST_ROWS", "Sizes", "averages"]
