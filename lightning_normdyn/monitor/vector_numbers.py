"""What the monitor works out for each vector in a measured step, as a formula of sums: the
quantities, which vectors get no gradient any more, and what of it counts in sums over vectors.

Legend: ``n`` vectors, ``k`` numbers that are averaged over vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.engine.plan import Plan, Target

from .by_weight import Doubles
from .quantities import QUANTITIES
from .step_sums import StepSums, log_smallest, urgency

UNLOGGED = ("lr", "gradient_scale", "dead", "dead_rate", "urgency")
"""Measured for predictions and warnings; no logger gets them."""

DEAD_AFTER = 75
"""Optimizer steps without any gradient after which a vector counts as dead."""

VOUCHED = 25
"""How many of them one look may vouch for: between two logging steps there may be thousands."""


@dataclass(frozen=True)
class Idle:
    """How long no gradient has reached each vector, so that only its decay moves it.

    Args:
        steps: ``(n,)``, in how many steps.
        log_smallest: ``(n,)``, see `lightning_normdyn.monitor.step_sums.log_smallest`.
    """

    steps: Tensor
    log_smallest: Tensor

    @classmethod
    def of(cls, plan: Plan) -> Idle:
        """Of vectors that nobody has looked at yet."""
        vectors = plan.vectors
        smallest = [log_smallest(target.weight.dtype) for target in plan.targets]
        of_weights = torch.tensor(smallest, dtype=vectors.sum_dtype, device=vectors.device)
        steps = torch.zeros(vectors.n, dtype=vectors.sum_dtype, device=vectors.device)
        return cls(steps, vectors.spread(of_weights))


def values_of(
    names: Sequence[str],
    sums: StepSums,
    passed: float | Tensor,
    idle: Idle,
) -> tuple[list[Tensor], Tensor]:
    """What is averaged over vectors.

    Args:
        names: of quantities; all of them have a formula.
        sums: of the step.
        passed: steps since the last look, at most `VOUCHED`.
        idle: of the last look.

    Returns:
        ``(n,)`` for each of ``names`` and of `UNLOGGED`, and ``idle.steps`` as they are now.
    """
    values = []
    for name in names:
        formula = QUANTITIES[name].formula
        assert formula is not None
        values.append(formula(sums))

    radial = sums.radial_change
    none = torch.zeros_like(idle.steps)
    only_shrinks = (sums.gg == 0) & (radial < 0)
    # One gradient starts the count anew: the vector is still being trained.
    steps = torch.where(only_shrinks, idle.steps + passed, none)
    # Steps multiply the length by 1 + radial, so only their logarithms add up.
    rate = -torch.log1p(radial)
    e_foldings_left = sums.size.log() - idle.log_smallest
    # Or it would be over before 75 steps have made it sure.
    is_falling_fast = (steps >= 3) & (e_foldings_left < DEAD_AFTER * rate)
    is_dead = (steps >= DEAD_AFTER) | is_falling_fast

    values += [
        sums.lr,
        sums.gg * sums.ww,
        is_dead.to(sums.norm.dtype),
        torch.where(is_dead, rate, none),
        torch.where(is_dead, urgency(e_foldings_left), none),
    ]
    return values, steps


def numbers_of_vectors(
    names: tuple[str, ...],
    passed: float | Tensor,
    idle_steps: Tensor,
    smallest: Tensor,
    active: Tensor | None,
    *fields: Any,
) -> tuple[Tensor, ...]:
    """`values_of` as one formula, ready to be summed over vectors: what
    `lightning_normdyn.monitor.measure.StepGauge` packs in the same order, squares where an average
    is of squares; then the size, and how long vectors have been idle.

    Args:
        names: as `values_of` takes them.
        passed: the same.
        idle_steps: the same.
        smallest: the same, of `Idle`.
        active: bool: vectors of weights that got a gradient; None: all.
        fields: of `StepSums`, in their order.
    """
    sums = StepSums(*fields)
    values, idle_steps = values_of(names, sums, passed, Idle(idle_steps, smallest))
    has_diverged = ~torch.isfinite(sums.ww + sums.gg + sums.ss + sums.dd)
    numbers, counts = [], []
    for number, value in enumerate(values):
        # Left out of means: a number that is undefined, but not one of a weight that has diverged.
        counted = value.isfinite() | has_diverged
        if active is not None:
            counted = counted & active
        kept = value.where(counted, 0.0)
        # Sums of squares add up over ranks and optimizers, roots do not.
        is_rms = number < len(names) and QUANTITIES[names[number]].average == "rms"
        numbers.append(kept.square() if is_rms else kept)
        counts.append(counted.to(kept.dtype))
    size = sums.size
    # One infinite length would raise the mean, and all other vectors would look collapsed.
    return *numbers, *counts, *sums.whole, size.nan_to_num(0.0, 0.0, 0.0), size, idle_steps


def collapsed(
    size: Tensor,
    mean_sizes: Tensor,
    weight_of: Tensor,
    share: float,
    active: Tensor | None,
) -> tuple[Tensor]:
    """1 for each vector that is shorter than a share of the mean of its weight, else 0.

    Args:
        size: ``(n,)``.
        mean_sizes: ``(weights,)``.
        weight_of: int64 ``(n,)``.
        share: how much shorter.
        active: as for `numbers_of_vectors`.
    """
    is_short = size < share * mean_sizes[weight_of]
    if active is not None:
        is_short = is_short & active
    return (is_short.to(size.dtype),)


def kept_by_name(targets: Sequence[Target], numbers: Doubles) -> dict[str, Any]:
    """What a history keeps of every vector, for ridge plots and EffectiveLRReplay.

    Args:
        targets: the weights.
        numbers: float64 ``(2 n,)``, norms and then applied decays of the vectors of all ranks, in
            the order of the weights.

    Returns:
        By ``<quantity>/<name of the weight>``, float32, one number per vector of the weight.
    """
    stops = np.cumsum([target.partition.n for target in targets])
    of_weights = np.split(numbers.reshape(2, -1), stops[:-1], axis=-1)
    kept = {}
    for target, values in zip(targets, of_weights, strict=True):
        norms, decays = values.astype(np.float32)
        kept[f"weight_norm/{target.name}"] = norms
        kept[f"decay/{target.name}"] = decays
        if target.weight.dtype == torch.float64:
            # What float32 leaves of the norm: an experiment in float64 is to be followed as closely
            # as training allows.
            kept[f"weight_norm_rest/{target.name}"] = (values[0] - norms).astype(np.float32)
    return kept
