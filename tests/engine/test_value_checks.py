"""Small checks of values, put together like the values themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_normdyn.engine.value_checks import (
    flag,
    many,
    number,
    numbers,
    optional,
    plain,
    record,
    table,
    text,
    whole,
)
from lightning_normdyn.errors import NormDynError

CHECKS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "whole": (whole(1), [1, 10**6], [0, 1.0, True, "1", 2**53]),
    "number": (number(0.0), [0, 0.5], [-1, float("nan"), float("inf"), True, "1", 10**400]),
    "any number": (number(0.0, finite=False), [float("nan"), float("inf")], [-1.0, 10**400]),
    "text": (text(), ["", "a"], [1, None]),
    "one of some": (text("a", "b"), ["a"], ["c", ""]),
    "flag": (flag, [True, False], [0, None]),
    "optional": (optional(flag), [None, True], [0]),
    "many": (many(flag), [[], (True,)], [True, [1], {}]),
    "table": (table(text(), flag), [{}, {"a": True}], [[], {1: True}, {"a": 1}]),
    "record": (
        record({"a": flag}, {"b": flag}),
        [{"a": True}, {"a": True, "b": False, "c": 1}],
        [{}, {"a": 1}, {"a": True, "b": 1}, []],
    ),
    "closed record": (record({"a": flag}, closed=True), [{"a": True}], [{"a": True, "b": 1}]),
    "numbers": (
        numbers(0.0),
        [torch.ones(2), torch.zeros(0)],
        [torch.ones(2, 2), -torch.ones(1), torch.tensor([float("nan")]), [1.0]],
    ),
    "plain": (
        lambda value, where: plain(value, where),
        [None, 1, "a", {"a": [torch.ones(2)]}],
        [object(), {None: 1}, torch.ones(1).expand(4), torch.ones(2, device="meta"), {1.0: 2}],
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_takes_its_own_kind_and_names_the_place_of_any_other(name):
    check, sound, unsound = CHECKS[name]
    for value in sound:
        check(value, "the place")
    for value in unsound:
        with pytest.raises(NormDynError, match="the place"):
            check(value, "the place")


def test_a_place_is_named_down_to_the_value():
    nested = record({"tables": table(text(), many(whole()))})
    with pytest.raises(NormDynError, match=r"state\.tables\['a'\]\[1\] is -1"):
        nested({"tables": {"a": [0, -1]}}, "state")


def test_a_list_that_holds_itself_is_refused():
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(NormDynError, match="goes on in itself"):
        plain(circle, "it")
