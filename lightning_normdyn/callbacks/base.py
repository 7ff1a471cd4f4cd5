"""What every callback of the suite shares: the targets, the brackets, the counters, and the way they survive resume, several fits and
exceptions.

One `Session` per fit holds what all callbacks have in common (names, the search for scale-invariant weights, one bracket per optimizer).
A callback adds a policy: which phases it acts in, and with which number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.sharding import check_weight, full_shape, has_gradient, survey, torch_optimizers
from lightning_normdyn.steps import DecayOwner, Phase, Step, StepBracket, check_optimizer
from lightning_normdyn.targets import (
    EULER_COUNT,
    EulerTest,
    ScaleInvarianceSearch,
    Verdict,
    choose_partition,
    filter_partition,
    match_patterns,
    normalize_params,
    parameter_names,
)
from lightning_normdyn.vectors import Partition, WeightVectors

GRANULARITIES = ("auto", "filter", "group", "layer")


class NormDynWarning(UserWarning):
    """Something a person should know; said once."""


def warn_once(message: str) -> None:
    """Warn on rank zero."""
    from lightning.fabric.utilities.rank_zero import _get_rank

    if not _get_rank():
        warnings.warn(message, NormDynWarning, stacklevel=3)


@dataclass
class Target:
    """One targeted weight of one optimizer.

    Args:
        name: its first name in the LightningModule.
        weight: the parameter that the optimizer holds.
        partition: how it splits into vectors.
        verdict: what is known about its scale invariance.
        by_request: whether a person named it although nothing is known to make it scale-invariant.
    """

    name: str
    weight: Tensor
    partition: Partition
    verdict: Verdict
    by_request: bool

    @property
    def scale_invariant(self) -> bool:
        """Whether the loss is known not to see the length of these vectors."""
        return not self.by_request


@dataclass
class Plan:
    """The targets of one callback in one optimizer, as vectors.

    Args:
        index: the optimizer's position in ``trainer.optimizers``.
        optimizer: the torch optimizer.
        targets: in optimizer order.
        vectors: their index space.
        groups: each param group with the range of vectors that it owns.
    """

    index: int
    optimizer: Optimizer
    targets: list[Target]
    vectors: WeightVectors
    groups: list[tuple[dict[str, Any], slice]]
    bad: Tensor = field(init=False)
    _values: dict[str, tuple[list[Any], Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[bool, ...], Tensor] = field(default_factory=dict)
    _owned: dict[tuple[bool, ...], Tensor] = field(default_factory=dict)
    counters: dict[str, Tensor] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bad = torch.zeros(self.vectors.n, dtype=torch.bool, device=self.vectors.device)

    def group_values(self, key: str) -> Tensor:
        """A number of the param groups (``"lr"``, ...) for each vector, ``(n,)`` float64, read at this very step."""
        values = [group.get(key) for group, _ in self.groups]
        return self.spread_groups(key, [0.0 if v is None else v for v in values])

    def spread_groups(self, key: str, values: list[Any]) -> Tensor:
        """One number per param group, for each vector: ``(n,)`` float64; cached under ``key`` while the numbers stay the same."""
        # A float is a kernel argument; only a tensor that lives on the device is read there. Nothing waits for the device.
        values = [float(v) if isinstance(v, Tensor) and v.device.type == "cpu" else v for v in values]
        known = self._values.get(key)
        constant = not any(isinstance(v, Tensor) for v in values)
        if known is not None and constant and known[0] == values:
            return known[1]
        out = torch.empty(self.vectors.n, dtype=self.vectors.sum_dtype, device=self.vectors.device)
        for value, (_, where) in zip(values, self.groups, strict=True):
            out[where] = value
        self._values[key] = (values if constant else [], out)
        return out

    def active(self) -> Tensor | None:
        """``(n,)`` bool: vectors of weights that got a gradient in this step; None if all did."""
        missing = tuple(not has for has in self.vectors.has_gradient())
        if not any(missing):
            return None
        if missing not in self._masks:
            per_weight = ~torch.tensor(missing, dtype=torch.bool, device=self.vectors.device)
            self._masks[missing] = self.vectors.spread(per_weight)
        return self._masks[missing]

    def treated(self, step: Step) -> Tensor | None:
        """``(n,)`` bool: vectors of weights that got a gradient in an update that the device does not skip; None: all, for certain."""
        active = self.active()
        if step.skipped is None:
            return active
        all_active = torch.ones_like(self.bad) if active is None else active
        return step.unless_skipped(all_active, False)

    def guard(self, values: Tensor, neutral: float, step: Step, norms: Tensor | None = None) -> Tensor:
        """``values`` where a vector can be treated, ``neutral`` elsewhere.

        Elsewhere means: a weight without gradient, an update that the device skips, a zero norm, a non-finite number. The last two are
        remembered in ``bad``.
        """
        good = torch.isfinite(values)
        if norms is not None:
            good &= torch.isfinite(norms) & (norms > 0)
        self.bad |= ~good
        active = self.active()
        if active is not None:
            good = good & active
        return step.unless_skipped(torch.where(good, values, torch.full_like(values, neutral)), neutral)

    def owns_decay(self, step: Step, owner: DecayOwner) -> Tensor:
        """``(n,)``: 1 for vectors whose decay is ``owner``'s to apply, 0 for those that another callback decays."""
        owned = tuple(step.bracket.decay_owner(t.weight) == owner for t in self.targets)
        if owned not in self._owned:
            self._owned[owned] = self.vectors.spread(torch.tensor(owned, dtype=self.vectors.sum_dtype, device=self.vectors.device))
        return self._owned[owned]

    def optimizer_decay(self, step: Step) -> Tensor:
        """``(n,)``: lr times the weight decay that the optimizer itself applies in this step; 0 where a callback owns the decay."""
        owned = tuple(step.bracket.decay_owner(t.weight) is None for t in self.targets)
        if owned not in self._owned:
            self._owned[owned] = self.vectors.spread(torch.tensor(owned, dtype=self.vectors.sum_dtype, device=self.vectors.device))
        return self.group_values("lr") * self.group_values("weight_decay") * self._owned[owned]

    def count(self, key: str, values: Tensor) -> None:
        """Add ``(n,)`` 0/1 values to a counter per vector that stays on the device until somebody reads it."""
        if key in self.counters:
            self.counters[key] += values
        else:
            self.counters[key] = values.clone()

    def inherit(self, earlier: Plan) -> None:
        """Take over what was counted for weights that an earlier plan had as well."""
        where = {t.name: s for t, s in zip(earlier.targets, earlier.vectors.slices, strict=True)}
        for target, now in zip(self.targets, self.vectors.slices, strict=True):
            before = where.get(target.name)
            if before is None or before.stop - before.start != now.stop - now.start:
                continue
            self.bad[now] = earlier.bad[before]
            for key, values in earlier.counters.items():
                self.counters.setdefault(key, values.new_zeros(self.vectors.n))[now] = values[before]
        self.events = earlier.events

    def mark(self, event: str) -> None:
        """Note that something happened to these weights in this step; the monitor writes it into its history."""
        self.events.append(event)

    def group_of(self, target: Target) -> dict[str, Any]:
        """The param group that owns ``target``."""
        return next(group for group, _ in self.groups if any(p is target.weight for p in group["params"]))


class Session:
    """What all callbacks of the suite share during one fit."""

    _of: ClassVar[WeakKeyDictionary[Trainer, Session]] = WeakKeyDictionary()

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Session:
        """The session of the fit that is running on ``trainer``."""
        session = cls._of.get(trainer)
        if session is None or session.closed:
            session = cls._of[trainer] = cls(trainer, module)
        return session

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.closed = False
        # By identity and before anything runs: under FSDP2 a later no-grad forward shows parameters that are not the optimizer's.
        self.names = parameter_names(module)
        survey(trainer.strategy.model or module, trainer.optimizers)  # the module inside of whatever the strategy wraps around it
        self.shapes = {weight: full_shape(weight) for weight in self.names}
        self.search = ScaleInvarianceSearch(module)
        self.members: list[NormDynCallback] = []
        self.optimizers: list[Optimizer] = []
        self.brackets: list[StepBracket] = []
        self._remove: list[Callable[[], None]] = []
        self._watching = False
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._watched: tuple[Any, ...] | None = None
        self._undecided: set[Tensor] = set()
        self._missed: set[Tensor] = set()
        # A weight that trains but never shows up in a loss (a backward that Lightning does not see) must not cost every batch.
        self._looks_left = 8
        self._normalizations = [m for m in module.modules() if getattr(m, "running_mean", None) is not None]
        self._version = 0
        self._claims: dict[int, Claims | None] = {}
        self._withdrawn: dict[str, Verdict] = {}
        self._announced = False
        self.attempts = 0
        self.batch: Any = None
        """The batch that is being trained on."""

    # -- brackets ------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Bracket every optimizer of the fit; idempotent."""
        if self.brackets:
            return
        self.optimizers = [part for o in self.trainer.optimizers for part in torch_optimizers(o)]
        self.brackets = [StepBracket.of(o) for o in self.optimizers]
        for bracket in self.brackets:
            self._remove.append(bracket.add(Phase.RESOLVE, self._resolve))

    def close(self) -> None:
        """Leave no hook behind; idempotent."""
        self.search.close()
        self._watching = False
        for bracket in self.brackets:
            bracket.restore()
        for remove in self._remove:
            remove()
        self._remove = []
        self.closed = True

    # -- the search for scale-invariant weights ------------------------------------------------------------------------

    def batch_start(self) -> None:
        """Watch the forward pass of this batch if it may tell something new."""
        state = self._graph_state()
        # The batch that gave it a gradient is over; the next one that uses it may be several batches away.
        self._missed = {w for w in self._undecided if w in self._missed or (w.requires_grad and has_gradient(w))}
        news = self._looks_left > 0 and bool(self._missed)
        if self._watched == state and not news:
            return
        self._looks_left -= news
        if self._watched is None and self._restore_verdicts():
            self._watched = state
            return
        self._watched = state
        self._watching = True
        self.search.watch()

    def before_backward(self, loss: Tensor) -> None:
        """Read the graph of this loss, if its forward was watched."""
        if self._watching:
            self.search.analyze(loss)
            self._version += 1

    def batch_end(self) -> None:
        """Stop watching; once every optimizer has stepped, say what was found."""
        if self._watching:
            self.search.close()
            self._watching = False
        if not self._announced and self.optimizers and len(self._seen) == len(self.optimizers):
            self._announced = True
            for member in self.members:
                member._check_found()
            announce(self)

    def _graph_state(self) -> tuple[Any, ...]:
        """What decides the graph's shape and may change during a fit: frozen weights, normalizations switched between training and
        evaluation."""
        return (
            tuple(w.requires_grad for w in self.names),
            tuple(m.training for m in self._normalizations),
        )

    def _restore_verdicts(self) -> bool:
        tables = [m._restored["targets"] for m in self.members if m._restored and m._restored.get("targets")]
        for table in tables:
            self.search.verdicts.update({name: Verdict.from_state(name, state) for name, state in table.items()})
        return bool(tables)

    def verdict(self, weight: Tensor) -> Verdict:
        """What is known about ``weight``."""
        names = self.names.get(weight, ())
        for name in names:
            if name in self.search.verdicts:
                return self.search.verdicts[name]
        return Verdict.unknown(names[0] if names else "?", self.shapes.get(weight, tuple(weight.shape)))

    def _resolve(self, step: Step) -> None:
        index = next(i for i, b in enumerate(self.brackets) if b is step.bracket)
        groups = step.optimizer.param_groups
        layout = tuple((id(g), len(g["params"])) for g in groups)
        if self._seen.get(index) != (self._version, layout):
            self.search.agree()
            agree(self.search.verdicts)
            self.search.verdicts.update(self._withdrawn)
            self._claims.pop(index, None)
        self._question(index, step.optimizer)  # the same on every rank, because its sums are
        seen = (self._version, layout)
        if self._seen.get(index) == seen:
            return
        self._seen[index] = seen
        self._undecided = {w for o in self.optimizers for w in self.owned(o) if self.verdict(w).kind == "unknown"}
        for member in self.members:
            member._resolve(index)

    # -- numbers that the monitor shows --------------------------------------------------------------------------------

    def attempt(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, unless its scaler finds an inf."""
        self.attempts += 1
        for bracket in self.brackets:
            bracket.close_in()

    def skipped_steps(self) -> int:
        """Updates that a gradient scaler skipped in this fit."""
        pending = sum(b.unsettled for b in self.brackets)
        return max(0, self.attempts - sum(b.steps for b in self.brackets) - pending)

    def counted(self, key: str) -> Tensor | None:
        """Sum of a counter over all vectors of all callbacks, ``(1,)`` on the device; None if nobody counts it."""
        totals = [plan.vectors.totals(plan.counters[key]) for m in self.members for plan in m.plans.values() if key in plan.counters]
        return torch.cat([t.to(totals[0].device) for t in totals]).sum(0, keepdim=True) if totals else None

    def influence(self, target: Target, besides: NormDynCallback | None = None) -> dict[str, Any]:
        """What the callbacks, ``besides`` one, do to this weight: `NormDynCallback.influence`, merged."""
        found: dict[str, Any] = {}
        for member in self.members:
            if member is not besides and any(t.weight is target.weight for plan in member.plans.values() for t in plan.targets):
                found.update(member.influence(target))
        return found

    def applied_decay(self, plan: Plan, norm: Tensor, std: Tensor | None = None) -> Tensor:
        """The share of each vector that decay takes away in this step, whoever applies it: ``(n,)``.

        Exact for plain SGD and for decoupled decays.

        Args:
            plan: the vectors.
            norm: their norms, ``(n,)``.
            std: their standard deviations, for AWS on weight-standardized weights.
        """
        constant, adaptive = [], []  # per target: λ, and α times the size that it refers to
        for target in plan.targets:
            influence, group = self.influence(target), plan.group_of(target)
            own = float(group.get("weight_decay") or 0.0)
            replaced = bool(influence.get("replaces_decay"))
            if influence.get("projected"):
                decay = influence["projection_decay"]
                own, replaced = (own if decay == "replace" else decay) * influence["weight_decay_ratio"], "alpha" in influence
            constant.append(0.0 if replaced else own)
            adaptive.append((float(influence.get("alpha", 0.0)), influence.get("statistic") == "std"))
        tensor = partial(torch.tensor, dtype=norm.dtype, device=norm.device)
        size = norm if std is None else torch.where(plan.vectors.spread(tensor([s for _, s in adaptive])) > 0, std, norm)
        rate = plan.vectors.spread(tensor(constant)) + plan.vectors.spread(tensor([a for a, _ in adaptive])) * size
        return (plan.group_values("lr") * rate).clamp(max=0.5)

    def take_events(self) -> list[str]:
        """What callbacks noted since the last call."""
        events = []
        for member in self.members:
            for plan in member.plans.values():
                events += plan.events
                plan.events = []
        return list(dict.fromkeys(events))

    def _question(self, index: int, optimizer: Optimizer) -> None:
        """Hold what the graph claims against the first real gradients; a contradiction withdraws the claim before anything is touched."""
        if index not in self._claims:
            verdicts = {w: self.verdict(w) for w in self.owned(optimizer) if not _has_sparse_gradient(w)}
            claimed = [w for w, verdict in verdicts.items() if verdict.known == "graph" and verdict.partition is not None]
            # Clipping by value turns the gradient, so it would say nothing about the loss.
            by_value = self.trainer.gradient_clip_val and str(self.trainer.gradient_clip_algorithm).lower().endswith("value")
            self._claims[index] = None if by_value or not claimed else Claims(claimed, [self.verdict(w) for w in claimed])
        claims = self._claims[index]
        if claims is None:
            return
        for verdict, rms, count in claims.withdrawn():
            withdrawn = self._withdrawn[verdict.name] = self.search.verdicts[verdict.name] = verdict.withdrawn(rms, count)
            self._version += 1
            warn_once(f"`{verdict.name}` is no longer taken for scale-invariant: {withdrawn.reason}.")
        if claims.decided:
            for verdict in claims.verdicts:
                if self.search.verdicts[verdict.name] is verdict:
                    self.search.verdicts[verdict.name] = replace(verdict, known="graph and gradients")
            self._claims[index] = None

    def owned(self, optimizer: Optimizer) -> list[Tensor]:
        """Weights of two or more dimensions that ``optimizer`` holds, in its order."""
        return [p for g in optimizer.param_groups for p in g["params"] if p in self.names and len(self.shapes[p]) >= 2]


class Claims:
    """The claims of one optimizer's weights, held against its first gradients (`lightning_normdyn.targets.EulerTest`).

    Args:
        weights: the claimed weights.
        verdicts: what the graph claims of each.
    """

    MOST_STEPS = 16

    def __init__(self, weights: list[Tensor], verdicts: list[Verdict]) -> None:
        self.verdicts = verdicts
        partitions = [v.partition for v in verdicts if v.partition is not None]
        self._vectors = WeightVectors(weights, partitions, [v.name for v in verdicts])
        self._test = EulerTest(len(weights), self._vectors.device)
        self._steps = 0
        self._told: set[int] = set()
        self.decided = False

    def withdrawn(self) -> list[tuple[Verdict, float, int]]:
        """Take this step's gradients in; claims that they contradict: verdict, rms of z, over how many values."""
        vectors, test = self._vectors, self._test
        weights, gradients = vectors.values(), vectors.gradients()

        def summarize(sums: Tensor, length: Tensor) -> Tensor:
            ww, wg, gg = sums
            each = EulerTest(length.numel(), vectors.device)
            each.update(wg, ww, gg, length, torch.arange(length.numel(), device=vectors.device))
            return each.sums.T.to(vectors.sum_dtype)

        pairs = (weights, weights), (weights, gradients), (gradients, gradients)
        test.sums += vectors.inner_and_totals(*pairs, summarize=summarize)[1].T
        self._steps += 1
        found, new = test.result(), [i for i in test.rejected() if i not in self._told]
        self._told.update(new)
        self.decided = self._steps >= self.MOST_STEPS or all(count >= EULER_COUNT for _, count in found)
        return [(self.verdicts[i], *found[i]) for i in new]


def agree(verdicts: dict[str, Verdict]) -> None:
    """Make all ranks hold the same verdicts: a weight on which they differ is not touched."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    mine = {name: (v.shape, _digest(v.state())) for name, v in verdicts.items()}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for name in sorted({n for table in everybody for n in table}):
        found = [table.get(name) for table in everybody]
        if any(f != found[0] for f in found):
            shape, _ = next(f for f in found if f is not None)
            verdicts[name] = Verdict.unknown(name, shape, "the ranks see different graphs")


def _digest(state: Any) -> str:
    """Short and the same for equal states: the labels of a large model's weights are megabytes."""
    if isinstance(state, Tensor):
        return sha256(state.cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, Mapping):
        return repr([(key, _digest(value)) for key, value in sorted(state.items())])
    if isinstance(state, (list, tuple)):
        return repr([_digest(value) for value in state])
    return repr(state)


class NormDynCallback(Callback):
    """Common shell: resolves targets, brackets the optimizers, counts steps, keeps per-vector state.

    Args:
        params: ``"auto"``, one glob pattern, or a list of them, over the LightningModule's own parameter names; ``"!pattern"`` excludes.
        granularity: what counts as one vector; ``"auto"`` follows the normalization behind the weight.
    """

    writes: ClassVar[bool] = True
    """Whether ``params="auto"`` means the scale-invariant weights (an error if there are none), or every weight of two or more
    dimensions."""

    def __init__(self, params: str | Sequence[str] = "auto", granularity: str = "auto") -> None:
        self.params = normalize_params(params)
        if granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {GRANULARITIES}, got {granularity!r}.")
        self.granularity = granularity
        self.plans: dict[int, Plan] = {}
        self._session: Session | None = None
        self._restored: dict[str, Any] | None = None
        self._counted: dict[int, int] = {}
        self._attached_at: dict[int, int] = {}
        self._per_vector: dict[str, dict[str, Tensor]] = {}  # of the vectors that this rank holds
        self._restored_vectors: dict[str, dict[str, Tensor]] = {}  # of all vectors, from a checkpoint
        self._named: set[Tensor] = set()  # by patterns, known at fit start
        self._reported_bad = False

    # -- what a callback adds ------------------------------------------------------------------------------------------

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Which phases this callback acts in."""
        raise NotImplementedError

    def check_optimizer(self, optimizer: Optimizer, weights: list[Tensor]) -> None:
        """Refuse, before training, an optimizer whose ``weights`` this callback cannot treat rightly."""

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """A plan was made or made anew: precompute what depends on it."""

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers: stored in checkpoints, shown in tables."""
        return {}

    def treatment(self, plan: Plan, target: Target) -> str:
        """How the tables say what happens to ``target``."""
        return type(self).__name__

    def influence(self, target: Target) -> dict[str, Any]:
        """What this callback does to ``target``, in numbers that predictions need: ``alpha``, ``statistic``, ``projected``,
        ``every_n_steps``, ..."""
        return {}

    @property
    def acts(self) -> bool:
        """Whether it is an error to find nothing: not for those who only look."""
        return self.writes

    @property
    def shows_tables(self) -> bool:
        """Whether this callback wants the tables printed."""
        return True

    # -- counters and per-vector state ---------------------------------------------------------------------------------

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that this callback has seen, over resumes."""
        counted = self._counted.get(index, 0)
        if self._session is not None and index in self._attached_at:
            bracket = self._session.brackets[index]
            counted += bracket.steps - self._attached_at[index]
        return counted

    def number(self, step: Step, plan: Plan) -> int:
        """1-based count of ``step`` over resumes."""
        return self._counted.get(plan.index, 0) + step.number - self._attached_at[plan.index]

    def per_vector(self, key: str, plan: Plan, make: Callable[[], Tensor]) -> Tensor:
        """State of each vector, kept by weight name so that it survives new plans and checkpoints; ``make`` gives it for weights seen
        first."""
        table, restored = self._per_vector.setdefault(key, {}), self._restored_vectors.get(key, {})
        vectors = plan.vectors
        fresh: Tensor | None = None
        for i, (target, where) in enumerate(zip(plan.targets, vectors.slices, strict=True)):
            whole = restored.pop(target.name, None)
            if whole is not None and whole.numel() == target.partition.n:
                table[target.name] = vectors.scatter_one(i, whole)
            elif target.name not in table or table[target.name].numel() != where.stop - where.start:
                fresh = make() if fresh is None else fresh
                table[target.name] = fresh[where].clone()
        return torch.cat([table[t.name].to(vectors.device) for t in plan.targets]) if plan.targets else torch.zeros(0)

    def _gather_per_vector(self) -> dict[str, dict[str, Tensor]]:
        """The state of all vectors of all ranks, on every rank."""
        gathered: dict[str, dict[str, Tensor]] = {}
        for key, table in self._per_vector.items():
            gathered[key] = {name: values.detach().cpu() for name, values in (table | self._restored_vectors.get(key, {})).items()}
            for plan in self.plans.values():
                if all(t.name in table for t in plan.targets):
                    mine = torch.cat([table[t.name].to(plan.vectors.device) for t in plan.targets])
                    whole = plan.vectors.gather(mine)
                    gathered[key].update({t.name: values.cpu().clone() for t, values in zip(plan.targets, whole, strict=True)})
        return {**self._restored_vectors, **gathered}

    def store_per_vector(self, key: str, plan: Plan, values: Tensor) -> None:
        """Keep new per-vector state under ``key``."""
        table = self._per_vector.setdefault(key, {})
        for target, where in zip(plan.targets, plan.vectors.slices, strict=True):
            table[target.name] = values[where]

    # -- resolution ----------------------------------------------------------------------------------------------------

    def _resolve(self, index: int) -> None:
        session = self._session
        assert session is not None
        self._adopt_restored()
        bracket, optimizer = session.brackets[index], session.optimizers[index]
        owned = session.owned(optimizer)
        selected = self._select(owned)
        for weight in selected:
            self._check_weight(weight, session.names[weight][0])
        targets = [t for w in selected if (t := self._target(w)) is not None]
        self._refuse_rivals([t.weight for t in targets])
        self.check_optimizer(optimizer, [t.weight for t in targets])
        self._drop_handlers(index)
        if not targets:
            self.plans.pop(index, None)
            return
        plan = self._make_plan(index, optimizer, targets)
        if index in self.plans:
            plan.inherit(self.plans[index])
        self.plans[index] = plan
        self._attached_at.setdefault(index, bracket.steps)
        for phase, handler in self.handlers().items():
            self._handler_removers.setdefault(index, []).append(bracket.add(phase, _bind(handler, plan), order=self.state_key))
        self.on_plan(plan, bracket)

    def _make_plan(self, index: int, optimizer: Optimizer, targets: list[Target]) -> Plan:
        vectors = WeightVectors([t.weight for t in targets], [t.partition for t in targets], [t.name for t in targets])
        where = {t.weight: s for t, s in zip(targets, vectors.slices, strict=True)}
        groups = []
        for group in optimizer.param_groups:
            slices = [where[p] for p in group["params"] if p in where]
            if slices:
                groups.append((group, slice(slices[0].start, slices[-1].stop)))
        return Plan(index, optimizer, targets, vectors, groups)

    def _select(self, owned: list[Tensor]) -> list[Tensor]:
        session = self._session
        assert session is not None
        auto = [w for w in owned if not self.writes or session.verdict(w).partition is not None]
        if self.params == ["auto"]:
            return [w for w in auto if self._can_measure(w)]
        weights = [w for w in session.names if len(session.shapes[w]) >= 2]
        chosen = match_patterns(self.params, [session.names[w] for w in weights], what="weights of two or more dimensions")
        named = {weights[i] for i in chosen}
        includes = any(not p.startswith("!") for p in self.params)
        return [w for w in (owned if includes else auto) if w in named and (includes or self._can_measure(w))]

    def _can_measure(self, weight: Tensor) -> bool:
        """Whether ``"auto"`` takes this weight in; a named one is refused with the reason instead."""
        session = self._session
        assert session is not None
        try:
            self._check_weight(weight, session.names[weight][0])
        except NotSupportedError:
            return False
        return True

    def _check_weight(self, weight: Tensor, name: str) -> None:
        check_weight(weight, name)
        session = self._session
        assert session is not None
        holders = [m for m in session.module.modules() if any(p is weight for p in m.parameters(recurse=False))]
        if _has_sparse_gradient(weight) or any(getattr(m, "sparse", False) for m in holders):
            raise NotSupportedError(
                f"`{name}` gets sparse gradients ({type(holders[0]).__name__}): the optimizer does not step untouched rows. "
                f"Use sparse=False, or leave it out with params=[..., '!{name}']."
            )

    def _target(self, weight: Tensor) -> Target | None:
        session = self._session
        assert session is not None
        verdict, name, shape = session.verdict(weight), session.names[weight][0], session.shapes[weight]
        fallback = filter_partition(session.module, name, shape)
        partition = choose_partition(verdict, self.granularity, fallback)
        return Target(name, weight, partition, verdict, by_request=verdict.partition is None)

    def _refuse_rivals(self, weights: list[Tensor]) -> None:
        session = self._session
        assert session is not None
        for other in session.members:
            if other is self or type(other) is not type(self):
                continue
            theirs = other._named | {t.weight for plan in other.plans.values() for t in plan.targets}
            both = [session.names[w][0] for w in weights if w in theirs]
            if both:
                raise NotSupportedError(
                    f"Two {type(self).__name__} callbacks target `{both[0]}`{f' and {len(both) - 1} more' if len(both) > 1 else ''}. "
                    "Give them different `params`, or remove one."
                )

    def _check_found(self) -> None:
        """After every optimizer has stepped once: ``"auto"`` must have found something to act on."""
        if self.plans or not self.acts:
            return
        assert self._session is not None
        verdicts = self._session.search.verdicts.values()
        reasons = [f"  {v.name}: {v.reason or v.kind}" for v in verdicts][:8]
        kind = "scale-invariant weight" if self.writes else "weight of two or more dimensions"
        found = "\n".join(reasons) if reasons else "  no training loss was seen in on_before_backward (call self.manual_backward(loss))"
        raise NoTargetsError(
            f"{type(self).__name__}(params={_shown(self.params)}) found no {kind} to act on:\n{found}\n"
            "Name weights with params='PATTERN' if you know better, or remove the callback."
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
                f"{type(self).__name__} resumes with other settings than the checkpoint's ({', '.join(changed)}); "
                "the new ones hold, counters go on."
            )

    def _load_extra(self, extra: dict[str, Any]) -> None:
        """Take up what `_extra` stored."""

    def _extra(self) -> dict[str, Any]:
        """More state of a callback, plain tensors and numbers."""
        return {}

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Identifies this callback's state in a checkpoint: class, params and granularity, so that a changed number keeps its
        counters."""
        return self._generate_state_key(params=_shown(self.params), granularity=self.granularity)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of another package; forget an earlier fit."""
        if not isinstance(trainer, Trainer):
            raise NotSupportedError(
                f"{type(self).__name__} was given to a Trainer of `{type(trainer).__module__.split('.')[0]}`; it belongs to `lightning`. "
                "Use `from lightning import Trainer` (and LightningModule) throughout."
            )
        if stage == "fit":
            # Here and not in on_fit_start: the tuner may save and restore a checkpoint before that.
            self._session, self._restored = None, None
            self.plans, self._counted, self._attached_at, self._per_vector, self._restored_vectors = {}, {}, {}, {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Map names, check patterns and optimizers."""
        self._session = Session.of(trainer, pl_module)
        self._session.members.append(self)
        self._handler_removers: dict[int, list[Callable[[], None]]] = {}
        self._reported_bad = False
        self._named = set()
        for optimizer in trainer.optimizers:
            for part in torch_optimizers(optimizer):
                check_optimizer(part)
        self._check_patterns(trainer)

    def _check_patterns(self, trainer: Trainer) -> None:
        session = self._session
        assert session is not None
        if self.params == ["auto"]:
            return
        weights = [w for w in session.names if len(session.shapes[w]) >= 2]
        chosen = match_patterns(self.params, [session.names[w] for w in weights], what="weights of two or more dimensions")
        if not any(not p.startswith("!") for p in self.params):
            return
        owned = {p for o in trainer.optimizers for part in torch_optimizers(o) for g in part.param_groups for p in g["params"]}
        for i in chosen:
            weight = weights[i]
            self._check_weight(weight, session.names[weight][0])
            exact = any(n in self.params for n in session.names[weight])
            if exact and weight.requires_grad and weight not in owned:
                raise NoTargetsError(
                    f"`{session.names[weight][0]}` was asked to be a target, but no optimizer holds it. "
                    "Return it from configure_optimizers, or leave it out."
                )
        self._named = {weights[i] for i in chosen}
        self._refuse_rivals([weights[i] for i in chosen])
        for optimizer in trainer.optimizers:
            for part in torch_optimizers(optimizer):
                self.check_optimizer(part, [p for g in part.param_groups for p in g["params"] if p in self._named])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bracket the optimizers: only here are weights, optimizer state and callback state restored under every strategy."""
        # The tuner's inner fits and sanity checks come before this, so nothing acts in them.
        assert self._session is not None
        self._session.attach()
        for index, bracket in enumerate(self._session.brackets):
            self._attached_at[index] = bracket.steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the first forward pass."""
        if self._leads():
            assert self._session is not None
            self._session.batch = batch
            self._session.batch_start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the graph of a watched forward pass."""
        if self._leads():
            assert self._session is not None
            self._session.before_backward(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count attempts, so that skipped steps can be told."""
        if self._leads():
            assert self._session is not None
            self._session.attempt(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._let_go()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._let_go()
        if stage != "fit":
            self._restored = None  # an evaluation that loaded a checkpoint is no resume

    def state_dict(self) -> dict[str, Any]:
        """Counters, per-vector state and the table of targets: plain tensors, numbers and strings."""
        if self._restored is not None:
            return self._restored
        session = self._session
        if session is not None:
            for bracket in session.brackets:
                bracket.settle()
        verdicts = {} if session is None else {n: v.state() for n, v in session.search.verdicts.items() if v.kind != "unknown"}
        indices = range(len(session.brackets)) if session is not None else sorted(self._counted)
        return {
            "version": 1,
            "settings": self.settings(),
            "steps": {i: self.steps_of(i) for i in indices},
            "per_vector": self._gather_per_vector(),
            "targets": verdicts,
            "extra": {} if session is None else self._extra(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state; it is taken up at the first step, when every strategy has restored the weights."""
        self._restored = dict(state_dict)

    # -- inside --------------------------------------------------------------------------------------------------------

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
        for bracket in session.brackets:
            bracket.settle()
        for member in session.members:
            member._freeze_counts()
            for index in list(member._handler_removers):
                member._drop_handlers(index)
        session.close()

    def _freeze_counts(self) -> None:
        self._counted = {i: self.steps_of(i) for i in self._attached_at} or self._counted
        self._attached_at = {}

    def _report_bad(self) -> None:
        if self._reported_bad:
            return
        lines = []
        for plan in self.plans.values():
            per_weight = plan.vectors.totals(plan.bad.to(plan.vectors.sum_dtype)).tolist()
            lines += [f"{int(k)} in {t.name}" for k, t in zip(per_weight, plan.targets, strict=True) if k]
        if lines:
            self._reported_bad = True
            named = ", ".join(lines[:8]) + (" ..." if len(lines) > 8 else "")
            warn_once(f"{type(self).__name__} left vectors alone whose norm is zero or not finite: {named}.")


def log_every(trainer: Trainer) -> int:
    """The Trainer's ``log_every_n_steps``."""
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by the logger connector


def balance(influence: Mapping[str, Any], group: Mapping[str, Any], shrink: float | None = None) -> dict[str, Any] | None:
    """What pulls a weight shorter and what its steps lose, in the words of `lightning_normdyn.equilibrium`.

    Args:
        influence: what the callbacks do to the weight (`NormDynCallback.influence`, merged).
        group: its param group.
        shrink: the decay that AWS amounts to now.

    Returns:
        The options ``shrink``, ``projected`` and ``decay``; None where nothing has been derived: two decays at once, steps of a
        recorded length, a norm that WRS sets now and then (`lightning_normdyn.equilibrium.wrs_angular_update` knows about that).
    """
    if influence.get("scales_steps") or "every_n_steps" in influence:
        return None
    options: dict[str, Any] = {"projected": True} if influence.get("projected") else {}
    decay = group.get("weight_decay") or 0.0
    if "projection_decay" in influence:
        replaced = decay / (1 - group["momentum"]) if "momentum" in group else decay
        decay = replaced if influence["projection_decay"] == "replace" else influence["projection_decay"]
        options["decay"] = decay * influence["weight_decay_ratio"]
    if "alpha" in influence:
        if decay and not influence["replaces_decay"]:
            return None
        options.pop("decay", None)
        options["shrink"] = shrink
    return options


def _has_sparse_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and weight.grad.layout != torch.strided


def _bind(handler: Callable[[Step, Plan], None], plan: Plan) -> Callable[[Step], None]:
    def call(step: Step) -> None:
        handler(step, plan)

    return call


def _shown(params: Iterable[str]) -> str:
    params = list(params)
    return repr(params[0]) if len(params) == 1 else repr(params)


def announce(session: Session) -> None:
    """Print the table of targets, once, on rank zero."""
    from lightning_normdyn.callbacks.tables import print_start_table

    print_start_table(session)  # every rank works out the numbers in it, rank zero prints


__all__ = ["NormDynCallback", "NormDynWarning", "Plan", "Session", "Target", "balance", "log_every", "warn_once"]
