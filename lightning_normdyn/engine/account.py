"""What a callback has done in a fit: its workers, in how many steps they acted, and the sentences
that say so."""

from typing import Any

from torch import Tensor

from .messages import named, warn_once
from .plan import Plan, Target
from .selection import AnyRule, Selection
from .session import Session
from .worker import Worker


class Account(Selection[AnyRule]):
    """The workers of one callback in one fit, and what came of their work.

    Args:
        rule: the callback.
        session: the fit.

    Attributes:
        workers: by optimizer, those that act at present.
        attached_at: by optimizer, the steps that its bracket had counted when this fit began.
    """

    def __init__(self, rule: AnyRule, session: Session) -> None:
        super().__init__(rule, session)
        self.workers: dict[int, Worker[Any]] = {}
        # Of every optimizer that was ever acted on: a later worker goes on from it.
        self._latest: dict[int, Worker[Any]] = {}
        self.attached_at: dict[int, int] = {}
        self._counted: dict[int, int] = {}
        self._steps_of_gone = 0
        self._stopped: set[int] = set()
        self._reported_bad = False

    @property
    def plans(self) -> dict[int, Plan]:
        """The targets by optimizer."""
        return {index: worker.plan for index, worker in self.workers.items()}

    @property
    def targets(self) -> list[Target]:
        """The targets of all optimizers."""
        targets = []
        for worker in self.workers.values():
            targets += worker.plan.targets
        return targets

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that it has seen, over resumes."""
        counted = self._counted.get(index, 0)
        if index in self.attached_at:
            counted += self.session.attachment.brackets[index].steps - self.attached_at[index]
        return counted

    def _counts(self) -> tuple[int, int, int]:
        """Steps of this fit that were seen, those in which this callback was to act, and those in
        which it did."""
        brackets, seen = self.session.attachment.brackets, self._steps_of_gone
        for index, start in self.attached_at.items():
            # Of a fused optimizer, whether the last step was skipped is still on its way.
            brackets[index].settle()
            seen += brackets[index].steps - start
        # Not only the present workers: one whose weights have left has acted in its steps, too.
        tallies = [worker.plan.tally for worker in self._latest.values()]
        due = sum(tally.due for tally in tallies)
        acted = sum(tally.acted for tally in tallies)
        # A step that was skipped on the device was tallied before anybody could know.
        return seen, min(due, seen), min(acted, seen)

    def idle_in_words(self) -> str:
        """A callback that was to act and never could, in a sentence; empty for any other."""
        seen, due, acted = self._counts()
        attempts = self.session.attempts.count
        # A callback that was refused has said so already.
        if seen == 0 and attempts and not self._stopped:
            did = "acted in" if self.rule.writes else "measured"
            return (
                f"{self.name} {did} 0 of {attempts} steps: no step was seen, none had a gradient, "
                f"or a scaler skipped all."
            )
        if due and not acted:
            return (
                f"{self.name} acted in 0 of {seen} steps: no weight that it acts on had a gradient "
                f"when it was to act."
            )
        return ""

    def tally_in_words(self) -> str:
        """For the end table: in how many steps this callback acted, unless it did in all that it
        was to act in."""
        if not self.rule.writes:
            return ""
        idle = self.idle_in_words()
        seen, due, acted = self._counts()
        # Who always acts needs no line in the table.
        always = acted > 0 and acted == due and not self._stopped
        if idle or always or not seen:
            return idle
        # A rule that acts in every tenth step would else seem to have failed in the other nine.
        when = f"; it was to act in {due}" if due != seen else ""
        return f"{self.name} acted in {acted} of {seen} steps{when}."

    def report_bad(self) -> None:
        """Name, once, the vectors that had to be left alone."""
        if self._reported_bad:
            return
        found = []
        for worker in self.workers.values():
            plan = worker.plan
            for target, count in zip(plan.targets, left_alone(plan).tolist(), strict=True):
                if count:
                    found.append(f"{int(count)} in {target.name}")
        if found:
            # Only now: an epoch without such vectors must not silence the report of a later one.
            self._reported_bad = True
            first = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "")
            warn_once(f"{self.name} left vectors alone whose norm is zero or not finite: {first}.")

    def report_idle(self) -> None:
        """At the end of a fit: say so if nothing ever came of what might have come."""
        # A fit without a step (no batch, say) missed nothing.
        if not self.session.attempts.count or self.workers or not self.rule.acts:
            return
        names = self.may_come()
        if names:
            warn_once(
                f"{self.name} did nothing in this fit: {named(names)} stayed frozen, no optimizer "
                f"held them, or no loss read all their rows."
            )


def left_alone(plan: Plan) -> Tensor:
    """``(targets,)``: how many vectors of each had to be left alone; every rank must call it."""
    # Over all ranks: of a sharded weight, this rank sees only its own part.
    return plan.vectors.totals(plan.bad.to(plan.vectors.sum_dtype))
