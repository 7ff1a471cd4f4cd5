"""Biases that are put together from pieces: where one is zero, nothing is added."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.search import ScaleInvarianceSearch

# How a bias of 6 is made of parameters, and which of the three heads then have none.
BIASES = {
    "whole": (lambda m: m.bias, []),
    "zeros in the middle": (lambda m: torch.cat([m.q, torch.zeros(2), m.v]), [1]),
    "a mask": (lambda m: m.bias * torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), [0]),
    "written over": (lambda m: written_over(m.bias), [2]),
    "two constants": (
        lambda m: torch.cat([torch.zeros(1), m.piece, torch.zeros(2), m.v]),
        [],
    ),
    "half a head": (lambda m: torch.cat([torch.zeros(1), m.piece, m.q, m.v]), []),
    "a copy": (lambda m: torch.cat([m.q, m.v, torch.zeros(2)]).clone(), [2]),
}


def written_over(bias):
    bias = bias.clone()
    bias[4:] = 0
    return bias


class Heads(nn.Module):
    """Three heads of two, each in front of a normalization that no bias may come before."""

    def __init__(self, make) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.q, self.v = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        self.piece, self.make = nn.Parameter(torch.randn(1)), make

    def forward(self, x):
        y = F.linear(x, self.weight, self.make(self))
        return torch.cat([F.rms_norm(head, (2,)) for head in y.chunk(3, -1)])


@pytest.mark.parametrize("name", BIASES)
def test_heads_without_a_bias_are_free(name):
    make, free = BIASES[name]
    net = Heads(make)
    with ScaleInvarianceSearch(net) as found:
        found.analyze(net(torch.randn(8, 6)).square().sum())
    verdict = found.verdicts["weight"]
    labels = [-1] * 6
    if verdict.partition is not None:
        labels = verdict.partition.labels.flatten().tolist()
    assert [head for head in range(3) if labels[2 * head] >= 0] == free
    # What no parameter reaches is taken for zeros.
    assert verdict.eps or not free


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_a_bias_per_channel_is_removed_with_the_mean(claim, frozen):
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Linear(6, 4), n=nn.BatchNorm1d(4))
    net.a.bias.requires_grad_(not frozen)
    assert claim(net, zoo.vectors()) == "filter"
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4))
    net.a.bias.requires_grad_(not frozen)
    assert claim(net, zoo.images()) == "filter"


def test_what_differs_within_a_channel_is_not(claim):
    def forward(m, x):
        return m.n(m.a(x) + torch.linspace(0, 1, len(x)).to(x)[:, None] * m.gain)

    net = zoo.Net(forward, a=zoo.linear(6, 4), gain=zoo.weight(1, 4), n=nn.BatchNorm1d(4))
    assert claim(net, zoo.vectors()) == "no"
