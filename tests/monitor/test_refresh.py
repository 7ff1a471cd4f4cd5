"""Pictures that are drawn anew during a fit: when, at what cost, and that they never end it."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from models import fit, make

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor import recording, refresh
from lightning_normdyn.monitor.outcome import Outcome
from lightning_normdyn.monitor.refresh import Refresh


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_drawing_takes_no_more_than_a_hundredth_of_the_time():
    clock = Clock()
    refresh = Refresh(10, clock)
    drawn, spent = [], 0.0
    for step in range(2000):
        clock.now += 1.0
        if refresh.is_due(step):
            with refresh.drawing(step):
                clock.now += 2.0
            spent += 2.0
            drawn.append(step)
        assert spent <= 0.01 * clock.now
    # The first when 1 % are as much as it may take, then as often as 2 of 200 seconds allow.
    assert drawn[0] == 499
    assert len(drawn) == 10


def test_cheap_pictures_come_at_their_steps_and_none_where_nobody_asked():
    clock = Clock()
    refresh, never = Refresh(10, clock), Refresh(None, clock)
    clock.now = 1e6
    drawn = []
    for step in range(2, 60, 3):  # rows come at every third step
        assert not never.is_due(step)
        if refresh.is_due(step):
            with refresh.drawing(step):
                clock.now += 1.0
            drawn.append(step)
    assert drawn == [11, 20, 29, 41, 50, 59]


def test_a_drawing_that_fails_is_not_tried_at_every_step():
    clock = Clock()
    refresh = Refresh(10, clock)
    clock.now = 1e6
    with pytest.raises(OSError, match="full"), refresh.drawing(10):
        raise OSError("full")
    assert not refresh.is_due(11)
    assert refresh.is_due(20)


@pytest.fixture
def published(monkeypatch):
    """What loggers got, without drawing."""
    outcomes: list[Outcome] = []
    monkeypatch.setattr(recording, "publish_outcome", lambda _, outcome: outcomes.append(outcome))
    monkeypatch.setattr(refresh, "SHARE", 1e9)
    return outcomes


def monitored(tmp_path: Any, **arguments: Any) -> NormDynamicsMonitor:
    monitor = NormDynamicsMonitor(1, tables=False, pictures_every_n_steps=3, **arguments)
    fit(make(), [monitor], logger=CSVLogger(tmp_path), max_epochs=1)
    return monitor


def test_loggers_get_the_table_and_what_is_looked_at_first(published, tmp_path):
    monitored(tmp_path)
    assert [(outcome.step, outcome.is_final) for outcome in published] == [
        (2, False),
        (3, True),
    ]
    first, last = published
    assert len(first.history) == 3
    assert len(first.layers) == len(last.layers) == 3
    assert first.shown_in("live curves") == ["angular_update", "direction_lr", "weight_norm"]
    assert [name for name, _ in first._figures()] == [
        "angular_update",
        "direction_lr",
        "weight_norm",
        "heat_map_expected_ratio",
    ]


def test_what_cannot_be_drawn_ends_no_fit(published, tmp_path, monkeypatch):
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(recording.Recording, "_summarized", fail)
    monkeypatch.setattr(recording.Recording, "layers", lambda *_: [])
    with pytest.warns(NormDynWarning, match="pictures could not be drawn .* disk full"):
        monitored(tmp_path)
    assert [outcome.is_final for outcome in published] == [True]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "10"])
def test_steps_are_checked(wrong):
    with pytest.raises((ValueError, TypeError), match="pictures_every_n_steps"):
        NormDynamicsMonitor(pictures_every_n_steps=wrong)
