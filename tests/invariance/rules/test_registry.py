"""Rules for operations of users; every rule is for an operation that exists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance import follow
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.rules import register_rule, registry
from lightning_normdyn.invariance.rules.elementwise import homogeneous
from lightning_normdyn.invariance.rules.registry import RULES
from lightning_normdyn.invariance.rules.unsupported import NOT_HOMOGENEOUS


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_rules_for_custom_functions(monkeypatch, claim):
    monkeypatch.setattr(registry, "RULES", dict(RULES))
    monkeypatch.setattr(follow, "RULES", registry.RULES)
    net = zoo.Net(
        lambda m, x: m.n(Doubled.apply(F.linear(x, m.a.weight))),
        a=nn.Linear(6, 8),
        n=nn.LayerNorm(8),
    )
    verdict = inspect_module(net, zoo.vectors())[0]
    assert verdict.kind == "no"
    assert "no rule for DoubledBackward (`register_rule` adds one)" in verdict.reason
    register_rule("DoubledBackward", homogeneous)
    assert claim(net, zoo.vectors()) == "layer"

    def broken(operation, flows):
        raise KeyError("x")

    register_rule("DoubledBackward", broken)
    assert (
        "rule for DoubledBackward failed (KeyError: 'x')"
        in inspect_module(net, zoo.vectors())[0].reason
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [("", homogeneous), (1, homogeneous), ("XBackward", "homogeneous")],
)
def test_bad_registrations(name, rule):
    with pytest.raises(ValueError, match=r"must be (the name|callable)"):
        register_rule(name, rule)


def test_every_rule_is_for_an_operation_that_exists():
    """Of this torch; those of python functions are listed. No GPU was at hand for the names that
    only occur there."""
    known = set(dir(torch._C._functions))
    elsewhere = {name for name in RULES if name not in known}
    assert elsewhere - {"RootMeanSquareBackward", "HiddenPenaltyBackward"} == {
        # strategies
        "_DDPSinkBackward",
        "RegisterPreBackwardFunctionBackward",
        "RegisterPostBackwardFunctionBackward",
        # DeepSpeed
        "PreBackwardFunctionForModuleBackward",
        "PostBackwardFunctionModuleBackward",
        "LinearFunctionForZeroStage3Backward",
        # DTensor
        "RedistributeBackward",
        "NestedRedistributeBackward",
        "_ToTorchTensorBackward",
        "_FromTorchTensorBackward",
        # kernels
        "SyncBatchNormBackward",
        "LigerLayerNormFunctionBackward",
        "LigerRMSNormFunctionBackward",
        "FusedLayerNormFunctionBackward",
        "FusedLayerNormAffineFunctionBackward",
        "FusedRMSNormFunctionBackward",
        "FusedRMSNormAffineFunctionBackward",
    }
    assert all(f"{name}Backward0" in known for name in NOT_HOMOGENEOUS.split())
