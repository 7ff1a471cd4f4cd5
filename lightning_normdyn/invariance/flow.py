"""How one tensor of the network depends on the scale of one weight, and how that moves with the
tensor.

A `Flow` is the abstract value of a walk along the autograd graph (``follow.py``): a degree, the row
of the weight that each entry scales with, and what was added and does not scale. The functions here
rearrange a flow as torch rearranges the tensor. What an operation *means* for a scale stands in
``rules/``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Blocked(Exception):
    """Raised by a rule: the scale does not pass this operation. The message says why, in words."""


class Sign(IntEnum):
    """What is known about the values of a tensor. A larger one implies the smaller."""

    ANY = 0
    NONNEGATIVE = 1
    # A norm, a variance, a mean of squares: a constant that is added to it is an epsilon.
    STATISTIC = 2


@dataclass(frozen=True)
class Offset:
    """Something added that does not scale with the weight.

    Args:
        varies: for each dimension of the tensor, whether the offset may differ along it.
        token: equal tokens mean equal offsets (``x - x.mean()`` has none).
        parameter: the bias that it is, entry for entry along the one dimension that it varies
            along. Where that dimension is longer than the bias, the bias starts again. None if it
            was changed on the way.
        what: what it is, in words.
    """

    varies: tuple[bool, ...]
    token: Hashable
    parameter: str | None = None
    what: str = "something that does not scale"

    def differs_along(self, dims: Iterable[int]) -> bool:
        """Whether it may differ along one of ``dims``."""
        return any(self.varies[dim] for dim in dims)

    def changed(self, varies: Iterable[bool]) -> Offset:
        """The offset after an operation that leaves another value, varying along ``varies``."""
        return replace(self, varies=tuple(varies), token=object(), parameter=None)

    def widened(self, varies: Iterable[bool]) -> Offset:
        """The offset after an operation that may make it differ along ``varies``, too."""
        either = zip(self.varies, varies, strict=True)
        return self.changed(map(any, either))


@dataclass(frozen=True)
class Flow:
    """How a tensor depends on the scales of one weight's rows.

    Args:
        degree: the power of the row's scale, e.g. 1 behind a linear layer, 2 behind its square, 0
            behind a normalization.
        rows: int64, as many dimensions as the tensor and broadcastable to it: 1 + the row that each
            entry scales with, 0 for a constant entry.
        offset: what is added and does not scale, if anything.
        sign: what is known about the values.
        padded: whether a constant was added as an epsilon. That is what it is in a denominator
            only: ``1 + mean`` as a factor is none.
        other: the flow of other entries of the same tensor, which scale by another degree; ``rows``
            is 0 there. Rules never see it.
    """

    degree: float
    rows: Tensor
    offset: Offset | None = None
    sign: Sign = Sign.ANY
    padded: bool = False
    other: Flow | None = None

    @property
    def ndim(self) -> int:
        """How many dimensions the tensor has."""
        return self.rows.ndim

    @property
    def parts(self) -> list[Flow]:
        """The flow of each degree, alone."""
        # Nearly every flow has one degree, and a copy of it would be half the cost of the walk.
        if not self.other:
            return [self]
        return [replace(self, other=None), *self.other.parts]

    def shifted(
        self,
        varies: tuple[bool, ...],
        parameter: str | None = None,
    ) -> Flow:
        """The flow plus something constant, which varies along ``varies`` and may be a
        parameter."""
        offset = Offset(varies, object())
        if self.offset:
            offset = self.offset.widened(varies)
        # Spread over several dimensions the entries of a bias cannot be told by their place any
        # more.
        elif parameter and sum(varies) == 1:
            # Equal to any other use of it along the same dimension, counted from the right.
            token = (parameter, varies[varies.index(True) :])
            offset = Offset(varies, token, parameter, f"bias {parameter}")
        return replace(self, offset=offset, sign=Sign.ANY)

    def offset_everywhere(self, ndim: int | None = None) -> Offset | None:
        """The offset after an operation that may make it differ anywhere, in a tensor of ``ndim``
        dimensions (None: of as many as before)."""
        if not self.offset:
            return None
        if ndim is None:
            ndim = self.ndim
        return self.offset.changed([True] * ndim)

    def lifted(self, ndim: int) -> Flow:
        """Broadcasting: dimensions of size 1 in front."""
        flow = self
        for _ in range(ndim - self.ndim):
            flow = flow.unsqueezed(0)
        return flow

    def reshaped(
        self,
        old: Shape,
        new: Shape,
    ) -> Flow:
        """A view or reshape from ``old`` to ``new``."""
        if 0 in old:
            # No entry is left to scale: any row will do.
            ndim = len(new)
            one = self.rows.flatten()[:1].reshape([1] * ndim)
            return Flow(self.degree, one, self.offset_everywhere(ndim), self.sign)

        # Blocks of dimensions along which nothing differs are never expanded: the rows of a large
        # activation would take as much memory as the activation.
        wide = list(self.rows.shape)
        target = [1] * len(new)
        for before, after in _blocks(old, new):
            if max(self.rows.shape[before], default=1) > 1:
                wide[before] = old[before]
                target[after] = new[after]
        rows = self.rows.expand(wide).reshape(target)

        offset = self.offset
        if offset:
            offset = _reshaped_offset(offset, old, new)
        return replace(self, rows=compact(rows), offset=offset)

    def permuted(self, dims: Sequence[int]) -> Flow:
        """A permutation of dimensions."""
        dims = [d % self.ndim for d in dims]
        offset = self.offset
        if offset:
            # The same permutation of equal offsets: equal again.
            varies = tuple(offset.varies[d] for d in dims)
            offset = replace(offset, varies=varies, token=(offset.token, tuple(dims)))
        return replace(self, rows=self.rows.permute(dims), offset=offset)

    def unsqueezed(self, dim: int) -> Flow:
        """A dimension of size 1 in front of ``dim``."""
        offset = self.offset
        if offset:
            varies = [*offset.varies]
            varies.insert(dim, False)
            # Broadcasting aligns at the right: in front of those it varies along, the dimension
            # changes nothing.
            token = (offset.token, dim) if any(varies[:dim]) else offset.token
            offset = replace(offset, varies=tuple(varies), token=token)
        return replace(self, rows=self.rows.unsqueeze(dim), offset=offset)

    def moved(
        self,
        rows: Tensor,
        dims: Iterable[int],
    ) -> Flow:
        """The flow after entries were moved or picked along ``dims``: new rows, and another offset
        if it differs along them."""
        offset = self.offset
        if offset and offset.differs_along(dims):
            offset = offset.changed(offset.varies)
        return replace(self, rows=rows, offset=offset)


# The row of entries that do not scale.
NO_ROW = torch.zeros(1, dtype=torch.long, device="cpu")

Flows = Sequence[Flow | None]
"""The flows of an operation's inputs or outputs; None: does not depend on the weight."""


def joined(parts: Sequence[Flow]) -> Flow:
    """One flow of parts that scale by different degrees."""
    first, *rest = parts
    if rest:
        return replace(first, other=joined(rest))
    return first


# ------------------------------------------------------------------------------------------ offsets


def varying(shape: Shape | None, ndim: int) -> tuple[bool, ...]:
    """Along which of ``ndim`` dimensions a broadcast tensor of this shape may vary; unknown shape:
    along all."""
    if shape is None:
        # The safe side: what varies is removed by fewer normalizations.
        return (True,) * ndim
    aligned = (1,) * (ndim - len(shape)) + shape
    return tuple(size > 1 for size in aligned)


def along(dims: Iterable[int], ndim: int) -> tuple[bool, ...]:
    """True at ``dims``, False at the other of ``ndim`` dimensions."""
    varies = [False] * ndim
    for dim in dims:
        varies[dim] = True
    return tuple(varies)


def spread(offset: Offset | None, dims: Iterable[int]) -> Offset | None:
    """The offset after an operation that may make it differ along ``dims``, too."""
    if not offset:
        return None
    return offset.widened(along(dims, len(offset.varies)))


def without_dims(offset: Offset | None, dims: Sequence[int]) -> Offset | None:
    """The offset without ``dims``: at one index of them, or of a mean along them."""
    if not offset:
        return None
    varies = tuple(v for d, v in enumerate(offset.varies) if d not in dims)
    if offset.differs_along(dims):
        return offset.changed(varies)
    # Broadcasting aligns at the right: dimensions that go in front of those it varies along change
    # nothing.
    if any(offset.varies[: max(dims)]):
        return replace(offset, varies=varies, token=object())
    return replace(offset, varies=varies)


# ----------------------------------------------------------------------------------- rearrangements


def expanded(
    rows: Tensor,
    shape: Shape,
    dims: Iterable[int],
) -> Tensor:
    """``rows`` with its full size along ``dims``."""
    sizes = list(rows.shape)
    for dim in dims:
        sizes[dim] = shape[dim]
    return rows.expand(sizes)


def compact(rows: Tensor) -> Tensor:
    """Size 1 along every dimension along which nothing differs."""
    for dim in range(rows.ndim):
        if rows.size(dim) > 1:
            # A stride of 0 says so without a look at the numbers.
            first = rows.narrow(dim, 0, 1)
            if rows.stride(dim) == 0 or torch.equal(first.expand_as(rows), rows):
                rows = first
    return rows


def _blocks(old: Shape, new: Shape) -> Iterator[tuple[slice, slice]]:
    """The dimensions that a reshape maps onto each other: pairs of ranges with equal products, as
    short as possible."""
    i = j = 0
    while i < len(old) and j < len(new):
        start_i = i
        start_j = j
        size_i = old[i]
        size_j = new[j]
        while size_i != size_j:
            if size_i < size_j:
                i += 1
                size_i *= old[i]
            else:
                j += 1
                size_j *= new[j]
        i += 1
        j += 1
        yield slice(start_i, i), slice(start_j, j)
    # What is left has size 1.
    yield slice(i, len(old)), slice(j, len(new))


def _reshaped_offset(
    offset: Offset,
    old: Shape,
    new: Shape,
) -> Offset:
    varies = [False] * len(new)
    parameter = offset.parameter
    for before, after in _blocks(old, new):
        if not any(offset.varies[before]):
            continue
        varies[after] = [size > 1 for size in new[after]]
        # Samples that are folded into the channels (InstanceNorm) repeat a bias from its start. Any
        # other mixture of dimensions puts its entries in another order.
        is_last_alone = sum(varies[after]) == 1 and varies[after][-1]
        if any(offset.varies[before][:-1]) or not is_last_alone:
            parameter = None

    # Broadcasting aligns at the right: what happens in front of the dimensions that it varies along
    # leaves the same offset.
    token = offset.token
    if any(offset.varies):
        first = offset.varies.index(True)
        tail = len(old) - first
        if old[first:] != new[len(new) - tail :]:
            token = (token, new)
    return replace(offset, varies=tuple(varies), token=token, parameter=parameter)


def sizes_of_pieces(
    shapes: Sequence[Shape | None],
    dim: int,
    total: int,
) -> list[int] | None:
    """The sizes along ``dim`` of what is concatenated there to ``total``; None: not known."""
    # A constant does not show its size, so two of them cannot be told apart.
    if shapes.count(None) > 1:
        return None
    # One constant takes what the others leave.
    sizes = [shape[dim] for shape in shapes if shape is not None]
    if None in shapes:
        sizes.insert(shapes.index(None), total - sum(sizes))
    return sizes
