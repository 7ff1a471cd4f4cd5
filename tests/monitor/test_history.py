"""history.py: what goes in comes out, memory stays bounded, and no file can do more than be
refused."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor import history as module
from lightning_normdyn.monitor.history import Event, History, load_history


def filled(rows: int = 6, **limits: int) -> History:
    history = History(**limits)
    history.meta = {"targets": [["conv.weight", "BatchNorm"]], "lr": 0.1}
    for step in range(rows):
        values = {"effective_lr/conv.weight": 1.0 / (step + 1), "effective_lr/fc.weight": 2.0}
        if step % 2:
            del values["effective_lr/fc.weight"]
        history.append(10 * step, values, optimizer_step=step + 1)
        history.append_vectors(10 * step, {"weight_norm/conv.weight": np.arange(3) + step})
    history.mark(20, "lr_drop")
    history.mark(30, "rescale", "conv.weight")
    return history


def assert_same(one: History, two: History) -> None:
    assert list(one) == list(two)
    assert one.keys() == two.keys()
    assert one.events == two.events
    assert one.meta == two.meta
    assert one.max_rows == two.max_rows
    assert one.vector_names() == two.vector_names()
    for name in one.vector_names():
        for a, b in zip(one.vectors(name), two.vectors(name), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_rows_have_only_the_keys_that_were_recorded():
    history = filled()
    assert len(history) == 6
    assert history[0] == {
        "step": 0,
        "optimizer_step": 1,
        "effective_lr/conv.weight": 1.0,
        "effective_lr/fc.weight": 2.0,
    }
    assert history[-1] == {
        "step": 50,
        "optimizer_step": 6,
        "effective_lr/conv.weight": pytest.approx(1 / 6),
    }
    assert history[1:3] == list(history)[1:3]
    with pytest.raises(IndexError):
        history[6]


def test_column_leaves_gaps_out():
    steps, values = filled().column("effective_lr/fc.weight")
    assert steps.tolist() == [0, 20, 40]
    assert values.tolist() == [2.0, 2.0, 2.0]
    assert values.dtype == np.float32


def test_a_key_that_comes_later_is_a_gap_before():
    history = History()
    history.append(0, {"a": 1.0}, optimizer_step=1)
    history.append(1, {"b": 2.0}, optimizer_step=2)
    assert list(history) == [
        {"step": 0, "optimizer_step": 1, "a": 1.0},
        {"step": 1, "optimizer_step": 2, "b": 2.0},
    ]
    assert history.column("b")[0].tolist() == [1]


def test_infinite_and_huge_values_stay_visible_without_a_warning():
    history = History()
    history.append(0, {"a": 1e300, "b": float("-inf"), "c": float("nan")}, optimizer_step=1)
    assert history[0] == {
        "step": 0,
        "optimizer_step": 1,
        "a": float("inf"),
        "b": float("-inf"),
        "c": pytest.approx(float("nan"), nan_ok=True),
    }


def test_not_a_number_is_not_missing(tmp_path):
    history = History()
    history.append(0, {"a": float("nan")}, optimizer_step=1)
    history.append(1, {"b": 1.0}, optimizer_step=2)
    history.append(2, {"a": 2.0, "b": float("nan")}, optimizer_step=3)
    restored = History()
    restored.load_state_dict(history.state_dict())
    for one in (
        history,
        load_history(history.save(tmp_path / "run.npz")),
        restored,
        history.fork(),
    ):
        assert [sorted(row) for row in one] == [
            ["a", "optimizer_step", "step"],
            ["b", "optimizer_step", "step"],
            sorted([*one[2]]),
        ]
        for key, steps, values in (("a", [0, 2], [np.nan, 2.0]), ("b", [1, 2], [1.0, np.nan])):
            assert one.column(key)[0].tolist() == steps
            np.testing.assert_array_equal(one.column(key)[1], np.float32(values))


def test_a_file_of_the_first_version_is_still_read(tmp_path):
    # It had no place for a recorded NaN: there NaN is a gap.
    path = filled().save(tmp_path / "run.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "present"}
    header = json.loads(arrays["header"].tobytes())
    arrays["header"] = np.frombuffer(json.dumps({**header, "version": 1}).encode(), dtype=np.uint8)
    np.savez(path, **arrays)
    assert_same(load_history(path), filled())


def test_a_fork_goes_on_by_itself():
    history = filled(40, max_rows=16)
    before = list(history)
    fork = history.fork()
    for step in range(400, 440):
        fork.append(step, {"new": 1.0}, optimizer_step=step)
        fork.append_vectors(step, {"new": np.ones(2)})
        fork.mark(step, "new")
    fork.truncate_after(420)
    assert list(history) == before
    assert_same(history, history.fork())
    assert "new" not in history.keys()  # noqa: SIM118
    history.show(fork)
    assert_same(history, fork)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(NormDynError, match=r"effective_lr/conv\.weight"):
        filled().column("effective_lr/conv")
    with pytest.raises(NormDynError, match=r"weight_norm/conv\.weight"):
        filled().vectors("weight_norm/conv")
    with pytest.raises(NormDynError, match="there are none"):
        History().column("loss")


def test_rows_come_in_order():
    history = filled()
    with pytest.raises(NormDynError, match=r"truncate_after\(39\)"):
        history.append(40, {}, optimizer_step=5)
    with pytest.raises(NormDynError, match="in order"):
        history.append_vectors(40, {"weight_norm/conv.weight": np.zeros(3)})


@pytest.mark.parametrize(
    "limit",
    [{"max_rows": 3}, {"max_vector_bytes": 0}, {"max_rows": 10**400}, {"max_vector_bytes": 2**53}],
)
def test_limits_are_checked(limit):
    with pytest.raises(NormDynError, match="at least"):
        History(**limit)


def test_numbers_too_large_for_a_float_and_steps_beyond_reach_are_refused(tmp_path):
    history = History()
    history.append(0, {"a": 1e300}, optimizer_step=1)
    assert history[0] == {"step": 0, "optimizer_step": 1, "a": float("inf")}
    for value in (10**400, -(10**5000)):
        with pytest.raises(NormDynError, match="no float can hold it"):
            history.append(1, {"a": value, "b": 1.0}, optimizer_step=1)
    for act in (
        lambda: history.append(10**400, {"a": 1.0}, optimizer_step=2),
        lambda: history.append(1, {"a": 1.0}, optimizer_step=10**5000),
        lambda: history.append_vectors(2**53, {"weight_norm/a": np.ones(2)}),
        lambda: history.mark(-(2**53), "rescale"),
    ):
        with pytest.raises(NormDynError, match=r"no run counts beyond 2\^53"):
            act()
    assert list(load_history(history.save(tmp_path / "run.npz"))) == list(history)


# --- thinning


@pytest.mark.parametrize("rows", [8, 9, 16, 17, 100, 1000])
def test_thinning_keeps_every_second_row_the_first_and_the_newest(rows):
    history = History(max_rows=8)
    for step in range(rows):
        history.append(step, {"a": float(step)}, optimizer_step=step)
        assert len(history) <= 8
        assert history[-1]["step"] == step
    steps = [row["step"] for row in history]
    gaps = set(np.diff(steps[:-1]).tolist())
    assert steps[0] == 0
    assert len(gaps) == 1
    assert gaps.pop() in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert len(history) >= 4


def test_thinning_loses_none_of_two_optimizers_that_take_turns():
    history = History(max_rows=16)
    for step in range(1000):
        history.append(
            step, {"generator" if step % 2 else "critic": float(step)}, optimizer_step=step
        )
    assert len(history) <= 16
    for key in ("generator", "critic"):
        steps, values = history.column(key)
        assert len(steps) >= 4
        assert steps.tolist() == values.tolist()


def test_thinning_is_bounded_when_every_row_has_other_keys():
    history = History(max_rows=16)
    for step in range(500):
        history.append(
            step, {str(bit): 1.0 for bit in range(9) if step >> bit & 1}, optimizer_step=step
        )
        assert len(history) <= 16
    assert history[0]["step"] == 0
    assert history[-1]["step"] == 499


def test_rare_events_survive_frequent_ones():
    history = History(max_rows=16)
    for step in range(1000):
        history.mark(step, "rescale", "conv.weight")
        if step in (300, 600):
            history.mark(step, "lr_drop")
    assert len(history.events) <= 16
    assert [event.step for event in history.events if event.kind == "lr_drop"] == [300, 600]


def test_vector_arrays_are_bounded_in_bytes():
    history = History(max_vector_bytes=10 * 4 * 8)
    for step in range(100):
        history.append_vectors(step, {"weight_norm/a": np.full(5, step)})
        history.append_vectors(step, {"weight_norm/b": np.full(5, -step)})
    steps, values = history.vectors("weight_norm/a")
    assert values.shape == (len(steps), 5)
    assert 4 <= len(steps) <= 8
    assert steps[0] == 0
    assert steps[-1] == 99
    assert values[:, 0].tolist() == steps.tolist()
    assert history.vectors("weight_norm/b")[0].tolist() == steps.tolist()


def test_vector_arrays_are_copied_and_keep_their_length():
    history = History()
    array = np.ones(3, dtype=np.float64)
    history.append_vectors(0, {"a": array})
    array[:] = 7
    assert history.vectors("a")[1].tolist() == [[1.0, 1.0, 1.0]]
    with pytest.raises(NormDynError, match="4 vectors now and had 3"):
        history.append_vectors(1, {"a": np.ones(4)})
    with pytest.raises(NormDynError, match=r"shape \(n,\)"):
        history.append_vectors(1, {"b": np.ones((2, 2))})


def test_a_weight_may_be_cut_into_other_vectors(tmp_path):
    history = History()
    history.append_vectors(0, {"a": np.ones(3), "b": np.ones(2)})
    history.forget_vectors("a")
    assert history.vector_count("a") is None
    history.append_vectors(1, {"a": np.ones(4), "b": np.ones(2)})
    assert history.vector_count("a") == 4
    history.save(tmp_path / "history.npz")
    for one in (history, load_history(tmp_path / "history.npz")):
        assert one.vectors("a")[0].tolist() == [1]
        assert one.vectors("a")[1].shape == (1, 4)
        assert one.vectors("b")[0].tolist() == [0, 1]


# --- crash and resume


def test_truncate_after_forgets_what_is_later_and_goes_on():
    history = filled()
    history.truncate_after(20)
    assert [row["step"] for row in history] == [0, 10, 20]
    assert history.events == [Event(20, "lr_drop", "")]
    assert history.vectors("weight_norm/conv.weight")[0].tolist() == [0, 10, 20]
    history.append(25, {"effective_lr/conv.weight": 5.0}, optimizer_step=4)
    assert history[-1]["effective_lr/conv.weight"] == 5.0


def test_after_truncation_the_same_rows_are_thinned_as_without_the_forgotten_ones():
    def go(history, steps):
        for step in steps:
            history.append(step, {"a": float(step)}, optimizer_step=step)
            history.mark(step, "rescale")

    whole, crashed = History(max_rows=8), History(max_rows=8)
    go(whole, range(40))
    go(crashed, range(6))
    crashed.truncate_after(4)
    go(crashed, range(5, 40))
    assert_same(whole, crashed)


def test_state_dict_survives_torch_load_weights_only():
    history = filled(40, max_rows=16)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    other = History()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(history, other)
    for both in (history, other):  # and thinning goes on alike
        for step in range(400, 500):
            both.append(step, {"effective_lr/conv.weight": 1.0}, optimizer_step=step)
    assert_same(history, other)


def test_state_dict_is_a_snapshot():
    history = filled()
    state = history.state_dict()
    history.append(1000, {"effective_lr/conv.weight": 1.0}, optimizer_step=1)
    other = History()
    other.load_state_dict(state)
    assert other[-1]["step"] == 50


# --- files


@pytest.mark.parametrize(
    "history", [History(), filled(), filled(100, max_rows=8)], ids=["empty", "full", "thinned"]
)
def test_save_and_load(tmp_path, history):
    path = history.save(tmp_path / "new" / "run.npz")
    assert_same(history, load_history(path))
    assert os.listdir(path.parent) == ["run.npz"]


def test_the_file_opens_without_pickle(tmp_path):
    with np.load(filled().save(tmp_path / "run.npz"), allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file.files}["cells"] == "f"


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "run.npz"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = path.stat()
    with pytest.raises(
        NormDynError, match=f"is a {'folder' if kind == 'folder' else 'device or pipe'}, not a file"
    ):
        filled().save(path)
    assert path.stat() == before
    assert os.listdir(tmp_path) == ["run.npz"]


def test_of_a_link_what_it_points_at_is_replaced(tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "run.npz")
    filled().save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    assert_same(filled(), load_history(tmp_path / "run.npz"))


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = filled().save(tmp_path / "run.npz")
    before = path.read_bytes()
    monkeypatch.setattr(module.np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        filled(7).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.npz"]


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    history = filled()
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
    path = filled().save(tmp_path / "run.npz")
    damage(path)
    with pytest.raises(NormDynError, match=r"run\.npz` cannot be read as a history"):
        load_history(path)
    assert os.listdir(tmp_path) == ["run.npz"]


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = filled().save(tmp_path / "run.npz")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with contextlib.suppress(
            NormDynError
        ):  # any other exception, and any other content, fails the test
            assert_same(load_history(path), filled())


def places_of_numbers(value, place=()):
    if isinstance(value, int) and not isinstance(value, bool):
        yield place
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in items:
        yield from places_of_numbers(part, (*place, key))


def test_an_integer_of_thousands_of_digits_anywhere_in_the_header_is_refused(tmp_path):
    path = filled().save(tmp_path / "run.npz")
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    places = [place for place in places_of_numbers(header) if place[0] != "meta"]
    assert len(places) > 10
    for place in places:
        changed = copy.deepcopy(header)
        part = changed
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = 10**4000
        with_header(path, **changed)
        with pytest.raises(NormDynError, match="cannot be read as a history") as said:
            load_history(path)
        assert len(str(said.value)) < 1000, place


@pytest.mark.parametrize("path", ["nowhere.npz", "."])
def test_what_is_no_file_is_refused(tmp_path, path):
    with pytest.raises(NormDynError, match="there is no history file"):
        load_history(tmp_path / path)
