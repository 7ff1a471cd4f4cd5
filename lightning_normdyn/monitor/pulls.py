r"""How strongly decay pulls at the norm of a weight, step by step.

The pull :math:`P_t` is the share of the weight that the decay of step t takes away, whoever applies
it: `lightning_normdyn.optimizers.decay` says who does. Numbers of the host, but for those of
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_normdyn.engine.effect import Decaying, Effects
from lightning_normdyn.engine.plan import Plan
from lightning_normdyn.optimizers.decay import (
    AnOptimizer,
    DecayOwner,
    decay_of,
    highest_claim,
)
from lightning_normdyn.optimizers.group_numbers import Number, is_zero
from lightning_normdyn.optimizers.step_response import Options

from .balance import Passed, log_of_kept
from .passed_steps import Stretch


class Strength(NamedTuple):
    """What a pull is made of: P = lr · (rate + alpha · size) + per_step.

    Args:
        rate: λ, decoupled, in 1/(step·lr); NaN where nobody can tell.
        alpha: of AdaptiveWeightShrink, per unit of the weight's size.
        per_step: of a decay that does not depend on the learning rate.
    """

    rate: float
    alpha: float = 0.0
    per_step: float = 0.0

    def pull(self, lr: float, size: float) -> float:
        """P of one step.

        Args:
            lr: the rate that the step applies.
            size: of the weight, as AdaptiveWeightShrink sees it; without it, any number.
        """
        # 0 times an unknown size is no pull.
        shrink = self.alpha * size if self.alpha else 0.0
        return lr * (self.rate + shrink) + self.per_step


def strength_of(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
) -> Strength:
    """What decays a weight, under everything that callbacks do to it.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group at this step.
        effects: what the callbacks do.

    Example:
        >>> import torch
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
        >>> strength_of(torch.optim.AdamW, group, Effects())
        Strength(rate=0.1, alpha=0.0, per_step=0.0)
    """
    # Steps of a recorded length are not those that the decay of the group belongs to.
    if effects.decay_untold or effects.scaled_steps:
        return Strength(nan)
    rules = effects.decay_rules
    decay = decay_of(optimizer, group, rules, highest_claim(rules))
    # A number on an accelerator would have to be waited for.
    if decay.rate is None or isinstance(decay.rate, Tensor):
        return Strength(nan)
    if isinstance(decay.per_step, Tensor):
        return Strength(nan)
    return Strength(decay.rate, decay.alpha, decay.per_step)


def options_of(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]
) -> tuple[Options, float] | None:
    """What callbacks do to a weight, as the theory calls it, and the alpha of its shrink.

    Returns:
        None where nobody has derived a course: a callback of somebody else, two decays at once,
        steps of a recorded length or a given angle, a norm that is braked.
    """
    if effects.underived or effects.scaled_steps or effects.steered:
        return None
    if effects.jumps is not None and effects.jumps.exponent is None:
        return None
    options: Options = {}
    if effects.projection is not None:
        options["projected"] = True
    strength = strength_of(optimizer, group, effects)
    if strength.alpha:
        # The shrink takes the place of a decay; both at once have been derived nowhere.
        is_alone = is_zero(strength.rate) and is_zero(strength.per_step)
        return (options, strength.alpha) if is_alone else None
    # What the optimizer does by itself is read from its group, inside the gradient or not.
    if highest_claim(effects.decay_rules) is None and effects.projection is None:
        return options, 0.0
    # A cautious decay among them: what it does off its equilibrium was not derived.
    if not isfinite(strength.rate):
        return None
    if highest_claim(effects.decay_rules) == DecayOwner.WEIGHT_DECAY:
        paced = paced_decay(effects, optimizer, group)
        # The course itself keeps the largest rate so far, which still rises in these steps.
        return None if paced is None else ({**paced, "lr_max": None}, 0.0)
    options["decay"] = strength.rate
    return options, 0.0


def paced_decay(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]
) -> Options | None:
    """The decay that WeightDecay applies, as the theory calls it.

    Args:
        effects: what the callbacks do to the weight, WeightDecay among them.
        optimizer: the optimizer, or its class.
        group: the weight's param group at this step.

    Returns:
        None where it has not been derived: a cautious decay of steps that are projected.
    """
    decaying = effects.decaying
    assert decaying is not None
    is_projected = effects.projection is not None
    if decaying.cautious and is_projected:
        return None
    rule = decaying.decay
    return {
        "decay": rule.strength(optimizer, group),
        "decay_rate": decaying.rate,
        "lr_max": rule.lr_max,
        "cautious": decaying.cautious,
        "projected": is_projected,
    }


def decay_of_vectors(plan: Plan, effects: Mapping[str, Effects]) -> Tensor | None:
    """λ in 1/(step·lr) that WeightDecay applies to each vector in the coming step.

    Args:
        plan: the vectors.
        effects: what the callbacks do to each weight, by name.

    Returns:
        ``(n,)``, NaN where it does not act; None where it acts nowhere.
    """
    # Weights of a group are mostly decayed alike, and there may be thousands of weights.
    known: dict[tuple[int, Decaying], Number] = {}
    numbers: list[Number] = []
    for target, group in zip(plan.targets, plan.groups_of(plan.targets), strict=True):
        decaying = effects[target.name].decaying
        if decaying is None:
            numbers.append(nan)
            continue
        key = (id(group), decaying)
        if key not in known:
            equivalent = decaying.decay.equivalent(plan.optimizer, group)
            known[key] = nan if equivalent is None else equivalent
        numbers.append(known[key])
    if not known:
        return None
    vectors = plan.vectors
    on_host = [nan if isinstance(number, Tensor) else number for number in numbers]
    decays = torch.tensor(on_host, dtype=vectors.sum_dtype, device=vectors.device)
    for i, number in enumerate(numbers):
        # Copied on the device, so that nothing waits for it.
        if isinstance(number, Tensor):
            decays[i] = number
    return vectors.spread(decays)


class End(NamedTuple):
    """A measured step at one end of steps that were not.

    Args:
        number: of the optimizer step.
        lr: the rate that it applied.
        size: of the weight, as AdaptiveWeightShrink sees it; 0 without it.
    """

    number: int
    lr: float
    size: float


def passed_between(
    before: End,
    now: End,
    stretches: Sequence[tuple[Stretch, Strength, float | None]],
) -> Passed:
    """Sums over the steps between two measured ones.

    Args:
        before: the earlier of the two.
        now: the later.
        stretches: the steps after ``before``; the decay of the weight in them; and their learning
            rate, None where only the measured steps tell it: between those it is taken to change
            evenly.

    Example:
        >>> stretch = Stretch(2, 11, [{}])
        >>> ends = End(1, 0.1, 0.0), End(11, 0.1, 0.0)
        >>> round(passed_between(*ends, [(stretch, Strength(0.01), 0.1)]).pull, 6)  # steps 2 to 10
        0.009
    """
    steps = 0
    pulls = 0.0
    log_kept = 0.0
    rates = 0.0
    for stretch, strength, written_lr in stretches:
        # The step of `now` itself belongs to the steps that follow.
        last = min(stretch.last, now.number - 1)
        count = last - stretch.first + 1
        if count < 1:
            continue
        # What changes evenly has its mean in the middle.
        middle = (stretch.first + last) / 2
        share = (middle - before.number) / (now.number - before.number)
        lr = written_lr
        if lr is None:
            lr = before.lr + share * (now.lr - before.lr)
        pull = strength.pull(lr, before.size + share * (now.size - before.size))
        steps += count
        pulls += count * pull
        log_kept += count * log_of_kept(pull)
        rates += count * lr
    return Passed(steps, pulls, log_kept, rates)


__all__ = [
    "End",
    "Strength",
    "decay_of_vectors",
    "options_of",
    "paced_decay",
    "passed_between",
    "strength_of",
]
