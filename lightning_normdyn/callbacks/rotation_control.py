"""Rotation control: every step turns a weight by a given angle, whatever its optimizer would have
it turn by, and its norm may be held."""

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
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.engine.refusals import refuse_16_bits
from lightning_normdyn.engine.rule import Turn
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NotSupportedError
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


class RotationWorker(Worker["RotationControl"]):
    """Steers the steps of the targets of one optimizer."""

    def prepare(self) -> None:
        """Take the state of each vector, and the decay."""
        rule, plan = self.rule, self.plan
        refuse_16_bits(type(rule).__name__, plan)
        plan.counter("clamped")
        self.lengths = self._target_lengths()
        if self.lengths is not None:
            plan.published["log_scale"] = plan.state("log_scale", 0.0)
        self.largest_rate = plan.state("lr_max", 0.0) if rule.follows_schedule else None
        if rule.smoothing:
            self.mean_square = plan.state("mean_square_tangent", 0.0)
            self.averaged = plan.state("averaged_steps", 0.0)
        if rule.weight_decay == "replace":
            self.claim_decay(DecayOwner.ROTATION)

    def _target_lengths(self) -> Tensor | None:
        """``(n,)``: the length at which each vector is held, 0 until it is known; None if norms are
        free."""
        if self.rule.norm == "free":
            return None
        vectors = self.plan.vectors
        if self.rule.target_norm == "initial":
            # Taken at the first step that a weight really makes: one that is frozen may be changed
            # by hand until then.
            return self.plan.state("initial_norm", 0.0)
        length = float(self.rule.target_norm)
        return torch.full((vectors.n,), length, dtype=vectors.sum_dtype, device=vectors.device)

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Ask for a copy of the weights: what a step was is told by it."""
        step.bracket.request_snapshot(self.plan.vectors.storages())

    @during(Phase.PROJECT)
    def steer(self, step: Step) -> None:
        """w <- c (s + f (w' - s)), with f for the angle and c for the norm."""
        rule, plan = self.rule, self.plan
        vectors = plan.vectors
        before = vectors.snapshots(step.bracket)
        ww, wd, dd = vectors.displacement(before, exact=True)
        share = self._decayed_share(step)
        if share is not None:
            # The step starts from the weight that decay has left, in the same direction.
            ww, wd = ww * (1 - share).square(), wd * (1 - share)
        angle = self._angles(step)
        stretch = self._stretch(step, (ww, wd, dd), angle)
        is_finite = (ww + wd + dd).isfinite()
        # An angle that no stretch reaches is no fault of the weight: the step stays as it is.
        is_clamped = stretch.isnan() & is_finite
        stretch = plan.guard(stretch.where(~is_clamped, 1.0).where(is_finite, nan), 1.0, step)
        plan.count("clamped", plan.guard(is_clamped.to(ww.dtype), 0.0, step), step)
        scale = torch.ones_like(stretch)
        if self.lengths is not None:
            self._remember_lengths(step, ww)
            after = stretched_norm(ww, wd, dd, stretch)
            # A vector that is zero after its step has no direction in which to be held.
            is_held = (self.lengths > 0) & ~(after == 0)
            scale = plan.guard((self.lengths / after).where(is_held, 1.0), 1.0, step)
            plan.published["log_scale"] += scale.log()
        if rule.rotation.sets_angle:
            # One that no stretch reaches is no promise.
            plan.published["target_angle"] = angle.where(~is_clamped, nan)
        vectors.stretch_(before, stretch, scale)
        if share is not None:
            vectors.add_scaled_(-share, before)

    def _stretch(
        self,
        step: Step,
        sums: tuple[Tensor, Tensor, Tensor],
        angle: Tensor,
    ) -> Tensor:
        """``(n,)``, f; NaN where no stretch turns a vector by ``angle``."""
        rule = self.rule
        if not rule.smoothing:
            return rotation_stretch(*sums, angle, rule.bound)
        tangent = step_tangent(*sums)
        is_known = ~tangent.isnan()
        treated = self.plan.treated(step)
        counts = is_known if treated is None else is_known & treated
        mean = rule.smoothing * self.mean_square + (1 - rule.smoothing) * tangent.square()
        self.mean_square.copy_(mean.where(counts, self.mean_square))
        self.averaged += counts
        # As in Adam: the mean starts at 0, and its first values are too small by this factor.
        corrected = self.mean_square / (1 - rule.smoothing**self.averaged)
        stretch = stretch_to_tangent(corrected.sqrt(), angle, rule.bound)
        return stretch.where(is_known | (angle == 0), nan)

    def _remember_lengths(self, step: Step, square: Tensor) -> None:
        """Vectors that step for the first time are held at the norm that they have now."""
        if self.rule.target_norm != "initial" or self.lengths is None:
            return
        treated = self.plan.treated(step)
        is_new = (self.lengths == 0) & square.isfinite()
        if treated is not None:
            is_new &= treated
        self.lengths.copy_(torch.where(is_new, square.sqrt(), self.lengths))

    # -- the angle

    def _angles(self, step: Step) -> Tensor:
        """``(n,)``, radians: by how much this step is to turn each vector."""
        rule, plan = self.rule, self.plan
        if rule.angle == "equilibrium":
            return self._settled_angles(step)
        if rule.angle == "lr":
            return plan.rates().atan()
        if self.largest_rate is None:
            return torch.full_like(plan.bad, rule.angle, dtype=plan.vectors.sum_dtype)
        share = self._share_of_largest_rate(self.largest_rate)
        return rule.angle * (share.sqrt() if rule.follows == "sqrt_lr" else share)

    def _share_of_largest_rate(self, largest: Tensor) -> Tensor:
        """``(n,)``: the rate of this step over the largest of the schedule, as far as is known."""
        plan = self.plan
        rates = plan.rates()
        newest = rates
        # Where a step works its rate out by itself, the numbers of the group are another scale.
        if has_plain_rate(plan.optimizer):
            named = [largest_number(*named_rates(group)) for group, _ in plan.groups]
            newest = torch.fmax(newest, plan.spread_groups("named_rates", named))
        largest.copy_(torch.fmax(largest, newest))
        # A warm-up from 0 that no key of the group tells of: at a rate of 0 nothing turns.
        return torch.where(largest > 0, rates / largest, 0.0)

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

    def _decayed_share(self, step: Step) -> Tensor | None:
        """``(n,)``: the share of each vector that decay takes away in this step; None where this
        rule applies none."""
        plan = self.plan
        if self.rule.applies_decay:
            decays = [self._decay_rate(group) for group, _ in plan.groups]
            share = plan.rates() * plan.spread_groups("rotation_decay", decays)
            share = share.clamp(max=LARGEST_SHARE) * plan.owns_decay(step, DecayOwner.ROTATION)
            return plan.guard(share, 0.0, step)
        return None

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
