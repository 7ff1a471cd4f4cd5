"""How the tests of the rules ask: what is claimed of a network's first weight must hold."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module, verify_scale_invariance


def claimed_kind(net: nn.Module, *inputs) -> str:
    """Kind of the first weight, after making sure that what is claimed holds (in float64, with tiny
    epsilons)."""
    for part in net.modules():
        if isinstance(getattr(part, "eps", None), float):
            part.eps = 1e-30
    verdicts = inspect_module(net, *inputs)
    assert not any("failed" in v.reason for v in verdicts)
    assert verify_scale_invariance(net, *inputs, verdicts=verdicts, tolerance=1e-6)
    return verdicts[0].kind


@pytest.fixture
def claim():
    """`claimed_kind`, which tests cannot import from here."""
    return claimed_kind


@pytest.fixture
def claim_between():
    """The kind of a convolution with an operation between it and its BatchNorm."""

    def claim(operation, bias: bool) -> str:
        torch.manual_seed(0)
        net = zoo.Net(
            lambda m, x: m.n(operation(m.a(x))),
            a=nn.Conv2d(3, 4, 1, bias=bias),
            n=nn.BatchNorm2d(4, affine=False),
        )
        return claimed_kind(net, zoo.images(4, 3, 6))

    return claim
