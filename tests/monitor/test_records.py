"""What a history holds: gaps are not NaN, arrays are concatenated, forks share what never
changes."""

from __future__ import annotations

import numpy as np
from histories import assert_same_history, filled_history

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Contents, Row, bundled


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
    contents.columns["a"] = 0
    contents.rows.append(0, "kind", "content")
    fork = contents.fork()
    fork.columns["b"] = 1
    fork.rows.append(1, "kind", "content")
    assert contents.columns == {"a": 0}
    assert len(contents.rows.records) == 1
    assert fork.meta is contents.meta
    assert fork.vectors.capacity == 1000


def test_a_shown_history_goes_on_with_the_one_it_shows():
    history, shown = filled_history(), History()
    shown.show(history)
    history.append(1000, {"a key that came later": 1.0}, optimizer_step=7)
    history.meta = {"later": True}
    assert_same_history(shown, history)
    assert shown[-1]["a key that came later"] == 1.0
