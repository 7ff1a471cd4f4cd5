r"""The papers' formulas on tensors: no module, no optimizer, no process group.

Every formula of the package stands here once, in float64 and in the form of its paper. What runs
over large weights in another form (lightning_normdyn/geometry/passes.py) is tested against these.
Over 500 lines, most of them docstrings: a reader looks for a formula on one page.

Legend: ``n`` weight vectors of ``d`` entries each. A weight is given as ``(n, d)`` or ``(n, ...)``:
everything behind the first dimension is one vector.

Two rules hold for every function here.

- **Precision.** Sums are accumulated in float64. The result is float64 for float64 inputs and
  float32 for float32, bfloat16 and float16 inputs. The four formulas of the balance take sequences
  and arrays besides, and their results are always float64: numpy's, or a tensor if one was given.
- **Vectors that have no answer.** A *measurement* that needs a direction is NaN for a vector that
  is zero or holds an infinity or a NaN, so that a caller can leave it out of an average and count
  it; an *action* on such a vector is the identity (factor 1, nothing projected), so that it is left
  alone. The exceptions are :func:`gradient_cosine`, which is 0 where one of the two vectors is
  zero, as the gate of SGDP and AdamP has it, and :func:`radial_coefficient`, which is also what a
  projection takes away.

Sources: "AWS paper" is *Understanding the Disharmony between Weight Normalization Family and Weight
Decay* (AAAI 2020); "WRS paper" is *The Implicit Biases of Stochastic Gradient Descent on Deep
Neural Networks with Batch Normalization*; "SGDP/AdamP" is *Slowing Down the Weight Norm Increase in
Momentum-based Optimizers*.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = [
    "angle_from_sums",
    "angular_update",
    "balanced_angular_update",
    "coherence",
    "coherence_error",
    "cosine_from_sums",
    "direction_lr",
    "displacement_sums",
    "effective_lr",
    "effective_step_size",
    "equivalent_weight_decay",
    "generalized_gaussian_shape",
    "gradient_cosine",
    "in_span_energy",
    "input_space_basis",
    "input_space_projection",
    "loss_decay",
    "moment_sums",
    "norm_from_sums",
    "project_tangent",
    "radial_coefficient",
    "remove_radial",
    "rescale_factor",
    "shrink_factor",
    "spectral_rank",
    "std_from_sums",
    "weight_norm",
    "weight_std",
]

Scalar = float | Tensor

# Below this factor AWS stops following its formula: at 0 the direction would be lost and below 0 it
# would turn round.
MIN_SHRINK_FACTOR = 0.5


def weight_norm(weight: Tensor) -> Tensor:
    r"""Euclidean norm of each weight vector, :math:`\lVert w\rVert_2`.

    Args:
        weight: ``(n, ...)``, any floating dtype.

    Returns:
        ``(n,)``, in weight units; 0 for a zero vector, NaN or infinity where the weight has them.

    Raises:
        ValueError: if ``weight`` has fewer than two dimensions.

    Example:
        >>> weight_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    rows = _rows(weight)
    return _narrow(rows.square().sum(1).sqrt(), weight)


def weight_std(weight: Tensor) -> Tensor:
    r"""Standard deviation of each weight vector, biased: :math:`\sqrt{\frac1d\sum_i (w_i-\bar
    w)^2}` (AWS paper, eq. 3 and 25).

    It is the size that matters for weight-standardized weights; for a centred vector it is the norm
    divided by :math:`\sqrt d`.

    Args:
        weight: ``(n, ...)``, any floating dtype.

    Returns:
        ``(n,)``, in weight units; 0 for a constant vector.

    Raises:
        ValueError: if ``weight`` has fewer than two dimensions.

    Example:
        >>> weight_std(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
        tensor([1., 0.])
    """
    # Not from sums of squares, which lose everything when the mean is large against the spread.
    return _narrow(_rows(weight).std(1, correction=0), weight)


def effective_lr(lr: Scalar, norm: Tensor) -> Tensor:
    r"""Effective learning rate of the AWS paper, :math:`\eta/\lVert w\rVert` (eq. 12, Figures 2 and
    4).

    For weight-standardized weights it is :math:`\eta/\mathrm{std}` (eq. 13). With :math:`\eta` =
    ``lr`` and :math:`\lVert w\rVert` = ``norm`` (give :func:`weight_std` for weight-standardized
    weights). It governs the direction under Adam-like optimizers; under SGD read
    :func:`direction_lr`.

    Args:
        lr: learning rate, as in ``param_groups``; a number or a tensor that broadcasts to ``(n,)``.
        norm: ``(n,)``, norm or standard deviation of each vector.

    Returns:
        ``(n,)``; NaN where the norm is zero or not finite. Log the mean of this, not ``lr /
        norm.mean()`` (Jensen).

    Example:
        >>> effective_lr(0.1, torch.tensor([0.5, 2.0, 0.0]))
        tensor([0.2000, 0.0500,    nan])
    """
    wide = _wide(norm)
    return _narrow(_where_directed(wide, lr / wide), norm)


def direction_lr(lr: Scalar, norm: Tensor) -> Tensor:
    r"""Learning rate of the direction, :math:`\eta/\lVert w\rVert^2`, or
    :math:`\eta/\mathrm{std}^2` (van Laarhoven; Hoffer et al.).

    With :math:`\eta` = ``lr`` and :math:`\lVert w\rVert` = ``norm``. Under plain SGD, :math:`\hat
    w_{t+1}-\hat w_t\approx-\eta/\lVert w\rVert^2` times the gradient at unit norm, so equal
    ``direction_lr`` means equal trajectories; under Adam-like optimizers read :func:`effective_lr`.

    Args:
        lr: learning rate, as in ``param_groups``; a number or a tensor that broadcasts to ``(n,)``.
        norm: ``(n,)``, norm or standard deviation of each vector.

    Returns:
        ``(n,)``; NaN where the norm is zero or not finite.

    Example:
        >>> direction_lr(0.1, torch.tensor([0.5, 2.0]))
        tensor([0.4000, 0.0250])
    """
    wide = _wide(norm)
    return _narrow(_where_directed(wide, lr / wide.square()), norm)


def equivalent_weight_decay(alpha: Scalar, norm: Tensor) -> Tensor:
    r"""The weight decay that shrinks as much as AWS does now, :math:`\lambda = \alpha\lVert
    w\rVert` (AWS paper, eq. 20).

    For weight-standardized weights it is :math:`\alpha\,\mathrm{std}`.

    Args:
        alpha: the AWS coefficient.
        norm: ``(n,)``, norm or standard deviation of each vector.

    Returns:
        ``(n,)``, in units of ``weight_decay`` in ``param_groups``.

    Example:
        >>> equivalent_weight_decay(2.5e-3, torch.tensor([2.0]))
        tensor([0.0050])
    """
    return _narrow(alpha * _wide(norm), norm)


def angular_update(before: Tensor, after: Tensor) -> Tensor:
    r"""Angle between each vector before and after one optimizer step, :math:`\angle(w_t, w_{t+1})`.

    The part of ``after`` across ``before`` is formed explicitly, with one re-orthogonalisation, and
    put into ``atan2``: the relative error stays below 1e-3 from 1e-6 rad to :math:`\pi`, also when
    the norm changes in the same step. (``arccos`` of the cosine returns 0 for angles below 3e-4 in
    float32.) The angle is that of the *stored* values: bfloat16 weights turn by about 2.5e-3 rad
    from rounding alone.

    Args:
        before: ``(n, ...)``, the weight before the step.
        after: the same shape, the weight after the step.

    Returns:
        ``(n,)``, radians per step, in :math:`[0, \pi]`; NaN where one of the vectors is zero or not
        finite.

    Raises:
        ValueError: if the shapes differ or have fewer than two dimensions.

    Example:
        >>> angular_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]]))  # pi / 4
        tensor([0.7854])
    """
    old, new = _same_rows(before=before, after=after)
    unit = old / old.square().sum(1, keepdim=True).sqrt()  # NaN for a zero vector, and so the angle
    along = (new * unit).sum(1, keepdim=True)
    across = new - along * unit
    # The first subtraction leaves a radial part of about 1e-16 of the norm; a second one makes it
    # 1e-16 of what is left.
    across = across - (across * unit).sum(1, keepdim=True) * unit
    angle = torch.atan2(across.square().sum(1).sqrt(), along.squeeze(1))
    return _narrow(angle.where(new.square().sum(1) > 0, math.nan), before, after)


def effective_step_size(angle: Tensor) -> Tensor:
    r"""Distance between the unit vectors before and after a step, :math:`\lVert\hat w_{t+1}-\hat
    w_t\rVert = 2\sin(\theta/2)` (SGDP/AdamP).

    Args:
        angle: ``(n,)``, :math:`\theta`, the angular update in radians.

    Returns:
        ``(n,)``, a chord of the unit sphere, in [0, 2]; NaN where the angle is.

    Example:
        >>> effective_step_size(torch.tensor([0.01, torch.pi]))
        tensor([0.0100, 2.0000])
    """
    return _narrow(2 * torch.sin(_wide(angle) / 2), angle)


def shrink_factor(
    norm: Tensor,
    lr: Scalar,
    alpha: Scalar,
) -> Tensor:
    r"""Factor by which AWS multiplies each vector in one optimizer step, :math:`1-\eta\alpha\lVert
    w\rVert` (AWS paper, eq. 21).

    With :math:`\eta` = ``lr``, :math:`\alpha` = ``alpha`` and :math:`\lVert w\rVert` = ``norm``,
    all of them before the step. Exact down to 0.5 and clamped there (the paper has no clamp; at 0
    the direction would be lost, below 0 it would turn round): compare with 0.5 to count the clamped
    vectors.

    Args:
        norm: ``(n,)``, norm or standard deviation of each vector before the step.
        lr: learning rate that this step uses; a number or a tensor that broadcasts to ``(n,)``.
        alpha: the AWS coefficient, > 0.

    Returns:
        ``(n,)``, in [0.5, 1] for positive ``lr`` and ``alpha``; 1 (left alone) where the norm is
        not finite.

    Example:
        >>> shrink_factor(torch.tensor([1.0, 2.0, 1000.0]), 0.1, 0.1)
        tensor([0.9900, 0.9800, 0.5000])
    """
    wide = _wide(norm)
    factor = factor_of_share(shrink_share(wide, lr, alpha))
    return _narrow(factor.where(wide.abs() < math.inf, 1.0), norm)


def shrink_share(norm: Tensor, lr: Scalar, alpha: Scalar) -> Tensor:
    r"""The share of itself that AWS takes from each vector, :math:`\eta\alpha\lVert w\rVert`, if it
    is not clamped; arguments as of :func:`shrink_factor`.

    Example:
        >>> shrink_share(torch.tensor([1.0, 2.0]), 0.1, 0.1)
        tensor([0.0100, 0.0200])
    """
    return lr * alpha * norm


def factor_of_share(share: Tensor) -> Tensor:
    """:func:`shrink_factor` from :func:`shrink_share`, for norms that are finite.

    Example:
        >>> factor_of_share(torch.tensor([0.25, 10.0]))
        tensor([0.7500, 0.5000])
    """
    return (1 - share).clamp(min=MIN_SHRINK_FACTOR)


def rescale_factor(norm: Tensor, target_norm: Scalar) -> Tensor:
    r"""Factor that gives each vector the norm ``target_norm`` (WRS paper, weight rescaling:
    :math:`w\leftarrow w/\lVert w\rVert`).

    Args:
        norm: ``(n,)``, norm of each vector.
        target_norm: the norm wanted; a number or ``(n,)``.

    Returns:
        ``(n,)``; 1 (left alone) where there is no positive finite factor: a zero or non-finite
        norm, a target of zero.

    Example:
        >>> rescale_factor(torch.tensor([4.0, 0.0]), 1.0)
        tensor([0.2500, 1.0000])
    """
    factor = target_norm / _wide(norm)
    return _narrow(factor.where((factor > 0) & (factor < math.inf), 1.0), norm)


def project_tangent(update: Tensor, weight: Tensor) -> Tensor:
    r"""Remove from each update its part along the weight, :math:`\Pi_w(x) = x - (\hat w\cdot
    x)\,\hat w` (SGDP/AdamP, "Projected updates").

    Args:
        update: ``(n, ...)``, :math:`x`.
        weight: the same shape, :math:`w`.

    Returns:
        the shape of ``update``; the update itself where the weight is zero or where one of the two
        is not finite.

    Raises:
        ValueError: if the shapes differ or have fewer than two dimensions.

    Example:
        >>> project_tangent(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([[0., 1.]])
    """
    x, w = _same_rows(update=update, weight=weight)
    along = radial_coefficient(w.square().sum(1), (w * x).sum(1)).unsqueeze(1)
    # where: a coefficient of 0 times an infinite entry would still be NaN.
    projected = x.where(along == 0, x - along * w)
    return _narrow(projected.reshape(update.shape), update, weight)


def remove_radial(
    before: Tensor,
    after: Tensor,
    share: Scalar = 0.0,
) -> Tensor:
    r"""Remove from a step its part along the weight, and a share of the weight with it:
    :math:`w' \leftarrow w + \Pi_w(w'-w) - \sigma\,w` (SGDP/AdamP, "Projected updates").

    With :math:`\sigma` = ``share``: a decoupled weight decay of :math:`\eta\lambda`, which a
    projection alone would remove from the step as well.

    Args:
        before: ``(n, ...)``, :math:`w`, the weight before the step.
        after: the same shape, :math:`w'`, the weight after the step.
        share: :math:`\sigma`; a number or ``(n,)``.

    Returns:
        the shape of ``after``; ``after`` itself where a vector of ``before`` is zero, or where one
        of the two is not finite.

    Raises:
        ValueError: if the shapes differ or have fewer than two dimensions.

    Example:
        >>> remove_radial(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]]), share=0.1)
        tensor([[1.8000, 1.0000]])
    """
    ww, wd, _ = displacement_sums(before, after)
    old, new = _rows(before), _rows(after)
    removed = wd / ww + share
    changed = new - removed.unsqueeze(1) * old
    treated = removed.isfinite().unsqueeze(1)
    return _narrow(changed.where(treated, new).reshape(after.shape), before, after)


def gradient_cosine(weight: Tensor, grad: Tensor) -> Tensor:
    r"""Cosine between each vector and its gradient, :math:`\cos(w, g)`: 0 for a scale-invariant
    weight, up to the normalization's eps.

    Args:
        weight: ``(n, ...)``.
        grad: the same shape.

    Returns:
        ``(n,)``, in [-1, 1]; 0 where one of the vectors is zero, NaN where one is not finite.

    Raises:
        ValueError: if the shapes differ or have fewer than two dimensions.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> gradient_cosine(weight, torch.tensor([[0.0, 5.0], [3.0, 4.0]]))
        tensor([0.0000, 0.6000])
    """
    w, g = _same_rows(weight=weight, grad=grad)
    cosine = cosine_from_sums(w.square().sum(1), (w * g).sum(1), g.square().sum(1))
    return _narrow(cosine, weight, grad)


# ---- The same formulas from per-vector sums, for weights that lie in pieces. ----
# Angles need the sums in float64.


def moment_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""What :func:`std_from_sums` takes: :math:`\langle w,w\rangle` and :math:`\langle 1,w\rangle`.

    Args:
        weight: ``(n, ...)``, any floating dtype.

    Returns:
        Two tensors ``(n,)``, float64.

    Raises:
        ValueError: if ``weight`` has fewer than two dimensions.

    Example:
        >>> moment_sums(torch.tensor([[1.0, 3.0]]))
        (tensor([10.], dtype=torch.float64), tensor([4.], dtype=torch.float64))
    """
    rows = _rows(weight)
    return rows.square().sum(1), rows.sum(1)


def displacement_sums(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""What :func:`angle_from_sums` takes of a step :math:`\Delta=w'-w`: :math:`\langle
    w,w\rangle`, :math:`\langle w,\Delta\rangle` and :math:`\langle\Delta,\Delta\rangle`.

    Args:
        before: ``(n, ...)``, :math:`w`, the weight before the step.
        after: the same shape, :math:`w'`, the weight after the step.

    Returns:
        Three tensors ``(n,)``, float64.

    Raises:
        ValueError: if the shapes differ or have fewer than two dimensions.

    Example:
        >>> before, after = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> [x.item() for x in displacement_sums(before, after)]
        [1.0, 0.0, 4.0]
    """
    old, new = _same_rows(before=before, after=after)
    step = new - old
    return old.square().sum(1), (old * step).sum(1), step.square().sum(1)


def norm_from_sums(ww: Tensor) -> Tensor:
    r""":func:`weight_norm` from :math:`\langle w,w\rangle`.

    Args:
        ww: ``(n,)``, sum of squares of each vector.

    Returns:
        ``(n,)``.

    Example:
        >>> norm_from_sums(torch.tensor([25.0]))
        tensor([5.])
    """
    return _narrow(_wide(ww).sqrt(), ww)


def std_from_sums(
    ww: Tensor,
    w1: Tensor,
    length: Scalar,
) -> Tensor:
    r""":func:`weight_std` from :math:`\langle w,w\rangle`, :math:`\langle 1,w\rangle` and the
    number of entries.

    One pass, so digits are lost where the mean is large against the standard deviation: in float64,
    a relative error of about 1e-16 times (mean/std) squared.

    Args:
        ww: ``(n,)``, sum of squares of each vector.
        w1: ``(n,)``, sum of the entries.
        length: :math:`d`, the number of entries; a number or ``(n,)``.

    Returns:
        ``(n,)``.

    Example:
        >>> std_from_sums(torch.tensor([10.0]), torch.tensor([4.0]), 2)  # of [1, 3]
        tensor([1.])
    """
    variance = _wide(ww) / length - (_wide(w1) / length).square()
    return _narrow(variance.clamp(min=0).sqrt(), ww, w1)


def angle_from_sums(
    ww: Tensor,
    wd: Tensor,
    dd: Tensor,
) -> Tensor:
    r""":func:`angular_update` from three sums over the vector :math:`w` and its step
    :math:`\Delta=w'-w`.

    :math:`\theta=\mathrm{atan2}(\sqrt{\langle\Delta,\Delta\rangle-\langle w,\Delta\rangle^2/\langle
    w,w\rangle},\; (\langle w,w\rangle+\langle w,\Delta\rangle)/\lVert w\rVert)`. The difference
    cancels, so the sums have to be float64: then the relative error is below 1e-3 from 1e-6 rad on,
    also when the norm changes by a factor between 0.5 and 20 in the same step. What rounding leaves
    of it in a step that only shortens or lengthens (a decay alone, a vector of one entry) is taken
    for the zero that it is.

    Args:
        ww: ``(n,)``, :math:`\langle w,w\rangle` before the step.
        wd: ``(n,)``, :math:`\langle w,\Delta\rangle`.
        dd: ``(n,)``, :math:`\langle\Delta,\Delta\rangle`.

    Returns:
        ``(n,)``, radians per step; NaN where the vector before or after the step is zero or not
        finite.

    Example:
        >>> w, delta = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> angle_from_sums(w @ w, w @ delta, delta @ delta)
        tensor(0.7854)
    """
    old, product, step = _wide(ww), _wide(wd), _wide(dd)
    square = step - product.square() / old
    # What is left of a difference of equal numbers. NaN stays: it is 0/0, a vector of length zero.
    rounding = 16 * torch.finfo(square.dtype).eps * step
    is_angle = (square > rounding) | square.isnan()
    across = square.where(is_angle, 0.0).sqrt()
    along = (old + product) / old.sqrt()
    # atan2(0, 0) would be 0, but a vector that has become zero has no direction.
    has_direction = (across > 0) | (along != 0)
    angle = torch.atan2(across, along).where(has_direction, math.nan)
    return _narrow(angle, ww, wd, dd)


def radial_coefficient(ww: Tensor, wd: Tensor) -> Tensor:
    r"""Part of a step along the weight, as a multiple of the weight: :math:`\langle
    w,\Delta\rangle/\langle w,w\rangle`.

    It is both the logged ``radial_update`` (:math:`\langle\Delta,\hat w\rangle/\lVert w\rVert`) and
    what a projection takes away: :math:`\Pi_w(\Delta)=\Delta - c\,w`.

    Args:
        ww: ``(n,)``, :math:`\langle w,w\rangle`.
        wd: ``(n,)``, :math:`\langle w,\Delta\rangle`.

    Returns:
        ``(n,)``; 0 (nothing to take away) where the vector is zero or something is not finite.

    Example:
        >>> radial_coefficient(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0]))
        tensor([0.2500, 0.0000])
    """
    coefficient = _wide(wd) / _wide(ww)
    return _narrow(coefficient.where(coefficient.isfinite(), 0.0), ww, wd)


def cosine_from_sums(
    ww: Tensor,
    wg: Tensor,
    gg: Tensor,
) -> Tensor:
    r""":func:`gradient_cosine` from :math:`\langle w,w\rangle`, :math:`\langle w,g\rangle`,
    :math:`\langle g,g\rangle`.

    Args:
        ww: ``(n,)``, :math:`\langle w,w\rangle`.
        wg: ``(n,)``, :math:`\langle w,g\rangle`.
        gg: ``(n,)``, :math:`\langle g,g\rangle`.

    Returns:
        ``(n,)``, in [-1, 1]; 0 where one of the vectors is zero, NaN where one is not finite.

    Example:
        >>> cosine_from_sums(torch.tensor([4.0]), torch.tensor([6.0]), torch.tensor([25.0]))
        tensor([0.6000])
    """
    norms = _wide(ww).sqrt() * _wide(gg).sqrt()
    cosine = (_wide(wg) / norms).clamp(-1, 1)
    return _narrow(cosine.where(norms != 0, 0.0), ww, wg, gg)


# ---- What holds a norm: any vector, any optimizer, any loss ----
# One step turns w by θ and changes ln‖w‖² by: 2⟨u, w⟩/‖w‖² + ‖u‖²/‖w‖² - 2 pull, with the relative
# decay ``pull`` of the step and everything else, u. How much the first two come to per θ² is the
# coherence of the steps.

Numbers = ArrayLike | Tensor


def coherence(
    norm_first: Numbers,
    norm_last: Numbers,
    pulls: Numbers,
    squared_angles: Numbers,
) -> Any:
    r"""Growth of :math:`\ln\lVert w\rVert^2` per squared angle turned, decay apart, over a window:
    :math:`\kappa = [\ln(N_b/N_a) - 2\sum\ln(1-\delta_t)]/\sum\theta_t^2`.

    With :math:`N = \lVert w\rVert^2`. It is 1 for steps that forget each other,
    :math:`(1+\beta)/(1-\beta)` for noise under heavy ball and Adam, larger where the loss pushes
    outwards, and negative where it pulls inwards more than turning grows. It needs no scale
    invariance and no known optimizer.

    Args:
        norm_first: :math:`\sqrt{N_a}`, before the first step; a number or ``(n,)``.
        norm_last: :math:`\sqrt{N_b}`, after the last step.
        pulls: :math:`\delta_t`, the relative decay of each step (lr · λ if decoupled), ``(T,)`` or
            ``(T, n)``; a single number is that of the only step.
        squared_angles: :math:`\theta_t^2` of each step, rad², of the same shape; or parts of their
            sum, such as one trapezoid per pair of logged steps.

    Returns:
        a number or ``(n,)``; NaN where nothing has turned.

    Example:
        >>> float(coherence(1.0, 1.0, [1e-4] * 50, [1e-5] * 50).round(3))  # settled
        20.001
    """
    xp, (first, last, shares, squares) = _doubles(norm_first, norm_last, pulls, squared_angles)
    with np.errstate(all="ignore"):
        decayed = _over_steps(xp.log1p(-shares))
        turned = _over_steps(squares)
        growth = 2 * xp.log(last / first) - 2 * decayed
        return _as_number(xp.where(turned > 0, growth / turned, math.nan))


def balanced_angular_update(pull: Numbers, coherence: Numbers) -> Any:
    r"""The angle per step at which turning and decay hold the norm: :math:`\sqrt{2\delta/\kappa}`.

    Args:
        pull: :math:`\delta`, relative decay of one step.
        coherence: :math:`\kappa`, as :func:`coherence` measures it.

    Returns:
        radians per step; NaN where :math:`\kappa \le 0`: there the loss alone holds the norm.

    Example:
        >>> float(balanced_angular_update(1e-4, 20.0).round(6))
        0.003162
    """
    xp, (share, kappa) = _doubles(pull, coherence)
    with np.errstate(all="ignore"):
        angle = xp.sqrt(2 * share / kappa)
        return _as_number(xp.where(kappa > 0, angle, math.nan))


def loss_decay(
    pull: Numbers,
    lr: Numbers,
    drift: Numbers,
    angle: Numbers,
    noise_coherence: Numbers,
) -> Any:
    r"""What the loss itself decays a weight by, as a weight decay:
    :math:`\lambda_{loss} = (\kappa_0\theta^2/2 - \mathrm{drift} - \delta)/\eta`.

    Positive where the loss pulls the norm inwards, negative where it pushes outwards. Compare it
    with ``pull / lr``, the decay that was asked for.

    Args:
        pull: :math:`\delta`, relative decay of one step.
        lr: :math:`\eta`, learning rate of the step.
        drift: change of :math:`\ln\lVert w\rVert` per step.
        angle: :math:`\theta`, radians per step.
        noise_coherence: :math:`\kappa_0`, the coherence of pure noise under the optimizer:
            (1 + β)/(1 - β) under heavy ball, Adam and AdamW.

    Returns:
        1/(step · lr), as a weight decay.

    Example:
        >>> float(loss_decay(3e-4, 1e-3, 0.0, 1e-2, 19.0).round(6))
        0.65
    """
    xp, (share, rate, change, theta, noise) = _doubles(pull, lr, drift, angle, noise_coherence)
    with np.errstate(all="ignore"):
        inwards = noise * xp.square(theta) / 2 - change - share
        return _as_number(inwards / rate)


def coherence_error(
    angle: Numbers,
    coherence: Numbers,
    steps: Numbers,
    entries: Numbers,
) -> Any:
    r"""Relative error (standard deviation) of a measured coherence:
    :math:`2/(\theta\sqrt{|\kappa| T d})`.

    Args:
        angle: :math:`\theta`, RMS over the window, radians per step.
        coherence: :math:`\kappa`, as measured.
        steps: :math:`T`, of the window.
        entries: :math:`d`, of the vector or matrix.

    Example:
        >>> float(coherence_error(5e-3, 19.0, 200, 4096).round(3))
        0.101
    """
    xp, (theta, kappa, length, size) = _doubles(angle, coherence, steps, entries)
    with np.errstate(all="ignore"):
        return _as_number(2 / (theta * xp.sqrt(xp.abs(kappa) * length * size)))


def _doubles(*values: Numbers) -> tuple[Any, list[Any]]:
    """Numbers as float64, and the library that has formulas for them: torch, on the device of those
    that are tensors, or numpy without any, which takes half as long for few numbers."""
    devices = [value.device for value in values if isinstance(value, Tensor)]
    if not devices:
        return np, [np.asarray(value, dtype=np.float64) for value in values]
    # Apple GPUs have no float64.
    dtype = torch.float32 if devices[0].type == "mps" else torch.float64
    tensors = []
    for value in values:
        given = value if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
        tensors.append(torch.as_tensor(given, dtype=dtype, device=devices[0]))
    return torch, tensors


def _over_steps(x: Any) -> Any:
    return x if x.ndim == 0 else x.sum(0)


def _as_number(result: Any) -> Any:
    """A tensor or an array as it is; of numpy's arrays without dimensions the number."""
    return result if isinstance(result, Tensor) else result[()]


# ---- What the weights look like in the space of their inputs (WRS paper) ----


def input_space_basis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of an input covariance, largest first (WRS paper, input space
    projection).

    Args:
        covariance: ``(d, d)``, symmetric: the covariance of a layer's inputs (for a convolution, of
            its patches), divided by the sample count.

    Returns:
        ``(eigenvalues, basis)``, ``(d,)`` descending and ``(d, d)`` with the eigenvectors as
        columns, orthonormal.

    Raises:
        ValueError: if ``covariance`` is not a square matrix.

    Example:
        >>> eigenvalues, basis = input_space_basis(torch.diag(torch.tensor([1.0, 3.0])))
        >>> eigenvalues, basis.abs()
        (tensor([3., 1.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(
            f"`covariance` must be a square matrix (d, d), got shape {tuple(covariance.shape)}."
        )
    eigenvalues, basis = torch.linalg.eigh(_wide(covariance))
    return _narrow(eigenvalues.flip(0), covariance), _narrow(basis.flip(1), covariance)


def input_space_projection(
    weight: Tensor,
    covariance: Tensor,
    rank: int | None = None,
) -> Tensor:
    r"""Coordinates of each vector in the eigenbasis of its inputs, :math:`V = W U` (WRS paper,
    input space projection, Figures 5 and 6).

    Without ``rank`` this is a *rotation*: the square basis, every norm kept. With ``rank`` it is
    *truncated* to the leading coordinates and the norms shrink (the paper's eq. 28 holds for the
    square basis only); :func:`in_span_energy` is the share that is kept.

    Args:
        weight: ``(n, ...)``, :math:`d` entries per vector.
        covariance: ``(d, d)``, see :func:`input_space_basis`.
        rank: how many leading coordinates to return, 1 to d; ``None``: all.

    Returns:
        ``(n, d)``, or ``(n, rank)``.

    Raises:
        ValueError: if the shapes do not fit or ``rank`` is out of range.

    Example:
        >>> covariance = torch.diag(torch.tensor([1.0, 3.0]))
        >>> input_space_projection(torch.tensor([[4.0, 3.0]]), covariance).abs()
        tensor([[3., 4.]])
        >>> input_space_projection(torch.tensor([[4.0, 3.0]]), covariance, rank=1).abs()
        tensor([[3.]])
    """
    rows = _rows(weight)
    d = rows.shape[1]
    if covariance.shape != (d, d):
        raise ValueError(
            f"`covariance` must be ({d}, {d}) for vectors of {d} entries, got shape "
            f"{tuple(covariance.shape)}."
        )
    if rank is not None and not 1 <= rank <= d:
        raise ValueError(f"`rank` must be between 1 and {d}, got {rank}.")
    _, basis = input_space_basis(_wide(covariance))
    return _narrow(rows @ basis[:, :rank], weight, covariance)


def in_span_energy(weight: Tensor, basis: Tensor) -> Tensor:
    r"""Share of each vector that its inputs can see, :math:`\lVert U_r^\top w\rVert^2/\lVert
    w\rVert^2` (WRS paper, Figure 4).

    One minus this is the noise share.

    Args:
        weight: ``(n, ...)``, :math:`d` entries per vector.
        basis: ``(d, r)``, orthonormal columns: the leading eigenvectors of
            :func:`input_space_basis`.

    Returns:
        ``(n,)``, in [0, 1]; NaN where the vector is zero or not finite.

    Raises:
        ValueError: if ``basis`` does not have :math:`d` rows.

    Example:
        >>> in_span_energy(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([0.3600])
    """
    rows = _rows(weight)
    if basis.dim() != 2 or basis.shape[0] != rows.shape[1]:
        raise ValueError(
            f"`basis` must have {rows.shape[1]} rows, one per entry of a vector, got shape "
            f"{tuple(basis.shape)}."
        )
    seen = (rows @ _wide(basis)).square().sum(1)
    return _narrow((seen / rows.square().sum(1)).clamp(max=1), weight, basis)


def spectral_rank(eigenvalues: Tensor, energy: float) -> int:
    r"""How many leading eigenvalues hold the share ``energy`` of their sum.

    Args:
        eigenvalues: ``(d,)``, descending; slightly negative ones (rounding) count as 0.
        energy: the share, in (0, 1].

    Returns:
        The smallest such number, at least 1; 1 for a spectrum of zeros (constant inputs).

    Raises:
        ValueError: if ``energy`` is not in (0, 1].

    Example:
        >>> spectral_rank(torch.tensor([6.0, 3.0, 1.0, 0.0]), 0.9)
        2
        >>> spectral_rank(torch.tensor([6.0, 3.0, 1.0, 0.0]), 1.0)
        3
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
    spectrum = _wide(eigenvalues).clamp(min=0)
    # Rounding of the sums must not push the rank up: eigenvalues of 1e-15 of the largest are noise.
    missing = 1 - spectrum.cumsum(0) / spectrum.sum()
    return int((missing > 1 - energy + 1e-12).sum().clamp(max=len(spectrum) - 1)) + 1


def generalized_gaussian_shape(
    x: Tensor, *, method: Literal["moments", "mle"] = "moments"
) -> float:
    r"""Shape :math:`\beta` of a zero-mean generalized Gaussian fitted to the entries of ``x`` (WRS
    paper, Figures 5 and 6).

    Density :math:`\frac{\beta}{2a\Gamma(1/\beta)}\exp(-(|x|/a)^\beta)`: 2 is Gaussian, 1 is
    Laplace, large is uniform.

    - ``"moments"`` solves :math:`\Gamma(2/\beta)^2/(\Gamma(1/\beta)\Gamma(3/\beta)) = (E|x|)^2/E
      x^2`.
    - ``"mle"`` maximises the profile likelihood: slower, more precise on clean data, and pulled
      towards 0 by exact zeros (pruned weights).

    On 20,000 random samples both scatter by 1 to 2 % (standard deviation) for shapes 0.5 to 2; at
    shape 4 it is 3 % (moments) and 2 % (mle).

    Both search in [0.05, 50] and return the end of that range for data outside (uniform data give
    50 or so).

    Args:
        x: samples, any shape; subtract the mean first if it is not negligible.
        method: ``"moments"`` or ``"mle"``.

    Returns:
        The shape; NaN for no samples, only zeros, or samples that are not finite.

    Raises:
        ValueError: for another ``method``.

    Example:
        >>> x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        >>> round(generalized_gaussian_shape(x), 1)
        2.0
        >>> round(generalized_gaussian_shape(x, method="mle"), 1)
        2.0
    """
    if method not in ("moments", "mle"):
        raise ValueError(f"`method` must be 'moments' or 'mle', got {method!r}.")
    size = _wide(x.detach()).abs().flatten()
    largest = float(size.max()) if size.numel() else 0.0
    if not 0 < largest < math.inf:  # also false for NaN
        return math.nan
    size = size / largest  # the shape does not depend on the scale; this keeps the powers in range
    return _shape_by_moments(size) if method == "moments" else _shape_by_likelihood(size)


_SHAPE_RANGE = (0.05, 50.0)


def _shape_by_moments(size: Tensor) -> float:
    ratio = float(size.mean() ** 2 / size.square().mean())
    low, high = map(math.log, _SHAPE_RANGE)
    for _ in range(60):  # log-shape halves its interval of 7 each time: far below 1e-12
        middle = (low + high) / 2
        inverse = math.exp(-middle)
        # The moment ratio of this shape; it grows with the shape, from 0 to 3/4.
        logarithm = 2 * math.lgamma(2 * inverse) - math.lgamma(inverse) - math.lgamma(3 * inverse)
        if math.exp(logarithm) < ratio:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _shape_by_likelihood(size: Tensor) -> float:
    def likelihood(log_shape: float) -> float:
        shape = math.exp(log_shape)
        # a^beta, with the scale a that maximises the likelihood for this shape.
        scale_power = shape * float(size.pow(shape).mean())
        return log_shape - math.lgamma(1 / shape) - (math.log(scale_power) + 1) / shape

    # A coarse grid finds the highest hill, then the grid is refined around it: nothing is assumed
    # about the number of hills.
    low, high = map(math.log, _SHAPE_RANGE)
    points = 25
    while high - low > 1e-7:
        grid = [low + (high - low) * i / (points - 1) for i in range(points)]
        best = max(range(points), key=[likelihood(p) for p in grid].__getitem__)
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
        points = 9
    return math.exp((low + high) / 2)


# ---- Precision and shapes ----


def _wide(x: Tensor) -> Tensor:
    # Sums mostly are, and a call that changes nothing still is one.
    if x.dtype == torch.float64:
        return x
    # Apple GPUs have no float64.
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _narrow(result: Tensor, *inputs: Tensor) -> Tensor:
    is_double = any(x.dtype == torch.float64 for x in inputs)
    dtype = torch.float64 if is_double else torch.float32
    return result if result.dtype == dtype else result.to(dtype)


def _rows(weight: Tensor) -> Tensor:
    if weight.dim() < 2:
        raise ValueError(
            f"A weight needs two or more dimensions, (n, d), got shape {tuple(weight.shape)}; a "
            f"single vector is `weight[None]`."
        )
    return _wide(weight).flatten(1)


def _where_directed(norm: Tensor, value: Tensor) -> Tensor:
    return value * (norm / norm)  # 1, or NaN for 0 and for what is not finite


def _same_rows(**weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of two tensors, which must have one shape, in the order in which they are named."""
    (first_name, first), (second_name, second) = weights.items()
    # Broadcasting would silently compare every vector with one.
    if first.shape != second.shape:
        raise ValueError(
            f"`{first_name}` and `{second_name}` must have the same shape, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    return _rows(first), _rows(second)
