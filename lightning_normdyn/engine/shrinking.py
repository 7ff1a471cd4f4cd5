"""Factors a little below 1 on weights right before a step, which the weights' own precision may not
be able to hold."""

import torch
from torch import Tensor

from lightning_normdyn.geometry.rounded import scale_rounded_
from lightning_normdyn.optimizers.scaling import RoundedScaling, Scaling
from lightning_normdyn.optimizers.step import Step

from .plan import Plan


class Shrinker:
    """Multiplies the vectors of a plan so that it can be taken back, and so that rounding leaves no
    bias.

    Args:
        plan: the vectors.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._owed: Tensor | None = None
        # bfloat16 cannot hold a factor of 0.9999: such factors collect here until their product
        # survives rounding.
        if plan.vectors.low_precision:
            self._owed = plan.state("owed", 1.0, torch.float32)

    def shrink(self, step: Step, factor: Tensor) -> None:
        """Multiply every vector by its factor, ``(n,)``, before the update of ``step``."""
        plan = self._plan
        if self._owed is None:
            step.scale(Scaling(plan.vectors, factor, invariant=plan.invariant))
        else:
            self._shrink_rounded(step, factor, self._owed)

    def rehearse(self, factor: Tensor) -> None:
        """As `Worker.rehearse`: what `shrink` launches."""
        vectors = self._plan.vectors
        if self._owed is None:
            vectors.scale_(factor)
        else:
            scale_rounded_(vectors, factor, self._owed)

    def _shrink_rounded(
        self,
        step: Step,
        factor: Tensor,
        owed: Tensor,
    ) -> None:
        """Where rounding would swallow a factor, it is owed until it matters."""
        scaling = RoundedScaling(self._plan.vectors, factor, owed)

        # Also when the step raises and the scaling is taken back: then it owes the other way.
        def remember() -> None:
            owed.copy_(scaling.owed)

        step.undo_with(remember)
        step.scale(scaling)
        remember()
