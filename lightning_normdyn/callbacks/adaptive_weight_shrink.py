"""Adaptive Weight Shrink (AWS): a decay that is strong where a weight is long and vanishes where it
is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.callback import NormDynCallback, Plan, Target, check_number
from lightning_normdyn.engine.effect import Effect, Shrink
from lightning_normdyn.functional import (
    equivalent_weight_decay,
    norm_from_sums,
    shrink_factor,
    std_from_sums,
)
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import DecayOwner, replaced_decay
from lightning_normdyn.optimizers.scaling import RoundedScaling, Scaling
from lightning_normdyn.optimizers.step import Phase, Step
from lightning_normdyn.parametrizations import is_weight_standardized


class AdaptiveWeightShrink(NormDynCallback):
    r"""Adaptive Weight Shrink (AWS): before every step, each weight vector is shrunk by its own
    factor.

    .. math:: w \leftarrow (1 - \eta\,\alpha\,\lVert w\rVert)\,w - \eta\,g

    with :math:`\alpha` = ``alpha``, :math:`\eta` the learning rate of the weight's param group at
    this very step, and norm and gradient
    taken at the same weight (AWS paper, eq. 20 and 21; decoupled from momentum and from Adam's
    denominator). For weight-standardized
    weights the biased standard deviation takes the place of the norm. The factor is exact down to
    0.5 and clamped there.

    It *is* the weight decay of its targets: the optimizer's own is taken over, for them only.
    ``alpha`` stands for a weight decay of
    ``alpha * norm`` (the log key ``equivalent_weight_decay``).

    Args:
        alpha: strength, per weight norm; the paper uses 2.5e-3 with SGD at lr 0.1.
        statistic: ``"norm"``, ``"std"``, or ``"auto"``: std for weight-standardized weights, else
            norm.
        weight_decay: ``"replace"`` takes the optimizer's decay over; ``"keep"`` lets it act on the
            already shrunk weight as well.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"`` or ``"layer"``.

    Raises:
        ValueError: for numbers out of range and unknown literals.

    Example:
        >>> from lightning_normdyn import AdaptiveWeightShrink
        >>> AdaptiveWeightShrink(2.5e-3).alpha
        0.0025
    """

    def __init__(
        self,
        alpha: float,
        *,
        statistic: Literal["auto", "norm", "std"] = "auto",
        weight_decay: Literal["replace", "keep"] = "replace",
        params: str | list[str] = "auto",
        granularity: Literal["auto", "filter", "group", "layer"] = "auto",
    ) -> None:
        super().__init__(params, granularity)
        if statistic not in ("auto", "norm", "std"):
            raise ValueError(f"`statistic` must be 'auto', 'norm' or 'std', got {statistic!r}.")
        if weight_decay not in ("replace", "keep"):
            raise ValueError(f"`weight_decay` must be 'replace' or 'keep', got {weight_decay!r}.")
        self.alpha = check_number("alpha", alpha, "> 0")
        self.statistic: Literal["auto", "norm", "std"] = statistic
        self.weight_decay = weight_decay

    def _forget(self) -> None:
        super()._forget()
        self._standardized: dict[int, Tensor | None] = {}

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"alpha": self.alpha, "statistic": self.statistic, "weight_decay": self.weight_decay}

    def handlers(self) -> dict[Phase, Callable[[Step, Plan], None]]:
        """Acts at `ready`."""
        return {Phase.SHRINK: self._shrink}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The rate must be known, and the decay of the targets ours to take over."""
        check_rate(optimizer, weights)
        if self.weight_decay == "replace":
            check_decay_takeover(optimizer, weights)

    def on_plan(self, plan: Plan, bracket: StepBracket) -> None:
        """Find the weight-standardized vectors and claim the decay."""
        standardized = [self.statistic_for(t) == "std" for t in plan.targets]
        self._standardized[plan.index] = None
        if any(standardized):
            self._standardized[plan.index] = plan.vectors.spread(
                torch.tensor(standardized, device=plan.vectors.device, dtype=torch.bool)
            )
        if self.weight_decay == "replace":
            check_decay_takeover(plan.optimizer, plan.claimed)
            self.claim_decay(plan, bracket, DecayOwner.SHRINK, plan.claimed)

    def statistic_of(self, plan: Plan) -> Tensor:
        """Norm, or biased standard deviation where weight standardization follows, of every vector:
        ``(n,)``."""
        vectors = plan.vectors
        standardized = self._standardized[plan.index]
        if standardized is None:
            return vectors.norms()
        ww, w1 = vectors.moments(vectors.values())
        return torch.where(standardized, std_from_sums(ww, w1, vectors.length), norm_from_sums(ww))

    def _shrink(self, step: Step, plan: Plan) -> None:
        statistic = self.statistic_of(plan)
        lr = plan.rates()
        factor = plan.guard(shrink_factor(statistic, lr, self.alpha), 1.0, step, statistic)
        plan.count(
            "clamped",
            plan.guard((lr * self.alpha * statistic > 0.5).to(factor.dtype), 0.0, step),
            step,
        )
        if plan.vectors.low_precision:
            self._shrink_rounded(step, plan, factor)
        else:
            step.scale(Scaling(plan.vectors, factor, invariant=plan.invariant))

    def _shrink_rounded(self, step: Step, plan: Plan, factor: Tensor) -> None:
        """Where rounding would swallow a factor, it is owed until it matters."""
        vectors = plan.vectors
        owed = self.per_vector(
            "owed", plan, lambda: torch.ones(vectors.n, dtype=torch.float32, device=vectors.device)
        )
        shrink = RoundedScaling(vectors, factor, owed)
        step.undo_with(lambda: self.store_per_vector("owed", plan, shrink.owed))
        step.scale(shrink)
        self.store_per_vector("owed", plan, shrink.owed)

    def treatments(self, plan: Plan) -> list[str]:
        """What the tables say: the norms of all weights are taken once."""
        totals = plan.vectors.totals(equivalent_weight_decay(self.alpha, self.statistic_of(plan)))
        means = (totals / plan.vectors.count).tolist()
        texts = []
        for group, mean in zip(plan.groups_of(plan.targets), means, strict=True):
            replaced = (
                replaced_decay(plan.optimizer, group) if self.weight_decay == "replace" else ""
            )
            texts.append(f"AWS, decay now {mean:.2g}" + (f" ({replaced})" if replaced else ""))
        return texts

    def statistic_for(self, target: Target) -> Literal["norm", "std"]:
        """Weight standardization removes the mean, so for such weights the norm would count what
        the loss cannot see."""
        if self.statistic != "auto":
            return self.statistic
        assert self._session is not None
        return "std" if is_weight_standardized(self._session.module, target.name) else "norm"

    def effect(self, target: Target) -> Effect:
        """It shrinks the weight in proportion to its size."""
        return Shrink(
            self.alpha, self.statistic_for(target), replaces_decay=self.weight_decay == "replace"
        )
