"""When the pictures of a run are drawn anew while it trains: at its steps, and never for more than
a hundredth of its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.01
"""Of the time since the start that drawing may take."""

FIRST_GUESS = 5.0
"""Seconds that the first drawing is expected to take, which imports plotting libraries, too."""


class Refresh:
    """Whether pictures are due, and what drawing them has cost so far.

    Args:
        every: steps from one drawing to the next; None: there is none during a fit.
        clock: seconds.

    Example:
        >>> seconds = iter([0.0, 400.0, 501.0, 502.0, 505.0, 600.0])
        >>> refresh = Refresh(100, clock=lambda: next(seconds))
        >>> refresh.is_due(99)  # after 400 s, when 4 s may be spent, and 5 may be needed
        False
        >>> refresh.is_due(101)
        True
        >>> with refresh.drawing(101):  # takes 3 s
        ...     pass
        >>> refresh.is_due(150)  # not before step 199
        False
        >>> refresh.is_due(200)  # after 600 s: 3 were spent, and 3 more would be the 6 allowed
        True
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._every = every
        self._clock = clock
        self._started = clock()
        self._drawn = 0  # how many times `every` the newest drawing came after
        self._spent = 0.0
        self._expected = FIRST_GUESS

    def is_due(self, step: int) -> bool:
        """Whether pictures are to be drawn after this step.

        One that would have cost too much stays due, and is drawn as soon as it may be.
        """
        if self._every is None or (step + 1) // self._every <= self._drawn:
            return False
        allowed = SHARE * (self._clock() - self._started)
        return self._spent + self._expected <= allowed

    @contextmanager
    def drawing(self, step: int) -> Iterator[None]:
        """Take the time of a drawing after this step."""
        began = self._clock()
        try:
            yield
        finally:
            # Also where it failed: what cannot be drawn is not tried at every step.
            self._drawn = (step + 1) // (self._every or 1)
            self._expected = self._clock() - began
            self._spent += self._expected
