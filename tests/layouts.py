"""Weights of every layout in memory that GPU programs must take: those of `kinds`, and rows of all
lengths, steps and orders."""

from __future__ import annotations

import torch
from kinds import KINDS, randn
from torch import Tensor

from lightning_normdyn import Partition


def _by(dims: tuple[int, ...], labels: list[int] | Tensor) -> Partition:
    return Partition(dims, torch.as_tensor(labels), "group")


def _filters(*shape: int, **options: int) -> tuple[Tensor, Partition]:
    return randn(*shape), Partition.filters(shape, **options)


# One for each kind of tile: short rows, long rows, columns, aligned rows.
TILES: dict[str, tuple[Tensor, Partition]] = {
    "packed qkv": KINDS["packed qkv"],
    "rows of 129": _filters(5, 129),
    "65 columns": _filters(33, 65, axis=1),
    "rows of 136": _filters(5, 136),
}

# Just large enough that rows are cut into parts, a program has more rows than a tile, and a vector
# more slots than one: an interpreter takes a millisecond for each tile.
LAYOUTS: dict[str, tuple[Tensor, Partition]] = {
    **KINDS,
    **TILES,
    "rows of 1": _filters(3, 1),
    "rows of 127": _filters(5, 127),
    "rows of 128": _filters(5, 128),
    "rows of 8500": _filters(2, 8500),
    "one row of 4097": _filters(1, 4097),
    "5 rows of 4400": _filters(5, 4400),
    "one row of 21000": _filters(1, 21000),
    "layer of 9000": (randn(9, 1000), Partition.layer((9, 1000))),
    "columns of 700": _filters(700, 34, axis=1),
    "transposed 18 x 33": _filters(18, 33, 5, 6, transposed_groups=1),
    "transposed channels_last": (
        randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
        Partition.filters((8, 6, 3, 3), transposed_groups=1),
    ),
    "depthwise transposed": _filters(6, 1, 3, 3, transposed_groups=6),
    "interleaved labels": (
        randn(12, 6),
        _by((0,), [0, -1, 1, 2, -1, 2, 1, 0, 0, -1, 1, 2]),
    ),
    "labels over two dims": (
        randn(4, 3, 5),
        _by((0, 1), [[0, 1, 2], [2, -1, 0], [1, 1, 0], [2, 0, -1]]),
    ),
    "labels over dims 0 and 2": (randn(4, 3, 5, 2), _by((0, 2), torch.arange(20).view(4, 5) % 7)),
    "five dims": (randn(2, 3, 2, 3, 2), _by((1, 3), torch.arange(9).view(3, 3))),
    "more dims than a record has": (
        randn(2, 2, 3, 3, 2).permute(4, 3, 2, 1, 0),
        _by((1, 3), torch.arange(6).view(3, 2)),
    ),
    "sliced storage": (randn(8, 10)[::2, 1:8], Partition.filters((4, 7))),
    "no vector": (randn(4, 3), _by((0,), [-1] * 4)),
}


def in_memory(weight: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """A copy that lies in memory like ``weight``, gaps included, ``offset`` entries later."""
    entries = weight.untyped_storage().nbytes() // weight.element_size()
    memory = torch.zeros(entries + offset, dtype=dtype)
    start = weight.storage_offset() + offset
    return memory.as_strided(weight.shape, weight.stride(), start).copy_(weight)
