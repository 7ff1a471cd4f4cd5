"""A bias is the same before and after a rearrangement; ranks follow their part of a DTensor."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.search import ScaleInvarianceSearch

# Scale-invariant, but the bias is lost track of in rearrangements as rare as these.
MISSED = "no"

# What stands between a convolution and its BatchNorm: (operation, kind without a bias, kind with
# one).
BETWEEN = {
    "maxout": (lambda x: torch.maximum(x[:, ::2], x[:, 1::2]).repeat(1, 2, 1, 1), "group", "no"),
    "zero padding": (lambda x: F.pad(x, (1, 1, 1, 1)), "filter", "no"),
    "cropping": (lambda x: F.pad(x, (-1, -1, -1, -1)), "filter", "filter"),
    "slice": (lambda x: x[:, :, 1:-1, ::2], "filter", "filter"),
    "slice of channels": (lambda x: x[:, 1:3].repeat(1, 2, 1, 1), "partly", "partly"),
    "roll": (lambda x: x.roll(1, 2), "filter", "filter"),
    "roll of channels": (lambda x: x.roll(1, 1), "filter", "filter"),
    "flip": (lambda x: x.flip(3), "filter", "filter"),
    "parts of the batch": (
        lambda x: torch.cat([part[:1] for part in x.chunk(2)]),
        "filter",
        "filter",
    ),
    "unbound and stacked": (lambda x: torch.stack(x.unbind(2), 2), "filter", "filter"),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), "filter", "filter"),
    "rot90 of channels": (lambda x: torch.rot90(x[:, :, :4], 1, (1, 2)), "layer", "no"),
    "cat with itself": (lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1), "filter", "partly"),
    "stack": (lambda x: torch.stack([x, x], 2).flatten(2, 3), "filter", "filter"),
    "split": (lambda x: torch.cat(x.split(1, 1)[::-1], 1), "filter", "filter"),
    "unbind": (lambda x: torch.stack(x.unbind(1), 1), "filter", "filter"),
    "permute": (
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "filter",
        "filter",
    ),
    "flatten": (lambda x: x.flatten(2).unflatten(2, (6, 6)), "filter", "filter"),
    "squeeze": (lambda x: x[None].squeeze(0), "filter", "filter"),
    "diagonal": (lambda x: x.diagonal(0, 2, 3)[..., None], "filter", MISSED),
    "windows": (lambda x: x.unfold(2, 3, 1).mean(-1), "filter", MISSED),
    "pixel_unshuffle": (lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), "filter", MISSED),
    "not centered": (lambda x: (x[:, :2] - x[:, 2:]).repeat(1, 2, 1, 1).relu(), "group", "no"),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_between_a_convolution_and_its_norm(name, bias, claim_between):
    operation, without, with_bias = BETWEEN[name]
    assert claim_between(operation, bias) == (with_bias if bias else without)


def test_one_bias_before_and_after_a_rearrangement_is_one_offset(claim):
    """The same layer called twice adds the same bias; what is equal cancels, and one BatchNorm
    removes it from both."""
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.a(2 * x)])), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)
    )
    assert claim(net, zoo.vectors()) == "filter"
    (link,) = inspect_module(net, zoo.vectors())[0].batch_norms
    assert link.bias == "a.bias"
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x)])),
        a=nn.Linear(6, 5),
        b=nn.Linear(6, 5),
        n=nn.BatchNorm1d(5),
    )
    assert claim(net, zoo.vectors()) == "no"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x.flip(0)), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "filter"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x).roll(1, 1), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "no"


def test_each_rank_follows_its_part_and_claims_nothing_before_the_ranks_agree():
    def on_rank():
        from torch.distributed.tensor import (
            DTensor,
            Replicate,
            Shard,
            distribute_tensor,
            init_device_mesh,
        )

        ranks.init_process_group()
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        x = zoo.vectors()

        def by_filter(m):
            y = F.linear(x, m.a.to_local())
            return (y / y.norm(dim=0)).sum()

        def gathered(m):
            y = DTensor.from_local(F.linear(x, m.a.to_local()), mesh, [Shard(1)])
            y = y.redistribute(placements=[Replicate()]).to_local()
            return (y / y.norm(dim=0)).sum()

        found = []
        for loss in (by_filter, gathered):
            net = nn.Module()
            net.a = nn.Parameter(distribute_tensor(torch.randn(4, 6).double(), mesh, [Shard(0)]))
            with ScaleInvarianceSearch(net) as search:
                search.analyze(loss(net))
            before = search.verdicts["a"].kind
            search.agree()
            found.append((before, search.verdicts["a"].kind))
        return found

    for by_filter, gathered in ranks.run_ranks(on_rank).values():
        assert by_filter == ("unknown", "filter")
        # The filters of the other ranks have come beside them: all are one from there on.
        assert gathered == ("unknown", "layer")
