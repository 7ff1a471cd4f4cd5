"""Rows of weights that no loss has read so far: the ends of a table of positions, experts without
tokens.

Nothing acts on such rows, since nothing is known of them. A gradient there says that a loss has
read them after all, and calls for another look at the graph.
"""

from __future__ import annotations

from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors


class UnreadRows:
    """The rows of one optimizer's weights that no loss has read, as far as its graph was looked at.

    Args:
        weights: for each weight these entries, as one vector.
    """

    # Steps of an optimizer in which gradients are looked at whether or not the Trainer logs.
    FIRST_STEPS = 16

    def __init__(self, weights: dict[Tensor, Partition]) -> None:
        self.weights = weights
        self._vectors = WeightVectors(list(weights), list(weights.values()))

    def with_gradient(self) -> set[Tensor]:
        """The weights with a gradient that is not zero in these rows, the same on every rank.

        Copies to the host. Every rank must call it.
        """
        gradients = self._vectors.gradients()

        def summarize(sums: Tensor, length: Tensor) -> Tensor:
            return (sums > 0).to(self._vectors.sum_dtype)

        # One number for each weight, so that whatever lies on another rank is heard of as well.
        _, totals = self._vectors.inner_and_totals(
            (gradients, gradients),
            summarize=summarize,
        )
        weights = set()
        for weight, count in zip(self.weights, totals[0].tolist(), strict=True):
            if count:
                weights.add(weight)
        return weights
