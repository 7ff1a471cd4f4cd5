"""The windows of the balances of many weight matrices, and how a row extends them.

Most weights of a network get their rows at the same steps, so their windows have the same rows:
these lie together, as one array over the weights for each row. Formulas:
`lightning_normdyn.monitor.balance`. Legend: ``w`` weights, ``m`` weights of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .balance import (
    ANGLES,
    LOG_KEPT,
    LOG_NORM,
    LOG_SCALE,
    LR,
    PULL,
    PULLS,
    RATES,
    SQUARED_ANGLE,
    BalanceWindow,
    Passed,
    Point,
    Span,
    coherent_growth,
    is_enough,
    log_of_kept,
    newest_starts,
)
from .by_weight import Doubles, Flags, Ints, places_among

PULL_DROP = 1.5
"""A pull that was constant and then changed by this factor aims at another norm; a schedule that
glides never does."""

SAME_PULL = 1e-3
"""Relative difference up to which two pulls are the same constant."""

MOST_POINTS = 64
"""Rows of a window that are kept; of older ones, every second is left out. Their sums are kept
exactly, so a window only loses places to begin at."""


class MatrixRow(NamedTuple):
    """What one measured step says of weight matrices; ``(w,)`` each, but for the number.

    Args:
        number: of the optimizer step, from 1.
        squared_norm: of the weight before the step, and before any callback of it.
        squared_angle: of the step, in radians squared.
        pull: relative decay of the step; NaN where nobody can tell.
        lr: its learning rate; NaN where nobody can tell.
        log_scale: Σ ln c over all steps before it, of callbacks that multiply the weight by c after
            each step; NaN where nobody can tell.
    """

    number: int
    squared_norm: Doubles
    squared_angle: Doubles
    pull: Doubles
    lr: Doubles
    log_scale: Doubles

    @property
    def is_measurement(self) -> Flags:
        """``(w,)``: a matrix of zeros has no direction, and what is not finite is no measurement.
        Of vectors that are not those of a callback, nobody can tell what it took away."""
        is_known = np.isfinite(self.squared_angle) & np.isfinite(self.log_scale)
        return is_known & np.isfinite(self.squared_norm) & (self.squared_norm > 0)


class SharedWindow(NamedTuple):
    """The window of ``m`` weights that have the same rows.

    Args:
        places: of the weights, ``(m,)``.
        numbers: of the steps of its rows, from old to new.
        rows: of each, ``(9, m)``: the numbers of a `Point` but for the first.
        lowest: ``(m,)``, the smallest `coherent_growth` of all its rows, dropped ones included.
        highest: ``(m,)``, the largest.
    """

    places: Ints
    numbers: tuple[int, ...]
    rows: tuple[Doubles, ...]
    lowest: Doubles
    highest: Doubles

    @classmethod
    def of_rows(
        cls, places: Ints, numbers: tuple[int, ...], rows: tuple[Doubles, ...]
    ) -> SharedWindow:
        """With these rows."""
        growths = np.stack(list(map(coherent_growth, rows)))
        # NaN, of an unknown pull, stays one in both: no span of such a window is enough.
        return cls(places, numbers, rows, growths.min(0), growths.max(0))

    def may_be_sure(self, entries: Doubles) -> Flags:
        """``(m,)``, for which weights a coherence may be known. Mostly it tells early in a run, and
        of small matrices ever, that there is no need to look at every row.

        Args:
            entries: ``(m,)``, numbers in each matrix.
        """
        now = coherent_growth(self.rows[-1])
        farthest = np.maximum(now - self.lowest, self.highest - now)
        return is_enough(self.numbers[-1] - self.numbers[0], farthest, entries)

    def of(self, weights: Flags) -> SharedWindow:
        """That of some of its weights, ``(m,)``."""
        if weights.all():
            return self
        rows = tuple(row[:, weights] for row in self.rows)
        return SharedWindow(
            self.places[weights],
            self.numbers,
            rows,
            self.lowest[weights],
            self.highest[weights],
        )

    def ends_at(self, pulls: Doubles) -> Flags:
        """``(m,)``: whose pull was constant and has now jumped, in either direction, or is known
        from now on."""
        last = self.rows[-1][PULL]
        # A sum with an unknown pull in it stays unknown for ever.
        is_another_kind = np.isfinite(last) != np.isfinite(pulls)
        if len(self.rows) < 2:
            return np.asarray(is_another_kind)
        with np.errstate(all="ignore"):
            was_constant = np.abs(self.rows[-2][PULL] - last) <= SAME_PULL * last
            stays = (last / PULL_DROP < pulls) & (pulls < last * PULL_DROP)
        has_jumped = (last > 0) & was_constant & ~stays
        return np.asarray(is_another_kind | has_jumped)

    def extended(self, row: MatrixRow, passed: Passed) -> SharedWindow:
        """With one more row, of all its weights."""
        last = self.rows[-1]
        here = _first(row)
        between = passed.steps
        # The angle of the newest row counts once, those between lie on a line to the next one.
        middle = (last[SQUARED_ANGLE] + row.squared_angle) / 2
        here[ANGLES] = last[ANGLES] + (last[SQUARED_ANGLE] + between * middle)
        here[PULLS] = last[PULLS] + last[PULL] + passed.pull
        here[LOG_KEPT] = last[LOG_KEPT] + log_of_kept(last[PULL]) + passed.log_kept
        here[RATES] = last[RATES] + last[LR] + passed.lr
        growth = coherent_growth(here)
        # Of dropped rows, too: a span may begin at none of them, and is only looked for in vain.
        return SharedWindow(
            self.places,
            _thinned((*self.numbers, row.number)),
            _thinned((*self.rows, here)),
            np.minimum(self.lowest, growth),
            np.maximum(self.highest, growth),
        )


class Windows(NamedTuple):
    """Rows of many weight matrices, of each since its norm was last set or its decay last changed
    by a jump. They never change; `extended` gives the next ones.

    Args:
        shared: no weight stands in two of them; whose window is empty stands in none.

    Example:
        >>> windows, one = Windows(), np.ones(1)
        >>> for number in range(1, 302, 50):
        ...     row = MatrixRow(number, 4 * one, 1e-4 * one, 1e-3 * one, 0.1 * one, 0 * one)
        ...     passed = Passed(49 * one, 49e-3 * one, 49 * log_of_kept(1e-3 * one), 4.9 * one)
        ...     windows = windows.extended(row, passed, one > 0, one > 0)
        >>> span = windows.of(0).newest_span(entries=10_000)
        >>> span.steps, float(span.coherence.round(2))  # the norm stands still: 2P/θ²
        (150, 20.01)
    """

    shared: tuple[SharedWindow, ...] = ()

    @classmethod
    def from_windows(cls, windows: Sequence[BalanceWindow]) -> Windows:
        """As `of` gave them, of all weights."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, window in enumerate(windows):
            numbers = tuple(point.number for point in window.points)
            if numbers:
                alike.setdefault(numbers, []).append(place)
        shared = []
        for numbers, places in alike.items():
            of_weights = [[point[1:] for point in windows[place].points] for place in places]
            # From (m, p, 9) to p rows of (9, m).
            rows = np.array(of_weights, dtype=np.float64).transpose(1, 2, 0)
            found = np.array(places, dtype=np.int64)
            shared.append(SharedWindow.of_rows(found, numbers, tuple(rows)))
        return cls(tuple(shared))

    def of(self, place: int) -> BalanceWindow:
        """The window of one weight."""
        for window in self.shared:
            (found,) = np.nonzero(window.places == place)
            if len(found):
                columns = [row[:, found[0]].tolist() for row in window.rows]
                pairs = zip(window.numbers, columns, strict=True)
                return BalanceWindow(tuple(Point(number, *column) for number, column in pairs))
        return BalanceWindow()

    def extended(self, row: MatrixRow, passed: Passed, is_known: Flags, measured: Flags) -> Windows:
        """With one more row; a new window where an old one ends.

        Args:
            row: the row.
            passed: ``(w,)``, what happened between the newest row and this one.
            is_known: ``(w,)``, of which weights that is known, and no norm was set in between.
            measured: ``(w,)``, which weights have this row; of all others nothing is left.
        """
        begins = measured & row.is_measurement
        continues = begins & is_known
        shared = []
        for window in self.shared:
            chosen = places_among(window.places, len(begins))
            goes_on = continues[chosen] & ~window.ends_at(row.pull[chosen])
            begins[window.places[goes_on]] = False
            if goes_on.any():
                rest = window.of(goes_on)
                shared.append(rest.extended(_at(row, rest.places), _at(passed, rest.places)))
        (places,) = np.nonzero(begins)
        if len(places):
            first = _first(_at(row, places))
            shared.append(SharedWindow.of_rows(places, (row.number,), (first,)))
        return Windows(tuple(shared))


def spans_of(window: SharedWindow, weights: Ints, entries: Doubles) -> tuple[Span, Flags]:
    """The newest steps that are enough for a coherence, of some weights of a window.

    Args:
        window: the window.
        weights: ``(k,)``, places among its ``m`` weights.
        entries: ``(k,)``, numbers in each matrix.

    Returns:
        The spans, and ``(k,)``, which weights have one; the others' mean nothing.
    """
    numbers = np.array(window.numbers, dtype=np.float64)
    rows = np.stack(window.rows)[:, :, places_among(weights, len(window.places))]
    starts = newest_starts(numbers, rows, entries)
    first = rows[starts, :, np.arange(len(weights), dtype=np.int64)].T
    last = rows[-1]
    passed = last - first
    span = Span(
        steps=numbers[-1] - numbers[starts],
        growth=passed[LOG_NORM] / 2,
        scaled=passed[LOG_SCALE],
        angles=passed[ANGLES],
        pulls=passed[PULLS],
        log_kept=passed[LOG_KEPT],
        rates=passed[RATES],
    )
    return span, starts >= 0


def _at(columns: Any, places: Ints) -> Any:
    """A NamedTuple of numbers of all weights, of those at ``places`` only."""
    picked = []
    # Nearly always it is all weights, in their order.
    if len(places) == max(map(np.size, columns)):
        return columns
    for column in columns:
        picked.append(column[places] if isinstance(column, np.ndarray) else column)
    return type(columns)(*picked)


def _first(row: MatrixRow) -> Doubles:
    """``(9, w)``: the first row of a window, with all sums 0."""
    here = np.zeros((len(Point._fields) - 1, len(row.pull)), dtype=np.float64)
    here[LOG_NORM] = np.log(row.squared_norm)
    here[SQUARED_ANGLE] = row.squared_angle
    here[PULL] = row.pull
    here[LR] = row.lr
    here[LOG_SCALE] = row.log_scale
    return here


def _thinned(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """At most `MOST_POINTS` of them: the first, and the more the newer they are."""
    if len(rows) <= MOST_POINTS:
        return rows
    half = MOST_POINTS // 2
    # Every second of the older half each time, so that old ones lie ever further apart.
    return (*rows[:-half:2], *rows[-half:])


__all__ = ["MatrixRow", "SharedWindow", "Windows", "spans_of"]
