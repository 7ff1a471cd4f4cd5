"""One weight that a callback means, and the vectors that it splits into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.verdict import Verdict


@dataclass
class Target:
    """One targeted weight of one optimizer.

    Args:
        name: its first name in the LightningModule.
        weight: the parameter that the optimizer holds.
        partition: how it splits into vectors.
        verdict: what is known about its scale invariance.
        by_request: whether a person named it although nothing is known to make it scale-invariant.
        weight_standardized: whether weight standardization removes its mean before it is used.
    """

    name: str
    weight: Tensor
    partition: Partition
    verdict: Verdict
    by_request: bool
    weight_standardized: bool = False

    @property
    def scale_invariant(self) -> bool:
        """Whether the loss is known not to see the length of these vectors."""
        return not self.by_request


__all__ = ["Target"]
