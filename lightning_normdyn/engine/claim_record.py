"""What gradients have said about one claim of scale invariance, and when that is enough to confirm
it or to withdraw it.

The Euler test (`lightning_normdyn.invariance.euler.euler_values`) gives a mean of z² and a number
of values for each weight and step. A claim is looked at closely in its first steps, at every one of
them, until 8 values are there. From then on it is looked at when the Trainer logs. A look that
contradicts a claim calls for a close look again, whose 8 fresh values decide: so a term that enters
the loss late (a warm-up of a penalty, an auxiliary head) is noticed within a few steps whatever
came before, and a single odd step withdraws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normdyn.invariance.euler import EULER_COUNT, EULER_LIMIT, rms_of, whole_values
from lightning_normdyn.invariance.verdict import Verdict

# Steps of a close look. One vector gives one value a step, so 8 values come together even if half
# of the steps say nothing.
CLOSE_LOOKS = 16

# A claim that close looks have cleared is not suspected again for 2, 4, ... up to 2**6 logging
# steps:
# a close look costs a wait a step.
LONGEST_REST = 6


@dataclass
class Record:
    """What has been seen of one claim.

    Args:
        claim: the verdict of the graph.
        total: of z², over the values since the last decision.
        count: of these values.
        doubt_total: of z², in the look that called for the present close look.
        doubt_count: of the values of that look.
        close: steps for which the claim is still looked at closely.
        confirmed: whether 8 values or more have agreed with it.
        cleared: how often a close look has found nothing after all.
        rest: logging steps for which it is not suspected again.
    """

    claim: Verdict
    total: float = 0.0
    count: float = 0.0
    doubt_total: float = 0.0
    doubt_count: float = 0.0
    close: int = CLOSE_LOOKS
    confirmed: bool = False
    cleared: int = 0
    rest: int = 0

    def take(
        self,
        mean: float,
        number: float,
        *,
        logs: bool,
    ) -> tuple[float, int] | None:
        """Take one look's values in.

        Args:
            mean: of z².
            number: of values; 0 where the gradient says nothing.
            logs: whether the Trainer logs at this step, or it is only a step of a close look.

        Returns:
            The root mean square of z and over how many values, if they contradict the claim.
        """
        if self.close:
            self.close -= 1
            self._add(mean * number, number)
            if not self.close and not self._is_enough():
                # A weight that is rarely used: what called for this look is evidence, too.
                self._add(self.doubt_total, self.doubt_count)
                self.doubt_total, self.doubt_count = 0.0, 0.0
            return self._decide()

        if not logs or number == 0:
            return None
        contradicts = mean > EULER_LIMIT**2
        # A claim that was cleared a short while ago is not suspected at once.
        if self.rest:
            self.rest -= 1
        elif contradicts:
            self._doubt(mean * number, number)
        # A single odd look decides nothing.
        if contradicts:
            return None
        self._add(mean * number, number)
        return self._decide()

    def _doubt(
        self,
        total: float,
        number: float,
    ) -> None:
        """Look closely from the next step on."""
        if self.total <= EULER_LIMIT**2 * self.count:
            # What spoke for the claim has spoken of another time.
            self.total, self.count = 0.0, 0.0
        self.doubt_total, self.doubt_count = total, number
        self.close = CLOSE_LOOKS

    def _add(
        self,
        total: float,
        number: float,
    ) -> None:
        self.total += total
        self.count += number

    def _is_enough(self) -> bool:
        return whole_values(self.count) >= EULER_COUNT

    def _decide(self) -> tuple[float, int] | None:
        if not self._is_enough():
            return None
        # Each decision rests on values of its own, so that what comes late is not averaged away.
        rms, count = rms_of(self.total, self.count), whole_values(self.count)
        was_doubted = self.doubt_count > 0
        self.total, self.count = 0.0, 0.0
        self.doubt_total, self.doubt_count = 0.0, 0.0
        self.close = 0
        if rms > EULER_LIMIT:
            return rms, count
        self.confirmed = True
        if was_doubted:
            self.cleared += 1
            self.rest = 2 ** min(self.cleared, LONGEST_REST)
        return None

    def state(self) -> Tensor:
        """All but the claim as float64 numbers, ``(8,)``."""
        # In the order of the fields; the claim itself is stored as a verdict.
        _, *numbers = vars(self).values()
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    @classmethod
    def from_state(
        cls,
        claim: Verdict,
        state: Tensor,
    ) -> Record:
        """The inverse of `state`."""
        *sums, close, confirmed, cleared, rest = state.tolist()
        record = cls(claim, *sums)
        record.close, record.confirmed = int(close), bool(confirmed)
        record.cleared, record.rest = int(cleared), int(rest)
        return record


def same_claim(before: Verdict, after: Verdict) -> bool:
    """Whether two verdicts claim the same vectors because of the same normalizations."""
    return before.norms == after.norms and same_vectors(before, after)


def same_vectors(before: Verdict, after: Verdict) -> bool:
    """Whether two verdicts are about the same vectors."""
    if before.partition is None or after.partition is None:
        return False
    return before.partition.equal(after.partition)


def grew(before: Verdict, after: Verdict) -> bool:
    """Whether a claim is about the rows that it was about, and about more that a loss has read
    since.

    Example:
        >>> from lightning_normdyn.geometry.partition import Partition
        >>> labels = torch.tensor([0, -1, 1]), torch.tensor([0, 1, 2])
        >>> partitions = [Partition((0,), rows, "filter") for rows in labels]
        >>> few, more = (Verdict("w", (3, 4), p, "filter", ("norm",)) for p in partitions)
        >>> grew(few, more), grew(more, few), grew(few, few)
        (True, False, False)
    """
    old, new = before.partition, after.partition
    if old is None or new is None or before.norms != after.norms:
        return False
    if old.keep != new.keep or old.granularity != new.granularity:
        return False
    # No row that the claim was about may be missing now, and some must have come.
    was_in, is_in = old.labels >= 0, new.labels >= 0
    if was_in.shape != is_in.shape or bool((was_in & ~is_in).any()) or torch.equal(was_in, is_in):
        return False
    # Rows that were apart still are, and those that belonged together still do.
    pairs = torch.stack([old.labels[was_in], new.labels[was_in]])
    together = len(torch.unique(pairs, dim=1)[0])
    return together == len(torch.unique(pairs[0])) == len(torch.unique(pairs[1]))
