"""Rotation control: every step turns a weight by a given angle, whatever its optimizer would have
it turn by, and its norm may be held.

Over 500 lines, because a rule, its formula and its worker are read together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan, pi
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import (
    Granularity,
    Params,
    check_choice,
    check_number,
    check_within,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Rotation
from lightning_normdyn.engine.plan import Target, are_treated, guarded
from lightning_normdyn.engine.refusals import refuse_16_bits
from lightning_normdyn.engine.rule import Turn
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.formulas import displacement, work_out
from lightning_normdyn.geometry.passes import Operand
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import (
    LARGEST_SHARE,
    DecayOwner,
    decay_kind,
    replaced_decay,
)
from lightning_normdyn.optimizers.group_numbers import Number, group_number, largest_number
from lightning_normdyn.optimizers.recognition import class_for_predictions, has_plain_rate
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.step_response import named_rates
from lightning_normdyn.steering import (
    Bound,
    rotation_stretch,
    step_tangent,
    stretch_to_tangent,
    stretched_norm,
)
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update


def turned(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
    rotation: Rotation,
    rates: Tensor | None,
    told: Tensor | None,
    decays: Tensor | None,
    owned: Tensor | None,
    counts: Tensor,
    bad: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
    names: tuple[str, ...],
    *memory: Tensor,
) -> tuple[Tensor, ...]:
    """How the step of each vector is steered.

    Args:
        ww: sums of the step, as `lightning_normdyn.steering.rotation_stretch` takes them.
        wd: the same.
        dd: the same.
        rotation: what is asked for.
        rates: learning rates; None where nothing goes by them.
        told: the angle itself under ``"equilibrium"``; else the largest rate that the param group
            names, None if it names none.
        decays: decoupled decays; None where this rule applies none.
        owned: bool: whether they are this rule's.
        counts: how often each vector could not be steered so far.
        bad: as `lightning_normdyn.engine.plan.guarded` takes it; ``active`` and ``skipped`` too.
        active: the same.
        skipped: the same.
        names: of what is remembered of each vector.
        memory: that.

    Returns:
        The stretch; the factor; the coefficient of the weight before the step; the angle that was
        asked for, NaN where no stretch reaches it; ``counts``; ``bad``; and what is remembered, in
        the same order.
    """
    kept = dict(zip(names, memory, strict=True))
    treated = are_treated(torch.ones_like(bad), active, skipped)
    # A result in any case: how many there are must not depend on the rule's numbers.
    lost = torch.zeros_like(ww)
    if decays is not None:
        assert rates is not None
        assert owned is not None
        share = (rates * decays).clamp(max=LARGEST_SHARE) * owned
        lost, bad = guarded(share, 0.0, bad, active, skipped)
        # The step starts from the weight that decay has left, in the same direction.
        ww, wd = ww * (1 - lost).square(), wd * (1 - lost)
    angle = _asked_angle(rotation, ww, rates, told, kept)
    stretch = _stretch(rotation, (ww, wd, dd), angle, treated, kept)
    is_finite = (ww + wd + dd).isfinite()
    # An angle that no stretch reaches is no fault of the weight: the step stays as it is.
    is_clamped = stretch.isnan() & is_finite
    stretch = stretch.where(~is_clamped, 1.0).where(is_finite, nan)
    stretch, bad = guarded(stretch, 1.0, bad, active, skipped)
    counts = counts + (is_clamped & treated)
    scale = torch.ones_like(stretch)
    if rotation.norm == "hold":
        length = _length(rotation, ww, treated, kept)
        after = stretched_norm(ww, wd, dd, stretch)
        # A vector that is zero after its step has no direction in which to be held.
        is_held = (length > 0) & ~(after == 0)
        scale = (length / after).where(is_held, 1.0)
        scale, bad = guarded(scale, 1.0, bad, active, skipped)
        kept["log_scale"] = kept["log_scale"] + scale.log()
    # One that no stretch reaches is no promise.
    promised = angle.where(~is_clamped, nan)
    return stretch, scale, -lost, promised, counts, bad, *(kept[name] for name in names)


def _asked_angle(
    rotation: Rotation,
    ww: Tensor,
    rates: Tensor | None,
    told: Tensor | None,
    kept: dict[str, Tensor],
) -> Tensor:
    """``(n,)``, radians: by how much this step is to turn each vector."""
    if rotation.angle == "equilibrium":
        assert told is not None
        return told
    if rotation.angle == "lr":
        assert rates is not None
        return rates.atan()
    if rotation.follows == "constant":
        return torch.full_like(ww, rotation.angle)
    assert rates is not None
    # The rate of this step over the largest of the schedule, as far as is known. Where a step works
    # its rate out by itself, the numbers of the group are another scale.
    newest = rates if told is None else torch.fmax(rates, told)
    largest = kept["lr_max"] = torch.fmax(kept["lr_max"], newest)
    # A warm-up from 0 that no key of the group tells of: at a rate of 0 nothing turns.
    share = torch.where(largest > 0, rates / largest, 0.0)
    return rotation.angle * (share.sqrt() if rotation.follows == "sqrt_lr" else share)


def _stretch(
    rotation: Rotation,
    sums: tuple[Tensor, Tensor, Tensor],
    angle: Tensor,
    treated: Tensor,
    kept: dict[str, Tensor],
) -> Tensor:
    """``(n,)``, f; NaN where no stretch turns a vector by ``angle``."""
    past = rotation.smoothing
    if not past:
        return rotation_stretch(*sums, angle, rotation.bound)
    tangent = step_tangent(*sums)
    is_known = ~tangent.isnan()
    counts = is_known & treated
    before, steps = kept["mean_square_tangent"], kept["averaged_steps"]
    mean = (past * before + (1 - past) * tangent.square()).where(counts, before)
    steps = steps + counts
    kept["mean_square_tangent"], kept["averaged_steps"] = mean, steps
    # As in Adam: the mean starts at 0, and its first values are too small by this factor.
    corrected = mean / (1 - past**steps)
    stretch = stretch_to_tangent(corrected.sqrt(), angle, rotation.bound)
    return stretch.where(is_known | (angle == 0), nan)


def _length(
    rotation: Rotation,
    square: Tensor,
    treated: Tensor,
    kept: dict[str, Tensor],
) -> Tensor:
    """``(n,)``: the length at which each vector is held, 0 until it is known."""
    if rotation.target_norm != "initial":
        return torch.full_like(square, rotation.target_norm)
    # Taken at the first step that a weight really makes: one that is frozen may be changed by hand
    # until then.
    known = kept["initial_norm"]
    is_new = (known == 0) & square.isfinite() & treated
    kept["initial_norm"] = torch.where(is_new, square.sqrt(), known)
    return kept["initial_norm"]


class RotationWorker(Worker["RotationControl"]):
    """Steers the steps of the targets of one optimizer."""

    def prepare(self) -> None:
        """Take the state of each vector, and the decay."""
        rule, plan = self.rule, self.plan
        refuse_16_bits(type(rule).__name__, plan)
        plan.counter("clamped")
        names = ["initial_norm"] if rule.norm == "hold" and rule.target_norm == "initial" else []
        if rule.norm == "hold":
            names.append("log_scale")
        if rule.follows_schedule:
            names.append("lr_max")
        if rule.smoothing:
            names += ["mean_square_tangent", "averaged_steps"]
        self.memory = {name: plan.state(name, 0.0) for name in names}
        """By name, ``(n,)`` each: what is remembered of each vector."""
        if rule.norm == "hold":
            plan.published["log_scale"] = self.memory["log_scale"]
        if rule.rotation.sets_angle:
            # From the start: who reads it must not find it only from the first step on.
            plan.published["target_angle"] = torch.zeros_like(plan.counters["clamped"])
        if rule.weight_decay == "replace":
            self.claim_decay(DecayOwner.ROTATION)

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Ask for a copy of the weights: what a step was is told by it."""
        step.bracket.request_snapshot(self.plan.vectors.storages())

    @during(Phase.PROJECT)
    def steer(self, step: Step) -> None:
        """w <- c (s + f (w' - s)), with f for the angle and c for the norm."""
        plan = self.plan
        before = plan.vectors.snapshots(step.bracket)
        results = self._worked_out(step, before, plan.guards(step))
        promised, counts = results[3:5]
        plan.count("clamped", counts, step)
        if self.rule.rotation.sets_angle:
            plan.published["target_angle"] = promised
        self._change(before, results)

    def rehearse(self, step: Step) -> None:
        """Sums, stretches and factors, and the change of the step."""
        # The weights stand in for the copy that is not there yet: only its layout matters.
        values = self.plan.vectors.values()
        self._change(values, self._worked_out(step, values, self.plan.expected_guards(step)))

    def _worked_out(
        self,
        step: Step,
        before: Operand,
        guards: tuple[Tensor | None, ...],
    ) -> tuple[Tensor, ...]:
        """What `turned` returns."""
        plan = self.plan
        vectors = plan.vectors
        decays, owned = self._decays(step)
        numbers = self.rule.rotation, self._rates(), self._told(step), decays, owned
        # Their names are part of the program, their numbers are written where they lie.
        memory = tuple(self.memory), *self.memory.values()
        return work_out(
            vectors,
            turned,
            displacement(vectors, before),
            (*numbers, plan.counters["clamped"], *guards, *memory),
            (None, None, None, None, None, plan.bad, *self.memory.values()),
        )

    def _change(self, before: Operand, results: tuple[Tensor, ...]) -> None:
        stretch, scale, lost = results[:3]
        added = lost if self.rule.applies_decay else None
        self.plan.vectors.stretch_(before, stretch, scale, added)

    # -- the angle

    def _rates(self) -> Tensor | None:
        """``(n,)``: the learning rates, where something goes by them."""
        rule = self.rule
        goes_by_rate = rule.angle == "lr" or rule.follows_schedule or rule.applies_decay
        return self.plan.rates() if goes_by_rate else None

    def _told(self, step: Step) -> Tensor | None:
        """``(n,)``: see `turned`."""
        rule, plan = self.rule, self.plan
        if rule.angle == "equilibrium":
            return self._settled_angles(step)
        if not rule.follows_schedule or not has_plain_rate(plan.optimizer):
            return None
        named = [largest_number(*named_rates(group)) for group, _ in plan.groups]
        return plan.spread_groups("named_rates", named)

    def _settled_angles(self, step: Step) -> Tensor:
        """``(n,)``: what optimizer, rate and decay would settle at."""
        plan = self.plan
        number = plan.number(step)
        by_group = [_settled_angle(plan.optimizer, group, None, number) for group, _ in plan.groups]
        told = [angle for angle in by_group if angle is not None]
        if len(told) == len(by_group):
            return plan.spread_groups("equilibrium", told)
        # It depends on the shape of a matrix (Muon).
        vectors = plan.vectors
        angles = torch.full((vectors.n,), nan, dtype=vectors.sum_dtype, device=vectors.device)
        for target, where in zip(plan.targets, vectors.slices, strict=True):
            group = plan.group_of(target)
            angle = _settled_angle(plan.optimizer, group, target.matrix, number)
            # A schedule may have taken the decay away; what nobody can tell stays NaN.
            if angle is not None:
                angles[where] = angle
        return angles

    # -- the decay

    def _decays(self, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """``(n,)`` each: the decay of each vector, and whether it is this rule's; None where it
        applies none."""
        plan = self.plan
        if not self.rule.applies_decay:
            return None, None
        decays = [self._decay_rate(group) for group, _ in plan.groups]
        owned = plan.owns_decay(step, DecayOwner.ROTATION)
        return plan.spread_groups("rotation_decay", decays), owned

    def _decay_rate(self, group: Mapping[str, Any]) -> Number:
        setting = "RotationControl(norm='free')"
        return self.decoupled_decay(group, self.rule.rotation.decay, setting)

    # -- what tables and predictions say

    def effect(self, target: Target) -> Effect:
        """It sets how far steps turn, and may hold the norm."""
        return self.rule.rotation

    def treatment(self, target: Target) -> str:
        """What the tables say."""
        rule = self.rule
        words = {"exact": "turned by", "at_least": "turned by at least", "at_most": "by at most"}
        angles = {"equilibrium": "its equilibrium angle", "lr": "atan(lr)"}
        angle = angles.get(str(rule.angle)) or f"{rule.angle:.3g} rad"
        text = f"{words[rule.bound]} {angle}"
        if rule.norm == "hold":
            length = rule.target_norm
            text += ", norm held" + ("" if length == "initial" else f" at {length:g}")
        replaced = replaced_decay(self.plan.optimizer, self.plan.group_of(target))
        if replaced and rule.weight_decay == "replace":
            text += f", {'without decay' if rule.norm == 'hold' else 'decay'} ({replaced})"
        return text


def _settled_angle(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    shape: tuple[int, int] | None,
    step: int | None = None,
) -> Number | None:
    """The angle that a weight of ``group`` would settle at; None where nobody has derived it."""
    kind = class_for_predictions(optimizer)
    return equilibrium_angular_update(kind, group, shape=shape, step=step)


class RotationControl(NormDynCallback):
    r"""Rotation control: after every step, each weight vector is turned by a given angle.

    .. math:: w \leftarrow c\,\bigl(s + f\,(w' - s)\bigr)

    with :math:`s` the vector before the step and :math:`w'` after it, :math:`f` such that the step
    turns it by the angle, and :math:`c` such that it keeps its norm (``norm="hold"``; else 1). The
    optimizer says where to, this rule says how far. It touches weights only: optimizer state and
    running statistics stay as they are.

    | published as | here |
    |---|---|
    | Hyperball, AdamH, MuonH (arXiv 2606.16899) | ``RotationControl("lr")`` |
    | rotational optimizers (arXiv 2305.17212) | ``RotationControl("equilibrium", smoothing=0.9)`` |
    | floor on relative updates (modded-nanogpt 272) | ``bound="at_least", norm="free"`` |
    | cap on angles instead of a warm-up | ``bound="at_most", norm="free"`` |
    | relative updates, LARS, LAMB | ``RotationControl("lr", norm="free")`` |

    Hyperball as published turns by the arc tangent of lr only where the optimizer's update is at
    right angles to the weight: 1 to 3 % less otherwise.

    Args:
        angle: radians per step at the largest learning rate of the schedule; ``"equilibrium"``:
            what optimizer, learning rate and decay would settle at; ``"lr"``: the arc tangent of
            the learning rate, which is then the relative length of a step. At a learning rate of 0
            nothing turns.
        bound: ``"exact"``; ``"at_least"``: a floor under the angle; ``"at_most"``: a cap.
        norm: ``"hold"`` sets the norm after every step, ``"free"`` leaves it.
        target_norm: what it is held at, in weight units, or ``"initial"``: each vector's own norm
            when it is first trained.
        smoothing: 0: every step turns by the angle. Else the stretch goes by a running mean of
            what steps turn by, with this share of the past: longer steps stay longer than others.
        follows: what a number given as ``angle`` is proportional to: the learning rate (``"lr"``),
            its square root, or nothing (``"constant"``). The largest rate is the largest of the
            group's ``max_lr`` and ``initial_lr`` and of those seen so far: of a warm-up that is
            written by hand, only the last is known.
        weight_decay: ``"replace"``: no decay of the targets under ``norm="hold"``; under
            ``"free"`` the optimizer's, decoupled, unless AdaptiveWeightShrink or WeightDecay
            applies one. ``"keep"``: the optimizer's own, as part of its step.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"layer"`` (the whole weight as one vector), ``"auto"``, ``"filter"``,
            ``"group"`` or ``"column"``.

    Raises:
        ValueError: for numbers out of range, unknown words, and a ``target_norm`` of a free norm.
        NotSupportedError: at the first step, for vectors of zeros that are to be held at their
            initial norm; weights stored in 16 bits; ``"equilibrium"`` under an optimizer without
            decay or prediction.

    Example:
        >>> from lightning_normdyn import RotationControl
        >>> RotationControl(0.01, bound="at_least", norm="free").angle
        0.01
    """

    worker = RotationWorker
    rank = Turn.ROTATION
    numbers = (
        "angle",
        "bound",
        "norm",
        "target_norm",
        "smoothing",
        "follows",
        "weight_decay",
    )

    def __init__(
        self,
        angle: float | Literal["equilibrium", "lr"],
        *,
        bound: Bound = "exact",
        norm: Literal["hold", "free"] = "hold",
        target_norm: float | Literal["initial"] = "initial",
        smoothing: float = 0.0,
        follows: Literal["lr", "sqrt_lr", "constant"] = "lr",
        weight_decay: Literal["replace", "keep"] = "replace",
        params: Params = "auto",
        granularity: Granularity = "layer",
    ) -> None:
        super().__init__(params, granularity)
        self.angle = _checked_angle(angle)
        self.bound = check_choice("bound", bound, ("exact", "at_least", "at_most"))
        self.norm = check_choice("norm", norm, ("hold", "free"))
        self.target_norm: float | Literal["initial"] = "initial"
        if target_norm != "initial":
            self.target_norm = check_number("target_norm", target_norm, "> 0", " or 'initial'")
            if norm == "free":
                raise ValueError(
                    f"`target_norm` is for norm='hold': with norm='free' nothing sets a norm, got "
                    f"{target_norm!r}."
                )
        self.smoothing = check_within("smoothing", smoothing, lambda x: 0 <= x < 1, "in [0, 1)")
        self.follows = check_choice("follows", follows, ("lr", "sqrt_lr", "constant"))
        self.weight_decay = check_choice("weight_decay", weight_decay, ("replace", "keep"))
        self.without_zeros = ""
        if norm == "hold" and target_norm == "initial":
            self.without_zeros = "Give target_norm=..., a length for them to be set to."

    @property
    def follows_schedule(self) -> bool:
        """Whether the angle is a number that goes with the learning rate."""
        return not isinstance(self.angle, str) and self.follows != "constant"

    @property
    def applies_decay(self) -> bool:
        """Whether the decay of its targets is applied by this rule."""
        return self.norm == "free" and self.weight_decay == "replace"

    @property
    def rotation(self) -> Rotation:
        """What it does to each of its targets."""
        return Rotation(
            self.angle,
            self.bound,
            self.norm,
            self.target_norm,
            self.follows,
            self.smoothing,
            self.weight_decay == "replace",
        )

    @property
    def refuses_beside(self) -> Mapping[str, str]:
        """Who else sets the norm, or the length of steps."""
        reasons = {"EffectiveLRReplay": "each of them sets how far a step turns"}
        if self.norm == "hold":
            reason = "norm='hold' sets the norm after every step, which would undo what it does"
            others = (
                "WeightDecay",
                "AdaptiveWeightShrink",
                "WeightRescaling",
                "RadialProjection",
                "LRDropRescaling",
                "RadialBrake",
            )
            reasons |= dict.fromkeys(others, reason)
        return reasons

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The rate must be known, the decay ours to take over, the equilibrium derived."""
        if self.angle == "lr" or self.follows_schedule or self.applies_decay:
            check_rate(optimizer, weights)
        if self.weight_decay == "replace":
            check_decay_takeover(optimizer, weights)
        ours = {id(weight) for weight in weights}
        for group in optimizer.param_groups:
            # Groups without targets are none of this rule's business.
            if any(id(p) in ours for p in group["params"]):
                self._check_group(optimizer, group)

    def _check_group(self, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
        name = type(optimizer).__name__
        decay = group_number(group, "weight_decay")
        # With any shape: whether there is an equilibrium does not depend on it.
        has_equilibrium = _settled_angle(optimizer, group, (1, 1)) is not None
        if self.angle == "equilibrium" and not has_equilibrium:
            raise NotSupportedError(
                f"RotationControl('equilibrium') knows no angle at which {name} with a weight "
                f"decay of {decay} settles: that takes a decay above 0, and an optimizer whose "
                f"equilibrium is derived, such as SGD, AdamW or Muon. Give a number, or 'lr'."
            )
        if self.applies_decay and self.rotation.decay.applied(optimizer, group) is None:
            kind = decay_kind(optimizer, group)
            raise NotSupportedError(
                f"RotationControl(norm='free', weight_decay='replace') cannot turn the "
                f"{f'{kind} ' if kind else ''}weight decay {decay} of {name} into a decoupled "
                f"one. Use AdamW or SGD, weight_decay='keep', or a decay of 0."
            )


def _checked_angle(angle: object) -> float | Literal["equilibrium", "lr"]:
    if angle == "equilibrium":
        return "equilibrium"
    if angle == "lr":
        return "lr"
    return check_within(
        "angle",
        angle,
        lambda x: 0 < x < pi / 2,
        "radians > 0 and < π/2",
        ", 'equilibrium' or 'lr'",
    )
