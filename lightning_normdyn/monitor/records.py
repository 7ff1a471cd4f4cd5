"""What a history holds: rows of cells, marked events, and arrays with one number per vector; each
in a list that stays within a bound however long a run is, by dropping every second record.

Legend: ``n`` weight vectors.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.errors import NormDynError, shown

from .row_values import Block, RowValues, WeightKeys

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

OTHER = "other"
"""The kind under which all are thinned that are of one too many kinds."""


class Columns(Mapping[str, int]):
    """The place of each log key's cell in a row. Columns only ever come, so a place stays valid.

    It never changes, so histories share it; `with_keys` gives one with more columns.

    Args:
        keys: the log keys, in the order of their cells.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._places = {key: place for place, key in enumerate(keys)}
        self._found: dict[WeightKeys, Ints] = {}
        self._recorded: dict[WeightKeys, tuple[Flags, Ints]] = {}

    def with_keys(self, keys: Iterable[str]) -> Columns:
        """With a column for each of ``keys``: the same object where all of them have one."""
        # A dict: a key may come twice.
        new = dict.fromkeys(key for key in keys if key not in self._places)
        return Columns([*self._places, *new]) if new else self

    def of(self, keys: WeightKeys) -> Ints:
        """The places of many keys, as they stand in `WeightKeys.table`; -1 of those that have no
        column."""
        found = self._found.get(keys)
        if found is None:
            table = [[self._places.get(key, -1) for key in row] for row in keys.table]
            found = np.array(table, dtype=np.int64)
            self._found[keys] = found
        return found

    def recorded(self, block: Block) -> Ints:
        """The places of the numbers that there are in a block; -1 of those that have no column."""
        there, places = self._recorded.get(block.keys, (None, None))
        # Asked twice in a row: which columns are missing, and where the numbers go.
        if there is block.there and places is not None:
            return places
        # Row after row, the same numbers are there.
        if there is None or places is None or not np.array_equal(there, block.there):
            places = self.of(block.keys)[block.there]
        self._recorded[block.keys] = (block.there, places)
        return places

    def __getitem__(self, key: str) -> int:
        return self._places[key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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


class Record(NamedTuple):
    """What was recorded at a step."""

    step: int
    kind: str
    number: int
    """How many records of this kind came before it, dropped ones included."""
    content: Any


def _one(content: Any) -> int:
    # A named function: a lambda could not be pickled with the history.
    return 1


class ThinnedList:
    """An ordered list of bounded size: of each kind it holds the records 0, stride, 2 stride, ...,
    and always the newest record of all.

    A full list doubles the stride of its most frequent kind. Kinds are thinned apart because a
    plain "every second one" erases whatever alternates: a GAN whose two optimizers take turns would
    lose one of them for good, and three LR drops would drown in a thousand rescales.

    Args:
        capacity: most allowed total size. The first record of each kind and the newest one stay
            even where they alone exceed it.
        max_kinds: kinds beyond this many are thinned together, so that a list of nothing but firsts
            cannot fill the capacity.
        size: size of one record's content.
    """

    def __init__(
        self,
        capacity: int,
        max_kinds: int,
        size: Callable[[Any], int] = _one,
    ) -> None:
        self.capacity = capacity
        self.max_kinds = max_kinds
        self.records: list[Record] = []
        self.counts: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self._size = size
        # Kept up to date: summing over thousands of records would slow every append.
        self._total = 0

    @property
    def newest(self) -> Record | None:
        """The record that was appended last."""
        return self.records[-1] if self.records else None

    def append(
        self,
        step: int,
        kind: str,
        content: Any,
    ) -> None:
        """Add a record behind all others."""
        if kind not in self.counts and len(self.counts) >= self.max_kinds:
            kind = OTHER

        # Until now the newest record stood here as such; from now on it must fit its kind's stride.
        if self.records and not self._on_stride(self.records[-1]):
            self._total -= self._size(self.records.pop().content)

        # Interned: otherwise thousands of records would each hold a string of their own.
        kind = sys.intern(kind)
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        self.records.append(Record(step, kind, number, content))
        self._total += self._size(content)
        self._fit()

    def replace_newest(self, content: Any) -> None:
        """Give the newest record another content."""
        newest = self.records[-1]
        self._total += self._size(content) - self._size(newest.content)
        self.records[-1] = newest._replace(content=content)
        self._fit()

    def truncate_after(self, step: int) -> None:
        """Drop the records that are later than ``step``."""
        remaining = [record for record in self.records if record.step <= step]
        # The common case on a resume: nothing was recorded since the checkpoint.
        if len(remaining) == len(self.records):
            return
        # Count on from the last remaining record, so that the same records are thinned as if the
        # dropped ones had never been.
        counts = {record.kind: record.number + 1 for record in remaining}
        strides = dict(self.strides)
        for kind in strides.keys() - counts.keys():
            del strides[kind]
        self.restore(remaining, counts, strides)

    def fork(self) -> ThinnedList:
        """A list of its own with the same records."""
        other = copy(self)
        # Records themselves never change, so the lists may share them.
        other.records = list(self.records)
        other.counts = dict(self.counts)
        other.strides = dict(self.strides)
        return other

    def restore(
        self,
        records: list[Record],
        counts: dict[str, int],
        strides: dict[str, int],
    ) -> None:
        """Hold these records, with the counts and strides by which thinning goes on."""
        self.records = records
        self.counts = counts
        self.strides = strides
        self._total = sum(self._size(record.content) for record in records)

    def _on_stride(self, record: Record) -> bool:
        return record.number % self.strides.get(record.kind, 1) == 0

    def _fit(self) -> None:
        while self._total > self.capacity:
            *older, newest = self.records
            frequencies = Counter(record.kind for record in older)
            # Where every kind has one record left, these are firsts, which stay.
            if max(frequencies.values(), default=0) < 2:
                return
            [(most_frequent, _)] = frequencies.most_common(1)
            self.strides[most_frequent] = 2 * self.strides.get(most_frequent, 1)
            remaining = [record for record in older if self._on_stride(record)]
            self.restore([*remaining, newest], self.counts, self.strides)


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
        self.columns = Columns()
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
        other = copy(self)
        other.vector_sizes = dict(self.vector_sizes)
        other.rows = self.rows.fork()
        other.events = self.events.fork()
        other.vectors = self.vectors.fork()
        return other

    def lists(self) -> dict[str, ThinnedList]:
        """The three lists by what they hold."""
        return {"row": self.rows, "event": self.events, "vector": self.vectors}

    def cells(self, values: Mapping[str, float]) -> tuple[Floats, Flags]:
        """The cells of a row, and which of them are recorded; columns are made as needed."""
        blocks: Sequence[Block] = ()
        others = values
        # The monitor's own rows: no dictionary is made of them.
        if isinstance(values, RowValues):
            blocks, others = values.blocks, values.overview
        # First of all: a value that is refused must not leave a column behind.
        numbers = list(map(_as_float, others.values()))
        columns = self.columns
        for block in blocks:
            if (columns.recorded(block) < 0).any():
                missing = block.there & (columns.of(block.keys) < 0)
                table = block.keys.table
                columns = columns.with_keys([table[i][j] for i, j in block.places(missing)])
        columns = self.columns = columns.with_keys(others)

        cells = np.full(len(columns), np.nan, dtype=np.float32)
        present = np.zeros(len(columns), dtype=np.bool_)
        # What exceeds float32 becomes inf, without a warning: a run that diverged shows it so.
        with np.errstate(over="ignore"):
            for block in blocks:
                recorded = columns.recorded(block)
                cells[recorded] = block.values[block.there]
                present[recorded] = True
            recorded = np.array([columns[key] for key in others], dtype=np.int64)
            cells[recorded] = numbers
        present[recorded] = True
        return cells, present

    def vectors_of(self, name: str) -> tuple[list[int], Floats]:
        """The arrays of a name: the places of the ``r`` records that have one, and the arrays,
        ``(r, n)``."""
        places = []
        arrays = []
        for i, record in enumerate(self.vectors.records):
            bundle: Bundle = record.content
            if name in bundle.layout:
                places.append(i)
                arrays.append(bundle.values[bundle.layout[name]])
        # reshape: without any record numpy does not know the second dimension.
        shape = (len(places), self.vector_sizes[name])
        return places, np.array(arrays, dtype=np.float32).reshape(shape)


def _as_float(value: float) -> float:
    """A number as a float.

    Raises:
        NormDynError: for an integer that no float can hold, which was never measured: what diverges
            is infinite.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise NormDynError(
            f"a value of {shown(value)} was to be kept, and no float can hold it."
        ) from error
