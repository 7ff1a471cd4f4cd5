"""Makes sure that all ranks mean the same weights, and that their pieces make up the whole.

Every rank works out by itself which vectors it shares with whom. If one of them came to another
answer, a collective would add up what does not belong together, or wait for ever.
"""

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
from lightning_normdyn.geometry.reduction import (
    all_reduce,
    groups_of,
    held_everywhere,
    world_size,
)


def compare_ranks(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
    refusal: NotSupportedError | None,
) -> None:
    """Refuse on every rank what one rank refuses, and weights whose pieces, each counted once, do
    not make up the whole.

    A collective: every rank calls it, also one that has nothing to place.
    """
    # A digest: names of thousands of weights need not travel.
    mine = (
        None if refusal is None else str(refusal),
        len(names),
        sha256(_description(names, placements).encode()).hexdigest(),
    )
    # Objects and not tensors: a refusal is a sentence. Once a fit, so it may be slow.
    everybody: list[Any] = [None] * world_size()
    dist.all_gather_object(everybody, mine)
    # A refusal first: after it there are no placements, so digests differ for no other reason.
    for rank, (error, _, _) in enumerate(everybody):
        if error is not None:
            raise NotSupportedError(f"rank {rank}: {error}") from refusal
    _, first_count, first_digest = everybody[0]
    for rank, (_, count, digest) in enumerate(everybody):
        if digest != first_digest:
            raise NotSupportedError(
                f"Rank {rank} has other target weights than rank 0 ({count} against {first_count}, "
                f"or other shapes or vectors). A strategy that gives ranks different weights, such "
                f"as pipeline parallelism, is not understood. Use one in which all ranks share all."
            )
    _check_completeness(weights, partitions, names, placements)


def _description(
    names: Sequence[str],
    placements: Sequence[Placement],
) -> str:
    """What must be the same on all ranks."""
    parts = []
    # Not strict: there are no placements after a refusal.
    for name, placement in zip(names, placements, strict=False):
        sharing = placement.sharing
        is_cut = sharing is None or int(sharing.cut.sum())
        parts.append((name, placement.shape, placement.n, is_cut))
    groups = groups_of(p.sharing for p in placements if p.sharing is not None)
    return f"{parts} in {len(groups)} groups"


def _check_completeness(
    weights: Sequence[Tensor],
    partitions: Sequence[Partition],
    names: Sequence[str],
    placements: Sequence[Placement],
) -> None:
    counted, expected = [], []
    for weight, partition, placement in zip(weights, partitions, placements, strict=True):
        sharing = placement.sharing or held_everywhere(placement.n)
        # Replicas must not count twice.
        entries = placement.value(weight).numel() * sharing.first_copy
        counted.append([int(sharing.counted.sum()), entries])
        vectors = distinct(partition.labels[partition.labels >= 0])
        expected.append([len(vectors), prod(placement.shape)])
    # On the device of the weights: NCCL sends from nowhere else.
    own = torch.tensor(counted, dtype=torch.long, device=weights[0].device)
    total = all_reduce(own, None)
    for name, got, want in zip(names, total.tolist(), expected, strict=True):
        if got != want:
            raise untested(
                f"The pieces of `{name}` on all ranks make up {got} (vectors, entries) where "
                f"{want} were expected"
            )
