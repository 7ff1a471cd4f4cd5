"""When a learning rate has dropped, as against a schedule that glides."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log

# The falls of a smooth schedule grow gradually, also at its very end: from one change to the next
# by a factor below 4 for a cosine and below 7 for the last step of a one-cycle schedule. A drop
# comes out of the blue.
ABRUPT = 8.0


@dataclass(frozen=True)
class Rate:
    """What is remembered of a weight's learning rate.

    Args:
        lr: at the last real step.
        fall: ln(before/after) of its last change, if that was a fall and no drop; else 0.
    """

    lr: float
    fall: float = 0.0

    def then(self, lr: float, min_drop: float) -> tuple[float, Rate]:
        """The drop k on the way to ``lr``, 1 if there is none, and what to remember from there on.

        Example:
            >>> Rate(0.1).then(0.01, 1.5)
            (10.0, Rate(lr=0.01, fall=0.0))
            >>> Rate(0.1, fall=0.3).then(0.06, 1.5)[0]  # a cosine on its way to zero
            1.0
        """
        # A rate of 0 pauses training: neither it nor what follows it is a drop.
        if not (0 < self.lr < inf and 0 < lr < inf):
            return 1.0, Rate(lr)
        k = self.lr / lr
        # A schedule by epochs stands still between its falls, so a constant rate keeps the last
        # fall in mind. A rise ends it.
        if k == 1:
            return 1.0, Rate(lr, self.fall)
        if k < 1:
            return 1.0, Rate(lr)
        # 0.1 to 0.02 is a drop by 5 up to rounding.
        if k >= min_drop * (1 - 1e-9) and log(k) >= ABRUPT * self.fall:
            # A drop is not remembered as a fall: the next one of a step schedule, which is as
            # large, would be taken for its continuation.
            return k, Rate(lr, self.fall)
        return 1.0, Rate(lr, log(k))


__all__ = ["Rate"]
