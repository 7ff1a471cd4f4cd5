"""The judge of `make test-clients`: what it calls right and what it calls wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from models import TARGETS, fit, make

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "clients"))
    monkeypatch.delitem(sys.modules, "copies", raising=False)
    import copies

    return copies


def test_angles_of_copies_are_those_of_the_monitor(copies):
    judge, monitor = copies.measuring()
    fit(make(), [judge, monitor], max_epochs=1)
    result = copies.judge("Net", judge, monitor)
    assert (result.state, result.steps, result.why) == ("right", 4, "")
    assert result.scale_invariant == len(TARGETS) < result.weights


def test_a_wrong_angle_and_a_missing_weight_are_found(copies):
    judge, monitor = copies.measuring()
    fit(make(), [judge, monitor], max_epochs=1)
    weight = judge.after[2][TARGETS[0]]
    weight.add_(0.01 * weight.roll(1, 0))
    assert f"{TARGETS[0]} at step 2" in copies.judge("Net", judge, monitor).why
    judge, monitor = copies.measuring()
    monitor.params = [TARGETS[0]]
    fit(make(), [judge, monitor], max_epochs=1)
    result = copies.judge("Net", judge, monitor)
    assert result.state == "wrong"
    assert f"{TARGETS[1]} moved and is no target" in result.why


def test_every_package_is_pinned():
    lines = [
        line
        for name in ("requirements.txt", "needed.txt")
        for line in (ROOT / "clients" / name).read_text().splitlines()
    ]
    assert len(lines) > 40
    assert all("==" in line for line in lines)
