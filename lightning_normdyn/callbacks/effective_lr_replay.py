"""Replay of a recorded effective learning rate: what weight decay does, without weight decay."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, ScaledSteps
from lightning_normdyn.engine.lightning_facts import batches_that_stepped
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.engine.target import Target
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.functional import norm_from_sums, std_from_sums
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.optimizers.group_numbers import group_number, is_zero
from lightning_normdyn.optimizers.recognition import facts_of, why_not_as_base
from lightning_normdyn.optimizers.step import Phase, Step


@dataclass
class _Record:
    """What was recorded of one optimizer's targets, on their device.

    Args:
        steps: the ``s`` recorded steps, ascending.
        norms: float32, or float64 if ``exact``, ``(s, n)``, of the vectors that this rank holds.
        decays: float32 ``(s, n)``.
        exact: whether what float32 leaves of the norms was recorded, too.
    """

    steps: list[int]
    norms: Tensor
    decays: Tensor
    exact: bool

    @classmethod
    def of(cls, plan: Plan, history: History) -> _Record:
        """The record of a plan's targets; a weight that joined later, or was recorded at other
        steps than the rest, is interpolated."""
        found = [
            (_recorded_norms(history, t.name), history.vectors(f"decay/{t.name}")[1])
            for t in plan.targets
        ]
        exact = any(norm.dtype == np.float64 for (_, norm), _ in found)
        kept = torch.float64 if exact else torch.float32
        # All steps at which any weight was recorded: one that joined later has fewer of its own.
        all_steps = np.concatenate([own for (own, _), _ in found])
        steps = np.unique(all_steps).tolist()
        norms, decays = [], []
        for (own, norm), decay in found:
            # Of a run that diverged: a norm of infinity would make the factor 0 and stop the
            # vector, while one of NaN leaves it alone.
            norm = np.where(np.isfinite(norm), norm, np.nan)
            own_norms = torch.from_numpy(norm)
            own_decays = torch.from_numpy(decay)
            if len(own) != len(steps):
                recorded_at = own.tolist()
                places = [_around(recorded_at, step) for step in steps]
                norms_between = [_between(own_norms, place, geometric=True) for place in places]
                decays_between = [_between(own_decays, place) for place in places]
                own_norms = torch.stack(norms_between)
                own_decays = torch.stack(decays_between).float()
            norms.append(own_norms.to(kept))
            decays.append(own_decays)
        return cls(steps, plan.vectors.scatter(norms), plan.vectors.scatter(decays), exact)

    @property
    def has_gaps(self) -> bool:
        """Whether a step between the first and the last is missing."""
        return self.steps[-1] - self.steps[0] >= len(self.steps)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Norm and decay, ``(n,)`` each; norms interpolated geometrically, and held before the
        first and after the last step."""
        # Geometrically, since norms change by factors. A decay may be 0, which has no logarithm.
        place = _around(self.steps, step)
        return _between(self.norms, place, geometric=True), _between(self.decays, place)


def _as_recorded(values: Tensor, exact: bool = False) -> Tensor:
    # The record holds a norm as float32 and, if exact, what that leaves as another float32.
    rounded = values.float().to(values.dtype)
    if exact:
        return rounded + (values - rounded).float().to(values.dtype)
    return rounded


Place = tuple[int, int, float]


def _around(steps: Sequence[int], step: int) -> Place:
    """The records before and after ``step``, and how far it is on the way from one to the other."""
    after = min(bisect_left(steps, step), len(steps) - 1)
    # At a record, or beyond either end of them: that record is held.
    if after == 0 or steps[after] <= step:
        return after, after, 0.0
    before = after - 1
    share = (step - steps[before]) / (steps[after] - steps[before])
    return before, after, share


def _between(table: Tensor, place: Place, *, geometric: bool = False) -> Tensor:
    before, after, share = place
    # Apple GPUs have no float64.
    wide = torch.float32 if table.device.type == "mps" else torch.float64
    first = table[before].to(wide)
    if before == after:
        return first
    last = table[after].to(wide)
    if geometric:
        return (first.log().lerp(last.log(), share)).exp()
    return first.lerp(last, share)


def _recorded_names(history: History) -> list[str]:
    return [
        name.removeprefix("weight_norm/")
        for name in history.vector_names()
        if name.startswith("weight_norm/")
    ]


def _recorded_norms(history: History, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Steps, and norms ``(s, n)``: float64 where what float32 leaves of them was recorded, too."""
    steps, norms = history.vectors(f"weight_norm/{name}")
    rest = f"weight_norm_rest/{name}"
    if rest not in history.vector_names():
        return steps, norms
    exact_norms = norms.astype(np.float64) + history.vectors(rest)[1]
    return steps, exact_norms


def _about(history: History, name: str) -> dict[str, Any]:
    """What the monitor noted about a weight at the end of its fit; nothing for a file that was
    saved before."""
    targets = history.meta.get("targets")
    about = targets.get(name) if isinstance(targets, dict) else None
    if isinstance(about, dict):
        return about
    return {}


def _check_record(path: str, history: History, names: Sequence[str]) -> None:
    """Refuse what no run can have recorded, before anything is scaled by it."""
    for name in names:
        steps, norms = history.vectors(f"weight_norm/{name}")
        decays = None
        rests = norms
        rest_key = f"weight_norm_rest/{name}"
        if rest_key in history.vector_names():
            rests = history.vectors(rest_key)[1]
        decay_key = f"decay/{name}"
        if decay_key in history.vector_names():
            decay_steps, decays = history.vectors(decay_key)
        fault = None
        if not len(steps):
            fault = "no record at all"
        elif (
            decays is None or decays.shape != norms.shape or not np.array_equal(steps, decay_steps)
        ):
            fault = "norms without the decays that were applied"
        elif (norms < 0).any():
            fault = "norms below 0"
        # What float32 leaves of a norm is never larger than the norm.
        elif rests.shape != norms.shape or (rests > norms).any():
            fault = "norms that do not fit each other"
        # NaN, of a run that diverged, is neither below 0 nor above 1.
        elif (decays < 0).any() or (decays >= 1).any():
            fault = "decays that are not in [0, 1)"
        elif np.isnan(decays[np.isfinite(norms) & (norms > 0)]).any():
            raise NormDynError(
                f"`{path}` holds no decay for `{name}`: under its optimizer or callbacks nobody "
                f"could tell what share of the weight it "
                "took away. Record a run under SGD with weight decay."
            )
        if fault is not None:
            raise NormDynError(
                f"`{path}` holds {fault} for `{name}`, which no run of NormDynamicsMonitor leaves. "
                f"Record it again."
            )


def _uniform_factor(history: History, names: Sequence[str]) -> float:
    """Geometric mean, over steps and vectors, of the factor that the recorded decay amounts to in a
    run without (AWS paper, eq. 16)."""
    # Only for a scale-invariant weight does a decay amount to an effective learning rate. One of
    # which the file says nothing is taken for such a weight.
    invariant = [
        name
        for name in names
        if _about(history, name).get("scale_invariant") not in ("no", "unknown")
    ]
    logs = []
    for name in invariant or names:
        steps, decays = history.vectors(f"decay/{name}")
        # A record stands for all steps up to the next one.
        lasts = np.diff(steps, append=steps[-1] + 1)[:, None]
        kept = np.log1p(-decays.astype(np.float64))
        kept_until_next = kept * lasts
        # The logarithm of p, the length that decay alone would have left.
        before = np.cumsum(kept_until_next, axis=0) - kept_until_next
        log_factors = (-2 * before - kept) * lasts
        logs.append(log_factors.sum(axis=0) / lasts.sum())
    return float(np.exp(np.concatenate(logs).mean()))


class ReplayPart(Part["EffectiveLRReplay"]):
    """The part in a fit of a replay: it holds the record.

    Attributes:
        history: the record.
        recorded: names of the weights in it.
        uniform_factor: the one factor of a uniform replay.
    """

    history: History
    recorded: list[str]
    uniform_factor: float

    def fit_start(self) -> None:
        """Read the record, and refuse one of another architecture."""
        super().fit_start()
        # Now and not when the callback is made: the run that records may still be going on.
        path = self.rule.path
        self.history = load_history(path)
        self.recorded = _recorded_names(self.history)
        if not self.recorded:
            raise NormDynError(
                f"`{path}` holds no per-vector norms. Record it with "
                f"NormDynamicsMonitor(every_n_steps=1, per_vector=True) and save its history."
            )
        self._compare_shapes()
        _check_record(path, self.history, self.recorded)
        if self.rule.uniform:
            self.uniform_factor = _uniform_factor(self.history, self.recorded)

    def _compare_shapes(self) -> None:
        shapes = {}
        for weight, names in self.session.weights.names.items():
            # By all names: a tied weight may have been recorded under another one.
            shapes.update(dict.fromkeys(names, self.session.weights.shapes[weight]))
        for name in self.recorded:
            if name not in shapes:
                raise self.mismatch(f"it has a weight `{name}`, which this model has not")
            shape = _about(self.history, name).get("shape")
            if shape is not None and list(shapes[name]) != shape:
                raise self.mismatch(
                    f"`{name}` has shape {tuple(shape)} there and {shapes[name]} here"
                )

    def vectors_of(self, name: str) -> int:
        """How many vectors of a weight were recorded."""
        return int(self.history.vectors(f"weight_norm/{name}")[1].shape[1])

    def target(self, weight: Tensor) -> Target | None:
        """None for a weight whose vectors are others here than in the record because losses of the
        two runs read other rows of it."""
        target = super().target(weight)
        if target is None or target.verdict.unread is None or target.name not in self.recorded:
            return target
        # Equal numbers of vectors need not be the same rows.
        self.session.say_once(
            f"EffectiveLRReplay leaves the steps of `{target.name}` alone: "
            f"{target.verdict.unread_rows}, and the record has {self.vectors_of(target.name)} "
            f"vectors.",
            about=(self.rule.path, target.name),
        )
        return None

    def mismatch(self, what: str) -> NormDynError:
        """The refusal of a record of another model."""
        return NormDynError(
            f"`{self.rule.path}` comes from another model: {what}. Replay it on the same "
            f"architecture."
        )


class ReplayWorker(Worker["EffectiveLRReplay"]):
    """Scales the steps of the targets of one optimizer."""

    part: ReplayPart

    # Of this step, ``(n,)`` each, set by `look`: how much longer or shorter the step becomes, and
    # the share of the weight that decay takes away.
    factor: Tensor
    decayed: Tensor

    def __init__(self, part: ReplayPart, plan: Plan) -> None:
        super().__init__(part, plan)
        for target in plan.targets:
            if target.name not in part.recorded:
                raise part.mismatch(
                    f"it has no weight `{target.name}`, but {', '.join(part.recorded[:4])}"
                )
            there = part.vectors_of(target.name)
            if there != target.partition.n:
                raise part.mismatch(
                    f"`{target.name}` has {there} vectors there and {target.partition.n} here"
                )
        self.record = _Record.of(plan, part.history)
        self._has_checked_decays = False
        # The batch of the last step: an optimizer that steps twice in one is noticed by it.
        self._looked_at = -1
        self._say_what_is_approximate()

    def _say_what_is_approximate(self) -> None:
        if any(not is_zero(group_number(group, "momentum")) for group, _ in self.plan.groups):
            self.session.say_once(
                "EffectiveLRReplay is exact for plain SGD; with momentum the recorded rates are "
                "followed approximately."
            )
        if self.record.has_gaps:
            self.session.say_once(
                f"`{self.rule.path}` was not recorded at every step; norms in between are "
                f"interpolated."
            )

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Work out the factor at the weight that the gradient was taken at."""
        plan = self.plan
        vectors = self.plan.vectors
        # The step is told from a copy: only what the optimizer added is scaled, not the weight.
        step.bracket.request_snapshot(vectors.storages())
        weights = vectors.values()
        ww, w1 = vectors.inner((weights, weights), (weights, None))
        norm = norm_from_sums(ww)
        std = std_from_sums(ww, w1, vectors.length)
        if not self._has_checked_decays:
            self._check_decays(step)
        _, decayed = self.session.combined.decay_shares(plan, step, norm, std)
        # The first step refuses a decay that nobody can tell; one that comes about later must not
        # become a NaN in the weights.
        self.decayed = decayed.nan_to_num(0.0)
        if self.rule.uniform:
            factor = torch.full_like(norm, self.part.uniform_factor)
        else:
            decay = self.session.combined.applied_decay(plan, step, norm, std)
            factor = self._recorded_factor(norm, decay)
        self.factor = plan.guard(factor, 1.0, step)

    def _recorded_factor(self, norm: Tensor, decay: Tensor) -> Tensor:
        """(n / n_ref)^2 (1 - d) / (1 - d_ref) (WRS paper, "scale lr", with the norm ratio
        squared)."""
        record = self.record
        path = self.rule.path
        # The record counts batches, of which an optimizer may skip some or step twice in one.
        now = batches_that_stepped(self.session.trainer)
        if self._looked_at == now:
            self.session.say_once(
                f"An optimizer steps several times in a batch, and `{path}` holds one norm for all "
                f"of them: they are followed approximately."
            )
        self._looked_at = now
        # Holding the last norms is the best guess; a longer run is no reason to stop.
        if now > record.steps[-1]:
            self.session.say_once(
                f"`{path}` ends at step {record.steps[-1]}; its last norms are held from there on."
            )
        reference, reference_decay = record.at(now)
        # Rounded as the record is: a run replayed onto itself then has factors of exactly 1, and no
        # rounding for training to amplify.
        own = _as_recorded(norm, record.exact)
        own_decay = _as_recorded(decay)
        return (own / reference).square() * (1 - own_decay) / (1 - reference_decay)

    def _check_decays(self, step: Step) -> None:
        """Refuse targets whose decay nobody can tell; at a step, since what other callbacks do is
        known only when all have made their plans."""
        self._has_checked_decays = True
        untold = []
        decays = self.session.combined.decays(self.plan)
        for target, decay in zip(self.plan.targets, decays, strict=True):
            if decay.rate is None:
                untold.append(f"`{target.name}`")
        if not untold:
            return
        names = ", ".join(untold[:4])
        if len(untold) > 4:
            names += " ..."
        text = (
            f"EffectiveLRReplay has to know what share of a weight its decay takes away, and "
            f"nobody can tell that of {names} under the other callbacks on it. Remove those, or "
            f"leave the weights out of `params`."
        )
        # Later there is a run to lose: such weights then keep their own steps.
        if step.number == 1:
            raise NotSupportedError(text)
        warn_once(f"{text} They are left alone.")

    @during(Phase.PROJECT)
    def scale(self, step: Step) -> None:
        """Scale what a projection has left of the step."""
        vectors = self.plan.vectors
        factor = self.factor
        # w' = (1 - d) s + step, with d the decay since the copy s was taken: only the step is
        # scaled.
        before = vectors.snapshots(step.bracket)
        vectors.scale_(factor)
        vectors.add_scaled_((1 - factor) * (1 - self.decayed), before)

    def inherit(self, earlier: ReplayWorker) -> None:
        """Decays are checked once for an optimizer."""
        self._has_checked_decays = earlier._has_checked_decays
        self._looked_at = earlier._looked_at

    def effect(self, target: Target) -> Effect:
        """Steps get the length that was recorded."""
        return ScaledSteps()

    def treatment(self, target: Target) -> str:
        """What the start table says."""
        return "replays a recorded effective lr"


class EffectiveLRReplay(NormDynCallback):
    r"""Trains with the effective learning rates of another run: each step is scaled, per weight
    vector, by

    .. math:: \left(\frac{n}{n_{ref}}\right)^2 \frac{1 - d}{1 - d_{ref}}

    with :math:`n`, :math:`n_{ref}` the norms of this run and of the recorded one before the step,
    and :math:`d`, :math:`d_{ref}` the decay that each applies in the step (WRS paper, "scale lr",
    with the norm ratio squared and the decay accounted for). A run without weight decay then turns
    its weights as the recorded run with decay did: what the decay did was its effective learning
    rate.

    Exact for plain SGD; approximate with momentum, where an optimizer steps several times in a
    batch, and between recorded steps, where norms are interpolated; it says so. Both runs need the
    same learning rates, of which a ratio of norms says nothing. The step is scaled after the
    optimizer took it, so in float32 a factor beyond some thousands scales what rounding left of a
    small step.

    Args:
        history: file saved from ``NormDynamicsMonitor(every_n_steps=1, per_vector=True).history``;
            read at fit start, by every rank.
        uniform: one factor for all weights and all steps, the geometric mean of what the recorded
            decay amounts to: the paper's control, which does not follow the recorded directions.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: as in the recorded run.

    Raises:
        NormDynError: at fit start for a file that is damaged, holds no per-vector norms, or comes
            from another architecture; at the first step for a target that was not recorded.
        NotSupportedError: for another optimizer than ``torch.optim.SGD``.

    Example:
        >>> from lightning_normdyn import EffectiveLRReplay
        >>> EffectiveLRReplay("run/history.npz").uniform
        False
    """

    worker = ReplayWorker
    part = ReplayPart
    needs_length: ClassVar[bool] = True

    rank: ClassVar[int] = 1
    """It comes after a projection: what decay a gate applies is known only then, and what is left
    of the step is what it scales."""

    def __init__(
        self,
        history: str | os.PathLike[str],
        *,
        uniform: bool = False,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.path = os.fspath(history)
        self.uniform = uniform

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"history": self.path, "uniform": self.uniform}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The factor is SGD's: its steps are proportional to the gradient."""
        if weights and not facts_of(optimizer).proportional:
            own_step = why_not_as_base(optimizer)
            because = "" if own_step is None else f" ({own_step})"
            raise NotSupportedError(
                f"EffectiveLRReplay scales steps by a ratio of squared norms, which is right for "
                f"SGD, but the optimizer is {type(optimizer).__name__}{because}. Use "
                f"torch.optim.SGD in both runs."
            )
