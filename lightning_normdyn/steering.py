r"""Rules that steer how far a step turns a weight and how much of its norm it may change, as
functions of three sums per vector.

With :math:`s` the weight before a step, :math:`w'` after it and :math:`\Delta=w'-s`, every rule
here ends in

.. math:: w \leftarrow c\,(s + f\,\Delta)

with a stretch :math:`f` that sets the angle and a factor :math:`c` that sets the norm. With
:math:`n=\lVert s\rVert`, :math:`r=\langle s,\Delta\rangle/n^2` and :math:`T` the length of
:math:`\Delta` across :math:`s`, a step stretched by :math:`f` turns the weight by
:math:`\operatorname{atan2}(fT,\,n(1+fr))`.

Legend: ``n`` vectors. Sums are ``(n,)``, as
:func:`lightning_normdyn.functional.displacement_sums` gives them; they have to be float64, since
:math:`T` is a small difference of large numbers. What cannot be done for a vector is NaN, so that
a caller can leave it alone and count it.

Sources: "Hyperball" is arXiv 2606.16899; "rotational optimizers" is *Rotational Equilibrium*
(arXiv 2305.17212, ICML 2024); floors and radial brakes are those of the public optimizer
benchmarks (modded-nanogpt, track 3, pull requests 272, 294 and 328; NVIDIA-NeMo
Emerging-Optimizers).
"""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "brake_factor",
    "rotation_stretch",
    "step_tangent",
    "stretch_step",
    "stretch_to_tangent",
    "stretched_norm",
]

Bound = Literal["exact", "at_least", "at_most"]
Change = Literal["norm", "radial"]
Scalar = float | Tensor


def rotation_stretch(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
    angle: Scalar,
    bound: Bound = "exact",
) -> Tensor:
    r"""By which factor a step must be stretched so that it turns each vector by ``angle``:
    :math:`f = n\tan\theta / (T - n r\tan\theta)`.

    Args:
        ww: ``(n,)``, :math:`\langle s,s\rangle`.
        wd: ``(n,)``, :math:`\langle s,\Delta\rangle`.
        dd: ``(n,)``, :math:`\langle\Delta,\Delta\rangle`.
        angle: :math:`\theta`, radians per step, in [0, π/2); a number or ``(n,)``.
        bound: ``"exact"``: every step turns by ``angle``; ``"at_least"``: shorter turns become
            it (a floor), longer ones stay (f = 1); ``"at_most"``: a cap.

    Returns:
        ``(n,)``, ≥ 0; 0 for an angle of 0. NaN where no stretch turns the vector so far: it has no
        length, its step has no part across it, or goes outwards so steeply that no multiple of it
        turns by ``angle``.

    Example:
        >>> ww, wd, dd = torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> f = rotation_stretch(ww, wd, dd, math.atan(0.25))  # the step turns by atan(0.5)
        >>> f.round(decimals=4)
        tensor([0.5000])
        >>> rotation_stretch(ww, wd, dd, math.atan(0.25), "at_least")
        tensor([1.])
    """
    theta = _like(angle, ww)
    across = _across(ww, wd, dd)
    norm = ww.sqrt()
    # From the angle and not from its tangent: a step that points backwards turns by more than π/2.
    now = torch.atan2(across, norm + wd / norm)
    tangent = theta.tan()
    stretch = tangent * norm / (across - tangent * wd / norm)
    is_reached = (across > 0) & stretch.isfinite() & (stretch > 0) & (theta < math.pi / 2)
    stretch = stretch.where(is_reached, math.nan)
    # To turn by nothing is to make no step, whatever the step is.
    stretch = stretch.where((theta != 0) | ~(norm > 0), 0.0)
    return _bounded(stretch, now, theta, bound)


def step_tangent(ww: Tensor, wd: Tensor, dd: Tensor) -> Tensor:
    r"""Tangent of the angle that a step turns each vector by, :math:`T/(n(1+r))`.

    Args:
        ww, wd, dd: ``(n,)`` each, as for :func:`rotation_stretch`.

    Returns:
        ``(n,)``; NaN where the vector has no length, or the step has no part across it or points
        backwards (turns by π/2 or more).

    Example:
        >>> step_tangent(torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.5000])
    """
    across = _across(ww, wd, dd)
    along = (ww + wd) / ww.sqrt()
    tangent = across / along
    return tangent.where((across > 0) & (along > 0) & tangent.isfinite(), math.nan)


def stretch_to_tangent(tangent: Tensor, angle: Scalar, bound: Bound = "exact") -> Tensor:
    r"""By which factor steps are stretched whose usual angle is known:
    :math:`f=\tan\theta/\sqrt{\hat q}` (rotational optimizers).

    With :math:`\hat q` a running mean of :math:`\tan^2`, steps that are longer than usual stay
    longer than usual: only their mean is set.

    Args:
        tangent: ``(n,)``, :math:`\sqrt{\hat q}`.
        angle: :math:`\theta`, as for :func:`rotation_stretch`.
        bound: as there.

    Returns:
        ``(n,)``; 0 for an angle of 0; NaN where ``tangent`` is not positive.

    Example:
        >>> stretch_to_tangent(torch.tensor([0.5]), math.atan(0.25))
        tensor([0.5000])
    """
    theta = _like(angle, tangent)
    stretch = theta.tan() / tangent
    is_reached = (tangent > 0) & stretch.isfinite() & (stretch > 0) & (theta < math.pi / 2)
    stretch = stretch.where(is_reached, math.nan).where(theta != 0, 0.0)
    return _bounded(stretch, tangent.atan(), theta, bound)


def stretched_norm(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
    stretch: Scalar = 1.0,
) -> Tensor:
    r"""Norm of each vector after a stretched step, :math:`\lVert s+f\Delta\rVert`.

    Args:
        ww, wd, dd: ``(n,)`` each, as for :func:`rotation_stretch`.
        stretch: :math:`f`; a number or ``(n,)``.

    Returns:
        ``(n,)``, in weight units.

    Example:
        >>> ww, wd, dd = torch.tensor([4.0]), torch.tensor([1.0]), torch.tensor([2.5])
        >>> stretched_norm(ww, wd, dd, 2.0)
        tensor([4.2426])
    """
    # Rounding may leave less than nothing of a step that ends at zero.
    square = ww + stretch * (2 * wd + stretch * dd)
    return square.clamp(min=0).sqrt()


def brake_factor(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
    outward: float,
    inward: float,
    change: Change = "norm",
) -> Tensor:
    r"""By which factor each vector is multiplied so that only a share k of the change of its norm
    is left.

    ``change="norm"`` brakes all of it: the norm becomes :math:`n + k(n'-n)`, with
    :math:`n'=\lVert s+\Delta\rVert` (Emerging-Optimizers' hook). ``change="radial"`` leaves the
    braked first-order part alone, :math:`n(1+kr)`, and removes what turning adds (modded-nanogpt
    294). k is ``outward`` where the norm, or :math:`r`, grows, else ``inward``.

    Args:
        ww, wd, dd: ``(n,)`` each, as for :func:`rotation_stretch`.
        outward: share in [0, 1]; 0 stops growth.
        inward: share in [0, 1]; with both 0 the norm is pinned.
        change: see above.

    Returns:
        ``(n,)``; NaN where a vector has no length before or after the step.

    Example:
        >>> ww, wd, dd = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([3.0])  # n' = 2
        >>> brake_factor(ww, wd, dd, outward=0.5, inward=1.0)
        tensor([0.7500])
        >>> brake_factor(ww, wd, dd, outward=0.5, inward=1.0, change="radial")
        tensor([0.5000])
    """
    before = ww.sqrt()
    after = stretched_norm(ww, wd, dd)
    if change == "norm":
        # As a quotient: the difference of the norms themselves would lose most of its digits.
        growth = (2 * wd + dd) / (after + before)
        share = _share(growth, outward, inward)
        factor = 1 - (1 - share) * growth / after
    else:
        share = _share(wd, outward, inward)
        factor = (ww + share * wd) / (before * after)
    is_known = (before > 0) & factor.isfinite() & (factor > 0)
    return factor.where(is_known, math.nan)


def stretch_step(
    before: Tensor,
    after: Tensor,
    stretch: Scalar = 1.0,
    scale: Scalar = 1.0,
) -> Tensor:
    r"""The weight that a steered step ends at, :math:`c\,(s+f\,(w'-s))`.

    Args:
        before: ``(n, ...)``, :math:`s`.
        after: the same shape, :math:`w'`.
        stretch: :math:`f`; a number or ``(n,)``.
        scale: :math:`c`; a number or ``(n,)``.

    Returns:
        the shape of ``after``.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> stretch_step(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), 0.5, 2.0)
        tensor([[2., 1.]])
    """
    # Broadcasting would silently compare every vector with one.
    if before.shape != after.shape:
        raise ValueError(
            f"`before` and `after` must have the same shape, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    rows = (-1, *[1] * (after.dim() - 1))
    by = _like(stretch, after).reshape(rows)
    factor = _like(scale, after).reshape(rows)
    return torch.lerp(before, after, by) * factor


def _across(ww: Tensor, wd: Tensor, dd: Tensor) -> Tensor:
    """T, the length of the step across the vector."""
    square = dd - wd.square() / ww
    # What is left of a difference of equal numbers is rounding, and no turn. NaN stays NaN.
    rounding = 16 * torch.finfo(square.dtype).eps * dd
    return square.where(~(square <= rounding), 0.0).sqrt()


def _bounded(stretch: Tensor, now: Tensor, angle: Tensor, bound: Bound) -> Tensor:
    """``stretch`` where the step as it is, which turns by ``now``, is on the wrong side."""
    if bound == "at_least":
        return stretch.where(~(now >= angle), 1.0)
    if bound == "at_most":
        return stretch.where(~(now <= angle), 1.0)
    return stretch


def _share(change: Tensor, outward: float, inward: float) -> Tensor:
    kept = torch.full_like(change, inward)
    return kept.where(~(change > 0), outward)


def _like(value: Scalar, other: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype=other.dtype, device=other.device)
    # Filled there: a number that is sent would make the host wait.
    return other.new_full((), value)
