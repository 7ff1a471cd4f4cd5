"""Weight matrices of one optimizer against each other, at the end of a run: which of them turns
much faster or more slowly than its like, and what would change that.

Under one learning rate and one decay all matrices would turn alike, if the loss let them. Where it
pushes a norm outwards, the matrix turns more slowly, where it pulls inwards, faster. From the
measured coherence κ follows the decay under which a matrix would settle at an angle θ of one's
choice: λ = κ θ²/(2 lr). Numbers of the host, in plain floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .forecast import Advice

__all__ = ["Turning", "compared"]

LEAST_WEIGHTS = 4
"""Of fewer weights, the median is nearly one of them."""

ALIKE = 2.0
"""Angles within this factor of the median, in either direction, are alike."""

HARDLY_MATTERS = 0.25
"""The share of decay in what holds a norm below which another decay would change little."""

NEAR_PEAK = 0.25
"""The share of the largest learning rate above which an angle is one of the main part of a run: in
a cool-down all angles fall, and a decay for them would be none for the run."""


class Turning(NamedTuple):
    """How one weight matrix turned over many steps.

    Args:
        name: of the weight.
        angle: root mean square of the whole matrix, rad/step.
        coherence: κ; its relative error is below a tenth.
        lr: mean learning rate of these steps.
        pull: mean relative decay of a step.
        peak_lr: the largest learning rate of the run.
        decay_share: of what holds the norm, the part that decay does; None where nobody can tell.
    """

    name: str
    angle: float
    coherence: float
    lr: float
    pull: float
    peak_lr: float
    decay_share: float | None = None


def compared(weights: Sequence[Turning]) -> list[Advice]:
    """What is to be said of single weights, the one that is farthest from its like first.

    Kinds of advice are "turns faster than its like" and "turns more slowly than its like". Their
    numbers: ``times`` (the angle over the median), ``angle``, ``median``, ``coherence``; where
    they are known ``share`` (decay's) and, where another decay would matter, ``decay`` (as it is)
    and ``decay_for_median``.

    Example:
        >>> alike = [Turning(f"fc{i}", 0.01, 19.0, 1e-3, 1e-4, 1e-3) for i in range(4)]
        >>> (advice,) = compared([*alike, Turning("proj", 0.03, 2.0, 1e-3, 1e-4, 1e-3)])
        >>> advice.weight, round(advice.numbers["times"]), advice.numbers["decay_for_median"]
        ('proj', 3, 0.1)
    """
    if len(weights) < LEAST_WEIGHTS:
        return []
    usual = median(weight.angle for weight in weights)
    # Where most do not turn at all, no angle is unusual.
    if not usual > 0:
        return []
    found = []
    for weight in weights:
        times = weight.angle / usual
        if 1 / ALIKE <= times <= ALIKE:
            continue
        kind = "turns more slowly than its like"
        if times > 1:
            kind = "turns faster than its like"
        found.append(Advice(kind, _numbers(weight, usual), weight.name))
    return sorted(found, key=_distance, reverse=True)


def _distance(advice: Advice) -> float:
    times = advice.numbers["times"]
    # What does not turn at all is farthest off.
    if times == 0:
        return math.inf
    return abs(math.log(times))


def _numbers(weight: Turning, usual: float) -> dict[str, float]:
    numbers = {
        "times": weight.angle / usual,
        "angle": weight.angle,
        "median": usual,
        "coherence": weight.coherence,
    }
    share = weight.decay_share
    if share is not None:
        numbers["share"] = share
    # Where the loss holds the norm, it would go on doing so under another decay.
    matters = share is None or share >= HARDLY_MATTERS
    is_usual_rate = weight.lr > 0 and weight.lr >= NEAR_PEAK * weight.peak_lr
    # Without decay, or where the loss alone holds the norm, no decay follows from the coherence.
    if matters and is_usual_rate and weight.pull > 0 and weight.coherence > 0:
        numbers["decay"] = weight.pull / weight.lr
        numbers["decay_for_median"] = weight.coherence * usual**2 / (2 * weight.lr)
    return numbers
