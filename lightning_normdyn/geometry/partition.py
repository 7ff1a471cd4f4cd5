"""Which entries of a weight form one vector.

Labels are kept per combination of a few kept dimensions and not per entry: for whole filters one
number per filter. They describe the whole weight, however it is sharded, and lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

MOST_SHARED = 4096
"""Labels of a partition up to which equal ones are looked for."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which entries of a weight form one vector.

    The entry at index ``e`` of the full (unsharded) weight belongs to vector ``labels[e[k] for k in
    keep]``.

    Args:
        keep: the dimensions of the weight that tell vectors apart, ascending, e.g. ``(0,)``.
        labels: int64, of shape ``[weight.shape[k] for k in keep]``; values ``0..n-1``, or -1 for
            entries that belong to no vector.
        granularity: ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``: what a person calls
            these vectors.

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
        cls,
        shape: tuple[int, ...],
        *,
        axis: int = 0,
        transposed_groups: int | None = None,
    ) -> Partition:
        """One vector per output channel: dim ``axis``, or dim 1 within each group of a transposed
        convolution."""
        if transposed_groups is None:
            return cls((axis,), indices(shape[axis]), "filter")
        # Stored as (inputs, outputs / groups, ...): the group follows from the input channel.
        inputs, outputs_per_group = shape[:2]
        group = indices(inputs) // (inputs // transposed_groups)
        labels = group[:, None] * outputs_per_group + indices(outputs_per_group)
        return cls((0, 1), labels, "filter")

    @classmethod
    def columns(cls, shape: tuple[int, ...]) -> Partition:
        """One vector per slice along dim 1: the rows of the transposed weight.

        Example:
            >>> Partition.columns((8, 3)).n
            3
        """
        return cls((1,), indices(shape[1]), "column")

    @classmethod
    def groups(
        cls,
        shape: tuple[int, ...],
        groups: int,
    ) -> Partition:
        """``groups`` vectors, each of ``shape[0] / groups`` neighbouring rows."""
        return cls((0,), indices(shape[0]) // (shape[0] // groups), "group")

    @classmethod
    def layer(
        cls,
        shape: tuple[int, ...],
    ) -> Partition:
        """One vector: the whole parameter, of any shape (a bias, a single number)."""
        # A single number has no dimension to keep.
        keep = (0,) if shape else ()
        return cls(keep, torch.zeros(shape[:1], dtype=torch.long, device="cpu"), "layer")

    def rest(self) -> Partition:
        """One vector: the entries that belong to no vector of this partition.

        Example:
            >>> Partition((0,), torch.tensor([0, -1, 1]), "filter").rest().labels.tolist()
            [-1, 0, -1]
        """
        return Partition(self.keep, torch.where(self.labels < 0, 0, -1), "layer")

    def shared(self) -> Partition:
        """The one among equal partitions that all weights have which are split alike.

        What is worked out of a partition (where its vectors lie, how long they are) is then worked
        out once for a thousand layers.

        Example:
            >>> Partition.layer((8, 16)).shared() is Partition.layer((8, 16)).shared()
            True
        """
        labels = self.labels
        # To compare the labels of a vocabulary takes longer than they save.
        if labels.numel() > MOST_SHARED or labels.device.type != "cpu":
            return self
        key = (self.keep, self.granularity, tuple(labels.shape), labels.numpy().tobytes())
        return _shared.setdefault(key, self)

    @cached_property
    def n(self) -> int:
        """Number of vectors."""
        # Kept, since every index space, table and verdict that the weight is in asks for it.
        if not self.labels.numel():
            return 0
        return int(self.labels.max()) + 1

    @cached_property
    def partial(self) -> bool:
        """Whether some entries belong to no vector."""
        return bool((self.labels < 0).any())

    def lengths(
        self,
        shape: Sequence[int],
        read: Tensor | None = None,
    ) -> Tensor:
        """How many entries each vector has: int64 ``(n,)``.

        Args:
            shape: of the weight.
            read: bool of that shape: count only these entries; None: all.

        Example:
            >>> read = torch.tensor([[True, False, True], [True, True, True]])
            >>> Partition.filters((2, 3)).lengths((2, 3), read).tolist()
            [2, 3]
        """
        if read is None:
            # All labels stand for equally many entries: those along the dimensions not kept.
            entries_per_label = prod(shape) // max(1, self.labels.numel())
            return self._label_counts * entries_per_label
        every_dim = self.broadcastable(len(shape))
        # Only the labels of entries that are read: expanding copies nothing, indexing does.
        of_entry = every_dim.expand(tuple(shape))[read]
        return torch.bincount(of_entry[of_entry >= 0], minlength=self.n)

    def found_in(
        self,
        other: Partition,
    ) -> Tensor:
        """For each vector the number of the vector of ``other`` that has exactly its entries, or
        -1: int64 ``(n,)``.

        Example:
            >>> one = Partition((0,), torch.tensor([0, -1, 1]), "filter")
            >>> other = Partition((0,), torch.tensor([-1, 1, 0]), "filter")
            >>> one.found_in(other).tolist()
            [-1, 0]
        """
        match = self.labels.new_full((self.n,), -1)
        if self.keep != other.keep or self.labels.shape != other.labels.shape:
            return match
        inside = self.labels >= 0
        mine, theirs = self.labels[inside], other.labels[inside]
        # Any of the vectors that mine overlaps: it is the one if all entries agree on it and it has
        # no others.
        match[mine] = theirs
        agreeing = torch.bincount(mine[match[mine] == theirs], minlength=self.n)
        sizes = torch.bincount(other.labels[other.labels >= 0], minlength=max(1, other.n))
        mine_alone = agreeing == self._label_counts
        theirs_alone = agreeing == sizes[match.clamp(min=0)]
        return torch.where((match >= 0) & mine_alone & theirs_alone, match, -1)

    def only(
        self,
        kept: Tensor,
    ) -> Partition:
        """Only some of these vectors, numbered anew; the entries of the others belong to none.

        Args:
            kept: bool ``(n,)``.

        Example:
            >>> Partition.filters((3, 2)).only(torch.tensor([True, False, True])).labels.tolist()
            [0, -1, 1]
        """
        # The same object: callers compare partitions by identity first.
        if kept.all():
            return self
        return Partition(self.keep, renumbered(kept)[self.labels], self.granularity)

    def within(
        self,
        coarser: Partition,
    ) -> Tensor:
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
        dims = sorted({*self.keep, *coarser.keep})
        mine, theirs = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            self.labels.reshape(self._sizes(dims)),
            coarser.labels.reshape(coarser._sizes(dims)),
        )
        finer, around = mine[mine >= 0], theirs[mine >= 0]
        # Any of the entries' vectors is written; if all of them agree, reading it gives them back.
        vector = self.labels.new_full((self.n,), -1)
        vector[finer] = around
        if not torch.equal(vector[finer], around):
            raise ValueError(
                f"vectors by {self.granularity} do not lie within vectors by {coarser.granularity}"
            )
        return vector

    def equal(
        self,
        other: Partition,
    ) -> bool:
        """Whether ``other`` splits a weight into the same vectors."""
        return self is other or (self.keep == other.keep and torch.equal(self.labels, other.labels))

    def broadcastable(self, ndim: int) -> Tensor:
        """The labels, broadcastable to the weight.

        Args:
            ndim: how many dimensions the weight has.

        Example:
            >>> Partition.filters((3, 2)).broadcastable(2).shape
            torch.Size([3, 1])
        """
        return self.labels.reshape(self._sizes(range(ndim)))

    @cached_property
    def _label_counts(self) -> Tensor:
        """How many labels name each vector: int64 ``(n,)``."""
        return torch.bincount(self.labels[self.labels >= 0], minlength=self.n)

    def _sizes(
        self,
        dims: Iterable[int],
    ) -> list[int]:
        """The shape of the labels over more dimensions than are kept."""
        sizes = dict(zip(self.keep, self.labels.shape, strict=True))
        return [sizes.get(dim, 1) for dim in dims]


_shared: WeakValueDictionary[tuple[Any, ...], Partition] = WeakValueDictionary()


def renumbered(kept: Tensor) -> Tensor:
    """The new number of each vector when only some are kept: int64 ``(n + 1,)``, -1 for those that
    are not, and at the end for label -1.

    Args:
        kept: bool ``(n,)``.
    """
    # Behind the numbers stands one for label -1, which python's indexing finds there.
    number = torch.where(kept, kept.cumsum(0) - 1, -1)
    return torch.cat([number, number.new_full((1,), -1)])


def indices(n: int) -> Tensor:
    """0 .. n - 1, on the CPU, where labels are kept."""
    return torch.arange(n, dtype=torch.long, device="cpu")
