"""From numbers to words: what to read from a curve, and how long a weight has left.

On the host, in plain floats. The predictions themselves come from
`lightning_normdyn.theory.equilibrium`.
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
    "AS_PREDICTED",
    "SETTLED_DRIFT",
    "e_foldings",
    "free_decay_rate",
    "reading",
    "steps_to_overflow",
    "steps_to_underflow",
    "total_decay",
]

# |d ln‖w‖²| x relaxation time below which a norm counts as settled.
SETTLED_DRIFT = 0.1
# Angular update / prediction that counts as agreement.
AS_PREDICTED = (0.75, 1.33)


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


# -------------------------------------------------------------------------------------- in words


def reading(
    norm_drift_per_step: float | None,
    relaxation: float | None,
    ratio: float | None,
    lr_decay_change: float = 0.0,
    *,
    angular_update: float | None = None,
    angle_floor: float = 1e-7,
    power: float = 4,
    age: float = 0.0,
) -> str:
    """What a person should read from a weight's curve, judged by the drift of its norm.

    The ratio alone does not tell: a real network can be stationary far from the prediction, where
    its gradients carry a signal.

    Args:
        norm_drift_per_step: d ln‖w‖² per optimizer step, signed.
        relaxation: relaxation time in optimizer steps; ``None`` without a prediction.
        ratio: RMS angular update / prediction; ``None`` without one.
        lr_decay_change: relative change of lr x decay within the last relaxation time, e.g. 0.3 for
            30 %.
        angular_update: RMS angular update, radians per step; tells frozen and collapsing weights.
        angle_floor: angle that counts as not turning at all: what rounding of float32 weights
            makes.
        power: P of the optimizer, :attr:`StepResponse.power`; for the steps left.
        age: how many steps ago the drift was that large: half of the window that it was measured
            over; for the steps left.

    Returns:
        "settled"; "settled, R x the prediction (below)" or "(above)"; "schedule faster than
        relaxation"; "approaching, about N steps left"; "frozen" (does not turn); "collapsing" (does
        not turn, but shrinks: only the decay is left); or "no prediction".

    Example:
        >>> reading(1e-5, 500.0, 0.97)
        'settled'
        >>> reading(-2e-5, 500.0, 0.43)
        'settled, 0.43x the prediction (below)'
        >>> reading(-6e-4, 500.0, 0.6)
        'approaching, about 896 steps left'
    """
    if norm_drift_per_step is None or not math.isfinite(norm_drift_per_step):
        return "no prediction"
    # Without a measured angle its ratio to the prediction tells, though only of no turn at all.
    turning, floor = angular_update, angle_floor
    if angular_update is None:
        turning, floor = ratio, 0.0
    if turning is not None and turning <= floor:
        # What does not turn has no gradient. If its norm falls nevertheless, only the decay is
        # left, and it will reach zero.
        return "collapsing" if norm_drift_per_step < -angle_floor else "frozen"
    if relaxation is None or ratio is None or not math.isfinite(ratio):
        return "no prediction"
    if lr_decay_change > 0.1 or not math.isfinite(relaxation):
        return "schedule faster than relaxation"
    drift = norm_drift_per_step * relaxation
    if abs(drift) >= SETTLED_DRIFT:
        steps = _times_to_settle(drift, ratio, power) * relaxation - age
        # Never 0: the drift just measured is too large for a weight that has settled.
        steps = max(steps, 0.1 * relaxation)
        return f"approaching, about {_rounded(steps)} steps left"
    low, high = AS_PREDICTED
    if low <= ratio <= high:
        return "settled"
    side = "below" if ratio < 1 else "above"
    return f"settled, {ratio:.2g}x the prediction ({side})"


def _times_to_settle(drift: float, ratio: float, power: float) -> float:
    """Relaxation times until |drift| < SETTLED_DRIFT, with ``drift`` = d ln‖w‖² per such time now.

    With x = (‖w‖/equilibrium)^P, drift = -(2/P)(1 - 1/x), and x - 1 falls as exp(-t).
    """
    inverse = 1 + power * drift / 2
    # So far above that the norm falls as if there were no gradient: the drift no longer tells how
    # far, but the angle does (AU² ~ 1/x).
    if inverse <= 0.01:
        inverse = min(max(ratio**2, 1e-30), 0.01)
    target = 1 + math.copysign(power * SETTLED_DRIFT / 2, drift)
    return max(math.log((1 / inverse - 1) / (1 / target - 1)), 0.0)


def _rounded(steps: float) -> str:
    """Three significant digits, no exponent."""
    digits = 0
    if steps >= 1:
        digits = max(0, math.floor(math.log10(steps)) - 2)
    rounded = max(1, round(steps / 10**digits)) * 10**digits
    return f"{rounded:,}".replace(",", " ")
