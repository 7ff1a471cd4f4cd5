"""What every callback of the suite shares: the targets, the brackets, the counters, and the way
they survive resume, several fits and
exceptions.

One `Session` per fit holds what all callbacks have in common (names, the search for scale-invariant
weights, one bracket per optimizer).
A callback adds a policy: which phases it acts in, and with which number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, SupportsFloat

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.effect import Effect, NoEffect, UnknownEffect
from lightning_normdyn.engine.lightning_facts import callbacks_of
from lightning_normdyn.engine.messages import named, show, warn_once
from lightning_normdyn.engine.plan import Plan, Tally, Target
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.state import seal, unseal
from lightning_normdyn.engine.weights import has_sparse_gradient
from lightning_normdyn.errors import NormDynError, NoTargetsError, NotSupportedError, shown
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.placement import check_weight
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.names import match_patterns, normalize_params
from lightning_normdyn.invariance.partitions import (
    SINGLE_NUMBERS,
    choose_partition,
    filter_partition,
)
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_optimizer
from lightning_normdyn.optimizers.decay import Decay, DecayOwner
from lightning_normdyn.optimizers.rate import has_plain_rate
from lightning_normdyn.optimizers.recognition import sets_weights_back
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.takeover import Claimed
from lightning_normdyn.optimizers.views import torch_optimizers
from lightning_normdyn.optimizers.wrappers import copies_of_weights

GRANULARITIES = ("auto", "filter", "group", "layer")
# In checkpoints, before the name of a counter per vector (`Plan.counters`).
COUNTED = "counted/"
# Phases in which a handler finds weights to look at. Whoever acts in others changes them.
LOOKING = frozenset(
    {Phase.RESOLVE, Phase.MEASURE, Phase.SNAPSHOT, Phase.LOOK_AGAIN, Phase.MEASURE_STEP}
)
# What a subclass may override without doing anything else to a weight.
SAYING = frozenset({"__init__", "settings", "treatment", "treatments"})


class NormDynCallback(Callback):
    """Common shell: resolves targets, brackets the optimizers, counts steps, keeps per-vector
    state.

    Args:
        params: ``"auto"``, one glob pattern, or a list of them, over the LightningModule's own
            parameter names; ``"!pattern"`` excludes.
        granularity: what counts as one vector; ``"auto"`` follows the normalization behind the
            weight.
    """

    writes: ClassVar[bool] = True
    """Whether ``params="auto"`` means the scale-invariant weights (an error if there are none), or
    every weight of two or more
    dimensions."""

    _unstated: ClassVar[bool] = (
        False  # whether `effect` was inherited from a class that did something else
    )

    rank: ClassVar[int] = 0
    """Who acts first of the callbacks that change the same weights in the same phase: a lower rank
    does. Equal ranks are refused, since
    what comes out would depend on the order of the list."""

    needs_length: ClassVar[bool] = False
    """Whether it can never do anything for a weight that is zero at the start: such a weight is
    refused by name instead of seeming to be
    treated. A rule that acts as soon as the weight has grown needs none."""

    marks: ClassVar[tuple[str, ...]] = ()
    """Kinds of events that this callback itself marks in the monitor's history."""

    def __init__(self, params: str | Sequence[str] = "auto", granularity: str = "auto") -> None:
        self.params = normalize_params(params)
        if granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {GRANULARITIES}, got {granularity!r}.")
        self.granularity = granularity
        self._forget()

    def _forget(self) -> None:
        """Set everything that belongs to one fit to what it is before a fit."""
        self.plans: dict[int, Plan] = {}
        self._session: Session[NormDynCallback] | None = None
        self._restored: dict[str, Any] | None = None
        self._counted: dict[int, int] = {}
        self._attached_at: dict[int, int] = {}
        self._per_vector: dict[str, dict[str, Tensor]] = {}  # of the vectors that this rank holds
        self._partitions: dict[
            tuple[str, str], Partition
        ] = {}  # by key and weight: what that state's vectors are
        self._laid_out: dict[
            tuple[str, int], Plan
        ] = {}  # by key and optimizer: the plan whose vectors that state belongs to
        self._restored_vectors: dict[
            str, dict[str, Tensor]
        ] = {}  # of all vectors, from a checkpoint
        self._matched: set[Tensor] = (
            set()
        )  # weights that `params` lets in, whoever owns them: known at fit start
        self._handler_removers: dict[int, list[Callable[[], None]]] = {}
        self._reported_bad = False
        self._left_alone: set[str] = set()  # weights of which it was said that nothing acts on them
        self._looked_again: set[int] = (
            set()
        )  # optimizers whose first real step has shown their state
        self._tallies: dict[int, Tally] = {}
        self._steps_of_gone = (
            0  # seen in this fit, of optimizers that others have taken the place of
        )
        self._stopped: set[int] = set()  # optimizers whose weights this callback no longer acts on
        self._refused: set[Tensor] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what a spawned process gets, is ready for a fit of its own: the Trainer, the
        weights and their hooks stay behind."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._forget()
        return vars(other)

    # -- what a callback adds
    # ------------------------------------------------------------------------------------------

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Which phases this callback acts in."""
        raise NotImplementedError

    def check_optimizer(self, optimizer: Optimizer, weights: list[Tensor]) -> None:
        """Refuse, before training, an optimizer whose ``weights`` this callback cannot treat
        rightly."""

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """A plan was made or made anew: precompute what depends on it."""

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers: stored in checkpoints, shown in tables."""
        return {}

    def treatment(self, plan: Plan, target: Target) -> str:
        """How the tables say what happens to ``target``."""
        return type(self).__name__

    def treatments(self, plan: Plan) -> list[str]:
        """`treatment` of all targets of ``plan``, in their order; where that takes sums over
        vectors, every rank must call it."""
        return [self.treatment(plan, target) for target in plan.targets]

    def effect(self, target: Target) -> Effect:
        """What this callback does to ``target``: predictions, records and tables rest on it.

        Unless a subclass says it, a callback that changes weights has an effect that nobody has
        derived, so there is no prediction.
        """
        if self.writes or self.acts or not LOOKING.issuperset(self.handlers()):
            return UnknownEffect(type(self).__name__)
        return NoEffect()

    def correct_decays(self, plan: Plan, decays: Sequence[Decay], rates: Tensor) -> None:
        """Put right, in this very step, what `effect` can only say of the usual case.

        Args:
            plan: somebody's plan.
            decays: what is known of the decay of each of its targets.
            rates: ``(targets,)``, the ``rate`` of each; to be changed in place.
        """

    def stated_effect(self, target: Target) -> Effect:
        """`effect`, if it is still true: a subclass that changes what is done, and does not say
        what that is, does something unknown."""
        if self._unstated:
            return UnknownEffect(type(self).__name__)
        stated = self.effect(target)
        return stated if isinstance(stated, Effect) else UnknownEffect(type(self).__name__)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._unstated = cls._changes_what_is_done()

    @classmethod
    def _changes_what_is_done(cls) -> bool:
        """Whether a class below the one that defines `effect` overrides methods of the rule
        itself."""
        classes = list(cls.__mro__)
        states = next(i for i, c in enumerate(classes) if "effect" in vars(c))
        below, rule = classes[:states], classes[states : classes.index(NormDynCallback)]
        if not rule:  # nobody has said anything: `effect` of the base class decides
            return False
        methods = {
            name
            for c in rule
            for name, value in vars(c).items()
            if callable(value) or isinstance(value, property)
        }
        methods = (methods | {"handlers", "on_plan"}) - SAYING
        return any(name in vars(c) for c in below for name in methods)

    @property
    def acts(self) -> bool:
        """Whether it is an error to find nothing: not for those who only look."""
        return self.writes

    @property
    def acts_around_steps(self) -> bool:
        """Whether nothing that this callback does lies between a gradient and the update that
        follows on it."""
        return not any(Phase.MEASURE < phase < Phase.SNAPSHOT for phase in self.handlers())

    @property
    def shows_tables(self) -> bool:
        """Whether this callback wants the tables printed."""
        return True

    # -- counters and per-vector state
    # ---------------------------------------------------------------------------------

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that this callback has seen, over resumes."""
        counted = self._counted.get(index, 0)
        if self._session is not None and index in self._attached_at:
            bracket = self._session.attachment.brackets[index]
            counted += bracket.steps - self._attached_at[index]
        return counted

    def number(self, step: Step, plan: Plan) -> int:
        """1-based count of ``step`` over resumes."""
        return self._counted.get(plan.index, 0) + step.number - self._attached_at[plan.index]

    def per_vector(self, key: str, plan: Plan, make: Callable[[], Tensor]) -> Tensor:
        """State of each vector, kept by weight name so that it survives new plans and checkpoints;
        ``make`` gives it for weights seen
        first, and for vectors of a weight that got more of them."""
        table, restored = self._per_vector.setdefault(key, {}), self._restored_vectors.get(key, {})
        vectors = plan.vectors
        fresh = self._carry_state(key, plan, make)
        for i, (target, where) in enumerate(zip(plan.targets, vectors.slices, strict=True)):
            whole, split = restored.pop(target.name, None), self._partitions.get((key, target.name))
            if whole is not None and whole.numel() == target.partition.n:
                table[target.name] = vectors.scatter_one(i, whole)
            elif split is None or not split.equal(
                target.partition
            ):  # not by what this rank holds: `make` may be a collective
                fresh = make() if fresh is None else fresh
                table[target.name] = fresh[where].clone()
            self._partitions[key, target.name] = target.partition
        self._laid_out[key, plan.index] = plan
        return (
            torch.cat([table[t.name].to(vectors.device) for t in plan.targets])
            if plan.targets
            else torch.zeros(0, dtype=torch.float32, device=vectors.device)
        )

    def _carry_state(self, key: str, plan: Plan, make: Callable[[], Tensor]) -> Tensor | None:
        """``(n,)`` state for the weights whose vectors changed: as it was for vectors that stayed,
        fresh for others; None if none did."""
        earlier, table = self._laid_out.get((key, plan.index)), self._per_vector[key]
        if earlier is None or earlier is plan:
            return None
        splits = {t.name: self._partitions.get((key, t.name)) for t in plan.targets}
        changed = any(
            (split := splits[t.name]) is not None and not split.equal(t.partition)
            for t in plan.targets
        )
        if not changed or not all(t.name in table for t in earlier.targets):
            return None
        values = torch.cat([table[t.name].to(earlier.vectors.device) for t in earlier.targets])
        return plan.carry(earlier, values, make())

    def _gather_per_vector(self) -> dict[str, dict[str, Tensor]]:
        """The state of all vectors of all ranks, on every rank."""
        gathered: dict[str, dict[str, Tensor]] = {}
        for key, table in self._per_vector.items():
            gathered[key] = {
                name: values.detach().cpu()
                for name, values in (table | self._restored_vectors.get(key, {})).items()
            }
            for plan in self.plans.values():
                if all(t.name in table for t in plan.targets):
                    mine = torch.cat([table[t.name].to(plan.vectors.device) for t in plan.targets])
                    whole = plan.vectors.gather(mine)
                    gathered[key].update(
                        {
                            t.name: values.cpu().clone()
                            for t, values in zip(plan.targets, whole, strict=True)
                        }
                    )
        for plan in self.plans.values():
            for counter, counts in plan.counters.items():
                key = COUNTED + counter
                table = gathered.setdefault(key, dict(self._restored_vectors.get(key, {})))
                whole = plan.vectors.gather(counts)
                table.update(
                    {
                        t.name: values.cpu().clone()
                        for t, values in zip(plan.targets, whole, strict=True)
                    }
                )
        return {**self._restored_vectors, **gathered}

    def _restore_counters(self, plan: Plan) -> None:
        """Let the counters of a plan's vectors go on from a checkpoint."""
        for key in [key for key in self._restored_vectors if key.startswith(COUNTED)]:
            zeros = torch.zeros(
                plan.vectors.n, dtype=plan.vectors.sum_dtype, device=plan.vectors.device
            )
            counts = plan.counters.setdefault(key.removeprefix(COUNTED), zeros)
            for i, (target, where) in enumerate(
                zip(plan.targets, plan.vectors.slices, strict=True)
            ):
                restored = self._restored_vectors[key].pop(target.name, None)
                if restored is not None and restored.numel() == target.partition.n:
                    counts[where] += plan.vectors.scatter_one(i, restored).to(counts.dtype)

    def store_per_vector(self, key: str, plan: Plan, values: Tensor) -> None:
        """Keep new per-vector state under ``key``."""
        table = self._per_vector.setdefault(key, {})
        for target, where in zip(plan.targets, plan.vectors.slices, strict=True):
            table[target.name] = values[where]

    # -- resolution
    # ----------------------------------------------------------------------------------------------------

    def _resolve(self, index: int) -> None:
        """Find out which weights of optimizer ``index`` are meant, and make a plan for them."""
        self._adopt_restored()
        if index in self._stopped:
            return
        try:
            self._replan(index)
        except NormDynError as error:
            self._refuse(index, error)

    def _refuse(
        self,
        index: int,
        error: NormDynError,
        weight: Tensor | None = None,
        *,
        first: bool | None = None,
    ) -> None:
        """The one rule for refusals: an error until the end of the optimizer's first real step;
        later, stop acting and say so once.

        Args:
            index: the optimizer.
            error: the refusal.
            weight: what is refused; None: the optimizer.
            first: whether this is still the first step; None: find out.
        """
        session = self._session
        assert session is not None
        if session.in_first_step(index) if first is None else first:
            raise error
        kind, optimizer = type(self).__name__, session.attachment.optimizers[index]
        if weight is not None:
            self._refused.add(weight)
            what = f"`{session.weights.name(weight)}`"
        else:
            plan = self.plans.pop(index, None)
            self._stopped.add(index)
            self._drop_handlers(index)
            names = [t.name for t in plan.targets] if plan is not None else []
            what = (
                f"{named(names)} ({type(optimizer).__name__})"
                if names
                else f"the weights of {type(optimizer).__name__}"
            )
        session.note(f"{kind} does not act on {what} after step {self.steps_of(index)}: {error}")

    def _replan(self, index: int) -> None:
        session = self._session
        assert session is not None
        bracket, optimizer = (
            session.attachment.brackets[index],
            session.attachment.optimizers[index],
        )
        owned = [w for w in session.weights.owned(optimizer) if w not in self._refused]
        selected = []
        for weight in self._select(owned):
            try:
                self._check_weight(weight, session.weights.name(weight))
            except NotSupportedError as error:
                self._refuse(index, error, weight)
            else:
                selected.append(weight)
        targets = [t for w in selected if (t := self._target_or_none(w)) is not None]
        self._refuse_rivals([t.weight for t in targets])
        targets = self._without_unranked(targets, bracket)
        self.check_optimizer(optimizer, [t.weight for t in targets])
        self._check_copies(optimizer, targets)
        self._drop_handlers(index)
        if not targets:
            self.plans.pop(index, None)
            return
        plan = self._make_plan(index, optimizer, targets)
        zeros = self._zeros(plan)
        if zeros:
            targets = [t for t in targets if t.name not in zeros]
            self._refuse_zeros(zeros, bracket)
            if not targets:
                self.plans.pop(index, None)
                return
            plan = self._make_plan(index, optimizer, targets)
        if index in self.plans:
            plan.inherit(self.plans[index])
        plan.tally = self._tallies.setdefault(index, plan.tally)
        self.plans[index] = plan
        self._restore_counters(plan)
        self._attached_at.setdefault(index, bracket.steps)
        # within a phase, who only looks comes first
        order = f"{int(self.writes or self.acts)} {self.state_key}"
        for phase, handler in self.handlers().items():
            self._handler_removers.setdefault(index, []).append(
                bracket.add(phase, self._bind(handler, plan), order=order, rank=self.rank)
            )
        if not has_plain_rate(optimizer):
            removers = self._handler_removers.setdefault(index, [])
            removers.append(
                bracket.add(Phase.MEASURE, lambda step: plan.fix_rates(), order="")
            )  # before everybody who asks for them
        self._look_again_after_first_step(index, plan)
        self.on_plan(plan, bracket)

    def _look_again_after_first_step(self, index: int, plan: Plan) -> None:
        """Ask once more after the optimizer's first real step: before it, most optimizers have no
        state that could be judged."""

        def look(step: Step, plan: Plan) -> None:
            if index in self._looked_again:
                return
            self._looked_again.add(index)
            self.check_optimizer(plan.optimizer, [t.weight for t in plan.targets])
            self._check_copies(plan.optimizer, plan.targets)

        if index not in self._looked_again and self.acts:
            bracket = self._session.attachment.brackets[index]  # type: ignore[union-attr]  # there is a plan, so there is a session
            handler = self._bind(look, plan)
            self._handler_removers.setdefault(index, []).append(
                bracket.add(Phase.LOOK_AGAIN, handler, order=self.state_key)
            )

    def claim_decay(
        self,
        plan: Plan,
        bracket: StepBracket,
        owner: DecayOwner,
        weights: Claimed | Callable[[], Claimed],
    ) -> None:
        """`StepBracket.claim_decay` for as long as ``plan`` is in force; for `on_plan`."""
        remove = bracket.claim_decay((self, plan.index), owner, weights)
        self._handler_removers.setdefault(plan.index, []).append(remove)

    def _bind(self, handler: Callable[[Step, Plan], None], plan: Plan) -> Callable[[Step], None]:
        def call(step: Step) -> None:
            try:
                handler(step, plan)
            except NormDynError as error:
                assert self._session is not None
                first = (
                    step.number <= self._attached_at[plan.index] + 1
                    and plan.index not in self._session.attachment.replaced
                )
                self._refuse(plan.index, error, first=first)

        return call

    def _check_copies(self, optimizer: Optimizer, targets: Sequence[Target]) -> None:
        """Refuse to change weights that the optimizer sets back to a copy of its own."""
        if not self.acts or not targets:
            return
        left = sets_weights_back(optimizer)
        if left is not None:
            raise NotSupportedError(
                f"{type(optimizer).__name__} sets weights back to points that it remembers: of a "
                f"change made to weights from outside, a "
                f"trial found {left:.0%} left a dozen steps later. That would undo what "
                f"{type(self).__name__} does to "
                f"`{targets[0].name}`. Use an optimizer that steps from where a weight is, such as "
                f"AdamW or SGD, or remove the callback."
            )
        # A sharded weight lies beside a sharded copy, and ranks might find different things.
        plain = [t for t in targets if type(t.weight.data) is Tensor]
        copies = copies_of_weights(optimizer, [t.weight for t in plain])
        if copies:
            raise NotSupportedError(
                f"{type(optimizer).__name__} keeps a second copy of the weights ({named(copies)}) "
                f"and moves them towards it, which would "
                f"undo what {type(self).__name__} does to `{plain[0].name}`. Use the optimizer "
                f"without that copy, or remove the callback."
            )

    def _make_plan(self, index: int, optimizer: Optimizer, targets: list[Target]) -> Plan:
        vectors = WeightVectors(
            [t.weight for t in targets],
            [t.partition for t in targets],
            [t.name for t in targets],
            [t.verdict.read for t in targets],
        )
        where = {t.weight: s for t, s in zip(targets, vectors.slices, strict=True)}
        groups = []
        for group in optimizer.param_groups:
            slices = [where[p] for p in group["params"] if p in where]
            if slices:
                groups.append((group, slice(slices[0].start, slices[-1].stop)))
        return Plan(index, optimizer, targets, vectors, groups)

    def _zeros(self, plan: Plan) -> list[str]:
        """Names of new targets that are zero, all of them; every rank must call it."""
        if not self.needs_length:
            return []
        seen = (
            {t.name for t in self.plans[plan.index].targets} if plan.index in self.plans else set()
        )
        if seen.issuperset(t.name for t in plan.targets):
            return []
        lengths = plan.vectors.totals(plan.vectors.norms()).tolist()
        return [
            t.name
            for t, length in zip(plan.targets, lengths, strict=True)
            if length == 0 and t.name not in seen
        ]

    def _refuse_zeros(self, names: list[str], bracket: StepBracket) -> None:
        """An error before the first step; later, or in a run that is resumed, a warning: the
        weights are left alone."""
        named = ", ".join(f"`{name}`" for name in names[:4]) + (
            f" and {len(names) - 4} more" if len(names) > 4 else ""
        )
        text = (
            f"{type(self).__name__} was to act on {named}, but all entries are zero: that has no "
            f"length and no direction, so nothing would "
            "be done to it"
        )
        if bracket.steps == 0 and not self._counted:
            raise NotSupportedError(
                f"{text}. Initialize it with other numbers, or leave it out with params=[..., "
                f"'!{names[0]}']."
            )
        warn_once(f"{text}; it is left to its optimizer.")

    def _select(self, owned: list[Tensor]) -> list[Tensor]:
        session = self._session
        assert session is not None
        matched = []
        for weight in owned:
            if weight in self._matched and not session.claims.has_no_direction(weight):
                matched.append(weight)
            elif weight in self._matched and any(
                name in self.params for name in session.weights.names[weight]
            ):
                self._refuse_gain(weight)
        if self._by_name:
            return matched
        return [
            w
            for w in matched
            if (not self.writes or session.claims.of(w).partition is not None)
            and self._can_measure(w)
        ]

    def _refuse_gain(self, weight: Tensor) -> None:
        """A person named a weight whose rows are single numbers: an error, unless it is known too
        late for one."""
        session = self._session
        assert session is not None
        name = session.weights.name(weight)
        if (
            session.claims.of(weight).kind == "unknown"
        ):  # in no loss so far: its numbers may turn out to be one vector
            return
        text = f"`{name}` was asked to be a target, but its rows are {SINGLE_NUMBERS}. Leave it out of `params`."
        if not session.checked:
            raise NotSupportedError(text)
        if name not in self._left_alone:
            self._left_alone.add(name)
            warn_once(f"{type(self).__name__} leaves `{name}` alone from now on. {text}")

    @property
    def _by_name(self) -> bool:
        """Whether ``params`` names weights: not ``"auto"``, and not ``"auto"`` minus some."""
        return self.params != ["auto"] and not all(p.startswith("!") for p in self.params)

    def _can_measure(self, weight: Tensor) -> bool:
        """Whether ``"auto"`` takes this weight in; a named one is refused with the reason
        instead."""
        session = self._session
        assert session is not None
        try:
            self._check_weight(weight, session.weights.name(weight))
        except NotSupportedError:
            return False
        return True

    def _check_weight(self, weight: Tensor, name: str) -> None:
        check_weight(weight, name)
        session = self._session
        assert session is not None
        holders = session.weights.holders.get(weight, [])
        if has_sparse_gradient(weight) or any(getattr(m, "sparse", False) for m in holders):
            kind = type(holders[0]).__name__ if holders else "its layer"
            raise NotSupportedError(
                f"`{name}` gets sparse gradients ({kind}): the optimizer does not step untouched "
                f"rows. "
                f"Use sparse=False, or leave it out with params=[..., '!{name}']."
            )

    def _target(self, weight: Tensor) -> Target | None:
        session = self._session
        assert session is not None
        verdict, name, shape = (
            session.claims.of(weight),
            session.weights.name(weight),
            session.weights.shapes[weight],
        )
        fallback = filter_partition(session.module, name, shape)
        partition = choose_partition(verdict, self.granularity, fallback)
        if verdict.read is not None:
            partition = partition.only(partition.lengths(shape, verdict.read) > 0)
            if not partition.n:
                return None
        return Target(name, weight, partition, verdict, by_request=verdict.partition is None)

    def _target_or_none(self, weight: Tensor) -> Target | None:
        """The target, or None where there is nothing to act on; what later losses contradict is
        left alone, and said once."""
        session = self._session
        assert session is not None
        try:
            return self._target(weight)
        except NotSupportedError as error:
            if not session.checked:
                raise
            name = session.weights.name(weight)
            if name not in self._left_alone:
                self._left_alone.add(name)
                warn_once(f"{type(self).__name__} leaves `{name}` alone from now on. {error}")
            return None

    def _refuse_rivals(self, weights: Iterable[Tensor]) -> None:
        session = self._session
        assert session is not None
        for other in session.members:
            if other is self or other._kind is not self._kind:
                continue
            theirs = {t.weight for plan in other.plans.values() for t in plan.targets} | (
                other._matched if other._by_name else set()
            )
            both = [session.weights.name(w) for w in weights if w in theirs]
            if both:
                raise NotSupportedError(
                    f"Two {self._kind.__name__} callbacks target "
                    f"`{both[0]}`{f' and {len(both) - 1} more' if len(both) > 1 else ''}. "
                    "Give them different `params`, or remove one."
                )

    def _acting_phases(self) -> set[Phase]:
        """The phases in which it may change weights."""
        phases = set(self.handlers())
        changing = phases - LOOKING
        if changing or not (self.writes or self.acts):
            return changing
        return phases  # it changes them where one is expected to look

    def _without_unranked(self, targets: list[Target], bracket: StepBracket) -> list[Target]:
        """Those that no callback of another kind changes in the same phase with the same rank.

        Whose turn it is must not depend on names or on the order of the list. Before the first step
        such a pair is refused; later, weights
        that join are left to the one who has them.
        """
        session = self._session
        assert session is not None
        for other in session.members:
            if other is self or other._kind is self._kind or other.rank != self.rank:
                continue
            shared = self._acting_phases() & other._acting_phases()
            theirs = {t.weight for plan in other.plans.values() for t in plan.targets}
            both = [t for t in targets if t.weight in theirs]
            if not shared or not both:
                continue
            mine, its = type(self).__name__, type(other).__name__
            text = f"{its} and {mine} both change `{both[0].name}` in phase {min(shared).name} of a step, and nothing says who comes first"
            if bracket.steps == 0:
                raise NotSupportedError(
                    f"{text}. Give one of the classes another `rank`, or the callbacks different "
                    f"`params`."
                )
            warn_once(f"{text}: it is left to {its}.")
            targets = [t for t in targets if t.weight not in theirs]
        return targets

    @property
    def _kind(self) -> type:
        """The class whose rule this is: a subclass of `AdaptiveWeightShrink` shrinks as well."""
        mro = type(self).__mro__
        return mro[mro.index(NormDynCallback) - 1]

    def _check_found(self) -> None:
        """After every optimizer has stepped once: there must be something to act on, or something
        that may still come.

        A fit that goes on from a checkpoint has had its first steps: there nothing is refused, as
        nothing would have been without the
        interruption.
        """
        self._report_waiting()
        if self.plans or not self.acts:
            return
        session = self._session
        assert session is not None
        waiting = self._may_come()
        if waiting or session.claims.resumed:
            self._say_waiting(waiting)
            return
        raise NoTargetsError(
            f"{self._found_nothing()} to act on:\n{self._reasons()}\n"
            "Name weights with params='PATTERN' if you know better, or remove the callback."
        )

    def _found_nothing(self) -> str:
        kind = "scale-invariant weight" if self.writes else "weight of two or more dimensions"
        return f"{type(self).__name__}(params={_shown(self.params)}) found no {kind}"

    def _reasons(self) -> str:
        """Why no weight is a target, one a line."""
        session = self._session
        assert session is not None
        verdicts = [
            session.claims.of(w)
            for w in session.weights.names
            if len(session.weights.shapes[w]) >= 2
        ]
        reasons = [f"  {v.name}: {v.reason or v.kind}" for v in verdicts]
        if not any(v.known for v in verdicts):
            reasons = [
                "  no training loss was seen in on_before_backward (call "
                "self.manual_backward(loss))"
            ]
        lazy = [
            f"  {session.weights.name(w)}: a lazy parameter; run one forward pass before the fit"
            for w in session.weights.lazy
        ]
        return "\n".join([*lazy, *reasons][:8])

    def _say_waiting(self, waiting: list[str]) -> None:
        """Nothing to act on yet: name what may still come, so that nobody finds out at the end of
        the fit."""
        session = self._session
        assert session is not None
        if not waiting:
            if not session.claims.losses:  # those have been named one by one
                warn_once(f"{self._found_nothing()} to act on any more:\n{self._reasons()}")
            return
        in_words = named(waiting)
        text = (
            f"{self._found_nothing()} among the weights that are trained. It does nothing until "
            f"one of those that are frozen, or that no "
            f"optimizer holds, is trained: {in_words}. If none ever will be, name weights with "
            f"params='PATTERN', or remove the callback."
        )
        frozen = {
            name for weight, (name, *_) in session.weights.names.items() if not weight.requires_grad
        }
        callbacks = callbacks_of(session.trainer)
        planned = any(isinstance(callback, BaseFinetuning) for callback in callbacks)
        if planned or not frozen.intersection(waiting):
            show(session.trainer, f"lightning-normdyn: {text}")
        else:
            warn_once(text)

    def _may_come(self) -> list[str]:
        """Names of weights that may become targets later in this fit: they are frozen, no optimizer
        holds them yet, or some of their rows
        were not read yet."""
        session = self._session
        assert session is not None
        trained = {
            w
            for o in session.attachment.optimizers
            for w in session.weights.owned(o)
            if w.requires_grad
        }
        waiting = [
            w
            for w in session.weights.names
            if w in self._matched and w not in trained and w not in session.weights.lazy
        ]
        if not self._by_name and self.writes:
            waiting = [
                w
                for w in waiting
                if (v := session.claims.of(w)).partition is not None or v.kind == "unknown"
            ]
        return [
            *(session.weights.name(w) for w in waiting),
            *(v.name for v in self._waiting_for_rows()),
        ]

    def _waiting_for_rows(self) -> list[Verdict]:
        """Trained weights that stay untouched until a loss has read their other rows, too."""
        session = self._session
        assert session is not None
        if self._by_name or not self.writes:
            return []
        trained = {
            w
            for o in session.attachment.optimizers
            for w in session.weights.owned(o)
            if w.requires_grad
        }
        return [
            v
            for w in session.weights.names
            if w in self._matched & trained and (v := session.claims.of(w)).waits and v.norms
        ]

    def _report_waiting(self) -> None:
        for verdict in self._waiting_for_rows():
            if verdict.name not in self._left_alone:
                self._left_alone.add(verdict.name)
                warn_once(
                    f"{type(self).__name__} leaves `{verdict.name}` alone until all its rows were "
                    f"read: {verdict.reason}."
                )

    def _adopt_restored(self) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self._counted = {int(k): int(v) for k, v in restored["steps"].items()}
        self._restored_vectors = {key: dict(table) for key, table in restored["per_vector"].items()}
        self._load_extra(restored.get("extra", {}))
        then, now = restored.get("settings", {}), self.settings()
        changed = [f"{k}: {then[k]} -> {now[k]}" for k in now if k in then and then[k] != now[k]]
        if changed:
            warn_once(
                f"{type(self).__name__} resumes with other settings than the checkpoint's "
                f"({', '.join(changed)}); "
                "the new ones hold, counters go on."
            )

    def _load_extra(self, extra: dict[str, Any]) -> None:
        """Take up what `_extra` stored."""

    def _extra(self) -> dict[str, Any]:
        """More state of a callback, plain tensors and numbers."""
        return {}

    # -- Lightning's hooks
    # ---------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Identifies this callback's state in a checkpoint: class, params and granularity, so that
        a changed number keeps its
        counters."""
        return self._generate_state_key(params=_shown(self.params), granularity=self.granularity)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of another package; forget an earlier fit."""
        if not isinstance(trainer, Trainer):
            raise NotSupportedError(
                f"{type(self).__name__} was given to a Trainer of "
                f"`{type(trainer).__module__.split('.')[0]}`; it belongs to `lightning`. "
                "Use `from lightning import Trainer` (and LightningModule) throughout."
            )
        if stage == "fit":
            # here and not in on_fit_start: the tuner may save and restore a checkpoint before that
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Map names, check patterns and optimizers."""
        self._session = Session.of(trainer, pl_module)
        self._session.members.append(self)
        for optimizer in trainer.optimizers:
            for part in torch_optimizers(optimizer):
                check_optimizer(part)
        self._check_patterns(trainer)

    def _check_patterns(self, trainer: Trainer) -> None:
        session = self._session
        assert session is not None
        weights = [
            w
            for w in session.weights.names
            if len(session.weights.shapes[w]) >= 2 or w in session.weights.lazy
        ]
        chosen = [
            weights[i]
            for i in match_patterns(
                self.params,
                [session.weights.names[w] for w in weights],
                what="weights of two or more dimensions",
            )
        ]
        self._matched = set(chosen)
        if self.params != ["auto"] and not chosen:
            raise NoTargetsError(
                f'`params={_shown(self.params)}` excludes all that it includes. Leave a "!pattern" '
                f"out, or remove the callback."
            )
        if not self._by_name:
            lazy = [f"`{session.weights.name(w)}`" for w in chosen if w in session.weights.lazy]
            if lazy and self.acts:
                warn_once(
                    f"{type(self).__name__} leaves lazy parameters alone ({', '.join(lazy)}). Run "
                    f"one forward pass before the fit."
                )
            return
        owned = {
            p
            for o in trainer.optimizers
            for part in torch_optimizers(o)
            for g in part.param_groups
            for p in g["params"]
        }
        for weight in chosen:
            self._check_weight(weight, session.weights.name(weight))
            exact = any(n in self.params for n in session.weights.names[weight])
            if exact and weight.requires_grad and weight not in owned:
                raise NoTargetsError(
                    f"`{session.weights.name(weight)}` was asked to be a target, but no optimizer "
                    f"holds it. "
                    "Return it from configure_optimizers, or leave it out."
                )
        self._refuse_rivals(chosen)
        for optimizer in trainer.optimizers:
            for part in torch_optimizers(optimizer):
                self.check_optimizer(
                    part, [p for g in part.param_groups for p in g["params"] if p in self._matched]
                )

    def _take_in(self, new: Mapping[Tensor, Sequence[str]], changed: Iterable[str]) -> None:
        """Weights have come during the fit.

        Args:
            new: the weights and their names.
            changed: these names; what was known of other weights under them is gone.
        """
        session = self._session
        assert session is not None
        weights = [
            w for w in new if len(session.weights.shapes[w]) >= 2 or w in session.weights.lazy
        ]
        # Those that were there cannot match less than before, and a pattern may mean layers that
        # are gone.
        chosen = match_patterns(self.params, [tuple(new[w]) for w in weights], all_must_match=False)
        self._matched = {w for w in self._matched if w in session.weights.names} | {
            weights[i] for i in chosen
        }
        for name in changed:
            self._forget_weight(name)

    def _forget_weight(self, name: str) -> None:
        """Another weight has taken the place of the one that was called ``name``."""
        for tables in (self._per_vector, self._restored_vectors):
            for table in tables.values():
                table.pop(name, None)
        self._partitions = {
            key: partition for key, partition in self._partitions.items() if key[1] != name
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bracket the optimizers: only here are weights, optimizer state and callback state
        restored under every strategy."""
        # The tuner's inner fits and sanity checks come before this, so nothing acts in them.
        assert self._session is not None
        self._session.attach()
        self._put_back_ahead()
        for index, bracket in enumerate(self._session.attachment.brackets):
            self._attached_at[index] = bracket.steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first forward pass."""
        if self._leads():
            assert self._session is not None
            self._session.batch = batch
            self._session.batch_start()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Read the graph of a watched forward pass."""
        if self._leads():
            assert self._session is not None
            self._session.before_backward(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Count attempts, so that skipped steps can be told."""
        if self._leads():
            assert self._session is not None
            self._session.attempts.announce(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the start table after the first step."""
        if self._session is not None and self._session.members[-1] is self:
            self._session.batch_end()
            self._session.batch = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report vectors that had to be left alone, once."""
        self._report_bad()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        self._report_bad()
        if self._session is not None and not self._session.closed:
            self._session.last_look()
        self._report_idle()
        self._let_go()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._let_go()
        if stage != "fit":
            self._restored = None  # an evaluation that loaded a checkpoint is no resume

    def state_dict(self) -> dict[str, Any]:
        """Counters, per-vector state and the table of targets: plain tensors, numbers and
        strings."""
        if self._restored is not None:
            return seal(self._restored)
        session = self._session
        if session is not None:
            for bracket in session.attachment.brackets:
                bracket.settle()
        indices = (
            range(len(session.attachment.brackets))
            if session is not None
            else sorted(self._counted)
        )
        content = {
            "settings": self.settings(),
            "steps": {i: self.steps_of(i) for i in indices},
            "per_vector": self._gather_per_vector(),
            **({"targets": {}} if session is None else session.state()),
            "extra": {} if session is None else self._extra(),
            **({} if session is None else self._ahead(session)),
        }
        return seal(content)

    def _ahead(self, session: Session[NormDynCallback]) -> dict[str, Any]:
        """What is done already for a step that is not over: for a checkpoint that is saved in the
        middle of it, or because it raised."""
        ahead: dict[str, Any] = {}
        plans = {
            id(plan.vectors): member for member in session.members for plan in member.plans.values()
        }
        for bracket in session.attachment.brackets:
            for scaling in bracket.unfinished:
                owner = plans.get(
                    id(scaling.vectors), session.members[0]
                )  # of nobody: rows whose decay the bracket applies
                if owner is self:
                    for key, entries in scaling.state(
                        [session.weights.name(w) for w in scaling.vectors.weights]
                    ).items():
                        ahead.setdefault(key, {}).update(entries)
        return {"ahead": ahead} if ahead else {}

    def _put_back_ahead(self) -> None:
        """What the checkpoint holds for a step that never happened is taken back before the first
        forward pass, and not done twice."""
        if not self._restored or not self._restored.get("ahead"):
            return
        assert self._session is not None
        ahead = self._restored["ahead"]
        self._session.put_back(ahead)
        owed = self._restored.get("per_vector", {}).get("owed", {})
        paid_back = {}
        for name, entry in ahead["weights"].items():
            if entry.get("owed") and name in owed and owed[name].shape == entry["factor"].shape:
                paid_back[name] = owed[name] / entry["factor"].to(owed[name])
        self._restored = {key: value for key, value in self._restored.items() if key != "ahead"}
        if paid_back:
            self._restored["per_vector"] = {
                **self._restored["per_vector"],
                "owed": {**owed, **paid_back},
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state; it is taken up at the first step, when every strategy has restored
        the weights.

        A state that does not fit is not believed: this callback then starts as in a fresh fit, and
        says so.
        """
        try:
            self._restored = unseal(state_dict, self._check_extra)
        except NormDynError as error:
            self._restored = None
            warn_once(
                f"{type(self).__name__} cannot use its state in the checkpoint: {error}. It starts "
                f"as in a fresh fit; "
                "resume from another checkpoint if that is not what you want."
            )

    def _check_extra(self, extra: Any, where: str) -> None:
        """Refuse, by a NormDynError, what `_extra` cannot have stored."""

    # -- inside
    # --------------------------------------------------------------------------------------------------------

    def _leads(self) -> bool:
        return self._session is not None and self._session.members[0] is self

    def _drop_handlers(self, index: int) -> None:
        for remove in self._handler_removers.pop(index, []):
            remove()

    def _let_go(self) -> None:
        session = self._session
        if session is None or session.closed:
            if session is not None and self._attached_at:
                self._freeze_counts()
            return
        for bracket in session.attachment.brackets:
            bracket.settle()
        for member in session.members:
            member._freeze_counts()
            for index in list(member._handler_removers):
                member._drop_handlers(index)
        session.close()

    def _freeze_counts(self) -> None:
        self._counted = {i: self.steps_of(i) for i in self._attached_at} or self._counted
        self._attached_at = {}

    def idle_in_words(self) -> str:
        """A callback that was to act and never could, in a sentence; empty for any other."""
        session = self._session
        if session is None:
            return ""
        seen, due, acted = self._counts()
        name = type(self).__name__
        if seen == 0 and session.attempts.count and not self._stopped:
            did = "acted in" if self.writes else "measured"
            return f"{name} {did} 0 of {session.attempts.count} steps: no step was seen, none had a gradient, or a scaler skipped all."
        if due and not acted:
            return f"{name} acted in 0 of {seen} steps: no weight that it acts on had a gradient when it was to act."
        return ""

    def _counts(self) -> tuple[int, int, int]:
        """Steps of this fit that were seen, those in which this callback was to act, and those in
        which it did."""
        session = self._session
        assert session is not None
        for bracket in session.attachment.brackets:
            # of a fused optimizer, whether the last step was skipped is still on its way
            bracket.settle()
        seen = sum(
            session.attachment.brackets[i].steps - start
            for i, start in self._attached_at.items()
            if i < len(session.attachment.brackets)
        )
        seen += self._steps_of_gone
        due = sum(tally.due for tally in self._tallies.values())
        return seen, min(due, seen), min(sum(tally.acted for tally in self._tallies.values()), seen)

    def tally_in_words(self) -> str:
        """For the end table: in how many steps this callback acted, unless it did in all that it
        was to act in."""
        if not self.writes:
            return ""
        idle = self.idle_in_words()
        seen, due, acted = self._counts()
        always = acted > 0 and acted == due and not self._stopped
        if idle or always or not seen:
            return idle
        when = f"; it was to act in {due}" if due != seen else ""
        return f"{type(self).__name__} acted in {acted} of {seen} steps{when}."

    def _report_bad(self) -> None:
        if self._reported_bad:
            return
        lines = []
        for plan in self.plans.values():
            per_weight = plan.vectors.totals(plan.bad.to(plan.vectors.sum_dtype)).tolist()
            lines += [
                f"{int(k)} in {t.name}" for k, t in zip(per_weight, plan.targets, strict=True) if k
            ]
        if lines:
            self._reported_bad = True
            first = ", ".join(lines[:8]) + (" ..." if len(lines) > 8 else "")
            warn_once(
                f"{type(self).__name__} left vectors alone whose norm is zero or not finite: "
                f"{first}."
            )

    def _report_idle(self) -> None:
        """Say so if nothing ever came of what might have come."""
        session = self._session
        if session is None or not session.attempts.count or self.plans or not self.acts:
            return
        names = self._may_come()
        if names:
            warn_once(
                f"{type(self).__name__} did nothing in this fit: {named(names)} stayed frozen, no "
                f"optimizer held them, "
                "or no loss read all their rows."
            )


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, numpy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(
    name: str, value: object, bound: Literal["> 0", ">= 0"], otherwise: str = ""
) -> float:
    """An argument as a float, if it is a finite number within ``bound``.

    Args:
        name: of the argument.
        value: what was given.
        bound: what it must be.
        otherwise: what else it may be, for the message.

    Raises:
        ValueError: "`alpha` must be > 0, got -1.0."
    """
    if not is_number(value) or not (value > 0 or (value == 0 and bound == ">= 0")):  # type: ignore[operator]
        raise ValueError(f"`{name}` must be {bound}{otherwise}, got {shown(value)}.")
    if as_float(value) == inf:  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be finite, got {shown(value)}.")
    return float(value)  # type: ignore[arg-type]


def as_float(value: SupportsFloat) -> float:
    """A number as a float, infinite where it is too large for one (``10**400``)."""
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf  # type: ignore[operator]


def check_count(name: str, value: object, least: int, otherwise: str = "") -> int:
    """An argument as an int, if it is a whole number >= ``least``; numpy's integers are.

    Args:
        name: of the argument.
        value: what was given.
        least: what it must be at least.
        otherwise: what else it may be, for the message.

    Raises:
        ValueError: "`every_n_steps` must be an integer >= 1, got 0."
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be {otherwise}an integer >= {least}, got {shown(value)}.")
    return int(value)


def _shown(params: Iterable[str]) -> str:
    params = list(params)
    return repr(params[0]) if len(params) == 1 else repr(params)


__all__ = [
    "NormDynCallback",
    "Plan",
    "Session",
    "Target",
    "as_float",
    "check_count",
    "check_number",
    "is_number",
]
