"""Sums are completed over the ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import RankError, init_process_group, run_ranks
from shards import mesh_of, partitions, whole
from torch import nn

from lightning_normdyn import WeightVectors


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
