"""Adaptive Weight Shrink (AWS): a decay that is strong where a weight is long and vanishes where it
is short."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.engine.arguments import Granularity, Params, check_choice, check_number
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, Shrink
from lightning_normdyn.engine.messages import named
from lightning_normdyn.engine.plan import Target, are_treated, guarded
from lightning_normdyn.engine.shrinking import Shrinker
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import (
    equivalent_weight_decay,
    factor_of_share,
    norm_from_sums,
    shrink_share,
    std_from_sums,
)
from lightning_normdyn.geometry.formulas import moments, squares, work_out
from lightning_normdyn.geometry.fusion import Number
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.decay import (
    LARGEST_SHARE,
    DecayOwner,
    optimizer_decay,
    replaced_decay,
)
from lightning_normdyn.optimizers.step import Phase, Step


def shrink_by_norm(ww: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`shrunk` of norms, from <w, w>."""
    return shrunk(norm_from_sums(ww), *numbers)


def shrink_by_std(
    ww: Tensor, w1: Tensor, by_std: Tensor, length: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`shrunk` of standard deviations where ``by_std`` says so, of norms elsewhere."""
    std = std_from_sums(ww, w1, length)
    return shrunk(torch.where(by_std, std, norm_from_sums(ww)), *numbers)


def shrunk(
    size: Tensor,
    lr: Tensor,
    alpha: float | Tensor,
    counts: Tensor,
    bad: Tensor,
    active: Tensor | None,
    skipped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What AWS needs to know of each vector in one step.

    Args:
        size: norm or standard deviation, ``(n,)``.
        lr: of each vector.
        alpha: the strength.
        counts: how often the factor of each vector was clamped.
        bad: as `lightning_normdyn.engine.plan.guarded` takes it; ``active`` and ``skipped`` too.
        active: the same.
        skipped: the same.

    Returns:
        Its factor, ``bad`` and ``counts``.
    """
    # `shrink_factor` in its two steps, since the first is asked for once more. A vector without a
    # gradient, of length zero or with numbers that are not finite stays as it is.
    share = shrink_share(size, lr, alpha)
    factor, bad = guarded(factor_of_share(share), 1.0, bad, active, skipped, size)
    is_clamped = are_treated(share > LARGEST_SHARE, active, skipped)
    return factor, bad, counts + is_clamped


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
        self.matched: Tensor
        """With "match": alpha of every vector, ``(n,)``."""
        self.alphas = self._find_alphas()
        if self.rule.weight_decay == "replace":
            self.claim_decay(DecayOwner.SHRINK)

    def _find_alphas(self) -> dict[str, float]:
        """Alpha by target; with "match", of those that nothing is known of yet it is found now."""
        plan = self.plan
        if self.rule.alpha != "match":
            return {target.name: self.rule.alpha for target in plan.targets}
        # Of each vector, so that it goes into checkpoints; 0 where nothing is known.
        state = plan.state("alpha", 0.0)
        # Of all ranks, since one may hold no vector of a weight; all of a weight have the same.
        known = [float(values[0]) for values in plan.vectors.gather(state)]
        sizes = plan.vectors.totals(self.size()).tolist()
        lots: dict[tuple[int, str], list[int]] = {}
        for i, target in enumerate(plan.targets):
            # A norm and a standard deviation have no common mean.
            lot = (id(plan.group_of(target)), self.statistic_for(target))
            lots.setdefault(lot, []).append(i)
        alphas: dict[str, float] = {}
        for members in lots.values():
            # Weights that join later get the alpha of their group.
            before = [known[i] for i in members if known[i] > 0]
            alpha = before[0] if before else self._matching(members, sizes)
            alphas.update({plan.targets[i].name: alpha for i in members})
        of_targets = [alphas[target.name] for target in plan.targets]
        state.copy_(plan.vectors.spread(state.new_tensor(of_targets)))
        self.matched = state
        return alphas

    def _matching(self, members: Sequence[int], sizes: Sequence[float]) -> float:
        """The alpha at which the shrink of these targets together is now the decay that acts on
        them.

        Args:
            members: places of targets of one param group.
            sizes: the sum over the vectors of each target.

        Raises:
            NotSupportedError: where there is no decay, or no number for what it comes to.
        """
        plan = self.plan
        group = plan.group_of(plan.targets[members[0]])
        names = named([plan.targets[i].name for i in members])
        decay = optimizer_decay(plan.optimizer, group)
        kind = type(plan.optimizer).__name__
        if decay is None:
            raise NotSupportedError(
                f"AdaptiveWeightShrink('match') cannot tell what the weight decay "
                f"{group['weight_decay']} of {kind} amounts to on {names}: only a decoupled one "
                f"and SGD's have a number. Give alpha=..., or use AdamW or SGD."
            )
        count = sum(plan.targets[i].partition.n for i in members)
        mean = sum(sizes[i] for i in members) / count
        if not (float(decay) > 0 and mean > 0):
            raise NotSupportedError(
                f"AdaptiveWeightShrink('match') has nothing to match: {names} have a weight decay "
                f"of {float(decay):g} under {kind} and a mean length of {mean:g}. Give alpha=..."
            )
        return float(decay) / mean

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
        factor, _, counts = self._worked_out(plan.guards(step))
        # At a factor of 0 the direction would be lost, so it is clamped, and the end table says it.
        plan.count("clamped", counts, step)
        self.shrinker.shrink(step, factor)

    def rehearse(self, step: Step) -> None:
        """Sums, factors and the shrink; and the sizes that a table asks for after the step."""
        factor, *_ = self._worked_out(self.plan.expected_guards(step))
        self.shrinker.rehearse(factor)
        self.plan.vectors.totals(self.size())

    def _worked_out(self, guards: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """What `shrunk` returns."""
        plan = self.plan
        vectors = plan.vectors
        alpha = self._alpha()
        # Told at each launch: a person may schedule it.
        told = alpha if isinstance(alpha, Tensor) else Number(alpha)
        # Read at every step: a rate that was remembered would miss what a schedule does.
        numbers = plan.rates(), told, plan.counters["clamped"], *guards
        into = None, plan.bad
        if self.by_std is None:
            return work_out(vectors, shrink_by_norm, squares(vectors), numbers, into)
        by_std = self.by_std, vectors.length
        return work_out(vectors, shrink_by_std, moments(vectors), (*by_std, *numbers), into)

    def _alpha(self) -> float | Tensor:
        """One number, or one per vector."""
        if self.rule.alpha != "match":
            return self.rule.alpha
        return self.matched

    def effect(self, target: Target) -> Effect:
        """It shrinks the weight in proportion to its size."""
        replaces_decay = self.rule.weight_decay == "replace"
        return Shrink(self.alphas[target.name], self.statistic_for(target), replaces_decay)

    def treatments(self) -> list[str]:
        """What the tables say: the norms of all weights are taken once."""
        plan = self.plan
        # A table has one number for a weight, and each vector has a decay of its own: the mean.
        decays = equivalent_weight_decay(self._alpha(), self.size())
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
            texts.append(f"decay now {mean:.2g}{replaced[id(group)]}")
        is_matched = self.rule.alpha == "match"
        rows = []
        for target, text in zip(plan.targets, texts, strict=True):
            found = f" with alpha {self.alphas[target.name]:.3g}" if is_matched else ""
            rows.append(f"AWS{found}, {text}")
        return rows


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
        alpha: strength, per weight norm; the paper uses 2.5e-3 with SGD at lr 0.1. ``"match"``: for
            each param group the decay that acts on its targets (decoupled, or what SGD's comes to
            through its momentum) over their mean norm at the first step, so that the shrink takes
            over from that decay without a jump. It stays as it was found, over resumes as well.
        statistic: ``"norm"``, ``"std"``, or ``"auto"``: std for weight-standardized weights, else
            norm.
        weight_decay: ``"replace"`` takes the optimizer's decay over; ``"keep"`` lets it act on the
            already shrunk weight as well.
        params: ``"auto"`` (scale-invariant weights), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``.

    Raises:
        ValueError: for numbers out of range, unknown literals, and ``"match"`` with a decay that is
            kept: it would act twice.
        NotSupportedError: at the first step, for ``"match"`` without a decay, or with the coupled
            one of Adam, which no number describes.

    Example:
        >>> from lightning_normdyn import AdaptiveWeightShrink
        >>> AdaptiveWeightShrink(2.5e-3).alpha
        0.0025
    """

    worker = ShrinkWorker
    numbers = ("alpha", "statistic", "weight_decay")

    def __init__(
        self,
        alpha: float | Literal["match"],
        *,
        statistic: Literal["auto", "norm", "std"] = "auto",
        weight_decay: Literal["replace", "keep"] = "replace",
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        self.alpha: float | Literal["match"] = "match"
        if alpha != "match":
            self.alpha = check_number("alpha", alpha, "> 0", " or 'match'")
        self.statistic = check_choice("statistic", statistic, ("auto", "norm", "std"))
        self.weight_decay = check_choice("weight_decay", weight_decay, ("replace", "keep"))
        if alpha == "match" and weight_decay == "keep":
            raise ValueError(
                "`alpha` 'match' takes the place of the decay that it matches; with "
                "weight_decay='keep' both would act. Use weight_decay='replace', or give a number."
            )

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """The rate must be known, and the decay of the targets ours to take over."""
        # The shrink is proportional to the rate. An optimizer that works out its own would decay by
        # another amount than `alpha` says.
        check_rate(optimizer, weights)
        if self.weight_decay == "replace":
            check_decay_takeover(optimizer, weights)
