"""Lookups: which rows of a table go together."""

from __future__ import annotations

import zoo
from torch import nn


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
