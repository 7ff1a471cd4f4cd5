"""What a person reads during a fit: once, on rank zero, and short."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from lightning_normdyn.engine import messages
from lightning_normdyn.engine.messages import MOST_NAMES, named, show, warn_once
from lightning_normdyn.errors import NormDynWarning


def test_a_warning_has_a_class_of_ours():
    with pytest.warns(NormDynWarning, match="something"):
        warn_once("something")


def test_only_rank_zero_warns(monkeypatch):
    monkeypatch.setattr(messages, "is_rank_zero", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once("something")


@pytest.mark.parametrize("count", [1, MOST_NAMES, MOST_NAMES + 3])
def test_long_lists_of_names_are_cut(count):
    text = named([f"w{i}" for i in range(count)])
    assert text.count("`w") == min(count, MOST_NAMES)
    assert text.endswith(" and 3 more") == (count > MOST_NAMES)


def trainer(bar=None, rank=0):
    return SimpleNamespace(is_global_zero=rank == 0, progress_bar_callback=bar)


def test_text_is_printed_on_rank_zero(capsys):
    show(trainer(), "a table")
    show(trainer(rank=1), "a second one")
    assert capsys.readouterr().out == "a table\n"


def test_text_stands_above_a_progress_bar(capsys):
    printed = []
    show(trainer(bar=SimpleNamespace(print=printed.append)), "a table")
    assert printed == ["a table"]
    assert capsys.readouterr().out == ""
