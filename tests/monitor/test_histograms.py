"""Histograms over vectors, against numpy on all values at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import init_process_group, run_ranks

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.monitor.histograms import BINS, PACKED, Histogram, bin_vectors, unpack

SHAPES = [(50, 7), (8, 3, 3, 3), (4, 6)]


def weights() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape) * 10**i for i, shape in enumerate(SHAPES)]


def vectors_of(tensors) -> WeightVectors:
    return WeightVectors(tensors, [Partition.filters(shape) for shape in SHAPES])


def check(histogram: Histogram, values: np.ndarray) -> None:
    edges = np.array(histogram.edges)
    assert len(edges) == BINS + 1
    assert len(histogram.counts) == BINS
    assert (np.diff(edges) > 0).all()
    widths = np.diff(np.log(edges))
    np.testing.assert_allclose(widths, widths.mean(), rtol=0.05)  # edges have six digits
    clipped = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
    # An edge is rounded, so a value on it may fall to either side.
    assert (
        np.abs(np.cumsum(np.histogram(clipped, edges)[0]) - np.cumsum(histogram.counts)).max() <= 1
    )
    assert sum(histogram.counts) == len(values)


def test_counts_are_those_of_numpy():
    vectors = vectors_of(weights())
    norms = vectors.norms()
    packed = bin_vectors(vectors, torch.stack([norms, norms**2]))
    assert packed.shape == (2, 3, PACKED)
    for power, histograms in zip((1, 2), unpack(packed.tolist()), strict=True):
        for histogram, where in zip(histograms, vectors.slices, strict=True):
            check(histogram, norms[where].numpy() ** power)


def test_up_to_17_values_lie_within_the_edges():
    weight = torch.tensor([1.0] * 16 + [1e-6])[:, None]
    vectors = WeightVectors([weight], [Partition.filters((17, 1))])
    [[histogram]] = unpack(bin_vectors(vectors, vectors.norms()[None]).tolist())
    assert histogram.edges[0] <= 1e-6 * (1 + 1e-5)
    assert histogram.counts[0] == 1
    assert max(histogram.counts) == 16


def test_outliers_are_counted_in_the_outermost_bins():
    weight = torch.cat([torch.full((10_000,), 1.0), torch.tensor([1e-3, 1e3])])[:, None]
    vectors = WeightVectors([weight], [Partition.filters(tuple(weight.shape))])
    [[histogram]] = unpack(bin_vectors(vectors, vectors.norms()[None]).tolist())
    assert histogram.edges[0] > 1e-3
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert sum(histogram.counts) == 10_002


def test_equal_values_share_one_bin_and_edges_differ():
    vectors = WeightVectors([torch.full((6, 4), 0.5)], [Partition.filters((6, 4))])
    [[histogram]] = unpack(bin_vectors(vectors, vectors.norms()[None]).tolist())
    assert max(histogram.counts) == 6
    assert histogram.edges == sorted(set(histogram.edges))
    assert histogram.edges[0] == pytest.approx(0.99, rel=1e-3)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_what_has_no_logarithm_is_left_out(bad):
    vectors = vectors_of(weights())
    values = vectors.norms()
    values[vectors.slices[2]] = bad
    values[0] = bad
    [histograms] = unpack(bin_vectors(vectors, values[None]).tolist())
    assert sum(histograms[0].counts) == 49
    assert sum(histograms[1].counts) == 8
    assert histograms[2] is None


def test_extreme_values_do_not_overflow():
    weight = torch.tensor([1e-300, 1e300, 1e300], dtype=torch.float64)[:, None]
    vectors = WeightVectors([weight], [Partition.filters((3, 1))])
    [[histogram]] = unpack(bin_vectors(vectors, weight[None, :, 0]).tolist())
    assert sum(histogram.counts) == 3
    assert all(np.isfinite(histogram.edges))


def sharded(dim: int) -> list:
    """The histograms of weights of which each rank holds a half."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group()
    mesh = init_device_mesh("cpu", (2,))
    vectors = vectors_of(
        [torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)])) for weight in weights()]
    )
    values = vectors.inner((vectors.values(), vectors.values())).sqrt()
    return unpack(bin_vectors(vectors, values).tolist())


@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_weights_give_the_histograms_of_whole_ones(dim):
    whole = vectors_of(weights())
    values = whole.inner((whole.values(), whole.values())).sqrt()
    expected = unpack(bin_vectors(whole, values).tolist())
    for found in run_ranks(sharded, args=(dim,)).values():
        for mine, theirs in zip(found[0], expected[0], strict=True):
            assert mine.counts == theirs.counts
            assert mine.edges == pytest.approx(theirs.edges, rel=1e-5)
