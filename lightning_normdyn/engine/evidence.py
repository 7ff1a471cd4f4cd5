"""What real gradients say about the claims of the graph: confirmed, withdrawn, or nothing yet.

The Euler test (`lightning_normdyn.invariance.euler.euler_values`) gives a mean of z² and a number of values
for each weight and step. A claim is
looked at closely in its first steps, at every one of them, until 8 values are there. From then on
it is looked at when the Trainer logs.
A look that contradicts a claim calls for a close look again, whose 8 fresh values decide: so a term
that enters the loss late (a warm-up
of a penalty, an auxiliary head) is noticed within a few steps whatever came before, and a single
odd step withdraws nothing.

All decisions come from sums over all ranks, so all ranks decide the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.engine.loss_gradients import LossGradients
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.euler import (
    EULER_COUNT,
    EULER_LIMIT,
    euler_sums,
    euler_values,
    rms_of,
    whole_values,
)
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.host_copy import HostCopy

CLOSE_LOOKS = 16
"""Steps of a close look. One vector gives one value a step, so 8 values come together even if half
of the steps say nothing."""

LONGEST_REST = 6
"""A claim that close looks have cleared is not suspected again for 2, 4, ... up to 2**6 logging
steps: a close look costs a wait a step."""


@dataclass
class Record:
    """What has been seen of one claim.

    Args:
        claim: the verdict of the graph.
        total: of z², over the values since the last decision.
        count: of these values.
        close: steps for which it is still looked at closely.
        confirmed: whether 8 values or more have agreed with it.
        doubt: total and count of the look that called for the present close look.
        cleared: how often a close look has found nothing after all.
        rest: logging steps for which it is not suspected again.
    """

    claim: Verdict
    total: float = 0.0
    count: float = 0.0
    close: int = CLOSE_LOOKS
    confirmed: bool = False
    doubt: tuple[float, float] = (0.0, 0.0)
    cleared: int = 0
    rest: int = 0

    def take(self, mean: float, number: float, *, logs: bool) -> tuple[float, int] | None:
        """Take one look's values in.

        Args:
            mean: of z².
            number: of values; 0 where the gradient says nothing.
            logs: whether the Trainer logs at this step, or it is only a step of a close look.

        Returns:
            The root mean square of z and over how many values, if they contradict the claim.
        """
        if self.close:
            return self._take_closely(mean, number)
        if not logs or number == 0:
            return None
        contradicts = mean > EULER_LIMIT**2
        if self.rest:
            self.rest -= 1
        elif contradicts:
            if not self._contradicted:  # what spoke for the claim has spoken of another time
                self.total, self.count = 0.0, 0.0
            self.doubt = (mean * number, number)
            self.close = CLOSE_LOOKS
            return None
        if contradicts:
            return None
        self._add(mean * number, number)
        return self._decide()

    def _take_closely(self, mean: float, number: float) -> tuple[float, int] | None:
        self.close -= 1
        self._add(mean * number, number)
        if not self.close and not self._enough:
            # A weight that is rarely used: what called for this look is evidence, too.
            self._add(*self.doubt)
            self.doubt = (0.0, 0.0)
        return self._decide()

    def _add(self, total: float, number: float) -> None:
        self.total += total
        self.count += number

    @property
    def _enough(self) -> bool:
        return whole_values(self.count) >= EULER_COUNT

    @property
    def _contradicted(self) -> bool:
        return self.total > EULER_LIMIT**2 * self.count

    def _decide(self) -> tuple[float, int] | None:
        if not self._enough:
            return None
        rms, count = rms_of(self.total, self.count), whole_values(self.count)
        suspected = self.doubt[1] > 0
        self.total, self.count, self.doubt, self.close = 0.0, 0.0, (0.0, 0.0), 0
        if rms > EULER_LIMIT:
            return rms, count
        self.confirmed = True
        if suspected:
            self.cleared += 1
            self.rest = 2 ** min(self.cleared, LONGEST_REST)
        return None

    def state(self) -> Tensor:
        """As float64 numbers, ``(8,)``."""
        numbers = [
            self.total,
            self.count,
            *self.doubt,
            self.close,
            self.confirmed,
            self.cleared,
            self.rest,
        ]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    @classmethod
    def from_state(cls, claim: Verdict, state: Tensor) -> Record:
        """The inverse of `state`."""
        total, count, *doubt, close, confirmed, cleared, rest = state.tolist()
        record = cls(
            claim, total, count, int(close), bool(confirmed), cleared=int(cleared), rest=int(rest)
        )
        record.doubt = (doubt[0], doubt[1])
        return record


@dataclass
class Look:
    """The values of a logging step on their way to the host.

    Args:
        due: the step at whose ``ready`` they are read, so that nobody waits and every rank reads
            them at the same step.
        names: of the weights.
        values: ``(2, weights)``.
    """

    due: int
    names: list[str]
    values: HostCopy


@dataclass
class Examination:
    """The claims about one optimizer's weights.

    Args:
        weights: that a claim is made about.
        names: of these weights.
        reads: which of their entries the loss reads, as in a `Verdict`.
        vectors: them as vectors.
        steps: of this optimizer so far.
        logged: the last logging step that was looked at, counted in logging steps.
        gradients: of the backward passes since the last step.
        looks: that have not been read yet.
        close: whether some claim is looked at in every step.
    """

    weights: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    reads: list[Tensor | None] = field(default_factory=list)
    vectors: WeightVectors | None = None
    steps: int = 0
    logged: int = 0
    gradients: LossGradients | None = None
    looks: list[Look] = field(default_factory=list)
    close: bool = False

    def disregard(self, name: str) -> None:
        """What is on its way about this weight was about another claim."""
        for look in self.looks:
            look.names = ["" if known == name else known for known in look.names]

    def totals(self, *, trusted: bool, as_received: bool) -> Tensor:
        """The sums of `euler_values` over all ranks, ``(3, weights)``; every rank must call it.

        Args:
            trusted: whether gradients are the loss's own as far as the ranks' communication goes.
            as_received: whether the optimizer's gradients will do where the backward pass was not
                seen.
        """
        vectors = self.vectors
        assert vectors is not None
        sums = None if self.gradients is None else self.gradients.take(vectors)
        if sums is None:
            weights, gradients = vectors.values(), vectors.gradients()
            sums = vectors.partial_inner(
                (weights, weights), (weights, gradients), (gradients, gradients), exact=False
            )
            trusted = trusted and as_received
        if not trusted:
            sums = torch.full_like(sums, float("nan"))

        def summarize(found: Tensor, length: Tensor) -> Tensor:
            ww, wg, gg = found
            return euler_sums(ww, wg, gg, length)

        return vectors.mean_over_copies(vectors.complete_with_totals(sums, summarize))


@dataclass(frozen=True)
class Contradiction:
    """A claim that gradients have contradicted: root mean square of z, over how many values, at
    which step of its optimizer."""

    claim: Verdict
    rms: float
    count: int
    step: int


@dataclass(frozen=True)
class Memory:
    """The evidence at one moment: records by weight name, and of each optimizer its steps, logging
    steps and looks on their way."""

    records: Mapping[str, Record]
    examinations: Mapping[int, tuple[int, int, list[Look]]]


class Evidence:
    """The evidence of one fit, for all its optimizers (by index)."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.judged = 0
        """How many looks have been judged: as long as it does not change, nothing is confirmed or
        withdrawn."""
        self._before_batch: Memory | None = None
        self._examinations: dict[int, Examination] = {}

    def of(self, index: int) -> Examination:
        """What is known of one optimizer's claims."""
        return self._examinations.setdefault(index, Examination())

    # -- claims
    # --------------------------------------------------------------------------------------------------------

    def claim(self, index: int, weights: Sequence[Tensor], verdicts: Sequence[Verdict]) -> None:
        """These are the claims about the weights of one optimizer now; what is known of unchanged
        ones stays."""
        examination = self.of(index)
        partitions = [v.partition for v in verdicts if v.partition is not None]
        names, reads = [v.name for v in verdicts], [v.read for v in verdicts]
        for verdict in verdicts:
            known = self.records.get(verdict.name)
            if known is not None and grew(known.claim, verdict):
                # More rows of the kind that has been looked at: not yet confirmed, but no reason to
                # wait for gradients at every step.
                self.records[verdict.name] = replace(known, claim=verdict, confirmed=False)
            elif known is None or not same_claim(known.claim, verdict):
                self.records[verdict.name] = Record(verdict)
                examination.disregard(verdict.name)
        vectors = examination.vectors
        unchanged = (
            vectors is not None
            and len(examination.weights) == len(weights)
            and all(a is b for a, b in zip(examination.weights, weights, strict=True))
            and all(a.equal(b) for a, b in zip(vectors.partitions, partitions, strict=True))
            and all(a is b for a, b in zip(examination.reads, reads, strict=True))
        )
        if not unchanged:
            examination.vectors = (
                WeightVectors(weights, partitions, names, reads) if weights else None
            )
        examination.weights, examination.names, examination.reads = list(weights), names, reads
        self._note_closeness(examination)

    def reconsider(self, names: Iterable[str]) -> None:
        """What these claims rest on has changed: everything seen of them so far counts no more."""
        for name in names:
            self.records.pop(name, None)
        for examination in self._examinations.values():
            self._note_closeness(examination)

    def confirmed(self, verdict: Verdict) -> bool:
        """Whether gradients have agreed with this claim."""
        record = self.records.get(verdict.name)
        return record is not None and record.confirmed and same_claim(record.claim, verdict)

    def looked_at_closely(self) -> list[Verdict]:
        """The claims that are looked at in every step at present."""
        close = [
            name
            for examination in self._examinations.values()
            if examination.close
            for name in examination.names
        ]
        return [
            self.records[name].claim
            for name in close
            if name in self.records and self.records[name].close
        ]

    def doubted(self) -> list[Verdict]:
        """Those of them that a look of a logging step has contradicted."""
        return [
            claim for claim in self.looked_at_closely() if self.records[claim.name].doubt[1] > 0
        ]

    # -- looks
    # ---------------------------------------------------------------------------------------------------------

    def wanted(self, index: int, logging_step: int, claims: Iterable[Verdict]) -> list[Verdict]:
        """Which of these claims about the weights of an optimizer are to be looked at in its next
        step.

        Args:
            index: of the optimizer.
            logging_step: how many logging steps the Trainer will have come to with this batch. An
                optimizer that did not step at one is
                looked at in its next step.
            claims: that hold now, or will be made at that step.
        """
        if logging_step > self.of(index).logged:
            return list(claims)
        return [claim for claim in claims if self.is_open(claim)]

    def is_due(self, index: int, logging_step: int) -> bool:
        """Whether the claims that have been made about the weights of an optimizer are to be looked
        at in its next step."""
        examination = self.of(index)
        return bool(examination.names) and (examination.close or logging_step > examination.logged)

    def is_open(self, claim: Verdict) -> bool:
        """Whether a claim is to be looked at closely: a new one is."""
        record = self.records.get(claim.name)
        if record is None or record.close > 0:
            return True
        return not (same_claim(record.claim, claim) or grew(record.claim, claim))

    def question(
        self, index: int, logging_step: int, *, trusted: bool, as_received: bool
    ) -> list[Contradiction]:
        """At ``ready``: take in what this step says, if it is to be looked at; claims that were
        contradicted. Every rank must call it.

        A close look is read at once, before a callback acts on the claim. A logging step is read at
        the next ``ready`` (from a GPU, at the
        second next), when its numbers have arrived.
        """
        examination = self.of(index)
        if self._before_batch is None:
            self._before_batch = self._memory()
        examination.steps += 1
        examination.logged = min(
            examination.logged, logging_step
        )  # a checkpoint of a longer run, its loops reset
        logs, close = logging_step > examination.logged, examination.close
        if logs:
            examination.logged = logging_step
        found = self._read(examination)
        if not (logs or close) or examination.vectors is None:
            self._start_anew(examination)
            return found
        values = euler_values(examination.totals(trusted=trusted, as_received=as_received))
        self._start_anew(examination)
        if close:
            return found + self._judge(examination, examination.names, values.tolist(), logs=logs)
        copy = HostCopy(values)
        examination.looks.append(
            Look(examination.steps + 1 + copy.arrives_later, list(examination.names), copy)
        )
        return found

    def _start_anew(self, examination: Examination) -> None:
        if examination.gradients is not None:
            examination.gradients.forget()
        examination.gradients = None

    def _read(self, examination: Examination) -> list[Contradiction]:
        found = []
        while examination.looks and examination.looks[0].due <= examination.steps:
            look = examination.looks.pop(0)
            found += self._judge(examination, look.names, look.values.get().tolist(), logs=True)
        return found

    def _judge(
        self, examination: Examination, names: list[str], values: list[list[float]], *, logs: bool
    ) -> list[Contradiction]:
        found = []
        for name, mean, number in zip(names, *values, strict=True):
            record = self.records.get(name)
            contradiction = None if record is None else record.take(mean, number, logs=logs)
            if record is not None and contradiction is not None:
                del self.records[name]
                found.append(Contradiction(record.claim, *contradiction, examination.steps))
        self.judged += 1
        self._note_closeness(examination)
        return found

    def _note_closeness(self, examination: Examination) -> None:
        records = [self.records[name] for name in examination.names if name in self.records]
        examination.close = any(record.close for record in records)

    # -- checkpoints
    # ---------------------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """A batch begins: what is known from here on is not yet what a checkpoint in the middle of
        it holds."""
        self._before_batch = None

    def _memory(self) -> Memory:
        # Records change when looks are judged and are small; nothing is copied to the host.
        records = {name: replace(record) for name, record in self.records.items()}
        return Memory(
            records,
            {index: (e.steps, e.logged, list(e.looks)) for index, e in self._examinations.items()},
        )

    def state(self, *, in_batch: bool) -> dict[str, Any]:
        """As plain tensors, numbers and strings.

        Args:
            in_batch: whether a batch is being trained on. After a resume it is trained on again, so
                what its steps have said so far is
                left out.
        """
        memory = (
            self._before_batch if in_batch and self._before_batch is not None else self._memory()
        )
        examinations = {}
        for index, (steps, logged, on_their_way) in memory.examinations.items():
            looks = [
                [look.due, list(look.names), look.values.get().double()] for look in on_their_way
            ]
            examinations[index] = {"steps": steps, "logged": logged, "looks": looks}
        records = {name: record.state() for name, record in memory.records.items()}
        return {"records": records, "examinations": examinations}

    def load(self, state: Mapping[str, Any], verdicts: Mapping[str, Verdict]) -> None:
        """Take up what `state` stored, for the claims among ``verdicts``."""
        for name, numbers in state["records"].items():
            verdict = verdicts.get(name)
            if verdict is not None and verdict.partition is not None:
                self.records[name] = Record.from_state(verdict, numbers)
        for index, stored in state["examinations"].items():
            examination = self._examinations[int(index)] = Examination(
                steps=int(stored["steps"]), logged=int(stored["logged"])
            )
            for due, names, values in stored["looks"]:
                examination.looks.append(Look(int(due), list(names), HostCopy(values)))


def grew(before: Verdict, now: Verdict) -> bool:
    """Whether a claim is about the rows that it was about, and about more that a loss has read
    since.

    Example:
        >>> from lightning_normdyn.geometry.partition import Partition
        >>> labels = torch.tensor([0, -1, 1]), torch.tensor([0, 1, 2])
        >>> few, all_of_them = (Verdict("w", (3, 4), Partition((0,), rows, "filter"), "filter", ("norm",)) for rows in labels)
        >>> grew(few, all_of_them), grew(all_of_them, few), grew(few, few)
        (True, False, False)
    """
    old, new = before.partition, now.partition
    if (
        old is None
        or new is None
        or before.norms != now.norms
        or old.keep != new.keep
        or old.granularity != new.granularity
    ):
        return False
    was_in, is_in = old.labels >= 0, new.labels >= 0
    if was_in.shape != is_in.shape or bool((was_in & ~is_in).any()) or torch.equal(was_in, is_in):
        return False
    # Rows that were apart still are, and those that belonged together still do.
    pairs = torch.stack([old.labels[was_in], new.labels[was_in]])
    together = len(torch.unique(pairs, dim=1)[0])
    return together == len(torch.unique(pairs[0])) == len(torch.unique(pairs[1]))


def same_claim(a: Verdict, b: Verdict) -> bool:
    """Whether two verdicts claim the same vectors because of the same normalizations."""
    same_vectors = (
        a.partition is not None and b.partition is not None and a.partition.equal(b.partition)
    )
    return same_vectors and a.norms == b.norms


__all__ = ["Contradiction", "Evidence", "Record", "grew", "same_claim"]
