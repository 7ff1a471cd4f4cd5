"""DTensors against the same weights whole, on two and four ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import init_process_group, run_ranks
from shards import Weights, compare, mesh_of, whole
from torch import nn

from lightning_normdyn import NotSupportedError, Partition, WeightVectors
from lightning_normdyn.geometry.dtensor import _successive_chunks

LAYOUTS: dict[
    str,
    tuple[int, tuple[int, ...], Callable[[Any], list[Any]], list[str] | None, tuple[int, int, int]],
] = {}


def layout(
    name: str,
    world: int,
    mesh: tuple[int, ...],
    collectives: tuple[int, int, int],
    names: list[str] | None = None,
) -> Any:
    """Register how one case is cut; ``collectives``: expected of inner, totals,
    inner_and_totals."""

    def register(make: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        LAYOUTS[name] = (world, mesh, make, names, collectives)
        return make

    return register


def _placements() -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Shard, Replicate


@layout("rows", 2, (2,), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0)]


@layout(
    "rows of whole filters", 2, (2,), (0, 1, 1), ["7 filters", "5 filters", "1 filter", "some rows"]
)
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0)]


@layout("rows on four ranks", 4, (4,), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0)]


@layout("columns", 2, (2,), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](1)]


@layout(
    "columns, all ranks have all vectors",
    2,
    (2,),
    (1, 0, 1),
    ["7 filters", "1 filter", "3-row groups", "layer"],
)
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](1)]


@layout("replicated", 2, (2,), (0, 0, 0))
def _(mesh: Any) -> list[Any]:
    return [_placements()[1]()]


@layout("replicas of rows", 4, (2, 2), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[1](), _placements()[0](0)]


@layout("rows, replicated inside", 4, (2, 2), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0), _placements()[1]()]


@layout("rows by columns", 4, (2, 2), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0), _placements()[0](1)]


@layout("rows of rows", 4, (2, 2), (1, 1, 1))
def _(mesh: Any) -> list[Any]:
    return [_placements()[0](0), _placements()[0](0)]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", LAYOUTS)
def test_dtensor(name: str) -> None:
    world, shape, make, names, collectives = LAYOUTS[name]

    def main() -> None:
        from torch.distributed.tensor import distribute_tensor

        init_process_group()
        mesh = mesh_of(*shape)
        sharded = [nn.Parameter(distribute_tensor(w, mesh, make(mesh))) for w in whole(names)]
        expected = dict(zip(("inner", "totals", "inner_and_totals"), collectives, strict=True))
        compare(sharded, names, lambda: [w.full_tensor() for w in sharded], expected)

    run_ranks(main, world)


def test_meshes_that_differ_within_one_optimizer():
    """Tensor parallelism: columns of one weight, rows of another, a plain tensor, and one on the
    other mesh dimension."""

    def main() -> None:
        from torch.distributed.tensor import distribute_tensor

        init_process_group()
        mesh = mesh_of(2, 2)
        Shard, Replicate = _placements()
        how = [
            (mesh, [Shard(0), Shard(1)]),
            (mesh["b"], [Shard(1)]),
            (mesh["a"], [Shard(0)]),
            (mesh["a"], [Shard(0)]),
            (mesh, [Shard(0), Replicate()]),
            (mesh["b"], [Shard(0)]),
            None,
            None,
        ]
        sharded = [
            w if h is None else distribute_tensor(w, *h) for w, h in zip(whole(), how, strict=True)
        ]
        parameters = [nn.Parameter(w) for w in sharded]
        expected = {"inner": 1, "totals": 1, "inner_and_totals": 1}
        compare(
            parameters,
            None,
            lambda: [w.full_tensor() if hasattr(w, "full_tensor") else w for w in parameters],
            expected,
        )

    run_ranks(main, 4)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 1), (2, 2)])
def test_fsdp2_over_tensor_parallelism(tp: int, dp: int):
    def main() -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        init_process_group()
        mesh = mesh_of(dp, tp)
        Shard, _ = _placements()
        module = Weights(whole())
        cuts = [0, 1, 0, 0, 1, 0, 0, 1]
        for i, dim in enumerate(cuts):
            if i != 2:  # one filter alone stays out of tensor parallelism
                module.weights[i] = nn.Parameter(
                    distribute_tensor(module.weights[i].detach(), mesh["b"], [Shard(dim)])
                )
        fully_shard(module, mesh=mesh["a"])
        weights = list(module.weights)
        assert dp == 1 or any("_StridedShard" in repr(w.placements) for w in weights) == (tp > 1)
        expected = {"inner": 1, "totals": 1, "inner_and_totals": 1}
        compare(weights, None, lambda: [w.full_tensor() for w in weights], expected)

    run_ranks(main, dp * tp)


def test_partial_gradients_are_completed():
    def main() -> None:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        init_process_group()
        mesh = mesh_of(2)
        weight = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Replicate()]))
        vectors = WeightVectors([weight], [Partition.filters((3, 2))])
        weight.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Replicate()])
        partial = DTensor.from_local(torch.full((3, 2), 2.0), mesh, [Partial()])
        assert vectors.local([partial])[0].tolist() == [[4.0, 4.0]] * 3

    run_ranks(main)


def test_partial_weights_are_refused():
    def main() -> str:
        from torch.distributed.tensor import DTensor, Partial

        init_process_group()
        weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh_of(2), [Partial()]))
        with pytest.raises(NotSupportedError) as error:
            WeightVectors([weight], [Partition.filters((2, 2))], ["odd"])
        return str(error.value)

    for message in run_ranks(main).values():
        assert "`odd`" in message
        assert "Partial" in message


def test_chunks_follow_torch_chunk():
    table = _successive_chunks(7, (2, 2))
    assert table.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1]]
    assert _successive_chunks(1, (4,)).tolist() == [[0]]
