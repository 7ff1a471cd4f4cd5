"""Tables of many weights are read by the names of single ones."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.monitor.by_weight import ByWeight, table_of, with_table
from lightning_normdyn.monitor.norm_table import RateTable


def rates(**values):
    return RateTable.from_values(tuple(values), list(values.values()))


def test_who_is_not_known_has_no_entry():
    known = ByWeight([rates(a=(0.1,), b=None), rates(c=(0.2,))])
    assert dict(known) == {"a": (0.1,), "c": (0.2,)}
    assert len(known) == 2
    assert "b" not in known
    assert known.get("b") is None
    with pytest.raises(KeyError):
        known["b"]


def test_the_same_weights_have_the_same_table():
    table = rates(a=(0.1,), b=None)
    known = with_table({"a": (9.0,), "other": (0.3,)}, table)
    assert table_of(RateTable, known, ("a", "b")) is table
    assert dict(known) == {"a": (0.1,), "other": (0.3,)}


def test_other_weights_get_a_table_of_what_is_known():
    known = ByWeight([rates(a=(0.1,), b=(0.2,)), rates(c=(0.3,))])
    found = table_of(RateTable, known, ("c", "b", "new"))
    assert found.known.tolist() == [True, True, False]
    after = with_table(known, found.then(np.full(3, 0.5), np.array([True, False, True])))
    assert dict(after) == {"a": (0.1,), "c": (0.3, 0.5), "b": (0.2,), "new": (0.5,)}
