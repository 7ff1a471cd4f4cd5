"""Reductions and pooling between a convolution and its normalization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_between_a_convolution_and_its_norm(name, bias, claim_between):
    operation, without, with_bias = BETWEEN[name]
    assert claim_between(operation, bias) == (with_bias if bias else without)
