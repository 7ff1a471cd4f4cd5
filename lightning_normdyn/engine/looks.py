"""Which forward passes are worth watching: reading the graph of a loss costs time, so it is read
again only when it may tell something new."""

from collections.abc import Iterable

from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import has_gradient
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.optimizers.step import Step

from .weights import held_by

FIRST_LOOKS = 8


class UnreadRows:
    """The rows of one optimizer's weights that no loss has read, as far as its graph was looked at:
    the ends of a table of positions, experts without tokens.

    Nothing acts on such rows, since nothing is known of them. A gradient there says that a loss has
    read them after all, and calls for another look at the graph.

    Args:
        weights: for each weight these entries, as one vector.
    """

    # Steps of an optimizer in which gradients are looked at whether or not the Trainer logs.
    FIRST_STEPS = 16

    def __init__(self, weights: dict[Tensor, Partition]) -> None:
        self.weights = weights
        self._vectors = WeightVectors(list(weights), list(weights.values()))

    def with_gradient(self) -> set[Tensor]:
        """The weights with a gradient that is not zero in these rows, the same on every rank.

        Copies to the host. Every rank must call it.
        """
        gradients = self._vectors.gradients()

        def summarize(sums: Tensor, length: Tensor) -> Tensor:
            return (sums > 0).to(self._vectors.sum_dtype)

        # One number for each weight, so that whatever lies on another rank is heard of as well.
        _, totals = self._vectors.inner_and_totals(
            (gradients, gradients),
            summarize=summarize,
        )
        weights = set()
        for weight, count in zip(self.weights, totals[0].tolist(), strict=True):
            if count:
                weights.add(weight)
        return weights


class Looks:
    """When to look at the graph again, although nothing that decides its shape has changed.

    A weight that trains but never shows up in a loss (a backward that Lightning does not see) must
    not cost every batch: retry on the first 8 batches, then back off exponentially.

    Attributes:
        taken: how often it was looked again so far.
    """

    def __init__(self) -> None:
        self._batches = 0
        self.taken = 0
        self._next = 0
        self._asked_for = False
        self._undecided: set[Tensor] = set()
        # Weights that the next look is for: of no known kind, but with a gradient.
        self._missed: set[Tensor] = set()
        # By optimizer: rows that no loss has read, and when their gradients were last looked at.
        self._unread_rows: dict[int, UnreadRows] = {}
        self._logging_step: dict[int, int] = {}

    def ask_at_once(self) -> None:
        """Weights have come: look at the next batch, however often it was looked before."""
        self._asked_for, self._next = True, self._batches
        self._unread_rows = {}

    def begin_batch(self, *, wanted: bool) -> bool:
        """Whether this batch is worth a look.

        Args:
            wanted: whether the search asks for one.
        """
        # The batch that gave them gradients is over; the next one that uses them may be several
        # away.
        if self._missed:
            partly_read = [rows.weights for rows in self._unread_rows.values()]
            self._missed &= self._undecided.union(*partly_read)
        self._batches += 1
        is_due = bool(self._missed) or self._asked_for or wanted
        if not is_due or self._batches < self._next:
            return False
        self.taken += 1
        rest = 1 if self.taken < FIRST_LOOKS else self._batches // 2
        self._next = self._batches + rest
        return True

    def seen(self, *, had_loss: bool) -> None:
        """A watched batch is over."""
        self._asked_for = not had_loss

    def decided(
        self,
        index: int,
        undecided: Iterable[Tensor],
        unread: dict[Tensor, Partition],
    ) -> None:
        """What a look has left open.

        Args:
            index: of an optimizer.
            undecided: weights of all optimizers of which nothing is known.
            unread: rows of this optimizer's weights that no loss has read.
        """
        self._undecided = set(undecided)
        before = self._unread_rows.pop(index, None)
        if unread:
            self._unread_rows[index] = UnreadRows(unread)
        if before is None:
            return
        # Where other rows are unread than before, the look has found what it was for.
        for weight, rows in before.weights.items():
            if weight not in unread or not unread[weight].equal(rows):
                self._missed.discard(weight)

    def note_gradients(
        self,
        index: int,
        step: Step,
        logging_step: int,
    ) -> None:
        """A step is about to happen: remember which weights of unknown kind have a gradient.

        Args:
            index: of the optimizer.
            step: its step.
            logging_step: at which numbers may be copied to the host, counted in logging steps.
        """
        # Gradients are there now; later somebody may have cleared them.
        if self._undecided:
            for weight in self._undecided.intersection(held_by(step.optimizer)):
                if weight.requires_grad and has_gradient(weight):
                    self._missed.add(weight)
        rows = self._unread_rows.get(index)
        if rows is None:
            return
        # The numbers are waited for: in the first steps, and where a logger gets its numbers
        # anyway. An optimizer that did not step at a logging step is looked at when it steps next.
        looked_at = self._logging_step.get(index, 0)
        self._logging_step[index] = logging_step
        if step.number <= UnreadRows.FIRST_STEPS or logging_step > looked_at:
            self._missed |= rows.with_gradient()
