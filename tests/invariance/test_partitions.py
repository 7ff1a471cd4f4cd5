"""Which entries are one vector, what is refused, and single numbers that are none."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from zoo import Wrapper

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.partitions import choose_partition, filter_partition, is_gain
from lightning_normdyn.invariance.verdict import Verdict


def test_filter_partition_finds_the_owner_under_wrappers_and_parametrizations():
    net = nn.Sequential(
        Wrapper(nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2))),
        nn.ConvTranspose2d(4, 3, 1),
        nn.Conv2d(4, 6, 1),
    )
    partition = filter_partition(net, "0.parametrizations.weight.original1", (4, 3, 3))
    assert partition.keep == (0, 1)
    assert partition.labels.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert filter_partition(net, "1.weight", (4, 3, 1, 1)).n == 3
    assert filter_partition(net, "2.weight", (6, 4, 1, 1)).keep == (0,)


def verdict(kind: str) -> Verdict:
    shape = (4, 3)
    partitions = {
        "filter": Partition.filters(shape),
        "group": Partition.groups(shape, 2),
        "layer": Partition.layer(shape),
    }
    partitions["partly"] = Partition((0,), torch.tensor([0, 0, 1, -1]), "group")
    return Verdict("w", shape, partitions.get(kind), kind, norms=("n",))


FALLBACK = Partition.filters((4, 3))


@pytest.mark.parametrize(
    ("kind", "granularity", "labels"),
    [
        ("filter", "auto", [0, 1, 2, 3]), ("group", "auto", [0, 0, 1, 1]), ("no", "auto", [0, 1, 2, 3]),
        ("unknown", "filter", [0, 1, 2, 3]),
        ("unknown", "layer", [0, 0, 0, 0]), ("filter", "layer", [0, 0, 0, 0]), ("group", "layer", [0, 0, 0, 0]),
        ("group", "group", [0, 0, 1, 1]),
        ("partly", "auto", [0, 0, 1, -1]), ("partly", "layer", [0, 0, 0, -1]), ("layer", "layer", [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_choose_partition(kind, granularity, labels):
    assert choose_partition(verdict(kind), granularity, FALLBACK).labels.tolist() == labels


@pytest.mark.parametrize(
    ("kind", "granularity", "message"),
    [
        ("group", "filter", r"granularity='filter' was asked for `w`, but n makes it .* only per group.*Use granularity='auto' or 'group'"),
        ("layer", "filter", "only per layer"), ("layer", "group", "only per layer"), ("partly", "filter", "only per group"),
        ("filter", "group", r"no groups are known.*Use 'auto', 'filter' or 'layer'"),
        ("unknown", "group", "no normalization with groups is known"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(kind, granularity, message):
    with pytest.raises(NotSupportedError, match=message):
        choose_partition(verdict(kind), granularity, FALLBACK)


GAINS = {
    "depthwise 1x1": (lambda: conv(4, 4, 1, groups=4), nn.BatchNorm2d(4)),
    "transposed depthwise 1x1": (
        lambda: nn.ConvTranspose2d(4, 4, 1, groups=4, bias=False),
        nn.BatchNorm2d(4),
    ),
    "Cx1x1": (lambda: Gain(4, 1, 1), nn.BatchNorm2d(4)),
    "Cx1x1x1": (lambda: Gain(4, 1, 1, 1), nn.BatchNorm2d(4)),
    "1xCx1x1": (lambda: Gain(1, 4, 1, 1), nn.BatchNorm2d(4)),
}


def conv(*shape: int, **options) -> nn.Conv2d:
    return nn.Conv2d(*shape, bias=False, **options)


class Gain(nn.Module):
    """A factor for each channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.weight.reshape(4, 1, 1)


@pytest.mark.parametrize("name", GAINS)
def test_single_numbers_have_no_direction(name):
    make, norm = GAINS[name]
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=make(), n=norm)
    verdict = inspect_module(net, zoo.images(4, 4))[0]
    assert (verdict.kind, verdict.partition) == ("no", None)
    assert "its rows are single numbers (a gain), which have no direction" in verdict.reason
    assert is_gain(net, "a.weight", verdict.shape)


def test_numbers_that_are_one_vector_have_a_direction():
    """The embedding of a number in front of a LayerNorm; a class token; a map to one number or one
    channel."""
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(1, 6), n=nn.LayerNorm(6))
    assert [(v.kind, v.n) for v in inspect_module(net, zoo.vectors(8, 1))] == [("layer", 1)]
    layers = nn.ModuleDict(
        {"linear": nn.Linear(6, 1), "conv": nn.Conv2d(6, 1, 1), "up": nn.ConvTranspose2d(6, 1, 1)}
    )
    layers.token = nn.Parameter(torch.randn(1, 1, 6))
    for name, weight in layers.named_parameters():
        assert weight.ndim < 2 or not is_gain(layers, name, tuple(weight.shape))
