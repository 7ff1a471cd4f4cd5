"""What is told: rows, and notes on inputs that are missing or few, once for each weight."""

from __future__ import annotations

import logging
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_normdyn import NormDynWarning
from lightning_normdyn.input_span.gather import ReadableLayers
from lightning_normdyn.input_span.record import GapReporter, publish
from lightning_normdyn.input_span.summary import BINS, SpanSummary
from lightning_normdyn.monitor.history import History

NAN = float("nan")


def summary(energy: float = 0.5, rank: float = 2.0, shape: float = 2.0, rows: int = 9) -> Any:
    return SpanSummary(rows, [energy, rank, shape, 2.0, *[1.0] * 2 * BINS])


def test_a_row_goes_to_history_and_loggers():
    history, logged = History(), []
    logger: Any = SimpleNamespace(log_metrics=lambda row, step: logged.append((step, row)))
    publish(history, [logger], {"a": summary(shape=NAN)}, 7, optimizer_step=4, meta={"batches": 3})
    ((step, row),) = logged
    assert step == 7
    assert "ggd_shape_input/a" not in row  # undefined
    assert row["input_span_noise/a"] == 0.5
    assert [(r["step"], r["optimizer_step"]) for r in history] == [(7, 4)]
    assert history.vectors("histogram_input/a")[1].sum() == BINS
    assert history.meta["batches"] == 3


def test_a_weight_that_is_not_finite_is_named_and_logged_as_nan():
    history = History()
    with pytest.warns(NormDynWarning, match=r"weights of `a` are not finite at step 2; NaN"):
        publish(history, [], {"a": summary(NAN, NAN, NAN)}, 2, optimizer_step=1, meta={})
    assert str(history[-1]["input_span_energy/a"]) == "nan"
    assert history.vector_names() == []


def test_rows_of_a_later_step_make_room():
    history = History()
    publish(history, [], {"a": summary()}, 9, optimizer_step=1, meta={})
    with pytest.warns(NormDynWarning, match="reaches to step 9"):
        publish(history, [], {"a": summary()}, 5, optimizer_step=1, meta={})
    assert [row["step"] for row in history] == [5]


LAYER = nn.Linear(30, 2)
TARGET: Any = SimpleNamespace(name="fc.weight", weight=LAYER.weight)


def reporter(by_name: bool = False) -> GapReporter:
    layers = ReadableLayers(LAYER, {LAYER.weight: (2, 30)})
    return GapReporter(layers, by_name=by_name)


def gathered(seen: int = 8, thinned: bool = False, obstacle: str | None = None) -> Any:
    return SimpleNamespace(
        streams={LAYER.weight: None},
        thinned={LAYER.weight} if thinned else set(),
        obstacles={} if obstacle is None else {LAYER.weight: obstacle},
        seen=Counter({LAYER.weight: seen}),
        batches=10,
    )


@pytest.mark.parametrize(
    ("gatherer", "found", "says"),
    [
        (gathered(0), {}, r"saw no inputs of `fc.weight`: its layer was not called in the"),
        (gathered(5, obstacle="it is odd"), {}, "saw no inputs of `fc.weight`: it is odd."),
        (gathered(thinned=True), {"fc.weight": summary()}, r"`fc.weight` \(9 for 30 entries\)"),
        (gathered(3), {"fc.weight": summary()}, r"less than half .* `fc.weight` \(3 of 10\)"),
    ],
)
def test_gaps_are_named_once(gatherer, found, says, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    gaps = reporter()
    for _ in range(2):
        gaps.report(gatherer, [TARGET], found)
    (record,) = caplog.records
    assert re.search(says, record.getMessage())


def test_who_named_a_weight_is_warned():
    with pytest.warns(NormDynWarning, match="saw no inputs of `fc.weight`"):
        reporter(by_name=True).report(gathered(0), [TARGET], {})


def test_nothing_is_said_where_all_rows_were_taken(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    reporter().report(gathered(), [TARGET], {"fc.weight": summary()})
    assert not caplog.records
