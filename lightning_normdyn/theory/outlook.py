"""How long a weight has left: until it settles, until decay has acted, until a dtype ends.

On the host, in plain floats. The predictions themselves come from
`lightning_normdyn.theory.equilibrium`; what is said of them from `lightning_normdyn.theory.words`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_normdyn.optimizers.group_numbers import Group
from lightning_normdyn.optimizers.step_response import Options, step_response

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "SETTLED",
    "e_foldings",
    "free_decay_rate",
    "steps_to_go",
    "steps_to_overflow",
    "steps_to_underflow",
    "total_decay",
]

# A weight counts as settled where ‖w‖^P is within this share of where it settles.
SETTLED = 0.1


# ----------------------------------------------------------------------------- how far decay gets


def e_foldings(steps: float, relaxation: float | None) -> float | None:
    """How many relaxation times ``steps`` optimizer steps are.

    Below about six, the start is still felt. ``None`` without a prediction.

    Example:
        >>> e_foldings(3000, 500.0)
        6.0
    """
    if relaxation is None:
        return None
    return steps / relaxation


def steps_to_go(ratio: float, relaxation: float) -> float:
    """Steps until ‖w‖^P, the power of the norm that relaxes, is within `SETTLED` of where it
    settles.

    It is 1/ratio² of that now, and what is too much or too little of it falls by e in every
    relaxation time.

    Args:
        ratio: the present angle over the one that it settles at, or over its balance.
        relaxation: optimizer steps, 1/(P · pull).

    Returns:
        steps, at least 0; ``inf`` for a ratio of 0, or where nothing relaxes; NaN for a ratio of
        NaN.

    Example:
        >>> round(steps_to_go(0.5, 100.0)), steps_to_go(1.04, 100.0)
        (340, 0.0)
    """
    if math.isnan(ratio):
        return math.nan
    if not ratio > 0:
        return math.inf
    deviation = abs(1 / ratio**2 - 1)
    if deviation <= SETTLED:
        return 0.0
    return math.log(deviation / SETTLED) * relaxation


def total_decay(
    optimizer_class: type, group: Group, steps: int, **options: Unpack[Options]
) -> float | None:
    """By how many powers of e the decay alone would shrink the norm: lr · λ_eff · steps.

    Far below 1, it cannot act (the usual AdamW trap). ``options``:
    :class:`lightning_normdyn.optimizers.step_response.Options`. ``None`` without decay, for an
    optimizer that is not understood, or where the decay depends on the gradient (Adam + L2).

    Example:
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-4}
        >>> total_decay(torch.optim.AdamW, group, 30_000)
        0.015
    """
    response = step_response(optimizer_class, group, **options)
    if response is None or response.rough or response.effective_decay is None:
        return None
    return float(response.lr * response.effective_decay * steps)


def free_decay_rate(
    optimizer_class: type, group: Group, **options: Unpack[Options]
) -> float | None:
    """How fast decay alone shrinks a vector that no gradient reaches (a dead filter).

    The rate is -d ln‖w‖ per step, for :func:`steps_to_underflow`. With decay inside the gradient,
    momentum β and dampening d it is -ln|a|, with a the larger root of x² - (1 + β - lr·λ·(1-d))x +
    β. For lr·λ·(1-d) > (1-√β)² the roots are complex, |a| = √β, and more decay no longer kills
    faster. There a vector whose entries swing through zero together is gone a little earlier than
    its envelope (measured: by 4 to 7 % of the steps at β = 0.9 to 0.95, by 18 % at 0.99).
    ``options``: :class:`lightning_normdyn.optimizers.step_response.Options`.

    Returns:
        the rate per step, ``inf`` where one step reaches zero; ``None`` without decay, for an
        optimizer that is not understood, and for Adam with coupled decay, under which a dead filter
        falls ever faster.

    Example:
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=1e-2)
        >>> rate = free_decay_rate(torch.optim.SGD, group)
        >>> round(math.log(0.17 / 2.6e-23) / rate)  # measured: 4490 steps
        4489
    """
    response = step_response(optimizer_class, group, **options)
    if response is None or response.rough or response.decay is None:
        return None
    pull = float(response.lr * response.decay)
    if not response.coupled:
        return -math.log1p(-pull) if pull < 1 else math.inf
    # A coupled decay is a gradient λ·w, so w' = w - lr·λ Σ c_j w_{t-j}. With all but the newest
    # term in one sum that is a recursion of two numbers, and the slower of its solutions is left.
    newest, older, memory = map(float, (response.newest, response.older, response.memory))
    left = 1 - pull * newest
    return _rate_of_recursion(left + memory, memory * left + pull * older)


def _rate_of_recursion(trace: float, determinant: float) -> float:
    """How fast w'' = trace·w' - determinant·w falls.

    That is -ln|a|, with a the larger root of x² - trace·x + determinant.
    """
    discriminant = trace**2 / 4 - determinant
    if discriminant >= 0:
        size = abs(trace) / 2 + math.sqrt(discriminant)
    else:
        size = math.sqrt(determinant)
    if size == 0:
        return math.inf
    return -math.log(size)


# --------------------------------------------------------------------------- the ends of a dtype


def steps_to_underflow(size: float, rate: float, dtype: torch.dtype = torch.float32) -> float:
    """Steps until the square of a norm or standard deviation rounds to 0, at the present rate.

    From then on, dividing by it gives NaN.

    Args:
        size: norm or std now.
        rate: -d ln(size) per step, measured, or from :func:`free_decay_rate`.
        dtype: what the squares are computed in.

    Returns:
        steps, at least 0; ``inf`` where the size does not fall.

    Example:
        >>> round(steps_to_underflow(0.17, 0.0111891515))
        4488
    """
    limits = torch.finfo(dtype)
    # Below half the smallest subnormal a square rounds to zero.
    smallest = math.sqrt(limits.smallest_normal * limits.eps) * math.sqrt(0.5)
    if size <= smallest:
        return 0.0
    if not rate > 0:
        return math.inf
    return math.log(size / smallest) / rate


def steps_to_overflow(size: float, rate: float, dtype: torch.dtype = torch.float32) -> float:
    """Steps until the square of a norm exceeds the largest number of ``dtype``.

    At the present growth ``rate`` = d ln(size) per step; ``inf`` where it does not grow.

    Example:
        >>> round(steps_to_overflow(1.0, 0.1))
        444
    """
    largest = math.sqrt(torch.finfo(dtype).max)
    if not size < largest:
        return 0.0
    if not (rate > 0 and size > 0):
        return math.inf
    return math.log(largest / size) / rate
