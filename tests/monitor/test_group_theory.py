import pytest
import torch
from torch import nn

from lightning_normdyn.engine.effect import (
    Decaying,
    Effects,
    LengthJumps,
    Projection,
    Rescaling,
    Rotation,
    Shrink,
)
from lightning_normdyn.monitor.group_theory import MOST_ANSWERS, GroupTheory, settings_of
from lightning_normdyn.monitor.predictions import noise_coherence
from lightning_normdyn.monitor.pulls import options_of, strength_of
from lightning_normdyn.optimizers.group_numbers import with_plain_numbers, without_params
from lightning_normdyn.optimizers.step_response import own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.theory.course import is_understood

SHAPE = (4, 8)
MAKERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda weights: torch.optim.Adam(weights, 0.1, weight_decay=1e-2),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.1),
    "nadam": lambda weights: torch.optim.NAdam(weights, 0.1, weight_decay=1e-2),
    "radam": lambda weights: torch.optim.RAdam(weights, 0.1, weight_decay=1e-2),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, 0.1, lr_decay=1e-2),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, 0.1, weight_decay=1e-2),
    "muon": lambda weights: torch.optim.Muon(weights, 0.1),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, 0.1),
    "asgd": lambda weights: torch.optim.ASGD(weights, 0.1, weight_decay=1e-2),
}
EFFECTS = {
    "none": Effects(),
    "shrink": Effects(shrink=Shrink(0.1, "norm", replaces_decay=True)),
    "projection": Effects(projection=Projection("always", "replace", 0.5)),
    "rescaling": Effects(rescaling=Rescaling(5, "initial", True, "now")),
    "jumps": Effects(jumps=LengthJumps(1.5, 0.5)),
    "rotation": Effects(
        rotation=Rotation(0.1, "exact", "free", "initial", "lr", 0.0, replaces_decay=True)
    ),
}


def at_rate(optimizer, lr):
    (group,) = optimizer.param_groups
    return with_plain_numbers(without_params({**group, "lr": lr}))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_nothing_that_is_kept_depends_on_the_learning_rate(make):
    optimizer = make([nn.Parameter(torch.ones(SHAPE))])
    theory = GroupTheory(optimizer, {})
    at_first = at_rate(optimizer, 0.1)
    for effects in EFFECTS.values():
        theory.strength(at_first, effects)
        theory.options(at_first, effects)
        theory.noise_coherence(at_first, effects, SHAPE)
        theory.sizes(at_first, SHAPE)
        theory.has_course(at_first, SHAPE)
        for lr in (0.03, 0.0):
            later = at_rate(optimizer, lr)
            strength = strength_of(optimizer, later, effects)
            noise = noise_coherence(optimizer, later, effects, SHAPE)
            response = own_response(type(optimizer), later, Subject(SHAPE))
            sizes = None
            if response is not None:
                sizes = (response.normalized, response.energy_is_rough)
            # As text: of an unknown decay both are NaN.
            assert str(theory.strength(later, effects)) == str(strength)
            assert theory.options(later, effects) == options_of(effects, optimizer, later)
            assert theory.noise_coherence(later, effects, SHAPE) == noise
            assert theory.sizes(later, SHAPE) == sizes
            understood = is_understood(type(optimizer), later, SHAPE)
            assert theory.has_course(later, SHAPE) == understood


def test_other_settings_are_asked_for_anew_and_the_same_ones_are_not():
    optimizer = MAKERS["adamw"]([nn.Parameter(torch.ones(SHAPE))])
    answers = {}
    group = at_rate(optimizer, 0.1)
    assert GroupTheory(optimizer, answers).strength(group, Effects()).rate == 1e-2
    asked = len(answers)
    # Another row, with another theory: its answers are those of the first.
    again = GroupTheory(optimizer, answers)
    assert again.strength(at_rate(optimizer, 0.2), Effects()).rate == 1e-2
    assert len(answers) == asked
    assert again.strength({**group, "weight_decay": 0.3}, Effects()).rate == 0.3
    assert again.strength(group, EFFECTS["shrink"]).alpha == 0.1


def test_what_may_change_unseen_is_asked_for_every_time():
    class Attributed(torch.optim.SGD):
        """Another step, of which nobody knows what it reads."""

        def step(self, closure=None):
            return super().step(closure)

    weights = [nn.Parameter(torch.ones(SHAPE))]
    asked = []

    def ask():
        asked.append(1)
        return len(asked)

    def asks_again(optimizer, group, effects=None):
        theory = GroupTheory(optimizer, {})
        found = [theory.at_rate(group, 0.1, effects or Effects(), None, ask) for _ in range(2)]
        return found[0] != found[1]

    sgd = MAKERS["sgd"](weights)
    group = at_rate(sgd, 0.1)
    assert not asks_again(sgd, group)
    # The largest rate so far is no part of the effect.
    assert asks_again(sgd, group, Effects(decaying=Decaying(0.1)))
    # A tensor may be written to in place.
    assert asks_again(sgd, {**group, "weight_decay": torch.tensor(0.1)})
    assert asks_again(sgd, {**group, "betas": (0.9, torch.tensor(0.9))})
    assert asks_again(Attributed(weights, 0.1), group)


def test_a_schedule_does_not_fill_memory():
    optimizer = MAKERS["sgd"]([nn.Parameter(torch.ones(SHAPE))])
    answers = {}
    theory = GroupTheory(optimizer, answers)
    group = at_rate(optimizer, 0.1)
    for number in range(2 * MOST_ANSWERS):
        assert theory.at_rate(group, float(number), Effects(), None, lambda n=number: n) == number
    assert len(answers) <= MOST_ANSWERS


def test_settings_are_all_but_the_rate_and_the_weights():
    optimizer = MAKERS["sgd"]([nn.Parameter(torch.ones(SHAPE))])
    group = with_plain_numbers(optimizer.param_groups[0])
    assert settings_of(group) == settings_of({**group, "lr": 3.0})
    assert settings_of(group) != settings_of({**group, "momentum": 0.8})
