"""Factors on weights that are stored in bfloat16 or float16, where rounding would swallow them."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import squares, work_out
from .vectors import WeightVectors


def scale_rounded_(
    vectors: WeightVectors,
    factor: Tensor,
    owed: Tensor,
) -> Tensor:
    """Multiply weights in place by factors that rounding would swallow.

    A factor too close to 1 to survive rounding is kept in ``owed`` until it matters; what is then
    written is measured, so that rounding leaves no bias. Each rank does so for its own piece of a
    vector, without communication.

    Args:
        vectors: the weights.
        factor: ``(n,)``: this step's factor.
        owed: ``(n,)`` float32: the product of factors not yet applied.

    Returns:
        The new ``owed``.

    Example:
        >>> from lightning_normdyn import Partition
        >>> weight = torch.nn.Parameter(torch.ones(1, 4, dtype=torch.bfloat16))
        >>> vectors = WeightVectors([weight], [Partition.filters((1, 4))])
        >>> owed = scale_rounded_(vectors, torch.tensor([0.999]), torch.ones(1))
        >>> weight[0, 0].item(), round(owed.item(), 4)
        (1.0, 0.999)
    """
    rounding = vectors.rounding
    owed, wanted = work_out(vectors, wanted_now, None, (factor, owed, rounding))
    before = vectors.partial_squares()
    vectors.scale_(wanted)
    numbers = before, owed, wanted, rounding
    if vectors.cut:
        # Of this rank's pieces alone: completed sums would take a collective.
        after = vectors.partial_squares()
        (left,) = work_out(vectors, still_owed, None, (after, *numbers))
    else:
        (left,) = work_out(vectors, still_owed, squares(vectors), numbers)
    return left


def wanted_now(
    factor: Tensor,
    owed: Tensor,
    rounding: Tensor,
) -> tuple[Tensor, Tensor]:
    """What is owed with the factor of this step, and what of it is due, 1 where nothing is."""
    owed = owed * factor.to(owed.dtype)
    return owed, torch.where(_is_due(owed, rounding), owed, torch.ones_like(owed))


def still_owed(
    after: Tensor, before: Tensor, owed: Tensor, wanted: Tensor, rounding: Tensor
) -> tuple[Tensor]:
    """What is owed when ``wanted`` has been written, from squares of the norms ``before`` and
    ``after``; each ``(n,)``."""
    # Measured, because the stored weights changed by another factor than the wanted one. Where
    # nothing can be measured (a vector of zeros), the wanted one is taken for applied.
    measured = (after / before).sqrt().to(owed.dtype)
    usable = torch.isfinite(measured) & (measured > 0) & ~_keeps_all(rounding)
    applied = torch.where(usable, measured, wanted)
    return (torch.where(_is_due(owed, rounding), owed / applied, owed),)


def _is_due(owed: Tensor, rounding: Tensor) -> Tensor:
    return _keeps_all(rounding) | ((owed - 1).abs() >= rounding)


def _keeps_all(rounding: Tensor) -> Tensor:
    return rounding <= torch.finfo(torch.float32).eps
