"""One weight that a callback means."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.engine.target import Target
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.verdict import Verdict


@pytest.mark.parametrize("by_request", [True, False])
def test_what_a_person_asked_for_is_not_taken_for_scale_invariant(by_request):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    verdict = Verdict.unknown("w", (2, 2))
    target = Target("w", weight, Partition.filters((2, 2)), verdict, by_request)
    assert target.scale_invariant is not by_request
    assert not target.weight_standardized
