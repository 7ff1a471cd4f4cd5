"""The rows of a run kept in memory and in one file: what the monitor writes, and what plots,
reports and the replay read.

Bounded however long the run is: a full history drops every second row, and from then on keeps only
every 2nd (4th, 8th, ...) new one. Legend: ``s`` recorded steps, ``n`` weight vectors.
"""

from __future__ import annotations

import difflib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_normdyn.engine.value_checks import DAMAGE, MOST, require
from lightning_normdyn.errors import NormDynError, shown
from lightning_normdyn.storage import is_remote, local, replacing

from .history_file import pack, read_npz, unpack
from .records import OTHER, Bundle, Contents, Event, Flags, Floats, Ints, Record, Row, bundled


class History:
    """Rows of named numbers by step, with marked events and optional per-vector arrays.

    A row holds float32 values under log keys such as ``effective_lr/layer1.0.conv1.weight``. A key
    may be missing from a row (an optimizer that did not step). A value may be NaN or infinite,
    which is not the same as missing: a run that diverged shows it. Iterating, or ``history[i]``,
    gives dicts with ``"step"``, ``"optimizer_step"`` and the row's keys.

    Args:
        max_rows: most rows to hold, at least 4. The first and the newest row are always among them.
        max_vector_bytes: most memory for the per-vector arrays, which are thinned in the same way.

    Example:
        >>> history = History()
        >>> for step in range(3):
        ...     values = {"effective_lr/conv.weight": 0.5 / (step + 1)}
        ...     history.append(step, values, optimizer_step=step + 1)
        >>> history[0]
        {'step': 0, 'optimizer_step': 1, 'effective_lr/conv.weight': 0.5}
        >>> steps, values = history.column("effective_lr/conv.weight")
        >>> steps.tolist(), values[:2].tolist()
        ([0, 1, 2], [0.5, 0.25])
    """

    def __init__(self, max_rows: int = 4096, *, max_vector_bytes: int = 2**27) -> None:
        limits = (("max_rows", max_rows, 4), ("max_vector_bytes", max_vector_bytes, 1))
        for name, limit, least in limits:
            # 2^53: with a larger limit the file could not be read back.
            allowed = f"`{name}` must be at least {least} and below 2^53"
            require(least <= limit < MOST, f"{allowed}, got {shown(limit)}.")
        self._contents = Contents(max_rows, max_vector_bytes)

    @property
    def meta(self) -> dict[str, Any]:
        """Anything JSON can express about the run: its settings, the table of targets."""
        return self._contents.meta

    @meta.setter
    def meta(self, meta: dict[str, Any]) -> None:
        self._contents.meta = meta

    @property
    def newest_step(self) -> int | None:
        """The step of the newest row; None without any."""
        newest = self._contents.rows.newest
        return newest.step if newest else None

    @property
    def max_rows(self) -> int:
        """Most rows it holds."""
        return self._contents.rows.capacity

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
        rows = self._contents.rows
        newest = rows.newest
        if newest and step < newest.step:
            raise NormDynError(
                f"a row of step {step} was asked for, but the newest row is of step "
                f"{newest.step}; rows come in order. "
                f"After going back to a checkpoint, call `truncate_after({step - 1})` first."
            )
        cells, present = self._contents.cells(values)
        kind = OTHER
        # Consecutive rows mostly have the same columns: these share one array of flags.
        if newest and np.array_equal(newest.content.present, present):
            present = newest.content.present
            kind = newest.kind
        # Of a row that was of one kind too many, its own may have room by now.
        if kind == OTHER:
            kind = _kind_of_row(present)
        rows.append(int(step), kind, Row(int(optimizer_step), cells, present))

    def amend(self, values: Mapping[str, float]) -> None:
        """Add keys to the newest row, if it does not have them yet.

        Raises:
            NormDynError: for an empty history.
        """
        newest = self._contents.rows.newest
        if newest is None:
            raise NormDynError(
                "the newest row was to be amended, and this history has none yet; call `append` "
                "first."
            )
        row: Row = newest.content
        columns = self._contents.columns
        missing = {}
        for key, value in values.items():
            # No row has a cell behind all columns.
            if not row.has(columns.get(key, len(columns))):
                missing[key] = value
        cells, present = self._contents.cells(missing)

        # The row may be shorter than the new cells: columns may have come since.
        width = len(row.cells)
        cells[:width] = np.where(row.present, row.cells, cells[:width])
        present[:width] |= row.present
        self._contents.rows.replace_newest(Row(row.optimizer_step, cells, present))

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
        copies: dict[str, Floats] = {}
        for name, array in arrays.items():
            # A copy: the caller may go on with its array.
            copies[name] = np.array(array, dtype=np.float32)
            self._check_vector_size(name, copies[name])

        vectors = self._contents.vectors
        newest = vectors.newest
        if newest and step < newest.step:
            raise NormDynError(
                f"per-vector arrays of step {step} come after those of step {newest.step}; records "
                f"come in order."
            )
        # A second optimizer of the same step adds to its record.
        if newest and step == newest.step:
            together = {**newest.content.arrays(), **copies}
            vectors.replace_newest(bundled(together, newest.content))
        else:
            bundle = bundled(copies, newest.content if newest else None)
            vectors.append(int(step), " ".join(sorted(copies)), bundle)

    def _check_vector_size(self, name: str, array: Floats) -> None:
        if array.ndim != 1:
            raise NormDynError(
                f"per-vector arrays have the shape (n,); `{name}` has {array.shape}."
            )
        size = self._contents.vector_sizes.setdefault(name, array.size)
        if array.size != size:
            raise NormDynError(
                f"`{name}` has {array.size} vectors now and had {size} before; another model needs "
                f"a History of its own."
            )

    def forget_vectors(self, name: str) -> None:
        """Forget the arrays of a name, so that it may have another length from now on: its weight
        is cut into other vectors."""
        if name not in self._contents.vector_sizes:
            return
        del self._contents.vector_sizes[name]
        vectors = self._contents.vectors
        records: list[Record] = []
        bundle: Bundle | None = None
        # Records are never changed in place: forks share them.
        for record in vectors.records:
            arrays = record.content.arrays()
            arrays.pop(name, None)
            bundle = bundled(arrays, bundle)
            records.append(record._replace(content=bundle))
        vectors.restore(records, vectors.counts, vectors.strides)

    def vector_count(self, name: str) -> int | None:
        """The length of the arrays of a name; None for an unknown one."""
        return self._contents.vector_sizes.get(name)

    def mark(self, step: int, kind: str, name: str = "") -> None:
        """Remember an event, e.g. ``mark(800, "lr_drop")``; plots draw it."""
        _check_steps(step)
        event = Event(int(step), kind, name)
        self._contents.events.append(event.step, f"{kind} {name}", event)

    def truncate_after(self, step: int) -> None:
        """Forget all that is later than ``step``: what a crashed run did between its last
        checkpoint and its end."""
        for records in self._contents.lists().values():
            records.truncate_after(step)

    def fork(self) -> History:
        """A history that starts as this one and goes on by itself; ``meta`` and the recorded
        arrays, which never change, are shared."""
        other = History()
        other._contents = self._contents.fork()
        return other

    def show(self, other: History) -> None:
        """Show what ``other`` shows, from now on too, to everybody who holds this object."""
        # The same object, not a copy: what is recorded later shows here, too.
        self._contents = other._contents

    # -------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self._contents.rows.records)

    @overload
    def __getitem__(self, index: int) -> dict[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, float]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, float] | list[dict[str, float]]:
        rows = self._contents.rows.records
        if isinstance(index, slice):
            return [self._as_dict(record) for record in rows[index]]
        return self._as_dict(rows[index])

    def __iter__(self) -> Iterator[dict[str, float]]:
        return map(self._as_dict, self._contents.rows.records)

    def __repr__(self) -> str:
        span = ""
        if len(self):
            span = f", steps {self._contents.rows.records[0].step} to {self.newest_step}"
        return f"History({len(self)} rows{span}, {len(self._contents.columns)} keys)"

    def keys(self) -> list[str]:
        """All log keys, in the order in which they first came."""
        return list(self._contents.columns)

    def has(self, key: str) -> bool:
        """Whether ``key`` was ever recorded."""
        return key in self._contents.columns

    def column(self, key: str) -> tuple[Ints, Floats]:
        """One curve: the steps at which ``key`` was recorded, int64 of shape ``(s,)``, and its
        values, float32 of shape ``(s,)``.

        The values of a run that diverged contain NaN.

        Raises:
            NormDynError: for a key that was never recorded.
        """
        if not self.has(key):
            _refuse_name("key", key, self.keys())
        return self.curve(key)

    def curve(self, key: str) -> tuple[Ints, Floats]:
        """As :meth:`column`, but empty for a key that was never recorded."""
        columns = self._contents.columns
        # No row has a cell behind all columns.
        column = columns.get(key, len(columns))
        steps = []
        values = []
        for record in self._contents.rows.records:
            row: Row = record.content
            if row.has(column):
                steps.append(record.step)
                values.append(row.cells[column])
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float32)

    def curves(self, keys: Sequence[str]) -> dict[str, tuple[Ints, Floats]]:
        """Several curves at once, each as :meth:`curve`.

        Args:
            keys: of any number. A thousand of them are read in the time of some dozens one by
                one, each of which goes through all rows.
        """
        # No row has a cell behind all columns.
        known = self._contents.columns
        columns = np.array([known.get(key, len(known)) for key in keys], dtype=np.int64)
        records = self._contents.rows.records
        steps = np.array([record.step for record in records], dtype=np.int64)
        values = np.zeros((len(keys), len(records)), dtype=np.float32)
        present = np.zeros((len(keys), len(records)), dtype=np.bool_)
        for place, record in enumerate(records):
            row: Row = record.content
            # The row may end before columns that came later.
            inside = np.flatnonzero(columns < len(row.cells))
            values[inside, place] = row.cells[columns[inside]]
            present[inside, place] = row.present[columns[inside]]
        curves = {}
        for key, own, recorded in zip(keys, values, present, strict=True):
            curves[key] = (steps[recorded], own[recorded])
        return curves

    @property
    def events(self) -> list[Event]:
        """The marked events, in the order in which they were marked."""
        return [record.content for record in self._contents.events.records]

    def vector_names(self) -> list[str]:
        """Names of the per-vector arrays, in the order in which they first came."""
        return list(self._contents.vector_sizes)

    def vectors(self, name: str) -> tuple[Ints, Floats]:
        """One per-vector array over time: steps, int64 of shape ``(s,)``, and values, float32 of
        shape ``(s, n)``.

        Raises:
            NormDynError: for a name that was never recorded.
        """
        if self.vector_count(name) is None:
            _refuse_name("per-vector array", name, self.vector_names())
        places, table = self._contents.vectors_of(name)
        steps = [self._contents.vectors.records[place].step for place in places]
        return np.array(steps, dtype=np.int64), table

    def _as_dict(self, record: Record) -> dict[str, float]:
        row: Row = record.content
        values: dict[str, float] = {"step": record.step, "optimizer_step": row.optimizer_step}
        # Not strict: the row may end before columns that came later.
        recorded = compress(
            zip(self._contents.columns, row.cells.tolist(), strict=False), row.present
        )
        return {**values, **dict(recorded)}

    # ------------------------------------------------------------------------ files and checkpoints

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
        header, arrays = pack(self._contents)
        arrays["header"] = np.frombuffer(header.encode(), dtype=np.uint8)
        # Stored, not deflated: a file can then never hold more than its own size, so that reading a
        # hostile one stays bounded.
        with replacing(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return os.fspath(path) if is_remote(path) else local(path)

    def state_dict(self) -> dict[str, Any]:
        """Everything as one string and plain tensors, so that ``torch.load(...,
        weights_only=True)`` reads it."""
        header, arrays = pack(self._contents)
        # Tensors: `weights_only=True` refuses arrays of numpy.
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"header": header, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, limits included.

        Raises:
            NormDynError: for what :meth:`state_dict` would not have given, and whatever else a
                damaged state provokes; this history then stays as it was.
        """
        arrays = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                # A copy: the state may be loaded again, or into another history.
                arrays[name] = value.cpu().numpy().copy()
        self._contents = unpack(state["header"], arrays)


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
    missing = f"there is no history file `{path}`; write one with `history.save(path)`."
    if not is_remote(path) and not local(path).is_file():
        raise NormDynError(missing)
    history = History()
    try:
        arrays = read_npz(path)
        if "header" not in arrays:
            raise NormDynError("it is not a history of lightning-normdyn")
        header = arrays.pop("header").tobytes().decode(errors="replace")
        history._contents = unpack(header, arrays)
    # Of a URL it shows only now that nothing is there.
    except FileNotFoundError as error:
        raise NormDynError(missing) from error
    # Whatever a damaged or hostile file provokes in the parsers of zip, numpy and JSON says
    # something about the file, and nothing about this program.
    except Exception as error:
        ours = isinstance(error, NormDynError)
        reason = error if ours else f"it is damaged ({type(error).__name__}: {error})"
        raise NormDynError(
            f"`{path}` cannot be read as a history: {reason}. Save it again from the run."
        ) from error
    return history


def check_history(value: Any, where: str) -> None:
    """Refuse a value of a checkpoint that is not what :meth:`History.state_dict` gives: it is read
    before it is believed."""
    is_state = isinstance(value, dict) and isinstance(value.get("header"), str)
    require(is_state, f"{where} is no history")
    # Loaded, and not only looked at: nothing less shows whether a later load will succeed.
    try:
        History().load_state_dict(value)
    except DAMAGE as error:
        raise NormDynError(f"{where} is no history ({type(error).__name__}: {error})") from error


def _check_steps(*steps: int) -> None:
    for step in steps:
        if not -MOST < step < MOST:
            raise NormDynError(f"a step of {shown(step)} was asked for; no run counts beyond 2^53.")


def _refuse_name(what: str, name: str, known: list[str]) -> NoReturn:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    # Where nothing is alike, a few names still show how names look.
    close = matches or known[:3]
    hint = f"closest: {', '.join(close)}" if close else "there are none"
    raise NormDynError(
        f"{what} `{name}` was asked for, and this history has {len(known)} others ({hint})."
    )


def _kind_of_row(present: Flags) -> str:
    """A short name for which cells of a row are recorded: rows of different optimizers are thinned
    apart."""
    # Not the keys themselves: a row of a large network has thousands.
    return f"{zlib.crc32(np.flatnonzero(present).tobytes()):08x}"
