"""What is refused at the start of a fit, by name."""

from __future__ import annotations

import doubles
import pytest
import torch
from torch import nn

from lightning_normdyn import (
    NotSupportedError,
    Partition,
    StepBracket,
)
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_rate
from lightning_normdyn.optimizers.recognition import applied_rate


def test_lbfgs_is_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        NotSupportedError,
        match=r"LBFGS evaluates its closure more than once per step.*Use an optimizer that",
    ):
        StepBracket.of(torch.optim.LBFGS([weight]))


def test_schedule_free_is_refused():
    optimizer = doubles.ScheduleFree([torch.nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(NotSupportedError, match="second copy of the weights"):
        StepBracket.of(optimizer)


def test_a_decay_that_cannot_be_taken_over_is_refused_by_name():
    kind, weight = doubles.CachesDecay, nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        NotSupportedError,
        match=r"weight decay 0.1 of CachesDecay.*Set weight_decay=0 in their param group",
    ):
        check_decay_takeover(kind([weight], weight_decay=0.1), [weight])
    check_decay_takeover(kind([weight]), [weight])
    check_decay_takeover(
        kind(
            [{"params": [weight], "weight_decay": 0.0}, {"params": [nn.Parameter(torch.ones(1))]}],
            weight_decay=1,
        ),
        [weight],
    )


def test_rows_that_nobody_claims_are_refused_where_the_kind_of_the_decay_is_not_known():
    class LaterDecay(doubles.Options):
        """Decays after its update, with momentum: of no kind that could be applied to single
        rows."""

        def update(self, p, g, group, state):
            super().update(p, g, {**group, "weight_decay": 0.0}, state)
            p.mul_(1 - 3 * group["lr"] * group["weight_decay"])

    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = LaterDecay([weight], weight_decay=0.1)
    check_decay_takeover(optimizer, [weight])
    rows = Partition((0,), torch.tensor([0, -1, 0, -1, 1, -1]), "group")
    with pytest.raises(
        NotSupportedError, match=r"Some rows .*of LaterDecay.*a trial could not tell how"
    ):
        check_decay_takeover(optimizer, {weight: rows})


UNKNOWN = {
    "no lr": lambda w: doubles.NoRate([w], lips=10.0),
    "lr is None": lambda w: doubles.NoRate([w], lr=None, max_lr=None),
    "a warmup of its own": lambda w: doubles.OwnWarmup([w], lr=0.1, weight_decay=1e-9),
    "another d": lambda w: doubles.Plain([w], lr=0.1, d=3),
    "DAdaptSGD before its first step": lambda w: type("DAdaptSGD", (doubles.Plain,), {})(
        [w], d=1e-6, growth_rate=2.0
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_nobody_can_tell_writers_are_refused_by_name(name):
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = UNKNOWN[name](weight)
    assert applied_rate(optimizer, optimizer.param_groups[0], weight) is None
    with pytest.raises(
        NotSupportedError,
        match=rf"{type(optimizer).__name__} applies in each step.*cannot be told.*AdamW or SGD",
    ):
        check_rate(optimizer, [weight])
    check_rate(optimizer, [])
