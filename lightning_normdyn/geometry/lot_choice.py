"""Which small weights are taken together, and which weights by themselves.

Decided once for a set of weights, and for the arithmetic of a row by its own weight alone: whether
zeros stand behind it must not depend on who lies beside it. Who does lie beside it changes no bit,
so that is chosen for speed.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from .lots import ROW_UNIT, Alone, Lot, Padded, Stack, padded_length
from .pieces import Rows

SMALL_ENTRIES = 2**14
"""Up to this many entries of a weight, calling torch for it costs more than copying it."""

PADDED_ENTRIES = 2**15
"""A weight that would take more than this with its zeros is not filled up."""

SHARED_ENTRIES = 2**16
"""Rows of different lengths lie together as long as they and their zeros take at most this: more
zeros cost more than the calls that they save."""

SHORTEST_PADDED = 8
"""Rows of at most this many entries are not filled up: they would be nearly all zeros."""

MANY_ALIKE = 16
"""So many weights of one shape are worth calls of their own: `torch.cat` copies them faster."""


def lots_of(
    pieces: Sequence[tuple[int, Rows]],
    values: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    entries: int,
) -> list[Lot]:
    """All pieces, each in one lot.

    Args:
        pieces: of all weights, each with the position of its weight.
        values: the local tensors of the weights.
        hidden: for each weight the entries that do not count in sums, or None.
        entries: how many entries a stack may have, so that it stays in a cache.
    """
    lots: list[Lot] = []
    alike: dict[Any, list[int]] = {}
    mixed: dict[Any, list[Kind]] = {}
    for place, (weight, rows) in enumerate(pieces):
        value = values[weight]
        length = None if hidden[weight] is not None else _row_length(value, rows)
        if length is None:
            lots.append(Alone(place, weight, rows, hidden[weight]))
            continue
        # Neighbours or not: a weight's sums must not depend on who stands beside it.
        is_padded = _may_be_padded(value.shape, length)
        kind = value.dtype, value.device, is_padded, length, value.shape[1:]
        alike.setdefault(kind, []).append(place)
    for (dtype, device, is_padded, length, inner), places in alike.items():
        fills = length % ROW_UNIT == 0
        if is_padded and not (fills and len(places) >= MANY_ALIKE):
            mixed.setdefault((dtype, device), []).append((length, tuple(inner), places))
            continue
        lots += _stacks(places, pieces, values, length, entries)
    for kinds in mixed.values():
        for shared in _sharing(kinds, values, pieces):
            lots += _padded(shared, pieces, values, entries)
    # In the order of the pieces where that is possible: numbers per row then need no index.
    return sorted(lots, key=lambda lot: lot.pieces[0])


Kind = tuple[int, tuple[int, ...], list[int]]
"""Small weights of one shape but for the first dimension: the entries of a row, the other
dimensions, and the places of their pieces."""


def _may_be_padded(shape: torch.Size, length: int) -> bool:
    """Whether rows of a small weight may have zeros behind them; by its own shape alone."""
    # A row of several slices along the first dimension has no view with zeros behind each row.
    is_cut_by_rows = length in (prod(shape[1:]), shape.numel())
    rows = shape.numel() // length
    # Otherwise zeros would be most of what is read.
    is_worth_it = length > SHORTEST_PADDED and rows * padded_length(length) <= PADDED_ENTRIES
    return is_cut_by_rows and is_worth_it


def _sharing(
    kinds: Sequence[Kind],
    values: Sequence[Tensor],
    pieces: Sequence[tuple[int, Rows]],
) -> list[list[Kind]]:
    """Which kinds of weights share a tensor: neighbours by the length of their rows."""
    shared: list[list[Kind]] = []
    rows = 0
    # Places break no tie: what stands first must not decide who lies together.
    for kind in sorted(kinds, key=lambda kind: kind[:2]):
        length, _, places = kind
        more = sum(values[pieces[place][0]].numel() for place in places) // length
        if not shared or (rows + more) * padded_length(length) > SHARED_ENTRIES:
            shared.append([])
            rows = 0
        shared[-1].append(kind)
        rows += more
    return shared


def _padded(
    kinds: Sequence[Kind],
    pieces: Sequence[tuple[int, Rows]],
    values: Sequence[Tensor],
    entries: int,
) -> list[Lot]:
    """The lots of kinds that share a tensor."""
    lots: list[Lot] = []
    (length, _, places), *others = kinds
    if not others and length % ROW_UNIT == 0:
        return _stacks(places, pieces, values, length, entries)
    places = [place for _, _, of_kind in kinds for place in of_kind]
    lengths = [length for length, _, of_kind in kinds for _ in of_kind]
    width = padded_length(max(lengths))
    weights = [pieces[place][0] for place in places]
    shapes = [values[weight].shape for weight in weights]
    rows = [shape.numel() // length for shape, length in zip(shapes, lengths, strict=True)]
    for part in _portions([count * width for count in rows], entries):
        lots.append(Padded(places[part], weights[part], shapes[part], lengths[part]))
    return lots


def _stacks(
    places: Sequence[int],
    pieces: Sequence[tuple[int, Rows]],
    values: Sequence[Tensor],
    length: int,
    entries: int,
) -> list[Lot]:
    """The lots of weights of one kind."""
    lots: list[Lot] = []
    sizes = [values[pieces[place][0]].numel() for place in places]
    for part in _portions(sizes, entries):
        weights = [pieces[place][0] for place in places[part]]
        shapes = [values[weight].shape for weight in weights]
        lots.append(Stack(places[part], weights, shapes, length))
    return lots


def _row_length(value: Tensor, rows: Rows) -> int | None:
    """The entries of a row, if this is a small weight whose rows stand one below the other; else
    None."""
    size, count = value.numel(), len(rows.labels)
    # Of a part of a weight, or of rows that run through it otherwise, there are too few to make up
    # for what they would need.
    if not 0 < size <= SMALL_ENTRIES or not value.ndim or not rows.are_whole:
        return None
    length = size // count
    return None if length % prod(value.shape[1:]) else length


def _portions(sizes: Sequence[int], entries: int) -> list[slice]:
    """Runs of ``sizes`` whose sums are at most ``entries``, or that have one size only."""
    bounds = [0]
    before = 0
    for i, total in enumerate(accumulate(sizes)):
        if total - before > entries and i > bounds[-1]:
            bounds.append(i)
            before = total - sizes[i]
    bounds.append(len(sizes))
    return [slice(start, stop) for start, stop in pairwise(bounds)]
