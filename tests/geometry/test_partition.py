"""Which entries of a weight form one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn import Partition, WeightVectors


def test_transposed_convolution_labels():
    # ConvTranspose(4, 6, groups=2) stores (4, 3, ...): output channel 3 g + j for inputs of group
    # g.
    labels = Partition.filters((4, 3, 2, 2), transposed_groups=2).labels
    assert labels.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_filters_are_what_feeds_one_output_channel(groups):
    layer = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False)
    vectors = WeightVectors(
        [layer.weight], [Partition.filters(tuple(layer.weight.shape), transposed_groups=groups)]
    )
    x = torch.randn(2, 4, 5)
    before = layer(x)
    factor = torch.arange(1.0, 7.0)
    with torch.no_grad():
        vectors.scale_(factor)
    torch.testing.assert_close(layer(x), before * factor[:, None])


def test_granularities_and_counts():
    assert [
        Partition.filters((8, 3)).n,
        Partition.groups((8, 3), 2).n,
        Partition.layer((8, 3)).n,
    ] == [8, 2, 1]
    assert Partition((0,), torch.tensor([0, 0, 1, 1, -1, -1]), "group").n == 2
    assert Partition((0,), torch.empty(0, dtype=torch.long), "filter").n == 0
