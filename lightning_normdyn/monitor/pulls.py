r"""How strongly decay pulls at the norm of a weight, step by step.

The pull :math:`P_t` is the share of the weight that the decay of step t takes away, whoever applies
it: `lightning_normdyn.optimizers.decay` says who does. Numbers of the host, but for those of
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
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

from .balance import Numbers, Passed, log_of_kept

# Asked of every weight in a measured step: a generator would call Python for each.
_DECAYING = attrgetter("decaying")


class Strength(NamedTuple):
    """What a pull is made of: P = lr · (rate + alpha · size) + per_step; of one weight, or ``(w,)``
    of many.

    Args:
        rate: λ, decoupled, in 1/(step·lr); NaN where nobody can tell.
        alpha: of AdaptiveWeightShrink, per unit of the weight's size.
        per_step: of a decay that does not depend on the learning rate.
    """

    rate: Numbers
    alpha: Numbers = 0.0
    per_step: Numbers = 0.0

    def pull(self, lr: Numbers, size: Numbers) -> Numbers:
        """P of one step.

        Args:
            lr: the rate that the step applies.
            size: of the weight, as AdaptiveWeightShrink sees it; without it, any number.
        """
        # 0 times an unknown size is no pull.
        shrink = np.where(np.equal(self.alpha, 0), 0.0, self.alpha * size)
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
    # Mostly there is no such callback, and no group of thousands of weights need be looked for.
    if not any(map(_DECAYING, effects.values())):
        return None
    # Weights of a group are mostly decayed alike.
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
    """A measured step at one end of steps that were not; of one weight, or ``(w,)`` of many.

    Args:
        number: of the optimizer step.
        lr: the rate that it applied.
        size: of the weight, as AdaptiveWeightShrink sees it; 0 without it.
    """

    number: Numbers
    lr: Numbers
    size: Numbers


class Taken(NamedTuple):
    """Consecutive steps that decayed a weight alike.

    Args:
        first: number of the first of them.
        last: number of the last.
        strength: of the decay.
        lr: their learning rate; None where only the measured steps tell it: between those it is
            taken to change evenly.
    """

    first: int
    last: int
    strength: Strength
    lr: float | None


def passed_between(before: End, now: End, steps: Sequence[Taken]) -> Passed:
    """Sums over the steps between two measured ones, of weights that are decayed alike.

    Args:
        before: the earlier of the two, ``(w,)``.
        now: the later, ``(w,)`` but for its number, which is that of all.
        steps: those after ``before``.

    Returns:
        ``(w,)``, or numbers of all weights where there is nothing between.

    Example:
        >>> before = End(np.array([1]), np.array([0.1]), np.array([0.0]))
        >>> now = before._replace(number=11)
        >>> passed = passed_between(before, now, [Taken(2, 11, Strength(0.01), 0.1)])
        >>> passed.pull.round(6)  # steps 2 to 10
        array([0.009])
    """
    rows = []
    for taken in steps:
        # The step of `now` itself belongs to the steps that follow.
        last = min(taken.last, now.number - 1)
        if last >= taken.first:
            lr = nan if taken.lr is None else taken.lr
            rows.append((taken.first, last, *taken.strength, lr, taken.lr is not None))
    if not rows:
        return Passed(0, 0.0, 0.0, 0.0)
    # A column for each of the numbers of a stretch, against the weights: (stretches, 1).
    columns = np.array(rows, dtype=np.float64).T[:, :, None]
    firsts, lasts, rate, alpha, per_step, written_lr, is_written = columns
    counts = lasts - firsts + 1
    with np.errstate(all="ignore"):
        # What changes evenly has its mean in the middle.
        share = ((firsts + lasts) / 2 - before.number) / (now.number - before.number)
        between = before.lr + share * (now.lr - before.lr)
        lr = np.where(is_written != 0, written_lr, between)
        size = before.size + share * (now.size - before.size)
        pull = Strength(rate, alpha, per_step).pull(lr, size)
        kept = counts * log_of_kept(pull)
    return Passed(
        int(counts.sum()),
        (counts * pull).sum(0),
        kept.sum(0),
        (counts * lr).sum(0),
    )


__all__ = [
    "End",
    "Strength",
    "Taken",
    "decay_of_vectors",
    "options_of",
    "paced_decay",
    "passed_between",
    "strength_of",
]
