"""Claims held against the function: false ones are found, and the module is left as it was."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import by_name, small_net

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.checks import inspect_module, verify_scale_invariance
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict, targets_table


def test_verify_restores_everything_bit_for_bit():
    net, x = small_net(), zoo.images().float()
    net.append(nn.Dropout(0.5))
    net[1].eval()
    net.double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    grad = net[0].weight.grad = torch.randn_like(net[0].weight)
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    report = verify_scale_invariance(net, x.double())
    assert report
    assert len(report.claims) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net[0].weight.grad is grad
    assert verify_scale_invariance(
        net.eval(), x.double()
    )  # an evaluated net is looked at in training mode
    assert not any(m.training for m in net.modules())


def test_verify_finds_false_claims():
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8)).double()
    false = Verdict("0.weight", (8, 6), Partition.filters((8, 6)), "filter")
    report = verify_scale_invariance(net, zoo.vectors(), verdicts=[false])
    assert not report
    assert report.max_relative_change > 0.05
    assert verify_scale_invariance(net, zoo.vectors(), verdicts=[])


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, eps=1.0), zoo.Net(lambda m, x: x / (x.std(-1, keepdim=True) + 1.0))], ids=["LayerNorm", "by hand"]
)  # fmt: skip
def test_a_large_epsilon_is_marked_and_found_out(norm):
    net = nn.Sequential(nn.Linear(6, 8, bias=False), norm).double()
    (verdict,) = claims_of_the_graph(net, zoo.vectors())
    assert verdict.kind == "layer"
    assert verdict.eps
    assert "assumed" in targets_table([verdict])
    assert not verify_scale_invariance(net, zoo.vectors())
    assert inspect_module(net, zoo.vectors())[0].known == "function"


def claims_of_the_graph(net, *inputs) -> list[Verdict]:
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(*inputs).square().sum())
    return [v for v in search.verdicts.values() if v.partition is not None]


def squash(x):  # capsules
    squares = x.view(-1, 2, 4).square().sum(-1, keepdim=True)
    return squares / (1 + squares) * x.view(-1, 2, 4) / squares.sqrt()


# what the graph alone would claim: a number that it does not show, or a copy that it does not hold
ASSUMED = {
    "a padding value": lambda m, x: m.n(F.pad(m.a(x), (2, 2), value=3.0)),
    "a filling value": lambda m, x: m.n(m.a(x).masked_fill(torch.arange(12) > 4, 2.0)),
    "a condition": lambda m, x: m.n(torch.where(m.a(x) > 0.3, m.a(x), 0.1 * m.a(x))),
    "a detached copy": lambda m, x: m.a(x).detach() + m.n(m.a(x)),
    "a large epsilon": lambda m, x: F.layer_norm(m.a(x), (8,), eps=1.0),
    "a constant in a denominator": lambda m, x: m.a(x) / (1 + m.a(x).norm(dim=1, keepdim=True)),
    "a squashed capsule": lambda m, x: squash(m.a(x)),
    "ones to add to": lambda m, x: m.n(
        torch.ones(8, 8, dtype=x.dtype).index_reduce(0, torch.arange(8) % 3, m.a(x), "amax")
    ),
}


@pytest.mark.parametrize("what", ASSUMED)
def test_inspection_withdraws_what_the_function_contradicts(what):
    torch.manual_seed(0)
    width = 12 if "value" in what else 8
    norm = nn.LayerNorm(width) if "value" in what else nn.BatchNorm1d(width)
    net = zoo.Net(ASSUMED[what], a=zoo.linear(6, 8 if "padding" in what else width), n=norm)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert claims_of_the_graph(net, zoo.vectors())
    net.load_state_dict(before)
    (verdict,) = inspect_module(net, zoo.vectors())
    assert (verdict.kind, verdict.partition, verdict.known) == ("no", None, "function")
    assert re.search(r"says \w+, but the outputs change by [0-9.]+ of their size", verdict.reason)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.set_rng_state(state)


def test_inspection_keeps_claims_where_two_runs_differ():
    class Unsteady(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * x

    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Unsteady())
    (verdict,) = inspect_module(net, torch.randn(8, 6))
    assert (verdict.kind, verdict.known) == ("filter", "graph")


def test_only_the_guilty_claim_is_withdrawn():
    net = zoo.Net(
        lambda m, x: m.n(m.a(x)) + (lambda y: y.detach() + m.n(y))(m.b(x)),
        a=zoo.linear(6, 8),
        b=zoo.linear(6, 8),
        n=nn.BatchNorm1d(8),
    )
    found = by_name(inspect_module(net, zoo.vectors()))
    assert (found["a.weight"].kind, found["a.weight"].known) == ("filter", "graph and function")
    assert (found["b.weight"].kind, found["b.weight"].known) == ("no", "function")


def test_sharded_weights_are_refused():
    whole = Verdict("0.weight", (16, 6), Partition.filters((16, 6)), "filter")
    with pytest.raises(
        NotSupportedError,
        match=r"`0.weight` is sharded \(Tensor of shape \(8, 6\), in full \(16, 6\)\).*on one process",
    ):
        verify_scale_invariance(nn.Sequential(nn.Linear(6, 8)), torch.randn(2, 6), verdicts=[whole])


def test_verify_with_a_loss():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    report = verify_scale_invariance(
        net, zoo.vectors(), loss=lambda out: out.square().mean() + net[0].weight.square().sum()
    )
    assert report.claims == ()
    assert report


def test_verify_sees_through_the_autocast_cache():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    claim = Verdict("0.weight", (8, 6), Partition.filters((8, 6)), "filter")
    with torch.autocast("cpu", torch.bfloat16):
        assert not verify_scale_invariance(net, torch.randn(4, 6), verdicts=[claim])
