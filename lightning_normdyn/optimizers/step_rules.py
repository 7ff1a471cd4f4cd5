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
from typing import NamedTuple, TypedDict

from torch import Tensor

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
        memory: c_{j+1} / c_j of all earlier ones, below 1. Where steps are no sum of gradients
            (Lion, Muon; ``older`` is 0), how they forget: the correlation of two steps falls by
            about this from one lag to the next.
        growth: G, the growth of the squared norm per unit of E (see
            `lightning_normdyn.theory.equilibrium`); None: that of steps that are not projected,
            ``total``².
        normalized: the optimizer divides the gradient by its own size (Adam, Lion).
        decay: λ in 1/(step·lr), as written in the group or given by a callback; for AWS, α‖w‖ or
            α·std at the present norm; ``None`` without decay.
        coupled: the decay is added to the gradient (torch's SGD and Adam) rather than applied to
            the weight (AdamW).
        adaptive: the decay itself is proportional to ‖w‖ (AWS).
        lr_power: q, where the decay itself is proportional to lr^q: 1 for a corrected decay, -1 for
            a constant one.
        cautious: the decay acts only on entries that the step does not lengthen.
        entry_energy: where ``normalized``, the mean square of an entry of what the coefficients
            weigh.
        energy_is_rough: that number is an average over shapes, good to some percent of the norm.
            The angle at equilibrium does not depend on it.
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
    lr_power: int = 0
    cautious: bool = False
    entry_energy: Number = 1.0
    energy_is_rough: bool = False

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

    @property
    def correlation(self) -> Number:
        """ρ_1 of two steps in a row; that of later ones falls as ρ_1 · memory^(k-1)."""
        repeated = self.older**2 * self.memory / (1 - self.memory**2)
        return (self.newest * self.older + repeated) / self.turn

    @property
    def coherence(self) -> Number:
        """κ0: growth of ln‖w‖² per squared angle that steps of pure noise turn; 1 for steps that
        forget each other."""
        return self.norm_growth / self.turn

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


class _OwnDecay(TypedDict):
    decay: Number | None
    coupled: bool


class Subject(NamedTuple):
    """Of which weight, and when, a step is meant. Few optimizers ask.

    Args:
        shape: rows and columns of the matrix that is orthogonalised (Muon).
        step: number of the step of that weight, from 1 (NAdam, RAdam); None: the limit.
    """

    shape: tuple[int, int] | None = None
    step: Number | None = None


ResponseRule = Callable[[Group], StepResponse | None]
"""Param group -> how its steps answer gradients; None for settings that nobody has derived."""

SubjectRule = Callable[[Group, Subject], StepResponse | None]
"""The same where the answer depends on the weight or on the number of the step."""


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
    # The sign of a Gaussian average with autocorrelation ρ_k = ρ_1 · outer^(k-1) has the
    # autocorrelation (2/π) arcsin ρ_k (the arcsine law). The squared norm grows by its sum over all
    # lags k. Summed as arcsin's power series, because each power is a geometric series in k.
    correlation = average.correlation
    coherent: Number = 0.0
    coefficient = 1.0
    for power in range(1, 200, 2):
        coherent = coherent + coefficient * correlation**power / (1 - outer**power)
        coefficient *= power**2 / ((power + 1) * (power + 2))
    return StepResponse(
        group["lr"],
        1.0,
        memory=outer,
        growth=1 + 4 / math.pi * coherent,
        normalized=True,
        decay=group["weight_decay"],
    )


def soap(group: Group) -> StepResponse | None:
    """SOAP: Adam in a basis that follows the gradients. Noise is the same in every basis."""
    return adam({**group, "decoupled_weight_decay": True})


def nadam(group: Group, subject: Subject) -> StepResponse:
    """torch's NAdam: Nesterov's momentum μ_t inside Adam, which rises over thousands of steps."""
    first = group["betas"][0]
    present, _ = nadam_momenta(group, subject.step)
    return StepResponse(
        group["lr"],
        1 - first * present,
        present * (1 - first) * first,
        first,
        normalized=True,
        **_flagged_decay(group),
    )


def nadam_momenta(group: Group, step: Number | None) -> tuple[Number, Number]:
    """μ_t and μ_{t+1} of NAdam; at its limit without a step."""
    first = group["betas"][0]
    pace = group["momentum_decay"]
    if step is None:
        limit = 0.5 * first if is_zero(pace) else first
        return limit, limit
    present = first * (1 - 0.5 * 0.96 ** (step * pace))
    following = first * (1 - 0.5 * 0.96 ** ((step + 1) * pace))
    return present, following


def radam(group: Group, subject: Subject) -> StepResponse | None:
    """torch's RAdam: Adam with a rate that is rectified while its second moment is young."""
    rectified = radam_rectification(group["betas"][1], subject.step)
    as_adam = adam(group)
    if rectified is None or as_adam is None:
        return None
    return replace(as_adam, entry_energy=rectified**2, **_flagged_decay(group))


def radam_rectification(second: Number, step: Number | None) -> Number | None:
    """r_t of RAdam, what its rate is multiplied by; 1 at its limit, without a step.

    None where RAdam does not divide by the second moment at all: while fewer than five gradients
    count in it.
    """
    # Whether it is rectified decides between two rules, and a tensor may be on a device.
    if isinstance(second, Tensor) or isinstance(step, Tensor):
        return None
    longest = 2 / (1 - second) - 1
    if step is None:
        return 1.0 if longest > 5 else None
    left = second**step
    length = longest - 2 * step * left / (1 - left)
    if length <= 5:
        return None
    square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(square)


def _flagged_decay(group: Group) -> _OwnDecay:
    """The decay of an optimizer of torch that decouples it by a flag."""
    if group.get("decoupled_weight_decay"):
        return {"decay": group["weight_decay"], "coupled": False}
    # Inside the gradient it is divided by the gradient's size, and what that comes to here has been
    # derived for a course only.
    return {"decay": None, "coupled": True}


# Of torch's Newton-Schulz iteration in its default setting: the correlation of two orthogonalised
# matrices is Σ a_i ρ^p_i of that ρ of the matrices. Fitted to Monte Carlo of Gaussian matrices from
# 128 columns on (error below .003), by the ratio of a matrix's shorter side to its longer.
_MUON_POWERS = (1, 3, 5, 9, 17, 33)
_MUON_BY_ASPECT = (
    (0.0, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    (0.125, (0.9781, 0.0246, -0.0432, 0.0615, -0.0313, 0.0103)),
    (0.25, (0.9256, 0.0126, 0.0352, 0.0336, -0.0124, 0.0054)),
    (0.5, (0.842, 0.0781, 0.0363, 0.0309, 0.01, 0.0027)),
    (0.75, (0.7266, 0.1516, 0.025, 0.0656, 0.0212, 0.01)),
    (1.0, (0.6603, 0.1595, 0.0084, 0.1631, -0.0897, 0.0984)),
)
_MUON_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_MUON_STEPS = 5
# Mean square of a singular value after that iteration: .62 to .83, by shape.
_MUON_SINGULAR_SQUARE = 0.78


def muon(group: Group, subject: Subject) -> StepResponse | None:
    """torch's Muon: an average of gradients, orthogonalised as a matrix."""
    is_default = tuple(group["ns_coefficients"]) == _MUON_COEFFICIENTS
    if subject.shape is None or not is_default or group["ns_steps"] != _MUON_STEPS:
        return None
    momentum = group["momentum"]
    average = StepResponse(group["lr"], 1 - momentum, (1 - momentum) * momentum, momentum)
    if group["nesterov"]:
        average = replace(
            average,
            newest=(1 - momentum) * (1 + momentum),
            older=(1 - momentum) * momentum**2,
        )
    rows, columns = subject.shape
    rank = min(rows, columns)
    # As Lion's sign does, the orthogonalisation forgets a part of the correlation: a polynomial of
    # it, of which each power is a geometric series over all lags.
    correlation = average.correlation
    coherent: Number = 0.0
    for power, share in zip(_MUON_POWERS, _muon_shares(rank / max(rows, columns)), strict=True):
        coherent = coherent + share * correlation**power / (1 - momentum**power)
    longer_rate = _muon_rate_factor(group["adjust_lr_fn"], rows, columns)
    return StepResponse(
        group["lr"],
        1.0,
        memory=momentum,
        growth=1 + 2 * coherent,
        normalized=True,
        decay=group["weight_decay"],
        entry_energy=_MUON_SINGULAR_SQUARE * rank * longer_rate**2 / (rows * columns),
        energy_is_rough=True,
    )


def _muon_shares(aspect: float) -> list[float]:
    """The coefficients at an aspect, linear between the rows of the table."""
    above = next(i for i, (known, _) in enumerate(_MUON_BY_ASPECT) if i and known >= aspect)
    (low, shares_below), (high, shares_above) = _MUON_BY_ASPECT[above - 1 : above + 1]
    weight = (aspect - low) / (high - low)
    pairs = zip(shares_below, shares_above, strict=True)
    return [below + weight * (beyond - below) for below, beyond in pairs]


def _muon_rate_factor(adjustment: object, rows: int, columns: int) -> float:
    """What Muon multiplies its rate by for a shape."""
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
