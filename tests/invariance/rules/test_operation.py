"""An epsilon is known by its name; users add rules, and every rule is for an operation that exists;
what is not understood is named, and what is missed is known."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance import follow
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.rules import operation, register_rule
from lightning_normdyn.invariance.rules.elementwise import homogeneous
from lightning_normdyn.invariance.rules.operation import NOT_HOMOGENEOUS, RULES, declared_epsilon
from lightning_normdyn.invariance.search import ScaleInvarianceSearch


class NamedEpsilon(nn.Module):
    """A root-mean-square normalization written by hand, with its epsilon under another name."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, value)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, self.name))


@pytest.mark.parametrize(
    "name",
    [
        "eps",
        "epsilon",
        "variance_epsilon",
        "layer_norm_epsilon",
        "norm_eps",
        "rms_norm_eps",
        "_eps",
    ],
)
def test_an_epsilon_is_known_by_its_name(name):
    for value, harmless in ((1e-6, True), (1e-2, False)):
        net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(6, 6), n=NamedEpsilon(name, value))
        with ScaleInvarianceSearch(net) as search:
            search.analyze(net(zoo.vectors()).sum())
        assert search.verdicts["a.weight"].kind == "layer"
        assert search.verdicts["a.weight"].eps is not harmless


def test_an_epsilon_that_no_name_tells_is_marked():
    for name in ("steps", "reps"):
        net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(6, 6), n=NamedEpsilon(name, 1e-6))
        with ScaleInvarianceSearch(net) as search:
            search.analyze(net(zoo.vectors()).sum())
        assert search.verdicts["a.weight"].eps
    assert declared_epsilon(nn.Linear(2, 2), otherwise=0.5) == 0.5
    assert declared_epsilon(nn.RMSNorm(2), otherwise=0.5) == 0.0
    tensor = nn.Module()
    tensor.register_buffer("eps", torch.tensor(1e-6))
    assert declared_epsilon(tensor, otherwise=0.5) == float("inf")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_rules_for_custom_functions(monkeypatch, claim):
    monkeypatch.setattr(operation, "RULES", dict(RULES))
    monkeypatch.setattr(follow, "RULES", operation.RULES)
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


REASONS = {
    "GeluBackward0 does not commute": lambda m, x: m.n(F.gelu(m.a(x))),
    "bias a.bias is added before ReluBackward0": lambda m, x: m.n(F.relu(m.a(x))),
    "added to a tensor that does not scale with it": lambda m, x: m.n(m.b(x) + m.a(x)),
    "its scale reaches the loss": lambda m, x: m.a(x),
    "LinalgDetBackward0 factors, inverts or solves with a matrix": lambda m, x: (
        m.n(m.a(x)) * torch.linalg.det(m.a.weight)
    ),
    "scale differently": lambda m, x: m.n(
        F.linear(x, m.a.weight) + F.linear(x, m.a.weight).square()
    ),
    "a constant is added": lambda m, x: m.n(m.a(x) + torch.ones_like(x)),
    "SafeSoftmaxBackward0 does not commute": lambda m, x: m.n(torch._safe_softmax(m.a(x), -1)),
    "CopySlices writes into a part of a tensor in place": lambda m, x: m.n(written_over(m.a(x))),
    "SliceScatterBackward0 writes into a part of a tensor": lambda m, x: m.n(
        m.a(x).slice_scatter(torch.ones(6, 2).double(), 1, 0, 2)
    ),
    "AsStridedBackward0 reads memory in another layout": lambda m, x: m.n(
        m.a(x).as_strided((6, 6), (6, 1))
    ),
    "GroupedMmBackward0 multiplies groups of rows": lambda m, x: m.n(grouped(m.a(x)).double()),
    "FftR2CBackward0 is a Fourier transform": lambda m, x: m.n(
        torch.fft.rfft(m.a(x), 6).abs()[:, [0, 1, 2, 3, 2, 1]]
    ),
    "FftC2CBackward0 is a Fourier transform": lambda m, x: m.n(
        torch.fft.fft(x.mul(1j) @ m.a.weight.mul(1.0 + 0j)).real
    ),
    "computes with complex numbers": lambda m, x: m.n(
        torch.view_as_complex(m.a(x).view(6, 3, 2)).abs().repeat(1, 2)
    ),
    "LinalgInvExBackward0 factors, inverts": lambda m, x: m.n(
        m.b(x) @ torch.linalg.inv(m.a.weight)
    ),
    "a constant is added to what enters NativeLayerNorm": lambda m, x: F.layer_norm(
        attended(x @ m.a.weight) + 1.0, (6,)
    ),
    "a constant is added to what enters MmBackward0": lambda m, x: m.n(
        (attended(x @ m.a.weight) + 1.0) @ m.b.weight.t()
    ),
    "LogcumsumexpBackward0 does not commute": lambda m, x: m.n(m.a(x).logcumsumexp(1)),
}


def written_over(x):
    x = x.clone()
    x[:, 0] = 1.0
    return x


def attended(x):
    """Means of what is not negative, weighted by an attention that does not depend on it."""
    return torch.ones(len(x), len(x), dtype=x.dtype, requires_grad=True).softmax(-1) @ x.abs()


def grouped(x):
    tokens = torch.cat([x, x, x[:, :4]], 1).bfloat16()
    experts = torch.ones(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    return torch._grouped_mm(tokens, experts, offs=torch.tensor([2, 6], dtype=torch.int32))[:, :6]


@pytest.mark.parametrize("reason", REASONS)
def test_the_blocking_operation_is_named(reason):
    net = zoo.Net(REASONS[reason], a=nn.Linear(6, 6), b=nn.Linear(6, 6), n=nn.BatchNorm1d(6))
    assert re.search(re.escape(reason), inspect_module(net, zoo.vectors(6))[0].reason)


def test_a_recurrent_layer_says_what_it_is():
    verdict = inspect_module(nn.LSTM(6, 6), torch.randn(3, 2, 6))[0]
    assert "MkldnnRnnLayerBackward0" in verdict.reason
    assert (
        "is a whole recurrent layer, whose gates do not commute with a change of scale"
        in verdict.reason
    )


MISSES = {
    "circular padding": (
        lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
        "CopySlices",
    ),  # in-place writes into views
    "nan_to_num": (lambda x: x.nan_to_num(), "NanToNum"),
    "fft": (lambda x: torch.fft.fft(x).real, "FftR2C"),
    "as_strided": (lambda x: x.as_strided((4, 4, 6, 6), (144, 36, 6, 1)), "AsStrided"),
    "softplus with a tiny beta": (
        lambda x: F.threshold(x, 0.0, 0.0),
        "Threshold",
    ),  # the value is not saved
}


@pytest.mark.parametrize("name", MISSES)
def test_known_misses_are_misses(name, claim):
    operation, node = MISSES[name]
    net = zoo.Net(
        lambda m, x: m.n(operation(m.a(x))), a=nn.Conv2d(3, 4, 1, bias=False), n=nn.BatchNorm2d(4)
    )
    assert claim(net, zoo.images(4, 3, 6)) == "no"
    assert node in inspect_module(net, zoo.images(4, 3, 6))[0].reason
