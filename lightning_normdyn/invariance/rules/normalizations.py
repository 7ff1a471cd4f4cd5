"""Rules for the normalizations that are one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_normdyn.invariance.flow import Flow, Sign, either, expanded, new_offset
from lightning_normdyn.invariance.rows import Link
from lightning_normdyn.invariance.rules.operation import Operation, declared_epsilon, known, only
from lightning_normdyn.invariance.rules.registry import rule_for


@rule_for(
    "NativeBatchNormBackward0", "NativeBatchNormLegitBackward0", "BatchNormWithUpdateBackward0", "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0", "SyncBatchNormBackward",
)  # fmt: skip
def _batch_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, channels = only(operation, flows), known(operation.inputs[0])[1]
    ndim = flow.rows.ndim
    if not operation.attribute("training", True):  # frozen, or in eval mode: an affine map
        offset = new_offset(
            (d == 1 for d in range(ndim)),
            what=f"the fixed mean of {operation.module[0] or operation.name}",
        )
        return replace(
            flow,
            offset=offset
            if flow.offset is None
            else offset.changed(either(offset.varies, flow.offset.varies)),
            sign=Sign.ANY,
        )
    result = operation.normalized(flow, [d for d in range(ndim) if d != 1])
    _check_epsilon(operation)
    rows = result.rows.expand(1, channels, *result.rows.shape[2:]).reshape(-1)
    name, module = operation.module
    statistics = getattr(module, "running_mean", None)
    if isinstance(statistics, Tensor):
        per_sample = rows.reshape(
            -1, statistics.numel()
        )  # InstanceNorm folds the batch into the channels
        if bool((per_sample == per_sample[:1]).all()):
            bias = flow.offset.parameter if flow.offset is not None else None
            operation.rows.link(
                Link(name, per_sample[0], flow.degree, flow.offset is not None, bias)
            )
        else:
            operation.rows.stale.setdefault(name)
    elif not isinstance(
        module, nn.modules.batchnorm._NormBase
    ):  # torch's own hold them there or have none
        readable, running = operation.saved_tensor("running_mean")
        if running is not None or not readable:
            operation.rows.stale.setdefault(operation.place)
    return result


def _check_epsilon(operation: Operation) -> None:
    """An epsilon that is not small marks the claim. Nodes save it or modules declare it; else it is
    not known."""
    eps = operation.attribute("eps")
    declared = eps if isinstance(eps, float) else declared_epsilon(operation.module[1])
    small = declared is None or declared <= 1e-3
    if not small:
        operation.rows.assumed = True


@rule_for(
    "NativeLayerNormBackward0", "FusedRmsNormBackward0", "LigerLayerNormFunctionBackward",
    "LigerRMSNormFunctionBackward",
    "FusedLayerNormFunctionBackward", "FusedLayerNormAffineFunctionBackward", "FusedRMSNormFunctionBackward",
    "FusedRMSNormAffineFunctionBackward",
)  # fmt: skip
def _layer_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    normalized_shape = (
        operation.attribute("normalized_shape")
        or getattr(operation.node, "normalized_shape", None)
        or (0,)
    )
    _check_epsilon(operation)
    return operation.normalized(
        flow, range(-len(normalized_shape), 0), centered="rms" not in operation.name.lower()
    )


@rule_for("NativeGroupNormBackward0")
def _group_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, groups = only(operation, flows), operation.attribute("group")
    shape = known(operation.inputs[0])
    _check_epsilon(operation)
    if flow.offset is not None and (groups != shape[1] or any(flow.offset.varies[2:])):
        operation.normalized(
            replace(
                flow,
                offset=replace(flow.offset, varies=(False, True) + (False,) * (len(shape) - 2)),
            ),
            [1],
        )
    rows = operation.same_factor(flow.rows, range(2, len(shape)))
    rows = expanded(rows, shape, [1]).reshape(rows.size(0), groups, -1)
    return Flow(
        0, operation.same_factor(rows, [2]).reshape(rows.size(0), groups, *[1] * (len(shape) - 2))
    )


@rule_for("WeightNormInterfaceBackward0")
def _weight_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    direction, gain = flows
    if direction is None:
        assert gain is not None
        return gain
    dim = operation.attribute("dim") % direction.rows.ndim
    return Flow(
        0,
        operation.same_factor(
            only(operation, flows).rows, [d for d in range(direction.rows.ndim) if d != dim]
        ),
    )
