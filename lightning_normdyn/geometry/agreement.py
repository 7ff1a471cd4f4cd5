"""Makes sure that all ranks mean the same weights, and that their pieces make up the whole."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.internals import untested
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.pieces import Placement, distinct
from lightning_normdyn.geometry.reduction import all_reduce, groups_of, held_everywhere, world_size


def compare_ranks(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
    refusal: NotSupportedError | None,
) -> None:
    """Refuse on every rank what one rank refuses, and weights whose pieces, each counted once, do
    not make up the whole."""
    described = repr(
        [
            (name, p.shape, p.n, p.sharing is None or int(p.sharing.cut.sum()))
            for name, p in zip(names, placements, strict=False)
        ]
    )
    described += f" in {len(groups_of(p.sharing for p in placements if p.sharing))} groups"
    mine = (
        None if refusal is None else str(refusal),
        len(names),
        sha256(described.encode()).hexdigest(),
    )
    everybody: list[Any] = [None] * world_size()
    dist.all_gather_object(everybody, mine)
    for rank, (error, _, _) in enumerate(everybody):
        if error is not None:
            raise NotSupportedError(f"rank {rank}: {error}") from refusal
    for rank, (_, count, digest) in enumerate(everybody):
        if digest != everybody[0][2]:
            raise NotSupportedError(
                f"Rank {rank} has other target weights than rank 0 ({count} against "
                f"{everybody[0][1]}, or other shapes or vectors). "
                "A strategy that gives ranks different weights, such as pipeline parallelism, is "
                "not understood. "
                "Use one in which all ranks share all."
            )
    found, expected = [], []
    for weight, partition, placement in zip(weights, partitions, placements, strict=True):
        sharing = placement.sharing or held_everywhere(placement.n)
        entries = placement.value(weight).numel() if sharing.first_copy else 0
        found.append([int(sharing.counted.sum()), entries])
        expected.append(
            [distinct(partition.labels[partition.labels >= 0]).numel(), prod(placement.shape)]
        )
    total = all_reduce(
        torch.tensor(found, dtype=torch.long, device=weights[0].device if weights else "cpu"), None
    ).tolist()
    for name, got, want in zip(names, total, expected, strict=True):
        if got != want:
            raise untested(
                f"The pieces of `{name}` on all ranks make up {got} (vectors, entries) where "
                f"{want} were expected"
            )
