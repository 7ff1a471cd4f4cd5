"""Radial projection (SGDP, AdamP): let steps turn weights without lengthening them, with any torch
optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.callback import NormDynCallback, Plan, Target, check_number
from lightning_normdyn.engine.effect import Effect, Projection
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.engine.state import many, number, optional, record, table, whole
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import cosine_from_sums
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import (
    Decay,
    DecayOwner,
    DecayRule,
    decay_kind,
    replaced_decay,
)
from lightning_normdyn.optimizers.group_numbers import is_zero
from lightning_normdyn.optimizers.host_copy import HostCopy
from lightning_normdyn.optimizers.state import step_buffer
from lightning_normdyn.optimizers.step import Phase, Step

# A weight is told from the sum of itself and its step. In float32 that errs by 6e-8 times the step
# over the weight.
LONGEST_TOLD = 1.0


class RadialProjection(NormDynCallback):
    r"""Radial projection (SGDP, AdamP): after every step, the part of the step along the weight is
    taken out.

    .. math:: w \leftarrow w + \Pi_w(\Delta), \qquad \Pi_w(x) = x - (\hat w \cdot x)\,\hat w

    with :math:`\Delta` the step of whatever optimizer is in use (SGDP/AdamP slides, "Projected
    updates"). With SGD and momentum this is
    SGDP, with AdamW it is AdamP. Since projecting would also remove weight decay, this callback
    applies the decay of its targets itself,
    decoupled: ``w <- (1 - lr * decay * ratio) w``.

    What the step was is told by a copy of the targets that is taken before it; under SGD with
    momentum (no Nesterov, float32 or more, no
    fused kernel under a GradScaler) by the momentum buffer, without a copy, once two steps were
    seen and as long as none was longer than
    its weight.

    Args:
        gate: ``"always"`` projects every target (one vector per ``granularity``); ``"cosine"`` is
            the paper's rule per tensor: filter
            view first, then layer view, if ``|cos(w, g)| < delta / sqrt(d)`` for every row of the
            view; a tensor that is not projected
            decays with ratio 1.
        delta: threshold of the gate.
        weight_decay: ``"replace"``: SGD's coupled decay becomes decoupled ``decay / (1 -
            momentum)``, a decoupled optimizer's stays as
            it is; or a number, decoupled.
        weight_decay_ratio: factor on the decay of projected weights (adamp's ``wd_ratio``).
        params: ``"auto"``, a glob pattern, or a list of them; ``"auto"`` means the scale-invariant
            weights, with ``gate="cosine"`` every
            weight of two or more dimensions whose rows are no single numbers.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``; with ``gate="cosine"`` it
            is the rule's own.

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
            raise ValueError(
                f"gate='cosine' brings its own granularity (filter view, then layer view); got "
                f"granularity={granularity!r}."
            )
        self.gate: Literal["always", "cosine"] = gate
        self.delta = check_number("delta", delta, "> 0")
        self.weight_decay: float | Literal["replace"] = (
            "replace"
            if weight_decay == "replace"
            else check_number("weight_decay", weight_decay, ">= 0", " or 'replace'")
        )
        self.weight_decay_ratio = check_number("weight_decay_ratio", weight_decay_ratio, ">= 0")

    def _forget(self) -> None:
        super()._forget()
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}
        self._open: dict[int, Tensor] = {}  # (targets,) of this step
        self._buffers: dict[int, str | None] = {}
        # By optimizer, of the newest steps: how many times longer than its weight the longest was,
        # and the learning rate.
        self._ratios: dict[int, list[tuple[HostCopy | float, float | None]]] = {}
        self._long: set[int] = set()  # optimizers whose steps were too long to be told by a buffer
        self._asking: set[int] = set()  # optimizers of whose steps it is not known yet
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
        return {
            key: getattr(self, key)
            for key in ("gate", "delta", "weight_decay", "weight_decay_ratio")
        }

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Looks at `ready`, acts at `stepped`."""
        return {Phase.MEASURE: self._look, Phase.PROJECT: self._project}

    def _target(self, weight: Tensor) -> Target | None:
        target = super()._target(weight)
        if target is not None and self.gate == "cosine":
            # The paper's views are over dim 0 of the tensor as it is stored.
            target.partition = Partition.filters(self._session.weights.shapes[weight])  # type: ignore[union-attr]
        return target

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The decay must be one that has a decoupled equivalent, and ours to take over."""
        if not weights:
            return
        check_rate(optimizer, weights)
        check_decay_takeover(optimizer, weights)
        ours = {id(w) for w in weights}
        for group in optimizer.param_groups:
            if (
                any(id(p) in ours for p in group["params"])
                and self._rule.applied(optimizer, group) is None
            ):
                kind = decay_kind(optimizer, group)
                raise NotSupportedError(
                    f"RadialProjection(weight_decay='replace') cannot turn the "
                    f"{f'{kind} ' if kind else ''}weight decay "
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
            # Rows of one weight have one length, so the filter test is a count of rows that are not
            # under the threshold (a NaN is not),
            # the layer test a sum over rows.
            over = ~(cosine_from_sums(*sums).abs() * length.sqrt() < self.delta)
            return torch.cat([sums, over[None].to(sums.dtype), length[None]])

        pairs = (weights, weights), (weights, gradients), (gradients, gradients)
        _, totals = vectors.inner_and_totals(*pairs, summarize=summarize, exact=False)
        layer = (
            cosine_from_sums(totals[0], totals[1], totals[2]).abs() * totals[4].sqrt() < self.delta
        )
        by_filter = totals[3] == 0
        self._gates[plan.index] = (vectors.spread(by_filter), vectors.spread(layer & ~by_filter))
        self._open[plan.index] = by_filter | layer

    def _project(self, step: Step, plan: Plan) -> None:
        vectors, buffer = plan.vectors, self._buffers[plan.index]
        if self.gate == "always":
            share, active = self._decay(step, plan, None), plan.treated(step)
            if buffer is None:
                before = vectors.snapshots(step.bracket)
                removed = vectors.remove_radial_(before, share, active)
                if plan.index in self._asking:
                    moved = self._buffer_of(step, plan)
                    ss, dd = vectors.inner((before, before), (moved, moved), exact=False)
                    self._remember_ratio(plan, plan.rates() * (dd / ss).sqrt())
            else:
                removed, ratio = vectors.remove_radial_of_(
                    self._buffer_of(step, plan), -plan.rates(), share, active
                )
                self._remember_ratio(plan, ratio)
            plan.guard(
                removed, 0.0, step
            )  # has been left alone where it is not finite; here it is remembered
            return
        before = vectors.snapshots(step.bracket)
        by_filter, by_layer = self._gates[plan.index]
        (ss, sd), (total, along) = vectors.radial_and_totals(before, summarize=lambda sums, _: sums)
        layer = vectors.spread(_ratio(along, total))
        radial = torch.where(
            by_filter, _ratio(sd, ss), torch.where(by_layer, layer, torch.zeros_like(layer))
        )
        removed = radial + self._decay(step, plan, by_filter | by_layer)
        vectors.add_scaled_(-plan.guard(removed, 0.0, step), before)

    def _told_by(self, step: Step, plan: Plan) -> str | None:
        """The optimizer's buffer that tells what its step was; None: a copy of the weights must
        tell, as it does for most optimizers."""
        self._asking.discard(plan.index)
        # In bfloat16 and float16 a weight moves by what rounding leaves of the step. A fused kernel
        # that skips its update under a
        # GradScaler leaves in the buffer what was there: at the first step, any numbers at all.
        if self.gate == "cosine" or plan.vectors.low_precision or step.skipped is not None:
            return None
        # Where vectors are cut, ranks would have to agree whether steps are short.
        if plan.vectors.cut or plan.index in self._long:
            return None
        buffers = {step_buffer(step.optimizer, group) for group, _ in plan.groups}
        buffer = buffers.pop() if len(buffers) == 1 else None
        if buffer is None or self._steps_are_short(plan):
            return buffer
        if plan.index not in self._long:
            self._asking.add(plan.index)
        return None

    def _buffer_of(self, step: Step, plan: Plan) -> list[Tensor | None]:
        state = step.optimizer.state
        buffers = [step_buffer(step.optimizer, group) for group in plan.groups_of(plan.targets)]
        found = [
            state[w].get(b) if w in state and b else None
            for w, b in zip(plan.vectors.weights, buffers, strict=True)
        ]
        return plan.vectors.local(found)

    # -- how long steps are
    # ----------------------------------------------------------------------------------------------

    def _steps_are_short(self, plan: Plan) -> bool:
        """Whether every step so far was shorter than its weight, as far as the host knows; once one
        was not, copies tell for good."""
        # The last step's ratio may still be on its way from the device, so always the one before it
        # is asked for: runs must repeat.
        # Nothing is changed here: a step that raised asks again.
        ratios = self._ratios.get(plan.index, [])
        if len(ratios) < 2:
            return False
        ratio, rate = self._on_host(ratios[0][0]), ratios[0][1]
        now = self._rate_on_host(plan)
        growth = now / rate if now is not None and rate else 1.0
        if not ratio * max(growth, 1.0) <= LONGEST_TOLD:
            self._long.add(plan.index)
        return plan.index not in self._long

    def _remember_ratio(self, plan: Plan, ratio: Tensor) -> None:
        # A vector of length zero that did not move says nothing.
        largest = torch.cat([ratio.nan_to_num(0.0), ratio.new_zeros(1)]).amax()
        newest = (HostCopy(largest), self._rate_on_host(plan))
        self._ratios[plan.index] = [*self._ratios.get(plan.index, [])[-1:], newest]

    @staticmethod
    def _rate_on_host(plan: Plan) -> float | None:
        """The largest learning rate, or None if one of them is a tensor, which may lie on the
        device."""
        rates = [group["lr"] for group, _ in plan.groups]
        return None if any(isinstance(rate, Tensor) for rate in rates) else max(map(float, rates))

    @staticmethod
    def _on_host(ratio: HostCopy | float) -> float:
        return float(ratio.get()) if isinstance(ratio, HostCopy) else ratio

    def _extra(self) -> dict[str, Any]:
        pending = {}
        for index, ratios in self._ratios.items():
            pending[index] = [
                {"ratio": self._on_host(ratio), "rate": rate} for ratio, rate in ratios
            ]
        return {"long_steps": sorted(self._long), "ratios": pending}

    def _check_extra(self, extra: Any, where: str) -> None:
        known = record(
            {"ratio": number(0.0, finite=False), "rate": optional(number())}, closed=True
        )
        record({}, {"long_steps": many(whole()), "ratios": table(whole(), many(known))})(
            extra, where
        )

    def _load_extra(self, extra: dict[str, Any]) -> None:
        self._long = set(extra.get("long_steps", []))
        self._ratios = {}
        for index, ratios in extra.get("ratios", {}).items():
            self._ratios[index] = [(each["ratio"], each["rate"]) for each in ratios]

    def _decay(self, step: Step, plan: Plan, projected: Tensor | None) -> Tensor:
        """``lr * decay * ratio`` of every vector; 0 where AWS owns the decay."""
        rates = [self._rate(step.optimizer, group) for group, _ in plan.groups]
        rate = plan.rates() * plan.spread_groups("projection_decay", rates)
        ratio: float | Tensor = self.weight_decay_ratio
        if projected is not None:
            ratio = torch.where(
                projected, torch.full_like(rate, self.weight_decay_ratio), torch.ones_like(rate)
            )
        return rate * ratio * plan.owns_decay(step, DecayOwner.PROJECTION)

    @property
    def _rule(self) -> DecayRule:
        """The decay of a weight that is not projected."""
        return replace(
            Projection(self.gate, self.weight_decay, self.weight_decay_ratio).decay, ratio=1.0
        )

    def _rate(self, optimizer: Optimizer, group: dict[str, Any]) -> Any:
        """Decoupled λ of a param group, before the ratio."""
        rate = self._rule.applied(optimizer, group)
        if rate is not None:
            return rate
        # Fit start refuses this. A schedule of the decay can still bring it about, and a step
        # raises nothing.
        if not self._said_unknown:
            self._said_unknown = True
            warn_once(
                f"RadialProjection(weight_decay='replace') cannot turn the weight decay "
                f"{group['weight_decay']} that "
                f"{type(optimizer).__name__} has now into a decoupled one, so its targets have "
                f"none from here on."
            )
        return 0.0

    def correct_decays(self, plan: Plan, decays: Sequence[Decay], rates: Tensor) -> None:
        """A weight whose gate is closed in this step decays with ratio 1."""
        if self.gate == "always":
            return
        gates = {
            t.weight: gate
            for i, p in self.plans.items()
            for t, gate in zip(p.targets, self._open[i], strict=True)
        }
        for i, (target, group) in enumerate(
            zip(plan.targets, plan.groups_of(plan.targets), strict=True)
        ):
            if decays[i].owner == DecayOwner.PROJECTION and target.weight in gates:
                rates[i] = torch.where(
                    gates[target.weight], rates[i], self._rate(plan.optimizer, group)
                )

    def treatments(self, plan: Plan) -> list[str]:
        """What the tables say: whether a weight is projected, and which decay it has now."""
        assert self._session is not None
        how = "projected" if self.gate == "always" else f"projected if |cos| < {self.delta:g}/√d"
        texts = []
        for group, decay in zip(
            plan.groups_of(plan.targets), self._session.combined.decays(plan), strict=True
        ):
            text = how
            if (
                decay.owner == DecayOwner.PROJECTION
                and decay.rate is not None
                and not is_zero(decay.rate)
            ):
                replaced = replaced_decay(plan.optimizer, group)
                text += f", decay {float(decay.rate):.2g}" + (f" ({replaced})" if replaced else "")
            texts.append(text)
        return texts

    def effect(self, target: Target) -> Effect:
        """It removes the radial part of steps, and decays."""
        return Projection(self.gate, self.weight_decay, self.weight_decay_ratio)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
