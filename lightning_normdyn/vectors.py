"""The targeted weights as one index space of n weight vectors (placeholder head: Partition; the rest follows)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """Which entries of a weight form one vector.

    The entry at index ``e`` of the full (unsharded) weight belongs to vector ``labels[e[k] for k in keep]``.

    Args:
        keep: the dimensions of the weight that tell vectors apart, ascending, e.g. ``(0,)``.
        labels: int64, of shape ``[weight.shape[k] for k in keep]``; values ``0..n-1``, or -1 for entries that belong to no vector.
        granularity: ``"filter"``, ``"group"`` or ``"layer"``: what a person calls these vectors.

    Example:
        >>> Partition.filters((8, 3, 3, 3)).n
        8
        >>> Partition.layer((8, 16)).granularity
        'layer'
        >>> Partition.groups((8, 16), 2).labels.tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
    """

    keep: tuple[int, ...]
    labels: Tensor
    granularity: str

    @classmethod
    def filters(cls, shape: tuple[int, ...], *, axis: int = 0, transposed_groups: int | None = None) -> Partition:
        """One vector per output channel: dim ``axis``, or dim 1 within each group of a transposed convolution."""
        if transposed_groups is not None:
            inputs, per_group = shape[:2]
            group = torch.arange(inputs) // (inputs // transposed_groups)
            return cls((0, 1), group[:, None] * per_group + torch.arange(per_group), "filter")
        return cls((axis,), torch.arange(shape[axis]), "filter")

    @classmethod
    def groups(cls, shape: tuple[int, ...], groups: int) -> Partition:
        """``groups`` vectors, each of ``shape[0] / groups`` neighbouring rows."""
        return cls((0,), torch.arange(shape[0]) // (shape[0] // groups), "group")

    @classmethod
    def layer(cls, shape: tuple[int, ...]) -> Partition:
        """One vector: the whole weight."""
        return cls((0,), torch.zeros(shape[0], dtype=torch.long), "layer")

    @property
    def n(self) -> int:
        """Number of vectors."""
        return int(self.labels.max()) + 1 if self.labels.numel() else 0
