"""What goes into a history comes out, and memory stays bounded; forks, resumes and states go on
alike."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from histories import assert_same_history, filled_history

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor import history as history_module
from lightning_normdyn.monitor.history import History, check_history, load_history
from lightning_normdyn.monitor.records import Event


def test_rows_have_only_the_keys_that_were_recorded():
    history = filled_history()
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
    steps, values = filled_history().column("effective_lr/fc.weight")
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


def test_a_fork_goes_on_by_itself():
    history = filled_history(40, max_rows=16)
    before = list(history)
    fork = history.fork()
    for step in range(400, 440):
        fork.append(step, {"new": 1.0}, optimizer_step=step)
        fork.append_vectors(step, {"new": np.ones(2)})
        fork.mark(step, "new")
    fork.truncate_after(420)
    assert list(history) == before
    assert_same_history(history, history.fork())
    assert "new" not in history.keys()  # noqa: SIM118
    history.show(fork)
    assert_same_history(history, fork)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(NormDynError, match=r"effective_lr/conv\.weight"):
        filled_history().column("effective_lr/conv")
    with pytest.raises(NormDynError, match=r"weight_norm/conv\.weight"):
        filled_history().vectors("weight_norm/conv")
    with pytest.raises(NormDynError, match="there are none"):
        History().column("loss")


def test_rows_come_in_order():
    history = filled_history()
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


def test_truncate_after_forgets_what_is_later_and_goes_on():
    history = filled_history()
    history.truncate_after(20)
    assert [row["step"] for row in history] == [0, 10, 20]
    assert history.events == [Event(20, "lr_drop", "")]
    assert history.vectors("weight_norm/conv.weight")[0].tolist() == [0, 10, 20]
    history.append(25, {"effective_lr/conv.weight": 5.0}, optimizer_step=4)
    assert history[-1]["effective_lr/conv.weight"] == 5.0


def test_state_dict_survives_torch_load_weights_only():
    history = filled_history(40, max_rows=16)
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    other = History()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_history(history, other)
    for both in (history, other):  # and thinning goes on alike
        for step in range(400, 500):
            both.append(step, {"effective_lr/conv.weight": 1.0}, optimizer_step=step)
    assert_same_history(history, other)


def test_state_dict_is_a_snapshot():
    history = filled_history()
    state = history.state_dict()
    history.append(1000, {"effective_lr/conv.weight": 1.0}, optimizer_step=1)
    other = History()
    other.load_state_dict(state)
    assert other[-1]["step"] == 50


@pytest.mark.parametrize(
    "history",
    [History(), filled_history(), filled_history(100, max_rows=8)],
    ids=["empty", "full", "thinned"],
)
def test_save_and_load(tmp_path, history):
    path = history.save(tmp_path / "new" / "run.npz")
    assert_same_history(history, load_history(path))
    assert os.listdir(path.parent) == ["run.npz"]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "run.npz"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = path.stat()
    with pytest.raises(
        NormDynError, match=f"is a {'folder' if kind == 'folder' else 'device or pipe'}, not a file"
    ):
        filled_history().save(path)
    assert path.stat() == before
    assert os.listdir(tmp_path) == ["run.npz"]


def test_of_a_link_what_it_points_at_is_replaced(tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "run.npz")
    filled_history().save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    assert_same_history(filled_history(), load_history(tmp_path / "run.npz"))


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = filled_history().save(tmp_path / "run.npz")
    before = path.read_bytes()
    monkeypatch.setattr(
        history_module.np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        filled_history(7).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.npz"]


def saved():
    history = History()
    history.append(0, {"weight_norm/w": 1.0}, optimizer_step=1)
    return history.state_dict()


def test_a_history_is_believed():
    check_history(saved(), "extra.history")


@pytest.mark.parametrize(
    "value", [None, {}, {"header": 3}, {"header": "{}"}, {**saved(), "header": "[]"}]
)
def test_anything_else_is_refused_with_its_place(value):
    with pytest.raises(NormDynError, match=r"extra\.history is no history"):
        check_history(value, "extra.history")


def test_several_curves_at_once_are_those_read_one_by_one():
    history = filled_history(rows=7)
    # A column that came later, and rows that end before it.
    history.append(90, {"late": 1.0, "effective_lr/fc.weight": float("nan")}, optimizer_step=9)
    keys = ["late", "unknown", *history.keys()[:2]]
    several = history.curves(keys)
    assert list(several) == keys
    for key in keys:
        for one, other in zip(several[key], history.curve(key), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert history.curves([]) == {}
    assert [len(part) for part in History().curves(["unknown"])["unknown"]] == [0, 0]
