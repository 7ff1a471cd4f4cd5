"""A list of records that stays within a bound however long a run is, by dropping every second
one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

_OTHER = "other"


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

    def __init__(self, capacity: int, max_kinds: int, size: Callable[[Any], int] = _one) -> None:
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

    def append(self, step: int, kind: str, content: Any) -> None:
        """Add a record behind all others."""
        if kind not in self.counts and len(self.counts) >= self.max_kinds:
            kind = _OTHER

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
        other = ThinnedList(self.capacity, self.max_kinds, self._size)
        # Records themselves never change, so the lists may share them.
        other.restore(
            list(self.records),
            dict(self.counts),
            dict(self.strides),
        )
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
            remaining.append(newest)
            self.restore(remaining, self.counts, self.strides)
