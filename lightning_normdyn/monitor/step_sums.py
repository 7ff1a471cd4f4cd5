"""What is summed over every weight vector around one optimizer step: all that the formulas of the
monitor's quantities may use; and how a sum over vectors tells which of them ends first.

Legend: ``n`` weight vectors; w the weight that the gradient g was taken at; s the weight just
before the step, which differs from w only where AdaptiveWeightShrink or WeightDecay shrank it; d
the step from s.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from lightning_normdyn.functional import (
    angle_from_sums,
    equivalent_weight_decay,
    norm_from_sums,
    std_from_sums,
)
from lightning_normdyn.theory.outlook import steps_to_underflow


@dataclass
class StepSums:
    """The sums of one step and what several formulas derive from them, each worked out at most once
    and only if a formula asks for it. Every tensor has the shape ``(n,)``.

    Args:
        lr: the learning rate that the step applies.
        ww: ⟨w, w⟩.
        wg: ⟨w, g⟩.
        gg: ⟨g, g⟩.
        ss: ⟨s, s⟩.
        sd: ⟨s, d⟩.
        dd: ⟨d, d⟩.
        ones_w: ⟨1, w⟩; None unless a quantity with ``exact`` or AdaptiveWeightShrink needs it.
        entries: numbers in each vector.
        standardized: where the network standardizes the weight; None where it does so nowhere.
        alpha: of AdaptiveWeightShrink; NaN where it does not act.
        alpha_of_std: where AdaptiveWeightShrink goes by the standard deviation.
        decay: λ in 1/(step·lr) of WeightDecay, NaN where it does not act; None: nowhere.
        log_scale: Σ ln c before this step, of callbacks that multiply weights by c after each
            step; None where there are none.
        target_angle: what a callback was to turn this step by, 0 where none did; None where there
            are none.
    """

    lr: Tensor
    ww: Tensor
    wg: Tensor
    gg: Tensor
    ss: Tensor
    sd: Tensor
    dd: Tensor
    ones_w: Tensor | None
    entries: Tensor
    standardized: Tensor | None
    alpha: Tensor
    alpha_of_std: Tensor
    decay: Tensor | None = None
    log_scale: Tensor | None = None
    target_angle: Tensor | None = None

    @cached_property
    def norm(self) -> Tensor:
        """‖w‖."""
        return norm_from_sums(self.ww)

    @cached_property
    def std(self) -> Tensor:
        """The biased standard deviation of w; the norm where nothing needs a standard deviation."""
        if self.ones_w is None:
            return self.norm
        return std_from_sums(self.ww, self.ones_w, self.entries)

    @cached_property
    def size(self) -> Tensor:
        """What the effective learning rate divides by: a standardized weight's deviation, else its
        norm."""
        # Without standardized weights no deviation is needed, and none is computed.
        if self.standardized is None:
            return self.norm
        return torch.where(self.standardized, self.std, self.norm)

    @cached_property
    def shrunk_size(self) -> Tensor:
        """What AdaptiveWeightShrink multiplies with alpha."""
        return torch.where(self.alpha_of_std, self.std, self.norm)

    @property
    def equivalent_decay(self) -> Tensor:
        """The weight decay that AdaptiveWeightShrink amounts to, or that WeightDecay applies."""
        shrink = equivalent_weight_decay(self.alpha, self.shrunk_size)
        if self.decay is None:
            return shrink
        return torch.where(torch.isnan(self.alpha), self.decay, shrink)

    @property
    def whole(self) -> list[Tensor]:
        """What the sums over all vectors of a weight, as one, are made of, in the order of
        `lightning_normdyn.monitor.measured_balance.MatrixSums`."""
        # Without a shrink there is no size that it goes by.
        sized = torch.where(torch.isnan(self.alpha), 0.0, self.shrunk_size * self.ww)
        return [
            self.ww,
            self.ss,
            self.sd,
            self.dd,
            sized,
            self._weighted(self.log_scale),
            self._weighted(self.target_angle),
        ]

    def _weighted(self, values: Tensor | None) -> Tensor:
        """For a mean over vectors in which long ones count for more, as in the norm of the whole:
        that makes it right to first order."""
        return torch.zeros_like(self.ww) if values is None else values * self.ww

    @cached_property
    def angle(self) -> Tensor:
        """The angle of the step. A shrink turns nothing, so s serves in the place of w."""
        # From the step, not from both weights: their cosine rounds to 1 for a small angle.
        return angle_from_sums(self.ss, self.sd, self.dd)

    @cached_property
    def radial_change(self) -> Tensor:
        """The change of w along itself, relative to its norm: the shrink to s = f w, then the step
        from s."""
        factor = norm_from_sums(self.ss) / self.norm
        # The step is measured against s; the factor makes it relative to w.
        return factor - 1 + factor * self.sd / self.ss


def log_smallest(dtype: torch.dtype) -> float:
    """ln of the norm whose square vanishes in ``dtype``; float32 for weights that are stored
    shorter.

    Example:
        >>> from math import exp
        >>> round(exp(log_smallest(torch.float32)) / 1e-23, 2)
        2.65
    """
    # Shorter formats are summed in float32.
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return -steps_to_underflow(1.0, 1.0, summed)


def urgency(e_foldings: Tensor) -> Tensor:
    """A power of each vector's e-foldings left, so high that the sum over vectors tells the
    smallest: see `least_of`."""
    return e_foldings.clamp(min=1.0).pow(-_sharpness(e_foldings.dtype))


def least_of(total: float, dtype: torch.dtype = torch.float64) -> float:
    """The smallest of the e-foldings whose `urgency` sums to ``total``; a little less where several
    are equally small.

    Sums are all that ranks exchange, so the smallest must come from a sum.

    Example:
        >>> steps = torch.tensor([31.0, 50.0, 44.0], dtype=torch.float64)
        >>> round(least_of(float(urgency(steps).sum())), 1)
        31.0
    """
    return inf if total <= 0 else total ** (-1 / _sharpness(dtype))


def _sharpness(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 20  # 60 to this power is still a number
