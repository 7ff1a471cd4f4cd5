"""The numbers that formulas of quantities share, against their definitions vector by vector."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_normdyn.monitor.step_sums import StepSums, least_of, urgency

TOLERANCE = {"rtol": 1e-12, "atol": 0.0}


def sums(before, start, after, **options):
    """Of rows w, the snapshots s and the weights after the step, each ``(n, d)``."""
    none = torch.zeros(len(before), dtype=torch.float64)
    step = after - start
    defaults = {
        "lr": none + 0.1,
        "ww": before.square().sum(1),
        "wg": none,
        "gg": none,
        "ss": start.square().sum(1),
        "sd": (start * step).sum(1),
        "dd": step.square().sum(1),
        "ones_w": before.sum(1),
        "entries": none + before.shape[1],
        "standardized": None,
        "alpha": none + math.nan,
        "alpha_of_std": none.bool(),
    }
    return StepSums(**{**defaults, **options})


def weights():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)


def test_norm_deviation_and_angle():
    before, _, after = weights()
    step = sums(before, before, after)
    torch.testing.assert_close(step.norm, before.norm(dim=1), **TOLERANCE)
    torch.testing.assert_close(step.std, before.std(dim=1, correction=0), **TOLERANCE)
    cosine = torch.nn.functional.cosine_similarity(before, after)
    torch.testing.assert_close(step.angle.cos(), cosine, rtol=1e-9, atol=1e-12)


def test_a_standardized_weight_is_as_large_as_its_deviation():
    before, _, after = weights()
    standardized = torch.tensor([True, False, True, False])
    step = sums(before, before, after, standardized=standardized)
    expected = torch.where(standardized, before.std(dim=1, correction=0), before.norm(dim=1))
    torch.testing.assert_close(step.size, expected, **TOLERANCE)


def test_without_the_sum_of_entries_no_deviation_is_needed():
    before, _, after = weights()
    step = sums(before, before, after, ones_w=None)
    torch.testing.assert_close(step.std, before.norm(dim=1), **TOLERANCE)


def test_the_shrink_goes_by_its_own_statistic():
    before, _, after = weights()
    by_std = torch.tensor([False, True, False, True])
    step = sums(before, before, after, alpha_of_std=by_std)
    expected = torch.where(by_std, before.std(dim=1, correction=0), before.norm(dim=1))
    torch.testing.assert_close(step.shrunk_size, expected, **TOLERANCE)


def test_the_radial_change_counts_the_shrink_before_the_step():
    before, _, after = weights()
    start = 0.9 * before
    step = sums(before, start, after)
    along = (before * (after - before)).sum(1) / before.square().sum(1)
    torch.testing.assert_close(step.radial_change, along, rtol=1e-10, atol=1e-14)


def test_the_smallest_of_several_comes_from_a_sum() -> None:
    left = torch.tensor([31.0, 49.0, 40.0, 33.0], dtype=torch.float64)
    assert least_of(urgency(left).sum().item()) == pytest.approx(31, rel=0.01)
    assert least_of(urgency(left.float()).sum().item(), torch.float32) == pytest.approx(
        31, rel=0.05
    )
    assert least_of(
        urgency(torch.full((10,), 52.0, dtype=torch.float64)).sum().item()
    ) == pytest.approx(52, rel=0.05)
    assert least_of(
        urgency(torch.tensor([-float("inf"), 3.0], dtype=torch.float64)).sum().item()
    ) == pytest.approx(1)
