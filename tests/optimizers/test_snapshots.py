"""Copies of weights right before an update."""

from __future__ import annotations

import pytest
import torch
from models import backward, weight_and_sgd
from torch import nn

from lightning_normdyn import (
    Phase,
    StepBracket,
)


def test_who_reads_the_weights_may_take_the_snapshot_early():
    weights = first, second = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    bracket, seen = StepBracket.of(optimizer), []

    def look(step):
        assert not bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
        (memory,) = bracket.early_snapshot({first: first.data})
        memory.copy_(first)
        bracket.request_snapshot(
            {first: torch.zeros_like(first), second: second.data}
        )  # the first is not copied again
        (again,) = bracket.early_snapshot({first: first.data})
        assert again is memory
        if step.number == 2:
            raise RuntimeError("a handler fails")

    bracket.add(Phase.MEASURE, look)
    bracket.add(
        Phase.MEASURE_STEP, lambda step: seen.append([bracket.snapshot(w).clone() for w in weights])
    )
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        backward(weight)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))
    with pytest.raises(RuntimeError, match="a handler fails"):
        optimizer.step()
    bracket.add(Phase.SHRINK, lambda step: None)
    assert bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
    assert not bracket.acts_between(Phase.SNAPSHOT, Phase.MEASURE_STEP)


def test_a_snapshot_is_of_the_shrunk_weight_and_of_this_step_only():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    bracket.add(
        Phase.MEASURE,
        lambda step: bracket.request_snapshot({weight: weight.data}) if step.number == 1 else None,
    )
    bracket.add(Phase.SHRINK, lambda step: weight.mul_(0.5))
    bracket.add(
        Phase.MEASURE_STEP,
        lambda step: seen.append(bracket.snapshot(weight).clone()) if step.number == 1 else None,
    )
    before = weight.detach().clone()
    backward(weight)
    optimizer.step()
    assert torch.equal(seen[0], 0.5 * before)
    with pytest.raises(KeyError):
        bracket.snapshot(weight)
