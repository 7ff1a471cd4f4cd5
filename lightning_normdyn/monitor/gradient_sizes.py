"""The size of gradients at the rows of a run, averaged so far that the noise of single batches is
not taken for the course of a norm. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from statistics import fmean

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


def averaged(sizes: Sequence[float], most: int) -> float:
    """The mean of as many of the newest sizes as make it sure.

    Args:
        sizes: from old to new, at least one.
        most: the number that it is never more than; at least `FEWEST_ROWS`.

    Example:
        >>> averaged([7.0, 1.0, 1.01, 0.99, 1.0, 1.0], most=5)
        1.0
        >>> averaged([16.0, 1.0, 1.0, 1.0, 1.0, 1.0], most=20)
        3.5
        >>> averaged([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], most=20)  # it falls, and does not scatter
        6.0
    """
    if len(sizes) < 2:
        return sizes[-1]
    # In units of the newest: squares of the sizes themselves may be no numbers any more.
    shares = [size / sizes[-1] for size in sizes]
    # Of all that is known, since between two bursts the newest rows alone look steady; and between
    # neighbours, since a size that falls evenly does not scatter.
    squares = [(after - before) ** 2 for before, after in pairwise(shares)]
    variance = fmean(squares) / 2 / fmean(shares) ** 2
    count = round(min(max(variance / MOST_ERROR**2, FEWEST_ROWS), most))
    return fmean(sizes[-count:])


__all__ = ["FEWEST_ROWS", "MOST_ROWS", "averaged", "with_one_more"]
