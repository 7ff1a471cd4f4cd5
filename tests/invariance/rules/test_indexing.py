"""Lookups: which rows of a table go together."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

# Scale-invariant, but the bias is lost track of in rearrangements as rare as these.
MISSED = "no"

TO_ROWS = torch.tensor([1, 0, 1, 3])[:, None, None, None].expand(4, 4, 6, 6)

# What stands between a convolution and its BatchNorm: (operation, kind without a bias, kind with
# one).
BETWEEN = {
    "index": (lambda x: x[torch.tensor([1, 0, 3, 2])], "filter", "filter"),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 2, 1, 0])), "filter", "filter"),
    "index of pairs": (
        lambda x: x[torch.arange(4), :, torch.arange(4) % 3, :, None],
        "filter",
        "filter",
    ),
    "index of places": (
        lambda x: x[:, :, torch.tensor([0, 2, 4]), torch.tensor([1, 1, 5]), None],
        "filter",
        "filter",
    ),
    "packed by a mask": (
        lambda x: x.permute(0, 2, 3, 1)[
            torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
        ][..., None, None],
        "filter",
        "filter",
    ),
    "index_add": (
        lambda x: torch.zeros_like(x).index_add(0, torch.tensor([1, 0, 1, 3]), x),
        "filter",
        "no",
    ),
    "index_add to itself": (lambda x: x.index_add(0, torch.tensor([1, 0]), x[:2]), "filter", "no"),
    "index_add of channels": (
        lambda x: torch.zeros_like(x).index_add(1, torch.tensor([1, 0, 1, 3]), x),
        "layer",
        "no",
    ),
    "index_add to what does not scale": (
        lambda x: torch.ones_like(x).requires_grad_().index_add(0, torch.arange(4), x),
        "no",
        "no",
    ),
    "index_put that adds": (
        lambda x: torch.zeros_like(x).index_put((torch.tensor([1, 0, 1, 3]),), x, accumulate=True),
        "layer",
        "no",
    ),
    "scatter_add": (lambda x: torch.zeros_like(x).scatter_add(0, TO_ROWS, x), "filter", "no"),
    "scatter_reduce": (
        lambda x: torch.zeros_like(x).scatter_reduce(0, TO_ROWS, x, "amax"),
        "filter",
        "no",
    ),
    "scatter_reduce by products": (
        lambda x: torch.ones_like(x).scatter_reduce(0, TO_ROWS, x, "prod"),
        "no",
        "no",
    ),
    "index_reduce": (
        lambda x: torch.zeros_like(x).index_reduce(
            0, torch.arange(4), x, "mean", include_self=False
        ),
        "filter",
        MISSED,
    ),
    "segment_reduce": (
        lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([1, 3]), axis=0),
        "filter",
        MISSED,
    ),
    "boolean index": (lambda x: x[torch.tensor([True, False, True, True])], "filter", "filter"),
    "gather": (
        lambda x: x.gather(3, torch.zeros(4, 4, 6, 2, dtype=torch.long)),
        "filter",
        "filter",
    ),
    "written into": (
        lambda x: torch.zeros_like(x).index_put((torch.tensor([2, 1, 0, 3]),), x),
        "filter",
        "no",
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_between_a_convolution_and_its_norm(name, bias, claim_between):
    operation, without, with_bias = BETWEEN[name]
    assert claim_between(operation, bias) == (with_bias if bias else without)


def test_embedding_bags_go_together(claim):
    net = zoo.Net(
        lambda m, ids: m.n(m.e(ids)), e=nn.EmbeddingBag(7, 4, mode="sum"), n=nn.LayerNorm(4)
    )
    assert claim(net, zoo.tokens()) == "layer"
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=nn.EmbeddingBag(7, 4), n=nn.BatchNorm1d(4))
    assert claim(net, zoo.tokens()) == "filter"  # its columns


def test_embedding_rows_that_meet_are_one_layer(claim):
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=nn.Embedding(7, 4), n=nn.LayerNorm((5, 4)))
    assert claim(net, zoo.tokens()) == "layer"
    net = zoo.Net(
        lambda m, ids: m.n(m.e(ids).transpose(1, 2)), e=nn.Embedding(7, 4), n=nn.BatchNorm1d(4)
    )
    assert claim(net, zoo.tokens()) == "filter"  # its columns
    net = zoo.Net(lambda m, ids: m.e(ids), e=nn.Embedding(7, 4))
    assert claim(net, zoo.tokens()) == "no"
