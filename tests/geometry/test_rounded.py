"""Weights of 16 bits: factors that rounding would swallow are owed, and leave no bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry.rounded import scale_rounded_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_factors_are_not_lost_and_leave_no_bias(dtype):
    torch.manual_seed(0)
    low, full = nn.Parameter(torch.randn(5, 400).to(dtype)), nn.Parameter(torch.randn(2, 9))
    vectors = WeightVectors([low, full], [Partition.filters((5, 400)), Partition.filters((2, 9))])
    assert vectors.low_precision
    start = torch.stack([row.double().norm() for row in [*low.detach(), *full.detach()]])
    factor = torch.tensor(
        [1 - 1e-4, 1 - 3e-4, 1.0, 1 - 1e-6, 1 - 2e-3, 1 - 1e-4, 1 - 3e-4], dtype=torch.float64
    )
    naive, owed = low.detach().clone(), torch.ones(7)
    with torch.no_grad():
        for _ in range(1500):
            owed = scale_rounded_(vectors, factor, owed)
            naive.mul_(factor[:5, None].to(dtype))
    eps = torch.finfo(dtype).eps
    expected = start * factor**1500
    # Applied so far, and with what is still owed; the naive product never moves at 1e-4.
    torch.testing.assert_close(vectors.norms(), expected, rtol=1.5 * eps, atol=0)
    torch.testing.assert_close(vectors.norms() * owed, expected, rtol=2e-3, atol=0)
    assert float(naive[0].double().norm() / start[0]) > 0.99
    assert torch.equal(owed[5:], torch.ones(2))  # float32 keeps such factors by itself


def test_parts_of_vectors_are_scaled_without_communication(monkeypatch):
    """The same numbers as for a whole vector, from this rank's sums alone."""
    results = []
    for cut in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 40).to(torch.bfloat16))
        vectors = WeightVectors([weight], [Partition.filters((3, 40))])
        vectors.cut = cut
        monkeypatch.setattr(vectors, "sum_", None if cut else vectors.sum_)
        with torch.no_grad():
            owed = scale_rounded_(vectors, torch.full((3,), 0.97), torch.ones(3))
        results.append((owed, weight.detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], torch.ones(3))
