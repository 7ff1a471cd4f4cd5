"""One table says what an optimizer is."""

from __future__ import annotations

from fractions import Fraction

import doubles
import numpy as np
import pytest
import torch
from torch import nn

from lightning_normdyn.optimizers.decay import applied_decay, optimizer_decay
from lightning_normdyn.optimizers.recognition import (
    Unknown,
    class_for_predictions,
    facts_of,
    sets_weights_back,
    steps_like,
)
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equivalent_hyperparameters,
)


def weight():
    return nn.Parameter(torch.ones(3, 4))


def predicted(optimizer):
    return equilibrium_angular_update(class_for_predictions(optimizer), optimizer.param_groups[0])


def test_a_subclass_that_overrides_a_helper_of_the_step_is_another_optimizer():
    class Own(torch.optim.SGD):
        def _init_group(self, *arguments, **options):
            return super()._init_group(*arguments, **options)

    assert not steps_like(Own, torch.optim.SGD)
    assert predicted(Own([weight()], lr=0.1, weight_decay=0.1)) == pytest.approx(
        (2 * 0.1 * 0.1) ** 0.5
    )  # a trial shows that it is none


def test_an_own_step_has_predictions_only_if_a_trial_shows_that_it_is_its_bases():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert predicted(doubles.LoggingSGD([weight()], **options)) == predicted(
        torch.optim.SGD([weight()], **options)
    )
    clipping = doubles.ClippingSGD([weight()], **options)
    assert class_for_predictions(clipping) is Unknown
    assert predicted(clipping) is None
    assert facts_of(clipping).exponents is None
    assert optimizer_decay(clipping, clipping.param_groups[0]) is None


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("fixed_decay", True, False),
        ("weight_decouple", False, False),
        ("cautious", True, False),
        ("corrected_weight_decay", 1.0, False),
        ("mode", "other", False),
        ("foreach", True, True),
        ("initial_lr", 0.3, True),
        ("name", "head", True),
        ("step", 7, True),
        ("caution", False, True),
    ],
)
def test_an_option_that_a_rule_by_name_does_not_know_leaves_no_prediction(key, value, known):
    optimizer = doubles.Lion([{"params": [weight()], key: value}], weight_decay=0.1)
    assert (predicted(optimizer) is not None) is known


def test_an_attribute_that_switches_something_on_leaves_no_prediction():
    optimizer = doubles.Lion([weight()], weight_decay=0.1)
    assert predicted(optimizer) is not None
    optimizer.use_gc = True
    assert predicted(optimizer) is None


def test_a_fixed_decay_is_applied_as_it_acts():
    own = weight()
    optimizer = doubles.Lion([own], lr=0.1, weight_decay=0.01, fixed_decay=True)
    assert applied_decay(optimizer, optimizer.param_groups[0], own).factor == pytest.approx(0.99)
    assert (
        optimizer_decay(optimizer, optimizer.param_groups[0]) is None
    )  # not in proportion to the rate
    optimizer.param_groups[0]["fixed_decay"] = False  # an option that changes is looked at again
    assert applied_decay(optimizer, optimizer.param_groups[0], own).factor == pytest.approx(0.999)


def test_who_sets_weights_back_is_told():
    assert sets_weights_back(torch.optim.Adam([weight()])) is None
    assert sets_weights_back(doubles.HasModes([weight()])) is None
    assert sets_weights_back(doubles.SlowCopy([weight()])) < 0.8


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
