"""What the papers predict: the angular update, norm and relaxation time that an optimizer settles at, and the exact equivalences.

Every prediction follows from one balance. A scale-invariant weight vector w has a gradient g = g̃/‖w‖ at right angles to it, and an
optimizer's step is lr · Σ_j c_j g_{t-j}. With S1 = Σ c_j and S2 = Σ c_j², noise-dominated gradients, and E = E‖g̃‖² (or E = d, the number
of entries of w, where the optimizer normalizes the gradient):

- one step turns the vector by AU² = lr² S2 E / ‖w‖^(2+h), with h = 2, or h = 0 for a normalized gradient;
- its squared norm grows by lr² G E / ‖w‖^h. All later contributions of one gradient add up coherently: G = S1². Projected steps have no
  radial part: G = S2;
- decay shrinks the norm by the factor 1 - lr·λ_eff. λ_eff = λ decoupled, λ S1 coupled (decay inside the gradient). It grows like ‖w‖^m:
  m = 0 for weight decay, 1 for AWS (Adaptive Weight Shrink), one more where the optimizer divides the decay by the size of the gradient
  (Adam with coupled decay).

Growth and decay balance at ‖w‖^P = lr G E ‖w‖^m / (2 λ_eff), P = 2 + h + m. There AU² = 2 lr λ_eff S2 / G; a deviation of the norm fades
as exp(-P lr λ_eff t); and after a drop of the learning rate by k the new equilibrium norm is the old one divided by k^(1/P).

Real networks have a signal in their gradients as well: these are reference lines, not laws. Compare them with RMS angles. Numbers may be
floats or tensors of matching shapes throughout (``lr`` as a tensor; norms of n vectors): nothing here waits for a device, except where it
says "host". ``None`` means "no prediction": an optimizer that is not understood, or one without decay.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "StepResponse",
    "adam_collapse_steps",
    "e_foldings",
    "equilibrium_angular_update",
    "equilibrium_norm",
    "equivalent_hyperparameters",
    "free_decay_rate",
    "is_rough",
    "lr_drop_exponent",
    "norm_transient",
    "nrq_concentration",
    "nrq_limit_risk",
    "nrq_limit_risk_first_order",
    "nrq_norm",
    "relaxation_steps",
    "step_response",
    "steps_like",
    "steps_to_overflow",
    "steps_to_underflow",
    "total_decay",
    "verdict",
    "wrs_angular_update",
    "wrs_direction_lr",
]

Number: TypeAlias = float | Tensor


# ------------------------------------------------------------------------------------------------------------------------------------------
# How an optimizer's step answers its gradients
# ------------------------------------------------------------------------------------------------------------------------------------------


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


def _geometric(first: Number, second: Number, ratio: Number) -> tuple[Number, Number]:
    """S1 and S2 of the coefficients first, second, second·ratio, second·ratio², ...: every optimizer below is of this form."""
    return first + second / (1 - ratio), first**2 + second**2 / (1 - ratio**2)


def _sgd(group: Mapping[str, Any]) -> StepResponse:
    momentum = group["momentum"]
    kept = 1 - group["dampening"] if not _is_zero(momentum) else 1.0  # torch applies dampening to the momentum buffer only
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


def _own_response(optimizer_class: type, group: Mapping[str, Any]) -> StepResponse | None:
    for known, rule in _TORCH_RULES:
        if steps_like(optimizer_class, known):
            return rule(group)
    for known in optimizer_class.__mro__:
        rule_and_keys = _NAMED_RULES.get(known.__name__)
        if rule_and_keys is not None and steps_like(optimizer_class, known):
            named_rule, keys = rule_and_keys
            return named_rule(group) if all(key in group for key in ("lr", "weight_decay", *keys)) else None
    return None


def step_response(
    optimizer_class: type,
    group: Mapping[str, Any],
    *,
    shrink: Number | None = None,
    projected: bool = False,
    decay: Number | None = None,
    coupled: bool = False,
) -> StepResponse | None:
    """How the steps of a param group turn, grow and decay its weights; ``None`` for an optimizer that is not understood.

    Understood are torch's SGD (momentum, dampening, Nesterov), Adam and AdamW (no amsgrad), and by name SGDP, AdamP and Lion; subclasses
    that keep the step, too.

    Args:
        optimizer_class: class of the optimizer.
        group: its param group, as in ``optimizer.param_groups``.
        shrink: the weight decay that AWS (Adaptive Weight Shrink) amounts to at the present norm, α‖w‖ or α·std; replaces the group's.
        projected: the radial part of each step is removed (RadialProjection). A coupled decay is removed with it: give ``decay``.
        decay: weight decay applied by a callback instead of the group's.
        coupled: ``shrink`` or ``decay`` is added to the gradient (SGD and Adam). The callbacks of this package apply theirs to the weight.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> response = step_response(torch.optim.SGD, group)
        >>> round(response.total, 6), round(response.turn, 4), response.power
        (10.0, 5.2632, 4)
    """
    response = _own_response(optimizer_class, group)
    if response is None:
        return None
    if shrink is not None:
        response = replace(response, decay=shrink, coupled=coupled, adaptive=True)
    elif decay is not None:
        response = replace(response, decay=decay, coupled=coupled)
    elif projected and response.coupled:
        response = replace(response, decay=None)
    if projected:
        response = replace(response, growth=response.turn)
    return replace(response, decay=None) if response.decay is not None and _is_zero(response.decay) else response


def is_rough(optimizer_class: type, group: Mapping[str, Any], **options: Any) -> bool:
    """Whether a prediction for this group is a rough one: Adam with coupled decay. Takes the options of :func:`step_response`.

    Example:
        >>> is_rough(torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-4})
        True
    """
    response = step_response(optimizer_class, group, **options)
    return response is not None and response.rough


# ------------------------------------------------------------------------------------------------------------------------------------------
# Predictions
# ------------------------------------------------------------------------------------------------------------------------------------------


def _energy(response: StepResponse, gradient_scale: Number | None, dim: int | None) -> Number | None:
    """E of the module's docstring."""
    return dim if response.normalized else gradient_scale


def _norm(response: StepResponse, gradient_scale: Number | None, dim: int | None, norm: Number | None) -> Number | None:
    energy, decay = _energy(response, gradient_scale, dim), response.effective_decay
    if energy is None or decay is None:
        return None
    if response.adaptive:
        if norm is None:
            return None
        decay = decay / norm
    if response.rough:
        if gradient_scale is None:
            return None
        decay = decay * (energy / gradient_scale) ** 0.5  # the decay of a vector of norm 1, divided by the RMS of its gradient
    return (response.lr * response.growth * energy / (2 * decay)) ** (1 / response.power)


def _settled_decay(response: StepResponse, gradient_scale: Number | None, dim: int | None, norm: Number | None) -> Number | None:
    """λ_eff, for Adam + L2 at the equilibrium norm; for AWS at the present one."""
    if not response.rough:
        return response.effective_decay
    settled = _norm(response, gradient_scale, dim, norm)
    if settled is None or dim is None or gradient_scale is None or response.effective_decay is None:
        return None
    decay = response.effective_decay * settled / norm if response.adaptive and norm is not None else response.effective_decay
    return decay * settled * (dim / gradient_scale) ** 0.5


def equilibrium_angular_update(
    optimizer_class: type,
    group: Mapping[str, Any],
    *,
    shrink: Number | None = None,
    projected: bool = False,
    decay: Number | None = None,
    coupled: bool = False,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    norm: Number | None = None,
) -> Number | None:
    r"""RMS angular update at equilibrium, in radians per optimizer step: :math:`\sqrt{2\eta\lambda_{eff} S_2/G}`.

    :math:`\sqrt{2\eta\lambda}` (NRQ paper, section 2.3) is its value for plain SGD only; SGD with momentum :math:`\beta` turns by
    :math:`\sqrt{2\eta\lambda/(1+\beta)}`, AdamW by :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`.

    Args:
        optimizer_class, group, shrink, projected, decay, coupled: see :func:`step_response`. With ``shrink`` of shape (n,) the answer has
            shape (n,), and is that of the present norms.
        gradient_scale: E‖g‖²·‖w‖², measured; only Adam with coupled decay asks for it (and for ``dim``).
        dim: number of entries d of a vector; only for Adam with coupled decay.
        norm: the norm that ``shrink`` was evaluated at; only for AWS coupled to Adam.

    Returns:
        radians per step; ``None`` without decay, for an optimizer that is not understood, or where a number above is missing.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> round(equilibrium_angular_update(torch.optim.SGD, group), 6)
        0.007255
        >>> equilibrium_angular_update(torch.optim.SGD, group, shrink=torch.tensor([5e-4, 2e-3]))  # AWS with α‖w‖ of two filters
        tensor([0.0023, 0.0046])
        >>> equilibrium_angular_update(torch.optim.RMSprop, group) is None
        True
    """
    response = step_response(optimizer_class, group, shrink=shrink, projected=projected, decay=decay, coupled=coupled)
    if response is None:
        return None
    pull = _settled_decay(response, gradient_scale, dim, norm)
    return None if pull is None else (2 * response.lr * pull * response.turn / response.growth) ** 0.5


def equilibrium_norm(
    optimizer_class: type,
    group: Mapping[str, Any],
    gradient_scale: Number | None = None,
    *,
    dim: int | None = None,
    norm: Number | None = None,
    shrink: Number | None = None,
    projected: bool = False,
    decay: Number | None = None,
    coupled: bool = False,
) -> Number | None:
    r"""Norm :math:`\sqrt{E\lVert w\rVert^2}` at equilibrium, in weight units: :math:`(\eta G E/2\lambda)^{1/P}` for a constant decay.

    Symbols as in the module's docstring.

    Args:
        optimizer_class, group, shrink, projected, decay, coupled: see :func:`step_response`.
        gradient_scale: L = E‖g‖²·‖w‖², measured; not asked for by AdamW, AdamP, Lion, whose norm does not depend on it.
        dim: number of entries d of a vector; asked for by the Adam family and Lion.
        norm: the norm that ``shrink`` was evaluated at (AWS only).

    Returns:
        weight units; ``None`` without decay, for an optimizer that is not understood, or where a number above is missing.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> round(equilibrium_norm(torch.optim.SGD, group, gradient_scale=0.01), 6)  # (0.1 · 0.01 / 2 / 5e-4)^(1/4)
        1.0
        >>> round(equilibrium_norm(torch.optim.SGD, group, gradient_scale=0.01, shrink=2.5e-3 * 4.0, norm=4.0), 4)  # AWS, α = 2.5e-3
        0.7248
    """
    response = step_response(optimizer_class, group, shrink=shrink, projected=projected, decay=decay, coupled=coupled)
    return None if response is None else _norm(response, gradient_scale, dim, norm)


def relaxation_steps(
    optimizer_class: type,
    group: Mapping[str, Any],
    *,
    shrink: Number | None = None,
    projected: bool = False,
    decay: Number | None = None,
    coupled: bool = False,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    norm: Number | None = None,
) -> Number | None:
    """Optimizer steps in which a small deviation of the norm from equilibrium falls by the factor e: 1 / (P · lr · λ_eff).

    Arguments as for :func:`equilibrium_angular_update`. ``inf`` where the learning rate is 0.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 5e-4}
        >>> round(relaxation_steps(torch.optim.SGD, group))
        500
    """
    response = step_response(optimizer_class, group, shrink=shrink, projected=projected, decay=decay, coupled=coupled)
    if response is None:
        return None
    pull = _settled_decay(response, gradient_scale, dim, norm)
    return None if pull is None else _inverse(response.power * response.lr * pull)


def lr_drop_exponent(
    optimizer_class: type,
    group: Mapping[str, Any],
    *,
    shrink: Number | None = None,
    projected: bool = False,
    decay: Number | None = None,
    coupled: bool = False,
) -> float | None:
    """The exponent e: when the learning rate falls by k, weights divided by k^e are at their new equilibrium norm at once; 1/P.

    1/4 for SGD and SGDP (NRQ paper, "rescale"), 1/2 for AdamW, AdamP and Lion, 1/3 for Adam + L2, 1/5 for AWS on SGD, 1/3 for AWS on Adam.
    Holds from an equilibrium.

    Arguments as for :func:`step_response`; of ``shrink`` only whether it is given counts.

    Example:
        >>> lr_drop_exponent(torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1})
        0.5
    """
    response = step_response(optimizer_class, group, shrink=shrink, projected=projected, decay=decay, coupled=coupled)
    return None if response is None or response.decay is None else 1 / response.power


def norm_transient(steps: Number, norm: Number, equilibrium: Number, relaxation: Number, power: float = 4) -> Number:
    """Norm after ``steps`` at a constant learning rate and decay: ‖w‖^P goes from ``norm``^P to ``equilibrium``^P exponentially.

    NRQ paper, eq. 17, for P = 4 (with M = ‖X‖²). Exact in the mean for a constant weight decay; under AWS only near equilibrium; in the
    Adam family only if the second moment forgets faster than the norm changes (1/(1 - β2) steps against ``relaxation``).

    Example:
        >>> round(norm_transient(500.0, 2.0, 1.0, 500.0), 4)
        1.5978
    """
    return (equilibrium**power + (norm**power - equilibrium**power) * _exp(-steps / relaxation)) ** (1 / power)


def wrs_angular_update(
    optimizer_class: type,
    group: Mapping[str, Any],
    every_n_steps: int,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    target_norm: Number = 1.0,
    projected: bool = False,
) -> Number | None:
    r"""RMS angular update under WRS (rescaling to a fixed norm every :math:`\tau` steps, no decay), radians per step.

    Between two rescales the squared norm grows freely from :math:`N_0` = ``target_norm``²; the mean of AU² is then
    :math:`S_2 \ln(1 + q\eta^2 G E\tau/N_0^q)/(G q\tau)`, with q = 2, or 1 for a normalized gradient. With momentum, for
    :math:`\tau` well above its memory, and with the buffer rescaled together with the weight. In the Adam family, if the squared norm grows
    little within the memory of the second moment: otherwise the angle is smaller (measured: by 5 % where it grows by 11 %).

    Args:
        optimizer_class, group: see :func:`step_response`.
        every_n_steps: τ, in optimizer steps.
        gradient_scale: E‖g‖²·‖w‖²; for SGD.
        dim: number of entries of a vector; for the Adam family and Lion.
        target_norm: norm right after a rescale.
        projected: see :func:`step_response`.

    Example:
        >>> group = {"lr": 0.01, "momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": 0}
        >>> round(wrs_angular_update(torch.optim.SGD, group, 20, gradient_scale=4.0), 5)
        0.01992
    """
    free = _free_growth(optimizer_class, group, projected, every_n_steps, gradient_scale, dim, target_norm)
    if free is None:
        return None
    response, q, relative_growth = free
    return (response.turn / response.growth * _log1p(relative_growth) / (q * every_n_steps)) ** 0.5


def wrs_direction_lr(
    optimizer_class: type,
    group: Mapping[str, Any],
    every_n_steps: int,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    target_norm: Number = 1.0,
    projected: bool = False,
) -> Number | None:
    """Mean of lr/‖w‖² between two rescales of WRS. Arguments as for :func:`wrs_angular_update`.

    Example:
        >>> group = {"lr": 0.01, "momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": 0}
        >>> round(wrs_direction_lr(torch.optim.SGD, group, 20, gradient_scale=4.0), 6)
        0.00996
    """
    free = _free_growth(optimizer_class, group, projected, every_n_steps, gradient_scale, dim, target_norm)
    if free is None:
        return None
    response, q, relative_growth = free
    # The integral of lr / N over the squared norm N, with dN/dt = lr² G E / N^(q-1).
    integral = (1 + relative_growth) ** 0.5 - 1 if q == 2 else _log1p(relative_growth)
    return response.lr * q / target_norm**2 * _ratio(integral, relative_growth, limit=1 / q)


def _free_growth(
    optimizer_class: type,
    group: Mapping[str, Any],
    projected: bool,
    steps: int,
    gradient_scale: Number | None,
    dim: int | None,
    norm: Number,
) -> tuple[StepResponse, int, Number] | None:
    """The response, q = 1 + h/2, and by how much N^q grows in ``steps`` without decay, relative to its start."""
    response = step_response(optimizer_class, group, projected=projected)
    energy = None if response is None else _energy(response, gradient_scale, dim)
    if response is None or energy is None:
        return None
    q = 1 if response.normalized else 2
    return response, q, q * response.lr**2 * response.growth * energy * steps / norm ** (2 * q)


# ------------------------------------------------------------------------------------------------------------------------------------------
# Exact equivalences
# ------------------------------------------------------------------------------------------------------------------------------------------


def equivalent_hyperparameters(optimizer_class: type, group: Mapping[str, Any], scale: float) -> dict[str, Number] | None:
    """The hyperparameters under which weights started ``scale`` times as long take the same directions, step by step.

    Corollary 3 of the NRQ paper (SGD: lr·k², λ/k²), extended: Adam-like optimizers need lr·k and eps/k, and λ/k decoupled or λ/k² coupled.
    Momentum buffers, if there are any already, must be divided by k, second moments by k².

    Args:
        optimizer_class, group: see :func:`step_response`.
        scale: k > 0, the factor on the weights.

    Returns:
        the changed entries of the group; ``None`` for an optimizer that is not understood.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": 4e-4}
        >>> equivalent_hyperparameters(torch.optim.SGD, group, 2.0)
        {'lr': 0.4, 'weight_decay': 0.0001}
    """
    response = _own_response(optimizer_class, group)
    if response is None:
        return None
    faster = scale if response.normalized else scale**2  # a gradient is 1/scale as long, a normalized one as long as before
    changed: dict[str, Number] = {
        "lr": group["lr"] * faster,
        "weight_decay": group["weight_decay"] / (scale**2 if response.coupled else faster),
    }
    if response.normalized and "eps" in group:
        changed["eps"] = group["eps"] / scale
    return changed


# ------------------------------------------------------------------------------------------------------------------------------------------
# From numbers to words: the monitor's end table and its alarms (host side, plain floats)
# ------------------------------------------------------------------------------------------------------------------------------------------

SETTLED_DRIFT = 0.1  # |d ln‖w‖²| x relaxation time below which a norm counts as settled
AS_PREDICTED = (0.75, 1.33)  # angular update / prediction that counts as agreement


def e_foldings(steps: float, relaxation: float | None) -> float | None:
    """How many relaxation times ``steps`` optimizer steps are; below about six, the start is still felt. ``None`` without a prediction.

    Example:
        >>> e_foldings(3000, 500.0)
        6.0
    """
    return None if relaxation is None else steps / relaxation


def total_decay(optimizer_class: type, group: Mapping[str, Any], steps: int, **options: Any) -> float | None:
    """lr · λ_eff · steps: by how many powers of e the decay alone would shrink the norm. Far below 1, it cannot act (the usual AdamW trap).

    Takes the options of :func:`step_response`; host. ``None`` without decay, for an optimizer that is not understood, or where the decay
    depends on the gradient (Adam + L2).

    Example:
        >>> total_decay(torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-4}, 30_000)
        0.015
    """
    response = step_response(optimizer_class, group, **options)
    if response is None or response.rough or response.effective_decay is None:
        return None
    return float(response.lr * response.effective_decay * steps)


def free_decay_rate(optimizer_class: type, group: Mapping[str, Any], **options: Any) -> float | None:
    """-d ln‖w‖ per step of a vector that no gradient reaches (a dead filter): how fast decay alone shrinks it.

    For :func:`steps_to_underflow`. With decay inside the gradient, momentum β and dampening d: -ln|a|, with a the larger root of
    x² - (1 + β - lr·λ·(1-d))x + β. For lr·λ·(1-d) > (1-√β)² the roots are complex, |a| = √β, and more decay no longer kills faster.
    Takes the options of :func:`step_response`; host.

    Returns:
        the rate per step, ``inf`` where one step reaches zero; ``None`` without decay, for an optimizer that is not understood, and for
        Adam with coupled decay, under which a dead filter falls ever faster: :func:`adam_collapse_steps`.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 1e-2}
        >>> round(math.log(0.17 / 2.6e-23) / free_decay_rate(torch.optim.SGD, group))  # measured: 4490 steps
        4489
    """
    response = step_response(optimizer_class, group, **options)
    if response is None or response.rough or response.decay is None:
        return None
    pull = float(response.lr * response.decay)
    if not response.coupled:
        return -math.log1p(-pull) if pull < 1 else math.inf
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return _rate_of_recursion(1 + momentum - pull * (1 + momentum), momentum * (1 - pull))
    kept = 1 - float(group["dampening"]) if momentum else 1.0
    return _rate_of_recursion(1 + momentum - pull * kept, momentum)


def _rate_of_recursion(trace: float, determinant: float) -> float:
    """-ln|a|, with a the larger root of x² - trace·x + determinant: how fast w'' = trace·w' - determinant·w falls."""
    discriminant = trace**2 / 4 - determinant
    size = abs(trace) / 2 + math.sqrt(discriminant) if discriminant >= 0 else math.sqrt(determinant)
    return -math.log(size) if size > 0 else math.inf


def adam_collapse_steps(
    group: Mapping[str, Any], e_foldings: float, *, weight: float, second_moment: float, smallest_second_moment: float, step: float
) -> float:
    """Optimizer steps until Adam with coupled decay has shrunk a vector that no gradient reaches by ``e_foldings`` powers of e.

    The decay is all that is left of the gradient, and Adam divides it by the root of a second moment that remembers larger ones: a step
    is that of SGD with momentum β1, dampening β1 and the learning rate lr/(√v̂ + eps). As v is forgotten that rate grows by
    -ln(β2)/2 per step, the faster the entry falls, up to a rate of -ln(β1)/2, where it swings around zero; so λ hardly matters. Only
    where lr is small against the weight does the decay itself keep v up. A vector falls as its slowest entry, the one with the largest v.
    In the end, where lr·λ·(1-β1) exceeds 2(1+β1)(√v̂ + eps), swings grow again and hold v up: if its fastest entry gets there first, the
    vector never vanishes.

    Args:
        group: param group of a torch.optim.Adam: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        e_foldings: how far the vector has to fall.
        weight: size of its slowest entry now.
        second_moment: ``exp_avg_sq`` of its slowest entry now.
        smallest_second_moment: and of its fastest.
        step: Adam's step count now.

    Returns:
        steps; ``inf`` where it does not get there.

    Example:
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        >>> moment = 1e-3 * (1e-2 * 0.4) ** 2  # after the first step of a filter that never gets a gradient; measured: 3090 steps
        >>> fall = math.log(0.4 / 2.6e-23)
        >>> round(adam_collapse_steps(group, fall, weight=0.4, second_moment=moment, smallest_second_moment=0.01 * moment, step=1))
        3161
    """
    momentum, memory = (float(beta) for beta in group["betas"])
    decay, eps = float(group["weight_decay"]), float(group["eps"])
    if not memory > 0:
        return math.inf  # v is the last gradient: steps of the length lr forever
    forgotten = -math.log(memory)  # share of v per step
    gradient, passed = (decay * weight) ** 2, 0.0
    # At a time, what shrinks by a quarter of an e-folding or forgets a fifth of v; what takes more than so many is beyond any run.
    for _ in range(100_000):
        corrected = 1 - memory ** (max(step, 1.0) + passed)
        pulls = []
        for moment in (second_moment, smallest_second_moment):
            root = math.sqrt(moment / corrected) + eps
            pulls.append(float(group["lr"]) * decay * (1 - momentum) / root if root > 0 else math.inf)
        if not max(pulls) < 2 * (1 + momentum):
            return math.inf
        if e_foldings < 1e-9:
            return passed
        rate = _rate_of_recursion(1 + momentum - pulls[0], momentum)
        if not rate > 0:
            return math.inf
        time = min(0.25 / rate, 0.2 * corrected / forgotten, e_foldings / rate)
        kept, before = memory**time, gradient
        gradient *= math.exp(-2 * rate * time)
        second_moment = kept * second_moment + (1 - kept) * (before + gradient) / 2
        smallest_second_moment *= kept
        e_foldings -= rate * time
        passed += time
    return math.inf


def steps_to_underflow(size: float, rate: float, dtype: torch.dtype = torch.float32) -> float:
    """Steps until the square of a norm or standard deviation rounds to 0 in ``dtype`` (and dividing by it gives NaN) at the present rate.

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
    smallest = math.sqrt(limits.smallest_normal * limits.eps) * math.sqrt(0.5)  # below half the smallest subnormal a square rounds to zero
    if size <= smallest:
        return 0.0
    return math.log(size / smallest) / rate if rate > 0 else math.inf


def steps_to_overflow(size: float, rate: float, dtype: torch.dtype = torch.float32) -> float:
    """Steps until the square of a norm exceeds the largest number of ``dtype``, at the present growth ``rate`` = d ln(size) per step.

    ``inf`` where it does not grow.

    Example:
        >>> round(steps_to_overflow(1.0, 0.1))
        444
    """
    largest = math.sqrt(torch.finfo(dtype).max)
    if not size < largest:
        return 0.0
    return math.log(largest / size) / rate if rate > 0 and size > 0 else math.inf


def verdict(
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

    The ratio alone does not tell: a real network can be stationary far from the prediction, where its gradients carry a signal.

    Args:
        norm_drift_per_step: d ln‖w‖² per optimizer step, signed.
        relaxation: relaxation time in optimizer steps; ``None`` without a prediction.
        ratio: RMS angular update / prediction; ``None`` without one.
        lr_decay_change: relative change of lr x decay within the last relaxation time, e.g. 0.3 for 30 %.
        angular_update: RMS angular update, radians per step; tells frozen and collapsing weights.
        angle_floor: angle that counts as not turning at all: what rounding of float32 weights makes.
        power: P of the optimizer, :attr:`StepResponse.power`; for the steps left.
        age: how many steps ago the drift was that large: half of the window that it was measured over; for the steps left.

    Returns:
        "settled"; "settled, R x the prediction (below)" or "(above)"; "schedule faster than relaxation"; "approaching, about N steps left";
        "frozen" (does not turn); "collapsing" (does not turn, but shrinks: only the decay is left); or "no prediction".

    Example:
        >>> verdict(1e-5, 500.0, 0.97)
        'settled'
        >>> verdict(-2e-5, 500.0, 0.43)
        'settled, 0.43x the prediction (below)'
        >>> verdict(-6e-4, 500.0, 0.6)
        'approaching, about 896 steps left'
    """
    if norm_drift_per_step is None or not math.isfinite(norm_drift_per_step):
        return "no prediction"
    turning = angular_update if angular_update is not None else ratio
    if turning is not None and turning <= (angle_floor if angular_update is not None else 0.0):
        # What does not turn has no gradient. If its norm falls nevertheless, only the decay is left, and it will reach zero.
        return "collapsing" if norm_drift_per_step < -angle_floor else "frozen"
    if relaxation is None or ratio is None or not math.isfinite(ratio):
        return "no prediction"
    if lr_decay_change > 0.1 or not math.isfinite(relaxation):
        return "schedule faster than relaxation"
    drift = norm_drift_per_step * relaxation
    if abs(drift) < SETTLED_DRIFT:
        low, high = AS_PREDICTED
        return "settled" if low <= ratio <= high else f"settled, {ratio:.2g}x the prediction ({'below' if ratio < 1 else 'above'})"
    steps = max(_steps_to_settle(drift, ratio, power) * relaxation - age, 0.1 * relaxation)
    return f"approaching, about {_rounded(steps)} steps left"


def _steps_to_settle(drift: float, ratio: float, power: float) -> float:
    """Relaxation times until |drift| < SETTLED_DRIFT, with ``drift`` = d ln‖w‖² per relaxation time now.

    With x = (‖w‖/equilibrium)^P, drift = -(2/P)(1 - 1/x), and x - 1 falls as exp(-t).
    """
    inverse = 1 + power * drift / 2
    if inverse <= 0.01:
        # So far above that the norm falls as if there were no gradient: the drift no longer tells how far, but the angle does (AU² ~ 1/x).
        inverse = min(max(ratio**2, 1e-30), 0.01)
    target = 1 + math.copysign(power * SETTLED_DRIFT / 2, drift)
    return max(math.log((1 / inverse - 1) / (1 / target - 1)), 0.0)


def _rounded(steps: float) -> str:
    """Three significant digits, no exponent."""
    digits = max(0, math.floor(math.log10(steps)) - 2) if steps >= 1 else 0
    return f"{max(1, round(steps / 10**digits)) * 10**digits:,}".replace(",", " ")


# ------------------------------------------------------------------------------------------------------------------------------------------
# The Noisy Rayleigh Quotient (NRQ paper), with its formulas corrected
# ------------------------------------------------------------------------------------------------------------------------------------------
# L(X) = XᵀAX / 2XᵀX in p = `dim` dimensions; one eigenvalue of A is smaller than the others by `gap`; gradient noise of standard deviation
# `sigma` per coordinate; plain SGD with weight decay. The risk is 1 - f, with f the squared cosine to the best direction.


def nrq_concentration(lr: float, weight_decay: float, *, dim: int, sigma: float, gap: float = 1.0) -> float:
    r"""c of the stationary density :math:`\rho(f) \propto e^{cf} f^{-1/2}(1-f)^{(p-3)/2}` of the squared cosine f.

    :math:`c = gap\sqrt{p-1}/(\sigma\sqrt{2\eta\lambda})`: NRQ paper, eq. 25, where c = 2κ; the gap is missing from the printed κ.

    Example:
        >>> round(nrq_concentration(0.01, 0.01, dim=20, sigma=1.0), 2)
        308.22
    """
    return gap * math.sqrt(dim - 1) / (sigma * math.sqrt(2 * lr * weight_decay))


def nrq_limit_risk(concentration: float, dim: int) -> float:
    """Limit of the risk, E[1 - f] under the stationary density of :func:`nrq_concentration`, to about 12 digits for any concentration >= 0.

    Example:
        >>> round(nrq_limit_risk(308.22, 20), 5)  # simulated: 0.03082
        0.03087
        >>> round(nrq_limit_risk(0.0, 20), 6)  # no preferred direction: 1 - 1/p
        0.95
    """
    # In x = logit(u), u = 1 - f, the density is u^a (1-u)^(1/2) e^(-cu) with a = (p-1)/2: smooth, unimodal and with exponential tails, so
    # that equal steps are as good as any rule.
    a = (dim - 1) / 2
    spread = a + 0.5 + concentration
    root = math.sqrt(spread**2 - 4 * a * concentration)
    mode = 2 * a / (spread + root)
    width = 1 / math.sqrt(root * mode * (1 - mode))
    step = min(width, 1.0) / 4
    half = math.ceil(100 / step)  # both tails fall at least as exp(-|x|/2)
    logit = math.log(mode / (1 - mode)) + step * torch.arange(-half, half + 1, dtype=torch.float64)
    u = torch.sigmoid(logit)
    log_density = a * torch.nn.functional.logsigmoid(logit) + 0.5 * torch.nn.functional.logsigmoid(-logit) - concentration * u
    density = torch.exp(log_density - log_density.max())
    return float((density * u).sum() / density.sum())


def nrq_limit_risk_first_order(concentration: float, dim: int) -> float:
    """(p-1)/2c, the limit risk for small learning rate x decay: σ√(p-1)√(2ηλ) / (2 gap). NRQ paper, eq. 26, corrected.

    Example:
        >>> round(nrq_limit_risk_first_order(308.22, 20), 5)
        0.03082
    """
    return (dim - 1) / (2 * concentration)


def nrq_norm(steps: Number, norm: Number, lr: float, weight_decay: float, *, dim: int, sigma: float) -> Number:
    """E[‖X‖⁴]^(1/4) after ``steps``, from ``norm``: :func:`norm_transient` with E‖g̃‖² = (p-1)σ². NRQ paper, eq. 17, whose M is ‖X‖².

    Example:
        >>> round(nrq_norm(1e9, 5.0, 0.01, 0.01, dim=20, sigma=1.0), 4)  # ((p-1)σ²η/2λ)^(1/4)
        1.7556
    """
    equilibrium = ((dim - 1) * sigma**2 * lr / (2 * weight_decay)) ** 0.25
    return norm_transient(steps, norm, equilibrium, 1 / (4 * lr * weight_decay))


# ------------------------------------------------------------------------------------------------------------------------------------------
# The same formula for floats and tensors
# ------------------------------------------------------------------------------------------------------------------------------------------


def _is_zero(x: Number) -> bool:
    """Whether ``x`` is the number 0. A tensor is never looked into: that would wait for the device."""
    return not isinstance(x, Tensor) and x == 0


def _inverse(x: Number) -> Number:
    return math.inf if _is_zero(x) else 1 / x


def _ratio(x: Number, y: Number, *, limit: float) -> Number:
    return limit if _is_zero(y) else x / y


def _exp(x: Number) -> Number:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def _log1p(x: Number) -> Number:
    return torch.log1p(x) if isinstance(x, Tensor) else math.log1p(x)
