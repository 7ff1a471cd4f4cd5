"""Rescaling at a drop of the learning rate: land on the new equilibrium at once instead of drifting
there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Granularity, Params, check_number
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Effects, LengthJumps
from lightning_normdyn.engine.plan import Target, guarded
from lightning_normdyn.engine.rescaling import (
    Rescaler,
    RescalingPart,
    RescalingWorker,
    changes_function,
)
from lightning_normdyn.engine.value_checks import flag, number, record, table, text
from lightning_normdyn.engine.worker import during
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.formulas import work_out
from lightning_normdyn.monitor.predictions import balance
from lightning_normdyn.optimizers.checks import check_rate
from lightning_normdyn.optimizers.decay import written_decay
from lightning_normdyn.optimizers.group_numbers import is_zero
from lightning_normdyn.optimizers.rate_drop import Rate
from lightning_normdyn.optimizers.recognition import applied_rate, class_for_predictions
from lightning_normdyn.optimizers.scaling import Scaling
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.step_response import own_response
from lightning_normdyn.theory.equilibrium import lr_drop_exponent, never_settles


def dropped(factors: Tensor, weight_of: Tensor, *guards: Any) -> tuple[Tensor, Tensor]:
    """The factor of each vector, and ``bad`` as `lightning_normdyn.engine.plan.guarded` gives it,
    from ``(targets,)`` factors and the target of each vector."""
    return guarded(factors[weight_of], 1.0, *guards)


@dataclass
class _Drop:
    """A rescale for a step that is not over.

    Args:
        scaling: what was multiplied.
        rates: what is to be remembered of each weight that steps.
    """

    scaling: Scaling
    rates: dict[str, Rate]

    def stepped(self) -> dict[str, Rate]:
        """Of the weights that the optimizer has stepped, as `Scaling.judge` found: for them the
        drop is over."""
        pairs = zip(self.scaling.vectors.names, self.scaling.stepped, strict=True)
        stepped = {name for name, has_stepped in pairs if has_stepped}
        return {name: rate for name, rate in self.rates.items() if name in stepped}


class DropWorker(RescalingWorker["LRDropRescaling"]):
    """Rescales the targets of one optimizer when their learning rate drops."""

    event = "lr_drop"

    _BY_NAME = table(text(), number(0.0))
    STATE = record({"last_lr": _BY_NAME, "last_fall": _BY_NAME, "unmarked": flag}, closed=True)

    def prepare(self) -> None:
        """Nothing is known yet of the learning rates."""
        super().prepare()
        self.exponents: dict[str, float] = {}
        """By weight name; empty until the first step, when all callbacks have made their plans."""
        self.rates: dict[str, Rate] = {}
        """By weight name: param groups have no name that survives a resume."""
        self._drop: _Drop | None = None
        self._fetched: dict[int, tuple[Tensor, int, float]] = {}

    @during(Phase.LR_DROP)
    def rescale(self, step: Step) -> None:
        """w <- w / k^e where the learning rate has fallen by k (NRQ paper, Corollary 2)."""
        # At the first step, so that a refusal does not wait for the drop.
        self._find_exponents()
        self._mark_what_is_late()
        factors, rates = self._factors(step)
        # A step that raises, or that a fused optimizer skips on the device, changes nothing: the
        # drop is due again at the next.
        step.when_done(lambda: self.rates.update(rates))
        self._drop = None
        if any(factor != 1.0 for factor in factors):
            self._rescale_for(step, factors, rates)

    def _factors(self, step: Step) -> tuple[list[float], dict[str, Rate]]:
        """The factor of each target, and what to remember of the weights that step."""
        plan = self.plan
        factors = [1.0] * len(plan.targets)
        rates = {}
        for i, has_gradient in enumerate(plan.vectors.has_gradient(step)):
            # A weight that does not step finds the drop still due when it does.
            if not has_gradient:
                continue
            target = plan.targets[i]
            lr = self._rate_on_host(target)
            # Before its first step a weight has no rate from which it could have fallen.
            known = self.rates.get(target.name, Rate(lr))
            drop, rates[target.name] = known.then(lr, self.rule.min_drop)
            factors[i] = drop ** -self.exponents[target.name]
        return factors, rates

    def _rescale_for(
        self,
        step: Step,
        factors: list[float],
        rates: dict[str, Rate],
    ) -> None:
        plan = self.plan
        factor, _ = self._worked_out(factors, plan.guards(step))
        scaling = self.rescaler.scaling(factor, gradients=True)
        drop = self._drop = _Drop(scaling, rates)
        step.undo_with(lambda: self._take_back(drop))
        step.when_done(self._finish)
        # Through the step, which takes it back if it raises: dividing twice would be worse than not
        # at all.
        step.scale(scaling)
        step.when_done(self._mark_now if step.skipped is None else self._mark_later)

    def rehearse(self, step: Step) -> None:
        """Factors and the change of lengths: a drop shall not wait for a compiler."""
        ones = [1.0] * len(self.plan.targets)
        factor, _ = self._worked_out(ones, self.plan.expected_guards(step))
        self.rescaler.rehearse(factor)

    def _worked_out(
        self, factors: list[float], guards: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...]:
        """What `dropped` returns."""
        plan = self.plan
        numbers = self._sent(factors), plan.vectors.weight_of, *guards
        return work_out(plan.vectors, dropped, None, numbers, into=(None, plan.bad))

    def _sent(self, factors: list[float]) -> Tensor:
        """One number per target, on the device."""
        vectors = self.plan.vectors
        # From pinned memory: a copy of anything else to a GPU waits for all work before it.
        is_pinned = vectors.device.type == "cuda"
        host = torch.tensor(factors, dtype=vectors.sum_dtype, device="cpu", pin_memory=is_pinned)
        return host.to(vectors.device, non_blocking=True)

    def _take_back(self, drop: _Drop) -> None:
        """The step has raised: the drop is over for the weights that stepped all the same."""
        self._drop = None
        self.rates.update(drop.stepped())

    def _finish(self) -> None:
        self._drop = None

    def _rate_on_host(self, target: Target) -> float:
        """The rate of the coming step on the host; one that lives on a device is fetched only when
        somebody has written to it."""
        group = self.plan.group_of(target)
        rate = applied_rate(self.plan.optimizer, group, target.weight)
        if rate is None:
            return nan
        if isinstance(rate, float):
            return rate
        # Computed from a tensor, the rate is a new tensor at each step; but only a schedule, which
        # writes to the group's own, makes it drop.
        lr = group["lr"]
        last = self._fetched.get(id(group))
        if last is None or last[0] is not lr or last[1] != lr._version:
            last = self._fetched[id(group)] = (lr, lr._version, float(lr))
        return last[2]

    def _find_exponents(self) -> None:
        """At the first step, when all callbacks have made their plans."""
        if self.exponents:
            return
        # Besides this rule: its own jumps say nothing about the equilibrium between them.
        targets = self.plan.targets
        effects = self.session.combined.effects(targets, besides=self.rule)
        # All or none: one of them may be refused.
        exponents = list(map(self._exponent, targets, effects))
        self.exponents = dict(zip(self.plan.vectors.names, exponents, strict=True))

    def _exponent(self, target: Target, effects: Effects) -> float:
        optimizer = self.plan.optimizer
        group = self.plan.group_of(target)
        # Whatever the exponent: one sets the length that the other changes.
        if effects.rescaling is not None:
            raise NotSupportedError(
                f"`{target.name}` is a target of WeightRescaling, which fixes its norm, and of "
                f"LRDropRescaling, which changes it. Give them different `params`."
            )
        if self.rule.exponent != "auto":
            return self.rule.exponent
        kind = class_for_predictions(optimizer)
        name = type(optimizer).__name__
        # The learning rate does not matter: the exponent is that of a power of it.
        options = balance(effects, optimizer, group, 1.0)
        exponent = None if options is None else lr_drop_exponent(kind, group, **options)
        if exponent:
            return exponent
        no_equilibrium = never_settles(kind, group)
        if exponent == 0:
            reason = (
                "its decay falls with the square of the learning rate, so its equilibrium norm "
                "does not move at a drop"
            )
        elif no_equilibrium is not None:
            reason = f"under {name} there is no equilibrium ({no_equilibrium})"
        elif options is None:
            reason = "the equilibrium under the other callbacks on it is not known"
        elif own_response(kind, group) is None or not is_zero(written_decay(optimizer, group)):
            reason = f"the equilibrium of {name} with these settings is not known"
        else:
            reason = "it has no weight decay, and without one there is no equilibrium to land on"
        raise NotSupportedError(
            f"LRDropRescaling(exponent='auto') knows no exponent for `{target.name}` under {name}: "
            f"{reason}. Give exponent=..., or leave the weight out of `params`."
        )

    def inherit(self, earlier: DropWorker) -> None:
        """The rates of weights that stay, and a drop that is still to be told."""
        super().inherit(earlier)
        self.rates = earlier.rates

    def forget(self, name: str) -> None:
        """Of the new weight of this name no rate is known."""
        self.rates.pop(name, None)

    def state(self) -> dict[str, Any]:
        """The last rates; in the middle of a step those of the weights that have stepped."""
        rates = dict(self.rates)
        if self._drop is not None:
            self._drop.scaling.judge()
            rates.update(self._drop.stepped())
        return {
            "last_lr": {name: rate.lr for name, rate in rates.items()},
            "last_fall": {name: rate.fall for name, rate in rates.items()},
            **super().state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """As `state` gave it."""
        for name, lr in state["last_lr"].items():
            self.rates[name] = Rate(lr, state["last_fall"].get(name, 0.0))
        super().load(state)

    def effect(self, target: Target) -> Effect:
        """Its length jumps at drops of the learning rate."""
        # What has no exponent is refused when this rule acts, and not when somebody asks.
        with suppress(NotSupportedError):
            self._find_exponents()
        return LengthJumps(self.rule.min_drop, self.exponents.get(target.name))

    def treatment(self, target: Target) -> str:
        """What the tables say."""
        text = "rescaled at LR drops"
        if self.exponents:
            text = f"÷ k^{self.exponents[target.name]:.3g} at an LR drop by k"
        return text + changes_function(target)


class LRDropRescaling(NormDynCallback):
    r"""Rescaling at a learning rate drop (NRQ paper, Corollary 2): when the scheduled learning rate
    falls by ``k``, weights are divided by ``k**exponent``.

    After a drop, the angular update falls with the learning rate at once, but the equilibrium that
    belongs to the new learning rate is reached only after a relaxation time; meanwhile the weights
    turn far too slowly. Dividing the weights by :math:`k^e` puts them there directly. It acts
    before the first step with the lower learning rate; optimizer state, this step's gradients and
    the statistics of a BatchNorm behind the weights follow.

    The exponent follows from how the equilibrium norm depends on the learning rate: 1/4 for SGD,
    1/2 for AdamW, AdamP, NAdam and RAdam with decoupled decay, SOAP, Lion and Muon, 1/3 for Adam
    with coupled decay, 1/5 for AdaptiveWeightShrink on SGD, 1/3 for it on Adam. It assumes that the
    run was at equilibrium before the drop. With other optimizers, without a decay, or with one that
    falls with the square of the learning rate, there is no new equilibrium to land on: ``"auto"``
    is refused at the first step.

    A drop is a fall by ``min_drop`` or more from one real step to the next. One that continues
    smaller falls, as at the end of a cosine, is none: there the weights have been following all
    along. A learning rate of 0 is no drop either, nor what follows it.

    Args:
        exponent: ``"auto"``, or a number >= 0.
        min_drop: smallest ratio of learning rates that counts as a drop.
        verify: before the first step, rescale all targets by random factors and compare the outputs
            of the first batch.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``.

    Raises:
        ValueError: for numbers out of range.
        NotSupportedError: at the first step, for an optimizer whose state cannot follow, for
            weights without a known exponent, and for weights whose norm WeightRescaling fixes.

    Example:
        >>> from lightning_normdyn import LRDropRescaling
        >>> LRDropRescaling(exponent=0.25).min_drop
        1.5
    """

    worker = DropWorker
    part = RescalingPart
    optimizer_state = "rescale"
    numbers = ("exponent", "min_drop")
    marks = ("lr_drop",)

    def __init__(
        self,
        *,
        exponent: float | Literal["auto"] = "auto",
        min_drop: float = 1.5,
        verify: bool = False,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.exponent: float | Literal["auto"] = "auto"
        if exponent != "auto":
            self.exponent = check_number("exponent", exponent, ">= 0", " or 'auto'")
        self.min_drop = check_number("min_drop", min_drop, "> 1")
        self.verify = bool(verify)

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Its state must be one that we know how to rescale."""
        check_rate(optimizer, weights)
        Rescaler.check(optimizer, self.optimizer_state)
