"""Rescaling at a drop of the learning rate: land on the new equilibrium at once instead of drifting there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.callbacks.base import NormDynCallback, Plan, Session, Target, balance
from lightning_normdyn.callbacks.rescaling import Rescaler
from lightning_normdyn.equilibrium import lr_drop_exponent
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.steps import Phase, Step, StepBracket


class LRDropRescaling(NormDynCallback):
    r"""Rescaling at a learning rate drop (NRQ paper, Corollary 2): when the scheduled learning rate falls by ``k``, weights are divided
    by ``k**exponent``.

    After a drop, the angular update falls with the learning rate at once, but the equilibrium that belongs to the new learning rate is
    reached only after a relaxation time; meanwhile the weights turn far too slowly. Dividing the weights by :math:`k^e` puts them there
    directly. It acts before the first step with the lower learning rate; optimizer state and this step's gradients follow.

    The exponent follows from how the equilibrium norm depends on the learning rate: 1/4 for SGD, 1/2 for AdamW and AdamP, 1/3 for Adam
    with coupled decay, 1/5 for AdaptiveWeightShrink on SGD, 1/3 for it on Adam. It assumes that the run was at equilibrium before the
    drop.

    Args:
        exponent: ``"auto"``, or a number >= 0.
        min_drop: smallest ratio of learning rates, from one real step to the next, that counts as a drop; smooth schedules stay below it.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> from lightning_normdyn import LRDropRescaling
        >>> LRDropRescaling(exponent=0.25).min_drop
        1.5
    """

    def __init__(
        self,
        *,
        exponent: float | Literal["auto"] = "auto",
        min_drop: float = 1.5,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        if exponent != "auto" and not (isinstance(exponent, (int, float)) and 0 <= exponent < float("inf")):
            raise ValueError(f"`exponent` must be 'auto' or a number >= 0, got {exponent!r}.")
        if not (isinstance(min_drop, (int, float)) and 1 < min_drop < float("inf")):
            raise ValueError(f"`min_drop` must be > 1 and finite, got {min_drop!r}.")
        self.exponent: float | str = exponent if isinstance(exponent, str) else float(exponent)
        self.min_drop = float(min_drop)
        self._rescalers: dict[int, Rescaler] = {}
        self._exponents: dict[int, list[float]] = {}
        self._last_lr: dict[str, float] = {}  # by weight: param groups have no name that survives a resume

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"exponent": self.exponent, "min_drop": self.min_drop}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Acts at `ready`, before any shrink."""
        return {Phase.LR_DROP: self._drop}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Its state must be one that we know how to rescale."""
        if weights:
            Rescaler.check(optimizer, "rescale")

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Prepare the rescale; the other callbacks' targets are known only at the first use."""
        assert self._session is not None
        self._rescalers[plan.index] = Rescaler(plan, self._session, "rescale")
        self._exponents.pop(plan.index, None)

    def _exponents_of(self, plan: Plan) -> list[float]:
        """One exponent per param group of the plan."""
        assert self._session is not None
        if plan.index not in self._exponents:
            self._exponents[plan.index] = [self._exponent(plan, group, self._session) for group, _ in plan.groups]
        return self._exponents[plan.index]

    def _exponent(self, plan: Plan, group: dict[str, Any], session: Session) -> float:
        members = {id(p) for p in group["params"]}
        found: set[float | None] = set()
        for target in plan.targets:
            if id(target.weight) not in members:
                continue
            influence = session.influence(target, besides=self)
            if "every_n_steps" in influence:
                raise NotSupportedError(
                    f"`{target.name}` is a target of WeightRescaling, which fixes its norm, and of LRDropRescaling, which changes it. "
                    "Give them different `params`."
                )
            if self.exponent != "auto":
                found.add(float(self.exponent))
                continue
            options = balance(influence, group, 1.0)
            found.add(None if options is None else lr_drop_exponent(type(plan.optimizer), group, **options))
        if len(found) > 1 or None in found:
            raise NotSupportedError(
                f"LRDropRescaling(exponent='auto') knows no exponent for {type(plan.optimizer).__name__} with these settings "
                f"(weight_decay={group.get('weight_decay')!r}): without a decay there is no equilibrium to land on. "
                "Give exponent=..., or set a decay."
            )
        return float(next(iter(found)) or 0.0)

    def _drop(self, step: Step, plan: Plan) -> None:
        exponents = self._exponents_of(plan)
        factors, any_drop, known = [], False, dict(self._last_lr)
        for (group, where), exponent in zip(plan.groups, exponents, strict=True):
            lr = float(group["lr"])
            names = [t.name for t, s in zip(plan.targets, plan.vectors.slices, strict=True) if where.start <= s.start < where.stop]
            before = self._last_lr.get(names[0], lr)
            self._last_lr.update(dict.fromkeys(names, lr))
            drop = before / lr if lr > 0 and before > 0 and isfinite(before) and isfinite(lr) else 1.0
            dropped = drop >= self.min_drop * (1 - 1e-9)
            any_drop |= dropped
            factors.append(drop**-exponent if dropped else 1.0)
        if not any_drop:
            return
        # One look at the device, at a drop only: a fused optimizer that skips this update must find the drop still due at the next.
        if step.skipped is not None and bool(step.skipped):
            self._last_lr = known
            return
        factor = plan.guard(plan.spread_groups("lr_drop", factors), 1.0, step)
        self._rescalers[plan.index].apply(factor, gradients=True)
        plan.mark("lr_drop")

    def _extra(self) -> dict[str, Any]:
        return {"last_lr": dict(self._last_lr)}

    def _load_extra(self, extra: dict[str, Any]) -> None:
        self._last_lr = dict(extra.get("last_lr", {}))

    def treatment(self, plan: Plan, target: Target) -> str:
        """What the start table says."""
        return "rescaled at LR drops"
