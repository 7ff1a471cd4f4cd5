"""What one step of each understood optimizer does with the gradients so far, as a function of its
param group.

An optimizer's step is lr · Σ_j c_j g_{t-j}. Its sums S1 = Σ c_j and S2 = Σ c_j² say how far it
turns a scale-invariant weight and how much
longer it makes it; what follows from them stands in `lightning_normdyn.theory.equilibrium`. Which class
steps by which rule is decided in
`lightning_normdyn.optimizers.facts`; here is the arithmetic alone. Numbers may be floats or tensors;
no tensor is looked into, so nothing
waits for a device. A rule answers ``None`` for settings that nobody has derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lightning_normdyn.optimizers.group_numbers import Number, is_zero

__all__ = ["ResponseRule", "StepResponse", "adam", "adamp", "adamw", "lion", "sgd", "sgdp"]


@dataclass(frozen=True)
class StepResponse:
    """The few numbers of a param group that decide the equilibrium of its weights.

    Args:
        lr: learning rate of the group.
        total: S1, what a constant gradient is multiplied by: a coupled decay acts ``total`` times.
        turn: S2, the squared length of a step per unit of E (see the module's docstring).
        growth: G, the growth of the squared norm per unit of E.
        normalized: the optimizer divides the gradient by its own size (Adam, Lion): h = 0, else h =
            2.
        decay: λ in 1/(step·lr), as written in the group or given by a callback; for AWS, α‖w‖ or
            α·std at the present norm; ``None``
            without decay.
        coupled: the decay is added to the gradient (torch's SGD and Adam) rather than applied to
            the weight (AdamW).
        adaptive: the decay itself is proportional to ‖w‖ (AWS).
    """

    lr: Number
    total: Number
    turn: Number
    growth: Number
    normalized: bool
    decay: Number | None = None
    coupled: bool = False
    adaptive: bool = False

    @property
    def rough(self) -> bool:
        """Whether the decay is divided by the gradient's size (Adam + L2), which makes a prediction
        13-38 % off on a real network."""
        return self.normalized and self.coupled

    @property
    def power(self) -> int:
        """P, the power of the norm that relaxes exponentially: 4 SGD, 2 AdamW, 3 Adam + L2, 5 AWS
        on SGD, 3 AWS on Adam."""
        return 2 + (0 if self.normalized else 2) + int(self.adaptive) + int(self.rough)

    @property
    def effective_decay(self) -> Number | None:
        """λ_eff of a decay that is not divided by the gradient's size: the norm shrinks by the
        factor 1 - lr·λ_eff per step."""
        return (
            None if self.decay is None else self.decay * self.total if self.coupled else self.decay
        )


ResponseRule: TypeAlias = Callable[[Mapping[str, Any]], StepResponse | None]


def _geometric(first: Number, second: Number, ratio: Number) -> tuple[Number, Number]:
    """S1 and S2 of the coefficients first, second, second·ratio, second·ratio², ...: every
    optimizer below is of this form."""
    return first + second / (1 - ratio), first**2 + second**2 / (1 - ratio**2)


def sgd(group: Mapping[str, Any]) -> StepResponse:
    """torch's SGD: momentum, dampening, Nesterov."""
    momentum = group["momentum"]
    kept = (
        1 - group["dampening"] if not is_zero(momentum) else 1.0
    )  # torch applies dampening to the momentum buffer only
    if group["nesterov"]:
        total, turn = _geometric(1 + momentum, momentum**2, momentum)
    else:
        total, turn = _geometric(kept, kept * momentum, momentum)
    return StepResponse(
        group["lr"],
        total,
        turn,
        total**2,
        normalized=False,
        decay=group["weight_decay"],
        coupled=True,
    )


def adam(group: Mapping[str, Any]) -> StepResponse | None:
    """torch's Adam without amsgrad."""
    if group.get(
        "amsgrad"
    ):  # the largest second moment so far is no measure of the present gradient
        return None
    momentum = group["betas"][0]
    total, turn = _geometric(1 - momentum, (1 - momentum) * momentum, momentum)
    decoupled = group.get("decoupled_weight_decay", False)
    return StepResponse(
        group["lr"],
        total,
        turn,
        total**2,
        normalized=True,
        decay=group["weight_decay"],
        coupled=not decoupled,
    )


def adamw(group: Mapping[str, Any]) -> StepResponse | None:
    """torch's AdamW without amsgrad."""
    # torch before 2.7 has AdamW without the flag in the group.
    return adam({**group, "decoupled_weight_decay": group.get("decoupled_weight_decay", True)})


def sgdp(group: Mapping[str, Any]) -> StepResponse | None:
    """SGDP (adamp): SGD whose steps are projected, with a decoupled decay."""
    if group["nesterov"] and not is_zero(group["dampening"]):  # torch's SGD does not allow it
        return None
    base = sgd(group)
    # SGDP divides its decoupled decay by 1 - momentum, to compare with SGD's coupled one; the gate
    # is taken as open.
    decay = group["weight_decay"] * group["wd_ratio"] / (1 - group["momentum"])
    return replace(base, growth=base.turn, decay=decay, coupled=False)


def adamp(group: Mapping[str, Any]) -> StepResponse | None:
    """AdamP (adamp): Adam whose steps are projected, with a decoupled decay."""
    base = adam({**group, "decoupled_weight_decay": True})
    return (
        None
        if base is None
        else replace(base, growth=base.turn, decay=group["weight_decay"] * group["wd_ratio"])
    )


def lion(group: Mapping[str, Any]) -> StepResponse:
    """Lion: the sign of an average of gradients."""
    inner, outer = group["betas"]
    first, second = 1 - inner, inner * (1 - outer)
    _, squares = _geometric(first, second, outer)
    # The step is the sign of a Gaussian average with autocorrelation ρ_k = ρ_1 · outer^(k-1). Signs
    # then have autocorrelation
    # (2/π) arcsin ρ_k (the arcsine law), and the squared norm grows by its sum over all lags.
    # arcsin is summed as its power series: each
    # power is a geometric series in k.
    correlation = (first * second + second**2 * outer / (1 - outer**2)) / squares
    coherent: Number = 0.0
    coefficient = 1.0
    for power in range(1, 200, 2):
        coherent = coherent + coefficient * correlation**power / (1 - outer**power)
        coefficient *= power**2 / ((power + 1) * (power + 2))
    return StepResponse(
        group["lr"],
        1.0,
        1.0,
        1 + 4 / math.pi * coherent,
        normalized=True,
        decay=group["weight_decay"],
    )
