"""Radial brake: of what a step adds to the norm of a weight, only a share is left."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_normdyn.engine.arguments import Granularity, Params, check_choice, check_within
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Brake, Effect
from lightning_normdyn.engine.plan import Target, are_treated, guarded
from lightning_normdyn.engine.refusals import refuse_16_bits
from lightning_normdyn.engine.rule import Turn
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.geometry.formulas import displacement, work_out
from lightning_normdyn.geometry.passes import Operand
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.steering import Change, brake_factor


def braked(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
    outward: float,
    inward: float,
    change: Change,
    log_scale: Tensor,
    counts: Tensor,
    bad: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a brake needs to know of each vector in one step.

    Args:
        ww: sums of the step, as `lightning_normdyn.steering.brake_factor` takes them.
        wd: the same.
        dd: the same.
        outward: the same.
        inward: the same.
        change: the same.
        log_scale: logarithm of all factors so far.
        counts: how often each vector grew from nothing.
        bad: as `lightning_normdyn.engine.plan.guarded` takes it; ``active`` and ``skipped`` too.
        active: the same.
        skipped: the same.

    Returns:
        Its factor, ``bad``, ``log_scale`` and ``counts``.
    """
    factor = brake_factor(ww, wd, dd, outward, inward, change)
    is_finite = (ww + wd + dd).isfinite()
    # A vector that had no length grows as it likes, until it has one.
    is_clamped = factor.isnan() & is_finite
    factor, bad = guarded(factor.where(~is_clamped, 1.0), 1.0, bad, active, skipped)
    counts = counts + are_treated(is_clamped, active, skipped)
    return factor, bad, log_scale + factor.log(), counts


class BrakeWorker(Worker["RadialBrake"]):
    """Brakes the norms of the targets of one optimizer."""

    def prepare(self) -> None:
        """Take the state of each vector: what had to be left alone, and how far norms were
        braked."""
        plan = self.plan
        refuse_16_bits(type(self.rule).__name__, plan)
        plan.counter("clamped")
        plan.published["log_scale"] = plan.state("log_scale", 0.0)

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Ask for a copy of the weights: what a step was is told by it."""
        step.bracket.request_snapshot(self.plan.vectors.storages())

    @during(Phase.PROJECT)
    def brake(self, step: Step) -> None:
        """w <- c w', with c such that only a share of the change of the norm is left."""
        plan = self.plan
        before = plan.vectors.snapshots(step.bracket)
        factor, _, _, counts = self._worked_out(before, plan.guards(step))
        plan.count("clamped", counts, step)
        plan.vectors.scale_(factor)

    def rehearse(self, step: Step) -> None:
        """Sums, factors and the change of lengths."""
        vectors = self.plan.vectors
        # The weights stand in for the copy that is not there yet: only its layout matters.
        factor, *_ = self._worked_out(vectors.values(), self.plan.expected_guards(step))
        vectors.scale_(factor)

    def _worked_out(self, before: Operand, guards: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What `braked` returns."""
        rule, plan = self.rule, self.plan
        vectors = plan.vectors
        log_scale, counts = plan.published["log_scale"], plan.counters["clamped"]
        numbers = rule.outward, rule.inward, rule.change, log_scale, counts, *guards
        into = None, plan.bad, log_scale
        return work_out(vectors, braked, displacement(vectors, before), numbers, into)

    def effect(self, target: Target) -> Effect:
        """It takes away a share of each change of the norm."""
        return Brake(self.rule.outward, self.rule.inward, self.rule.change)

    def treatment(self, target: Target) -> str:
        """What the tables say."""
        rule = self.rule
        what = "norm" if rule.change == "norm" else "radial part"
        return f"{what} braked to {rule.outward:g} outwards, {rule.inward:g} inwards"


class RadialBrake(NormDynCallback):
    r"""Radial brake: after every step, only a share of what it has added to the norm of each vector
    is left.

    .. math:: \lVert w\rVert \leftarrow n + k\,(n' - n)

    with :math:`n` and :math:`n'` the norm before and after the step, and k = ``outward`` where it
    has grown, else ``inward``. The direction stays. It touches weights only: optimizer state and
    running statistics stay as they are.

    ``RadialBrake(0, 0)`` pins the radius. ``RadialBrake(0, 1)`` lets norms only shrink, as a radial
    projection nearly does.

    Args:
        outward: share of growth that is left, in [0, 1].
        inward: share of shrinking that is left, in [0, 1].
        change: ``"norm"`` brakes the whole change of the norm, as above (the hook of
            Emerging-Optimizers). ``"radial"`` leaves only the braked first-order part,
            :math:`n + k\,\langle s, w'-s\rangle/n`, and removes what turning adds (modded-nanogpt
            294).
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"layer"`` (the whole weight as one vector), ``"auto"``, ``"filter"``,
            ``"group"`` or ``"column"``.

    Raises:
        ValueError: for shares outside [0, 1], and unknown words.
        NotSupportedError: at the first step, for weights stored in 16 bits.

    Example:
        >>> from lightning_normdyn import RadialBrake
        >>> RadialBrake(0.25).outward
        0.25
    """

    worker = BrakeWorker
    rank = Turn.BRAKE
    numbers = ("outward", "inward", "change")

    def __init__(
        self,
        outward: float = 0.5,
        inward: float = 1.0,
        *,
        change: Change = "norm",
        params: Params = "auto",
        granularity: Granularity = "layer",
    ) -> None:
        super().__init__(params, granularity)
        self.outward = _share("outward", outward)
        self.inward = _share("inward", inward)
        self.change = check_choice("change", change, ("norm", "radial"))

    @property
    def refuses_beside(self) -> Mapping[str, str]:
        """Who sets the norm itself, or the length of steps."""
        sets_norm = "the one brakes changes of the norm that the other makes on purpose"
        return {
            "WeightRescaling": sets_norm,
            "LRDropRescaling": sets_norm,
            "EffectiveLRReplay": "the replay counts on the norms that its own steps lead to",
        }


def _share(name: str, value: float) -> float:
    # Beyond 1 growth would be amplified, and below 0 every step would end on the other side.
    return check_within(name, value, lambda share: 0 <= share <= 1, "in [0, 1]")
