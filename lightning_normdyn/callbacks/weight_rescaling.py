"""Weight Rescaling (WRS): set weight vectors back to a fixed length every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import nan
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.callback import (
    NormDynCallback,
    Plan,
    Target,
    check_count,
    check_number,
)
from lightning_normdyn.engine.effect import Effect, Rescaling
from lightning_normdyn.engine.rescaling import (
    Rescaler,
    changes_function,
    refuse_averaging,
    verify_targets,
    warn_of_changed_function,
)
from lightning_normdyn.engine.state import many, record, whole
from lightning_normdyn.functional import norm_from_sums, rescale_factor
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_decay_takeover
from lightning_normdyn.optimizers.decay import DecayOwner, replaced_decay
from lightning_normdyn.optimizers.step import Phase, Step


class WeightRescaling(NormDynCallback):
    r"""Weight Rescaling (WRS): after every ``every_n_steps``-th optimizer step, each weight vector
    is set to ``target_norm``.

    .. math:: w \leftarrow c\,w, \qquad c = \text{target\_norm} / \lVert w\rVert

    (WRS paper, section 5.) Optimizer state and the running statistics of a BatchNorm behind the
    vector follow, so that nothing but the
    length changes. Inside its epoch window the rescaled weights have no weight decay, as in the
    paper.

    Args:
        every_n_steps: optimizer steps between two rescalings (the paper: 10 to 40); counted per
            optimizer, over resumes.
        target_norm: the length, in weight units, or ``"initial"``: each vector's own length at the
            start of the fit.
        start_epoch: first epoch in which to act.
        stop_epoch: first epoch in which to act no more; None: never stop.
        optimizer_state: ``"rescale"`` divides momentum by the factor (second moments by its
            square), ``"keep"`` leaves it.
        weight_decay: ``"replace"``: no decay of the targets inside the window; ``"keep"``: the
            optimizer's own.
        verify: before the first step, rescale all targets by random factors and compare the outputs
            of the first batch.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Raises:
        ValueError: for numbers out of range and unknown literals.

    Example:
        >>> from lightning_normdyn import WeightRescaling
        >>> WeightRescaling(20, stop_epoch=60).every_n_steps
        20
    """

    def __init__(
        self,
        every_n_steps: int,
        *,
        target_norm: float | Literal["initial"] = 1.0,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        optimizer_state: Literal["rescale", "keep"] = "rescale",
        weight_decay: Literal["replace", "keep"] = "replace",
        verify: bool = False,
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.every_n_steps = check_count("every_n_steps", every_n_steps, 1)
        self.start_epoch = check_count("start_epoch", start_epoch, 0)
        self.stop_epoch = (
            None if stop_epoch is None else check_count("stop_epoch", stop_epoch, 1, "None or ")
        )
        if self.stop_epoch is not None and self.stop_epoch <= self.start_epoch:
            raise ValueError(
                f"`stop_epoch` must be None or an integer > start_epoch={start_epoch}, got "
                f"{stop_epoch!r}."
            )
        if optimizer_state not in ("rescale", "keep"):
            raise ValueError(
                f"`optimizer_state` must be 'rescale' or 'keep', got {optimizer_state!r}."
            )
        if weight_decay not in ("replace", "keep"):
            raise ValueError(f"`weight_decay` must be 'replace' or 'keep', got {weight_decay!r}.")
        self.target_norm: float | Literal["initial"] = (
            "initial"
            if target_norm == "initial"
            else check_number("target_norm", target_norm, "> 0", " or 'initial'")
        )
        self.optimizer_state = optimizer_state
        self.weight_decay = weight_decay
        self.verify = bool(verify)

    def _forget(self) -> None:
        super()._forget()
        self._rescalers: dict[int, Rescaler] = {}
        self._unmarked: set[int] = (
            set()
            # optimizers whose rescale a fused update turned out to have taken, for the next row to
            # tell
        )
        self._targets: dict[int, Tensor] = {}
        self._warned: set[str] = set()

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        keys = (
            "every_n_steps",
            "target_norm",
            "start_epoch",
            "stop_epoch",
            "optimizer_state",
            "weight_decay",
        )
        return {key: getattr(self, key) for key in keys}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Acts after the step, last of all."""
        return {Phase.RESCALE: self._rescale}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse averages over weights whose scale this callback changes."""
        refuse_averaging(trainer, self)
        super().on_fit_start(trainer, pl_module)

    @property
    def needs_length(self) -> bool:  # type: ignore[override]
        """A weight of zeros has no initial norm to go back to; to a norm that is a number it is set
        as soon as it has a direction."""
        return self.target_norm == "initial"

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Its state must be one that we know how to rescale, its decay ours to take over."""
        if weights:
            Rescaler.check(optimizer, self.optimizer_state)
            if self.weight_decay == "replace":
                check_decay_takeover(optimizer, weights)

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Remember initial lengths, find the BatchNorms behind, claim the decay."""
        assert self._session is not None
        warn_of_changed_function(self, plan, self._warned)
        if self.verify:
            verify_targets(plan, self._session)
        self._rescalers[plan.index] = Rescaler(plan, self._session, self.optimizer_state)
        if self.target_norm == "initial":
            self._targets[plan.index] = self.per_vector("initial_norm", plan, plan.vectors.norms)
        if self.weight_decay == "replace":
            claimed = plan.claimed
            check_decay_takeover(plan.optimizer, claimed)
            self.claim_decay(
                plan, bracket, DecayOwner.RESCALING, lambda: claimed if self._in_window() else {}
            )

    def _window(self) -> Literal["later", "now", "over"]:
        assert self._session is not None
        epoch = self._session.trainer.current_epoch
        if epoch < self.start_epoch:
            return "later"
        return "now" if self.stop_epoch is None or epoch < self.stop_epoch else "over"

    def _in_window(self) -> bool:
        return self._window() == "now"

    def due(self, number: int) -> bool:
        """Whether to rescale after optimizer step ``number`` (1-based)."""
        return number % self.every_n_steps == 0 and self._in_window()

    def _rescale(self, step: Step, plan: Plan) -> None:
        if (
            plan.index in self._unmarked
        ):  # here and not as soon as it is known: that depends on when somebody saves a checkpoint
            self._unmarked.discard(plan.index)
            plan.mark("rescale")
        if not self.due(self.number(step, plan)):
            return
        values = plan.vectors.values()
        norms = norm_from_sums(plan.vectors.inner((values, values))[0])
        length = (
            self._targets[plan.index]
            if self.target_norm == "initial"
            else torch.full_like(norms, float(self.target_norm))
        )
        # A vector that was zero at the start has no length of its own to go back to: it is left
        # alone, and named.
        factor = torch.where(length > 0, rescale_factor(norms, length), nan)
        factor = plan.guard(factor, 1.0, step, norms)
        self._rescalers[plan.index].scaling(factor).apply()
        if not any(plan.vectors.has_gradient(step)):
            return  # nothing was rescaled
        if step.skipped is None:
            plan.mark("rescale")
        else:
            step.when_done(partial(self._unmarked.add, plan.index))

    def _extra(self) -> dict[str, Any]:
        return {"unmarked": sorted(self._unmarked)}

    def _check_extra(self, extra: Any, where: str) -> None:
        record({}, {"unmarked": many(whole())})(extra, where)

    def _load_extra(self, extra: dict[str, Any]) -> None:
        self._unmarked = set(extra.get("unmarked", []))

    def treatment(self, plan: Plan, target: Target) -> str:
        """What the start table says."""
        length = (
            "its initial norm" if self.target_norm == "initial" else f"norm {self.target_norm:g}"
        )
        text = f"WRS to {length} every {'step' if self.every_n_steps == 1 else f'{self.every_n_steps} steps'}"
        replaced = (
            replaced_decay(plan.optimizer, plan.group_of(target))
            if self.weight_decay == "replace"
            else ""
        )
        return (
            text + (f", without decay ({replaced})" if replaced else "") + changes_function(target)
        )

    def effect(self, target: Target) -> Effect:
        """It sets the length now and then, within its epochs."""
        return Rescaling(
            self.every_n_steps, self.target_norm, self.weight_decay == "replace", self._window()
        )
