"""The numbers of one layer: shares, shapes and histograms, and what is not finite."""

from __future__ import annotations

from math import isnan

import pytest
import torch

from lightning_normdyn.input_span.covariance import Covariance
from lightning_normdyn.input_span.summary import BINS, REACH, SpanSummary, summary_numbers


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
