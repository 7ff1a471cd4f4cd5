"""Verdicts in tables and in checkpoints; which entries are one vector, what is refused, and single
numbers that are none."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from zoo import Wrapper, build, by_name

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.verdict import (
    Verdict,
    choose_partition,
    filter_partition,
    is_gain,
    targets_table,
)


def test_tables():
    module, inputs = build("attention_with_qk_norm")
    text = targets_table(inspect_module(module, *inputs))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "weight"
    row = next(line for line in lines if line.startswith("qkv.weight"))
    assert "24×8" in row
    assert "partly" in row
    assert "nk" in row
    assert "nq" in row
    narrow = targets_table(inspect_module(module, *inputs), width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert {line.split()[0] for line in lines} <= {line.split()[0] for line in narrow.splitlines()}


def test_verdicts_survive_a_checkpoint(tmp_path):
    module, inputs = build("style_transfer")
    found = inspect_module(module, *inputs)
    torch.save({v.name: v.state() for v in found}, tmp_path / "verdicts.pt")
    for name, state in torch.load(tmp_path / "verdicts.pt", weights_only=True).items():
        again, original = Verdict.from_state(name, state), by_name(found)[name]
        assert again.state().keys() == original.state().keys()
        assert (again.kind, again.norms, again.shape, again.reason) == (
            original.kind,
            original.norms,
            original.shape,
            original.reason,
        )
        assert again.partition is None or torch.equal(
            again.partition.labels, original.partition.labels
        )
        assert [(b.module, b.vector.tolist(), b.bias) for b in again.batch_norms] == [
            (b.module, b.vector.tolist(), b.bias) for b in original.batch_norms
        ]


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
        ("unknown", "filter", [0, 1, 2, 3]), ("no", "column", [0, 1, 2]), ("unknown", "column", [0, 1, 2]),
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
        ("filter", "column", r"scale-invariant per filter: scaling its columns.*'!w'"),
        ("layer", "column", "scale-invariant per layer"), ("partly", "column", "scale-invariant per group"),
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
