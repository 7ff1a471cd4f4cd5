"""Which optimizers are understood, and by what."""

import math

import pytest
import torch
from paper_optimizers import group_of

from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update

SGD = torch.optim.SGD


class PlainSubclass(SGD):
    """Adds nothing to the step."""


def test_a_subclass_that_keeps_the_step_is_understood() -> None:
    group = group_of(
        PlainSubclass, lr=0.1, momentum=0.9, weight_decay=5e-4
    )  # an instance: torch has wrapped the subclass's step by now
    assert equilibrium_angular_update(PlainSubclass, group) == pytest.approx(
        math.sqrt(2 * 0.1 * 5e-4 / 1.9)
    )
    assert equilibrium_angular_update(type("Inner", (PlainSubclass,), {}), group) is not None


def test_a_name_without_the_keys_of_its_rule_is_not_understood() -> None:
    class Lion(torch.optim.Optimizer):
        def step(self, closure=None):
            return None

    assert step_response(Lion, {"lr": 1e-4, "weight_decay": 0.1}) is None
    group = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    assert step_response(Lion, group) is not None
    assert step_response(Lion, {**group, "weight_decouple": False}) is None
    assert step_response(Lion, {**group, "caution": True}) is None


def test_soap_is_understood_in_whatever_basis_and_only_with_options_that_are() -> None:
    class SOAP(torch.optim.Optimizer):
        def step(self, closure=None):
            return None

    group = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "betas": (0.95, 0.95),
        "shampoo_beta": 0.9,
        "precondition_frequency": 10,
        "max_precond_dim": 10_000,
        "merge_dims": True,
        "precondition_1d": True,
        "normalize_grads": False,
        "correct_bias": True,
    }
    assert step_response(SOAP, group).coherence == pytest.approx(39)
    for changed in ({"normalize_grads": True}, {"correct_bias": False}, {"caution": True}):
        assert step_response(SOAP, {**group, **changed}) is None
    without = {key: value for key, value in group.items() if key != "precondition_frequency"}
    assert step_response(SOAP, without) is None


def test_the_largest_rate_on_a_device_is_not_looked_at() -> None:
    group = group_of(SGD, lr=0.1, weight_decay=0.1)
    corrected = {"decay_rate": "lr_squared"}
    on_device = {**group, "initial_lr": torch.empty((), device="meta")}
    assert step_response(SGD, on_device, **corrected).decay is None
    assert step_response(SGD, on_device, **corrected, lr_max=0.4).decay == pytest.approx(0.025)
