"""Rules for the way from a DTensor to the part of it on this rank, and back.

On DTensors themselves operations show their full shapes, so that all other rules hold for them as
they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lightning_normdyn.invariance.flow import Blocked, Flow, everywhere, moved
from lightning_normdyn.invariance.rows import distinct
from lightning_normdyn.invariance.rules.operation import Operation
from lightning_normdyn.invariance.rules.registry import unary_rule


@unary_rule("_ToTorchTensorBackward")
def _to_local(operation: Operation, flow: Flow) -> Flow:
    """From a DTensor to this rank's part of it."""
    before = operation.shape()
    after = operation.out
    if before == after:
        return flow
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec: Any = operation.node.dtensor_spec  # type: ignore[attr-defined]
    # Sharded along one dimension by two meshes: the part is not one stretch of it.
    if any(type(placement).__name__ == "_StridedShard" for placement in spec.placements):
        raise Blocked(f"no rule for strided shards in {operation.place}")
    _, start = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    # A dimension of one row for all is not cut: the row holds for every part.
    part = flow.rows
    for dim, size in enumerate(after):
        if part.size(dim) > 1 and size < before[dim]:
            part = part.narrow(dim, start[dim], size)
    if part.numel() < flow.rows.numel():
        # The other ranks follow the rest of the rows, and are asked at the end.
        rows = operation.rows
        rows.elsewhere = True
        known = torch.cat([flow.rows.flatten(), rows.sharded])
        rows.sharded = distinct(known)
    return moved(flow, part, range(part.ndim))


@unary_rule("_FromTorchTensorBackward")
def _from_local(operation: Operation, flow: Flow) -> Flow:
    """From this rank's part to the DTensor."""
    after = operation.out
    if operation.shape() == after:
        return flow
    # The other ranks' entries come from rows that were not followed here: all go together.
    sharded = operation.rows.sharded
    together = torch.cat([flow.rows.flatten(), sharded])
    one = together[:1]
    operation.unite(one, together)
    rows = one.reshape([1] * len(after))
    return replace(flow, rows=rows, offset=everywhere(flow))
