"""Rules for the normalizations that are one operation.

Normalizations that are written by hand need none: a mean, a root and a quotient together have
degree 0.
"""

from dataclasses import replace

from torch import Tensor, nn

from lightning_normdyn.invariance.flow import Flow, Flows, Offset, Sign, along, expanded
from lightning_normdyn.invariance.rules.operation import (
    Operation,
    declared_epsilon,
    present,
    rule_for,
    unary_rule,
)
from lightning_normdyn.invariance.verdict import NormLink


@unary_rule("""
    NativeBatchNormBackward0 NativeBatchNormLegitBackward0 BatchNormWithUpdateBackward0
    CudnnBatchNormBackward0 MiopenBatchNormBackward0 SyncBatchNormBackward
""")
def _batch_norm(operation: Operation, flow: Flow) -> Flow:
    """Each channel is normalized by itself, over samples and places."""
    if not operation.attribute("training", True):
        return _fixed_batch_norm(operation, flow)
    # Each channel by itself: an offset per channel, as a bias is, is removed with the mean.
    result = operation.normalized(flow, [0, *range(2, flow.ndim)])
    _check_epsilon(operation)

    rows = expanded(result.rows, operation.shape(), [1]).flatten()
    _, module = operation.module
    statistics = getattr(module, "running_mean", None)
    if isinstance(statistics, Tensor):
        _link(operation, flow, rows.reshape(-1, statistics.numel()))
    elif not isinstance(module, nn.modules.batchnorm._NormBase):
        # torch's own hold their running statistics there or have none. Others may hold them
        # anywhere.
        readable, running = operation.saved_tensor("running_mean")
        if running is not None or not readable:
            operation.rows.stale.setdefault(operation.place)
    return result


def _fixed_batch_norm(operation: Operation, flow: Flow) -> Flow:
    """Frozen, or in eval mode: an affine map."""
    fixed = f"the fixed mean of {operation.module[0] or operation.name}"
    # (x - fixed mean) scales as x does, but around another point.
    offset = Offset(along([1], flow.ndim), object(), what=fixed)
    if flow.offset:
        offset = offset.widened(flow.offset.varies)
    return replace(flow, offset=offset, sign=Sign.ANY)


def _link(
    operation: Operation,
    flow: Flow,
    rows: Tensor,
) -> None:
    """Remember whose running statistics follow a rescale of which ``rows``: ``(samples,
    channels)``, since InstanceNorm folds the batch into the channels."""
    name, _ = operation.module
    # One channel of the statistics is fed by different rows in different samples: no factor is
    # right.
    if bool((rows != rows[:1]).any()):
        operation.rows.stale.setdefault(name)
        return
    bias = None
    if flow.offset:
        bias = flow.offset.parameter
    has_offset = flow.offset is not None
    operation.rows.link(NormLink(name, rows[0], flow.degree, has_offset, bias))


def _check_epsilon(operation: Operation) -> None:
    """Nodes save their epsilon or modules declare it; else it is not known, and taken as small."""
    epsilon = operation.attribute("eps")
    if not isinstance(epsilon, float):
        epsilon = declared_epsilon(operation.module[1], 0.0)
    operation.assume_small(epsilon)


# Those of a "Function" are of Liger kernels and of apex.
@unary_rule("""
    NativeLayerNormBackward0 FusedRmsNormBackward0 LigerLayerNormFunctionBackward
    LigerRMSNormFunctionBackward FusedLayerNormFunctionBackward FusedLayerNormAffineFunctionBackward
    FusedRMSNormFunctionBackward FusedRMSNormAffineFunctionBackward
""")
def _layer_norm(operation: Operation, flow: Flow) -> Flow:
    """The last dimensions are normalized together."""
    # Functions written in python keep it as an attribute, or normalize the last dimension only.
    in_python = getattr(operation.node, "normalized_shape", None)
    shape = operation.attribute("normalized_shape") or in_python or (0,)
    _check_epsilon(operation)
    removes_mean = "rms" not in operation.name.lower()
    return operation.normalized(flow, range(-len(shape), 0), centered=removes_mean)


@unary_rule("NativeGroupNormBackward0")
def _group_norm(operation: Operation, flow: Flow) -> Flow:
    """The channels of a group are normalized together."""
    shape = operation.shape()
    groups = operation.attribute("group")
    _check_epsilon(operation)
    offset = flow.offset
    if offset and (groups != shape[1] or any(offset.varies[2:])):
        # The mean of a group removes only what is the same for all its channels and places.
        varying = replace(offset, varies=along([1], len(shape)))
        operation.normalized(replace(flow, offset=varying), [1])
    rows = operation.same_factor(flow.rows, range(2, len(shape)))
    rows = expanded(rows, shape, [1])
    rows = rows.reshape(rows.size(0), groups, -1)
    rows = operation.same_factor(rows, [2])
    # Nothing scales from here on, so the places of the rows do not matter any more.
    return Flow(0, rows)


@rule_for("WeightNormInterfaceBackward0")
def _weight_norm(operation: Operation, flows: Flows) -> Flow:
    """``gain * direction / ||direction||``: the gain scales the result, the direction does not."""
    if not flows[0]:
        return present(flows)[1]
    # The norm is taken over all dimensions but this.
    rows = operation.only(flows).rows
    dims = list(range(rows.ndim))
    del dims[operation.attribute("dim")]
    return Flow(0, operation.same_factor(rows, dims))
