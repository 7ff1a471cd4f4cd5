"""Weight Rescaling (WRS): set weight vectors back to a fixed length every so many steps."""

from collections.abc import Sequence
from math import nan, sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import (
    Granularity,
    Params,
    check_choice,
    check_count,
    check_number,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Rescaling
from lightning_normdyn.engine.plan import Target, guarded
from lightning_normdyn.engine.rescaling import (
    Rescaler,
    RescalingPart,
    RescalingWorker,
    changes_function,
)
from lightning_normdyn.engine.worker import during
from lightning_normdyn.functional import norm_from_sums, rescale_factor
from lightning_normdyn.geometry.formulas import squares, work_out
from lightning_normdyn.optimizers.checks import check_decay_takeover
from lightning_normdyn.optimizers.decay import DecayOwner, replaced_decay
from lightning_normdyn.optimizers.step import Phase, Step


def rescaled(
    ww: Tensor, lengths: Tensor, bad: Tensor, active: Tensor | None, skipped: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factor that brings each vector to its length, and ``bad`` as
    `lightning_normdyn.engine.plan.guarded` gives it; ``lengths`` is ``(n,)``."""
    norms = norm_from_sums(ww)
    # A vector that was zero at the start has no length of its own to go back to: it is left alone,
    # and named.
    factor = torch.where(lengths > 0, rescale_factor(norms, lengths), nan)
    return guarded(factor, 1.0, bad, active, skipped, norms)


class RescaleWorker(RescalingWorker["WeightRescaling"]):
    """Rescales the targets of one optimizer."""

    event = "rescale"

    def prepare(self) -> None:
        """Take the lengths, and the decay."""
        # Before any length is remembered: it refuses what could not be rescaled later.
        super().prepare()
        self.lengths = self._target_lengths()
        if self.rule.weight_decay == "replace":
            # Asked at every step, since outside the window the optimizer's decay is back.
            self.claim_decay(DecayOwner.RESCALING, lambda: self._window() == "now")

    def _target_lengths(self) -> Tensor:
        """``(n,)``: the length to which each vector is set."""
        vectors = self.plan.vectors
        target_norm = self.rule.target_norm
        if target_norm == "sqrt_fan_in":
            # The entries of the whole vector, of which this rank may hold a part.
            return vectors.length.sqrt()
        if target_norm == "initial":
            # Kept in checkpoints: a resumed fit would otherwise take the norms that it finds for
            # the initial ones.
            return self.plan.state("initial_norm", vectors.norms)
        return torch.full(
            (vectors.n,), float(target_norm), dtype=vectors.sum_dtype, device=vectors.device
        )

    def _window(self) -> Literal["later", "now", "over"]:
        """Where the present epoch lies: before, in or after the window."""
        epoch = self.session.trainer.current_epoch
        stop_epoch = self.rule.stop_epoch
        if epoch < self.rule.start_epoch:
            return "later"
        if stop_epoch is None or epoch < stop_epoch:
            return "now"
        return "over"

    def reads_gradients(self, step: Step) -> bool:
        """Whether it rescales after this step."""
        # The plan counts on over resumes. By the steps of this fit alone, a resumed run would
        # rescale at other steps than one that was never interrupted.
        is_turn = self.plan.number(step) % self.rule.every_n_steps == 0
        return is_turn and self._window() == "now"

    @during(Phase.RESCALE)
    def rescale(self, step: Step) -> None:
        """w <- c w with c = target norm / |w| (WRS paper, section 5)."""
        plan = self.plan
        self._mark_what_is_late()
        if not self.reads_gradients(step):
            return
        factor, _ = self._worked_out(plan.guards(step))
        self.rescaler.scaling(factor).apply()
        # Without a gradient anywhere nothing was rescaled, so there is nothing to mark.
        if not any(plan.vectors.has_gradient(step)):
            return
        if step.skipped is None:
            self._mark_now()
        else:
            # Only the device knows whether this update happened.
            step.when_done(self._mark_later)

    def rehearse(self, step: Step) -> None:
        """Sums, factors and the change of lengths."""
        factor, _ = self._worked_out(self.plan.expected_guards(step))
        self.rescaler.rehearse(factor)

    def _worked_out(self, guards: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What `rescaled` returns."""
        plan = self.plan
        sums = squares(plan.vectors, exact=True)
        return work_out(
            plan.vectors, rescaled, sums, (self.lengths, *guards), into=(None, plan.bad)
        )

    def effect(self, target: Target) -> Effect:
        """It sets the length now and then, within its epochs."""
        rule = self.rule
        replaces_decay = rule.weight_decay == "replace"
        length: float | Literal["initial"]
        if rule.target_norm == "sqrt_fan_in":
            # Vectors of one weight are equally long, unless the loss reads only a part of some.
            length = sqrt(target.entries / max(1, target.partition.n))
        else:
            length = rule.target_norm
        # With the window, since outside of it predictions must count on the optimizer's own decay.
        return Rescaling(
            rule.every_n_steps,
            length,
            replaces_decay,
            self._window(),
            rescales_state=rule.optimizer_state == "rescale",
        )

    def treatment(self, target: Target) -> str:
        """What the tables say."""
        rule = self.rule
        plan = self.plan
        named = {"initial": "its initial norm", "sqrt_fan_in": "norm √entries"}
        length = named.get(str(rule.target_norm)) or f"norm {rule.target_norm:g}"
        every = "step" if rule.every_n_steps == 1 else f"{rule.every_n_steps} steps"
        text = f"WRS to {length} every {every}"
        replaced = replaced_decay(plan.optimizer, plan.group_of(target))
        if replaced and rule.weight_decay == "replace":
            text += f", without decay ({replaced})"
        return text + changes_function(target)


class WeightRescaling(NormDynCallback):
    r"""Weight Rescaling (WRS): after every ``every_n_steps``-th optimizer step, each weight vector
    is set to ``target_norm``.

    .. math:: w \leftarrow c\,w, \qquad c = \text{target\_norm} / \lVert w\rVert

    (WRS paper, section 5.) Optimizer state and the running statistics of a BatchNorm behind the
    vector follow, so that nothing but the length changes. Inside its epoch window the rescaled
    weights have no weight decay, as in the paper.

    Args:
        every_n_steps: optimizer steps between two rescalings (the paper: 10 to 40); counted per
            optimizer, over resumes.
        target_norm: the length, in weight units; ``"initial"``: each vector's own length at the
            start of the fit; ``"sqrt_fan_in"``: the square root of its number of entries, so that
            their root mean square is 1 (EDM2, arXiv 2312.02696).
        start_epoch: first epoch in which to act.
        stop_epoch: first epoch in which to act no more; None: never stop.
        optimizer_state: ``"rescale"`` divides momentum by the factor (second moments by its
            square), ``"keep"`` leaves it.
        weight_decay: ``"replace"``: no decay of the targets inside the window; ``"keep"``: the
            optimizer's own.
        verify: before the first step, rescale all targets by random factors and compare the outputs
            of the first batch.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``.

    Raises:
        ValueError: for numbers out of range and unknown literals.

    Example:
        >>> from lightning_normdyn import WeightRescaling
        >>> WeightRescaling(20, stop_epoch=60).every_n_steps
        20
    """

    worker = RescaleWorker
    part = RescalingPart
    numbers = (
        "every_n_steps",
        "target_norm",
        "start_epoch",
        "stop_epoch",
        "optimizer_state",
        "weight_decay",
    )

    def __init__(
        self,
        every_n_steps: int,
        *,
        target_norm: float | Literal["initial", "sqrt_fan_in"] = 1.0,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        optimizer_state: Literal["rescale", "keep"] = "rescale",
        weight_decay: Literal["replace", "keep"] = "replace",
        verify: bool = False,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.every_n_steps = check_count("every_n_steps", every_n_steps, 1)
        self.start_epoch = check_count("start_epoch", start_epoch, 0)
        self.stop_epoch = stop_epoch
        if stop_epoch is not None:
            self.stop_epoch = check_count("stop_epoch", stop_epoch, 1, "None or ")
            # A window without an epoch would be a callback that never acts.
            if self.stop_epoch <= self.start_epoch:
                raise ValueError(
                    f"`stop_epoch` must be None or an integer > start_epoch={start_epoch}, got "
                    f"{stop_epoch!r}."
                )
        self.target_norm: float | Literal["initial", "sqrt_fan_in"]
        if target_norm == "initial" or target_norm == "sqrt_fan_in":
            self.target_norm = target_norm
        else:
            others = ", 'initial' or 'sqrt_fan_in'"
            self.target_norm = check_number("target_norm", target_norm, "> 0", others)
        # A weight of zeros has no initial norm to go back to; to a norm that is a number it is set
        # as soon as it has a direction.
        self.needs_length = target_norm == "initial"
        self.optimizer_state = check_choice("optimizer_state", optimizer_state, ("rescale", "keep"))
        self.weight_decay = check_choice("weight_decay", weight_decay, ("replace", "keep"))
        self.verify = bool(verify)

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Its state must be one that we know how to rescale, its decay ours to take over."""
        Rescaler.check(optimizer, self.optimizer_state)
        if self.weight_decay == "replace":
            check_decay_takeover(optimizer, weights)
