"""The size of gradients at the rows of a run, averaged so far that the noise of single batches is
not taken for the course of a norm. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

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


def with_one_more(sizes: tuple[float, ...], size: float) -> tuple[float, ...]:
    """The newest sizes and one more; 0 (no gradient at all) and what is not finite are none.

    Example:
        >>> with_one_more((1.0, 2.0), 3.0), with_one_more((1.0, 2.0), 0.0)
        ((1.0, 2.0, 3.0), (1.0, 2.0))
    """
    if not (size > 0 and isfinite(size)):
        return sizes
    return (*sizes, size)[-MOST_ROWS:]


def averages(sizes: Sequence[Sequence[float]], most: int) -> Doubles:
    """The means of as many of the newest sizes as make them sure.

    Args:
        sizes: of each weight, from old to new, at least one.
        most: the number that it is never more than; at least `FEWEST_ROWS`.

    Returns:
        ``(weights,)``.

    Example:
        >>> averages([[7.0, 1.0, 1.01, 0.99, 1.0, 1.0]], most=5).tolist()
        [1.0]
        >>> averages([[16.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2.0]], most=20).tolist()
        [3.5, 2.0]
        >>> averages([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]], most=20).tolist()  # falls, does not scatter
        [6.0]
    """
    found = np.empty(len(sizes), dtype=np.float64)
    # Of all weights at once that have as many rows: nearly always that is all of them.
    for length in set(map(len, sizes)):
        places = [i for i, of_weight in enumerate(sizes) if len(of_weight) == length]
        table = np.array([sizes[i] for i in places], dtype=np.float64)
        found[places] = _averages_of(table, most)
    return found


def _averages_of(table: Doubles, most: int) -> Doubles:
    """From ``(weights, rows)`` sizes the average of each weight."""
    if table.shape[1] < 2:
        newest: Doubles = table[:, -1]
        return newest
    # A size that is too far from the others makes infinities, and then the longest average.
    with np.errstate(all="ignore"):
        # In units of the newest: squares of the sizes themselves may be no numbers any more.
        shares = table / table[:, -1:]
        # Of all that is known, since between two bursts the newest rows alone look steady; and
        # between neighbours, since a size that falls evenly does not scatter.
        squares = np.square(np.diff(shares))
        variance = squares.mean(1) / 2 / np.square(shares.mean(1))
        rows = np.clip(np.nan_to_num(variance / MOST_ERROR**2, nan=inf), FEWEST_ROWS, most)
    counts = np.minimum(np.rint(rows).astype(np.int64), table.shape[1])
    means = np.empty(len(table), dtype=np.float64)
    for count in np.unique(counts).tolist():
        means[counts == count] = table[counts == count, -count:].mean(1)
    return means


__all__ = ["FEWEST_ROWS", "MOST_ROWS", "averages", "with_one_more"]
