"""Each rule, entry by entry, against the optimizer that it describes."""

from __future__ import annotations

import pytest
import torch
from paper_optimizers import SGDP, AdamP, group_of, tangential
from torch import nn

from lightning_normdyn.optimizers import recursion_rules
from lightning_normdyn.optimizers.step_response import plain_group

DECOUPLED = {"decoupled_weight_decay": True}
CASES = {
    "SGD": (recursion_rules.sgd, torch.optim.SGD, {}),
    "momentum": (recursion_rules.sgd, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "Nesterov": (recursion_rules.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGDP": (recursion_rules.sgdp, SGDP, {"momentum": 0.9, "dampening": 0.3}),
    "Adam": (recursion_rules.adam, torch.optim.Adam, {"eps": 1e-3}),
    "AdamW": (recursion_rules.adamw, torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "AdamP": (recursion_rules.adamp, AdamP, {"eps": 1e-3}),
    "NAdam": (recursion_rules.nadam, torch.optim.NAdam, {"momentum_decay": 0.1}),
    "NAdam decoupled": (recursion_rules.nadam, torch.optim.NAdam, DECOUPLED),
    # The first steps are not divided, later ones are.
    "RAdam": (recursion_rules.radam, torch.optim.RAdam, {}),
    "RMSprop": (recursion_rules.rmsprop, torch.optim.RMSprop, {"alpha": 0.9}),
    "Adagrad": (
        recursion_rules.adagrad,
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_what_the_optimizer_does(name: str) -> None:
    rule, kind, options = CASES[name]
    noise = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 5, generator=noise, dtype=torch.float64))
    optimizer = kind([weight], lr=0.05, weight_decay=0.3, **options)
    (group,) = optimizer.param_groups
    w = weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    carried = 0.0
    for t in range(1, 13):
        gradient = torch.randn(2, 5, generator=noise, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()

        step = rule(plain_group(group), t, carried)
        carried = step.carried
        g = gradient + step.decay * w if step.coupled else gradient
        m = step.memory * m + step.taken * g
        update = step.newest * g + step.buffered * m
        if step.second is not None:
            v = step.second.kept * (v if t > 1 else step.second.start)
            v = v + step.second.taken * g**2
            if step.divides:
                update = update / ((v / step.second.correction).sqrt() + step.eps)
        if step.projected:
            update = tangential(update, w)
        lr = 0.05 * step.rate_factor
        kept = 1.0 if step.coupled else 1 - lr * step.decay
        w = kept * w - lr * update
        # RAdam adds its eps of 1e-8 elsewhere.
        torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=0)


def test_momentum_that_stops_leaves_the_buffer_and_goes_on_from_it() -> None:
    group = group_of(torch.optim.SGD, lr=0.1, momentum=0.9)
    first = recursion_rules.sgd(group, 1, 0.0)
    assert (first.memory, first.taken, first.carried) == (0.9, 1.0, 1.0)
    stopped = recursion_rules.sgd({**group, "momentum": 0.0}, 2, first.carried)
    assert (stopped.newest, stopped.buffered, stopped.memory, stopped.taken) == (1.0, 0.0, 1.0, 0.0)
    assert recursion_rules.sgd({**group, "dampening": 0.5}, 3, stopped.carried).taken == 0.5


def test_the_first_step_of_soap_only_makes_its_basis() -> None:
    group = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 0.0}
    assert recursion_rules.soap(group, 1, 0.0).rests
    assert recursion_rules.soap(group, 2, 0.0) == recursion_rules.adamw(group, 1, 0.0)


def test_settings_that_nobody_has_derived_have_no_rule() -> None:
    for kind, changed in (
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"centered": True}),
    ):
        rule = getattr(recursion_rules, kind.__name__.lower())
        assert rule(group_of(kind), 1, 0.0) is not None
        assert rule(group_of(kind, **changed), 1, 0.0) is None
