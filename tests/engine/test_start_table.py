"""The table at the start of a fit: which weights are treated how, and why."""

from __future__ import annotations

import pytest
from cases import AddsGroup, without_second
from models import fit, make

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    WeightRescaling,
)


def rows(printed: str) -> dict[str, str]:
    """Weight name -> the rest of its line."""
    _, _, rest = printed.partition("lightning-normdyn: targets\n\n")
    table, *_ = rest.split("\n\n")
    lines = [line for line in table.splitlines() if line.startswith("net.")]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_it_says_how_each_weight_is_treated_and_why(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)], max_epochs=1)
    table = rows(capsys.readouterr().out)
    assert list(table) == ["net.0.weight", "net.3.weight", "net.8.weight"]
    assert table["net.0.weight"].startswith("4×1×3×3 filter 4 net.1 AWS")
    assert table["net.8.weight"].startswith("2×6 no 2 ")
    assert table["net.8.weight"].endswith("measured")


def test_a_weight_that_a_person_names_is_marked(capsys):
    with pytest.warns(NormDynWarning, match="not known to be scale-invariant"):
        fit(make(), [WeightRescaling(1, params="net.8.weight")], max_epochs=1)
    table = rows(capsys.readouterr().out)
    assert "no (by request)" in table["net.8.weight"]


def test_nobody_wants_tables(capsys):
    fit(make(), [NormDynamicsMonitor(1, tables=False)], max_epochs=1)
    assert "targets" not in capsys.readouterr().out


def test_it_is_shown_again_when_more_is_found(capsys):
    module = make(make_optimizer=without_second)
    fit(module, [AddsGroup(), AdaptiveWeightShrink(0.5)], max_epochs=2)
    _, first, second = capsys.readouterr().out.split("lightning-normdyn: targets")
    assert "net.3.weight" not in first
    assert "net.3.weight" in second
