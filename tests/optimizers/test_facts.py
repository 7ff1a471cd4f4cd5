"""One table says what an optimizer is: a new one is one entry."""

from __future__ import annotations

import doubles
import pytest
import torch
from torch import nn

from lightning_normdyn.optimizers import recognition
from lightning_normdyn.optimizers.decay import optimizer_decay
from lightning_normdyn.optimizers.facts import TABLE, OptimizerFacts
from lightning_normdyn.optimizers.recognition import class_for_predictions, row_of
from lightning_normdyn.optimizers.step_rules import StepResponse
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equilibrium_norm,
    equivalent_hyperparameters,
    lr_drop_exponent,
    relaxation_steps,
    wrs_angular_update,
)
from lightning_normdyn.theory.outlook import free_decay_rate, total_decay


def test_every_optimizer_of_torch_has_a_row_of_its_own():
    classes = [
        known
        for known in vars(torch.optim).values()
        if isinstance(known, type) and issubclass(known, torch.optim.Optimizer)
    ]
    for known in classes:
        if known is not torch.optim.Optimizer:
            assert row_of(known, {}).known_class is known


def test_each_row_is_found_in_one_way():
    for row in TABLE:
        ways = [row.known_class is not None, bool(row.keys), row.family is not None]
        assert sum(ways) == 1, row.name


def test_the_first_row_that_fits_is_taken_so_derived_classes_come_first():
    classes = [row.known_class for row in TABLE if row.known_class is not None]
    for i, earlier in enumerate(classes):
        assert not any(issubclass(later, earlier) for later in classes[i + 1 :])


class HeavyBallByName(doubles.Plain):
    """An optimizer of another package: SGD with momentum, under other names."""


ENTRY = OptimizerFacts(
    "HeavyBallByName",
    keys=("beta",),
    response=lambda group: StepResponse(
        group["lr"],
        1.0,
        group["beta"],
        group["beta"],
        decay=group["weight_decay"],
        coupled=True,
    ),
)
PREDICTIONS = {
    "angle": equilibrium_angular_update,
    "norm": lambda kind, group: equilibrium_norm(kind, group, 0.01),
    "relaxation": relaxation_steps,
    "exponent": lr_drop_exponent,
    "projected": lambda kind, group: equilibrium_angular_update(
        kind, group, projected=True, decay=1e-4
    ),
    "rescaled": lambda kind, group: wrs_angular_update(kind, group, 20, gradient_scale=4.0),
    "equivalent": lambda kind, group: equivalent_hyperparameters(kind, group, 2.0),
    "total decay": lambda kind, group: total_decay(kind, group, 1000),
    "without gradient": free_decay_rate,
    "decoupled decay": optimizer_decay,
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_for_one_more_optimizer_are_one_entry(monkeypatch, prediction):
    predict = PREDICTIONS[prediction]
    group = {"lr": 0.1, "weight_decay": 5e-4}
    assert predict(HeavyBallByName, {**group, "beta": 0.9}) is None
    monkeypatch.setattr(recognition, "TABLE", (*TABLE, ENTRY))
    recognition._known_steps.pop(HeavyBallByName, None)
    try:
        got = predict(HeavyBallByName, {**group, "beta": 0.9})
    finally:
        recognition._known_steps.pop(HeavyBallByName, None)
    sgd = {**group, "momentum": 0.9, "dampening": 0, "nesterov": False}
    assert got == pytest.approx(predict(torch.optim.SGD, sgd))


def test_an_instance_of_one_more_optimizer_is_predicted_by_its_entry(monkeypatch):
    monkeypatch.setattr(recognition, "TABLE", (*TABLE, ENTRY))
    recognition._known_steps.pop(HeavyBallByName, None)
    optimizer = HeavyBallByName([nn.Parameter(torch.ones(3, 4))], lr=0.1, beta=0.9)
    assert class_for_predictions(optimizer) is HeavyBallByName
    recognition._known_steps.pop(HeavyBallByName, None)
