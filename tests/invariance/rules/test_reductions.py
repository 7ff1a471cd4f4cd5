"""Reductions and pooling between a convolution and its normalization; normalizations as one
operation and by hand, with a bias in front and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module

# Scale-invariant, but the bias is lost track of in rearrangements as rare as these.
MISSED = "no"

# What stands between a convolution and its BatchNorm: (operation, kind without a bias, kind with
# one).
BETWEEN = {
    "max_pool": (lambda x: F.max_pool2d(x, 2), "filter", "filter"),
    "max_pool with padding": (lambda x: F.max_pool2d(x, 3, padding=1), "filter", "filter"),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), "filter", "filter"),
    "avg_pool with padding": (lambda x: F.avg_pool2d(x, 2, padding=1), "filter", "no"),
    "avg_pool without counting the padding": (
        lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False),
        "filter",
        "filter",
    ),
    "avg_pool in ceil mode": (lambda x: F.avg_pool2d(x, 3, ceil_mode=True), "filter", "filter"),
    "avg_pool with a divisor": (
        lambda x: F.avg_pool2d(x, 3, ceil_mode=True, divisor_override=4),
        "filter",
        "no",
    ),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, 3), "filter", "filter"),
    "adaptive_max_pool": (lambda x: F.adaptive_max_pool2d(x, 3), "filter", "filter"),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), "filter", "no"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), "filter", "filter"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "filter", "filter"),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "filter", "filter"),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "filter", "filter"),
    "replication": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), "filter", "filter"),
    "max_unpool": (
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        "filter",
        "no",
    ),
    "root mean square of a channel": (
        lambda x: x * torch.rsqrt(F.adaptive_avg_pool2d(x * x, 1) + 1e-30),
        "filter",
        "no",
    ),
    "local response normalization": (lambda x: F.local_response_norm(x, 3, alpha=1.0), "no", "no"),
    "sort": (lambda x: x.sort(3)[0], "filter", "no"),
    "top": (lambda x: x.topk(2, 3)[0], "filter", "no"),
    "cumsum": (lambda x: x.cumsum(2), "filter", "no"),
    "sum": (lambda x: x.sum(3, keepdim=True), "filter", "filter"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "filter", "filter"),
    "median": (lambda x: x.median(3, keepdim=True)[0], "filter", "no"),
    "amax": (lambda x: x.amax(3, keepdim=True), "filter", "no"),
    "norm": (lambda x: x.norm(dim=3, keepdim=True), "filter", "no"),
    "std": (lambda x: x.std(3, keepdim=True), "filter", "filter"),
    "im2col": (lambda x: F.unfold(x, 2).unflatten(1, (4, 4)).mean(2)[..., None], "filter", MISSED),
    "centered": (lambda x: (x - x.mean((0, 2, 3), keepdim=True)).relu(), "filter", "filter"),
    "centered twice over": (
        lambda x: torch.sub(x, x.mean((0, 2, 3), keepdim=True), alpha=2).relu(),
        "filter",
        "no",
    ),
    "centered by rows": (lambda x: (x - x.mean(3, keepdim=True)).relu(), "filter", "filter"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_between_a_convolution_and_its_norm(name, bias, claim_between):
    operation, without, with_bias = BETWEEN[name]
    assert claim_between(operation, bias) == (with_bias if bias else without)


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
