"""Weights whose pieces lie on several ranks, and a comparison of every sum, write and total with
the same weights whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry import formulas


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


def as_they_are(*sums: Tensor) -> tuple[Tensor, ...]:
    return sums


def summary_of_sums(first: Tensor, second: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return tuple(summary(torch.stack([first, second]), length))


def without_length(first: Tensor, second: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    return first, second


def worked_out(vectors: WeightVectors, before: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Sums as formulas get them, and what comes with totals: ``(..., n)`` all, and the totals."""
    moved = formulas.work_out(vectors, as_they_are, formulas.displacement(vectors, before))
    sums = formulas.radial(vectors, before)
    taken, totals = formulas.take_with_totals(vectors, sums, summary_of_sums)
    radial = formulas.work_out(vectors, as_they_are, taken)
    _, added = formulas.take_with_totals(vectors, sums, without_length, linear=True)
    return torch.stack([*moved, *radial]), torch.cat([totals, added])


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
        sums, totals = count("formulas", lambda: worked_out(ours, before))
        sums_of_whole, totals_of_whole = worked_out(theirs, whole(names))
        close(ours.gather(sums), theirs.gather(sums_of_whole))
        close([totals], [totals_of_whole])
        ours.add_scaled_(-0.5 * ours.scatter(factors), before)
        theirs.add_scaled_(-0.5 * theirs.scatter(factors), whole(names))
        close(reassemble(), full)
    # One for each of the three kinds of sums.
    of_formulas = collectives["inner"] + 2 * collectives["inner_and_totals"]
    assert counted == {"scale_": 0, "formulas": of_formulas, **collectives}


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])


class Weights(nn.Module):
    """The weights of CASES as an FSDP unit that adds them all up."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in weights])

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(w.square().sum() for w in self.weights)
