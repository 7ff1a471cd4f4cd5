"""The format of a history on disk and in a checkpoint: plain arrays and a JSON header, read with
distrust.

A file holds no pickle and nothing compressed: reading a hostile one executes nothing and takes no
more memory than the file is long.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.engine.value_checks import MOST, many, require, table, text, whole
from lightning_normdyn.errors import NormDynError, shown
from lightning_normdyn.storage import is_remote, local, read

from .records import (
    Bundle,
    Columns,
    Contents,
    Event,
    Floats,
    Ints,
    Record,
    Row,
    ThinnedList,
    bundled,
)

Arrays = dict[str, NDArray[Any]]

_FORMAT = "lightning-normdyn history"
_VERSION = 2
_check_text = text()
_check_count = whole(1)


# ------------------------------------------------------------------------------------------ writing


def pack(contents: Contents) -> tuple[str, Arrays]:
    """A history as a JSON header and arrays of plain numbers.

    Raises:
        NormDynError: where ``meta`` holds something that JSON cannot express.
    """
    events = [record.content for record in contents.events.records]
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "meta": contents.meta,
        "keys": list(contents.columns),
        "events": [[event.kind, event.name] for event in events],
        "vectors": list(contents.vector_sizes.items()),
    }
    arrays = _pack_rows(contents)
    for part, thinned in contents.lists().items():
        header[part] = _pack_thinning(thinned)
        arrays[part] = _pack_places(thinned)
    # Arrays by number: names may hold any characters, members of a zip may not.
    for i, name in enumerate(contents.vector_sizes):
        indices, arrays[f"vectors_{i}"] = contents.vectors_of(name)
        arrays[f"records_{i}"] = np.array(indices, dtype=np.int64)

    try:
        return json.dumps(header), arrays
    except (TypeError, ValueError, RecursionError) as error:
        raise NormDynError(
            f"`History.meta` must hold only what JSON can say (str, int, float, bool, None, "
            f"list, dict): {error}."
        ) from error


def _pack_thinning(thinned: ThinnedList) -> dict[str, Any]:
    """The limits of a list, and where the thinning of each kind stands."""
    kinds = []
    for kind, count in thinned.counts.items():
        kinds.append([kind, count, thinned.strides.get(kind, 1)])
    return {"capacity": thinned.capacity, "max_kinds": thinned.max_kinds, "kinds": kinds}


def _pack_places(thinned: ThinnedList) -> Ints:
    """Step, kind and number of each record: ``(records, 3)``."""
    # Kinds by number: the header holds their names once.
    index = {kind: i for i, kind in enumerate(thinned.counts)}
    places = []
    for record in thinned.records:
        places.append((record.step, index[record.kind], record.number))
    return np.array(places, dtype=np.int64).reshape(-1, 3)


def _pack_rows(contents: Contents) -> Arrays:
    rows = [record.content for record in contents.rows.records]
    shape = (len(rows), len(contents.columns))
    cells = np.full(shape, np.nan, dtype=np.float32)
    present = np.zeros(shape, dtype=np.bool_)
    for i, row in enumerate(rows):
        # A row ends before the columns that came after it.
        width = len(row.cells)
        cells[i, :width] = row.cells
        present[i, :width] = row.present
    return {
        "cells": cells,
        # Eight cells in a byte: a flag of its own for each would add a quarter to the file.
        "present": np.packbits(present, axis=1),
        "optimizer_step": np.array([row.optimizer_step for row in rows], dtype=np.int64),
    }


# ------------------------------------------------------------------------------------------ reading


class _Packed(NamedTuple):
    """What :func:`pack` is said to have given; every look at it is checked."""

    header: dict[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    def array(
        self,
        name: str,
        dtype: type,
        shape: tuple[int | None, ...],
    ) -> NDArray[Any]:
        """An array of this type and shape; None stands for any size."""
        require(name in self.arrays, f"`{name}` is missing")
        array = self.arrays[name]
        fits = array.ndim == len(shape)
        for wanted, size in zip(shape, array.shape, strict=False):
            fits = fits and wanted in (None, size)
        require(fits and array.dtype == dtype, f"`{name}` is {array.dtype} of shape {array.shape}")
        return array


def unpack(text: str, arrays: Mapping[str, NDArray[Any]]) -> Contents:
    """What :func:`pack` was given.

    Raises:
        NormDynError: for what :func:`pack` would not have made, and whatever else parsing a damaged
            or hostile header provokes.
    """
    header = json.loads(text)
    ours = isinstance(header, dict) and header.get("format") == _FORMAT
    require(ours, "it is not a history of lightning-normdyn")
    # Read as this version, another one might give wrong curves without an error.
    require(
        header["version"] == _VERSION,
        f"it has format version {shown(header['version'])}, and this package reads {_VERSION}",
    )
    # What `meta` holds is for its readers to distrust.
    require(isinstance(header["meta"], dict), "`meta` is no dict")

    packed = _Packed(header, arrays)
    # The limits here do not matter: those of the file follow.
    contents = Contents(max_rows=4, max_vector_bytes=1)
    contents.meta = header["meta"]
    many(_check_text)(header["keys"], "`keys`")
    contents.columns = Columns(header["keys"])
    contents.vector_sizes = dict(header["vectors"])
    table(_check_text, whole())(contents.vector_sizes, "`vectors`")
    # A name that stands twice would move all arrays behind it to other names.
    require(len(contents.columns) == len(header["keys"]), "a key stands twice")
    require(len(contents.vector_sizes) == len(header["vectors"]), "a name stands twice")

    parts: dict[str, Sequence[Row | Event | Bundle]] = {
        "row": _rows(packed, len(contents.columns)),
        "event": _events(packed),
        "vector": _bundles(packed, contents.vector_sizes),
    }
    for part, thinned in contents.lists().items():
        _restore(thinned, part, packed, parts[part])
    return contents


def _places(packed: _Packed, part: str) -> Ints:
    return packed.array(part, np.int64, (None, 3))


def _rows(packed: _Packed, width: int) -> list[Row]:
    count = len(_places(packed, "row"))
    cells = packed.array("cells", np.float32, (count, width))
    bits = packed.array("present", np.uint8, (count, math.ceil(width / 8)))
    present = np.unpackbits(bits, axis=1, count=width).astype(np.bool_)
    optimizer_steps = packed.array("optimizer_step", np.int64, (count,))
    # tolist: Python's integers, which JSON and dicts of a row can hold.
    return list(map(Row, optimizer_steps.tolist(), cells, present))


def _events(packed: _Packed) -> list[Event]:
    steps = _places(packed, "event")[:, 0].tolist()
    named = packed.header["events"]
    require(len(named) == len(steps), "events and their steps differ in number")
    events = []
    for step, (kind, name) in zip(steps, named, strict=True):
        many(_check_text)([kind, name], "an event")
        events.append(Event(step, kind, name))
    return events


def _bundles(packed: _Packed, sizes: Mapping[str, int]) -> list[Bundle]:
    contents: list[dict[str, Floats]] = [{} for _ in _places(packed, "vector")]
    for i, (name, size) in enumerate(sizes.items()):
        indices = packed.array(f"records_{i}", np.int64, (None,))
        values = packed.array(f"vectors_{i}", np.float32, (len(indices), size))
        for index, array in zip(indices.tolist(), values, strict=True):
            inside = 0 <= index < len(contents)
            require(inside, f"`{name}` points at record {index} of {len(contents)}")
            contents[index][name] = array

    # Each after the other, so that neighbours that are alike share a layout.
    bundles: list[Bundle] = []
    for arrays in contents:
        bundles.append(bundled(arrays, bundles[-1] if bundles else None))
    return bundles


def _restore(
    thinned: ThinnedList,
    part: str,
    packed: _Packed,
    contents: Sequence[Row | Event | Bundle],
) -> None:
    """Fill a list with its records, and set its limits and where its thinning stands."""
    places = _places(packed, part)
    steps, kind_indices, numbers = places.T
    about = packed.header[part]
    counts = {kind: count for kind, count, _ in about["kinds"]}
    strides = {kind: stride for kind, _, stride in about["kinds"]}
    for by_kind in (counts, strides):
        table(_check_text, _check_count)(by_kind, f"`{part}`")
    # Records name their kind by its place here, so a kind that stands twice counts twice.
    kinds = [kind for kind, _, _ in about["kinds"]]

    reachable = bool(((steps > -MOST) & (steps < MOST)).all())
    require(reachable, f"a step of `{part}` is none that a run can reach")
    # Events may be marked for an earlier step; rows and arrays come in order.
    in_order = part == "event" or bool((steps[1:] >= steps[:-1]).all())
    require(in_order, f"the steps of `{part}` are not in order")
    # To Python a negative index is a valid one: it would name a kind from the end.
    has_kind = (kind_indices >= 0) & (kind_indices < len(kinds))
    counted = has_kind & (numbers >= 0)
    require(bool(counted.all()), f"a record of `{part}` has no kind")

    for limit in ("capacity", "max_kinds"):
        _check_count(about[limit], f"`{part}.{limit}`")
    thinned.capacity = about["capacity"]
    thinned.max_kinds = about["max_kinds"]
    records = []
    for (step, kind, number), content in zip(places.tolist(), contents, strict=True):
        records.append(Record(step, kinds[kind], number, content))
    thinned.restore(records, counts, strides)


def read_npz(path: str | os.PathLike[str]) -> Arrays:
    """``numpy.load`` for files one does not trust: no pickle, no compression, and no array larger
    than the bytes that are really there.

    Raises:
        NormDynError: for what :meth:`History.save` would not have written, and whatever else
            parsing a damaged or hostile file provokes.
    """
    arrays: Arrays = {}
    with ExitStack() as opened:
        file: BinaryIO
        # zipfile seeks, which not every scheme can do on a file at a URL.
        if is_remote(path):
            file = io.BytesIO(read(path))
        else:
            file = opened.enter_context(open(local(path), "rb"))
        size = file.seek(0, os.SEEK_END)
        archive = opened.enter_context(zipfile.ZipFile(file))

        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        require(stored, "its parts are compressed, which this package never does")
        # Two members may point at the same bytes: a small file would claim any amount of memory.
        claimed = sum(member.file_size for member in members)
        require(claimed <= size, "its parts claim more bytes than it has")
        for member in members:
            name = member.filename.removesuffix(".npy")
            arrays[name] = _parse_npy(member.filename, archive.read(member))
    return arrays


def _parse_npy(name: str, content: bytes) -> NDArray[Any]:
    """One array; the header must not promise more than the bytes behind it."""
    file = io.BytesIO(content)
    # Later versions of the format are for structured types, which a history never has.
    require(np.lib.format.read_magic(file) == (1, 0), f"`{name}` is no plain array")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    # An array of objects would need pickle, which executes what it reads.
    numbers = dtype in (np.float32, np.int64, np.uint8)
    require(numbers, f"`{name}` holds {dtype}, where only plain numbers belong")
    # Read by rows below, an array stored by columns would be scrambled without an error.
    require(not fortran_order or len(shape) < 2, f"`{name}` is stored by columns")

    data = file.read()
    size = math.prod(shape) * dtype.itemsize
    # Two negative sizes have a positive product.
    whole = size == len(data) and min(shape, default=0) >= 0
    require(whole, f"`{name}` is cut off")
    # Copied: an array over bytes could not be written to.
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
