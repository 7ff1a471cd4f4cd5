"""What a history holds: gaps are not NaN, arrays are concatenated, forks share what never
changes."""

from __future__ import annotations

import numpy as np
import pytest
from histories import assert_same_history, filled_history

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Columns, Contents, Row, ThinnedList, bundled
from lightning_normdyn.monitor.row_values import WeightKeys


def test_a_row_tells_a_recorded_nan_from_a_gap_and_ends_before_later_columns():
    cells = np.array([np.nan, np.nan], dtype=np.float32)
    row = Row(1, cells, np.array([True, False]))
    assert [row.has(column) for column in range(3)] == [True, False, False]


def test_bundles_that_are_alike_share_one_layout():
    first = bundled({"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}, None)
    alike = bundled({"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}, first)
    swapped = bundled({"b": np.ones(3, np.float32), "a": np.zeros(2, np.float32)}, first)
    assert alike.layout is first.layout
    assert swapped.layout is not first.layout
    assert {name: array.tolist() for name, array in swapped.arrays().items()} == {
        "b": [1, 1, 1],
        "a": [0, 0],
    }
    assert bundled({}, None).arrays() == {}


def test_a_fork_shares_arrays_and_meta_and_nothing_that_changes():
    contents = Contents(8, 1000)
    contents.columns = contents.columns.with_keys(["a"])
    contents.rows.append(0, "kind", "content")
    fork = contents.fork()
    fork.columns = fork.columns.with_keys(["b"])
    fork.rows.append(1, "kind", "content")
    assert contents.columns == {"a": 0}
    assert len(contents.rows.records) == 1
    assert fork.meta is contents.meta
    assert fork.vectors.capacity == 1000


def test_columns_only_come_and_are_found_for_many_keys_at_once():
    keys = WeightKeys(["x", "y"], ["a", "b"])
    columns = Columns(["y/b", "x/a"])
    assert columns.of(keys).tolist() == [[1, -1], [-1, 0]]
    assert columns.with_keys(["x/a"]) is columns
    more = columns.with_keys(["y/a", "x/a", "y/a"])
    assert list(more) == ["y/b", "x/a", "y/a"]
    assert more.of(keys).tolist() == [[1, -1], [2, 0]]
    assert columns.of(keys).tolist() == [[1, -1], [-1, 0]]


def test_a_shown_history_goes_on_with_the_one_it_shows():
    history, shown = filled_history(), History()
    shown.show(history)
    history.append(1000, {"a key that came later": 1.0}, optimizer_step=7)
    history.meta = {"later": True}
    assert_same_history(shown, history)
    assert shown[-1]["a key that came later"] == 1.0


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
    assert_same_history(whole, crashed)


def test_only_firsts_and_the_newest_stay_where_the_capacity_is_too_small():
    thinned = ThinnedList(capacity=1, max_kinds=3)
    for step in range(20):
        thinned.append(step, f"kind{step % 5}", None)
    assert {record.kind for record in thinned.records} == {"kind0", "kind1", "kind2", "other"}
    assert [record.step for record in thinned.records[:3]] == [0, 1, 2]
    assert thinned.newest.step == 19
