"""No file can do more than be refused."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from containers import holder_of, places
from histories import assert_same_history, filled_history

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import load_history


def test_the_file_opens_without_pickle(tmp_path):
    with np.load(filled_history().save(tmp_path / "run.npz"), allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file.files}["cells"] == "f"


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    history = filled_history()
    history.meta["optimizer"] = object()
    with pytest.raises(NormDynError, match="JSON"):
        history.save(tmp_path / "run.npz")
    assert os.listdir(tmp_path) == []


def rewritten(path, **replaced):
    """The file at ``path`` with some of its arrays replaced (None: left out)."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays.update(replaced)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def with_header(path, **changed):
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    header.update(changed)
    rewritten(path, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bad_npy(shape: str) -> bytes:
    text = (
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    )
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 8


def member_replaced(path, name: str, content: bytes):
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for item, data in members.items():
            archive.writestr(item, data)


def compressed(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez_compressed(path, **arrays)


DAMAGES = {
    "empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("step,loss\n1,2\n"),
    "first half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last half": lambda path: path.write_bytes(path.read_bytes()[path.stat().st_size // 2 :]),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "object array": lambda path: rewritten(path, cells=np.array([Bomb()], dtype=object)),
    "object array as header": lambda path: rewritten(path, header=np.array([Bomb()], dtype=object)),
    "checkpoint": lambda path: torch.save({"state_dict": torch.ones(2)}, path),
    "foreign npz": lambda path: np.savez(path, x=np.arange(3)),
    "no cells": lambda path: rewritten(path, cells=None),
    "cells too short": lambda path: rewritten(path, cells=np.zeros((2, 2), dtype=np.float32)),
    "cells of doubles": lambda path: rewritten(path, cells=np.zeros((6, 2))),
    "steps out of order": lambda path: rewritten(
        path, row=np.array([[5 - i, 0, i] for i in range(6)])
    ),
    "no such kind": lambda path: rewritten(path, row=np.array([[i, 99, i] for i in range(6)])),
    "vectors point outside": lambda path: rewritten(path, records_0=np.arange(6) + 3),
    "huge shape": lambda path: member_replaced(
        path, "cells.npy", bad_npy("(1000000000000, 1000000000000)")
    ),
    "negative shape": lambda path: member_replaced(path, "cells.npy", bad_npy("(-2, -1)")),
    "code as shape": lambda path: member_replaced(
        path, "cells.npy", bad_npy("__import__('os').mkdir('executed')")
    ),
    "compressed": compressed,
    "header no JSON": lambda path: rewritten(
        path, header=np.frombuffer(b"{'a': 1", dtype=np.uint8)
    ),
    "header deep": lambda path: rewritten(
        path, header=np.frombuffer(b"[" * 200_000, dtype=np.uint8)
    ),
    "header a list": lambda path: rewritten(path, header=np.frombuffer(b"[]", dtype=np.uint8)),
    "earlier version": lambda path: with_header(path, version=1),
    "later version": lambda path: with_header(path, version=3),
    "keys no text": lambda path: with_header(path, keys=[["a"], 2]),
    "keys twice": lambda path: with_header(path, keys=["a", "a"]),
    "meta no dict": lambda path: with_header(path, meta=[1]),
    "events missing": lambda path: with_header(path, events=[]),
    "vector size hostile": lambda path: with_header(
        path, vectors=[["weight_norm/conv.weight", -3]]
    ),
    "capacity hostile": lambda path: with_header(
        path, row={"capacity": "1", "max_kinds": 1, "kinds": [["a", 1, 1]]}
    ),
    "count hostile": lambda path: with_header(
        path, row={"capacity": 8, "max_kinds": 1, "kinds": [["a", 10**30, 1]]}
    ),
    "capacity huge": lambda path: with_header(
        path, row={"capacity": 10**4000, "max_kinds": 1, "kinds": [["a", 1, 1]]}
    ),
    "negative kind": lambda path: rewritten(path, row=np.array([[i, -1, i] for i in range(6)])),
    "step out of reach": lambda path: rewritten(
        path, row=np.array([[2**62 + i, 0, i] for i in range(6)])
    ),
    "event out of reach": lambda path: rewritten(path, event=np.array([[-(2**63), 0, 0]])),
    "stride zero": lambda path: with_header(
        path, row={"capacity": 8, "max_kinds": 1, "kinds": [["a", 1, 0]]}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_hostile_file_is_refused_and_runs_nothing(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = filled_history().save(tmp_path / "run.npz")
    damage(path)
    with pytest.raises(NormDynError, match=r"run\.npz` cannot be read as a history"):
        load_history(path)
    assert os.listdir(tmp_path) == ["run.npz"]


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = filled_history().save(tmp_path / "run.npz")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with contextlib.suppress(
            NormDynError
        ):  # any other exception, and any other content, fails the test
            assert_same_history(load_history(path), filled_history())


def test_an_integer_of_thousands_of_digits_anywhere_in_the_header_is_refused(tmp_path):
    path = filled_history().save(tmp_path / "run.npz")
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    numbers = []
    for place in places(header):
        number = holder_of(header, place)[place[-1]]
        if place[0] != "meta" and isinstance(number, int) and not isinstance(number, bool):
            numbers.append(place)
    assert len(numbers) > 10
    for place in numbers:
        changed = copy.deepcopy(header)
        holder_of(changed, place)[place[-1]] = 10**4000
        with_header(path, **changed)
        with pytest.raises(NormDynError, match="cannot be read as a history") as said:
            load_history(path)
        assert len(str(said.value)) < 1000, place


@pytest.mark.parametrize("path", ["nowhere.npz", "."])
def test_what_is_no_file_is_refused(tmp_path, path):
    with pytest.raises(NormDynError, match="there is no history file"):
        load_history(tmp_path / path)
