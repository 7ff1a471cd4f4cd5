"""Rules for the way from a DTensor to the part of it on this rank, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_normdyn.invariance.flow import Blocked, Flow, everywhere, moved
from lightning_normdyn.invariance.rows import distinct
from lightning_normdyn.invariance.rules.operation import Operation, known, only
from lightning_normdyn.invariance.rules.registry import rule_for


@rule_for("_ToTorchTensorBackward", "_FromTorchTensorBackward")
def _local_tensor(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """From a DTensor to this rank's part of it, and back. On DTensors themselves operations show
    their full shapes."""
    flow, before, after = only(operation, flows), known(operation.inputs[0]), operation.outputs[0]
    if before == after:
        return flow
    rows = operation.rows
    if (
        operation.name == "_FromTorchTensorBackward"
    ):  # the other ranks' entries come from rows that were not followed here: all go together
        together = torch.cat([flow.rows.flatten(), rows.sharded])
        operation.unite(together[:1], together)
        return replace(flow, rows=together[:1].reshape([1] * len(after)), offset=everywhere(flow))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec: Any = operation.node.dtensor_spec  # type: ignore[attr-defined]
    if any(type(placement).__name__ == "_StridedShard" for placement in spec.placements):
        raise Blocked(f"no rule for strided shards in {operation.place}")
    _, start = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    part = flow.rows
    for dim, size in enumerate(after):
        if part.size(dim) > 1 and size < before[dim]:
            part = part.narrow(dim, start[dim], size)
    if part.numel() < flow.rows.numel():
        rows.elsewhere = True
        rows.sharded = distinct(torch.cat([flow.rows.flatten(), rows.sharded]))
    return moved(flow, part, range(part.ndim))
