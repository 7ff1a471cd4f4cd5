"""Radial projection (SGDP, AdamP): let steps turn weights without lengthening them, with any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.callbacks.base import NormDynCallback, Plan, Target, check_number, warn_once
from lightning_normdyn.callbacks.effect import Effect, Projection
from lightning_normdyn.callbacks.state import many, number, record, table, whole
from lightning_normdyn.decay import Decay, DecayOwner, DecayRule, replaced_decay
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import cosine_from_sums
from lightning_normdyn.group_numbers import is_zero
from lightning_normdyn.optimizer_facts import check_rate
from lightning_normdyn.optimizer_state import decay_kind, step_buffer
from lightning_normdyn.steps import HostCopy, Phase, Step, StepBracket, check_decay_takeover
from lightning_normdyn.vectors import Partition

# A weight is told from the sum of itself and its step. In float32 that errs by 6e-8 times the step over the weight.
LONGEST_TOLD = 1.0


class RadialProjection(NormDynCallback):
    r"""Radial projection (SGDP, AdamP): after every step, the part of the step along the weight is taken out.

    .. math:: w \leftarrow w + \Pi_w(\Delta), \qquad \Pi_w(x) = x - (\hat w \cdot x)\,\hat w

    with :math:`\Delta` the step of whatever optimizer is in use (SGDP/AdamP slides, "Projected updates"). With SGD and momentum this is
    SGDP, with AdamW it is AdamP. Since projecting would also remove weight decay, this callback applies the decay of its targets itself,
    decoupled: ``w <- (1 - lr * decay * ratio) w``.

    What the step was is told by a copy of the targets that is taken before it; under SGD with momentum (no Nesterov, float32 or more, no
    fused kernel under a GradScaler) by the momentum buffer, without a copy, as long as no step is longer than its weight.

    Args:
        gate: ``"always"`` projects every target (one vector per ``granularity``); ``"cosine"`` is the paper's rule per tensor: filter
            view first, then layer view, if ``|cos(w, g)| < delta / sqrt(d)`` for every row of the view; a tensor that is not projected
            decays with ratio 1.
        delta: threshold of the gate.
        weight_decay: ``"replace"``: SGD's coupled decay becomes decoupled ``decay / (1 - momentum)``, a decoupled optimizer's stays as
            it is; or a number, decoupled.
        weight_decay_ratio: factor on the decay of projected weights (adamp's ``wd_ratio``).
        params: ``"auto"``, a glob pattern, or a list of them; ``"auto"`` means the scale-invariant weights, with ``gate="cosine"`` every
            weight of two or more dimensions whose rows are no single numbers.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``; with ``gate="cosine"`` it is the rule's own.

    Raises:
        ValueError: for numbers out of range and unknown literals.

    Example:
        >>> from lightning_normdyn import RadialProjection
        >>> RadialProjection(gate="cosine").delta
        0.1
    """

    def __init__(
        self,
        *,
        gate: Literal["always", "cosine"] = "always",
        delta: float = 0.1,
        weight_decay: float | Literal["replace"] = "replace",
        weight_decay_ratio: float = 0.1,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        if gate not in ("always", "cosine"):
            raise ValueError(f"`gate` must be 'always' or 'cosine', got {gate!r}.")
        if gate == "cosine" and granularity != "auto":
            raise ValueError(f"gate='cosine' brings its own granularity (filter view, then layer view); got granularity={granularity!r}.")
        self.gate: Literal["always", "cosine"] = gate
        self.delta = check_number("delta", delta, "> 0")
        self.weight_decay: float | Literal["replace"] = (
            "replace" if weight_decay == "replace" else check_number("weight_decay", weight_decay, ">= 0", " or 'replace'")
        )
        self.weight_decay_ratio = check_number("weight_decay_ratio", weight_decay_ratio, ">= 0")

    def _forget(self) -> None:
        super()._forget()
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Tensor] = {}  # (targets,) of this step
        self._buffers: dict[int, str | None] = {}
        self._ratios: dict[int, list[HostCopy | float]] = {}  # by optimizer: of the newest steps, how much longer than its weight
        self._copies: set[int] = set()  # optimizers whose steps were too long to be told by a buffer
        self._said_unknown = False

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """With its own gate it takes every matrix; otherwise the scale-invariant weights."""
        return self.gate == "always"

    @property
    def acts(self) -> bool:
        """With either gate."""
        return True

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {key: getattr(self, key) for key in ("gate", "delta", "weight_decay", "weight_decay_ratio")}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Looks at `ready`, acts at `stepped`."""
        return {Phase.MEASURE: self._look, Phase.PROJECT: self._project}

    def _target(self, weight: Tensor) -> Target | None:
        target = super()._target(weight)
        if target is not None and self.gate == "cosine":
            # The paper's views are over dim 0 of the tensor as it is stored.
            target.partition = Partition.filters(self._session.shapes[weight])  # type: ignore[union-attr]
        return target

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The decay must be one that has a decoupled equivalent, and ours to take over."""
        if not weights:
            return
        check_rate(optimizer, weights)
        check_decay_takeover(optimizer, weights)
        ours = {id(w) for w in weights}
        for group in optimizer.param_groups:
            if any(id(p) in ours for p in group["params"]) and self._rule.applied(optimizer, group) is None:
                kind = decay_kind(optimizer, group)
                raise NotSupportedError(
                    f"RadialProjection(weight_decay='replace') cannot turn the {f'{kind} ' if kind else ''}weight decay "
                    f"{group['weight_decay']} of {type(optimizer).__name__} into a decoupled one. "
                    "Give a number, weight_decay=..., or use AdamW or SGD."
                )

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Claim the decay, AWS going first."""
        check_decay_takeover(plan.optimizer, plan.claimed)
        self.claim_decay(plan, bracket, DecayOwner.PROJECTION, plan.claimed)

    def _look(self, step: Step, plan: Plan) -> None:
        vectors = plan.vectors
        self._buffers[plan.index] = buffer = self._told_by(step, plan)
        if buffer is None:
            step.bracket.request_snapshot(vectors.storages())
        if self.gate == "always":
            return
        weights, gradients = vectors.values(), vectors.gradients()

        def summarize(sums: Tensor, length: Tensor) -> Tensor:
            # Rows of one weight have one length, so the filter test is a count of rows that are not under the threshold (a NaN is not),
            # the layer test a sum over rows.
            over = ~(cosine_from_sums(*sums).abs() * length.sqrt() < self.delta)
            return torch.cat([sums, over[None].to(sums.dtype), length[None]])

        pairs = (weights, weights), (weights, gradients), (gradients, gradients)
        _, totals = vectors.inner_and_totals(*pairs, summarize=summarize, exact=False)
        layer = cosine_from_sums(totals[0], totals[1], totals[2]).abs() * totals[4].sqrt() < self.delta
        by_filter = totals[3] == 0
        self._gates[plan.index] = (vectors.spread(by_filter), vectors.spread(layer & ~by_filter))
        self._open[plan.index] = by_filter | layer

    def _project(self, step: Step, plan: Plan) -> None:
        vectors, buffer = plan.vectors, self._buffers[plan.index]
        if self.gate == "always":
            share, active = self._decay(step, plan, None), plan.treated(step)
            if buffer is None:
                removed = vectors.remove_radial_(vectors.snapshots(step.bracket), share, active)
            else:
                state = step.optimizer.state
                moved = vectors.local([state[w].get(buffer) if w in state else None for w in vectors.weights])
                removed, ratio = vectors.remove_radial_of_(moved, -plan.rates(), share, active)
                largest = torch.cat([ratio.nan_to_num(0.0), ratio.new_zeros(1)]).amax()
                self._ratios.setdefault(plan.index, []).append(HostCopy(largest))
            plan.guard(removed, 0.0, step)  # has been left alone where it is not finite; here it is remembered
            return
        before = vectors.snapshots(step.bracket)
        by_filter, by_layer = self._gates[plan.index]
        (ss, sd), (total, along) = vectors.radial_and_totals(before, summarize=lambda sums, _: sums)
        layer = vectors.spread(_ratio(along, total))
        radial = torch.where(by_filter, _ratio(sd, ss), torch.where(by_layer, layer, torch.zeros_like(layer)))
        removed = radial + self._decay(step, plan, by_filter | by_layer)
        vectors.add_scaled_(-plan.guard(removed, 0.0, step), before)

    def _told_by(self, step: Step, plan: Plan) -> str | None:
        """The optimizer's buffer that tells what its step was; None: a copy of the weights must tell, as it does for most optimizers."""
        # In bfloat16 and float16 a weight moves by what rounding leaves of the step. A fused kernel that skips its update under a
        # GradScaler leaves in the buffer what was there: at the first step, any numbers at all.
        if self.gate == "cosine" or plan.vectors.low_precision or step.skipped is not None:
            return None
        if self._steps_are_long(plan):
            return None
        buffers = {step_buffer(step.optimizer, group) for group, _ in plan.groups}
        return buffers.pop() if len(buffers) == 1 else None

    def _steps_are_long(self, plan: Plan) -> bool:
        """Whether some step was longer than its weight: from then on copies tell, since a sum of the two has lost digits of the weight."""
        # Those before the last two have arrived on the host; to wait for them costs nothing. Always the same, so that runs repeat.
        ratios = self._ratios.get(plan.index, [])
        while len(ratios) > 2:
            oldest = ratios.pop(0)
            if self._on_host(oldest) > LONGEST_TOLD:
                self._copies.add(plan.index)
        # Each rank sees its own vectors. Where some are cut, all ranks must take the same way: that of a copy, unless all see all.
        return plan.index in self._copies or plan.vectors.cut

    @staticmethod
    def _on_host(ratio: HostCopy | float) -> float:
        return float(ratio.get()) if isinstance(ratio, HostCopy) else ratio

    def _extra(self) -> dict[str, Any]:
        pending = {index: [self._on_host(ratio) for ratio in ratios] for index, ratios in self._ratios.items()}
        return {"copies": sorted(self._copies), "ratios": pending}

    def _check_extra(self, extra: Any, where: str) -> None:
        record({}, {"copies": many(whole()), "ratios": table(whole(), many(number(0.0, finite=False)))})(extra, where)

    def _load_extra(self, extra: dict[str, Any]) -> None:
        self._copies = set(extra.get("copies", []))
        self._ratios = {index: list(ratios) for index, ratios in extra.get("ratios", {}).items()}

    def _decay(self, step: Step, plan: Plan, projected: Tensor | None) -> Tensor:
        """``lr * decay * ratio`` of every vector; 0 where AWS owns the decay."""
        rates = [self._rate(step.optimizer, group) for group, _ in plan.groups]
        rate = plan.rates() * plan.spread_groups("projection_decay", rates)
        ratio: float | Tensor = self.weight_decay_ratio
        if projected is not None:
            ratio = torch.where(projected, torch.full_like(rate, self.weight_decay_ratio), torch.ones_like(rate))
        return rate * ratio * plan.owns_decay(step, DecayOwner.PROJECTION)

    @property
    def _rule(self) -> DecayRule:
        """The decay of a weight that is not projected."""
        return replace(Projection(self.gate, self.weight_decay, self.weight_decay_ratio).decay, ratio=1.0)

    def _rate(self, optimizer: Optimizer, group: dict[str, Any]) -> Any:
        """Decoupled λ of a param group, before the ratio."""
        rate = self._rule.applied(optimizer, group)
        if rate is not None:
            return rate
        # Fit start refuses this. A schedule of the decay can still bring it about, and a step raises nothing.
        if not self._said_unknown:
            self._said_unknown = True
            warn_once(
                f"RadialProjection(weight_decay='replace') cannot turn the weight decay {group['weight_decay']} that "
                f"{type(optimizer).__name__} has now into a decoupled one, so its targets have none from here on."
            )
        return 0.0

    def correct_decays(self, plan: Plan, decays: Sequence[Decay], rates: Tensor) -> None:
        """A weight whose gate is closed in this step decays with ratio 1."""
        if self.gate == "always":
            return
        gates = {t.weight: gate for i, p in self.plans.items() for t, gate in zip(p.targets, self._open[i], strict=True)}
        for i, (target, group) in enumerate(zip(plan.targets, plan.groups_of(plan.targets), strict=True)):
            if decays[i].owner == DecayOwner.PROJECTION and target.weight in gates:
                rates[i] = torch.where(gates[target.weight], rates[i], self._rate(plan.optimizer, group))

    def treatments(self, plan: Plan) -> list[str]:
        """What the tables say: whether a weight is projected, and which decay it has now."""
        assert self._session is not None
        how = "projected" if self.gate == "always" else f"projected if |cos| < {self.delta:g}/√d"
        texts = []
        for group, decay in zip(plan.groups_of(plan.targets), self._session.decays(plan), strict=True):
            text = how
            if decay.owner == DecayOwner.PROJECTION and decay.rate is not None and not is_zero(decay.rate):
                replaced = replaced_decay(plan.optimizer, group)
                text += f", decay {float(decay.rate):.2g}" + (f" ({replaced})" if replaced else "")
            texts.append(text)
        return texts

    def effect(self, target: Target) -> Effect:
        """It removes the radial part of steps, and decays."""
        return Projection(self.gate, self.weight_decay, self.weight_decay_ratio)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
