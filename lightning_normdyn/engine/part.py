"""One callback's part in one fit: its workers, one per optimizer, and what outlives them: counts,
state per vector, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.effect import Effect
from lightning_normdyn.engine.messages import named, warn_once
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.engine.rivals import refuse_rivals, without_unranked
from lightning_normdyn.engine.selection import AnyRule, Selection
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.target import Target
from lightning_normdyn.engine.value_checks import Check, record
from lightning_normdyn.engine.vector_state import VectorState
from lightning_normdyn.engine.worker import LOOKING, Worker
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_optimizer
from lightning_normdyn.optimizers.decay import Decay
from lightning_normdyn.optimizers.recognition import sets_weights_back
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.views import torch_optimizers
from lightning_normdyn.optimizers.wrappers import copies_of_weights


class Part(Selection[AnyRule]):
    """One callback's part in one fit.

    Args:
        rule: the callback.
        worker: makes a worker of a plan.
        session: the fit.

    Attributes:
        workers: by optimizer, those that act at present.
        restored: the callback's state in a checkpoint, until the first step takes it up.
    """

    STATE: ClassVar[Check] = staticmethod(record({}, closed=False))
    """What `extra` may look like in a checkpoint."""

    def __init__(self, rule: AnyRule, worker: type[Worker[Any]], session: Session) -> None:
        super().__init__(rule, session)
        self.worker = worker
        self.workers: dict[int, Worker[Any]] = {}
        # Of every optimizer that was ever acted on: a later worker goes on from it.
        self._latest: dict[int, Worker[Any]] = {}
        self.memory = VectorState()
        self.restored: dict[str, Any] | None = None
        self._restored_workers: dict[int, dict[str, Any]] = {}
        self.attached_at: dict[int, int] = {}
        self._counted: dict[int, int] = {}
        self._steps_of_gone = 0
        self._stopped: set[int] = set()
        self._looked_again: set[int] = set()
        self._reported_bad = False

    @property
    def plans(self) -> dict[int, Plan]:
        """The targets by optimizer."""
        return {index: worker.plan for index, worker in self.workers.items()}

    @property
    def targets(self) -> list[Target]:
        """The targets of all optimizers."""
        return [target for worker in self.workers.values() for target in worker.plan.targets]

    @property
    def acting_phases(self) -> set[Phase]:
        """The phases in which it may change weights."""
        phases = set(self.worker.phases)
        changing = phases - LOOKING
        if changing or not (self.rule.writes or self.rule.acts):
            return changing
        return phases  # it changes them where one is expected to look

    @property
    def acts_around_steps(self) -> bool:
        """Whether nothing that it does lies between a gradient and the update that follows."""
        return not any(Phase.MEASURE < phase < Phase.SNAPSHOT for phase in self.worker.phases)

    # -- the fit, from its start to its end

    @property
    def leads(self) -> bool:
        """Whether it is the one that drives what is common to all callbacks: the first."""
        return self.session.members[0] is self

    def fit_start(self) -> None:
        """Refuse what a person has named and what cannot be done."""
        optimizers = []
        for optimizer in self.session.trainer.optimizers:
            optimizers += torch_optimizers(optimizer)
        for optimizer in optimizers:
            check_optimizer(optimizer)
        self.check_patterns(optimizers)

    def train_start(self) -> None:
        """Bracket the optimizers, and count from here."""
        self.session.attach()
        self._put_back_ahead()
        for index, bracket in enumerate(self.session.attachment.brackets):
            self.attached_at[index] = bracket.steps

    def epoch_start(self) -> None:
        """Another epoch begins."""

    def batch_start(self, batch: Any, batch_idx: int) -> None:
        """Another batch is about to be trained on."""
        if self.leads:
            self.session.batch = batch
            self.session.batch_start()

    def batch_end(self) -> None:
        """The batch is over. The last callback drives the session: the others have stepped, too."""
        if self.session.members[-1] is self:
            self.session.batch_end()
            self.session.batch = None

    def epoch_end(self) -> None:
        """Report vectors that had to be left alone, once."""
        self.report_bad()

    def train_end(self) -> None:
        """Say what came of the fit, and let go of the optimizers."""
        self.report_bad()
        if not self.session.closed:
            self.session.last_look()
        self.report_idle()
        self.let_go()

    def interrupted(self) -> None:
        """An exception ends the fit."""
        self.let_go()

    def checkpoint_saved(self) -> None:
        """A checkpoint is being saved."""

    def let_go(self) -> None:
        """Leave no hook behind: whoever is asked first lets go for all callbacks."""
        session = self.session
        if session.closed:
            return
        for bracket in session.attachment.brackets:
            bracket.settle()
        for member in session.members:
            member.close()
        session.close()

    def close(self) -> None:
        """Leave no handler behind, and keep what was counted."""
        for index in self.workers:
            self._close(index)
        if self.attached_at:
            self._counted = {index: self.steps_of(index) for index in self.attached_at}
        self.attached_at = {}

    # -- counts

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that it has seen, over resumes."""
        counted = self._counted.get(index, 0)
        if index in self.attached_at:
            counted += self.session.attachment.brackets[index].steps - self.attached_at[index]
        return counted

    def replace_optimizer(self, index: int, gone: StepBracket | None, new: StepBracket) -> None:
        """Optimizer ``index`` is another one from now on, or has joined; counts go on."""
        self._counted[index] = self.steps_of(index)
        if gone is not None:
            self._steps_of_gone += gone.steps - self.attached_at.get(index, gone.steps)
            self._close(index)
        self.attached_at[index] = new.steps

    def _close(self, index: int) -> None:
        """Take the handlers of an optimizer away; its worker stays what tables speak of."""
        if index in self.workers:
            self.workers[index].plan.close()

    # -- resolution

    def check_patterns(self, optimizers: Sequence[Optimizer]) -> None:
        """At fit start: refuse what a person has named and what cannot be done."""
        matches = self.match(optimizers)
        if not self.rule.by_name:
            return
        refuse_rivals(self, matches, self.session.members)
        for optimizer in optimizers:
            weights = [p for g in optimizer.param_groups for p in g["params"] if p in self.matched]
            self.rule.check_optimizer(optimizer, weights)

    def take_in(self, new: Mapping[Tensor, Sequence[str]], changed: Iterable[str]) -> None:
        """Weights have come during the fit.

        Args:
            new: the weights and their names.
            changed: these names; what was known of other weights under them is gone.
        """
        self.match_new(new)
        for name in changed:
            self.forget(name)

    def forget(self, name: str) -> None:
        """Another weight has taken the place of the one that was called ``name``."""
        self.memory.forget(name)
        for worker in self._latest.values():
            worker.forget(name)

    def resolve(self, index: int) -> None:
        """Find out which weights of optimizer ``index`` are meant, and act on them from now on."""
        self._adopt_restored()
        if index in self._stopped:
            return
        try:
            self._replan(index)
        except NormDynError as error:
            self.refuse(index, error)

    def _replan(self, index: int) -> None:
        bracket = self.session.attachment.brackets[index]
        targets = self._find_targets(index, bracket)
        self._check_optimizer(bracket.optimizer, targets)
        self._close(index)
        earlier = self._latest.get(index)
        plan = self._plan(index, bracket, targets, earlier) if targets else None
        zeros = [] if plan is None else self._zeros(plan)
        if plan is not None and zeros:
            self._refuse_zeros(zeros, bracket)
            plan.close()
            targets = [t for t in targets if t.name not in zeros]
            plan = self._plan(index, bracket, targets, earlier) if targets else None
        if plan is None:
            self.workers.pop(index, None)
            return
        self._put_to_work(plan, earlier)

    def _find_targets(self, index: int, bracket: StepBracket) -> list[Target]:
        targets = []
        owned = [w for w in self.session.weights.owned(bracket.optimizer) if w not in self.refused]
        for weight in self.select(owned):
            try:
                self.check_weight(weight, self.name_of(weight))
            except NotSupportedError as error:
                self.refuse(index, error, weight)
                continue
            target = self.target_or_none(weight)
            if target is not None:
                targets.append(target)
        refuse_rivals(self, [t.weight for t in targets], self.session.members)
        return without_unranked(self, targets, bracket, self.session.members)

    def _plan(
        self, index: int, bracket: StepBracket, targets: list[Target], earlier: Worker[Any] | None
    ) -> Plan:
        self.attached_at.setdefault(index, bracket.steps)
        return Plan(
            index,
            bracket,
            targets,
            memory=self.memory,
            steps_before=self._counted.get(index, 0) - self.attached_at[index],
            earlier=None if earlier is None else earlier.plan,
        )

    def _put_to_work(self, plan: Plan, earlier: Worker[Any] | None) -> None:
        """Make the worker of a plan, and have it called in its phases."""
        index = plan.index
        try:
            worker = self.worker(self, plan)
        except NormDynError as error:
            # The refusal names the weights of this plan, and no handler of it may stay.
            plan.close()
            self.refuse(index, error, plan=plan)
            return
        if earlier is not None:
            worker.inherit(earlier)
        if index in self._restored_workers:
            worker.load(self._restored_workers.pop(index))
        self.workers[index] = self._latest[index] = worker
        # Within a phase, who only looks comes first.
        order = f"{int(self.rule.writes or self.rule.acts)} {self.rule.state_key}"
        for phase, method in self.worker.phases.items():
            handler = self._guarded(worker, getattr(worker, method))
            plan.on_close(plan.bracket.add(phase, handler, order=order, rank=self.rule.rank))
        if self.rule.acts and index not in self._looked_again:
            look_again = self._guarded(worker, lambda step: self._look_again(plan))
            order = self.rule.state_key
            plan.on_close(plan.bracket.add(Phase.LOOK_AGAIN, look_again, order=order))

    def _guarded(
        self, worker: Worker[Any], method: Callable[[Step], None]
    ) -> Callable[[Step], None]:
        """A handler whose refusals end the fit in the first step, and the worker later."""
        index = worker.plan.index

        def call(step: Step) -> None:
            try:
                method(step)
            except NormDynError as error:
                is_first = step.number <= self.attached_at[index] + 1
                first = is_first and not self.session.attachment.entries[index].came_later
                self.refuse(index, error, first=first)

        return call

    def _look_again(self, plan: Plan) -> None:
        """Ask once more after the optimizer's first real step: before it, most optimizers have no
        state that could be judged."""
        if plan.index not in self._looked_again:
            self._looked_again.add(plan.index)
            self._check_optimizer(plan.optimizer, plan.targets)

    # -- refusals

    def refuse(
        self,
        index: int,
        error: NormDynError,
        weight: Tensor | None = None,
        *,
        first: bool | None = None,
        plan: Plan | None = None,
    ) -> None:
        """The one rule for refusals: an error until the end of the optimizer's first real step;
        later, stop acting and say so once.

        Args:
            index: the optimizer.
            error: the refusal.
            weight: what is refused; None: the optimizer.
            first: whether this is still the first step; None: find out.
            plan: the targets that the refusal names; None: those that are acted on.
        """
        if self.session.in_first_step(index) if first is None else first:
            raise error
        optimizer = self.session.attachment.optimizers[index]
        if weight is not None:
            self.refused.add(weight)
            what = named([self.name_of(weight)])
        else:
            self._close(index)
            stopped = self.workers.pop(index, None)
            self._stopped.add(index)
            if plan is None and stopped is not None:
                plan = stopped.plan
            what = f"the weights of {type(optimizer).__name__}"
            if plan is not None:
                names = named([t.name for t in plan.targets])
                what = f"{names} ({type(optimizer).__name__})"
        step = self.steps_of(index)
        self.session.note(f"{self.name} does not act on {what} after step {step}: {error}")

    def _check_optimizer(self, optimizer: Optimizer, targets: Sequence[Target]) -> None:
        self.rule.check_optimizer(optimizer, [t.weight for t in targets])
        if self.rule.acts and targets:
            self._refuse_copies(optimizer, targets)

    def _refuse_copies(self, optimizer: Optimizer, targets: Sequence[Target]) -> None:
        """Refuse to change weights that the optimizer sets back to a copy of its own."""
        kind = type(optimizer).__name__
        left = sets_weights_back(optimizer)
        if left is not None:
            raise NotSupportedError(
                f"{kind} sets weights back to points that it remembers: of a change made to "
                f"weights from outside, a trial found {left:.0%} left a dozen steps later. That "
                f"would undo what {self.name} does to `{targets[0].name}`. Use an optimizer that "
                f"steps from where a weight is, such as AdamW or SGD, or remove the callback."
            )
        # A sharded weight lies beside a sharded copy, and ranks might find different things.
        plain = [t for t in targets if type(t.weight.data) is Tensor]
        copies = copies_of_weights(optimizer, [t.weight for t in plain])
        if copies:
            raise NotSupportedError(
                f"{kind} keeps a second copy of the weights ({named(copies)}) and moves them "
                f"towards it, which would undo what {self.name} does to `{plain[0].name}`. Use the "
                f"optimizer without that copy, or remove the callback."
            )

    def _zeros(self, plan: Plan) -> list[str]:
        """Names of new targets that are zero, all of them; every rank must call it."""
        if not self.rule.needs_length:
            return []
        if plan.before.keys() >= {t.name for t in plan.targets}:
            return []
        lengths = plan.vectors.totals(plan.vectors.norms()).tolist()
        each = zip(plan.targets, lengths, strict=True)
        return [t.name for t, length in each if length == 0 and t.name not in plan.before]

    def _refuse_zeros(self, names: Sequence[str], bracket: StepBracket) -> None:
        """An error before the first step; later, or in a run that is resumed, a warning: the
        weights are left alone."""
        text = (
            f"{self.name} was to act on {named(names)}, but all entries are zero: that has no "
            f"length and no direction, so nothing would be done to it"
        )
        if bracket.steps == 0 and not self._counted:
            raise NotSupportedError(
                f"{text}. Initialize it with other numbers, or leave it out with params=[..., "
                f"'!{names[0]}']."
            )
        warn_once(f"{text}; it is left to its optimizer.")

    # -- what tables and other callbacks ask

    def effect(self, index: int, target: Target) -> Effect:
        """What is done to ``target`` of optimizer ``index``."""
        return self.workers[index].stated_effect(target)

    def correct_decays(self, plan: Plan, decays: Sequence[Decay], rates: Tensor) -> None:
        """Put right what effects can only say of the usual case; see `Worker.correct_decays`."""
        for worker in self.workers.values():
            worker.correct_decays(plan, decays, rates)

    def treatments(self, index: int) -> list[str]:
        """How tables say what happens to each target of optimizer ``index``; a collective."""
        return self.workers[index].treatments()

    def check_found(self) -> None:
        """After every optimizer's first step: there must be something to act on, or something that
        may still come."""
        self.report_waiting()
        if not self.workers and self.rule.acts:
            self.refuse_to_find_nothing()

    def _counts(self) -> tuple[int, int, int]:
        """Steps of this fit that were seen, those in which this callback was to act, and those in
        which it did."""
        brackets, seen = self.session.attachment.brackets, self._steps_of_gone
        for index, start in self.attached_at.items():
            # Of a fused optimizer, whether the last step was skipped is still on its way.
            brackets[index].settle()
            seen += brackets[index].steps - start
        tallies = [worker.plan.tally for worker in self._latest.values()]
        due = min(sum(tally.due for tally in tallies), seen)
        return seen, due, min(sum(tally.acted for tally in tallies), seen)

    def idle_in_words(self) -> str:
        """A callback that was to act and never could, in a sentence; empty for any other."""
        seen, due, acted = self._counts()
        attempts = self.session.attempts.count
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
        always = acted > 0 and acted == due and not self._stopped
        if idle or always or not seen:
            return idle
        when = f"; it was to act in {due}" if due != seen else ""
        return f"{self.name} acted in {acted} of {seen} steps{when}."

    def report_bad(self) -> None:
        """Name, once, the vectors that had to be left alone."""
        if self._reported_bad:
            return
        found = []
        for worker in self.workers.values():
            plan = worker.plan
            totals = plan.vectors.totals(plan.bad.to(plan.vectors.sum_dtype)).tolist()
            for target, count in zip(plan.targets, totals, strict=True):
                if count:
                    found.append(f"{int(count)} in {target.name}")
        if found:
            self._reported_bad = True
            first = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "")
            warn_once(f"{self.name} left vectors alone whose norm is zero or not finite: {first}.")

    def report_idle(self) -> None:
        """At the end of a fit: say so if nothing ever came of what might have come."""
        if not self.session.attempts.count or self.workers or not self.rule.acts:
            return
        names = self.may_come()
        if names:
            warn_once(
                f"{self.name} did nothing in this fit: {named(names)} stayed frozen, no optimizer "
                f"held them, or no loss read all their rows."
            )

    # -- over a checkpoint

    def state(self) -> dict[str, Any]:
        """What goes on in a fit that is resumed: plain tensors, numbers and strings. A
        collective."""
        if self.restored is not None:  # before the first step: it is still what it was
            return self.restored
        for bracket in self.session.attachment.brackets:
            bracket.settle()
        return {
            "settings": self.rule.settings(),
            "steps": {i: self.steps_of(i) for i in range(len(self.session.attachment.brackets))},
            "per_vector": self.memory.gather(),
            **self.session.state(),
            "extra": {"workers": self._worker_states(), **self.extra()},
            **self._ahead(),
        }

    def _worker_states(self) -> dict[int, dict[str, Any]]:
        current = {index: worker.state() for index, worker in self._latest.items()}
        return {**self._restored_workers, **current}

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must hold of this callback besides its workers: plain tensors, numbers
        and strings."""
        return {}

    def load_extra(self, extra: dict[str, Any]) -> None:
        """Go on from what `extra` gave before the interruption; at the first step."""

    def _adopt_restored(self) -> None:
        """At the first step: go on from the checkpoint, now that every strategy has restored the
        weights."""
        restored, self.restored = self.restored, None
        if restored is None:
            return
        self._counted = {int(k): int(v) for k, v in restored["steps"].items()}
        self.memory.restore(restored["per_vector"])
        self._restored_workers = dict(restored["extra"].get("workers", {}))
        self.load_extra(restored["extra"])
        saved, present = restored["settings"], self.rule.settings()
        changed = [
            f"{key}: {saved[key]} -> {value}"
            for key, value in present.items()
            if key in saved and saved[key] != value
        ]
        if changed:
            warn_once(
                f"{self.name} resumes with other settings than the checkpoint's "
                f"({', '.join(changed)}); the new ones hold, counters go on."
            )

    def _ahead(self) -> dict[str, Any]:
        """What is done already for a step that is not over: for a checkpoint that is saved in the
        middle of it, or because it raised."""
        members = self.session.members
        owners = {id(p.vectors): m for m in members for p in m.plans.values()}
        ahead: dict[str, Any] = {}
        for bracket in self.session.attachment.brackets:
            for scaling in bracket.unfinished:
                # Of nobody: rows whose decay the bracket applies.
                owner = owners.get(id(scaling.vectors), members[0])
                if owner is not self:
                    continue
                names = [self.name_of(w) for w in scaling.vectors.weights]
                for key, entries in scaling.state(names).items():
                    ahead.setdefault(key, {}).update(entries)
        return {"ahead": ahead} if ahead else {}

    def _put_back_ahead(self) -> None:
        """What the checkpoint holds for a step that never happened is taken back before the first
        forward pass, and not done twice."""
        if not self.restored or not self.restored.get("ahead"):
            return
        restored = dict(self.restored)
        ahead = restored.pop("ahead")
        self.session.put_back(ahead)
        owed = dict(restored["per_vector"].get("owed", {}))
        for name, entry in ahead["weights"].items():
            if entry.get("owed") and name in owed and owed[name].shape == entry["factor"].shape:
                owed[name] = owed[name] / entry["factor"].to(owed[name])
        if owed:
            restored["per_vector"] = {**restored["per_vector"], "owed": owed}
        self.restored = restored


__all__ = ["Part"]
