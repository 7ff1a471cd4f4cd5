"""How a DTensor lies on this rank: tensor parallelism, FSDP2, and one over the other.

A device mesh arranges the ranks in a grid; a rank's place in it is a coordinate along each mesh
dimension. A mesh dimension either shards one dimension of the tensor, so that each coordinate holds
a chunk of its indices, or replicates.

Letters: m a dimension of the mesh, d a dimension of the tensor.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError

from .partition import Partition, indices
from .pieces import Piece, Placement, Shape, Sharing, distinct, itself, untested


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; torch's module for it is imported only if it may be."""
    if type(tensor.data) is Tensor:
        return False
    return isinstance(tensor, import_module("torch.distributed.tensor").DTensor)


def place_dtensor(
    weight: Any,
    partition: Partition,
    name: str,
) -> Placement:
    """How the DTensor ``weight`` lies on this rank.

    Raises:
        NotSupportedError: for a rank outside the mesh, and for a placement other than Shard and
            Replicate.
    """
    mesh, placements, shape = weight.device_mesh, weight.placements, tuple(weight.shape)
    my_coordinate = mesh.get_coordinate()
    if my_coordinate is None:
        raise NotSupportedError(
            f"`{name}` lies on the device mesh {mesh}, which rank {dist.get_rank()} is not part "
            f"of. Leave it out with params=[..., '!{name}']."
        )
    sharded = {}
    for m, placement in enumerate(placements):
        dim = _sharded_dim(placement, name)
        if dim is not None:
            sharded[m] = dim
    coordinates = _coordinates(shape, mesh, placements, sharded)

    # This rank's block: along each dimension the indices that have this rank's coordinates.
    block = []
    for d, size in enumerate(shape):
        cutting = [m for m in sharded if sharded[m] == d]
        here = _here(coordinates, cutting, my_coordinate, indices(size))
        block.append(here.nonzero().flatten())
    # Compared with what is there: coordinates rest on how torch cuts, which a version may change.
    block_shape = tuple(map(len, block))
    local_shape = tuple(weight.to_local().shape)
    if block_shape != local_shape:
        raise untested(
            f"`{name}` with placements {placements} on {mesh} has the local shape {local_shape} "
            f"where {block_shape} was expected"
        )

    labels = partition.labels
    for axis, d in enumerate(partition.keep):
        labels = labels.index_select(axis, block[d])
    pieces = (Piece(itself, partition.keep, labels),) if all(block_shape) else ()
    sharing = _sharing(partition, mesh, sharded, coordinates, my_coordinate)
    return Placement(shape, partition.n, _to_local(placements), pieces, sharing)


def _sharded_dim(
    placement: Any,
    name: str,
) -> int | None:
    if placement.is_replicate():
        return None
    if type(placement).__name__ not in ("Shard", "_StridedShard"):
        raise NotSupportedError(
            f"`{name}` has the DTensor placement {placement!r}, which is not understood (Shard and "
            f"Replicate are). Leave it out with params=[..., '!{name}']."
        )
    return int(placement.dim)


def _to_local(placements: Any) -> Callable[[Tensor], Tensor]:
    def storage(tensor: Any) -> Any:
        if not is_dtensor(tensor):
            return tensor
        # Sequence parallelism leaves some gradients as partial sums; the optimizer would complete
        # them in the same way.
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()

    return storage


def _coordinates(
    shape: Shape,
    mesh: Any,
    placements: Any,
    sharded: dict[int, int],
) -> dict[int, Tensor]:
    """For every mesh dimension that shards: the coordinate at which each index of its tensor
    dimension lies."""
    coordinates: dict[int, Tensor] = {}
    for d in set(sharded.values()):
        # Plain shards from left to right, then strided ones from right to left: a strided shard
        # (FSDP2 over tensor parallelism) splits what the mesh dimensions to its right have already
        # split.
        order: list[int] = []
        plain = 0
        for m in sharded:
            if sharded[m] != d:
                continue
            order.insert(plain, m)
            plain += type(placements[m]).__name__ != "_StridedShard"
        chunks = _successive_chunks(shape[d], tuple(mesh.size(m) for m in order))
        coordinates.update(zip(order, chunks, strict=True))
    return coordinates


@lru_cache(maxsize=4096)
def _successive_chunks(
    size: int,
    counts: tuple[int, ...],
) -> Tensor:
    """Which chunk each of ``size`` indices falls into when they are chunked ``counts[0]``-fold,
    each chunk ``counts[1]``-fold, ...: int64 ``(len(counts), size)``."""
    # By torch.chunk itself, so that uneven sizes are cut as torch cuts them.
    blocks = [indices(size)]
    table = blocks[0].new_zeros(len(counts), size)
    for row, count in enumerate(counts):
        chunked = []
        for block in blocks:
            # As DTensor does: fewer than `count` chunks if the indices do not suffice.
            for i, part in enumerate(block.chunk(count)):
                table[row, part] = i
                chunked.append(part)
        blocks = chunked
    return table


def _sharing(
    partition: Partition,
    mesh: Any,
    sharded: dict[int, int],
    coordinates: dict[int, Tensor],
    my_coordinate: Any,
) -> Sharing | None:
    sharded = {m: d for m, d in sharded.items() if mesh.size(m) > 1}
    if not sharded:
        return None

    # A slot is a combination of indices of the kept dimensions; all its entries are of one vector.
    n, labels = partition.n, partition.labels.flatten()
    slots = (labels >= 0).nonzero().flatten()
    vector = labels[slots]
    index = torch.unravel_index(slots, partition.labels.shape)

    at = {}  # the coordinate of the first entry of each slot
    cut_by = {}  # the vectors that lie at several coordinates
    all_chunks_used = True
    for m, d in sharded.items():
        if d in partition.keep:
            at[m] = coordinates[m][index[partition.keep.index(d)]]
            cut_by[m] = _differs_within(vector, at[m], n)
        else:
            # The entries of a slot lie at all coordinates, its first one at coordinate 0.
            at[m] = torch.zeros_like(vector)
            chunks = len(distinct(coordinates[m]))
            cut_by[m] = vector.new_full((n,), chunks > 1, dtype=torch.bool)
            all_chunks_used &= chunks == mesh.size(m)
    cut = torch.stack(list(cut_by.values())).any(0)
    cutting = [m for m in sharded if cut_by[m].any()]

    # Ranks in a group along the only cutting dimension have the same other coordinates, and so hold
    # the same vectors.
    present, group = cut, None
    if len(cutting) == 1:
        group = mesh.get_group(cutting[0])
        others = [m for m in sharded if m not in cutting]
        present = cut & _marked(vector[_here(at, others, my_coordinate, vector)], n)

    # The holder of a vector's first entry speaks for it; of its replicas the first.
    order = indices(len(vector))
    first = vector.new_full((n,), len(vector)).scatter_reduce(0, vector, order, "amin")
    is_first = first[vector] == order
    speaks = _marked(vector[is_first & _here(at, sharded, my_coordinate, vector)], n)
    replicating = [m for m in range(mesh.ndim) if m not in sharded]
    first_copy = bool((mesh.mesh == 0).any()) and not any(my_coordinate[m] for m in replicating)

    # Everywhere: along the kept dimensions every combination of coordinates holds every vector,
    # along the others no chunk is empty.
    owner, owners = torch.zeros_like(vector), 1
    for m, d in sharded.items():
        if d in partition.keep:
            owner = owner * mesh.size(m) + at[m]
            owners *= mesh.size(m)
    held_in_all = len(distinct(vector * owners + owner)) == len(distinct(vector)) * owners
    return Sharing(
        cut=cut,
        present=present,
        counted=speaks & first_copy,
        first_copy=first_copy,
        everywhere=held_in_all and all_chunks_used,
        group=group,
    )


def _here(
    at: dict[int, Tensor],
    mesh_dims: Any,
    my_coordinate: Any,
    like: Tensor,
) -> Tensor:
    """Which indices or slots lie at this rank's coordinate along some mesh dimensions: bool, like
    ``like``."""
    here = torch.ones_like(like, dtype=torch.bool)
    for m in mesh_dims:
        here &= at[m] == my_coordinate[m]
    return here


def _marked(
    vectors: Tensor,
    n: int,
) -> Tensor:
    """Which of ``n`` vectors are among ``vectors``: bool ``(n,)``."""
    return torch.zeros(n, dtype=torch.bool, device="cpu").index_fill_(0, vectors, True)


def _differs_within(
    vector: Tensor,
    values: Tensor,
    n: int,
) -> Tensor:
    """Whether the ``values`` of a vector's slots are not all the same: bool ``(n,)``."""
    zeros = vector.new_zeros(n)
    lowest = zeros.scatter_reduce(0, vector, values, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, vector, values, "amax", include_self=False)
    return lowest != highest
