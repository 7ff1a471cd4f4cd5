"""The rows of a run kept in memory and in one file: what the monitor writes, and what plots,
reports and the replay read.

Bounded however long the run is: a full history drops every second row, and from then on keeps only
every 2nd (4th, 8th, ...) new one.
Legend: ``r`` rows, ``s`` recorded steps, ``n`` weight vectors.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_normdyn.errors import NormDynError, shown
from lightning_normdyn.storage import is_remote, local, read, replacing

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_FORMAT = "lightning-normdyn history"
_VERSION = 2
_OLDER_VERSION = 1  # had no place for "recorded, and not a number": in it NaN means missing
_OTHER = "other"
_MOST = 2**53
"""No run counts as far, and beyond it a float no longer counts by ones."""


class Event(NamedTuple):
    """Something that happened at a step and explains a jump in a curve."""

    step: int
    kind: str
    """``"rescale"``, ``"lr_drop"``, ..."""
    name: str
    """The parameter or optimizer it happened to; empty for all of them."""


class _Record(NamedTuple):
    step: int
    kind: str
    number: int
    """How many records of this kind came before it, dropped ones included."""
    content: Any


class _Row(NamedTuple):
    """One row's numbers; columns that came after it are missing at the end of its arrays."""

    optimizer_step: int
    cells: Floats
    present: Flags
    """Which cells were recorded: a recorded NaN is a number of a run that diverged, and not a
    gap."""


class _Vectors(NamedTuple):
    """The per-vector arrays of one record, in one piece: with an array for each weight, small ones
    would take ten times their bytes."""

    layout: Mapping[str, slice]
    """Where the array of each name lies; records alike share it."""
    values: Floats

    def arrays(self) -> dict[str, Floats]:
        """By name."""
        return {name: self.values[where] for name, where in self.layout.items()}


def _in_one_piece(arrays: Mapping[str, Floats], like: _Vectors | None) -> _Vectors:
    """``arrays`` with the layout of ``like``, if it is the same."""
    layout: dict[str, slice] = {}
    start = 0
    for name, array in arrays.items():
        layout[name] = slice(start, start + array.size)
        start += array.size
    values = np.concatenate([*arrays.values()]) if arrays else np.zeros(0, dtype=np.float32)
    if like is not None and like.layout == layout and [*like.layout] == [*layout]:
        return _Vectors(like.layout, values)
    return _Vectors(layout, values)


def _one(content: Any) -> int:
    return 1  # a name, and not a lambda, so that a history can be pickled


class _Thinned:
    """An ordered list of bounded size: of each kind it holds the records 0, stride, 2 stride, ...,
    and always the newest record of all.

    A full list doubles the stride of its most frequent kind. Kinds are thinned apart because a
    plain "every second one" would erase
    whatever happens to alternate: a GAN whose two optimizers take turns would lose one of them for
    good, and three LR drops would drown
    in a thousand rescales.

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
        self.records: list[_Record] = []
        self.counts: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self._size = size
        self._total = 0

    def append(self, step: int, kind: str, content: Any) -> None:
        if kind not in self.counts and len(self.counts) >= self.max_kinds:
            kind = _OTHER
        if self.records and not self._stays(self.records[-1]):
            self._total -= self._size(self.records.pop().content)
        kind = sys.intern(kind)  # thousands of records would each hold a text of their own
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        self.records.append(_Record(step, kind, number, content))
        self._total += self._size(content)
        self._fit()

    def replace_newest(self, content: Any) -> None:
        self._total += self._size(content) - self._size(self.records[-1].content)
        self.records[-1] = self.records[-1]._replace(content=content)
        self._fit()

    def truncate_after(self, step: int) -> None:
        kept = [record for record in self.records if record.step <= step]
        # Count on from the last record that stays, so that the same records are thinned as if the
        # later ones had never been.
        counts = {record.kind: record.number + 1 for record in kept}
        strides = {kind: stride for kind, stride in self.strides.items() if kind in counts}
        if len(kept) < len(self.records):
            self.restore(kept, counts, strides)

    def fork(self) -> _Thinned:
        """A list of its own with the same records."""
        other = _Thinned(self.capacity, self.max_kinds, self._size)
        other.records, other.counts, other.strides = (
            list(self.records),
            dict(self.counts),
            dict(self.strides),
        )
        other._total = self._total
        return other

    def restore(
        self, records: list[_Record], counts: dict[str, int], strides: dict[str, int]
    ) -> None:
        self.records, self.counts, self.strides = records, counts, strides
        self._total = sum(self._size(record.content) for record in records)

    def _stays(self, record: _Record) -> bool:
        return record.number % self.strides.get(record.kind, 1) == 0

    def _fit(self) -> None:
        while self._total > self.capacity:
            kind, most = (
                Counter(record.kind for record in self.records[:-1]).most_common(1)[0]
                if len(self.records) > 1
                else ("", 0)
            )
            if most < 2:  # only firsts are left
                return
            self.strides[kind] = 2 * self.strides.get(kind, 1)
            newest = self.records[-1]
            self.records = [
                record for record in self.records if record is newest or self._stays(record)
            ]
            self._total = sum(self._size(record.content) for record in self.records)


class History:
    """Rows of named numbers by step, with marked events and optional per-vector arrays.

    A row holds float32 values under log keys such as ``effective_lr/layer1.0.conv1.weight``. A key
    may be missing from a row (an
    optimizer that did not step). A value may be NaN or infinite, which is not the same as missing:
    a run that diverged shows it.
    Iterating, or ``history[i]``, gives dicts with ``"step"``, ``"optimizer_step"`` and the row's
    keys.

    Args:
        max_rows: most rows to hold, at least 4. The first and the newest row are always among them.
        max_vector_bytes: most memory for the per-vector arrays, which are thinned in the same way.

    Attributes:
        meta: anything JSON can say about the run: its settings, the table of targets.

    Example:
        >>> history = History()
        >>> for step in range(3):
        ...     history.append(step, {"effective_lr/conv.weight": 0.5 / (step + 1)}, optimizer_step=step + 1)
        >>> history[0]
        {'step': 0, 'optimizer_step': 1, 'effective_lr/conv.weight': 0.5}
        >>> steps, values = history.column("effective_lr/conv.weight")
        >>> steps.tolist(), values[:2].tolist()
        ([0, 1, 2], [0.5, 0.25])
    """

    def __init__(self, max_rows: int = 4096, *, max_vector_bytes: int = 2**27) -> None:
        for name, limit, least in (
            ("max_rows", max_rows, 4),
            ("max_vector_bytes", max_vector_bytes, 1),
        ):
            if not least <= limit < _MOST:  # beyond, no file could be read back
                raise NormDynError(
                    f"`{name}` must be at least {least} and below 2^53, got {shown(limit)}."
                )
        self.meta: dict[str, Any] = {}
        self._columns: dict[str, int] = {}
        self._rows = _Thinned(max_rows, max_kinds=min(16, max_rows // 4))
        self._events = _Thinned(max_rows, max_kinds=max_rows // 4)
        self._vectors = _Thinned(max_vector_bytes, max_kinds=16, size=_total_bytes)
        self._vector_sizes: dict[str, int] = {}

    @property
    def newest_step(self) -> int | None:
        """The step of the newest row; None without any."""
        return self._rows.records[-1].step if self._rows.records else None

    @property
    def max_rows(self) -> int:
        """Most rows it holds."""
        return self._rows.capacity

    # -------------------------------------------------------------------------------------- writing

    def append(self, step: int, values: Mapping[str, float], *, optimizer_step: int) -> None:
        """Add the row of a step.

        Args:
            step: the x axis, as the loggers have it; never smaller than the newest row's.
            values: numbers by log key.
            optimizer_step: optimizer steps that really happened so far.

        Raises:
            NormDynError: for a step that lies before the newest row or that no run can reach, and
                for a value that no float can hold.
        """
        _check_steps(step, optimizer_step)
        if self._rows.records and step < self._rows.records[-1].step:
            raise NormDynError(
                f"a row of step {step} was asked for, but the newest row is of step "
                f"{self._rows.records[-1].step}; rows come in order. "
                f"After going back to a checkpoint, call `truncate_after({step - 1})` first."
            )
        cells, present = self._cells(values)
        newest = self._rows.records[-1].content.present if self._rows.records else None
        if newest is not None and np.array_equal(newest, present):
            present = newest  # rows alike share one array
        self._rows.append(
            int(step), _same_cells(present), _Row(int(optimizer_step), cells, present)
        )

    def _cells(self, values: Mapping[str, float]) -> tuple[Floats, Flags]:
        """The cells of a row, and which of them are recorded; columns are made as needed."""
        new = [key for key in values if key not in self._columns]
        if new:  # another dict: forks share the old one
            self._columns = {
                **self._columns,
                **{key: len(self._columns) + i for i, key in enumerate(new)},
            }
        cells = np.full(len(self._columns), np.nan, dtype=np.float32)
        present = np.zeros(len(self._columns), dtype=np.bool_)
        columns = [self._columns[key] for key in values]
        with np.errstate(
            over="ignore"
        ):  # beyond float32 is inf, which is what a diverged run should show
            cells[columns] = [_as_float(value) for value in values.values()]
        present[columns] = True
        return cells, present

    def amend(self, values: Mapping[str, float]) -> None:
        """Add keys to the newest row, if it does not have them yet.

        Raises:
            NormDynError: for an empty history.
        """
        if not self._rows.records:
            raise NormDynError(
                "the newest row was to be amended, and this history has none yet; call `append` "
                "first."
            )
        content: _Row = self._rows.records[-1].content
        had = {
            key
            for key, there in zip(self._columns, content.present.tolist(), strict=False)
            if there
        }
        cells, present = self._cells(
            {key: value for key, value in values.items() if key not in had}
        )
        width = len(content.cells)
        cells[:width] = np.where(content.present, content.cells, cells[:width])
        present[:width] |= content.present
        self._rows.replace_newest(_Row(content.optimizer_step, cells, present))

    def append_vectors(self, step: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep one number per weight vector at a step; arrays given for the same step in several
        calls become one record.

        Args:
            step: as in :meth:`append`.
            arrays: by name, e.g. ``weight_norm/layer1.0.conv1.weight``, each of shape ``(n,)``;
                copied to float32.

        Raises:
            NormDynError: where a name had another length before, or the step lies before the newest
                record.
        """
        _check_steps(step)
        content: dict[str, Floats] = {}
        for name, array in arrays.items():
            content[name] = np.array(array, dtype=np.float32)
            if content[name].ndim != 1:
                raise NormDynError(
                    f"per-vector arrays have the shape (n,); `{name}` has {content[name].shape}."
                )
            size = self._vector_sizes.get(name)
            if size is None:
                size = content[name].size
                self._vector_sizes = {
                    **self._vector_sizes,
                    name: size,
                }  # another dict: forks share the old one
            if content[name].size != size:
                raise NormDynError(
                    f"`{name}` has {content[name].size} vectors now and had {size} before; another "
                    f"model needs a History of its own."
                )
        newest = self._vectors.records[-1] if self._vectors.records else None
        if newest is not None and step < newest.step:
            raise NormDynError(
                f"per-vector arrays of step {step} come after those of step {newest.step}; records "
                f"come in order."
            )
        if newest is not None and newest.step == step:
            self._vectors.replace_newest(
                _in_one_piece({**newest.content.arrays(), **content}, newest.content)
            )
        else:
            like = None if newest is None else newest.content
            self._vectors.append(int(step), " ".join(sorted(content)), _in_one_piece(content, like))

    def forget_vectors(self, name: str) -> None:
        """Forget the arrays of a name, so that it may have another length from now on: its weight
        is cut into other vectors."""
        if name in self._vector_sizes:
            self._vector_sizes = {
                key: size for key, size in self._vector_sizes.items() if key != name
            }
            kept: list[_Record] = []
            for record in self._vectors.records:
                arrays = {
                    key: array for key, array in record.content.arrays().items() if key != name
                }
                like = kept[-1].content if kept else None
                kept.append(record._replace(content=_in_one_piece(arrays, like)))
            self._vectors.restore(kept, self._vectors.counts, self._vectors.strides)

    def vector_count(self, name: str) -> int | None:
        """The length of the arrays of a name; None for an unknown one."""
        return self._vector_sizes.get(name)

    def mark(self, step: int, kind: str, name: str = "") -> None:
        """Remember an event, e.g. ``mark(800, "lr_drop")``; plots draw it."""
        _check_steps(step)
        self._events.append(int(step), f"{kind} {name}", Event(int(step), kind, name))

    def truncate_after(self, step: int) -> None:
        """Forget all that is later than ``step``: what a crashed run did between its last
        checkpoint and its end."""
        for thinned in (self._rows, self._events, self._vectors):
            thinned.truncate_after(step)

    def fork(self) -> History:
        """A history that starts as this one and goes on by itself; ``meta`` and the recorded
        arrays, which never change, are shared."""
        other = History()
        other.meta, other._columns, other._vector_sizes = (
            self.meta,
            self._columns,
            self._vector_sizes,
        )
        other._rows, other._events, other._vectors = (
            self._rows.fork(),
            self._events.fork(),
            self._vectors.fork(),
        )
        return other

    def show(self, other: History) -> None:
        """Show what ``other`` shows, from now on too, to everybody who holds this object."""
        vars(self).update(vars(other))

    # -------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self._rows.records)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        if isinstance(index, slice):
            return [self._as_dict(record) for record in self._rows.records[index]]
        return self._as_dict(self._rows.records[index])

    def __iter__(self) -> Iterator[dict[str, float]]:
        return map(self._as_dict, self._rows.records)

    def __repr__(self) -> str:
        span = (
            f", steps {self._rows.records[0].step} to {self._rows.records[-1].step}"
            if len(self)
            else ""
        )
        return f"History({len(self)} rows{span}, {len(self._columns)} keys)"

    def keys(self) -> list[str]:
        """All log keys, in the order in which they first came."""
        return list(self._columns)

    def has(self, key: str) -> bool:
        """Whether ``key`` was ever recorded."""
        return key in self._columns

    def column(self, key: str) -> tuple[Ints, Floats]:
        """One curve: the steps at which ``key`` was recorded, int64 of shape ``(s,)``, and its
        values, float32 of shape ``(s,)``.

        The values of a run that diverged contain NaN.

        Raises:
            NormDynError: for a key that was never recorded.
        """
        if key not in self._columns:
            _refuse_name("key", key, list(self._columns))
        column = self._columns[key]
        rows = [
            record
            for record in self._rows.records
            if column < len(record.content.cells) and record.content.present[column]
        ]
        steps = np.array([record.step for record in rows], dtype=np.int64)
        values = np.array([record.content.cells[column] for record in rows], dtype=np.float32)
        return steps, values

    @property
    def events(self) -> list[Event]:
        """The marked events, in the order in which they were marked."""
        return [record.content for record in self._events.records]

    def vector_names(self) -> list[str]:
        """Names of the per-vector arrays, in the order in which they first came."""
        return list(self._vector_sizes)

    def vectors(self, name: str) -> tuple[Ints, Floats]:
        """One per-vector array over time: steps, int64 of shape ``(s,)``, and values, float32 of
        shape ``(s, n)``.

        Raises:
            NormDynError: for a name that was never recorded.
        """
        if name not in self._vector_sizes:
            _refuse_name("per-vector array", name, list(self._vector_sizes))
        found = [record for record in self._vectors.records if name in record.content.layout]
        steps = np.array([record.step for record in found], dtype=np.int64)
        values = np.array(
            [record.content.values[record.content.layout[name]] for record in found],
            dtype=np.float32,
        )
        return steps, values.reshape(len(found), self._vector_sizes[name])

    def _as_dict(self, record: _Record) -> dict[str, float]:
        content: _Row = record.content
        row: dict[str, float] = {"step": record.step, "optimizer_step": content.optimizer_step}
        cells = zip(self._columns, content.cells.tolist(), content.present.tolist(), strict=False)
        row.update((key, cell) for key, cell, present in cells if present)
        return row

    # -------------------------------------------------------------------------------------- keeping

    def save(self, path: str | os.PathLike[str]) -> Path | str:
        """Write everything to one ``.npz`` file without pickle; an interrupted save leaves an older
        file as it was.

        Args:
            path: of the file, or a URL that fsspec knows (``s3://bucket/run/history.npz``).

        Returns:
            the path; of a URL, the URL.

        Raises:
            NormDynError: where ``meta`` holds something that JSON cannot say, or ``path`` cannot be
                written.
        """
        header, arrays = self._pack()
        # Stored, not deflated: a file can then never hold more than its own size, so that reading a
        # hostile one stays bounded.
        with replacing(path) as file:
            np.savez(file, header=np.frombuffer(header.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        return os.fspath(path) if is_remote(path) else local(path)

    def state_dict(self) -> dict[str, Any]:
        """Everything as one string and plain tensors, so that ``torch.load(...,
        weights_only=True)`` reads it."""
        header, arrays = self._pack()
        return {
            "header": header,
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, limits included."""
        arrays = {
            name: value.cpu().numpy().copy()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        self._unpack(state["header"], arrays)

    def _pack(self) -> tuple[str, dict[str, NDArray[Any]]]:
        header: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "meta": self.meta,
            "keys": list(self._columns),
        }
        arrays: dict[str, NDArray[Any]] = {}
        for part, thinned in (
            ("row", self._rows),
            ("event", self._events),
            ("vector", self._vectors),
        ):
            kinds = list(thinned.counts)
            header[part] = {
                "capacity": thinned.capacity,
                "max_kinds": thinned.max_kinds,
                "kinds": [
                    [kind, thinned.counts[kind], thinned.strides.get(kind, 1)] for kind in kinds
                ],
            }
            index = {kind: i for i, kind in enumerate(kinds)}
            arrays[part] = np.array(
                [(r.step, index[r.kind], r.number) for r in thinned.records], dtype=np.int64
            ).reshape(-1, 3)
        header["events"] = [[event.kind, event.name] for event in self.events]

        cells = np.full((len(self), len(self._columns)), np.nan, dtype=np.float32)
        present = np.zeros((len(self), len(self._columns)), dtype=np.bool_)
        for i, record in enumerate(self._rows.records):
            width = len(record.content.cells)
            cells[i, :width], present[i, :width] = record.content.cells, record.content.present
        arrays["cells"] = cells
        arrays["present"] = np.packbits(present, axis=1)
        arrays["optimizer_step"] = np.array(
            [record.content.optimizer_step for record in self._rows.records], dtype=np.int64
        )

        header["vectors"] = []
        for i, (name, size) in enumerate(self._vector_sizes.items()):
            records = [
                k for k, record in enumerate(self._vectors.records) if name in record.content.layout
            ]
            header["vectors"].append([name, size])
            arrays[f"records_{i}"] = np.array(records, dtype=np.int64)
            arrays[f"vectors_{i}"] = self.vectors(name)[1]
        try:
            return json.dumps(header), arrays
        except (TypeError, ValueError, RecursionError) as error:
            raise NormDynError(
                f"`History.meta` must hold only what JSON can say (str, int, float, bool, None, "
                f"list, dict): {error}."
            ) from error

    def _unpack(self, text: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        header = json.loads(text)
        _require(
            isinstance(header, dict) and header.get("format") == _FORMAT,
            "it is not a history of lightning-normdyn",
        )
        version = header["version"]
        _require(
            version in (_OLDER_VERSION, _VERSION) and not isinstance(version, bool),
            f"it has format version {shown(version)}, and this package reads versions "
            f"{_OLDER_VERSION} and {_VERSION}",
        )
        columns = {_text(key): i for i, key in enumerate(header["keys"])}
        _require(len(columns) == len(header["keys"]), "a key stands twice")
        _require(isinstance(header["meta"], dict), "`meta` is no dict")

        places: dict[str, tuple[Ints, dict[str, int], dict[str, int], list[str]]] = {}
        for part in ("row", "event", "vector"):
            kinds = [_text(kind) for kind, _, _ in header[part]["kinds"]]
            counts = {_text(kind): _count(count) for kind, count, _ in header[part]["kinds"]}
            strides = {_text(kind): _count(stride) for kind, _, stride in header[part]["kinds"]}
            places[part] = (_array(arrays, part, np.int64, (None, 3)), counts, strides, kinds)
            in_order = places[part][0][:, 0]
            _require(
                bool(((in_order > -_MOST) & (in_order < _MOST)).all()),
                f"a step of `{part}` is none that a run can reach",
            )
            _require(
                part == "event" or bool((in_order[1:] >= in_order[:-1]).all()),
                f"the steps of `{part}` are not in order",
            )

        def restore(thinned: _Thinned, part: str, contents: list[Any]) -> None:
            table, counts, strides, kinds = places[part]
            _require(
                len(contents) == len(table),
                f"`{part}` has {len(table)} places for {len(contents)} records",
            )
            _require(
                bool(((table[:, 1] >= 0) & (table[:, 1] < len(kinds)) & (table[:, 2] >= 0)).all()),
                f"a record of `{part}` has no kind",
            )
            thinned.capacity, thinned.max_kinds = (
                _count(header[part]["capacity"]),
                _count(header[part]["max_kinds"]),
            )
            thinned.restore(
                [
                    _Record(step, kinds[kind], number, content)
                    for (step, kind, number), content in zip(table.tolist(), contents, strict=True)
                ],
                counts,
                strides,
            )

        fresh = History()
        rows = len(places["row"][0])
        cells = _array(arrays, "cells", np.float32, (rows, len(columns)))
        if version == _OLDER_VERSION:
            present = ~np.isnan(cells)
        else:
            packed = _array(arrays, "present", np.uint8, (rows, -(-len(columns) // 8)))
            present = np.unpackbits(packed, axis=1, count=len(columns)).astype(np.bool_)
        optimizer_steps = _array(arrays, "optimizer_step", np.int64, (rows,))
        restore(
            fresh._rows,
            "row",
            [_Row(*row) for row in zip(optimizer_steps.tolist(), cells, present, strict=True)],
        )

        steps = places["event"][0][:, 0].tolist()
        names = [(_text(kind), _text(name)) for kind, name in header["events"]]
        _require(len(names) == len(steps), "events and their steps differ in number")
        restore(
            fresh._events,
            "event",
            [Event(step, kind, name) for step, (kind, name) in zip(steps, names, strict=True)],
        )

        contents: list[dict[str, Floats]] = [{} for _ in places["vector"][0]]
        for i, (name, size) in enumerate(header["vectors"]):
            records = _array(arrays, f"records_{i}", np.int64, (None,))
            values = _array(
                arrays, f"vectors_{i}", np.float32, (len(records), _count(size, least=0))
            )
            fresh._vector_sizes[_text(name)] = size
            for record, value in zip(records.tolist(), values, strict=True):
                _require(
                    0 <= record < len(contents),
                    f"`{name}` points at record {record} of {len(contents)}",
                )
                contents[record][name] = value
        bundles: list[_Vectors] = []
        for content in contents:
            bundles.append(_in_one_piece(content, bundles[-1] if bundles else None))
        restore(fresh._vectors, "vector", bundles)

        # Only now, when all of it has proved sound.
        self.meta, self._columns, self._vector_sizes = header["meta"], columns, fresh._vector_sizes
        self._rows, self._events, self._vectors = fresh._rows, fresh._events, fresh._vectors


def load_history(path: str | os.PathLike[str]) -> History:
    """Read what :meth:`History.save` wrote. Nothing in the file is executed, and memory stays
    within the file's size.

    Raises:
        NormDynError: for a missing, damaged, foreign or hostile file.

    Example:
        >>> import tempfile, os
        >>> history = History()
        >>> history.append(0, {"weight_norm/conv.weight": 2.0}, optimizer_step=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_history(history.save(os.path.join(folder, "run.npz")))
        History(1 rows, steps 0 to 0, 1 keys)
    """
    if not is_remote(path) and not local(path).is_file():
        raise NormDynError(
            f"there is no history file `{path}`; write one with `history.save(path)`."
        )
    history = History()
    try:
        arrays = _read_npz(path)
        _require("header" in arrays, "it is not a history of lightning-normdyn")
        history._unpack(arrays.pop("header").tobytes().decode(), arrays)
    except FileNotFoundError as error:
        raise NormDynError(
            f"there is no history file `{path}`; write one with `history.save(path)`."
        ) from error
    except NormDynError as error:
        raise NormDynError(
            f"`{path}` cannot be read as a history: {error}. Save it again from the run."
        ) from error
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise NormDynError(
            f"`{path}` cannot be read as a history: no undamaged .npz file ({error}). Save it "
            f"again from the run."
        ) from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
        EOFError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        raise NormDynError(
            f"`{path}` cannot be read as a history: it is damaged ({type(error).__name__}: "
            f"{error}). Save it again from the run."
        ) from error
    return history


def _read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """``numpy.load`` for files one does not trust: no pickle, no compression, and no array larger
    than the bytes that are really there."""
    arrays: dict[str, NDArray[Any]] = {}
    with ExitStack() as opened:
        file: BinaryIO = (
            io.BytesIO(read(path))
            if is_remote(path)
            else opened.enter_context(open(local(path), "rb"))
        )
        size = file.seek(0, os.SEEK_END)
        archive = opened.enter_context(zipfile.ZipFile(file))
        members = archive.infolist()
        _require(
            all(member.compress_type == zipfile.ZIP_STORED for member in members),
            "its parts are compressed, which this package never does",
        )
        _require(
            sum(member.file_size for member in members) <= size,
            "its parts claim more bytes than it has",
        )
        for member in members:
            content = io.BytesIO(archive.read(member))
            if np.lib.format.read_magic(content) != (1, 0):
                raise NormDynError(f"`{member.filename}` is no plain array")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(content)
            _require(
                dtype in (np.float32, np.int64, np.uint8),
                f"`{member.filename}` holds {dtype}, where only plain numbers belong",
            )
            _require(
                not fortran_order or len(shape) < 2, f"`{member.filename}` is stored by columns"
            )
            rest = content.read()
            _require(
                all(size >= 0 for size in shape) and math.prod(shape) * dtype.itemsize == len(rest),
                f"`{member.filename}` is cut off",
            )
            arrays[member.filename.removesuffix(".npy")] = (
                np.frombuffer(rest, dtype=dtype).reshape(shape).copy()
            )
    return arrays


def _array(
    arrays: Mapping[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    _require(name in arrays, f"`{name}` is missing")
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    _require(fits and array.dtype == dtype, f"`{name}` is {array.dtype} of shape {array.shape}")
    return array


def _check_steps(*steps: int) -> None:
    for step in steps:
        if not -_MOST < step < _MOST:
            raise NormDynError(f"a step of {shown(step)} was asked for; no run counts beyond 2^53.")


def _as_float(value: float) -> float:
    """A number as a float; what diverges is inf, and an integer beyond that was never measured.

    Raises:
        NormDynError: for an integer that no float can hold.
    """
    try:
        return float(value)
    except OverflowError as error:
        raise NormDynError(
            f"a value of {shown(value)} was to be kept, and no float can hold it."
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise NormDynError(f"a name is {type(value).__name__}, not text")
    return value


def _count(value: object, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
        raise NormDynError(
            f"a number is {shown(value)}, where a whole number from {least} to 2^53 belongs"
        )
    return value


def _require(sound: bool, otherwise: str) -> None:
    if not sound:
        raise NormDynError(otherwise)


def _refuse_name(what: str, name: str, known: list[str]) -> NoReturn:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    hint = f"closest: {', '.join(close)}" if close else "there are none"
    raise NormDynError(
        f"{what} `{name}` was asked for, and this history has {len(known)} others ({hint})."
    )


def _same_cells(present: Flags) -> str:
    """A short name for which cells of a row are filled."""
    return f"{zlib.crc32(np.flatnonzero(present).tobytes()):08x}"


def _total_bytes(content: _Vectors) -> int:
    return int(content.values.nbytes)
