"""The numbers of one layer: shares, shapes and histograms, and what is not finite; spans against
the directions that inputs were made of; what is told: rows, and notes on inputs that are missing or
few, once for each weight."""

from __future__ import annotations

import logging
import re
from collections import Counter
from math import isnan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normdyn import NormDynWarning
from lightning_normdyn.input_span import summary as input_span
from lightning_normdyn.input_span.gather import Covariance, ReadableLayers
from lightning_normdyn.input_span.summary import (
    BINS,
    REACH,
    GapReporter,
    InputSpan,
    SpanSummary,
    publish,
    summary_numbers,
    vector_shares,
)
from lightning_normdyn.monitor.history import History


def summary_of(filters: torch.Tensor, rows: torch.Tensor) -> SpanSummary:
    stream = Covariance(1, rows.shape[1], rows.device)
    stream.add(rows[:, None])
    labels = torch.arange(len(filters))[None]
    numbers = summary_numbers(filters[None], stream, labels, energy=1.0, method="moments")
    return SpanSummary(len(rows), numbers.tolist())


def test_shares_and_rank_of_a_span_along_two_axes():
    filters = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    rows = torch.randn(40, 3, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0])
    values = summary_of(filters, rows).values()
    assert values["input_span_energy"] == pytest.approx((9 / 25 + 1) / 2)
    assert values["input_span_noise"] == pytest.approx(1 - (9 / 25 + 1) / 2)
    assert values["input_span_rank"] == 2


def test_histograms_count_every_weight_and_gather_outliers_at_the_ends():
    filters = torch.randn(50, 4, dtype=torch.float64)
    filters[0, 0] = 1000
    histograms = summary_of(filters, torch.randn(40, 4, dtype=torch.float64)).histograms()
    assert {kind: len(counts) for kind, counts in histograms.items()} == {
        "histogram_input": BINS,
        "histogram_parameter": BINS,
    }
    assert [sum(counts) for counts in histograms.values()] == [200, 200]
    assert histograms["histogram_parameter"][-1] == 1
    assert REACH < 1000


def test_what_is_not_finite_is_nan_and_has_no_histogram():
    rows = torch.ones(5, 2, dtype=torch.float64)
    rows[0, 0] = torch.inf
    summary = summary_of(torch.ones(3, 2, dtype=torch.float64), rows)
    assert summary.broken
    assert all(map(isnan, summary.values().values()))
    assert summary.histograms() == {}


def test_constant_inputs_have_no_shape_in_their_space():
    summary = summary_of(torch.randn(3, 2).double(), torch.ones(5, 2, dtype=torch.float64))
    assert not summary.broken
    assert isnan(summary.values()["ggd_shape_input"])
    assert list(summary.histograms()) == ["histogram_parameter"]


# ---- The span of the inputs ----


def test_shares_of_vectors_leave_out_filters_of_none():
    span = InputSpan(
        torch.tensor([1]), torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, 4.0, 5.0]]), None
    )
    assert vector_shares(span, torch.tensor([[0, 0, -1]])).tolist() == [0.375]


def known(
    groups: int = 2, rank: int = 3, entries: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that vary in ``rank`` directions of each group around a mean, and an orthonormal basis
    of those directions."""
    basis = torch.linalg.qr(torch.randn(groups, entries, rank, dtype=torch.float64))[0]
    rows = (
        torch.einsum("rgk,gdk->rgd", torch.randn(200, groups, rank, dtype=torch.float64), basis) + 5
    )
    covariance = torch.stack([torch.cov(of_group.T, correction=0) for of_group in rows.unbind(1)])
    return covariance, rows.mean(0), basis


@pytest.mark.parametrize("randomized", [False, True])
def test_the_share_inside_a_known_span(randomized, monkeypatch):
    if randomized:
        monkeypatch.setattr(input_span, "LARGEST_EXACT", 4)
    covariance, mean, basis = known()
    filters = torch.randn(2, 4, 8, dtype=torch.float64)
    filters[0, 1] = 0
    found = input_span.input_span(filters, covariance, mean, energy=1.0)
    assert found.rank.tolist() == [3, 3]
    expected = torch.einsum("gmd,gdk->gmk", filters, basis).square().sum(-1)
    torch.testing.assert_close(found.seen, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.energy, filters.square().sum(-1))
    assert vector_shares(found, torch.arange(8).view(2, 4)).isnan().tolist() == [
        i == 1 for i in range(8)
    ]
    if randomized:
        assert found.rotated is None  # only the truncated quantities can be known
    else:
        torch.testing.assert_close(
            found.rotated.norm(dim=-1), filters.norm(dim=-1), rtol=1e-12, atol=0
        )
        assert (found.seen < found.energy - 1e-3).any()  # the truncated ones are shorter


def test_the_randomized_method_takes_as_many_directions_as_the_energy_needs(monkeypatch):
    spectrum = 0.97 ** torch.arange(200, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    covariance = ((basis * spectrum) @ basis.T)[None]
    filters, mean = (
        torch.randn(1, 5, 200, dtype=torch.float64),
        torch.zeros(1, 200, dtype=torch.float64),
    )
    exact = input_span.input_span(filters, covariance, mean, energy=0.99)
    monkeypatch.setattr(input_span, "LARGEST_EXACT", 100)
    found = input_span.input_span(filters, covariance, mean, energy=0.99)
    assert exact.rank.tolist() == [145]  # more than the 64 that are tried first
    assert 0 <= int(found.rank) - 145 <= 3
    torch.testing.assert_close(found.seen, exact.seen, rtol=0.03, atol=0)


def test_rounding_does_not_choose_the_basis_where_inputs_do_not_vary():
    rows = torch.randn(30, 1, 40, dtype=torch.float64)  # 11 directions are left over
    rows[:, :, 5:8] = 0
    filters, covariance, mean = (
        torch.randn(1, 6, 40, dtype=torch.float64),
        torch.cov(rows[:, 0].T, correction=0)[None],
        rows.mean(0),
    )
    noise = 1e-15 * torch.randn(1, 40, 40, dtype=torch.float64)
    first, second = (
        input_span.input_span(filters, c, mean, energy=1.0)
        for c in (covariance, covariance + noise + noise.mT)
    )
    torch.testing.assert_close(first.rotated.abs(), second.rotated.abs(), rtol=0, atol=1e-9)
    assert first.rank.tolist() == [29]
    # Entries that are always 0 stay what they are.
    for entry in (5, 6, 7):
        assert (first.rotated[0].abs().T - filters[0, :, entry].abs()).abs().sum(1).min() < 1e-9


def test_constant_inputs_see_nothing():
    covariance, mean, _ = known()
    covariance[0] = 1e-16
    found = input_span.input_span(
        torch.ones(2, 3, 8, dtype=torch.float64), covariance, mean, energy=0.99
    )
    assert found.rank.tolist() == [0, 3]
    assert found.seen[0].tolist() == [0, 0, 0]
    assert found.rotated.shape == (1, 3, 8)
    covariance[1] = 0
    assert input_span.input_span(
        torch.ones(2, 3, 8), covariance, mean, energy=0.99
    ).rotated.shape == (0, 3, 8)


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
