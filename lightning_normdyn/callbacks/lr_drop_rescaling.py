"""Rescaling at a drop of the learning rate: land on the new equilibrium at once instead of drifting
there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, log, nan
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.callback import NormDynCallback, Plan, Target, as_float, is_number
from lightning_normdyn.engine.effect import Effect, Effects, LengthJumps
from lightning_normdyn.engine.rescaling import (
    Rescaler,
    changes_function,
    refuse_averaging,
    verify_targets,
    warn_of_changed_function,
)
from lightning_normdyn.engine.state import many, number, record, table, text, whole
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.monitor.predictions import balance
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_rate
from lightning_normdyn.optimizers.rate import applied_rate
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.scaling import Scaling
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.theory.equilibrium import lr_drop_exponent

# The falls of a smooth schedule grow gradually, also at its very end: from one change to the next
# by a factor below 4 for a cosine and
# below 7 for the last step of a one-cycle schedule. A drop comes out of the blue.
ABRUPT = 8.0


@dataclass(frozen=True)
class Rate:
    """What is remembered of a weight's learning rate.

    Args:
        lr: at the last real step.
        fall: ln(before/after) of its last change, if that was a fall and no drop; else 0.
    """

    lr: float
    fall: float = 0.0

    def then(self, lr: float, min_drop: float) -> tuple[float, Rate]:
        """The drop k on the way to ``lr``, 1 if there is none, and what to remember from there on.

        Example:
            >>> Rate(0.1).then(0.01, 1.5)
            (10.0, Rate(lr=0.01, fall=0.0))
            >>> Rate(0.1, fall=0.3).then(0.06, 1.5)[0]  # a cosine on its way to zero
            1.0
        """
        if not (0 < self.lr < inf and 0 < lr < inf):
            return 1.0, Rate(lr)
        k = self.lr / lr
        if k <= 1:
            return 1.0, Rate(lr, 0.0 if k < 1 else self.fall)
        if k >= min_drop * (1 - 1e-9) and log(k) >= ABRUPT * self.fall:
            return k, Rate(lr, self.fall)
        return 1.0, Rate(lr, log(k))


@dataclass
class _Settings:
    """What is known of a plan's weights before the first step, in the order of its targets."""

    groups: list[dict[str, Any]]
    exponents: list[float]


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
        names = self.scaling.vectors.names
        return {
            n: self.rates[n]
            for n, stepped in zip(names, self.scaling.stepped, strict=True)
            if stepped and n in self.rates
        }


class LRDropRescaling(NormDynCallback):
    r"""Rescaling at a learning rate drop (NRQ paper, Corollary 2): when the scheduled learning rate
    falls by ``k``, weights are divided
    by ``k**exponent``.

    After a drop, the angular update falls with the learning rate at once, but the equilibrium that
    belongs to the new learning rate is
    reached only after a relaxation time; meanwhile the weights turn far too slowly. Dividing the
    weights by :math:`k^e` puts them there
    directly. It acts before the first step with the lower learning rate; optimizer state, this
    step's gradients and the statistics of a
    BatchNorm behind the weights follow.

    The exponent follows from how the equilibrium norm depends on the learning rate: 1/4 for SGD,
    1/2 for AdamW and AdamP, 1/3 for Adam
    with coupled decay, 1/5 for AdaptiveWeightShrink on SGD, 1/3 for it on Adam. It assumes that the
    run was at equilibrium before the
    drop. With other optimizers, or without a decay, there is no equilibrium to land on: ``"auto"``
    is refused at the first step.

    A drop is a fall by ``min_drop`` or more from one real step to the next. One that continues
    smaller falls, as at the end of a
    cosine, is none: there the weights have been following all along. A learning rate of 0 is no
    drop either, nor what follows it.

    Args:
        exponent: ``"auto"``, or a number >= 0.
        min_drop: smallest ratio of learning rates that counts as a drop.
        verify: before the first step, rescale all targets by random factors and compare the outputs
            of the first batch.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Raises:
        ValueError: for numbers out of range.
        NotSupportedError: at the first step, for an optimizer whose state cannot follow, for
            weights without a known exponent, and for
            weights whose norm WeightRescaling fixes.

    Example:
        >>> from lightning_normdyn import LRDropRescaling
        >>> LRDropRescaling(exponent=0.25).min_drop
        1.5
    """

    marks: ClassVar[tuple[str, ...]] = ("lr_drop",)

    def __init__(
        self,
        *,
        exponent: float | Literal["auto"] = "auto",
        min_drop: float = 1.5,
        verify: bool = False,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        if exponent != "auto" and not (is_number(exponent) and 0 <= as_float(exponent) < inf):
            raise ValueError(f"`exponent` must be 'auto' or a number >= 0, got {exponent!r}.")
        if not (is_number(min_drop) and 1 < as_float(min_drop) < inf):
            raise ValueError(f"`min_drop` must be > 1 and finite, got {min_drop!r}.")
        self.exponent: float | str = exponent if isinstance(exponent, str) else float(exponent)
        self.min_drop = float(min_drop)
        self.verify = bool(verify)

    def _forget(self) -> None:
        super()._forget()
        self._rescalers: dict[int, Rescaler] = {}
        self._known: dict[int, _Settings] = {}
        self._warned: set[str] = set()
        self._rates: dict[
            str, Rate
        ] = {}  # by weight: param groups have no name that survives a resume
        self._unmarked: set[int] = (
            set()
        )  # optimizers whose drop a fused update turned out to have taken, for the next row to tell
        self._drops: dict[int, _Drop] = {}
        self._read: dict[int, tuple[Tensor, int, float]] = {}

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"exponent": self.exponent, "min_drop": self.min_drop}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Acts at `ready`, before any shrink."""
        return {Phase.LR_DROP: self._step}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse averages over weights whose scale this callback changes."""
        refuse_averaging(trainer, self)
        super().on_fit_start(trainer, pl_module)

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Its state must be one that we know how to rescale."""
        if weights:
            check_rate(optimizer, weights)
            Rescaler.check(optimizer, "rescale")

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Prepare the rescale; what the other callbacks do to these weights is known only when all
        have made their plans."""
        assert self._session is not None
        warn_of_changed_function(self, plan, self._warned)
        if self.verify:
            verify_targets(plan, self._session)
        self._rescalers[plan.index] = Rescaler(plan, self._session, "rescale")
        self._known.pop(plan.index, None)

    def _settings_of(self, plan: Plan) -> _Settings:
        if plan.index not in self._known:
            assert self._session is not None
            groups = plan.groups_of(plan.targets)
            effects = self._session.combined.effects(plan.targets, besides=self)
            exponents = [
                self._exponent(plan, *each)
                for each in zip(plan.targets, groups, effects, strict=True)
            ]
            self._known[plan.index] = _Settings(groups, exponents)
        return self._known[plan.index]

    def _exponent(
        self, plan: Plan, target: Target, group: Mapping[str, Any], effects: Effects
    ) -> float:
        kind = class_for_predictions(plan.optimizer)
        if effects.rescaling is not None:
            raise NotSupportedError(
                f"`{target.name}` is a target of WeightRescaling, which fixes its norm, and of "
                f"LRDropRescaling, which changes it. "
                "Give them different `params`."
            )
        if self.exponent != "auto":
            return float(self.exponent)
        options = balance(effects, plan.optimizer, group, 1.0)
        exponent = None if options is None else lr_drop_exponent(kind, group, **options)
        if exponent is not None:
            return exponent
        if options is None:
            reason = "the equilibrium under the other callbacks on it is not known"
        elif step_response(kind, group) is None:
            reason = f"the equilibrium of {type(plan.optimizer).__name__} with these settings is not known"
        else:
            reason = "it has no weight decay, and without one there is no equilibrium to land on"
        raise NotSupportedError(
            f"LRDropRescaling(exponent='auto') knows no exponent for `{target.name}` under "
            f"{type(plan.optimizer).__name__}: {reason}. "
            "Give exponent=..., or leave the weight out of `params`."
        )

    def _step(self, step: Step, plan: Plan) -> None:
        known = self._settings_of(
            plan
        )  # at the first step, so that a refusal does not wait for the drop
        if (
            plan.index in self._unmarked
        ):  # here and not as soon as it is known: that depends on when somebody saves a checkpoint
            self._unmarked.discard(plan.index)
            plan.mark("lr_drop")
        rates: dict[str, Rate] = {}
        factors = [1.0] * len(plan.targets)
        settings = zip(
            plan.targets,
            known.groups,
            known.exponents,
            plan.vectors.has_gradient(step),
            strict=True,
        )
        for i, (target, group, exponent, has_gradient) in enumerate(settings):
            if has_gradient:  # a weight that does not step finds the drop still due when it does
                lr = self._lr(plan.optimizer, group, target.weight)
                drop, rates[target.name] = self._rates.get(target.name, Rate(lr)).then(
                    lr, self.min_drop
                )
                factors[i] = drop**-exponent
        # A step that raises, or that a fused optimizer skips on the device, changes nothing: the
        # drop is due again at the next.
        step.when_done(lambda: self._rates.update(rates))
        self._drops.pop(plan.index, None)
        if all(factor == 1.0 for factor in factors):
            return
        vectors = plan.vectors
        factor = vectors.spread(
            torch.tensor(factors, dtype=vectors.sum_dtype, device=vectors.device)
        )
        scaling = self._rescalers[plan.index].scaling(plan.guard(factor, 1.0, step), gradients=True)
        self._drops[plan.index] = _Drop(scaling, rates)
        step.undo_with(lambda: self._rates.update(self._drops.pop(plan.index).stepped()))
        step.when_done(partial(self._drops.__delitem__, plan.index))
        step.scale(scaling)
        if step.skipped is None:
            step.when_done(partial(plan.mark, "lr_drop"))
        else:
            step.when_done(partial(self._unmarked.add, plan.index))

    def _lr(self, optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> float:
        """The rate of the coming step on the host; one that lives on a device is fetched only when
        somebody has written to it."""
        rate = applied_rate(optimizer, group, weight)
        if rate is None:
            return nan
        if isinstance(rate, float):
            return rate
        lr = group[
            "lr"
            # computed from a tensor, the rate is a new tensor at each step, but only a schedule
            # makes
            # it drop
        ]
        last = self._read.get(id(group))
        if last is None or last[0] is not lr or last[1] != lr._version:
            last = self._read[id(group)] = (lr, lr._version, float(lr))
        return last[2]

    def _forget_weight(self, name: str) -> None:
        super()._forget_weight(name)
        self._rates.pop(name, None)

    def _extra(self) -> dict[str, Any]:
        rates = dict(self._rates)
        for drop in self._drops.values():  # a checkpoint in the middle of a step
            drop.scaling.judge()
            rates.update(drop.stepped())
        return {
            "last_lr": {name: rate.lr for name, rate in rates.items()},
            "last_fall": {name: rate.fall for name, rate in rates.items()},
            "unmarked": sorted(self._unmarked),
        }

    def _check_extra(self, extra: Any, where: str) -> None:
        by_name = table(text(), number(0.0))
        record({}, {"last_lr": by_name, "last_fall": by_name, "unmarked": many(whole())})(
            extra, where
        )

    def _load_extra(self, extra: dict[str, Any]) -> None:
        falls = extra.get("last_fall", {})
        self._unmarked = set(extra.get("unmarked", []))
        self._rates = {
            name: Rate(lr, falls.get(name, 0.0)) for name, lr in extra.get("last_lr", {}).items()
        }

    def treatment(self, plan: Plan, target: Target) -> str:
        """What the tables say."""
        known = self._known.get(plan.index)
        how = (
            "rescaled at LR drops"
            if known is None
            else f"÷ k^{known.exponents[plan.positions[target.weight]]:.3g} at an LR drop by k"
        )
        return how + changes_function(target)

    def effect(self, target: Target) -> Effect:
        """Its length jumps at drops of the learning rate."""
        return LengthJumps()
