"""A step before it is made: copies may be asked for, and nobody hears of it."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normdyn import StepBracket
from lightning_normdyn.optimizers.rehearsal import rehearsed
from lightning_normdyn.optimizers.step import Phase, Step


def test_each_weight_is_its_own_copy():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    bracket = StepBracket(optimizer)
    bracket.add(Phase.SHRINK, lambda step: None)
    step = Step(bracket, 7, stepped=[weight])
    like = rehearsed(step, {weight: weight})
    like.bracket.request_snapshot({weight: weight})
    assert like.bracket.snapshot(weight) is weight
    assert like.bracket.snapshots_of([weight])[0] is weight
    assert (like.number, like.optimizer) == (7, optimizer)
    assert like.with_gradient == step.with_gradient
    assert like.bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
    assert like.bracket.decay_owners() == {}
    # The step's own bracket copies nothing.
    bracket.take_snapshots()
    assert not bracket._copies
