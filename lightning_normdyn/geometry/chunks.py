"""Runs a kernel on so few entries at a time that they stay in the processor's cache between the
kernel's operations.

A kernel is several torch operations on the same entries (subtract, multiply, sum). On a whole
weight each of them would read its operands from main memory; on chunks only the first one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

Dims = list[int]
Views = Sequence[Any]
Kernel = Callable[[Dims, Views, Views], Any]
"""``kernel(dims, outs, views)`` reads views of one shape, sums over their dimensions ``dims`` and
writes what it finds to ``outs``, which are of size 1 in those."""

CACHED_ENTRIES = 2**17
"""On a CPU, this many float32 entries per thread of two weights and their difference stay in the
cores' caches while sums are taken."""
KERNEL_ENTRIES = 2**22
"""On other devices one launch per weight is fastest; only very large weights are cut, so that
temporaries stay small."""


def entries_at_once(device: torch.device) -> int:
    """How many entries of a weight a kernel should take at a time on ``device``."""
    if device.type != "cpu":
        return KERNEL_ENTRIES
    # Every thread takes its part of each operation, and has a cache of its own.
    return CACHED_ENTRIES * torch.get_num_threads()


def in_chunks(
    kernel: Kernel,
    outs: Views,
    views: Views,
    dims: Dims,
    entries: int,
    *,
    whole_rows: bool = False,
) -> None:
    """``kernel(dims, outs, views)``, applied to at most about ``entries`` entries at a time.

    Args:
        kernel: see `Kernel`. Where a row is cut it sees the row's parts one after the other.
        outs: what it writes to.
        views: what it reads: of one shape, or of size 1 in the summed dimensions, or None; one of
            full shape must come before all others.
        dims: the dimensions that it sums over.
        entries: how many at a time.
        whole_rows: never cut a row, however long.
    """
    first = next(view for view in views if view is not None)
    size = first.numel()
    cut_dim = _outermost(first.shape, first) if size > entries else -1
    if cut_dim < 0 or (whole_rows and cut_dim in dims):
        kernel(dims, outs, views)
        return

    # Along the outermost dimension alone; if one index of it is still too much, the chunks are cut
    # again along the next one.
    length = first.shape[cut_dim]
    step = max(1, entries * length // size)
    fits = size // length * step <= entries
    parts = [_parts(tensor, step, cut_dim) for tensor in (*outs, *views)]
    # Not strict: the parts of what has nothing to cut are repeated without end.
    for chunk in zip(*parts, strict=False):
        chunk_outs, chunk_views = chunk[: len(outs)], chunk[len(outs) :]
        if fits:
            kernel(dims, chunk_outs, chunk_views)
        else:
            in_chunks(kernel, chunk_outs, chunk_views, dims, entries, whole_rows=whole_rows)


def cuts_rows(
    view: Tensor,
    dims: Dims,
    entries: int,
) -> bool:
    """Whether `in_chunks` will cut this view within a row, so that its parts must be added up."""
    shape = list(view.shape)
    while prod(shape) > entries:
        dim = _outermost(shape, view)
        if dim in dims:
            return True
        shape[dim] = max(1, entries * shape[dim] // prod(shape))
    return False


def _parts(
    tensor: Any,
    step: int,
    dim: int,
) -> Any:
    if tensor is None or tensor.shape[dim] == 1:
        return repeat(tensor)
    # unsafe_split: without the bookkeeping of views that autograd needs.
    return tensor.unsafe_split(step, dim)


def _outermost(
    shape: Sequence[int],
    view: Tensor,
) -> int:
    """The dimension whose steps in memory are longest: cut along it, a chunk lies in one place."""
    return max((d for d in range(view.ndim) if shape[d] > 1), key=view.stride)
