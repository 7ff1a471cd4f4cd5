"""Pulls of decay, against sums over every single step."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest
import torch

from lightning_normdyn.engine.effect import (
    Decaying,
    Effects,
    Projection,
    Rescaling,
    ScaledSteps,
    Shrink,
    UnknownEffect,
    combine,
)
from lightning_normdyn.monitor.passed_steps import PassedSteps
from lightning_normdyn.monitor.pulls import (
    End,
    Strength,
    Taken,
    options_of,
    passed_between,
    strength_of,
)

ADAMW = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.01}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 5e-3}


@pytest.mark.parametrize(
    ("optimizer", "group", "effects", "expected"),
    [
        (torch.optim.AdamW, ADAMW, Effects(), Strength(0.01)),
        # Coupled decay is repeated by the momentum.
        (torch.optim.SGD, SGD, Effects(), Strength(0.05)),
        (torch.optim.AdamW, ADAMW, Effects(shrink=Shrink(0.3, "norm", True)), Strength(0.0, 0.3)),
        (torch.optim.AdamW, ADAMW, Effects(shrink=Shrink(0.3, "norm", False)), Strength(0.01, 0.3)),
        (torch.optim.SGD, SGD, Effects(projection=Projection("always", 0.02, 0.5)), Strength(0.01)),
        # As it is written, whatever the momentum.
        (torch.optim.SGD, SGD, Effects(decaying=Decaying("replace")), Strength(5e-3)),
        (
            torch.optim.SGD,
            SGD,
            Effects(decaying=Decaying(0.3, "constant")),
            Strength(0.0, 0.0, 0.3),
        ),
        (torch.optim.SGD, SGD, Effects(rescaling=Rescaling(9, 1.0, True, "now")), Strength(0.0)),
        (torch.optim.SGD, SGD, Effects(rescaling=Rescaling(9, 1.0, True, "over")), Strength(0.05)),
    ],
    ids=str,
)
def test_whoever_decays_a_weight_pulls_at_it(optimizer, group, effects, expected):
    found = strength_of(optimizer, group, effects)
    assert found.rate == pytest.approx(expected.rate)
    assert found.alpha == expected.alpha
    assert found.per_step == expected.per_step


@pytest.mark.parametrize(
    ("optimizer", "group", "effects"),
    [
        # Divided by the size of the gradient: no number says what it comes to.
        (torch.optim.Adam, ADAMW, Effects()),
        (torch.optim.Rprop, {"lr": 0.1, "weight_decay": 0.1}, Effects()),
        (torch.optim.AdamW, ADAMW, Effects(decay_untold=("MyRule",))),
        (torch.optim.AdamW, ADAMW, Effects(scaled_steps=True)),
    ],
    ids=str,
)
def test_where_nobody_can_tell_there_is_no_pull(optimizer, group, effects):
    assert isnan(strength_of(optimizer, group, effects).rate)


def test_an_unknown_optimizer_without_decay_pulls_at_nothing():
    assert strength_of(torch.optim.Rprop, {"lr": 0.1, "weight_decay": 0.0}, Effects()).rate == 0


def schedule():
    return 0.1 * (1 + np.cos(np.arange(40) / 10))


def stretches(passed, since, strength, *, known=True):
    found = []
    for stretch in passed.since(since):
        lr = stretch.settings[0]["lr"] if known else None
        found.append(Taken(stretch.first, stretch.last, strength, lr))
    return found


@pytest.fixture
def passed():
    steps = PassedSteps()
    for number, lr in enumerate(schedule(), 1):
        steps.note(number, [{**ADAMW, "lr": lr}])
    return steps


def test_the_steps_between_two_rows_are_summed_one_by_one(passed):
    lrs = schedule()[10:30]  # steps 11 to 30; rows at 10 and 31
    ends = End(10, schedule()[9], 0.0), End(31, schedule()[30], 0.0)
    sums = passed_between(*ends, stretches(passed, 10, Strength(0.02)))
    assert sums.steps == 20
    assert sums.lr == pytest.approx(lrs.sum())
    assert sums.pull == pytest.approx(0.02 * lrs.sum())
    assert sums.log_kept == pytest.approx(np.log1p(-0.02 * lrs).sum())


def test_the_size_that_a_shrink_goes_by_changes_evenly(passed):
    lrs = schedule()[10:30]
    ends = End(10, schedule()[9], 2.0), End(31, schedule()[30], 3.0)
    sums = passed_between(*ends, stretches(passed, 10, Strength(0.01, alpha=0.04)))
    sizes = np.interp(np.arange(11, 31), [10, 31], [2.0, 3.0])
    assert sums.pull == pytest.approx((lrs * (0.01 + 0.04 * sizes)).sum())


def test_a_rate_that_only_rows_tell_changes_evenly(passed):
    ends = End(10, 0.1, 0.0), End(31, 0.3, 0.0)
    sums = passed_between(*ends, stretches(passed, 10, Strength(0.01), known=False))
    assert sums.lr == pytest.approx(np.interp(np.arange(11, 31), [10, 31], [0.1, 0.3]).sum())


def test_neighbouring_rows_have_nothing_between_them(passed):
    ends = End(10, 0.1, 0.0), End(11, 0.1, 0.0)
    assert passed_between(*ends, stretches(passed, 10, Strength(0.01))) == (0, 0.0, 0.0, 0.0)


def test_an_unknown_decay_leaves_the_rates_known(passed):
    ends = End(10, 0.1, 0.0), End(31, 0.1, 0.0)
    sums = passed_between(*ends, stretches(passed, 10, Strength(nan)))
    assert np.isnan(sums.pull).all()
    assert sums.lr == pytest.approx(schedule()[10:30].sum())


def test_the_theory_is_told_what_callbacks_do():
    shrink = combine([Shrink(0.04, "norm", replaces_decay=True)])
    assert options_of(Effects(), torch.optim.AdamW, ADAMW) == ({}, 0.0)
    assert options_of(shrink, torch.optim.AdamW, ADAMW) == ({}, 0.04)
    projected = combine([Projection("always", 0.3, 1.0)])
    expected = {"projected": True, "decay": 0.3}
    assert options_of(projected, torch.optim.AdamW, ADAMW) == (expected, 0.0)
    # Both decays at once.
    beside = combine([Shrink(0.04, "norm", replaces_decay=False)])
    assert options_of(beside, torch.optim.AdamW, ADAMW) is None
    assert options_of(combine([ScaledSteps()]), torch.optim.AdamW, ADAMW) is None
    assert options_of(combine([UnknownEffect("Mine")]), torch.optim.AdamW, ADAMW) is None
