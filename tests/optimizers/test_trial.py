"""A trial on scratch weights tells how an optimizer steps of which nobody has read the code, and
leaves no trace."""

from __future__ import annotations

import copy
import random
import re

import doubles
import numpy as np
import pytest
import torch
from torch import nn

from lightning_normdyn.optimizers.facts import DecayLaw
from lightning_normdyn.optimizers.recognition import applied_rate
from lightning_normdyn.optimizers.scratch import ScratchOptimizer
from lightning_normdyn.optimizers.trial import (
    remembers_weights,
    steps_as,
    try_decay,
)


def on(kind, *, dtype=torch.float32, **options):
    """An optimizer of a matrix, a kernel and a vector."""
    torch.manual_seed(0)
    shapes = [(5, 7), (3, 2, 3, 3), (5,)]
    return kind(
        [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes], **{"lr": 0.01, **options}
    )


def decay_of(optimizer):
    return try_decay(optimizer, applied_rate)


KINDS = {
    "decoupled": (doubles.Plain, {}, DecayLaw("decoupled", "rate")),
    "with options": (doubles.Options, {}, DecayLaw("decoupled", "rate")),
    "coupled": (doubles.Options, {"weight_decouple": False}, DecayLaw("coupled")),
    "fixed": (doubles.Options, {"fixed_decay": True}, DecayLaw("decoupled", "step")),
    "lion, fixed": (doubles.Lion, {"fixed_decay": True}, DecayLaw("decoupled", "step")),
    "at a rate of its own": (
        doubles.OwnWarmup,
        {},
        DecayLaw("coupled"),
    ),  # without momentum, the two kinds are one
    "torch's adamw": (torch.optim.AdamW, {}, DecayLaw("decoupled", "rate")),
    "torch's adam": (torch.optim.Adam, {"foreach": True}, DecayLaw("coupled")),
    "torch's fused sgd": (torch.optim.SGD, {"momentum": 0.9, "fused": True}, DecayLaw("coupled")),
    "torch's adagrad": (torch.optim.Adagrad, {}, DecayLaw("coupled")),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_decay_is_found(name):
    kind, options, expected = KINDS[name]
    found = decay_of(on(kind, weight_decay=0.01, **options))
    assert found.refusal is None
    assert found.law == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kind_is_found_in_every_precision_and_at_a_rate_of_0(dtype):
    found = decay_of(on(doubles.Options, dtype=dtype, lr=0.0, weight_decay=1e-4))
    assert (found.refusal, found.law) == (None, DecayLaw("decoupled", "rate"))


REFUSED = {
    "a list for each group": (doubles.ListPerGroup, {}, "IndexError"),
    "a decay read in __init__": (doubles.CachesDecay, {}, "changes nothing"),
    "a decay by the place of the group": (
        doubles.ByNumber,
        {},
        "StopIteration|does not take weight_decay from its param group alone",
    ),
    "a step that needs a closure": (doubles.WantsClosure, {}, "a closure, please"),
    "a step that refuses vectors": (doubles.MatricesOnly, {}, "matrices only"),
    "two decays": (
        doubles.Plain,
        {"weight_decay_1d": 0.1},
        "another weight decay.*weight_decay_1d",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_take_over_that_is_not_exact_is_refused_with_the_reason(name):
    kind, options, reason = REFUSED[name]
    refusal = decay_of(on(kind, weight_decay=0.01, **options)).refusal
    assert re.search(reason, refusal)


def test_scratch_weights_have_the_dimensions_of_the_real_ones():
    matrix = nn.Parameter(torch.randn(5, 7))
    assert decay_of(doubles.MatricesOnly([matrix], weight_decay=0.01)).refusal is None


def test_a_subclass_that_only_wraps_steps_as_its_base():
    assert (
        steps_as(
            on(doubles.LoggingSGD, momentum=0.9, nesterov=True, weight_decay=0.1), torch.optim.SGD
        )
        is None
    )
    assert "differs" in steps_as(on(doubles.ClippingSGD), torch.optim.SGD)
    assert "AdamW" in steps_as(on(doubles.SlowCopy), torch.optim.AdamW)


@pytest.mark.parametrize(
    ("kind", "undone"),
    [
        (doubles.ScheduleFree, True),
        (doubles.SlowCopy, True),
        (doubles.DualAveraging, True),
        (doubles.HasModes, False),
        (doubles.Counting, False),
        (doubles.Options, False),
        (torch.optim.RMSprop, False),
    ],
)
def test_optimizers_that_set_weights_back_are_told_by_what_they_do(kind, undone):
    assert (remembers_weights(on(kind)) is not None) is undone


def test_what_cannot_be_tried_is_not_known():
    assert remembers_weights(on(doubles.WantsClosure)) is None


def test_a_trial_leaves_no_trace():
    optimizer = on(doubles.Noisy, weight_decay=0.01)
    heard = []
    module = nn.Linear(2, 2)
    optimizer.register_step_pre_hook(
        lambda *_: heard.append(module)
    )  # as a Trainer's hooks hold its module
    optimizer.register_state_dict_post_hook(module.forward)
    optimizer.register_step_post_hook(lambda *_: heard.append("post"))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = copy.deepcopy([p.detach() for p in weights])
    versions, groups = [p._version for p in weights], copy.copy(optimizer.param_groups[0])
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    assert decay_of(optimizer).refusal is None
    remembers_weights(optimizer)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert (doubles.Noisy.steps, doubles.Noisy.seen) == (0, [])
    assert torch.get_default_dtype() == torch.float32
    assert not heard
    assert all(torch.equal(p, then) for p, then in zip(weights, before, strict=True))
    assert [p._version for p in weights] == versions
    assert all(p.grad is None for p in weights)
    assert not optimizer.state
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in groups.items() if k != "params"
    }


def test_containers_in_attributes_are_copied():
    optimizer = on(doubles.Plain)
    optimizer.memory = {
        "list": [torch.zeros(2)],
        "self": optimizer,
        "weights": optimizer.param_groups[0]["params"],
    }
    with ScratchOptimizer.untouched(optimizer):
        scratch = ScratchOptimizer(optimizer)
        memory = scratch.optimizer.memory
        memory["list"][0].add_(1)
        memory["list"].append(None)
        assert memory["self"] is scratch.optimizer
        assert all(any(w is own for own in scratch.weights) for w in memory["weights"])
    assert torch.equal(optimizer.memory["list"][0], torch.zeros(2))
    assert len(optimizer.memory["list"]) == 1


def test_a_resumed_optimizer_is_tried_as_a_new_one():
    optimizer = on(doubles.Options, weight_decay=0.01)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["step"] = 1000
    assert decay_of(optimizer).refusal is None
    assert optimizer.param_groups[0]["step"] == 1000
