"""Normalizations as one operation and by hand, with a bias in front and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module

NORMS = {
    "BatchNorm": (nn.BatchNorm1d(8), "filter", "filter"),
    "BatchNorm without statistics": (
        nn.BatchNorm1d(8, track_running_stats=False),
        "filter",
        "filter",
    ),
    "LayerNorm": (nn.LayerNorm(8), "layer", "no"),
    "RMSNorm": (nn.RMSNorm(8), "layer", "no"),
    "GroupNorm(2)": (nn.GroupNorm(2, 8), "group", "no"),
    "GroupNorm(1)": (nn.GroupNorm(1, 8), "layer", "no"),
    "normalize": (zoo.Net(lambda m, x: F.normalize(x)), "layer", "no"),
    "RMSNorm by hand": (
        zoo.Net(lambda m, x: x / x.pow(2).mean(-1, keepdim=True).add(1e-30).sqrt()),
        "layer",
        "no",
    ),
    "LayerNorm by hand": (
        zoo.Net(lambda m, x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)),
        "layer",
        "no",
    ),
    "BatchNorm by hand": (
        zoo.Net(lambda m, x: (x - x.mean(0)) * (x.var(0) + 1e-30).rsqrt()),
        "filter",
        "filter",
    ),
    "mean absolute value": (
        zoo.Net(lambda m, x: x / x.abs().mean(-1, keepdim=True)),
        "layer",
        "no",
    ),
    "clamped norm": (
        zoo.Net(lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)),
        "layer",
        "no",
    ),
    "per batch": (zoo.Net(lambda m, x: x / x.norm()), "layer", "no"),
    "heads": (zoo.Net(lambda m, x: F.rms_norm(x.view(-1, 4, 2), (2,)).flatten(1)), "group", "no"),
    "max": (zoo.Net(lambda m, x: x / x.amax(1, keepdim=True)), "layer", "no"),
    "none": (nn.Identity(), "no", "no"),
    "not quite centered": (
        zoo.Net(lambda m, x: torch.sub(x, x.mean(0), alpha=2).square().mean(0)),
        "no",
        "no",
    ),
    "only centered": (zoo.Net(lambda m, x: x - x.mean(0)), "no", "no"),
    "detached": (zoo.Net(lambda m, x: x / x.norm(dim=-1, keepdim=True).detach()), "no", "no"),
    "a constant": (zoo.Net(lambda m, x: x / 3), "no", "no"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_normalizations(name, bias, claim):
    norm, without, with_bias = NORMS[name]
    torch.manual_seed(0)
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Linear(6, 8, bias=bias), n=norm)
    assert claim(net, zoo.vectors()) == (with_bias if bias else without)


def test_group_norm_of_single_channels_forgives_a_bias_unless_it_is_spatial(claim):
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Conv2d(3, 4, 1), n=nn.GroupNorm(4, 4))
    assert claim(net, zoo.images()) == "filter"
    net = zoo.Net(
        lambda m, x: m.n(m.a(x) + m.position),
        a=nn.Conv2d(3, 4, 1),
        position=nn.Parameter(torch.randn(4, 8, 1)),
        n=nn.GroupNorm(4, 4),
    )
    assert claim(net, zoo.images()) == "no"


def test_the_bias_of_a_batch_in_parts_is_known():
    """Ghost batch normalization: one BatchNorm on parts of the batch, whose statistics follow a
    rescale."""
    net = zoo.Net(
        lambda m, x: torch.cat([m.n(part) for part in m.a(x).chunk(2)]),
        a=nn.Linear(6, 5),
        n=nn.BatchNorm1d(5),
    )
    verdict = inspect_module(net, zoo.vectors())[0]
    assert (
        verdict.kind,
        verdict.stale_statistics,
        [link.bias for link in verdict.batch_norms],
    ) == ("filter", (), ["a.bias"])
