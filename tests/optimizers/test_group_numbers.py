"""Numbers of a param group come as Python, numpy or torch numbers."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_normdyn.optimizers.group_numbers import (
    as_number,
    group_number,
    is_zero,
    with_plain_numbers,
)
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equivalent_hyperparameters,
)

HALVES = [
    0.5,
    Fraction(1, 2),
    Decimal("0.5"),
    np.float16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    np.array(0.5),
    np.array([0.5]),
    torch.tensor(0.5),
    torch.tensor([0.5], dtype=torch.bfloat16),
]


@pytest.mark.parametrize("value", HALVES, ids=lambda v: type(v).__name__)
def test_every_form_of_a_number_is_that_number(value):
    assert as_number(value) == 0.5
    assert type(as_number(value)) is float


NO_NUMBERS = [
    True,
    np.bool_(True),
    None,
    "0.5",
    (0.5,),
    torch.tensor([1.0, 2.0]),
    torch.tensor(True),
    np.zeros(2),
    1j,
]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_single_number_is_none(value):
    assert as_number(value) is None


def test_a_number_on_a_device_is_not_looked_into():
    on_device = torch.tensor([0.5], device="meta")  # reading it would raise
    found = as_number(on_device)
    assert isinstance(found, torch.Tensor)
    assert found.dim() == 0
    assert not is_zero(found)


def test_a_group_keeps_what_is_no_number():
    weights = [torch.ones(2)]
    group = {
        "params": weights,
        "lr": np.float32(0.5),
        "betas": [Fraction(1, 2), np.float64(0.25)],
        "nesterov": False,
        "name": "head",
    }
    assert with_plain_numbers(group) == {
        "params": weights,
        "lr": 0.5,
        "betas": (0.5, 0.25),
        "nesterov": False,
        "name": "head",
    }
    assert group_number(group, "weight_decay") == 0.0


FORMS = {"numpy": np.float32, "fraction": Fraction, "tensor": torch.tensor, "array": np.array}


@pytest.mark.parametrize("form", FORMS)
def test_predictions_take_numbers_in_every_form(form):
    as_form = FORMS[form]
    plain = {"lr": 0.125, "momentum": 0.5, "dampening": 0, "nesterov": False, "weight_decay": 0.25}
    given = {key: as_form(value) if type(value) is float else value for key, value in plain.items()}
    assert equilibrium_angular_update(torch.optim.SGD, given) == pytest.approx(
        equilibrium_angular_update(torch.optim.SGD, plain)
    )
    assert equivalent_hyperparameters(torch.optim.SGD, given, 2.0) == equivalent_hyperparameters(
        torch.optim.SGD, plain, 2.0
    )
    plain = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 1e-8, "weight_decay": 0.25}
    given = {**plain, "betas": tuple(map(as_form, plain["betas"])), "lr": as_form(0.125)}
    assert equilibrium_angular_update(torch.optim.AdamW, given) == pytest.approx(
        equilibrium_angular_update(torch.optim.AdamW, plain)
    )
