"""What a history holds: rows of cells, marked events, and arrays with one number per vector.

Legend: ``n`` weight vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.monitor.thinning import ThinnedList

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Event(NamedTuple):
    """Something that happened at a step and explains a jump in a curve."""

    step: int
    kind: str
    """``"rescale"``, ``"lr_drop"``, ..."""
    name: str
    """The parameter or optimizer it happened to; empty for all of them."""


class Row(NamedTuple):
    """One row's numbers, a cell per column. Columns that the history got later have no cell here:
    the arrays end before them."""

    optimizer_step: int
    cells: Floats
    present: Flags
    """Which cells were recorded. A recorded NaN is a number of a run that diverged, not a gap."""

    def has(self, column: int) -> bool:
        """Whether this row has a number in a column."""
        return column < len(self.cells) and bool(self.present[column])


class Bundle(NamedTuple):
    """The per-vector arrays of one record, concatenated: with an array object for each weight,
    small ones would take ten times their bytes."""

    layout: Mapping[str, slice]
    """Where the array of each name lies in ``values``."""
    values: Floats

    def arrays(self) -> dict[str, Floats]:
        """The arrays by name, each ``(n,)``."""
        return {name: self.values[place] for name, place in self.layout.items()}


def bundled(arrays: Mapping[str, Floats], like: Bundle | None) -> Bundle:
    """Concatenate arrays; ``like`` is the bundle before, which mostly has the same layout."""
    layout: dict[str, slice] = {}
    start = 0
    for name, array in arrays.items():
        layout[name] = slice(start, start + array.size)
        start += array.size
    # The empty array in front: numpy refuses to concatenate none at all.
    values = np.concatenate([np.zeros(0, dtype=np.float32), *arrays.values()])

    # Bundles that are alike share one layout, which would else take more room than small arrays.
    if like is not None and list(like.layout.items()) == list(layout.items()):
        return Bundle(like.layout, values)
    return Bundle(layout, values)


def _bytes(bundle: Bundle) -> int:
    return int(bundle.values.nbytes)


class Contents:
    """All that one history holds.

    Args:
        max_rows: most rows, and most events.
        max_vector_bytes: most bytes of all bundles.
    """

    def __init__(self, max_rows: int, max_vector_bytes: int) -> None:
        self.meta: dict[str, Any] = {}
        # Columns only ever come: a place in a row stays valid.
        self.columns: dict[str, int] = {}
        """The place of each log key's cell in a row."""
        self.vector_sizes: dict[str, int] = {}
        """The length of the arrays of each name."""
        # Few kinds of rows: each optimizer has one, and each of them must keep several rows.
        self.rows = ThinnedList(max_rows, max_kinds=min(16, max_rows // 4))
        # Events are of many kinds, since each weight has its own.
        self.events = ThinnedList(max_rows, max_kinds=max_rows // 4)
        self.vectors = ThinnedList(max_vector_bytes, max_kinds=16, size=_bytes)

    def fork(self) -> Contents:
        """Contents of their own that start as these. Arrays are shared, since none is ever changed,
        and so is ``meta``."""
        other = Contents(self.rows.capacity, self.vectors.capacity)
        other.meta = self.meta
        other.columns = dict(self.columns)
        other.vector_sizes = dict(self.vector_sizes)
        other.rows = self.rows.fork()
        other.events = self.events.fork()
        other.vectors = self.vectors.fork()
        return other
