"""A bias is the same before and after a rearrangement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module


def test_one_bias_before_and_after_a_rearrangement_is_one_offset(claim):
    """The same layer called twice adds the same bias; what is equal cancels, and one BatchNorm
    removes it from both."""
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.a(2 * x)])), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)
    )
    assert claim(net, zoo.vectors()) == "filter"
    (link,) = inspect_module(net, zoo.vectors())[0].batch_norms
    assert link.bias == "a.bias"
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x)])),
        a=nn.Linear(6, 5),
        b=nn.Linear(6, 5),
        n=nn.BatchNorm1d(5),
    )
    assert claim(net, zoo.vectors()) == "no"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x.flip(0)), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "filter"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x).roll(1, 1), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "no"
