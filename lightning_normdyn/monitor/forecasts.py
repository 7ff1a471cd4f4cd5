"""When something is going to end a run: a vector that only decays and underflows, a norm that grows
until it overflows, a decay that cannot act within the run.

Numbers of the host, but for `urgency`. Formulas: `lightning_normdyn.theory.outlook`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.monitor.predictions import balance
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.theory.outlook import (
    free_decay_rate,
    steps_to_overflow,
    steps_to_underflow,
    total_decay,
)

# Below this many powers of e, a decay does next to nothing to a norm within the whole run.
IDLE_DECAY = 0.1
# A norm that has grown by this factor and still grows exponentially is on its way to overflow: a
# random walk never gets there.
RUNAWAY = 1e4
# And it still grows exponentially if its newest rate is at least this share of the one before.
STILL_GROWING = 0.8


# ------------------------------------------------------------------------------- vectors that decay


def log_smallest(dtype: torch.dtype) -> float:
    """ln of the norm whose square vanishes in ``dtype``; float32 for weights that are stored
    shorter.

    Example:
        >>> round(exp(log_smallest(torch.float32)) / 1e-23, 2)
        2.65
    """
    # Shorter formats are summed in float32.
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return -steps_to_underflow(1.0, 1.0, summed)


def urgency(e_foldings: Tensor) -> Tensor:
    """A power of each vector's e-foldings left, so high that the sum over vectors tells the
    smallest: see `least_of`."""
    return e_foldings.clamp(min=1.0).pow(-_sharpness(e_foldings.dtype))


def least_of(total: float, dtype: torch.dtype = torch.float64) -> float:
    """The smallest of the e-foldings whose `urgency` sums to ``total``; a little less where several
    are equally small.

    Sums are all that ranks exchange, so the smallest must come from a sum.

    Example:
        >>> steps = torch.tensor([31.0, 50.0, 44.0], dtype=torch.float64)
        >>> round(least_of(float(urgency(steps).sum())), 1)
        31.0
    """
    return inf if total <= 0 else total ** (-1 / _sharpness(dtype))


def _sharpness(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 20  # 60 to this power is still a number


def known_fall(optimizer: AnOptimizer, group: Mapping[str, Any], effects: Effects) -> float | None:
    """-d ln‖w‖ per step of a vector without gradient, as the optimizer's decay has it; None where
    no theory tells it, so that it has to be measured.

    Adam with coupled decay is such a case: its second moments fade, and the vector falls ever
    faster than it does now.
    """
    options = _fixed_decay(effects, optimizer, group)
    if options is None:
        return None
    return free_decay_rate(class_for_predictions(optimizer), group, **options)


def steps_to_collapse(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    e_foldings: float,
    rate: float,
) -> float:
    """Optimizer steps until a vector without gradient has shrunk by ``e_foldings`` powers of e, at
    the present learning rate: the logarithm of its length falls on a line.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        effects: what the callbacks do to the weight.
        e_foldings: how far it has to go.
        rate: -d ln‖w‖ per step as measured, for optimizers that are not understood; soon after the
            last gradient the momentum still moves the vector, so `known_fall` is the better one.

    Returns:
        ``inf`` where it does not get there: AWS shrinks ever slower, WRS puts the length back until
        its last epoch. ``inf`` also where nobody knows, because a callback of somebody else acts on
        it.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False}
        >>> group["weight_decay"] = 1e-2
        >>> to_fall = log(0.17 / 2.6e-23)
        >>> # Measured: 4490.
        >>> round(steps_to_collapse(torch.optim.SGD, group, Effects(), to_fall, 0.0))
        4489
    """
    is_put_back = effects.rescaling is not None and effects.rescaling.window != "over"
    if effects.underived or is_put_back:
        return inf
    if effects.shrink is not None and _fixed_decay(effects, optimizer, group) is None:
        return inf
    known = known_fall(optimizer, group, effects)
    if known is not None:
        rate = known
    return e_foldings / rate if rate > 0 else inf


def _fixed_decay(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`balance` of the decay that does not fade with the length: all but AWS. None where there is
    no other or none is known."""
    if effects.shrink is None:
        return balance(effects, optimizer, group)
    if effects.shrink.replaces_decay:
        return None
    options = balance(replace(effects, shrink=None), optimizer, group)
    if options is None or not (options.get("decay") or group.get("weight_decay")):
        return None
    return options


# ------------------------------------------------------------------------------ norms that run away


def steps_until_overflow(steps: Sequence[float], norms: Sequence[float]) -> float:
    """Steps until the square of a norm overflows float32, if it has run away and keeps growing
    exponentially; else ``inf``.

    Args:
        steps: of the recorded norms.
        norms: the first one of the run, and the last ones.

    Example:
        >>> norms = [1.0, 1.5**28, 1.5**29, 1.5**30, 1.5**31]
        >>> round(steps_until_overflow([0, 28, 29, 30, 31], norms))
        78
        >>> steps_until_overflow([0, 28, 29, 30, 31], [1.0, 2.30, 2.32, 2.34, 2.36])
        inf
    """
    if len(norms) < 5 or not (0 < norms[0] * RUNAWAY < norms[-1] < inf):
        return inf
    rates = []
    newest = zip(steps[1:], norms[1:], strict=True)
    for (step, norm), (next_step, next_norm) in pairwise(newest):
        if norm > 0:
            rates.append(log(next_norm / norm) / (next_step - step))
    if len(rates) < 3 or min(rates) <= 0 or rates[-1] < STILL_GROWING * rates[0]:
        return inf
    # The slowest of the rates: one jump must not raise an alarm.
    return steps_to_overflow(norms[-1], min(rates))


# ------------------------------------------------------------------------------- decay that is idle


def idle_decay(optimizer_class: type, group: Mapping[str, Any], steps: float) -> str | None:
    """A sentence about a decay that cannot act within a run of ``steps`` optimizer steps; None
    where there is nothing to say.

    Args:
        optimizer_class: of the optimizer.
        group: a param group; during a warm-up its ``initial_lr`` or ``max_lr`` counts.
        steps: of the whole run.

    Example:
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-4}
        >>> print(idle_decay(torch.optim.AdamW, group, 30_000))
        weight decay 0.0005 at lr 0.001 shrinks a weight by 1.5 % over the 30000 steps of this run:
        it does next to nothing.
    """
    if not 0 < steps < inf:
        return None
    # The highest rate of the schedule: during a warm-up the present one says nothing of the run.
    lr = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
    pull = total_decay(optimizer_class, {**group, "lr": lr}, int(steps))
    if pull is None or not isfinite(pull) or not 0 < pull < IDLE_DECAY:
        return None
    share = f"{100 * (1 - exp(-pull)):.2g} %"
    settings = f"weight decay {float(group['weight_decay']):g} at lr {lr:g}"
    return (
        f"{settings} shrinks a weight by {share} over the {steps:.0f} steps of this run: it does "
        f"next to nothing."
    )
