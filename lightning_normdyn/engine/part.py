"""One callback's part in one fit: its workers, one per optimizer, and what outlives them: counts,
state per vector, refusals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.geometry.formulas import compiling_only, fuses_formulas
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_optimizer
from lightning_normdyn.optimizers.decay import Decay
from lightning_normdyn.optimizers.scaling import put_back
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.views import torch_optimizers

from .account import Account, left_alone
from .effect import Effect
from .messages import named, warn_once
from .plan import Plan, Target
from .refusals import (
    find_zeros,
    refuse_clashes,
    refuse_copies,
    refuse_rivals,
    refuse_zeros,
    without_unranked,
)
from .selection import AnyRule
from .session import Session
from .value_checks import Check, record
from .vector_state import VectorState
from .worker import LOOKING, Worker


class Part(Account[AnyRule]):
    """One callback's part in one fit.

    Args:
        rule: the callback.
        worker: makes a worker of a plan.
        session: the fit.

    Attributes:
        leads: whether it is the one that drives what is common to all callbacks: the first.
        restored: the callback's state in a checkpoint, until the first step takes it up.
    """

    STATE: ClassVar[Check] = staticmethod(record({}, closed=False))
    """What `extra` may look like in a checkpoint."""

    def __init__(self, rule: AnyRule, worker: type[Worker[Any]], session: Session) -> None:
        super().__init__(rule, session)
        self.worker = worker
        self.leads = not session.members
        self.memory = VectorState()
        self.restored: dict[str, Any] | None = None
        self._restored_workers: dict[int, dict[str, Any]] = {}
        self._looked_again: set[int] = set()

    @property
    def acting_phases(self) -> set[Phase]:
        """The phases in which it may change weights."""
        phases = set(self.worker.phases)
        changing = phases - LOOKING
        if changing or not (self.rule.writes or self.rule.acts):
            return changing
        # It acts, and in no other phase: so it changes weights where one is expected to look.
        return phases

    @property
    def acts_around_steps(self) -> bool:
        """Whether nothing that it does lies between a gradient and the update that follows."""
        return not any(Phase.MEASURE < phase < Phase.SNAPSHOT for phase in self.worker.phases)

    # -- the fit, from its start to its end

    def fit_start(self) -> None:
        """Refuse what a person has named and what cannot be done."""
        optimizers = []
        # A wrapper (an accelerator's, SAM) may hold several torch optimizers.
        for optimizer in self.session.trainer.optimizers:
            optimizers += torch_optimizers(optimizer)
        for optimizer in optimizers:
            check_optimizer(optimizer)
        self.check_patterns(optimizers)

    def train_start(self) -> None:
        """Bracket the optimizers, and count from here."""
        self.session.attach()
        # Before the first forward pass: it must see the weights that the checkpoint meant.
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
        """The batch is over."""
        # The last callback of the list and not the first: the others must have seen the batch end.
        if self.session.members[-1] is self:
            self.session.batch_end()
            self.session.batch = None

    def epoch_end(self) -> None:
        """Report vectors that had to be left alone, once."""
        self.report_bad()

    def train_end(self) -> None:
        """Say what came of the fit, and let go of the optimizers."""
        self.report_bad()
        # The first callback of the list closes the session for all; the others find it closed.
        if not self.session.closed:
            self.session.last_look()
        self.report_idle()
        self.let_go()

    def interrupted(self) -> None:
        """An exception ends the fit."""
        self.let_go()

    def checkpoint_saved(self) -> None:
        """A checkpoint is being saved."""

    def torn_down(self) -> None:
        """The fit is over, and everybody has been told."""

    def let_go(self) -> None:
        """Leave no hook behind: whoever is asked first lets go for all callbacks."""
        session = self.session
        if session.closed:
            return
        # A fused optimizer tells late whether it skipped its last update; after this nobody asks.
        for bracket in session.attachment.brackets:
            bracket.settle()
        for member in session.members:
            member.close()
        session.close()

    def close(self) -> None:
        """Leave no handler behind, and keep what was counted."""
        for index in self.workers:
            self._close(index)
        # Once and for all: tables may be read after the fit, when the brackets may count on.
        if self.attached_at:
            self._counted = {index: self.steps_of(index) for index in self.attached_at}
        self.attached_at = {}

    # -- resolution

    def replace_optimizer(self, index: int, gone: StepBracket | None, new: StepBracket) -> None:
        """Optimizer ``index`` is another one from now on, or has joined; counts go on."""
        self._counted[index] = self.steps_of(index)
        if gone is not None:
            # `_counts` reads only the brackets of the optimizers that are there now.
            self._steps_of_gone += gone.steps - self.attached_at.get(index, gone.steps)
            self._close(index)
        self.attached_at[index] = new.steps

    def _close(self, index: int) -> None:
        """Take the handlers of an optimizer away; its worker stays what tables speak of."""
        if index in self.workers:
            self.workers[index].plan.close()

    def check_patterns(self, optimizers: Sequence[Optimizer]) -> None:
        """At fit start: refuse what a person has named and what cannot be done."""
        matches = self.match(optimizers)
        if not self.rule.by_name:
            return
        refuse_rivals(self, matches, self.session.members)
        refuse_clashes(self, matches, self.session.members)
        for optimizer in optimizers:
            weights = [p for g in optimizer.param_groups for p in g["params"] if p in self.matched]
            if weights:
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
        # A plan takes its state of each vector when it is made, so the checkpoint must come first.
        self._adopt_restored()
        if index in self._stopped:
            return
        try:
            self._replan(index)
        except NormDynError as error:
            self.refuse(index, error)

    def rehearse(self, index: int, step: Step) -> None:
        """Have compiled what the worker launches, where a GPU runs programs."""
        worker = self.workers.get(index)
        if worker is not None and fuses_formulas(worker.plan.vectors):
            with torch.no_grad(), compiling_only():
                worker.rehearse(step)
                left_alone(worker.plan)

    def _replan(self, index: int) -> None:
        """Make a plan for what is known now, and a worker for it; none where nothing is left."""
        bracket = self.session.attachment.brackets[index]
        targets = self._find_targets(index, bracket)
        self._check_optimizer(bracket.optimizer, targets)
        # The old handlers go first: two workers would both act in this step.
        self._close(index)
        plan = self._plan(index, bracket, targets)
        way_out = self.rule.without_zeros
        if plan is not None and (self.rule.needs_length or way_out):
            # Only a plan can tell: a sharded weight is zero where all ranks' parts are.
            zeros = find_zeros(plan, any_vector=bool(way_out))
            if zeros:
                is_fresh = bracket.steps == 0 and not self._counted
                refuse_zeros(self.name, zeros, is_error=is_fresh, way_out=way_out)
                plan.close()
                plan = self._plan(index, bracket, [t for t in targets if t.name not in zeros])
        if plan is not None:
            self._put_to_work(plan)
        else:
            # `_latest` keeps the worker: if its weights come back, the next one goes on from it.
            self.workers.pop(index, None)

    def _find_targets(self, index: int, bracket: StepBracket) -> list[Target]:
        """The weights that are meant and can be treated, in the optimizer's order."""
        targets = []
        owned = [w for w in self.weights.owned(bracket.optimizer) if w not in self.refused]
        for weight in self.select(owned):
            try:
                self.check_weight(weight, self.name_of(weight))
            except NotSupportedError as error:
                # In the first step this raises; later the other weights go on without this one.
                self.refuse(index, error, weight)
                continue
            target = self.target_or_none(weight)
            if target is not None:
                targets.append(target)
        # At fit start only weights that a person names are known; "auto" finds its own later.
        weights = [target.weight for target in targets]
        refuse_rivals(self, weights, self.session.members)
        refuse_clashes(self, weights, self.session.members)
        return without_unranked(self, targets, bracket, self.session.members)

    def _plan(self, index: int, bracket: StepBracket, targets: list[Target]) -> Plan | None:
        if not targets:
            return None
        earlier = self._latest.get(index)
        return Plan(
            index,
            bracket,
            targets,
            memory=self.memory,
            steps_before=self._counted.get(index, 0) - self.attached_at[index],
            earlier=None if earlier is None else earlier.plan,
        )

    def _put_to_work(self, plan: Plan) -> None:
        """Make the worker of a plan, and have it called in its phases."""
        index = plan.index
        try:
            worker = self.worker(self, plan)
        except NormDynError as error:
            # The refusal names the weights of this plan, and no handler of it may stay.
            plan.close()
            self.refuse(index, error, plan=plan)
            return
        # `__init__` has made it as for a fresh fit; what went before comes on top.
        if index in self._latest:
            worker.inherit(self._latest[index])
        if index in self._restored_workers:
            worker.load(self._restored_workers.pop(index))
        self.workers[index] = self._latest[index] = worker
        # Within a phase, who only looks comes first: it must see what nobody has changed yet. Among
        # those that act the rank decides, and among those that look nothing depends on the order.
        order = f"{int(self.rule.writes or self.rule.acts)} {self.rule.state_key}"
        place: dict[str, Any] = {"order": order, "rank": self.rule.rank}
        reads = worker.stated_reads_gradients()
        for phase, method in self.worker.phases.items():
            handler = self._guarded(index, getattr(worker, method))
            plan.on_close(plan.bracket.add(phase, handler, **place, reads_gradients=reads))
        if self.rule.acts and index not in self._looked_again:
            self._look_again(plan)

    def _guarded(self, index: int, method: Callable[[Step], None]) -> Callable[[Step], None]:
        """A handler whose refusals end the fit in the first step, and the worker later."""

        def call(step: Step) -> None:
            try:
                method(step)
            except NormDynError as error:
                # By the step's number: after its update the bracket has counted it already, so by
                # the bracket the first step would seem to be over.
                is_first = step.number <= self.attached_at[index] + 1
                first = is_first and not self.session.attachment.entries[index].came_later
                self.refuse(index, error, first=first)

        return call

    def _look_again(self, plan: Plan) -> None:
        """Ask once more after the optimizer's first real step: before it, most optimizers have no
        state that could be judged."""

        def look(step: Step) -> None:
            remove()
            self._looked_again.add(plan.index)
            self._check_optimizer(plan.optimizer, plan.targets)

        guarded, order = self._guarded(plan.index, look), self.rule.state_key
        remove = plan.bracket.add(Phase.LOOK_AGAIN, guarded, order=order)
        plan.on_close(remove)

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
        kind = type(self.session.attachment.optimizers[index]).__name__
        if weight is not None:
            # What is wrong with one weight says nothing about the others of its optimizer.
            self.refused.add(weight)
            what = named([self.name_of(weight)])
        else:
            self._close(index)
            stopped = self.workers.pop(index, None)
            # Without this mark, the next `resolve` would make another worker that fails alike.
            self._stopped.add(index)
            if plan is None and stopped is not None:
                plan = stopped.plan
            what = f"the weights of {kind}"
            if plan is not None:
                what = f"{named([t.name for t in plan.targets])} ({kind})"
        step = self.steps_of(index)
        self.session.note(f"{self.name} does not act on {what} after step {step}: {error}")

    def _check_optimizer(self, optimizer: Optimizer, targets: Sequence[Target]) -> None:
        if not targets:
            return
        self.rule.check_optimizer(optimizer, [t.weight for t in targets])
        # Who only measures loses nothing to an optimizer that sets weights back.
        if self.rule.acts:
            refuse_copies(self.name, optimizer, targets)

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

    # -- over a checkpoint

    def state(self) -> dict[str, Any]:
        """What goes on in a fit that is resumed: plain tensors, numbers and strings. A
        collective."""
        # Before the first step it is still what it was.
        if self.restored is not None:
            return self.restored
        # Whether a fused optimizer skipped its last update must be known before steps are counted.
        for bracket in self.session.attachment.brackets:
            bracket.settle()
        workers = {index: worker.state() for index, worker in self._latest.items()}
        # No plan may have taken up the checkpoint's workers yet (their weights are still frozen),
        # and they must not be lost in the next checkpoint.
        return {
            "settings": self.rule.settings(),
            "steps": {i: self.steps_of(i) for i in range(len(self.session.attachment.brackets))},
            "per_vector": self.memory.gather(),
            **self.session.state(),
            "extra": {"workers": {**self._restored_workers, **workers}, **self.extra()},
            **self._ahead(),
        }

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must hold of this callback besides its workers: plain tensors, numbers
        and strings."""
        return {}

    def load_extra(self, extra: dict[str, Any]) -> None:
        """Go on from what `extra` gave before the interruption; at the first step."""

    def _adopt_restored(self) -> None:
        """At the first step: go on from the checkpoint, now that every strategy has restored the
        weights."""
        # Only once: a later plan must not set the counts back to those of the checkpoint.
        restored, self.restored = self.restored, None
        if restored is None:
            return
        self._counted = dict(restored["steps"])
        self.memory.restore(restored["per_vector"])
        self._restored_workers = dict(restored["extra"].get("workers", {}))
        self.load_extra(restored["extra"])
        saved, changed = restored["settings"], []
        for key, value in self.rule.settings().items():
            # A setting that the checkpoint has not came with a newer version of the callback.
            if key in saved and saved[key] != value:
                changed.append(f"{key}: {saved[key]} -> {value}")
        if changed:
            warn_once(
                f"{self.name} resumes with other settings than the checkpoint's "
                f"({', '.join(changed)}); the new ones hold, counters go on."
            )

    def _ahead(self) -> dict[str, Any]:
        """What is done already for a step that is not over: for a checkpoint that is saved in the
        middle of it, or because it raised."""
        members = self.session.members
        owners = {id(plan.vectors): member for member, plan in self.session.combined.shares()}
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
        session = self.session
        unfit = put_back(
            ahead, self.weights.by_name(), session.attachment.optimizers, session.module
        )
        if unfit:
            warn_once(
                f"The checkpoint was saved in the middle of a step, and what had been done for it "
                f"to {', '.join(unfit)} does not fit this model. These weights go on as the "
                f"checkpoint has them."
            )
        # Factors that were owed are in nobody's weights: they are taken back here.
        owed = dict(restored["per_vector"].get("owed", {}))
        for name, entry in ahead["weights"].items():
            if entry.get("owed") and name in owed and owed[name].shape == entry["factor"].shape:
                owed[name] = owed[name] / entry["factor"].to(owed[name])
        if owed:
            restored["per_vector"] = {**restored["per_vector"], "owed": owed}
        self.restored = restored
