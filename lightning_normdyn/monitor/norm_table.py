"""The first and the newest norms of weights, and their newest learning rates: enough to see a norm
run away, and a rate drop.

Legend: ``w`` weights; ``k`` newest numbers that are kept of each, from old to new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from .by_weight import Doubles, Flags, Ints

NEWEST = 4
"""Norms that are kept: enough for a forecast, and a run may have millions of steps."""

LR_DROP = 1.5
"""A learning rate that was constant and is this much lower at the next record has dropped; a
schedule that glides never does."""

SAME_RATE = 1e-3
"""Relative difference up to which two rates are the same constant."""


@dataclass(frozen=True)
class Norms:
    """A weight's first norm and its last four, with their steps: enough to see it run away."""

    first: float
    steps: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class NormTable:
    """`Norms` of many weights. It never changes; `seen_at` gives the next one.

    Args:
        names: of the weights.
        first: ``(w,)``, NaN where nothing is known.
        steps: ``(k, w)``, optimizer steps of the newest norms.
        norms: ``(k, w)``.
        counts: ``(w,)``, how many of the ``k`` there are; the newest stand last.
        known: ``(w,)``, of which weights there is a norm.

    Example:
        >>> table = NormTable.from_values(("a",), [None])
        >>> for step in range(7):
        ...     table = table.seen_at(step, np.array([2.0**step]), np.array([True]))
        >>> table.of(0)
        Norms(first=1.0, steps=(3.0, 4.0, 5.0, 6.0), norms=(8.0, 16.0, 32.0, 64.0))
    """

    names: tuple[str, ...]
    first: Doubles
    steps: Doubles
    norms: Doubles
    counts: Ints
    known: Flags

    @classmethod
    def from_values(cls, names: tuple[str, ...], values: Sequence[Norms | None]) -> NormTable:
        """As `of` gave them; None of a weight without a norm."""
        width = len(names)
        first = np.full(width, nan, dtype=np.float64)
        steps = np.full((NEWEST, width), nan, dtype=np.float64)
        norms = np.full((NEWEST, width), nan, dtype=np.float64)
        counts = np.zeros(width, dtype=np.int64)
        for place, value in enumerate(values):
            if value is None:
                continue
            first[place] = value.first
            counts[place] = count = min(NEWEST, len(value.steps), len(value.norms))
            for column, newest in ((steps, value.steps), (norms, value.norms)):
                column[NEWEST - count :, place] = newest[len(newest) - count :]
        known = np.array([value is not None for value in values], dtype=np.bool_)
        return cls(names, first, steps, norms, counts, known)

    def of(self, place: int) -> Norms:
        """Of one weight."""
        start = NEWEST - int(self.counts[place])
        return Norms(
            float(self.first[place]),
            tuple(self.steps[start:, place].tolist()),
            tuple(self.norms[start:, place].tolist()),
        )

    def seen_at(self, step: int, norms: Doubles, there: Flags) -> NormTable:
        """With one more norm.

        Args:
            step: number of the optimizer step.
            norms: ``(w,)``.
            there: ``(w,)``, which weights have one.
        """
        newest_step = np.full_like(norms, step)
        steps = np.concatenate([self.steps[1:], newest_step[None]])
        newest = np.concatenate([self.norms[1:], norms[None]])
        # Mostly all weights have a norm, and none its first one.
        if there.all() and self._is_full:
            return NormTable(self.names, self.first, steps, newest, self.counts, self.known)
        return NormTable(
            self.names,
            np.where(there & ~self.known, norms, self.first),
            np.where(there, steps, self.steps),
            np.where(there, newest, self.norms),
            np.minimum(self.counts + there, NEWEST),
            self.known | there,
        )

    @property
    def _is_full(self) -> bool:
        """Whether of every weight as many norms are known as are kept."""
        return bool((self.counts == NEWEST).all())

    def grown_beyond(self, factor: float) -> Ints:
        """The places of weights whose norm is still finite and has grown by more than ``factor``
        since their first."""
        with np.errstate(all="ignore"):
            has_grown = (self.first * factor < self.norms[-1]) & (self.norms[-1] < np.inf)
        return np.flatnonzero(has_grown & (self.counts == NEWEST))


@dataclass(frozen=True, eq=False)
class RateTable:
    """The last two learning rates of many weights.

    Args:
        names: of the weights.
        rates: ``(2, w)``; a single rate stands in both.
        counts: ``(w,)``, how many of them are known.
    """

    names: tuple[str, ...]
    rates: Doubles
    counts: Ints

    @property
    def known(self) -> Flags:
        """``(w,)``, of which weights there is a rate."""
        return self.counts > 0

    @classmethod
    def from_values(
        cls, names: tuple[str, ...], values: Sequence[tuple[float, ...] | None]
    ) -> RateTable:
        """As `of` gave them; None of a weight without a rate."""
        rates = np.full((2, len(names)), nan, dtype=np.float64)
        counts = np.zeros(len(names), dtype=np.int64)
        for place, value in enumerate(values):
            if value:
                rates[:, place] = value[-2:]
                counts[place] = len(value[-2:])
        return cls(names, rates, counts)

    def of(self, place: int) -> tuple[float, ...]:
        """Of one weight, from old to new."""
        return tuple(self.rates[2 - int(self.counts[place]) :, place].tolist())

    def then(self, rates: Doubles, there: Flags) -> RateTable:
        """With one more rate, ``(w,)``, of the weights that are ``there``, ``(w,)``."""
        # Mostly all weights have a rate, and two of them already: nothing has to be chosen.
        if there.all() and (self.counts == 2).all():
            moved = np.concatenate([self.rates[1:], rates[None]])
            return RateTable(self.names, moved, self.counts)
        before = np.where(self.counts > 0, self.rates[1], rates)
        moved = np.stack([before, rates])
        return RateTable(
            self.names,
            np.where(there, moved, self.rates),
            np.minimum(self.counts + there, 2),
        )

    def have_dropped(self, rates: Doubles) -> Flags:
        """Whose learning rate falls by a jump, which pictures mark, if ``rates``, ``(w,)``, are the
        present ones.

        Example:
            >>> table = RateTable.from_values(("a", "b"), [(0.1, 0.1), (0.1, 0.09)])
            >>> table.have_dropped(np.array([0.01, 0.01])).tolist()
            [True, False]
        """
        older, newer = self.rates
        # Both rates before must agree: a schedule that glides falls from row to row.
        with np.errstate(all="ignore"):
            has_moved = np.abs(older - newer) > SAME_RATE * newer
            falls = (rates > 0) & (rates <= newer / LR_DROP)
        dropped: Flags = self.known & ~has_moved & falls
        return dropped


__all__ = ["NormTable", "Norms", "RateTable"]
