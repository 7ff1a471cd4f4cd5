"""What makes two networks the same, as far as verdicts about their weights go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.invariance.graph_state import GraphState, Normalizations, describe


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def frozen(net):
    net[4].eval()


def groups(net):
    net[1].num_groups = 4


def epsilon(net):
    net[4].eps = 1e-3


def replaced(net):
    net[1] = nn.BatchNorm2d(4)


def gone(net):
    net[4] = nn.Identity()


def activation(net):
    net[2] = nn.GELU()


def bias(net):
    net[3] = nn.Conv2d(4, 4, 3, bias=False)


NORMALIZATIONS = [frozen, groups, epsilon, replaced, gone]


@pytest.mark.parametrize("change", [*NORMALIZATIONS, activation, bias])
def test_changes_make_another_network(change):
    net = network()
    before, modes = GraphState.of(net), Normalizations(net)
    state = modes.state()
    assert GraphState.of(net) == before
    change(net)
    after = GraphState.of(net)
    assert after.network != before.network
    assert (modes.state() != state) == (change in NORMALIZATIONS)
    assert (after.normalizations != before.normalizations) == (change in NORMALIZATIONS)


def test_what_is_trained_is_told_apart_from_what_the_network_is():
    net = network()
    before = GraphState.of(net)
    net[0].weight.requires_grad_(False)
    after = GraphState.of(net)
    assert after.network == before.network
    assert after.frozen == ("0.weight",)


def test_wrappers_are_not_seen():
    net = network()
    before = GraphState.of(net)
    assert GraphState.of(nn.Sequential(*[torch.compile(m, backend="eager") for m in net])) == before


def test_weights_and_statistics_do_not_count():
    net = network()
    before = GraphState.of(net)
    net(torch.randn(2, 1, 5, 5))
    nn.init.ones_(net[0].weight)
    assert GraphState.of(net) == before


def test_state_survives_a_checkpoint():
    state = GraphState.of(network())
    assert GraphState.from_state(state.state()) == state


def test_a_module_that_names_its_device_is_the_same_on_every_rank():
    class Placed(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.device = device

        def extra_repr(self):
            return f"device={self.device}"

    assert describe(Placed("cuda:0")) == describe(Placed("cuda:1"))
    assert describe(Placed("cuda:0")) != describe(Placed("cpu"))


def test_a_module_that_cannot_describe_itself_ends_nothing():
    class Broken(nn.Module):
        def extra_repr(self):
            raise RuntimeError("not yet")

    assert describe(Broken()) == "Broken(?), training"


def without_eps(net):
    del vars(net[1])["eps"]


def eps_of_several(net):
    net[1].eps = torch.full((4,), 1e-5)


def equal_module(net):
    net[1] = nn.GroupNorm(2, 4)


@pytest.mark.parametrize("change", [frozen, groups, without_eps, eps_of_several, equal_module])
@pytest.mark.parametrize("eps", [1e-5, torch.tensor(1e-5)], ids=["number", "tensor"])
def test_a_change_of_a_normalization_is_noticed_once(change, eps):
    net = network()
    net[4].eps = eps
    normalizations = Normalizations(net)
    before = normalizations.state()
    assert normalizations.state() is before

    change(net)
    changed = normalizations.state()
    assert changed != before
    assert normalizations.state() == changed


def test_a_list_that_is_changed_in_place_is_noticed():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    net[1].normalized_shape = [4]
    normalizations = Normalizations(net)
    before = normalizations.state()
    net[1].normalized_shape.insert(0, 4)
    assert normalizations.state() != before
