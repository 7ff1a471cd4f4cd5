"""How a DTensor lies on this rank: tensor parallelism, FSDP2, and both together."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.internals import TESTED
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.pieces import Piece, Placement, Shape, Sharing, distinct, itself


def _dtensor_class() -> Any:
    return import_module("torch.distributed.tensor").DTensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one."""
    return type(tensor.data) is not Tensor and isinstance(tensor, _dtensor_class())


def place_dtensor(weight: Any, partition: Partition, name: str) -> Placement:
    """How the DTensor ``weight`` lies on this rank."""
    mesh, placements, shape = weight.device_mesh, weight.placements, tuple(weight.shape)
    mine = mesh.get_coordinate()
    sharded = {m: d for m, p in enumerate(placements) if (d := _sharded_dim(p, name)) is not None}
    if mine is None:
        raise NotSupportedError(
            f"`{name}` lies on the device mesh {mesh}, which rank {dist.get_rank()} is not part "
            f"of. "
            f"Leave it out with params=[..., '!{name}']."
        )
    coordinate = _coordinates(shape, mesh, placements, sharded)
    # This rank's block: along each dimension the indices that have this rank's coordinates.
    block = []
    for d in range(len(shape)):
        inside = torch.ones(shape[d], dtype=torch.bool, device="cpu")
        for m in sharded:
            if sharded[m] == d:
                inside &= coordinate[m] == mine[m]
        block.append(inside.nonzero().flatten())
    if tuple(len(b) for b in block) != tuple(weight.to_local().shape):
        raise NotSupportedError(
            f"`{name}` with placements {placements} on {mesh} has the local shape "
            f"{tuple(weight.to_local().shape)} where "
            f"{tuple(len(b) for b in block)} was expected. This was tested with {TESTED}; here is "
            f"torch {torch.__version__}."
        )
    labels = partition.labels
    for i, k in enumerate(partition.keep):
        labels = labels.index_select(i, block[k])
    pieces = (Piece(itself, partition.keep, labels),) if all(len(b) for b in block) else ()
    return Placement(
        shape,
        partition.n,
        _to_local(placements),
        pieces,
        _dtensor_sharing(partition, mesh, sharded, coordinate, mine),
    )


def _sharded_dim(placement: Any, name: str) -> int | None:
    if placement.is_replicate():
        return None
    if type(placement).__name__ not in ("Shard", "_StridedShard"):
        raise NotSupportedError(
            f"`{name}` has the DTensor placement {placement!r}, which is not understood (Shard and "
            f"Replicate are). "
            f"Leave it out with params=[..., '!{name}']."
        )
    return int(placement.dim)


def _to_local(placements: Any) -> Callable[[Tensor], Tensor]:
    def storage(tensor: Any) -> Tensor:
        if not is_dtensor(tensor):
            return cast(Tensor, tensor)
        # Sequence parallelism leaves some gradients as partial sums; the optimizer would complete
        # them in the same way.
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        return cast(Tensor, tensor.to_local())

    return storage


def _coordinates(
    shape: Shape, mesh: Any, placements: Any, sharded: dict[int, int]
) -> dict[int, Tensor]:
    """For every mesh dimension that shards: the mesh coordinate of each index of the tensor
    dimension that it shards."""
    found: dict[int, Tensor] = {}
    for d in set(sharded.values()):
        strided = [
            m
            for m in sharded
            if sharded[m] == d and type(placements[m]).__name__ == "_StridedShard"
        ]
        plain = [m for m in sharded if sharded[m] == d and m not in strided]
        # A strided shard (FSDP2 over tensor parallelism) splits what the mesh dimensions to its
        # right have already split.
        order = [*plain, *reversed(strided)]
        table = _successive_chunks(shape[d], tuple(mesh.size(m) for m in order))
        found.update({m: table[i] for i, m in enumerate(order)})
    return found


@lru_cache(maxsize=4096)
def _successive_chunks(size: int, counts: tuple[int, ...]) -> Tensor:
    """Which chunk each of ``size`` indices falls into when they are chunked ``counts[0]``-fold,
    each chunk ``counts[1]``-fold, ..."""
    table = torch.zeros(len(counts), size, dtype=torch.long, device="cpu")
    blocks = [torch.arange(size, dtype=torch.long, device="cpu")]
    for row, count in enumerate(counts):
        chunked = []
        for block in blocks:
            for i, part in enumerate(block.chunk(count)):
                table[row, part] = i
                chunked.append(part)
        blocks = chunked
    return table


def _dtensor_sharing(
    partition: Partition,
    mesh: Any,
    sharded: dict[int, int],
    coordinate: dict[int, Tensor],
    mine: Any,
) -> Sharing | None:
    sharded = {m: d for m, d in sharded.items() if mesh.size(m) > 1}
    if not sharded:
        return None
    keep, labels, n = partition.keep, partition.labels, partition.n
    position = torch.arange(labels.numel(), dtype=torch.long, device="cpu")[labels.flatten() >= 0]
    vector = labels.flatten()[position]
    index = dict(zip(keep, torch.unravel_index(position, labels.shape), strict=True))

    # at[m]: the coordinate along mesh dimension m of each position in the kept dimensions, if m
    # shards one of those.
    at = {m: coordinate[m][index[d]] for m, d in sharded.items() if d in keep}
    chunks = {
        m: int(coordinate[m].max()) + 1 if len(coordinate[m]) else 0 for m in sharded
    }  # not empty
    cut_by = {
        m: _extremes_differ(at[m], vector, n)
        if m in at
        else torch.full((n,), chunks[m] > 1, dtype=torch.bool, device="cpu")
        for m in sharded
    }
    cut = torch.stack(list(cut_by.values())).any(0)
    cutting = [m for m in sharded if bool(cut_by[m].any())]
    group = mesh.get_group(cutting[0]) if len(cutting) == 1 else None

    # Outside of the cutting dimensions the ranks of the group have this rank's coordinates.
    reachable = torch.ones_like(vector, dtype=torch.bool)
    for m in sharded:
        if m not in cutting:
            reachable &= (
                at[m] == mine[m]
                if m in at
                else torch.tensor(mine[m] == 0, dtype=torch.bool, device="cpu")
            )
    present = (
        torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, vector[reachable], True) & cut
    )

    # The holder of a vector's first entry speaks for it.
    first = torch.full((n,), labels.numel(), dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, position, "amin"
    )
    some = torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, vector, True)
    at_first = dict(
        zip(
            keep,
            torch.unravel_index(first.clamp(max=max(labels.numel() - 1, 0)), labels.shape),
            strict=True,
        )
    )
    speaks = some.clone()
    for m, d in sharded.items():
        speaks &= (
            coordinate[m][at_first[d]] == mine[m]
            if d in keep
            else torch.tensor(mine[m] == 0, dtype=torch.bool, device="cpu")
        )
    first_copy = bool((mesh.mesh == 0).any()) and all(
        mine[m] == 0 for m in range(mesh.ndim) if m not in sharded
    )

    # Everywhere: along the kept dimensions each combination of coordinates holds all vectors, along
    # the others no chunk is empty.
    owner, owners = torch.zeros_like(vector), 1
    for m in at:
        owner, owners = owner * mesh.size(m) + at[m], owners * mesh.size(m)
    combinations = distinct(vector * owners + owner).numel()
    everywhere = combinations == int(some.sum()) * owners and all(
        m in at or chunks[m] == mesh.size(m) for m in sharded
    )
    return Sharing(
        cut, cut if group is None else present, speaks & first_copy, first_copy, everywhere, group
    )


def _extremes_differ(values: Tensor, vector: Tensor, n: int) -> Tensor:
    """Whether the ``values`` of a vector's positions are not all the same: bool ``(n,)``."""
    low = torch.zeros(n, dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, values, "amin", include_self=False
    )
    high = torch.zeros(n, dtype=torch.long, device="cpu").scatter_reduce(
        0, vector, values, "amax", include_self=False
    )
    return low != high
