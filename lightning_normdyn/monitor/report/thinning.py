"""Fewer points for a drawing: what a curve of thousands of rows looks like is kept, its size is
not."""

from __future__ import annotations

from math import ceil

import numpy as np

from lightning_normdyn.monitor.records import Floats, Ints


def thinned(
    steps: Ints,
    values: Floats,
    most: int,
) -> tuple[Ints, Floats]:
    """At most ``most`` points of a curve: the smallest and the largest of each stretch, the first
    and the last.

    Evenly spaced points would lose the single step at which a layer jumps, which is what a reader
    looks for.

    Args:
        steps: ``(s,)``.
        values: ``(s,)``; a stretch without a finite number is a gap.
        most: at least 4.

    Example:
        >>> steps, values = np.arange(1000), np.zeros(1000, np.float32)
        >>> values[501] = 7.0
        >>> few = thinned(steps, values, 20)
        >>> len(few[0]) <= 20, few[1].max().item()
        (True, 7.0)
    """
    if len(steps) <= most:
        return steps, values
    inner = values[1:-1]
    width = ceil(len(inner) / ((most - 2) // 2))
    stretches = ceil(len(inner) / width)
    # One row for each stretch; the last one may be shorter than the others.
    padded = np.full(stretches * width, np.nan, dtype=np.float64)
    padded[: len(inner)] = inner
    rows = padded.reshape(stretches, width)
    finite = np.isfinite(rows)
    # Of a stretch without a finite number both give its first point, which is a gap.
    lowest = np.where(finite, rows, np.inf).argmin(axis=1)
    highest = np.where(finite, rows, -np.inf).argmax(axis=1)

    starts = 1 + width * np.arange(stretches)
    ends = [0, len(steps) - 1]
    chosen = np.unique(np.concatenate([starts + lowest, starts + highest, ends]))
    return steps[chosen], values[chosen]
