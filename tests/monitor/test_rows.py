"""What a row marks: drops of the learning rate, and no schedule that glides."""

from __future__ import annotations

import pytest
import torch
from models import fit, make
from monitoring import momentum, monitor

from lightning_normdyn.monitor import rows


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("factor", "marked"),
    [
        (lambda step: 1.0 if step < 5 else 0.1, [5]),
        (lambda step: 1.0 if step < 3 else 0.3 if step < 6 else 0.1, [3, 6]),
        (
            lambda step: (8 - step) / 8,
            [],
        ),  # glides, although its last steps fall by more than a third
        (lambda step: min(1.0, (step + 1) / 4), []),
    ],
)
@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize("quantities", [None, ["weight_norm"]])
def test_drops_of_the_learning_rate_are_marked_in_the_history(factor, marked, quantities):
    module = make(
        make_optimizer=momentum,
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
    )
    watch = monitor(quantities=quantities)
    fit(module, [watch], max_epochs=2)
    assert [(event.step, event.kind) for event in watch.history.events] == [
        (step, "lr_drop") for step in marked
    ]


def test_what_compares_with_a_prediction_is_in_the_table():
    compared = rows._from_prediction(0.03, 0.02)
    assert compared == {"equilibrium_angular_update": 0.02, "equilibrium_ratio": pytest.approx(1.5)}
    assert all(
        value != value for value in rows._from_prediction(float("nan"), float("nan")).values()
    )
