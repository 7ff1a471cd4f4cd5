"""Replay of a recorded effective learning rate: what weight decay does, without weight decay."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Granularity, Params
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, ScaledSteps
from lightning_normdyn.engine.lightning_facts import batches_that_stepped
from lightning_normdyn.engine.messages import named, warn_once
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Plan, Target
from lightning_normdyn.engine.rule import Turn
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NormDynError, NotSupportedError
from lightning_normdyn.functional import norm_from_sums, std_from_sums
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.optimizers.group_numbers import group_number, is_zero
from lightning_normdyn.optimizers.recognition import facts_of, why_not_as_base
from lightning_normdyn.optimizers.step import Phase, Step


@dataclass
class _Record:
    """What was recorded of one weight, on the host, or of all targets of an optimizer, on their
    device.

    Args:
        steps: the ``s`` recorded steps, ascending.
        norms: ``(s, n)``, NaN where they are not finite: a norm of infinity, of a run that
            diverged, would make the factor 0 and stop the vector, while one of NaN leaves it alone.
            float64 where what float32 leaves of the norms was recorded, too; else float32.
        decays: float32 ``(s, n)``.
    """

    steps: list[int]
    norms: Tensor
    decays: Tensor

    @classmethod
    def of(
        cls,
        plan: Plan,
        recorded: Mapping[str, _Record],
    ) -> _Record:
        """The record of a plan's targets, of the vectors that this rank holds; a weight that joined
        later, or was recorded at other steps than the rest, is interpolated."""
        records = [recorded[target.name] for target in plan.targets]
        # All steps at which any weight was recorded: one that joined later has fewer of its own.
        steps = sorted(set().union(*(record.steps for record in records)))
        exact = any(record.is_exact for record in records)
        norms, decays = [], []
        for record in records:
            own_norms, own_decays = record.norms, record.decays
            if len(record.steps) != len(steps):
                interpolated = [record.at(step) for step in steps]
                own_norms, own_decays = map(torch.stack, zip(*interpolated, strict=True))
            norms.append(own_norms.to(torch.float64 if exact else torch.float32))
            decays.append(own_decays.float())
        return cls(steps, plan.vectors.scatter(norms), plan.vectors.scatter(decays))

    @property
    def is_exact(self) -> bool:
        """Whether what float32 leaves of the norms was recorded, too."""
        return self.norms.dtype == torch.float64

    @property
    def has_gaps(self) -> bool:
        """Whether a step between the first and the last is missing."""
        return self.steps[-1] - self.steps[0] >= len(self.steps)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Norm and decay, ``(n,)`` each; norms interpolated geometrically, and held before the
        first and after the last step."""
        after = min(bisect_left(self.steps, step), len(self.steps) - 1)
        before, share = after, 0.0
        # Else at a record, or beyond either end of them: that record is held.
        if after > 0 and step < self.steps[after]:
            before = after - 1
            share = (step - self.steps[before]) / (self.steps[after] - self.steps[before])

        def between(table: Tensor) -> tuple[Tensor, Tensor]:
            # Apple GPUs have no float64.
            wide = torch.float32 if table.device.type == "mps" else torch.float64
            return table[before].to(wide), table[after].to(wide)

        first, last = between(self.norms)
        norm = first
        # Geometrically, since norms change by factors. A decay may be 0, which has no logarithm.
        if share:
            norm = first.log().lerp(last.log(), share).exp()
        return norm, torch.lerp(*between(self.decays), share)

    def rounded(self, norm: Tensor) -> Tensor:
        """A norm as it would be recorded: as float32 and, if exact, what that leaves as another
        float32."""
        rounded = _in_float32(norm)
        return rounded + _in_float32(norm - rounded) if self.is_exact else rounded


def _in_float32(values: Tensor) -> Tensor:
    return values.float().to(values.dtype)


def _about(history: History, name: str) -> dict[str, Any]:
    """What the monitor noted about a weight at the end of its fit; nothing for a file that was
    saved before."""
    notes = history.meta.get("targets")
    note = notes.get(name) if isinstance(notes, dict) else None
    return note if isinstance(note, dict) else {}


def _read(
    path: str,
    history: History,
    name: str,
) -> _Record:
    """The record of one weight.

    Raises:
        NormDynError: for what no run can have recorded, before anything is scaled by it.
    """
    steps, norms = history.vectors(f"weight_norm/{name}")
    known = history.vector_names()
    decay_steps, decays = steps[:0], norms[:0]
    if f"decay/{name}" in known:
        decay_steps, decays = history.vectors(f"decay/{name}")
    rests = None
    if f"weight_norm_rest/{name}" in known:
        rests = history.vectors(f"weight_norm_rest/{name}")[1]
    fault = None
    if not len(steps):
        fault = "no record at all"
    elif decays.shape != norms.shape or not np.array_equal(steps, decay_steps):
        fault = "norms without the decays that were applied"
    elif (norms < 0).any():
        fault = "norms below 0"
    # What float32 leaves of a norm is never larger than the norm.
    elif rests is not None and (rests.shape != norms.shape or (rests > norms).any()):
        fault = "norms that do not fit each other"
    # NaN, of a run that diverged, is neither below 0 nor above 1.
    elif (decays < 0).any() or (decays >= 1).any():
        fault = "decays that are not in [0, 1)"
    elif np.isnan(decays[np.isfinite(norms) & (norms > 0)]).any():
        raise NormDynError(
            f"`{path}` holds no decay for `{name}`: under its optimizer or callbacks nobody could "
            "tell what share of the weight it took away. Record a run under SGD with weight decay."
        )
    if fault is not None:
        raise NormDynError(
            f"`{path}` holds {fault} for `{name}`, which no run of NormDynamicsMonitor leaves. "
            f"Record it again."
        )
    whole = torch.from_numpy(norms)
    if rests is not None:
        whole = whole.double() + torch.from_numpy(rests)
    whole = whole.where(whole.isfinite(), nan)
    return _Record(steps.tolist(), whole, torch.from_numpy(decays))


def _uniform_factor(records: Iterable[_Record]) -> float:
    """Geometric mean, over steps and vectors, of the factor that the recorded decay amounts to in a
    run without (AWS paper, eq. 16)."""
    logs = []
    for record in records:
        # A record stands for all steps up to the next one.
        lasts = np.diff(record.steps, append=record.steps[-1] + 1)[:, None]
        kept = np.log1p(-record.decays.double().numpy())
        kept_until_next = kept * lasts
        # The logarithm of p, the length that decay alone would have left.
        before = np.cumsum(kept_until_next, axis=0) - kept_until_next
        log_factors = (-2 * before - kept) * lasts
        logs.append(log_factors.sum(axis=0) / lasts.sum())
    return float(np.exp(np.concatenate(logs).mean()))


class ReplayPart(Part["EffectiveLRReplay"]):
    """The part in a fit of a replay: it holds the record.

    Attributes:
        recorded: what was recorded, by weight name.
        uniform_factor: the one factor of a uniform replay.
    """

    recorded: dict[str, _Record]
    uniform_factor: float

    def fit_start(self) -> None:
        """Read the record, and refuse one of another architecture."""
        super().fit_start()
        # Now and not when the callback is made: the run that records may still be going on.
        path = self.rule.path
        history = load_history(path)
        keys = history.vector_names()
        prefix = "weight_norm/"
        names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        if not names:
            raise NormDynError(
                f"`{path}` holds no per-vector norms. Record it with "
                f"NormDynamicsMonitor(every_n_steps=1, per_vector=True) and save its history."
            )
        about = {name: _about(history, name) for name in names}
        self._compare_shapes(about)
        self.recorded = {name: _read(path, history, name) for name in names}
        if self.rule.uniform:
            # Only for a scale-invariant weight does a decay amount to an effective learning rate.
            # One of which the file says nothing is taken for such a weight.
            others = ("no", "unknown")
            invariant = [n for n in names if about[n].get("scale_invariant") not in others]
            self.uniform_factor = _uniform_factor(self.recorded[n] for n in invariant or names)

    def _compare_shapes(self, about: Mapping[str, Mapping[str, Any]]) -> None:
        weights = self.session.weights
        # By all names: a tied weight may have been recorded under another one.
        by_name = weights.by_name()
        for name, note in about.items():
            if name not in by_name:
                raise self.mismatch(f"it has a weight `{name}`, which this model has not")
            here, there = weights.shapes[by_name[name]], note.get("shape")
            if there is not None and list(here) != there:
                raise self.mismatch(f"`{name}` has shape {tuple(there)} there and {here} here")

    def vectors_of(self, name: str) -> int:
        """How many vectors of a weight were recorded."""
        return self.recorded[name].norms.shape[1]

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

    def prepare(self) -> None:
        """Take what was recorded of the targets."""
        part, plan = self.part, self.plan
        for target in plan.targets:
            if target.name not in part.recorded:
                first = ", ".join(list(part.recorded)[:4])
                raise part.mismatch(f"it has no weight `{target.name}`, but {first}")
            there = part.vectors_of(target.name)
            if there != target.partition.n:
                raise part.mismatch(
                    f"`{target.name}` has {there} vectors there and {target.partition.n} here"
                )
        self.record = _Record.of(plan, part.recorded)
        self._has_checked_decays = False
        # The batch of the last step: an optimizer that steps twice in one is noticed by it.
        self._looked_at = -1
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
        norm, std = self._norm_and_std()
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

    def rehearse(self, step: Step) -> None:
        """The sums, and the change of the step."""
        vectors = self.plan.vectors
        norm, _ = self._norm_and_std()
        # The weights stand in for the copy that is not there yet: only its layout matters.
        vectors.scale_(norm)
        vectors.add_scaled_(norm, vectors.values())

    def _norm_and_std(self) -> tuple[Tensor, Tensor]:
        """``(n,)`` each, of the weights as they are."""
        vectors = self.plan.vectors
        weights = vectors.values()
        ww, w1 = vectors.inner((weights, weights), (weights, None))
        return norm_from_sums(ww), std_from_sums(ww, w1, vectors.length)

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
        ratio = record.rounded(norm) / reference
        return ratio.square() * (1 - _in_float32(decay)) / (1 - reference_decay)

    def _check_decays(self, step: Step) -> None:
        """Refuse targets whose decay nobody can tell; at a step, since what other callbacks do is
        known only when all have made their plans."""
        self._has_checked_decays = True
        decays = zip(self.plan.vectors.names, self.session.combined.decays(self.plan), strict=True)
        untold = [name for name, decay in decays if decay.rate is None]
        if not untold:
            return
        text = (
            f"EffectiveLRReplay has to know what share of a weight its decay takes away, and "
            f"nobody can tell that of {named(untold)} under the other callbacks on it. Remove "
            f"those, or leave the weights out of `params`."
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
    needs_length = True

    rank = Turn.REPLAY
    """It comes after a projection: what decay a gate applies is known only then, and what is left
    of the step is what it scales."""

    def __init__(
        self,
        history: str | os.PathLike[str],
        *,
        uniform: bool = False,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.path = os.fspath(history)
        self.uniform = uniform

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"history": self.path, "uniform": self.uniform}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The factor is SGD's: its steps are proportional to the gradient."""
        if not facts_of(optimizer).proportional:
            own_step = why_not_as_base(optimizer)
            because = "" if own_step is None else f" ({own_step})"
            raise NotSupportedError(
                f"EffectiveLRReplay scales steps by a ratio of squared norms, which is right for "
                f"SGD, but the optimizer is {type(optimizer).__name__}{because}. Use "
                f"torch.optim.SGD in both runs."
            )
