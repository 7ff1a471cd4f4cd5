"""What a parameter is on this rank, what is refused by name, and that all ranks mean the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import init_process_group, run_ranks
from shards import mesh_of
from torch import Tensor, nn

from lightning_normdyn import NotSupportedError, Partition, WeightVectors
from lightning_normdyn.geometry.placement import check_weight, place


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(NotSupportedError, match="survey"):
        place(torch.ones(5), Partition.filters((7, 12)), "net.weight")


def test_unknown_subclasses_are_refused():
    class Odd(Tensor):
        pass

    weight = nn.Parameter(torch.ones(2, 2).as_subclass(Odd))
    with pytest.raises(NotSupportedError, match=r"`w`.*Odd"):
        check_weight(weight, "w")


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: torch.randn(3, 2, dtype=torch.complex64), "complex"),
        (lambda: torch.randn(3, 2).to_sparse(), "torch.sparse_coo"),
        (lambda: nn.LazyLinear(3).weight, "lazy parameter without a shape"),
        (lambda: torch.ones(3, 2, dtype=torch.int64), "torch.int64"),
    ],
)
def test_what_is_no_dense_real_weight_is_refused_by_name(weight: Any, says):
    with pytest.raises(
        NotSupportedError,
        match=rf"`net\.weight` was asked to be a target, but it is .*{says}.*!net\.weight",
    ):
        WeightVectors([weight()], [Partition.filters((3, 2))], ["net.weight"])


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
