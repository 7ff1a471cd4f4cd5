"""Which entries of a weight form one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """Which entries of a weight form one vector.

    The entry at index ``e`` of the full (unsharded) weight belongs to vector ``labels[e[k] for k in
    keep]``.

    Args:
        keep: the dimensions of the weight that tell vectors apart, ascending, e.g. ``(0,)``.
        labels: int64, of shape ``[weight.shape[k] for k in keep]``; values ``0..n-1``, or -1 for
            entries that belong to no vector.
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
    def filters(
        cls, shape: tuple[int, ...], *, axis: int = 0, transposed_groups: int | None = None
    ) -> Partition:
        """One vector per output channel: dim ``axis``, or dim 1 within each group of a transposed
        convolution."""
        if transposed_groups is not None:
            inputs, per_group = shape[:2]
            group = torch.arange(inputs, dtype=torch.long, device="cpu") // (
                inputs // transposed_groups
            )
            return cls(
                (0, 1),
                group[:, None] * per_group
                + torch.arange(per_group, dtype=torch.long, device="cpu"),
                "filter",
            )
        return cls((axis,), torch.arange(shape[axis], dtype=torch.long, device="cpu"), "filter")

    @classmethod
    def groups(cls, shape: tuple[int, ...], groups: int) -> Partition:
        """``groups`` vectors, each of ``shape[0] / groups`` neighbouring rows."""
        return cls(
            (0,),
            torch.arange(shape[0], dtype=torch.long, device="cpu") // (shape[0] // groups),
            "group",
        )

    @classmethod
    def layer(cls, shape: tuple[int, ...]) -> Partition:
        """One vector: the whole weight."""
        return cls((0,), torch.zeros(shape[0], dtype=torch.long, device="cpu"), "layer")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Partition:
        """`layer` for a parameter of any shape, a bias or a single number among them."""
        return (
            cls.layer(shape)
            if shape
            else cls((), torch.zeros((), dtype=torch.long, device="cpu"), "layer")
        )

    def rest(self) -> Partition:
        """One vector: the entries that belong to no vector of this partition.

        Example:
            >>> Partition((0,), torch.tensor([0, -1, 1]), "filter").rest().labels.tolist()
            [-1, 0, -1]
        """
        return Partition(self.keep, torch.where(self.labels < 0, 0, -1), "layer")

    @property
    def n(self) -> int:
        """Number of vectors."""
        return int(self.labels.max()) + 1 if self.labels.numel() else 0

    @cached_property
    def partial(self) -> bool:
        """Whether some entries belong to no vector."""
        return bool((self.labels < 0).any())

    def lengths(self, shape: Sequence[int], read: Tensor | None = None) -> Tensor:
        """How many entries each vector has: int64 ``(n,)``.

        Args:
            shape: of the weight.
            read: bool of that shape: count only these entries; None: all.

        Example:
            >>> Partition.filters((2, 3)).lengths((2, 3), torch.tensor([[True, False, True], [True, True, True]])).tolist()
            [2, 3]
        """
        if read is None:
            labels = self.labels.flatten()
            entries_per_row = prod(shape) // max(1, labels.numel())
            return torch.bincount(labels[labels >= 0], minlength=self.n) * entries_per_row
        of_row = self.labels.reshape(
            [size if d in self.keep else 1 for d, size in enumerate(shape)]
        )
        of_entry = of_row.expand(tuple(shape))[read]
        return torch.bincount(of_entry[of_entry >= 0], minlength=self.n)

    def found_in(self, other: Partition) -> Tensor:
        """For each vector the number of the vector of ``other`` that has exactly its entries, or
        -1: int64 ``(n,)``.

        Example:
            >>> Partition((0,), torch.tensor([0, -1, 1]), "filter").found_in(Partition((0,), torch.tensor([-1, 1, 0]), "filter")).tolist()
            [-1, 0]
        """
        nowhere = torch.full((self.n,), -1, dtype=torch.long, device=self.labels.device)
        if (
            self.keep != other.keep
            or self.labels.shape != other.labels.shape
            or not self.n
            or not other.n
        ):
            return nowhere
        inside = self.labels >= 0
        mine, theirs = self.labels[inside], other.labels.to(self.labels.device)[inside]
        lowest = nowhere.scatter_reduce(0, mine, theirs, "amin", include_self=False)
        highest = nowhere.scatter_reduce(0, mine, theirs, "amax", include_self=False)
        sizes = torch.bincount(other.labels[other.labels >= 0], minlength=other.n).to(
            self.labels.device
        )
        same = (
            (lowest == highest)
            & (lowest >= 0)
            & (torch.bincount(mine, minlength=self.n) == sizes[lowest.clamp(min=0)])
        )
        return torch.where(same, lowest, nowhere)

    def only(self, kept: Tensor) -> Partition:
        """Only some of these vectors, numbered anew; the entries of the others belong to none.

        Args:
            kept: bool ``(n,)``.

        Example:
            >>> Partition.filters((3, 2)).only(torch.tensor([True, False, True])).labels.tolist()
            [0, -1, 1]
        """
        if bool(kept.all()):
            return self
        return Partition(self.keep, renumbered(kept)[self.labels], self.granularity)

    def within(self, coarser: Partition) -> Tensor:
        """Which vector of ``coarser`` each of these vectors lies in: int64 ``(n,)``, -1 for none.

        Args:
            coarser: another partition of the same weight.

        Raises:
            ValueError: if one of these vectors lies in several of ``coarser``, or only partly in
                one.

        Example:
            >>> Partition.filters((4, 3)).within(Partition.groups((4, 3), 2)).tolist()
            [0, 0, 1, 1]
        """
        both = sorted({*self.keep, *coarser.keep})
        mine, theirs = (p.labels.reshape(_sizes(p, both)) for p in (self, coarser))
        mine, theirs = mine.expand_as(mine + theirs), theirs.expand_as(mine + theirs)
        of_vector, other = mine[mine >= 0], theirs[mine >= 0]
        found = torch.full((self.n,), -1, dtype=torch.long, device="cpu")
        found[of_vector] = other
        if not torch.equal(found[of_vector], other):
            raise ValueError(
                f"vectors by {self.granularity} do not lie within vectors by {coarser.granularity}"
            )
        return found

    def equal(self, other: Partition) -> bool:
        """Whether ``other`` splits a weight into the same vectors."""
        return self is other or (self.keep == other.keep and torch.equal(self.labels, other.labels))


def renumbered(kept: Tensor) -> Tensor:
    """The new number of each vector when only some are kept: int64 ``(n + 1,)``, -1 for those that
    are not, and at the end for label -1.

    Args:
        kept: bool ``(n,)``.
    """
    number = torch.where(kept, kept.cumsum(0) - 1, -1)
    return torch.cat([number, number.new_full((1,), -1)])


def _sizes(partition: Partition, dims: Sequence[int]) -> list[int]:
    """The shape of a partition's labels over more dimensions than it keeps."""
    sizes = dict(zip(partition.keep, partition.labels.shape, strict=True))
    return [sizes.get(dim, 1) for dim in dims]
