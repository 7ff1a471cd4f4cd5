"""The norms of a param group: as far as its schedule and its weights tell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from paper_optimizers import group_of

from lightning_normdyn.theory.group_norms import GroupNorms, GroupWeights, Measured
from lightning_normdyn.theory.schedule import Schedule

ADAMW = torch.optim.AdamW


def norms_of(
    rates: list[float], weights: GroupWeights, kind: type = ADAMW, **hyper: Any
) -> GroupNorms:
    group = {key: v for key, v in group_of(kind, lr=0.1, **hyper).items() if key != "params"}
    return GroupNorms(kind, Schedule(tuple({**group, "lr": lr} for lr in rates)), weights)


ONE = GroupWeights([1.0], [64])


def test_the_peak_is_where_the_rate_is_largest_and_as_long_as_it_stays() -> None:
    fit = norms_of([0.1, 0.4, 0.4, 0.3999, 0.2], ONE, weight_decay=0.5)
    assert (fit.peak, fit.last_at_peak, fit.at_peak["lr"]) == (1, 3, 0.4)
    assert fit.pulls.tolist() == pytest.approx([0.05, 0.2, 0.2, 0.19995, 0.1])


def test_a_decay_that_changes_on_the_way_is_read_anew() -> None:
    """A schedule of the decay itself."""
    group = {key: v for key, v in group_of(ADAMW, lr=0.1).items() if key != "params"}
    rows = tuple({**group, "weight_decay": decay} for decay in (0.0, 0.1, 0.2))
    assert GroupNorms(ADAMW, Schedule(rows), ONE).pulls == pytest.approx([0.0, 0.01, 0.02])


@pytest.mark.parametrize(
    ("kind", "hyper"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.Adadelta, {"weight_decay": 0.1}),
        (ADAMW, {"weight_decay": 0.1, "amsgrad": True}),
    ],
)
def test_where_nobody_knows_how_a_decay_acts_there_is_no_pull(
    kind: type, hyper: dict[str, Any]
) -> None:
    fit = norms_of([0.1] * 3, ONE, kind, **hyper)
    assert fit.pulls is None
    assert fit.settled_angle(None, None) is None


def test_without_decay_the_pull_is_known_whatever_the_optimizer() -> None:
    fit = norms_of([0.1] * 3, ONE, torch.optim.Adadelta, weight_decay=0.0)
    assert fit.pulls.tolist() == [0.0] * 3
    assert fit.relaxation(0.0) is None


def test_a_loss_that_holds_a_norm_pulls_it_to_nothing_at_most() -> None:
    fit = norms_of([0.1] * 5, ONE, weight_decay=0.1)
    norms, steps = fit.norms(Measured([-100.0], [10.0]))
    assert steps == (0, 1, 2, 3, 4, 5)
    assert np.all(norms[1:] == 0)


def test_each_weight_settles_at_its_own_norm() -> None:
    fit = norms_of(
        [1e-3] * 5, GroupWeights.of([(1.0, 64, None), (2.0, 16, None)]), weight_decay=0.1
    )
    assert fit.settled_norms() == pytest.approx([math.sqrt(1e-3 * d / 0.2) for d in (64, 16)])
    assert norms_of([0.1], GroupWeights([], []), weight_decay=0.1).settled_norms() is None


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one each"):
        norms_of([0.1], GroupWeights([1.0], [64], [(8, 8), (8, 8)]))
    with pytest.raises(ValueError, match="at every step"):
        norms_of([math.inf], ONE)
