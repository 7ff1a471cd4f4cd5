"""The numbers of one row, in arrays over weights.

A dictionary by log key is made of them only where somebody asks for one: of a thousand weights that
takes longer than all else in a row.

Legend: ``q`` quantities, ``w`` weights.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from .by_weight import Doubles, Flags, Ints
from .quantities import OVERVIEW


class WeightKeys:
    """The log keys of some quantities of some weights. One object serves all rows of an optimizer,
    so that a history finds its columns by identity.

    Args:
        quantities: names of the quantities.
        names: of the weights.

    Example:
        >>> WeightKeys(["angular_update"], ["a", "b"]).table
        [['angular_update/a', 'angular_update/b']]
    """

    def __init__(self, quantities: Sequence[str], names: Sequence[str]) -> None:
        self.quantities = list(quantities)
        self.names = tuple(names)

    @cached_property
    def table(self) -> list[list[str]]:
        """By quantity, then by weight."""
        return [[f"{quantity}/{name}" for name in self.names] for quantity in self.quantities]


class Block(NamedTuple):
    """Some quantities of the weights of one optimizer.

    Args:
        keys: their log keys.
        values: ``(q, w)``.
        there: ``(q, w)``, which of them there are: what is not there has no key at all.
        order: places of the weights in the order in which new keys come.
    """

    keys: WeightKeys
    values: Doubles
    there: Flags
    order: Ints

    def places(self, chosen: Flags) -> Iterator[tuple[int, int]]:
        """Quantity and weight of what is ``chosen``, ``(q, w)``, weight by weight."""
        by_weight = chosen.T.tolist()
        for j in self.order.tolist():
            for i, is_chosen in enumerate(by_weight[j]):
                if is_chosen:
                    yield i, j


class RowValues(Mapping[str, float]):
    """All numbers of a row by log key.

    Args:
        blocks: of the weights. Of a key that stands in two of them, the later one counts.
        overview: of the run as a whole, behind them.

    Example:
        >>> import numpy as np
        >>> keys = WeightKeys(["angular_update"], ["a", "b"])
        >>> there = np.array([[True, False]])
        >>> block = Block(keys, np.array([[0.5, 0.0]]), there, np.array([0, 1]))
        >>> dict(RowValues([block], {"normdyn/optimizer_step": 1.0}))
        {'angular_update/a': 0.5, 'normdyn/optimizer_step': 1.0}
    """

    def __init__(self, blocks: Sequence[Block], overview: Mapping[str, float]) -> None:
        self.blocks = tuple(blocks)
        self.overview = dict(overview)

    @cached_property
    def _by_key(self) -> dict[str, float]:
        by_key: dict[str, float] = {}
        for block in self.blocks:
            keys = block.keys.table
            values = block.values.tolist()
            for i, j in block.places(block.there):
                by_key[keys[i][j]] = values[i][j]
        return {**by_key, **self.overview}

    def _holder_of(self, key: object) -> Mapping[str, float]:
        """The overview for its own keys, of which other callbacks and the progress bar get some in
        every row: no dictionary of all weights is made for them."""
        is_overview = isinstance(key, str) and key.startswith(f"{OVERVIEW}/")
        return self.overview if is_overview else self._by_key

    def __getitem__(self, key: str) -> float:
        return self._holder_of(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._holder_of(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def items(self) -> ItemsView[str, float]:
        """Keys and numbers, without looking each of them up."""
        return self._by_key.items()


__all__ = ["Block", "RowValues", "WeightKeys"]
