"""What real gradients say about the claims of the graph, for all optimizers of a fit: which looks
are due, how their values come to the host, and which claims they contradict.

All decisions come from sums over all ranks, so all ranks decide the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.euler import euler_sums, euler_values
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.step import HostCopy

from .claim_record import Record, grew, same_claim, same_vectors
from .loss_gradients import LossGradients, euler_products


@dataclass
class Look:
    """The values of a logging step on their way to the host.

    Args:
        due: the step at whose ``ready`` they are read, so that nobody waits and every rank reads
            them at the same step.
        names: of the weights; empty for one whose values are of another claim.
        values: ``(2, weights)``.
    """

    due: int
    names: list[str]
    values: HostCopy


@dataclass
class Examination:
    """The claims about one optimizer's weights.

    Args:
        claims: what is claimed of which weights.
        vectors: these weights as vectors; None without any.
        steps: of this optimizer so far.
        logged: the last logging step that was looked at, counted in logging steps.
        gradients: of the backward passes since the last step.
        looks: that have not been read yet.
        close: whether some claim is looked at in every step.
    """

    claims: dict[Tensor, Verdict] = field(default_factory=dict)
    vectors: WeightVectors | None = None
    steps: int = 0
    logged: int = 0
    gradients: LossGradients | None = None
    looks: list[Look] = field(default_factory=list)
    close: bool = False

    @property
    def names(self) -> list[str]:
        """Of the weights."""
        return [claim.name for claim in self.claims.values()]

    def is_due(self, logging_step: int) -> bool:
        """Whether the claims that have been made are to be looked at in the next step.

        Args:
            logging_step: how many logging steps the Trainer will have come to with this batch. An
                optimizer that did not step at one is looked at in its next step.
        """
        return (self.close or logging_step > self.logged) and bool(self.claims)

    def hold(self, claims: dict[Tensor, Verdict]) -> None:
        """These are the claims now."""
        # Making vectors is a collective, so they are kept where nothing changes for them.
        is_known = self.vectors is not None and self._are_alike(claims)
        self.claims = claims
        if not claims:
            self.vectors = None
        elif not is_known:
            partitions, reads = [], []
            for claim in claims.values():
                assert claim.partition is not None, "a claim is about vectors"
                partitions.append(claim.partition)
                reads.append(claim.read)
            self.vectors = WeightVectors.of(list(claims), partitions, self.names, reads)

    def _are_alike(self, claims: dict[Tensor, Verdict]) -> bool:
        """Whether these claims are about the same vectors as those of now."""
        if list(map(id, self.claims)) != list(map(id, claims)):
            return False
        for before, claim in zip(self.claims.values(), claims.values(), strict=True):
            if before.read is not claim.read or not same_vectors(before, claim):
                return False
        return True

    def disregard(self, name: str) -> None:
        """What is on its way about this weight was about another claim."""
        # The values stay where they are: their places say which weight they belong to.
        for look in self.looks:
            look.names = ["" if known == name else known for known in look.names]

    def values(
        self,
        vectors: WeightVectors,
        *,
        trusted: bool,
        as_received: bool,
    ) -> Tensor:
        """The `euler_values` over all ranks, ``(2, weights)``; every rank must call it.

        Args:
            vectors: the weights as vectors.
            trusted: whether gradients are the loss's own as far as the ranks' communication goes.
            as_received: whether the optimizer's gradients will do where the backward pass was not
                seen.
        """
        sums = None if self.gradients is None else self.gradients.take(vectors)
        if sums is None:
            trusted = trusted and as_received
            sums = euler_products(vectors, vectors.gradients())
        # A NaN says nothing, for or against. The collective below takes place all the same: ranks
        # may differ in what they trust.
        if not trusted:
            sums = torch.full_like(sums, float("nan"))
        totals = vectors.complete_with_totals(
            sums, lambda s, length: euler_sums(s[0], s[1], s[2], length)
        )
        return euler_values(vectors.mean_over_copies(totals))


@dataclass(frozen=True)
class Contradiction:
    """A claim that gradients have contradicted: root mean square of z, over how many values, at
    which step of its optimizer."""

    claim: Verdict
    rms: float
    count: int
    step: int


class Evidence:
    """The evidence of one fit, for all its optimizers (by index).

    Attributes:
        records: by weight name.
        judged: how many looks have been judged: as long as it does not change, nothing is confirmed
            or withdrawn.
    """

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.judged = 0
        self._examinations: dict[int, Examination] = {}
        # Copies of both as they were before this batch, once it has changed them.
        self._records_before: dict[str, Record] | None = None
        self._examinations_before: dict[int, Examination] | None = None

    def of(self, index: int) -> Examination:
        """What is known of one optimizer's claims."""
        examination = self._examinations.get(index)
        # Also before its first step: a backward pass may be looked at then.
        if examination is None:
            examination = self._examinations[index] = Examination()
        return examination

    # -- claims
    # --------------------------------------------------------------------------------------------

    def claim(
        self,
        index: int,
        claims: dict[Tensor, Verdict],
    ) -> None:
        """These are the claims about the weights of one optimizer now; what is known of unchanged
        ones stays."""
        self._keep_records()
        examination = self.of(index)
        for claim in claims.values():
            record = self.records.get(claim.name)
            if record is not None and grew(record.claim, claim):
                # More rows of the kind that has been looked at: not yet confirmed, but no reason to
                # wait for gradients at every step.
                self.records[claim.name] = replace(record, claim=claim, confirmed=False)
            # Of another claim under the same name nothing is known.
            elif record is None or not same_claim(record.claim, claim):
                self.records[claim.name] = Record(claim)
                examination.disregard(claim.name)
        examination.hold(claims)
        self._note_closeness(examination)

    def reconsider(self, names: Iterable[str]) -> None:
        """What these claims rest on has changed: everything seen of them so far counts no more."""
        self._keep_records()
        for name in names:
            self.records.pop(name, None)
        for examination in self._examinations.values():
            self._note_closeness(examination)

    def confirmed(self, verdict: Verdict) -> bool:
        """Whether gradients have agreed with this claim."""
        record = self.records.get(verdict.name)
        return record is not None and record.confirmed and same_claim(record.claim, verdict)

    def doubted(self) -> list[Verdict]:
        """The claims that a look of a logging step has contradicted, and that are looked at closely
        since."""
        doubted = []
        for examination in self._examinations.values():
            # Asked in every batch, and nearly always no claim is looked at closely.
            if not examination.close:
                continue
            for record in self._records_of(examination):
                if record.close and record.doubt_count > 0:
                    doubted.append(record.claim)
        return doubted

    def _records_of(self, examination: Examination) -> list[Record]:
        records = map(self.records.get, examination.names)
        return [record for record in records if record is not None]

    def _note_closeness(self, examination: Examination) -> None:
        examination.close = any(record.close for record in self._records_of(examination))

    # -- looks
    # ---------------------------------------------------------------------------------------------

    def wanted(
        self,
        index: int,
        logging_step: int,
        claims: dict[Tensor, Verdict],
    ) -> list[Tensor]:
        """The weights of an optimizer whose claims are to be looked at in its next step.

        Args:
            index: of the optimizer.
            logging_step: as for `Examination.is_due`.
            claims: that hold now, or will be made at that step.
        """
        if logging_step > self.of(index).logged:
            return list(claims)
        return [weight for weight, claim in claims.items() if self._is_open(claim)]

    def _is_open(self, claim: Verdict) -> bool:
        """Whether a claim is to be looked at closely: a new one is."""
        record = self.records.get(claim.name)
        if record is None or record.close > 0:
            return True
        return not (same_claim(record.claim, claim) or grew(record.claim, claim))

    def question(
        self,
        index: int,
        logging_step: int,
        *,
        trusted: bool,
        as_received: bool,
    ) -> list[Contradiction]:
        """At ``ready``: take in what this step says, if it is to be looked at.

        A close look is read at once, before a callback acts on the claim. A logging step is read at
        the next ``ready`` (from a GPU, at the second next), when its numbers have arrived.

        Args:
            index: of the optimizer.
            logging_step: how many logging steps the Trainer has come to.
            trusted: as for `Examination.values`.
            as_received: as for `Examination.values`.

        Returns:
            The claims that were contradicted. Every rank must call it.
        """
        examination = self.of(index)
        if self._examinations_before is None:
            self._examinations_before = self._copies()
        # Steps are counted alike on all ranks, so that they read each look at the same one.
        examination.steps += 1
        logs = logging_step > examination.logged
        # It falls where the checkpoint of a longer run was loaded and its loops were reset.
        examination.logged = logging_step
        # Judging the looks that have arrived may end a close look: this step still belongs to it.
        close, vectors = examination.close, examination.vectors
        contradictions = []
        while examination.looks and examination.looks[0].due <= examination.steps:
            look = examination.looks.pop(0)
            contradictions += self._judge(examination, look.names, look.values.get(), logs=True)
        if vectors is not None and (logs or close):
            values = examination.values(vectors, trusted=trusted, as_received=as_received)
            # A callback is about to act on a claim that is new or in doubt, so wait for the values.
            if close:
                names = examination.names
                contradictions += self._judge(examination, names, values, logs=logs)
            else:
                copy = HostCopy(values)
                due = examination.steps + 1 + copy.arrives_later
                examination.looks.append(Look(due, examination.names, copy))
        # The next step has gradients of its own.
        if examination.gradients is not None:
            examination.gradients.forget()
        examination.gradients = None
        return contradictions

    def _judge(
        self,
        examination: Examination,
        names: list[str],
        values: Tensor,
        *,
        logs: bool,
    ) -> list[Contradiction]:
        self._keep_records()
        contradictions = []
        for name, mean, number in zip(names, *values.tolist(), strict=True):
            record = self.records.get(name)
            self._keep_as_before_batch(name, record)
            contradiction = None if record is None else record.take(mean, number, logs=logs)
            if record is not None and contradiction is not None:
                # If the graph claims it once more, it is looked at closely again.
                del self.records[name]
                rms, count = contradiction
                contradictions.append(Contradiction(record.claim, rms, count, examination.steps))
        self.judged += 1
        self._note_closeness(examination)
        return contradictions

    # -- checkpoints
    # ---------------------------------------------------------------------------------------

    def begin_batch(self) -> None:
        """A batch begins: what is known from here on is not yet what a checkpoint in the middle of
        it holds."""
        self._records_before = self._examinations_before = None

    def _keep_records(self) -> None:
        """Some records are about to change: leave them to a checkpoint within the batch, if a step
        of this batch was looked at already."""
        # Not at every step: most judge nothing, and even a list of all records takes a noticeable
        # part of an idle step.
        if self._examinations_before is not None and self._records_before is None:
            self._records_before = dict(self.records)

    def _keep_as_before_batch(self, name: str, record: Record | None) -> None:
        """This record is about to change: leave what it was to a checkpoint within the batch."""
        before = self._records_before
        # A record that is another object there was copied, or replaced, earlier in this batch.
        if before is not None and record is not None and before.get(name) is record:
            before[name] = replace(record)

    def _copies(self) -> dict[int, Examination]:
        examinations = {}
        for index, known in self._examinations.items():
            looks = list(known.looks)
            examinations[index] = Examination(steps=known.steps, logged=known.logged, looks=looks)
        return examinations

    def state(self, *, in_batch: bool) -> dict[str, Any]:
        """As plain tensors, numbers and strings.

        Args:
            in_batch: whether a batch is being trained on. After a resume it is trained on again, so
                what its steps have said so far is left out.
        """
        records, examinations = self.records, self._examinations
        # No step of this batch has changed what there are no copies of.
        if in_batch and self._records_before is not None:
            records = self._records_before
        if in_batch and self._examinations_before is not None:
            examinations = self._examinations_before
        stored = {}
        for index, examination in examinations.items():
            looks = [[e.due, list(e.names), e.values.get().double()] for e in examination.looks]
            stored[index] = {
                "steps": examination.steps,
                "logged": examination.logged,
                "looks": looks,
            }
        return {
            "records": {name: record.state() for name, record in records.items()},
            "examinations": stored,
        }

    def load(
        self,
        state: Mapping[str, Any],
        verdicts: Mapping[str, Verdict],
    ) -> None:
        """Take up what `state` stored, for the claims among ``verdicts``."""
        for name, numbers in state["records"].items():
            verdict = verdicts.get(name)
            if verdict is not None and verdict.partition is not None:
                self.records[name] = Record.from_state(verdict, numbers)
        for index, stored in state["examinations"].items():
            steps, logged = int(stored["steps"]), int(stored["logged"])
            examination = Examination(steps=steps, logged=logged)
            self._examinations[int(index)] = examination
            for due, names, values in stored["looks"]:
                examination.looks.append(Look(int(due), list(names), HostCopy(values)))
