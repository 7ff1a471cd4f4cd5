"""What one step of each understood optimizer does with the gradients so far.

Here is the arithmetic alone, as functions of a param group; `lightning_normdyn.optimizers.facts`
says which optimizer follows which rule, and `lightning_normdyn.theory.equilibrium` what follows
from the answer. Numbers may be floats or tensors. No tensor is read, so nothing waits for a device.
A rule answers ``None`` for settings that nobody has derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .group_numbers import Group, Number, is_zero


@dataclass(frozen=True)
class StepResponse:
    """The few numbers of a param group that decide the equilibrium of its weights.

    A step is lr · Σ_j c_j g_{t-j}, g being the gradient or, where ``normalized``, the gradient
    divided by its own size. The coefficients of every optimizer here have the form ``newest``,
    ``older``, ``older``·``memory``, ``older``·``memory``², ...

    Args:
        lr: learning rate of the group.
        newest: c_0, the share of the present gradient.
        older: c_1, that of the gradient before.
        memory: c_{j+1} / c_j of all earlier ones, below 1.
        growth: G, the growth of the squared norm per unit of E (see
            `lightning_normdyn.theory.equilibrium`); None: that of steps that are not projected,
            ``total``².
        normalized: the optimizer divides the gradient by its own size (Adam, Lion).
        decay: λ in 1/(step·lr), as written in the group or given by a callback; for AWS, α‖w‖ or
            α·std at the present norm; ``None`` without decay.
        coupled: the decay is added to the gradient (torch's SGD and Adam) rather than applied to
            the weight (AdamW).
        adaptive: the decay itself is proportional to ‖w‖ (AWS).
    """

    lr: Number
    newest: Number
    older: Number = 0.0
    memory: Number = 0.0
    growth: Number | None = None
    normalized: bool = False
    decay: Number | None = None
    coupled: bool = False
    adaptive: bool = False

    @property
    def total(self) -> Number:
        """S1 = Σ c_j: a constant gradient, and so a coupled decay, acts ``total`` times."""
        return self.newest + self.older / (1 - self.memory)

    @property
    def turn(self) -> Number:
        """S2 = Σ c_j²: the squared length of a step per unit of E, for gradients of pure noise."""
        return self.newest**2 + self.older**2 / (1 - self.memory**2)

    @property
    def norm_growth(self) -> Number:
        """G: all later contributions of one gradient point the same way, so they add up first."""
        if self.growth is None:
            return self.total**2
        return self.growth

    def projected(self) -> StepResponse:
        """The same steps without their radial part: the norm grows by their length alone."""
        return replace(self, growth=self.turn)

    @property
    def rough(self) -> bool:
        """Whether the decay is divided by the gradient's size (Adam with coupled decay).

        A prediction is then 13 to 38 % off on a real network.
        """
        return self.normalized and self.coupled

    @property
    def power(self) -> int:
        """P, the power of the norm that relaxes exponentially.

        4 for SGD, 2 for AdamW, 3 for Adam with coupled decay, 5 for AWS on SGD, 3 for AWS on Adam.
        """
        gradient_power = 0 if self.normalized else 2
        return 2 + gradient_power + self.adaptive + self.rough

    @property
    def effective_decay(self) -> Number | None:
        """λ_eff: the norm shrinks by the factor 1 - lr·λ_eff per step, unless `rough`."""
        if self.decay is None or not self.coupled:
            return self.decay
        return self.decay * self.total


ResponseRule = Callable[[Group], StepResponse | None]
"""Param group -> how its steps answer gradients; None for settings that nobody has derived."""


def sgd(group: Group) -> StepResponse:
    """torch's SGD: momentum, dampening, Nesterov."""
    momentum = group["momentum"]
    if group["nesterov"]:
        newest, older = 1 + momentum, momentum**2
    elif is_zero(momentum):
        # torch applies dampening to the momentum buffer only, so without one there is none.
        newest, older = 1.0, 0.0
    else:
        newest = 1 - group["dampening"]
        older = newest * momentum
    return StepResponse(
        group["lr"],
        newest,
        older,
        momentum,
        decay=group["weight_decay"],
        coupled=True,
    )


def adam(group: Group) -> StepResponse | None:
    """torch's Adam without amsgrad."""
    # amsgrad divides by the largest second moment so far, which does not measure the present
    # gradient.
    if group.get("amsgrad"):
        return None
    momentum = group["betas"][0]
    return StepResponse(
        group["lr"],
        1 - momentum,
        (1 - momentum) * momentum,
        momentum,
        normalized=True,
        decay=group["weight_decay"],
        coupled=not group.get("decoupled_weight_decay", False),
    )


def adamw(group: Group) -> StepResponse | None:
    """torch's AdamW without amsgrad."""
    # torch before 2.7 has AdamW without the flag in the group.
    return adam({"decoupled_weight_decay": True, **group})


def sgdp(group: Group) -> StepResponse | None:
    """SGDP (adamp): SGD whose steps are projected, with a decoupled decay."""
    # torch's SGD, whose arithmetic this uses, does not allow the two together.
    if group["nesterov"] and not is_zero(group["dampening"]):
        return None
    # SGDP divides its decoupled decay by 1 - momentum, so that it compares with SGD's coupled one.
    decay = group["weight_decay"] * group["wd_ratio"] / (1 - group["momentum"])
    # SGDP projects a step only where the gradient is nearly at right angles to the weight. That is
    # so for every scale-invariant weight.
    return replace(sgd(group).projected(), decay=decay, coupled=False)


def adamp(group: Group) -> StepResponse | None:
    """AdamP (adamp): Adam whose steps are projected, with a decoupled decay."""
    unprojected = adam({**group, "decoupled_weight_decay": True})
    if unprojected is None:
        return None
    decay = group["weight_decay"] * group["wd_ratio"]
    return replace(unprojected.projected(), decay=decay)


def lion(group: Group) -> StepResponse:
    """Lion: the sign of an average of gradients."""
    inner, outer = group["betas"]
    average = StepResponse(group["lr"], 1 - inner, inner * (1 - outer), outer)
    newest, older = average.newest, average.older
    # The sign of a Gaussian average with autocorrelation ρ_k = ρ_1 · outer^(k-1) has the
    # autocorrelation (2/π) arcsin ρ_k (the arcsine law). The squared norm grows by its sum over all
    # lags k. Summed as arcsin's power series, because each power is a geometric series in k.
    correlation = (newest * older + older**2 * outer / (1 - outer**2)) / average.turn
    coherent: Number = 0.0
    coefficient = 1.0
    for power in range(1, 200, 2):
        coherent = coherent + coefficient * correlation**power / (1 - outer**power)
        coefficient *= power**2 / ((power + 1) * (power + 2))
    return StepResponse(
        group["lr"],
        1.0,
        growth=1 + 4 / math.pi * coherent,
        normalized=True,
        decay=group["weight_decay"],
    )
