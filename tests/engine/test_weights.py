"""The weights of a network: those that come during a fit, what they are called and who holds
them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from models import TARGETS, Calls, fit, make
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    WeightRescaling,
)
from lightning_normdyn.engine.weights import LayoutReader


def end_table(capsys):
    return capsys.readouterr().out


def swap_layer(trainer, module):
    """A layer exchanged in the network and in the param group."""
    old = module.net[3].weight
    module.net[3] = nn.Conv2d(4, 6, 3, bias=False).double()
    for group in trainer.optimizers[0].param_groups:
        group["params"] = [module.net[3].weight if p is old else p for p in group["params"]]


def swap_parameter(trainer, module):
    """Only the parameter is another, of another length."""
    old = module.net[3].weight
    module.net[3].weight = nn.Parameter(old.detach() * 3)
    for group in trainer.optimizers[0].param_groups:
        group["params"] = [module.net[3].weight if p is old else p for p in group["params"]]


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("beside", [[], [1.0]], ids=["alone", "beside a single number"])
def test_a_weight_that_takes_the_place_of_an_equal_one_is_noticed(shape, beside):
    def weight():
        return nn.Parameter(torch.ones(shape))

    held = [weight(), weight(), *(nn.Parameter(torch.tensor(number)) for number in beside)]
    optimizer = torch.optim.SGD(held, lr=0.1)
    reader = LayoutReader()
    before = reader.read(optimizer)
    assert reader.read(optimizer) is before

    optimizer.param_groups[0]["params"][1] = weight()
    replaced = reader.read(optimizer)
    assert replaced != before
    assert reader.read(optimizer) is replaced


def test_weights_of_other_shapes_and_further_groups_are_noticed():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 3)) for _ in range(2)], lr=0.1)
    reader = LayoutReader()
    read = [reader.read(optimizer)]
    params = optimizer.param_groups[0]["params"]
    params[0] = nn.Parameter(torch.ones(4, 5))
    read.append(reader.read(optimizer))
    params[0] = nn.UninitializedParameter()
    read.append(reader.read(optimizer))
    params.pop()
    read.append(reader.read(optimizer))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    read.append(reader.read(optimizer))
    # Equal to the group whose place it takes.
    optimizer.param_groups[1] = dict(optimizer.param_groups[1])
    read.append(reader.read(optimizer))
    assert len(set(read)) == len(read)


def test_the_id_of_a_weight_that_is_gone_may_pass_on():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    reader = LayoutReader()
    layouts = [reader.read(optimizer)]
    params = optimizer.param_groups[0]["params"]
    gone = id(params[0])
    params[0] = nn.Parameter(torch.ones(2, 3))
    layouts.append(reader.read(optimizer))
    # Python gives out memory again that has become free, nearly always at once.
    others = []
    while len(others) < 1000 and id(params[0]) != gone:
        params[0] = nn.Parameter(torch.ones(2, 3))
        others.append(params[0])
    layouts.append(reader.read(optimizer))
    assert len(set(layouts)) == 3


def grow(trainer, module):
    """Two more layers in front of the head, and their weights in a group of their own."""
    conv, norm = nn.Conv2d(6, 6, 1, bias=False).double(), nn.BatchNorm2d(6).double()
    module.net[5] = nn.Sequential(nn.ReLU(), conv, norm)
    trainer.optimizers[0].add_param_group({"params": [*conv.parameters(), *norm.parameters()]})


NEW = {swap_layer: "net.3.weight", swap_parameter: "net.3.weight", grow: "net.5.1.weight"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("action", NEW)
def test_weights_that_come_during_the_fit_are_measured_and_treated(action, first):
    module = make()
    aws, monitor, calls = (
        AdaptiveWeightShrink(0.5),
        NormDynamicsMonitor(1, tables=False),
        Calls(3, action),
    )
    fit(module, [calls, aws, monitor] if first else [aws, monitor, calls])
    name = NEW[action]
    assert [t.name for t in aws.plans[0].targets] == [*TARGETS, name][: 3 if action is grow else 2]
    assert aws.plans[0].targets[-1].weight is dict(module.named_parameters())[name]
    rows = list(monitor.history)
    assert len(rows) == 8
    # Before the callbacks look at the batch: from its first step on. After they did: a step later,
    # as with a finetuning group.
    assert all(f"equivalent_weight_decay/{name}" in row for row in rows[5:])
    assert isinstance(rows[-1][f"angular_update/{name}"], float)
    last = float(module.get_parameter(name).detach().flatten(1).norm(dim=1).mean())
    assert rows[-1][f"weight_norm/{name}"] == pytest.approx(last, rel=0.2)


@pytest.mark.parametrize("action", [swap_layer, swap_parameter])
def test_a_weight_in_the_place_of_another_has_an_initial_norm_of_its_own(action):
    module, lengths = make(), []

    class Norms(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            lengths.append(pl_module.net[3].weight.detach().flatten(1).norm(dim=1))

    fit(module, [Calls(3, action), Norms(), WeightRescaling(1, target_norm="initial")])
    at_swap, after = lengths[3], module.net[3].weight.detach().flatten(1).norm(dim=1)
    assert not torch.allclose(lengths[2], at_swap)
    assert torch.allclose(after, at_swap, rtol=0.05)


def test_nothing_is_treated_that_lost_its_normalization_when_it_was_replaced():
    def lose(trainer, module):
        swap_layer(trainer, module)
        module.net[4] = nn.Identity()

    module, aws = make(), AdaptiveWeightShrink(0.5)
    fit(module, [Calls(3, lose), aws])
    assert [t.name for t in aws.plans[0].targets] == ["net.0.weight"]


def test_a_pattern_takes_in_new_layers_and_may_lose_those_that_it_named():
    def exchange(trainer, module):
        head = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
        module.net[8] = head
        trainer.optimizers[0].param_groups[0]["params"] = list(module.parameters())

    module, aws = make(), AdaptiveWeightShrink(0.5, params=["net.8.weight", "net.8.*", "net.0.*"])
    fit(module, [Calls(3, exchange), aws])
    assert [t.name for t in aws.plans[0].targets] == [
        "net.0.weight",
        "net.8.0.weight",
        "net.8.2.weight",
    ]
