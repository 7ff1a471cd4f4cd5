"""Adaptive Weight Shrink (AWS): a decay that is strong where a weight is long and vanishes where it
is short."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Granularity, Params, check_choice, check_number
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Shrink
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.engine.shrinking import Shrinker
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.functional import (
    equivalent_weight_decay,
    norm_from_sums,
    shrink_factor,
    std_from_sums,
)
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import DecayOwner, replaced_decay
from lightning_normdyn.optimizers.step import Phase, Step


class ShrinkWorker(Worker["AdaptiveWeightShrink"]):
    """Shrinks the targets of one optimizer."""

    def prepare(self) -> None:
        """Take the state of each vector, and the decay."""
        plan = self.plan
        by_std = [self.statistic_for(target) == "std" for target in plan.targets]
        # Where no vector needs it, the norm alone is one pass of the fastest kernel.
        self.by_std = plan.spread(by_std) if any(by_std) else None
        plan.counter("clamped")
        self.shrinker = Shrinker(plan)
        if self.rule.weight_decay == "replace":
            self.claim_decay(DecayOwner.SHRINK)

    def statistic_for(self, target: Target) -> Literal["norm", "std"]:
        """Weight standardization removes the mean, so for such weights the norm would count what
        the loss cannot see."""
        if self.rule.statistic != "auto":
            return self.rule.statistic
        if target.weight_standardized:
            return "std"
        return "norm"

    def size(self) -> Tensor:
        """Norm, or biased standard deviation where weight standardization follows, of every vector:
        ``(n,)``."""
        vectors = self.plan.vectors
        if self.by_std is None:
            return vectors.norms()
        # Both sums in one pass: a second one would read every weight again.
        ww, w1 = vectors.moments(vectors.values())
        return torch.where(self.by_std, std_from_sums(ww, w1, vectors.length), norm_from_sums(ww))

    @during(Phase.SHRINK)
    def shrink(self, step: Step) -> None:
        """w <- (1 - lr alpha |w|) w (AWS paper, eq. 21)."""
        plan = self.plan
        alpha = self.rule.alpha
        size = self.size()
        # Read at every step: a rate that was remembered would miss what a schedule does.
        lr = plan.rates()
        # A vector without a gradient, of length zero or with numbers that are not finite stays as
        # it is.
        factor = plan.guard(shrink_factor(size, lr, alpha), 1.0, step, size)
        # At a factor of 0 the direction would be lost, so it is clamped, and the end table says it.
        is_clamped = (lr * alpha * size > 0.5).to(factor.dtype)
        plan.count("clamped", plan.guard(is_clamped, 0.0, step), step)
        self.shrinker.shrink(step, factor)

    def effect(self, target: Target) -> Effect:
        """It shrinks the weight in proportion to its size."""
        replaces_decay = self.rule.weight_decay == "replace"
        return Shrink(self.rule.alpha, self.statistic_for(target), replaces_decay)

    def treatments(self) -> list[str]:
        """What the tables say: the norms of all weights are taken once."""
        plan = self.plan
        # A table has one number for a weight, and each vector has a decay of its own: the mean.
        decays = equivalent_weight_decay(self.rule.alpha, self.size())
        totals = plan.vectors.totals(decays)
        means = (totals / plan.vectors.count).tolist()
        # Once a group, not a weight: it is a question about the optimizer, and there may be
        # thousands of weights.
        replaced = {}
        for group, _ in plan.groups:
            words = replaced_decay(plan.optimizer, group)
            is_said = words and self.rule.weight_decay == "replace"
            replaced[id(group)] = f" ({words})" if is_said else ""
        texts = []
        for group, mean in zip(plan.groups_of(plan.targets), means, strict=True):
            texts.append(f"AWS, decay now {mean:.2g}{replaced[id(group)]}")
        return texts


class AdaptiveWeightShrink(NormDynCallback):
    r"""Adaptive Weight Shrink (AWS): before every step, each weight vector is shrunk by its own
    factor.

    .. math:: w \leftarrow (1 - \eta\,\alpha\,\lVert w\rVert)\,w - \eta\,g

    with :math:`\alpha` = ``alpha``, :math:`\eta` the learning rate of the weight's param group at
    this very step, and norm and gradient taken at the same weight (AWS paper, eq. 20 and 21;
    decoupled from momentum and from Adam's denominator). For weight-standardized weights the biased
    standard deviation takes the place of the norm. The factor is exact down to 0.5 and clamped
    there.

    It *is* the weight decay of its targets: the optimizer's own is taken over, for them only.
    ``alpha`` stands for a weight decay of ``alpha * norm`` (the log key
    ``equivalent_weight_decay``).

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

    worker = ShrinkWorker
    numbers = ("alpha", "statistic", "weight_decay")

    def __init__(
        self,
        alpha: float,
        *,
        statistic: Literal["auto", "norm", "std"] = "auto",
        weight_decay: Literal["replace", "keep"] = "replace",
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.alpha = check_number("alpha", alpha, "> 0")
        self.statistic = check_choice("statistic", statistic, ("auto", "norm", "std"))
        self.weight_decay = check_choice("weight_decay", weight_decay, ("replace", "keep"))

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The rate must be known, and the decay of the targets ours to take over."""
        # The shrink is proportional to the rate. An optimizer that works out its own would decay by
        # another amount than `alpha` says.
        check_rate(optimizer, weights)
        if self.weight_decay == "replace":
            check_decay_takeover(optimizer, weights)
