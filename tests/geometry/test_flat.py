"""Slices of flat FSDP parameters against the same weights whole, on two and four ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import init_process_group, run_ranks
from shards import CASES, Weights, compare, mesh_of, whole
from torch import Tensor, nn

from lightning_normdyn import NotSupportedError, Partition, WeightVectors, survey
from lightning_normdyn.geometry.flat import _boxes
from lightning_normdyn.geometry.placement import full_shape


@pytest.mark.sampled
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
def test_fsdp1(strategy: str, world: int):
    if strategy == "HYBRID_SHARD" and world == 2:
        pytest.skip("two ranks have no replicas of shards")

    def main() -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        init_process_group()
        arguments: dict[str, Any] = (
            {"device_mesh": mesh_of(2, 2)} if strategy == "HYBRID_SHARD" else {}
        )
        module = FullyShardedDataParallel(
            Weights(whole()),
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=True,
            device_id=torch.device("cpu"),
            **arguments,
        )
        survey(module)
        weights = list(module.parameters())
        assert [full_shape(w) for w in weights] == [shape for shape, _ in CASES.values()]

        def reassemble() -> list[Tensor]:
            with FullyShardedDataParallel.summon_full_params(module):
                return [w.detach().clone() for w in module.parameters()]

        cut = strategy != "NO_SHARD"
        compare(weights, None, reassemble, {"inner": cut, "totals": cut, "inner_and_totals": cut})

    run_ranks(main, world)


def test_fsdp1_keeps_the_memory_format():
    """A channels_last convolution is flattened in the order of its memory."""

    def main() -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        init_process_group()
        convolution = nn.Conv2d(3, 5, (2, 3), bias=False).to(memory_format=torch.channels_last)
        torch.nn.init.normal_(convolution.weight, generator=torch.Generator().manual_seed(1))
        expected = convolution.weight.detach().double().sum((0, 2, 3))
        module = FullyShardedDataParallel(
            convolution, use_orig_params=True, device_id=torch.device("cpu")
        )
        survey(module)
        (weight,) = module.parameters()
        vectors = WeightVectors([weight], [Partition.filters((5, 3, 2, 3), axis=1)])
        sums = vectors.gather(vectors.inner((vectors.values(), None))[0])[0]
        torch.testing.assert_close(sums, expected)

    run_ranks(main)


def test_fsdp1_without_original_parameters_is_refused():
    def main() -> str:
        from torch.distributed.fsdp import FullyShardedDataParallel

        init_process_group()
        module = FullyShardedDataParallel(
            Weights(whole()), use_orig_params=False, device_id=torch.device("cpu")
        )
        with pytest.raises(NotSupportedError) as error:
            survey(module)
        return str(error.value)

    assert all("use_orig_params=True" in message for message in run_ranks(main).values())


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_tile_every_range(shape: tuple[int, ...]):
    index = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start in range(index.numel() + 1):
        for stop in range(start, index.numel() + 1):
            boxes = list(_boxes(shape, start, stop))
            entries = [index[tuple(slice(a, b) for a, b in box)].flatten() for box in boxes]
            assert torch.cat([*entries, torch.zeros(0, dtype=torch.long)]).tolist() == list(
                range(start, stop)
            )
            assert len(boxes) <= 2 * len(shape) - 1
