"""How an optimizer's step answers its gradients: the few numbers from which every prediction follows, per param group.

An optimizer's step is lr · Σ_j c_j g_{t-j}. Its sums S1 = Σ c_j and S2 = Σ c_j² say how far it turns a scale-invariant weight and how much
longer it makes it; what follows from them stands in `lightning_normdyn.equilibrium`. ``None`` means "not understood", never a guess.
Numbers may be floats or tensors; no tensor is looked into, so nothing waits for a device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Number", "Options", "StepResponse", "is_rough", "is_zero", "own_response", "step_response", "steps_like"]

Number: TypeAlias = float | Tensor


@dataclass(frozen=True)
class StepResponse:
    """The few numbers of a param group that decide the equilibrium of its weights.

    Args:
        lr: learning rate of the group.
        total: S1, what a constant gradient is multiplied by: a coupled decay acts ``total`` times.
        turn: S2, the squared length of a step per unit of E (see the module's docstring).
        growth: G, the growth of the squared norm per unit of E.
        normalized: the optimizer divides the gradient by its own size (Adam, Lion): h = 0, else h = 2.
        decay: λ in 1/(step·lr), as written in the group or given by a callback; for AWS, α‖w‖ or α·std at the present norm; ``None``
            without decay.
        coupled: the decay is added to the gradient (torch's SGD and Adam) rather than applied to the weight (AdamW).
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
        """Whether the decay is divided by the gradient's size (Adam + L2), which makes a prediction 13-38 % off on a real network."""
        return self.normalized and self.coupled

    @property
    def power(self) -> int:
        """P, the power of the norm that relaxes exponentially: 4 SGD, 2 AdamW, 3 Adam + L2, 5 AWS on SGD, 3 AWS on Adam."""
        return 2 + (0 if self.normalized else 2) + int(self.adaptive) + int(self.rough)

    @property
    def effective_decay(self) -> Number | None:
        """λ_eff of a decay that is not divided by the gradient's size: the norm shrinks by the factor 1 - lr·λ_eff per step."""
        return None if self.decay is None else self.decay * self.total if self.coupled else self.decay


class Options(TypedDict, total=False):
    """What callbacks do to a weight beside its optimizer; each may be left out.

    Args:
        shrink: the weight decay that AWS (Adaptive Weight Shrink) amounts to at the present norm, α‖w‖ or α·std; replaces the group's.
        projected: the radial part of each step is removed (RadialProjection). A coupled decay is removed with it: give ``decay``.
        decay: weight decay applied by a callback instead of the group's.
        coupled: ``shrink`` or ``decay`` is added to the gradient (SGD and Adam). The callbacks of this package apply theirs to the weight.
    """

    shrink: Number | None
    projected: bool
    decay: Number | None
    coupled: bool


def _geometric(first: Number, second: Number, ratio: Number) -> tuple[Number, Number]:
    """S1 and S2 of the coefficients first, second, second·ratio, second·ratio², ...: every optimizer below is of this form."""
    return first + second / (1 - ratio), first**2 + second**2 / (1 - ratio**2)


def _sgd(group: Mapping[str, Any]) -> StepResponse:
    momentum = group["momentum"]
    kept = 1 - group["dampening"] if not is_zero(momentum) else 1.0  # torch applies dampening to the momentum buffer only
    if group["nesterov"]:
        total, turn = _geometric(1 + momentum, momentum**2, momentum)
    else:
        total, turn = _geometric(kept, kept * momentum, momentum)
    return StepResponse(group["lr"], total, turn, total**2, normalized=False, decay=group["weight_decay"], coupled=True)


def _adam(group: Mapping[str, Any]) -> StepResponse | None:
    if group.get("amsgrad"):  # the largest second moment so far is no measure of the present gradient
        return None
    momentum = group["betas"][0]
    total, turn = _geometric(1 - momentum, (1 - momentum) * momentum, momentum)
    decoupled = group.get("decoupled_weight_decay", False)
    return StepResponse(group["lr"], total, turn, total**2, normalized=True, decay=group["weight_decay"], coupled=not decoupled)


def _adamw(group: Mapping[str, Any]) -> StepResponse | None:
    # torch before 2.7 has AdamW without the flag in the group.
    return _adam({**group, "decoupled_weight_decay": group.get("decoupled_weight_decay", True)})


def _sgdp(group: Mapping[str, Any]) -> StepResponse:
    base = _sgd(group)
    # SGDP divides its decoupled decay by 1 - momentum, to compare with SGD's coupled one; the gate is taken as open.
    decay = group["weight_decay"] * group["wd_ratio"] / (1 - group["momentum"])
    return replace(base, growth=base.turn, decay=decay, coupled=False)


def _adamp(group: Mapping[str, Any]) -> StepResponse | None:
    base = _adam({**group, "decoupled_weight_decay": True})
    return None if base is None else replace(base, growth=base.turn, decay=group["weight_decay"] * group["wd_ratio"])


def _lion(group: Mapping[str, Any]) -> StepResponse | None:
    if group.get("weight_decouple", True) is False or group.get("caution") or group.get("cautious"):
        return None
    inner, outer = group["betas"]
    first, second = 1 - inner, inner * (1 - outer)
    _, squares = _geometric(first, second, outer)
    # The step is the sign of a Gaussian average with autocorrelation ρ_k = ρ_1 · outer^(k-1). Signs then have autocorrelation
    # (2/π) arcsin ρ_k (the arcsine law), and the squared norm grows by its sum over all lags. arcsin is summed as its power series: each
    # power is a geometric series in k.
    correlation = (first * second + second**2 * outer / (1 - outer**2)) / squares
    coherent: Number = 0.0
    coefficient = 1.0
    for power in range(1, 200, 2):
        coherent = coherent + coefficient * correlation**power / (1 - outer**power)
        coefficient *= power**2 / ((power + 1) * (power + 2))
    return StepResponse(group["lr"], 1.0, 1.0, 1 + 4 / math.pi * coherent, normalized=True, decay=group["weight_decay"])


# A torch class is recognised by its step function. The others live in several packages (adamp, timm, lion_pytorch, ...): they are
# recognised by name, and by a group that has the keys which the rule needs.
_Rule: TypeAlias = Callable[[Mapping[str, Any]], StepResponse | None]
_TORCH_RULES: tuple[tuple[type[torch.optim.Optimizer], _Rule], ...] = (
    (torch.optim.SGD, _sgd),
    (torch.optim.AdamW, _adamw),  # before Adam: AdamW derives from it
    (torch.optim.Adam, _adam),
)
_NAMED_RULES: dict[str, tuple[_Rule, tuple[str, ...]]] = {
    "SGDP": (_sgdp, ("momentum", "dampening", "nesterov", "wd_ratio")),
    "AdamP": (_adamp, ("betas", "wd_ratio")),
    "Lion": (_lion, ("betas",)),
}


def _step_of(optimizer_class: type) -> Any:
    """The step function as it was written: torch wraps ``step`` on a class when the class is first instantiated."""
    return inspect.unwrap(getattr(optimizer_class, "step", _step_of))


def steps_like(optimizer_class: type, known: type) -> bool:
    """Whether ``optimizer_class`` steps exactly as ``known``: a subclass with a step of its own is an optimizer nobody has derived."""
    return issubclass(optimizer_class, known) and _step_of(optimizer_class) is _step_of(known)


def own_response(optimizer_class: type, group: Mapping[str, Any]) -> StepResponse | None:
    """`step_response` of the optimizer alone, with a decay of 0 as the number that it is."""
    for known, rule in _TORCH_RULES:
        if steps_like(optimizer_class, known):
            return rule(group)
    for known in optimizer_class.__mro__:
        rule_and_keys = _NAMED_RULES.get(known.__name__)
        if rule_and_keys is not None and steps_like(optimizer_class, known):
            named_rule, keys = rule_and_keys
            return named_rule(group) if all(key in group for key in ("lr", "weight_decay", *keys)) else None
    return None


def step_response(optimizer_class: type, group: Mapping[str, Any], **options: Unpack[Options]) -> StepResponse | None:
    """How the steps of a param group turn, grow and decay its weights; ``None`` for an optimizer that is not understood.

    Understood are torch's SGD (momentum, dampening, Nesterov), Adam and AdamW (no amsgrad), and by name SGDP, AdamP and Lion; subclasses
    that keep the step, too.

    Args:
        optimizer_class: class of the optimizer.
        group: its param group, as in ``optimizer.param_groups``.
        options: what callbacks do to its weights, :class:`Options`.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> response = step_response(torch.optim.SGD, group)
        >>> round(response.total, 6), round(response.turn, 4), response.power
        (10.0, 5.2632, 4)
    """
    response = own_response(optimizer_class, group)
    if response is None:
        return None
    shrink, decay, coupled = options.get("shrink"), options.get("decay"), options.get("coupled", False)
    projected = options.get("projected", False)
    if shrink is not None:
        response = replace(response, decay=shrink, coupled=coupled, adaptive=True)
    elif decay is not None:
        response = replace(response, decay=decay, coupled=coupled)
    elif projected and response.coupled:
        response = replace(response, decay=None)
    if projected:
        response = replace(response, growth=response.turn)
    return replace(response, decay=None) if response.decay is not None and is_zero(response.decay) else response


def is_rough(optimizer_class: type, group: Mapping[str, Any], **options: Unpack[Options]) -> bool:
    """Whether a prediction for this group is a rough one: Adam with coupled decay. ``options``: :class:`Options`.

    Example:
        >>> is_rough(torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-4})
        True
    """
    response = step_response(optimizer_class, group, **options)
    return response is not None and response.rough


def is_zero(x: Number) -> bool:
    """Whether ``x`` is the number 0. A tensor is never looked into: that would wait for the device."""
    return not isinstance(x, Tensor) and x == 0
