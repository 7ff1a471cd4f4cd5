"""What the papers predict: the angular update, norm and relaxation time of an equilibrium.

Every prediction follows from one balance. A scale-invariant weight vector w has a gradient g =
g̃/‖w‖ at right angles to it, and an optimizer's step is lr · Σ_j c_j g_{t-j}. With S1 = Σ c_j and
S2 = Σ c_j², noise-dominated gradients, and E = E‖g̃‖² (or E = d, the number of entries of w, where
the optimizer normalizes the gradient):

- one step turns the vector by AU² = lr² S2 E / ‖w‖^(2+h), with h = 2, or h = 0 for a normalized
  gradient;
- its squared norm grows by lr² G E / ‖w‖^h. All later contributions of one gradient add up
  coherently: G = S1². Projected steps have no radial part: G = S2;
- decay shrinks the norm by the factor 1 - lr·λ_eff. λ_eff = λ decoupled, λ S1 coupled (decay inside
  the gradient). It grows like ‖w‖^m: m = 0 for weight decay, 1 for AWS (Adaptive Weight Shrink),
  one more where the optimizer divides the decay by the size of the gradient (Adam with coupled
  decay). It grows like lr^q: q = 0 as a rule, 1 for a corrected decay, -1 for a constant one.

Growth and decay balance at ‖w‖^P = lr G E ‖w‖^m / (2 λ_eff), P = 2 + h + m. There AU² = 2 lr λ_eff
S2 / G; a deviation of the norm fades as exp(-P lr λ_eff t); and after a drop of the learning rate
by k the new equilibrium norm is the old one divided by k^((1-q)/P).

Steps that are no sum of gradients fit in with a G that was derived or measured for them: Lion's
sign (the arcsine law), Muon's orthogonalisation (a table by the aspect of the matrix). G/S2 is the
coherence κ of noise. A cautious decay acts on about half of the entries, those that the step does
not lengthen: with a = lr·λ and κ the angle is θ² = x² + 2ax/π + a²/4, where κx² + (a/π)(3κ-1)x = a.

Real networks have a signal in their gradients as well: these are reference lines, not laws. Compare
them with RMS angles. Numbers may be floats or tensors of matching shapes throughout (``lr`` as a
tensor; norms of n vectors): nothing here waits for a device. ``None`` means "no prediction": an
optimizer that is not understood, or one without decay.

Over 500 lines, most of them docstrings: one balance and all that follows from it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from lightning_normdyn.optimizers.group_numbers import Group, Number, group_number, is_zero
from lightning_normdyn.optimizers.recognition import row_of
from lightning_normdyn.optimizers.step_response import Options, own_response, step_response
from lightning_normdyn.optimizers.step_rules import StepResponse, Subject

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "equilibrium_angular_update",
    "equilibrium_norm",
    "equivalent_hyperparameters",
    "lr_drop_exponent",
    "never_settles",
    "norm_transient",
    "relaxation_steps",
    "settles_at",
    "wrs_angular_update",
    "wrs_direction_lr",
]


# ------------------------------------------------------------------------------ the balance


def _energy(
    response: StepResponse, gradient_scale: Number | None, dim: int | None
) -> Number | None:
    """E of the module's docstring."""
    # A normalized gradient has entries of a known size, whatever the loss.
    if not response.normalized:
        return gradient_scale
    return None if dim is None else dim * response.entry_energy


def _norm(
    response: StepResponse, gradient_scale: Number | None, dim: int | None, norm: Number | None
) -> Number | None:
    """The norm at which growth and decay balance."""
    energy, decay = _energy(response, gradient_scale, dim), response.effective_decay
    if energy is None or decay is None or not _is_derived(response):
        return None
    # Both powers of ‖w‖ that a decay may grow with are taken out of it: it is the decay of a vector
    # of norm 1 that stands in the balance.
    if response.adaptive:
        if norm is None:
            return None
        decay = decay / norm
    if response.rough:
        if gradient_scale is None:
            return None
        decay = decay * (energy / gradient_scale) ** 0.5
    settled = (response.lr * response.norm_growth * energy / (2 * decay)) ** (1 / response.power)
    if not response.cautious:
        return settled
    half_decay = settled * 2 ** (1 / response.power)
    update = _cautious_update(response, decay)
    # The update, not the angle, is what falls as the norm grows.
    half_update = response.lr * decay / response.coherence
    return half_decay * (half_update / update**2) ** (1 / response.power)


def _cautious_update(response: StepResponse, decay: Number) -> Number:
    """x, the part of the angle at equilibrium that the optimizer's own update makes."""
    pull, coherence = response.lr * decay, response.coherence
    linear = pull / math.pi * (3 * coherence - 1)
    return ((linear**2 + 4 * coherence * pull) ** 0.5 - linear) / (2 * coherence)


def _is_derived(response: StepResponse) -> bool:
    """Whether the balance is known; a cautious decay was derived for steps that are plain sums of
    gradients, with entries of random sign."""
    plain = response.growth is None and not response.coupled and not response.adaptive
    return plain or not response.cautious


def _settled_decay(
    response: StepResponse, gradient_scale: Number | None, dim: int | None, norm: Number | None
) -> Number | None:
    """λ_eff, for Adam with coupled decay at the equilibrium norm; for AWS at the present one."""
    decay = response.effective_decay
    if not response.rough:
        return decay
    settled = _norm(response, gradient_scale, dim, norm)
    if settled is None or dim is None or gradient_scale is None or decay is None:
        return None
    if response.adaptive and norm is not None:
        decay = decay * settled / norm
    return decay * settled * (dim / gradient_scale) ** 0.5


# ------------------------------------------------------------------------------ predictions


def settles_at(
    response: StepResponse,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    norm: Number | None = None,
) -> tuple[Number, Number] | None:
    """`equilibrium_angular_update` and `relaxation_steps` of a response that is known already.

    Arguments as there.

    Example:
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> angle, steps = settles_at(step_response(torch.optim.SGD, group))
        >>> round(angle, 6), round(steps)
        (0.007255, 500)
    """
    # Both follow from the decay at the norm that is settled at, not at the present one.
    pull = _settled_decay(response, gradient_scale, dim, norm)
    if pull is None or not _is_derived(response):
        return None
    if response.cautious:
        update, shared = _cautious_update(response, pull), response.lr * pull
        angle = (update**2 + 2 * shared * update / math.pi + shared**2 / 4) ** 0.5
        # To first order half of the decay acts.
        return angle, _inverse(response.power * shared / 2)
    angle = (2 * response.lr * pull * response.turn / response.norm_growth) ** 0.5
    return angle, _inverse(response.power * response.lr * pull)


def _settles(
    optimizer_class: type,
    group: Group,
    gradient_scale: Number | None,
    dim: int | None,
    norm: Number | None,
    options: Options,
) -> tuple[Number | None, Number | None]:
    """`settles_at` of a class and group; two None without a prediction."""
    response = step_response(optimizer_class, group, **options)
    if response is None:
        return None, None
    settled = settles_at(response, gradient_scale=gradient_scale, dim=dim, norm=norm)
    return settled or (None, None)


def equilibrium_angular_update(
    optimizer_class: type,
    group: Group,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    norm: Number | None = None,
    **options: Unpack[Options],
) -> Number | None:
    r"""RMS angular update at equilibrium, in radians per optimizer step:
    :math:`\sqrt{2\eta\lambda_{eff} S_2/G}`.

    :math:`\sqrt{2\eta\lambda}` (NRQ paper, section 2.3) is its value for plain SGD only; SGD with
    momentum :math:`\beta` turns by
    :math:`\sqrt{2\eta\lambda/(1+\beta)}`, AdamW and SOAP by
    :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`, Muon by
    :math:`\sqrt{2\eta\lambda/\kappa_0}` with a :math:`\kappa_0` of 23 (square) to 33 (one row) at
    momentum 0.95. Adafactor and Adagrad have no equilibrium.

    Args:
        optimizer_class, group: class of the optimizer, and its param group.
        gradient_scale: E‖g‖²·‖w‖², measured; only Adam with coupled decay asks for it (and for
            ``dim``).
        dim: number of entries d of a vector; only for Adam with coupled decay.
        norm: the norm that ``shrink`` was evaluated at; only for AWS coupled to Adam.
        options: :class:`lightning_normdyn.optimizers.step_response.Options`. With ``shrink`` of
            shape (n,) the answer has shape (n,), and is that of the present norms. Muon asks for
            ``shape`` = (rows, columns). With ``step``, NAdam and RAdam are predicted as if their
            momentum and rate stayed as they are at that step.

    Returns:
        radians per step; ``None`` without decay, for an optimizer that is not understood, or where
        a number above is missing.

    Raises:
        TypeError: for an option that does not exist.

    Example:
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> round(equilibrium_angular_update(torch.optim.SGD, group), 6)
        0.007255
        >>> shrink = torch.tensor([5e-4, 2e-3])  # AWS with α‖w‖ of two filters
        >>> equilibrium_angular_update(torch.optim.SGD, group, shrink=shrink)
        tensor([0.0023, 0.0046])
        >>> equilibrium_angular_update(torch.optim.RMSprop, group) is None
        True
        >>> corrected = {"decay_rate": "lr_squared", "lr_max": 0.2}  # half of its peak
        >>> round(equilibrium_angular_update(torch.optim.SGD, group, **corrected), 6)
        0.001622
    """
    return _settles(optimizer_class, group, gradient_scale, dim, norm, options)[0]


def equilibrium_norm(
    optimizer_class: type,
    group: Group,
    gradient_scale: Number | None = None,
    *,
    dim: int | None = None,
    norm: Number | None = None,
    **options: Unpack[Options],
) -> Number | None:
    r"""Norm :math:`\sqrt{E\lVert w\rVert^2}` at equilibrium, in weight units: :math:`(\eta G
    E/2\lambda)^{1/P}` for a constant decay.

    Symbols as in the module's docstring.

    Args:
        optimizer_class, group, options: as for :func:`equilibrium_angular_update`.
        gradient_scale: L = E‖g‖²·‖w‖², measured; not asked for by AdamW, AdamP, Lion, whose norm
            does not depend on it.
        dim: number of entries d of a vector; asked for by the Adam family, Lion and Muon. With a
            ``shape``, that of the whole matrix by default.
        norm: the norm that ``shrink`` was evaluated at (AWS only).

    Returns:
        weight units; ``None`` without decay, for an optimizer that is not understood, or where a
        number above is missing.

    Example:
        >>> group = dict(lr=0.1, momentum=0.0, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> round(equilibrium_norm(torch.optim.SGD, group, gradient_scale=0.01), 6)
        1.0
        >>> aws = {"shrink": 2.5e-3 * 4.0, "norm": 4.0}  # α = 2.5e-3
        >>> round(equilibrium_norm(torch.optim.SGD, group, gradient_scale=0.01, **aws), 4)
        0.7248
    """
    response = step_response(optimizer_class, group, **options)
    if response is None:
        return None
    shape = options.get("shape")
    if dim is None and shape is not None:
        dim = math.prod(shape)
    return _norm(response, gradient_scale, dim, norm)


def relaxation_steps(
    optimizer_class: type,
    group: Group,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    norm: Number | None = None,
    **options: Unpack[Options],
) -> Number | None:
    """Optimizer steps in which a small deviation of the norm from equilibrium falls by the factor
    e: 1 / (P · lr · λ_eff).

    Arguments as for :func:`equilibrium_angular_update`. ``inf`` where the learning rate is 0.

    Example:
        >>> group = dict(lr=0.1, momentum=0.9, dampening=0, nesterov=False, weight_decay=5e-4)
        >>> round(relaxation_steps(torch.optim.SGD, group))
        500
    """
    return _settles(optimizer_class, group, gradient_scale, dim, norm, options)[1]


def lr_drop_exponent(
    optimizer_class: type, group: Group, **options: Unpack[Options]
) -> float | None:
    """The exponent e: when the learning rate falls by k, weights divided by k^e are at their new
    equilibrium norm at once; (1 - q)/P.

    1/4 for SGD (NRQ paper, "rescale"), 1/2 for the Adam family with decoupled decay, SOAP, Lion and
    Muon, 1/3 for Adam + L2, 1/5 for AWS on SGD, 1/3 for AWS on Adam. Twice that where the decay of
    a step is constant, and 0 where it falls with lr²: then the norm stays. Holds from an
    equilibrium.

    Args:
        optimizer_class, group: as for :func:`equilibrium_angular_update`.
        options: as there. Of ``shrink`` only whether it is given counts; neither ``shape`` nor
            ``step`` is needed.

    Example:
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
        >>> lr_drop_exponent(torch.optim.AdamW, group)
        0.5
        >>> lr_drop_exponent(torch.optim.AdamW, group, decay_rate="lr_squared")
        0.0
    """
    # The same at any shape.
    options.setdefault("shape", (1, 1))
    response = step_response(optimizer_class, group, **options)
    if response is None or response.decay is None or not _is_derived(response):
        return None
    return (1 - response.lr_power) / response.power


def never_settles(optimizer_class: type, group: Group) -> str | None:
    """Why weights under an optimizer have no equilibrium; None if nothing of the kind is known.

    Example:
        >>> never_settles(torch.optim.Adagrad, {"lr": 0.1})
        'its steps become ever shorter, as 1/√t'
    """
    row = row_of(optimizer_class, group)
    return None if row is None else row.never_settles


def norm_transient(
    steps: Number, norm: Number, equilibrium: Number, relaxation: Number, power: float = 4
) -> Number:
    """Norm after ``steps`` at a constant learning rate and decay: ‖w‖^P goes from its value at
    ``norm`` to its value at ``equilibrium`` exponentially.

    NRQ paper, eq. 17, for P = 4 (with M = ‖X‖²). Exact in the mean for a constant weight decay;
    under AWS only near equilibrium; in the Adam family only if the second moment forgets faster
    than the norm changes (1/(1 - β2) steps against ``relaxation``).

    Example:
        >>> round(norm_transient(500.0, 2.0, 1.0, 500.0), 4)
        1.5978
    """
    left = (norm**power - equilibrium**power) * _exp(-steps / relaxation)
    return (equilibrium**power + left) ** (1 / power)


class RescaledOptions(TypedDict, total=False):
    """What is measured of a weight under WRS, and done to it; each may be left out.

    Args:
        gradient_scale: E‖g‖²·‖w‖²; for SGD.
        dim: number of entries of a vector; for the Adam family and Lion.
        target_norm: norm right after a rescale; 1 if left out.
        projected: as in :class:`lightning_normdyn.optimizers.step_response.Options`.
    """

    gradient_scale: Number | None
    dim: int | None
    target_norm: Number
    projected: bool


def wrs_angular_update(
    optimizer_class: type,
    group: Group,
    every_n_steps: int,
    **options: Unpack[RescaledOptions],
) -> Number | None:
    r"""RMS angular update under WRS (rescaling to a fixed norm every :math:`\tau` steps, no decay),
    radians per step.

    Between two rescales the squared norm grows freely from :math:`N_0`, the square of
    ``target_norm``; the mean of AU² is then
    :math:`S_2 \ln(1 + q\eta^2 G E\tau/N_0^q)/(G q\tau)`, with q = 2, or 1 for a normalized
    gradient. With momentum, for
    :math:`\tau` well above its memory, and with the buffer rescaled together with the weight. In
    the Adam family, if the squared norm grows little within the memory of the second moment:
    otherwise the angle is smaller (measured: by 5 % where it grows by 11 %).

    Args:
        optimizer_class, group: as for :func:`equilibrium_angular_update`.
        every_n_steps: τ, in optimizer steps.
        options: :class:`RescaledOptions`.

    Example:
        >>> group = dict(lr=0.01, momentum=0.0, dampening=0, nesterov=False, weight_decay=0)
        >>> round(wrs_angular_update(torch.optim.SGD, group, 20, gradient_scale=4.0), 5)
        0.01992
    """
    free = _free_growth(optimizer_class, group, every_n_steps, **options)
    if free is None:
        return None
    response, q, relative_growth = free
    share = response.turn / response.norm_growth
    return (share * _log1p(relative_growth) / (q * every_n_steps)) ** 0.5


def wrs_direction_lr(
    optimizer_class: type,
    group: Group,
    every_n_steps: int,
    **options: Unpack[RescaledOptions],
) -> Number | None:
    """Mean of lr/‖w‖² between two rescales of WRS. Arguments as for :func:`wrs_angular_update`.

    Example:
        >>> group = dict(lr=0.01, momentum=0.0, dampening=0, nesterov=False, weight_decay=0)
        >>> round(wrs_direction_lr(torch.optim.SGD, group, 20, gradient_scale=4.0), 6)
        0.00996
    """
    free = _free_growth(optimizer_class, group, every_n_steps, **options)
    if free is None:
        return None
    response, q, relative_growth = free
    at_start = response.lr / options.get("target_norm", 1.0) ** 2
    # Without growth the norm stays, and the integral below is 0/0.
    if is_zero(relative_growth):
        return at_start
    # The integral of lr / N over the squared norm N, with dN/dt = lr² G E / N^(q-1).
    if q == 2:
        integral = (1 + relative_growth) ** 0.5 - 1
    else:
        integral = _log1p(relative_growth)
    return at_start * q * integral / relative_growth


def _free_growth(
    optimizer_class: type,
    group: Group,
    steps: int,
    *,
    gradient_scale: Number | None = None,
    dim: int | None = None,
    target_norm: Number = 1.0,
    projected: bool = False,
) -> tuple[StepResponse, int, Number] | None:
    """The response, q = 1 + h/2, and by how much N^q grows in ``steps`` without decay, relative to
    its start."""
    response = step_response(optimizer_class, group, projected=projected)
    if response is None:
        return None
    energy = _energy(response, gradient_scale, dim)
    if energy is None:
        return None
    q = 1 if response.normalized else 2
    growth = response.lr**2 * response.norm_growth * energy * steps
    return response, q, q * growth / target_norm ** (2 * q)


# -------------------------------------------------------------------- exact equivalences


def equivalent_hyperparameters(
    optimizer_class: type, group: Group, scale: float
) -> dict[str, Number] | None:
    """The hyperparameters under which weights started ``scale`` times as long take the same
    directions, step by step.

    Corollary 3 of the NRQ paper (SGD: lr·k², λ/k²), extended: Adam-like optimizers and Muon need
    lr·k and eps/k, and λ/k decoupled or λ/k² coupled. Momentum buffers, if there are any already,
    must be divided by k, second moments by k². The first steps of RAdam, which it does not divide
    by the size of the gradient, are as long as SGD's and so not the same.

    Args:
        optimizer_class, group: class of the optimizer, and its param group.
        scale: k > 0, the factor on the weights.

    Returns:
        the changed entries of the group; ``None`` for an optimizer that is not understood.

    Example:
        >>> group = dict(lr=0.1, momentum=0.0, dampening=0, nesterov=False, weight_decay=4e-4)
        >>> equivalent_hyperparameters(torch.optim.SGD, group, 2.0)
        {'lr': 0.4, 'weight_decay': 0.0001}
    """
    # What follows does not depend on a shape, but Muon has no response without one.
    response = own_response(optimizer_class, group, Subject(shape=(1, 1)))
    if response is None:
        return None
    # A gradient is 1/scale as long as before, a normalized one as long as before.
    faster = scale if response.normalized else scale**2
    weaker = scale**2 if response.coupled else faster
    changed: dict[str, Number] = {
        "lr": response.lr * faster,
        "weight_decay": group_number(group, "weight_decay") / weaker,
    }
    if response.normalized and "eps" in group:
        changed["eps"] = group_number(group, "eps") / scale
    return changed


# ------------------------------------------------- the same formula for floats and tensors


def _inverse(x: Number) -> Number:
    if is_zero(x):
        return math.inf
    return 1 / x


def _exp(x: Number) -> Number:
    if isinstance(x, Tensor):
        return torch.exp(x)
    return math.exp(x)


def _log1p(x: Number) -> Number:
    if isinstance(x, Tensor):
        return torch.log1p(x)
    return math.log1p(x)
