"""The numbers of a row as a dictionary."""

from __future__ import annotations

import numpy as np

from lightning_normdyn.monitor.row_values import Block, RowValues, WeightKeys


def row():
    keys = WeightKeys(["x", "y"], ["a", "b"])
    there = np.array([[True, False], [True, True]])
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    first = Block(keys, values, there, np.array([1, 0]))
    again = Block(keys, values + 10, there & (values == 3), np.array([0, 1]))
    return RowValues([first, again], {"normdyn/x": 5.0})


def test_keys_come_weight_by_weight_and_the_overview_last():
    assert list(row()) == ["y/b", "x/a", "y/a", "normdyn/x"]
    assert len(row()) == 4


def test_of_a_key_that_stands_twice_the_later_number_counts():
    assert dict(row()) == {"y/b": 4.0, "x/a": 1.0, "y/a": 13.0, "normdyn/x": 5.0}


def test_what_is_not_there_has_no_key():
    assert "x/b" not in row()
    assert row().get("x/b") is None


def test_the_overview_is_read_without_a_dictionary_of_all_weights():
    values = row()
    assert "normdyn/x" in values
    assert "normdyn/y" not in values
    assert values["normdyn/x"] == 5.0
    assert "_by_key" not in vars(values)
