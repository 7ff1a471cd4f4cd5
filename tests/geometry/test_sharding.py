"""Sharded weights against the same weights whole: every sum, every write and every total, on two
and four ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from ranks import RankError, init_process_group, run_ranks
from torch import Tensor, nn

from lightning_normdyn import NotSupportedError, Partition, WeightVectors
from lightning_normdyn.geometry.sharding import (
    _boxes,
    _successive_chunks,
    check_weight,
    full_shape,
    place,
    survey,
    torch_optimizers,
)


def _rows_without(shape: tuple[int, ...], rows: list[int]) -> Partition:
    """Filters, some of which belong to no vector (the v rows of a packed attention projection)."""
    labels = torch.full((shape[0],), -1)
    rest = [r for r in range(shape[0]) if r not in rows]
    labels[rest] = torch.arange(len(rest))
    return Partition((0,), labels, "filter")


# Sizes that divide by nothing, vectors that cross every border.
CASES: dict[str, tuple[tuple[int, ...], Partition]] = {
    "7 filters": ((7, 12), Partition.filters((7, 12))),
    "5 filters": ((5, 2, 3), Partition.filters((5, 2, 3))),
    "1 filter": ((1, 6), Partition.filters((1, 6))),
    "3-row groups": ((9, 4), Partition.groups((9, 4), 3)),
    "layer": ((5, 6), Partition.layer((5, 6))),
    "columns": ((6, 5), Partition.filters((6, 5), axis=1)),
    "transposed": ((4, 3, 2, 2), Partition.filters((4, 3, 2, 2), transposed_groups=2)),
    "some rows": ((8, 7), _rows_without((8, 7), [1, 2, 7])),
}


def whole(names: list[str] | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in CASES.values()
    ]
    return [w for w, name in zip(weights, CASES, strict=True) if names is None or name in names]


def partitions(names: list[str] | None = None) -> list[Partition]:
    return [partition for name, (_, partition) in CASES.items() if names is None or name in names]


def summary(sums: Tensor, length: Tensor) -> Tensor:
    """Something that is not linear in the sums, so that it must be taken of complete ones."""
    return torch.stack(
        [sums[0].sqrt() * length, sums[0] / (1 + sums[1].square()), torch.ones_like(length)]
    )


def compare(
    sharded: list[Tensor],
    names: list[str] | None,
    reassemble: Callable[[], list[Tensor]],
    collectives: dict[str, int],
) -> None:
    """Every method of WeightVectors on shards against the same on the whole weights."""
    from torch.distributed.tensor.debug import CommDebugMode

    full = [nn.Parameter(w.clone()) for w in whole(names)]
    ours = WeightVectors(sharded, partitions(names))
    theirs = WeightVectors(full, partitions(names))
    counted: dict[str, int] = {}

    def count(name: str, call: Callable[[], Any]) -> Any:
        with CommDebugMode() as mode:
            result = call()
        counted[name] = mode.get_total_counts()
        return result

    def close(a: list[Tensor], b: list[Tensor]) -> None:
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-13, atol=1e-13)

    def pairs(v: WeightVectors) -> Any:
        return (v.values(), v.values()), (v.values(), None)

    with torch.no_grad():
        sums = count("inner", lambda: ours.inner(*pairs(ours)))
        close(ours.gather(sums), theirs.gather(theirs.inner(*pairs(theirs))))
        close(ours.gather(ours.norms()), theirs.gather(theirs.norms()))
        totals = count("totals", lambda: ours.totals(sums))
        close([totals], [theirs.totals(theirs.inner(*pairs(theirs)))])
        again, summarized = count(
            "inner_and_totals", lambda: ours.inner_and_totals(*pairs(ours), summarize=summary)
        )
        close(
            [again, summarized],
            [sums, theirs.inner_and_totals(*pairs(theirs), summarize=summary)[1]],
        )
        close(ours.gather(ours.length), theirs.gather(theirs.length))
        close([ours.count], [theirs.count])

        factors = [
            1 + torch.rand(p.n, generator=torch.Generator().manual_seed(p.n))
            for p in partitions(names)
        ]
        close(ours.gather(ours.scatter(factors)), factors)
        before = [None if t is None else t.clone() for t in ours.values()]
        count("scale_", lambda: ours.scale_(ours.scatter(factors)))
        theirs.scale_(theirs.scatter(factors))
        close(reassemble(), full)
        close(
            ours.gather(ours.displacement(before)), theirs.gather(theirs.displacement(whole(names)))
        )
        ours.add_scaled_(-0.5 * ours.scatter(factors), before)
        theirs.add_scaled_(-0.5 * theirs.scatter(factors), whole(names))
        close(reassemble(), full)
    assert counted == {"scale_": 0, **collectives}


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])


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


class Weights(nn.Module):
    """The weights of CASES as an FSDP unit that adds them all up."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(w.square().sum() for w in self.weights)


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


def test_a_refusal_on_one_rank_reaches_all():
    """Nobody waits in a collective for a rank that has refused; the message names it."""

    def main() -> str:
        import torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor

        init_process_group()
        sharded = distribute_tensor(torch.ones(4, 2), mesh_of(2), [Shard(0)])
        odd = nn.Parameter(
            torch.ones(2, 2, dtype=torch.complex64 if dist.get_rank() == 1 else torch.float32)
        )
        with pytest.raises(NotSupportedError) as error:
            WeightVectors(
                [nn.Parameter(sharded), odd],
                [Partition.filters((4, 2)), Partition.filters((2, 2))],
                ["one", "two"],
            )
        return str(error.value)

    assert all(
        "rank 1" in message and "`two`" in message and "complex" in message
        for message in run_ranks(main).values()
    )


def test_ranks_with_different_weights_are_refused():
    """A pipeline: every rank holds other weights. Sums over ranks would add what has nothing to do
    with each other."""

    def main() -> str:
        import torch.distributed as dist
        from torch.distributed.tensor import Shard, distribute_tensor

        init_process_group()
        sharded = distribute_tensor(torch.ones(4, 2), mesh_of(2), [Shard(0)])
        name = f"stage{dist.get_rank()}.weight"
        with pytest.raises(NotSupportedError) as error:
            WeightVectors([nn.Parameter(sharded)], [Partition.filters((4, 2))], [name])
        return str(error.value)

    assert all("pipeline" in message for message in run_ranks(main).values())


def test_pieces_that_do_not_make_up_the_weight_are_refused():
    """Each rank believes to hold the whole weight on a mesh of its own, but they are the same
    weight."""

    def main() -> str:
        from torch.distributed.tensor import DTensor, Shard

        init_process_group()
        mesh = mesh_of(2)
        lying = DTensor.from_local(
            torch.ones(2, 2),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([5, 2]),
            stride=(2, 1),
        )
        with pytest.raises(NotSupportedError) as error:
            WeightVectors([nn.Parameter(lying)], [Partition.filters((5, 2))])
        return str(error.value)

    assert all("torch 2.13" in message for message in run_ranks(main).values())


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


def test_a_broken_reduction_is_seen():
    """The comparison above can fail: without the collective it does."""

    def main() -> None:
        from torch.distributed.tensor import distribute_tensor

        init_process_group()
        names = ["7 filters"]
        sharded = [
            nn.Parameter(distribute_tensor(w, mesh_of(2), [_placements()[0](1)]))
            for w in whole(names)
        ]
        vectors = WeightVectors(sharded, partitions(names))
        vectors._reduction.sum_ = lambda packed: packed  # type: ignore[method-assign]
        full = WeightVectors([nn.Parameter(w) for w in whole(names)], partitions(names))
        torch.testing.assert_close(vectors.norms(), full.norms())

    with pytest.raises(RankError, match="Tensor-likes are not close"):
        run_ranks(main)


# -------------------------------------------------------------------------------------- one process


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


def test_chunks_follow_torch_chunk():
    table = _successive_chunks(7, (2, 2))
    assert table.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1]]
    assert _successive_chunks(1, (4,)).tolist() == [[0]]


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(NotSupportedError, match="survey"):
        place(torch.ones(5), Partition.filters((7, 12)), "net.weight")


def test_unknown_subclasses_are_refused():
    class Odd(Tensor):
        pass

    weight = nn.Parameter(torch.ones(2, 2).as_subclass(Odd))
    with pytest.raises(NotSupportedError, match=r"`w`.*Odd"):
        check_weight(weight, "w")


def test_torch_optimizers_unwraps():
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    assert torch_optimizers(LightningOptimizer(optimizer)) == [optimizer]
    with pytest.raises(NotSupportedError, match="Wrapper is not a torch optimizer"):
        torch_optimizers(Wrapper(optimizer))  # what it does around the inner step is not known
