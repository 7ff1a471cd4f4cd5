"""Sums are completed over the ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import RankError, init_process_group, run_ranks
from shards import mesh_of, partitions, whole
from torch import nn

from lightning_normdyn import WeightVectors
from lightning_normdyn.geometry.reduction import all_reduce, alone


def test_nobody_waits_for_numbers_that_do_not_matter():
    # Outside of any process group, in which it would raise.
    with alone():
        assert all_reduce(torch.ones(2), None).tolist() == [1, 1]
    with pytest.raises(ValueError, match="process group"):
        all_reduce(torch.ones(2), None)


def test_a_broken_reduction_is_seen():
    """The comparison above can fail: without the collective it does."""

    def main() -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        init_process_group()
        names = ["7 filters"]
        sharded = [nn.Parameter(distribute_tensor(w, mesh_of(2), [Shard(1)])) for w in whole(names)]
        vectors = WeightVectors(sharded, partitions(names))
        vectors.sum_ = lambda packed: packed  # type: ignore[method-assign]
        full = WeightVectors([nn.Parameter(w) for w in whole(names)], partitions(names))
        torch.testing.assert_close(vectors.norms(), full.norms())

    with pytest.raises(RankError, match="Tensor-likes are not close"):
        run_ranks(main)
