"""How one tensor depends on the scale of a weight: a degree, a row for each entry, and what does not scale."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import count

from torch import Tensor

Shape = tuple[int, ...]


class Blocked(Exception):
    """Raised by a rule: the scale does not pass this operation. The message says why, in words."""


class Sign(IntEnum):
    """What is known about the values of a tensor."""

    ANY = 0
    NONNEGATIVE = 1
    STATISTIC = 2  # a norm, a variance, a mean of squares: a constant added to it is an epsilon


_tokens = count()


def new_token() -> int:
    """Equal to no token so far."""
    return next(_tokens)


@dataclass(frozen=True)
class Offset:
    """Something added that does not scale with the weight.

    Args:
        varies: for each dimension of the tensor, whether the offset may differ along it.
        token: equal tokens mean equal offsets (``x - x.mean()`` has none).
        parameter: the bias it is, entry for entry along the one dimension it varies along (again
            from its start, where that is longer);
            None when it was changed on the way.
        what: it is, in words.
    """

    varies: tuple[bool, ...]
    token: Hashable
    parameter: str | None = None
    what: str = "something that does not scale"

    def changed(self, varies: Iterable[bool]) -> Offset:
        """After an operation that leaves another value, varying along ``varies``."""
        return replace(self, varies=tuple(varies), token=new_token(), parameter=None)


@dataclass(frozen=True)
class Flow:
    """How a tensor depends on the scales of one weight's rows.

    Args:
        degree: the power of the row's scale, e.g. 1 behind a linear layer, 2 behind its square, 0
            behind a normalization.
        rows: int64, as many dimensions as the tensor and broadcastable to it: 1 + the row each
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
    def parts(self) -> list[Flow]:
        """The flow of each degree, alone."""
        return [replace(self, other=None), *(self.other.parts if self.other is not None else [])]


def joined(parts: Sequence[Flow]) -> Flow:
    """One flow of parts that scale by different degrees."""
    first, *rest = parts
    return replace(first, other=joined(rest)) if rest else first


def new_offset(
    varies: Iterable[bool],
    parameter: str | None = None,
    what: str = "something that does not scale",
) -> Offset:
    """An offset that equals no other, unless it is the same parameter along the same dimension,
    counted from the right."""
    varies = tuple(varies)
    token = (parameter, varies[varies.index(True) :]) if parameter and any(varies) else new_token()
    return Offset(varies, token, parameter, f"bias {parameter}" if parameter else what)


def lift(flow: Flow, ndim: int) -> Flow:
    """Broadcasting: dimensions of size 1 in front."""
    missing = ndim - flow.rows.ndim
    if missing <= 0:
        return flow
    offset = flow.offset and replace(flow.offset, varies=(False,) * missing + flow.offset.varies)
    return replace(
        flow, rows=flow.rows.reshape((1,) * missing + tuple(flow.rows.shape)), offset=offset
    )


def varying(shape: Shape | None, ndim: int) -> tuple[bool, ...]:
    """Along which of ``ndim`` dimensions a broadcast tensor of this shape may vary; unknown shape:
    along all."""
    if shape is None:
        return (True,) * ndim
    return (*[False] * (ndim - len(shape)), *(n > 1 for n in shape))


def either(a: Iterable[bool], b: Iterable[bool]) -> tuple[bool, ...]:
    """Entrywise or."""
    return tuple(x or y for x, y in zip(a, b, strict=True))


def expanded(rows: Tensor, shape: Shape, dims: Iterable[int]) -> Tensor:
    """``rows`` with its full size along ``dims``."""
    dims = {d % len(shape) for d in dims}
    return rows.expand([shape[d] if d in dims else rows.size(d) for d in range(len(shape))])


def compact(rows: Tensor) -> Tensor:
    """Size 1 along every dimension along which nothing differs."""
    for dim in range(rows.ndim):
        if rows.size(dim) > 1:
            first = rows.narrow(dim, 0, 1)
            if rows.stride(dim) == 0 or bool((first == rows).all()):
                rows = first
    return rows


def _blocks(old: Shape, new: Shape) -> Iterable[tuple[range, range]]:
    """Pairs of dimension ranges that a reshape maps onto each other (equal products, as short as
    possible)."""
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j, size_i, size_j = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        yield range(start_i, i), range(start_j, j)
    if i < len(old) or j < len(new):  # what is left has size 1
        yield range(i, len(old)), range(j, len(new))


def reshaped(flow: Flow, old: Shape, new: Shape) -> Flow:
    """A view or reshape. Blocks of dimensions along which nothing differs are never expanded."""
    if 0 in old:
        return Flow(
            flow.degree,
            flow.rows.flatten()[:1].reshape((1,) * len(new)),
            flow.offset and flow.offset.changed([True] * len(new)),
            flow.sign,
        )
    full, result, varies = list(flow.rows.shape), [1] * len(new), [False] * len(new)
    parameter = flow.offset.parameter if flow.offset is not None else None
    for before, after in _blocks(old, new):
        if any(flow.rows.size(d) > 1 for d in before):
            for d in before:
                full[d] = old[d]
            for d in after:
                result[d] = new[d]
        if flow.offset and any(flow.offset.varies[d] for d in before):
            for d in after:
                varies[d] = new[d] > 1
            periodic = (
                not any(flow.offset.varies[d] for d in before[:-1])
                and sum(new[d] > 1 for d in after) == 1
                and new[after[-1]] > 1
            )
            parameter = parameter if periodic else None
    offset = None
    if (
        flow.offset is not None
        # broadcasting aligns at the right: what happens in front of the dims it varies along
        # changes
        # nothing
    ):
        tail = len(old) - flow.offset.varies.index(True) if any(flow.offset.varies) else 0
        token = (
            flow.offset.token
            if old[len(old) - tail :] == new[len(new) - tail :]
            else (flow.offset.token, new)
        )
        offset = replace(flow.offset, varies=tuple(varies), token=token, parameter=parameter)
    return replace(flow, rows=compact(flow.rows.expand(full).reshape(result)), offset=offset)


def permuted(flow: Flow, dims: Sequence[int]) -> Flow:
    """A permutation of dimensions."""
    dims = [d % flow.rows.ndim for d in dims]
    offset = flow.offset
    if offset is not None:
        offset = replace(
            offset, varies=tuple(offset.varies[d] for d in dims), token=(offset.token, tuple(dims))
        )
    return replace(flow, rows=flow.rows.permute(dims), offset=offset)


def moved(flow: Flow, rows: Tensor, dims: Iterable[int]) -> Flow:
    """The flow after entries were moved or picked along ``dims``: new rows, and another offset if
    it differs along them."""
    offset = flow.offset
    if offset is not None and any(offset.varies[d] for d in dims):
        offset = offset.changed(offset.varies)
    return replace(flow, rows=rows, offset=offset)


def without_dim(offset: Offset | None, dim: int) -> Offset | None:
    """The offset at one index of ``dim``."""
    if offset is None:
        return None
    varies = [v for d, v in enumerate(offset.varies) if d != dim]
    if offset.varies[dim]:
        return offset.changed(varies)
    # Broadcasting aligns at the right: a dimension that goes in front of those it varies along
    # changes nothing.
    token = offset.token if not any(offset.varies[:dim]) else new_token()
    return replace(offset, varies=tuple(varies), token=token)


def everywhere(flow: Flow) -> Offset | None:
    """The offset after an operation that may make it differ anywhere."""
    return flow.offset and flow.offset.changed([True] * flow.rows.ndim)


def shifted(flow: Flow, varies: tuple[bool, ...], parameter: str | None) -> Flow:
    """The flow plus something constant."""
    offset = new_offset(varies, parameter if sum(varies) == 1 else None)
    if flow.offset is not None:
        offset = flow.offset.changed(either(varies, flow.offset.varies))
    return replace(flow, offset=offset, sign=Sign.ANY)
