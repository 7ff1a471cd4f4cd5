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


def brute_force(finer: Partition, coarser: Partition) -> list[int]:
    """`Partition.found_in`, entry by entry."""
    a, b = finer.labels.flatten().tolist(), coarser.labels.flatten().tolist()
    sets = [{i for i, label in enumerate(b) if label == j} for j in range(coarser.n)]
    mine = [{i for i, label in enumerate(a) if label == j} for j in range(finer.n)]
    return [sets.index(entries) if entries in sets else -1 for entries in mine]


def test_vectors_are_found_in_another_partition():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        labels = torch.randint(-1, 3, (2, 6), generator=generator)
        # Without gaps, as a partition numbers its vectors.
        one, other = (
            Partition((0,), torch.unique(x.clamp(min=-1), return_inverse=True)[1] - 1, "group")
            for x in labels
        )
        assert one.found_in(other).tolist() == brute_force(one, other)
    assert (
        Partition.filters((3, 4)).found_in(Partition.filters((3, 4), axis=1)).tolist() == [-1] * 3
    )


def test_within_wants_whole_vectors():
    filters, groups = Partition.filters((4, 3)), Partition.groups((4, 3), 2)
    assert filters.within(groups).tolist() == [0, 0, 1, 1]
    columns = Partition.filters((4, 3), axis=1)
    assert columns.within(Partition.layer((4, 3))).tolist() == [0, 0, 0]
    for finer, coarser in ((groups, filters), (columns, groups)):
        with pytest.raises(ValueError, match="do not lie within"):
            finer.within(coarser)


def test_lengths_count_entries_that_are_read():
    read = torch.tensor([[True, False, True], [True, True, True]])
    assert Partition.filters((2, 3)).lengths((2, 3)).tolist() == [3, 3]
    assert Partition.filters((2, 3)).lengths((2, 3), read).tolist() == [2, 3]
    assert Partition.filters((2, 3), axis=1).lengths((2, 3), read).tolist() == [2, 1, 2]
    assert Partition((0,), torch.tensor([0, -1]), "filter").lengths((2, 3)).tolist() == [3]
