"""What is known of each weight, in arrays over the weights of an optimizer, and read weight by
weight: a row changes all of it for a thousand weights, and few of them are ever looked at.

Legend: ``w`` weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]

Places = Ints | slice
"""Which of many weights, to index arrays over them."""

V = TypeVar("V", covariant=True)
T = TypeVar("T", bound="Table[Any]")


def places_among(weights: Ints, width: int) -> Places:
    """``weights`` as an index into arrays over ``width`` weights.

    Args:
        weights: their places, in order, each once.
        width: how many weights there are.

    Example:
        >>> places_among(np.array([0, 1]), 2), places_among(np.array([1]), 2)
        (slice(None, None, None), array([1]))
    """
    # Nearly always it is all of them, and a slice costs a tenth of a choice.
    return slice(None) if len(weights) == width else weights


class Table(Protocol[V]):
    """What is known of some weights. It never changes: a row makes another one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights."""
        ...

    @property
    def known(self) -> Flags:
        """``(w,)``, of which of them something is known."""
        ...

    @classmethod
    def from_values(cls, names: tuple[str, ...], values: Sequence[Any]) -> Any:
        """The table of what is known of each weight; None of one that is not known yet."""
        ...

    def of(self, place: int) -> V:
        """What is known of the weight at ``place``, which must be known."""
        ...


class ByWeight(Mapping[str, V]):
    """What several tables hold, by the weight's name; no name stands in two of them.

    Args:
        tables: one for the weights of each optimizer.
    """

    def __init__(self, tables: Sequence[Table[V]]) -> None:
        self.tables = tuple(tables)

    @cached_property
    def _places(self) -> dict[str, tuple[Table[V], int]]:
        places = {}
        for table in self.tables:
            for place in np.flatnonzero(table.known).tolist():
                places[table.names[place]] = (table, place)
        return places

    def __getitem__(self, name: str) -> V:
        table, place = self._places[name]
        return table.of(place)

    def __contains__(self, name: object) -> bool:
        # Without this, each weight that is looked for would be read.
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return repr(dict(self))


def table_of(
    kind: type[T],
    known: Mapping[str, Any],
    names: tuple[str, ...],
) -> T:
    """What is known of the weights called ``names``, as one table.

    Args:
        kind: of table.
        known: of all weights, by name.
        names: of the weights of one optimizer.
    """
    if isinstance(known, ByWeight):
        for table in known.tables:
            # Row after row, an optimizer has the same weights.
            if table.names == names:
                found: Any = table
                return cast(T, found)
    # After a checkpoint, and where other weights are trained from now on.
    found = kind.from_values(names, [known.get(name) for name in names])
    return cast(T, found)


def with_table(known: Mapping[str, V], table: Table[V]) -> ByWeight[V]:
    """What is known of all weights, with ``table`` in the place of what was known of its own."""
    if not isinstance(known, ByWeight):
        known = ByWeight([type(table).from_values(tuple(known), list(known.values()))])
    # Row after row, an optimizer has the same weights.
    if len(known.tables) == 1 and known.tables[0].names == table.names:
        return ByWeight([table])
    own = set(table.names)
    tables = []
    for other in known.tables:
        if own.isdisjoint(other.names):
            tables.append(other)
            continue
        left = tuple(name for name in other.names if name not in own)
        if left:
            tables.append(type(table).from_values(left, [known.get(name) for name in left]))
    return ByWeight([*tables, table])


__all__ = [
    "ByWeight",
    "Doubles",
    "Flags",
    "Ints",
    "Places",
    "Table",
    "places_among",
    "table_of",
    "with_table",
]
