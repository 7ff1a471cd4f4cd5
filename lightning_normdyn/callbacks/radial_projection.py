"""Radial projection (SGDP, AdamP): let steps turn weights without lengthening them, with any torch
optimizer.

Over 500 lines, because each of its ways (told by a copy or by a buffer, gated or not) is a formula
of its own, and a rule and its formulas are read together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Granularity, Params, check_choice, check_number
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Projection
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.plan import Plan, Target, guarded
from lightning_normdyn.engine.value_checks import flag, many, number, optional, record
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import cosine_from_sums
from lightning_normdyn.geometry.formulas import (
    Taken,
    fuses_formulas,
    largest_of,
    products,
    radial,
    radial_part_of_step,
    take_with_totals,
    work_out,
)
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.passes import Operand, above_zero, removed_part
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import (
    Decay,
    DecayOwner,
    DecayRule,
    decay_kind,
    replaced_decay,
)
from lightning_normdyn.optimizers.group_numbers import Number, is_zero
from lightning_normdyn.optimizers.state import StateOf, step_buffer
from lightning_normdyn.optimizers.step import HostCopy, Phase, Step

# A weight is told from the sum of itself and its step. In float32 that errs by 6e-8 times the step
# over the weight.
LONGEST_TOLD = 1.0


def shortened(
    ww: Tensor,
    wd: Tensor,
    rates: Tensor,
    decays: Tensor,
    ratio: float,
    owned: Tensor,
    *guards: Any,
) -> tuple[Tensor, Tensor]:
    """What a projection adds of w to each vector.

    Args:
        ww: <w, w>.
        wd: <w, Δ>.
        rates: learning rates.
        decays: weight decays.
        ratio: how much of them is applied.
        owned: bool: whether the decay is the projection's.
        guards: as `lightning_normdyn.engine.plan.guarded` takes them.

    Returns:
        The coefficient of w, and ``bad``.
    """
    share = rates * decays * ratio * owned
    removed, bad = guarded(removed_part(ww, wd, share), 0.0, *guards)
    return -removed, bad


def shortened_by_buffer(
    ww: Tensor, wd: Tensor, bb: Tensor, rates: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`shortened` where the step is known, ``-rates`` times a buffer b; ``bb`` is <b, b>.

    Returns:
        The factor of what w has become, ``bad``, the coefficient of the buffer, and how many times
        longer than w the longest step was.
    """
    coefficient, bad = shortened(ww, wd, rates, *numbers)
    # w = v + rates b, put in: w itself is nowhere, and its copy would cost memory.
    step_ratio = rates.abs() * (bb / above_zero(ww)).sqrt()
    return 1 + coefficient, bad, coefficient * rates, largest_of(step_ratio.nan_to_num(0.0))


def gate_sums(
    ww: Tensor,
    wg: Tensor,
    gg: Tensor,
    length: Tensor,
    delta: float,
) -> tuple[Tensor, ...]:
    """What AdamP's gates need of each vector w with gradient g, to be summed over a weight: its
    three sums, whether its cosine is over the threshold, and its length."""
    # Rows of one weight have one length, so the filter test is a count of rows that are not under
    # the threshold (a NaN is not), the layer test a sum over rows.
    over = ~(cosine_from_sums(ww, wg, gg).abs() * length.sqrt() < delta)
    return ww, wg, gg, over.to(ww.dtype), length


def gates(
    delta: float,
    ww: Tensor,
    wg: Tensor,
    gg: Tensor,
    over: Tensor,
    entries: Tensor,
) -> tuple[Tensor, Tensor]:
    """AdamP's test |cos(w, g)| < delta / sqrt(d), from the totals of `gate_sums` over a weight: for
    all filters of it, and, where not all pass, for all of it as one vector."""
    layer = cosine_from_sums(ww, wg, gg).abs() * entries.sqrt() < delta
    by_filter = over == 0
    return by_filter, layer & ~by_filter


def step_sums(ss: Tensor, sd: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer test needs of each step, to be summed over a weight."""
    return ss, sd


def shortened_by_gates(
    ss: Tensor,
    sd: Tensor,
    layer_ss: Tensor,
    layer_sd: Tensor,
    by_filter: Tensor,
    by_layer: Tensor,
    rates: Tensor,
    decays: Tensor,
    ratio: float,
    owned: Tensor,
    *guards: Any,
) -> tuple[Tensor, Tensor]:
    """`shortened` where gates are open, each number of a weight repeated for its vectors."""
    # By how many times the weight the step is to be shortened.
    along = _ratio(sd, ss).where(by_filter, _ratio(layer_sd, layer_ss).where(by_layer, 0.0))
    rate = rates * decays
    # A step that keeps its radial part can hold the norm against the full decay, as in adamp.
    share = (rate * ratio).where(by_filter | by_layer, rate) * owned
    removed, bad = guarded(along + share, 0.0, *guards)
    return -removed, bad


def shortened_by_totals(
    ss: Tensor,
    sd: Tensor,
    weight_of: Tensor,
    delta: float,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    """`shortened_by_gates` from the numbers of weights: totals of `step_sums` and `gate_sums`."""
    # Tested anew for each vector: a launch for a few hundred weights would cost more.
    layer_ss, layer_sd, *of_gates = [of_weights[weight_of] for of_weights in numbers[:7]]
    open_gates = gates(delta, *of_gates)
    return shortened_by_gates(ss, sd, layer_ss, layer_sd, *open_gates, *numbers[7:])


class ProjectionPart(Part["RadialProjection"]):
    """The part in a fit of a projection: how its targets split into vectors."""

    def target(self, weight: Tensor) -> Target | None:
        """The paper's views of a gated projection are over dim 0 of the tensor as it is stored."""
        target = super().target(weight)
        if target is not None and self.rule.gate == "cosine":
            target.partition = Partition.filters(self.session.weights.shapes[weight])
        return target


class ProjectWorker(Worker["RadialProjection"]):
    """Projects the steps of the targets of one optimizer."""

    _RATIO = record({"ratio": number(0.0, finite=False), "rate": optional(number())}, closed=True)
    STATE = record({"long_steps": flag, "ratios": many(_RATIO)}, closed=True)

    def prepare(self) -> None:
        """Take the decay; nothing is known yet of any step."""
        self.buffer: str | None = None
        """Of this step: the optimizer's buffer that could tell what it was."""
        self.needs_copy = True
        """Of this step: whether a copy of the weights must tell it all the same, as for most
        optimizers."""
        self.gate_totals: Tensor | None = None
        """Of this step, ``(5, targets)``: what opens the gates."""
        self.ratios: list[tuple[HostCopy, float | None]] = []
        """Of the two newest steps: how many times longer than its weight the longest was, and the
        learning rate."""
        self.has_long_steps = False
        """Whether a step was too long to be told by a buffer."""
        vectors = self.plan.vectors
        self.state_of_targets = StateOf(vectors.weights)
        self.no_share = torch.zeros(vectors.n, dtype=vectors.sum_dtype, device=vectors.device)
        """What each vector loses where its decay is somebody else's."""
        # Projecting would remove the optimizer's decay, so it is applied here.
        self.claim_decay(DecayOwner.PROJECTION)

    @during(Phase.MEASURE)
    def look(self, step: Step) -> None:
        """Ask for a copy of the weights where one must tell the step; set the gates."""
        self.buffer = self._telling_buffer(step)
        # A copy costs memory and a pass over the targets, so it is taken only where it must be.
        self.needs_copy = self.buffer is None or not self._steps_are_short()
        if self.needs_copy:
            step.bracket.request_snapshot(self.plan.vectors.storages())
        if self.rule.gate == "cosine":
            self._set_gates()

    def _set_gates(self) -> None:
        """Take the sums that AdamP's gates go by."""
        vectors = self.plan.vectors
        sums = products(vectors, vectors.gradients())
        _, self.gate_totals = take_with_totals(vectors, sums, gate_sums, (self.rule.delta,))

    def _open_gates(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """``(targets,)`` each: weights that are projected in the filter view, in the layer view."""
        return gates(self.rule.delta, *totals)

    @during(Phase.PROJECT)
    def project(self, step: Step) -> None:
        """w <- w + Pi_w(Delta) (SGDP/AdamP, "Projected updates"), with the decay of the targets."""
        if self.gate_totals is not None:
            self._project_gated(step, self.gate_totals)
        elif fuses_formulas(self.plan.vectors):
            self._project_at_once(step)
        else:
            # What is not finite has been left alone; here it is remembered.
            self.plan.note_acting(step, self._project_all(step))

    def rehearse(self, step: Step) -> None:
        """Sums, coefficients and the change of the step, as told by a copy; by a buffer if there is
        one."""
        plan = self.plan
        vectors = plan.vectors
        values = vectors.values()
        share = self._share(step, plan.expected_guards(step))
        if self.rule.gate == "cosine":
            self._rehearse_gates(share)
        else:
            coefficient, _ = work_out(vectors, shortened, radial(vectors, values), share)
            vectors.add_scaled_(coefficient, values)
        if self._telling_buffer(step) is not None:
            sums = radial_part_of_step(vectors, values, plan.rates())
            factor, _, coefficient, _ = work_out(vectors, shortened_by_buffer, sums, share)
            vectors.scale_and_add_(factor, coefficient, values)
            # How long steps are is measured until it is known.
            vectors.partial_inner((values, values), exact=False)

    def _step_sums(self, before: Operand) -> tuple[Taken, Tensor]:
        """Sums of each vector's step, and their totals over weights, ``(2, targets)``."""
        vectors = self.plan.vectors
        return take_with_totals(vectors, radial(vectors, before), step_sums, linear=True)

    def _rehearse_gates(self, share: tuple[Any, ...]) -> None:
        vectors = self.plan.vectors
        # The weights stand in for gradients and copies: only the layout matters.
        values, delta = vectors.values(), self.rule.delta
        _, of_gates = take_with_totals(vectors, products(vectors, values), gate_sums, (delta,))
        taken, of_step = self._step_sums(values)
        numbers = vectors.weight_of, delta, *of_step, *of_gates, *share
        coefficient, _ = work_out(vectors, shortened_by_totals, taken, numbers)
        vectors.add_scaled_(coefficient, values)

    def _share(self, step: Step, guards: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """What `shortened` takes behind the sums."""
        plan = self.plan
        # AWS goes first where both are on a weight: one decay, not two.
        owned = plan.owns_decay(step, DecayOwner.PROJECTION)
        ratio = self.rule.weight_decay_ratio
        return plan.rates(), self._decays(), ratio, owned, *guards

    def _project_at_once(self, step: Step) -> None:
        """`_project_all` where a launch is the dearest thing: sums, one formula, one write."""
        plan = self.plan
        vectors = plan.vectors
        share = self._share(step, plan.guards(step))
        if self.needs_copy:
            before = vectors.snapshots(step.bracket)
            sums = radial(vectors, before)
            coefficient, _ = work_out(vectors, shortened, sums, share, into=(None, plan.bad))
            vectors.add_scaled_(coefficient, before)
            self._measure_length(step, before)
            return
        moved = self._buffer_values(step)
        sums = radial_part_of_step(vectors, moved, plan.rates())
        factor, _, coefficient, longest = work_out(
            vectors, shortened_by_buffer, sums, share, into=(None, plan.bad)
        )
        vectors.scale_and_add_(factor, coefficient, moved)
        self._remember_ratio(longest)

    def _project_all(self, step: Step) -> Tensor:
        """Every target; ``(n,)``: by how many times the weight its step was shortened."""
        plan = self.plan
        vectors = plan.vectors
        rates = plan.rates()
        share = self._decay(step, rates)
        treated = plan.treated(step)
        if not self.needs_copy:
            # SGD moves a weight by -lr times its momentum buffer, so no copy is needed to know the
            # step.
            moved = self._buffer_values(step)
            removed, ratio = vectors.remove_radial_of_(moved, -rates, share, treated)
            self._remember_ratio(largest_of(ratio.nan_to_num(0.0)))
            return removed
        before = vectors.snapshots(step.bracket)
        removed = vectors.remove_radial_(before, share, treated)
        self._measure_length(step, before)
        return removed

    def _measure_length(
        self,
        step: Step,
        before: Sequence[Tensor | None],
    ) -> None:
        """Until it is known how long steps are, take note of this one's."""
        if self.buffer is None or self.has_long_steps:
            return
        moved = self._buffer_values(step)
        ss, dd = self.plan.vectors.inner((before, before), (moved, moved), exact=False)
        ratio = self.plan.rates() * (dd / ss).sqrt()
        self._remember_ratio(largest_of(ratio.nan_to_num(0.0)))

    def _project_gated(self, step: Step, gate_totals: Tensor) -> None:
        """The vectors whose gate is open, in one of the two views."""
        plan = self.plan
        vectors = plan.vectors
        before = vectors.snapshots(step.bracket)
        share = self._share(step, plan.guards(step))
        taken, (layer_ss, layer_sd) = self._step_sums(before)
        into = None, plan.bad
        if fuses_formulas(vectors):
            totals = layer_ss, layer_sd, *gate_totals
            numbers = vectors.weight_of, self.rule.delta, *totals, *share
            found = work_out(vectors, shortened_by_totals, taken, numbers, into)
        else:
            # For each weight once: it may have thousands of vectors.
            totals = layer_ss, layer_sd, *self._open_gates(gate_totals)
            spread = [vectors.spread(of_weights) for of_weights in totals]
            found = work_out(vectors, shortened_by_gates, taken, (*spread, *share), into)
        vectors.add_scaled_(found[0], before)

    # -- the decay

    def _decay(self, step: Step, rates: Tensor) -> Tensor:
        """``lr * decay * ratio`` of every vector; 0 where AWS owns the decay."""
        plan = self.plan
        # AWS goes first where both are on a weight: one decay, not two. Where that is everywhere,
        # nobody has to know what this one would be.
        if plan.owns_none(step, DecayOwner.PROJECTION):
            return self.no_share
        share = rates * self._decays() * self.rule.weight_decay_ratio
        return share * plan.owns_decay(step, DecayOwner.PROJECTION)

    def _decays(self) -> Tensor:
        """Decoupled λ of every vector, before the ratio: ``(n,)``."""
        by_group = [self._decay_rate(group) for group, _ in self.plan.groups]
        return self.plan.spread_groups("projection_decay", by_group)

    def _decay_rate(self, group: dict[str, Any]) -> Number:
        """Decoupled λ of a param group, before the ratio."""
        setting = "RadialProjection(weight_decay='replace')"
        return self.decoupled_decay(group, self.rule.decay_rule, setting)

    def correct_decays(
        self,
        plan: Plan,
        decays: Sequence[Decay],
        rates: Tensor,
    ) -> None:
        """A weight whose gate is closed in this step decays with ratio 1."""
        if self.gate_totals is None:
            return
        by_filter, by_layer = self._open_gates(self.gate_totals)
        is_open = dict(zip(self.plan.vectors.weights, by_filter | by_layer, strict=True))
        for i, target in enumerate(plan.targets):
            if decays[i].owner == DecayOwner.PROJECTION and target.weight in is_open:
                closed = self._decay_rate(self.plan.group_of(target))
                rates[i] = torch.where(is_open[target.weight], rates[i], closed)

    # -- how long steps are

    def _telling_buffer(self, step: Step) -> str | None:
        """The optimizer's buffer that tells what its step was, if steps are short."""
        plan = self.plan
        # In bfloat16 and float16 a weight moves by what rounding leaves of the step. A fused kernel
        # that skips its update under a GradScaler leaves in the buffer what was there: at the first
        # step, any numbers at all.
        if self.rule.gate == "cosine" or plan.vectors.low_precision or step.skipped is not None:
            return None
        # Where vectors are cut, ranks would have to agree whether steps are short.
        if plan.vectors.cut or self.has_long_steps:
            return None
        buffers = {step_buffer(step.optimizer, group) for group, _ in plan.groups}
        # Param groups with different settings need not have the same buffer that tells the step.
        return buffers.pop() if len(buffers) == 1 else None

    def _buffer_values(self, step: Step) -> list[Tensor | None]:
        """The buffer of each target, as it lies on this rank."""
        states: list[Mapping[Any, Any]] = self.state_of_targets.now(step.optimizer)
        return self.plan.vectors.local([state.get(self.buffer) for state in states])

    def _steps_are_short(self) -> bool:
        """Whether every step so far was shorter than its weight, as far as the host knows; once one
        was not, copies tell for good."""
        # The last step's ratio may still be on its way from the device, so always the one before it
        # is asked for: runs must repeat. Nothing else is changed here: a step that raised asks
        # again.
        if len(self.ratios) < 2:
            return False
        ratio, rate_then = self.ratios[0]
        rate = self._rate_on_host()
        # A schedule may have raised the rate since (warm-up), and steps grow with it.
        growth = rate / rate_then if rate is not None and rate_then else 1.0
        # Written so that a NaN counts as long.
        if not _longest(ratio) * max(growth, 1.0) <= LONGEST_TOLD:
            self.has_long_steps = True
        return not self.has_long_steps

    def _remember_ratio(self, longest: Tensor) -> None:
        """Take note of how long the longest step was, `largest_of` all vectors; 0, not NaN, of a
        vector of length zero that did not move: it says nothing."""
        newest = (HostCopy(longest), self._rate_on_host())
        self.ratios = [*self.ratios[-1:], newest]

    def _rate_on_host(self) -> float | None:
        """The largest learning rate, or None if one of them is a tensor, which may lie on the
        device."""
        rates = [group["lr"] for group, _ in self.plan.groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            return None
        return max(map(float, rates))

    def inherit(self, earlier: ProjectWorker) -> None:
        """How long steps were."""
        self.has_long_steps = earlier.has_long_steps
        self.ratios = earlier.ratios

    def state(self) -> dict[str, Any]:
        """How long steps were."""
        ratios = [{"ratio": _longest(ratio), "rate": rate} for ratio, rate in self.ratios]
        return {"long_steps": self.has_long_steps, "ratios": ratios}

    def load(self, state: dict[str, Any]) -> None:
        """As `state` gave it."""
        self.has_long_steps = state["long_steps"]
        self.ratios = []
        for each in state["ratios"]:
            ratio = torch.tensor(each["ratio"], dtype=torch.float64, device="cpu")
            self.ratios.append((HostCopy(ratio), each["rate"]))

    # -- what tables and predictions say

    def effect(self, target: Target) -> Effect:
        """It removes the radial part of steps, and decays."""
        return self.rule.projection

    def treatments(self) -> list[str]:
        """What the tables say: whether a weight is projected, and which decay it has now."""
        plan = self.plan
        texts = []
        decays = self.session.combined.decays(plan)
        for target, decay in zip(plan.targets, decays, strict=True):
            text = "projected"
            if self.rule.gate == "cosine":
                text += f" if |cos| < {self.rule.delta:g}/√d"
            is_own = decay.owner == DecayOwner.PROJECTION
            if is_own and decay.rate is not None and not is_zero(decay.rate):
                text += f", decay {float(decay.rate):.2g}"
                replaced = replaced_decay(plan.optimizer, plan.group_of(target))
                if replaced:
                    text += f" ({replaced})"
            texts.append(text)
        return texts


class RadialProjection(NormDynCallback):
    r"""Radial projection (SGDP, AdamP): after every step, the part of the step along the weight is
    taken out.

    .. math:: w \leftarrow w + \Pi_w(\Delta), \qquad \Pi_w(x) = x - (\hat w \cdot x)\,\hat w

    with :math:`\Delta` the step of whatever optimizer is in use (SGDP/AdamP slides, "Projected
    updates"). With SGD and momentum this is SGDP, with AdamW it is AdamP. Since projecting would
    also remove weight decay, this callback applies the decay of its targets itself, decoupled: ``w
    <- (1 - lr * decay * ratio) w``.

    What the step was is told by a copy of the targets that is taken before it; under SGD with
    momentum (no Nesterov, float32 or more, no fused kernel under a GradScaler) by the momentum
    buffer, without a copy, once two steps were seen and as long as none was longer than its weight.

    Args:
        gate: ``"always"`` projects every target (one vector per ``granularity``); ``"cosine"`` is
            the paper's rule per tensor: filter view first, then layer view, if ``|cos(w, g)| <
            delta / sqrt(d)`` for every row of the view; a tensor that is not projected decays with
            ratio 1.
        delta: threshold of the gate.
        weight_decay: ``"replace"``: SGD's coupled decay becomes decoupled ``decay / (1 -
            momentum)``, a decoupled optimizer's stays as it is; or a number, decoupled.
        weight_decay_ratio: factor on the decay of projected weights (adamp's ``wd_ratio``).
        params: ``"auto"``, a glob pattern, or a list of them; ``"auto"`` means the scale-invariant
            weights, with ``gate="cosine"`` every weight of two or more dimensions whose rows are no
            single numbers.
        granularity: ``"auto"``, ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``; with
            ``gate="cosine"`` it is the rule's own.

    Raises:
        ValueError: for numbers out of range and unknown literals.

    Example:
        >>> from lightning_normdyn import RadialProjection
        >>> RadialProjection(gate="cosine").delta
        0.1
    """

    worker = ProjectWorker
    part = ProjectionPart
    numbers = ("gate", "delta", "weight_decay", "weight_decay_ratio")
    # With either gate.
    acts = True

    def __init__(
        self,
        *,
        gate: Literal["always", "cosine"] = "always",
        delta: float = 0.1,
        weight_decay: float | Literal["replace"] = "replace",
        weight_decay_ratio: float = 0.1,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.gate = check_choice("gate", gate, ("always", "cosine"))
        # With its own gate it takes every matrix; otherwise the scale-invariant weights.
        self.writes = gate == "always"
        if gate == "cosine" and granularity != "auto":
            raise ValueError(
                f"gate='cosine' brings its own granularity (filter view, then layer view); got "
                f"granularity={granularity!r}."
            )
        self.delta = check_number("delta", delta, "> 0")
        self.weight_decay: float | Literal["replace"] = "replace"
        if weight_decay != "replace":
            self.weight_decay = check_number("weight_decay", weight_decay, ">= 0", " or 'replace'")
        self.weight_decay_ratio = check_number("weight_decay_ratio", weight_decay_ratio, ">= 0")

    @property
    def projection(self) -> Projection:
        """What it does to each of its targets."""
        return Projection(self.gate, self.weight_decay, self.weight_decay_ratio)

    @property
    def decay_rule(self) -> DecayRule:
        """The decay of a weight that is not projected."""
        return replace(self.projection.decay, ratio=1.0)

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The decay must be one that has a decoupled equivalent, and ours to take over."""
        check_rate(optimizer, weights)
        check_decay_takeover(optimizer, weights)
        ours = {id(w) for w in weights}
        for group in optimizer.param_groups:
            # A group without targets keeps the optimizer's decay, whatever that is.
            if not any(id(p) in ours for p in group["params"]):
                continue
            if self.decay_rule.applied(optimizer, group) is not None:
                continue
            kind = decay_kind(optimizer, group)
            raise NotSupportedError(
                f"RadialProjection(weight_decay='replace') cannot turn the "
                f"{f'{kind} ' if kind else ''}weight decay {group['weight_decay']} of "
                f"{type(optimizer).__name__} into a decoupled one. Give a number, "
                f"weight_decay=..., or use AdamW or SGD."
            )


def _longest(ratio: HostCopy) -> float:
    # What is `largest_of` all vectors may still be a few numbers, none where there is no vector.
    return max(ratio.get().flatten().tolist(), default=0.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # A weight of zeros has no direction to project on: 0 leaves it alone, NaN would not.
    return (numerator / denominator).where(denominator > 0, 0.0)
