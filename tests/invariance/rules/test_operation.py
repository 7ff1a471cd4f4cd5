"""An epsilon is known by its name."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from lightning_normdyn.invariance.rules.operation import declared_epsilon
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
    assert declared_epsilon(nn.Linear(2, 2)) is None
    assert declared_epsilon(nn.RMSNorm(2)) == 0.0
    tensor = nn.Module()
    tensor.register_buffer("eps", torch.tensor(1e-6))
    assert declared_epsilon(tensor) == float("inf")
