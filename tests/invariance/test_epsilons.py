"""What an epsilon is added to, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.invariance.epsilons import (
    EpsilonShare,
    EpsilonWatch,
    epsilon_of,
    statistic_of,
)


class OwnRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = (
            nn.Parameter(torch.ones(size, dtype=torch.float64)),
            eps,
        )

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )


NORMS = {
    "batch": (nn.BatchNorm2d(6, affine=False), (4, 6, 5, 5)),
    "batch of vectors": (nn.BatchNorm1d(6, affine=False), (8, 6)),
    "instance": (nn.InstanceNorm1d(6), (4, 6, 5)),
    "group": (nn.GroupNorm(3, 6, affine=False), (4, 6, 5, 5)),
    "layer": (nn.LayerNorm(6, elementwise_affine=False), (4, 3, 6)),
    "layer over two": (nn.LayerNorm((3, 6), elementwise_affine=False), (4, 3, 6)),
    "rms": (nn.RMSNorm(6, elementwise_affine=False, eps=0.0), (4, 3, 6)),
    "own": (OwnRMSNorm(6, 0.0), (4, 3, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_statistic_is_what_the_module_divides_by(name):
    norm, shape = NORMS[name]
    norm = norm.double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    tiny = {"eps": 1e-12} if hasattr(norm, "eps") else {"variance_epsilon": 1e-12}
    vars(norm).update(tiny)
    statistic = statistic_of(norm, x)
    small = norm(x)
    largest = (
        1e12 * statistic.max().item()
    )  # an epsilon that is all there is: x / sqrt(eps), whatever the statistic
    vars(norm).update(dict.fromkeys(tiny, largest))
    large = norm(x) * largest**0.5
    ratio = (large / small).flatten()  # the root of the statistic, entry for entry
    found = torch.unique((ratio**2 * 1e6).round() / 1e6)
    assert torch.allclose(
        found, torch.unique((statistic * 1e6).round() / 1e6), rtol=1e-4, atol=2e-6
    )


def test_no_epsilon_is_no_share():
    assert epsilon_of(nn.Linear(3, 3)) is None
    watch = EpsilonWatch(nn.Sequential(nn.Linear(3, 3)))
    watch.start()
    watch.stop()
    assert watch.largest(["0"]) is None


def test_what_explains():
    share = EpsilonShare("bn", 1e-3, 2e-3, 1e-3, 0.4)
    assert share.explains(0.15)
    assert not EpsilonShare("bn", 1e-5, 1.0, 0.5, 1e-5).explains(0.15)


def test_hooks_are_gone_afterwards():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    watch = EpsilonWatch(net)
    watch.start(["1"])
    assert len(net[1]._forward_pre_hooks) == 1
    watch.stop()
    assert not net[1]._forward_pre_hooks


def test_running_variances_tell_of_the_present_where_nothing_was_looked_at():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1.0))
    watch = EpsilonWatch(net)
    watch.start()
    net(torch.randn(64, 4))
    watch.stop()
    first = watch.largest(["1"]).share
    for _ in range(120):
        net(1000 * torch.randn(64, 4))
    assert watch.largest(["1"]).share == first  # what was looked at last
    watch.forget_old()
    assert watch.largest(["1"]).share < 1e-3 * first
