"""Whether what a checkpoint holds for a monitor's history is one."""

from __future__ import annotations

import pytest

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.history_check import check_history


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
