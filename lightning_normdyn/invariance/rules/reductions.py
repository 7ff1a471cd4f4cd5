"""Rules for sums, means, norms, extrema and pooling, and for the normalizations that are one
operation.

Normalizations that are written by hand need no rule: a mean, a root and a quotient together have
degree 0.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_normdyn.invariance.flow import (
    Flow,
    Flows,
    Offset,
    Sign,
    along,
    expanded,
    spread,
    without_dims,
)
from lightning_normdyn.invariance.verdict import NormLink

from .operation import Operation, declared_epsilon, present, rule_for, unary_rule


def _reduction_dims(operation: Operation) -> list[int]:
    ndim = len(operation.shape())
    dims = operation.attribute("dim")
    if dims in (None, []):
        dims = range(ndim)
    elif isinstance(dims, int):
        dims = [dims]
    # A tensor without dimensions may still be reduced along "dimension 0".
    return [dim % ndim for dim in dims if ndim]


def _reduced(
    operation: Operation,
    flow: Flow,
    dims: Sequence[int],
    *,
    degree: float = 1,
    offset: Offset | None = None,
    sign: Sign = Sign.ANY,
) -> Flow:
    """The flow of an output in which entries have come together along ``dims``."""
    rows = operation.same_factor(flow.rows, dims)
    # Without ``keepdim``.
    if len(operation.out) != rows.ndim:
        rows = rows.squeeze(tuple(dims))
        offset = without_dims(offset, dims)
    return Flow(flow.degree * degree, rows, offset, sign)


def _sign_of_reduction(flow: Flow) -> Sign:
    """Sums and means of what is not negative are statistics."""
    if flow.sign == Sign.ANY:
        return Sign.ANY
    return Sign.STATISTIC


@unary_rule("SumBackward0 SumBackward1 MeanBackward0 MeanBackward1")
def _sum(operation: Operation, flow: Flow) -> Flow:
    """Entries that are added must scale alike."""
    dims = _reduction_dims(operation)
    offset = flow.offset
    if offset:
        # The mean of what is constant is the same constant.
        is_mean = operation.name.startswith("Mean")
        if not is_mean or offset.differs_along(dims):
            varies = [v and d not in dims for d, v in enumerate(offset.varies)]
            offset = offset.changed(varies)
    return _reduced(operation, flow, dims, offset=offset, sign=_sign_of_reduction(flow))


@unary_rule("""
    MaxBackward0 MaxBackward1 MinBackward0 MinBackward1 AmaxBackward0 AminBackward0 MedianBackward0
""")
def _extremum(operation: Operation, flow: Flow) -> Flow:
    """Which entry is the largest stays so only if all of them share a factor."""
    operation.pure(flow)
    dims = _reduction_dims(operation)
    return _reduced(operation, flow, dims, sign=_sign_of_reduction(flow))


@unary_rule("LinalgVectorNormBackward0 NormBackward0 NormBackward1 NormBackward2 NormBackward3")
def _norm(operation: Operation, flow: Flow) -> Flow:
    """The size of several entries, which must share a factor."""
    operation.pure(flow)
    # Every norm is homogeneous of degree 1, but for that of order 0: the number of entries that are
    # not zero does not depend on the scale.
    degree = 0 if operation.attribute("ord") == 0 else 1
    dims = _reduction_dims(operation)
    return _reduced(operation, flow, dims, degree=degree, sign=Sign.STATISTIC)


@unary_rule("StdBackward0 VarBackward0 VarMeanBackward0 StdMeanBackward0")
def _spread(operation: Operation, flow: Flow) -> Flows:
    """Variance or standard deviation, and the mean beside it where it is asked for."""
    dims = _reduction_dims(operation)
    # Free of an offset that is constant along ``dims``.
    if flow.offset and flow.offset.differs_along(dims):
        operation.pure(flow)
    mean = _reduced(operation, flow, dims, offset=flow.offset)
    degree = 2 if operation.name.startswith("Var") else 1
    moment = _reduced(operation, flow, dims, degree=degree, sign=Sign.STATISTIC)
    return [moment, mean]


@unary_rule("CumsumBackward0")
def _cumulative_sum(operation: Operation, flow: Flow) -> Flow:
    """Every entry becomes the sum of those before it."""
    # An offset is added once more at each entry, so that afterwards it differs everywhere.
    rows = operation.same_factor(flow.rows, [operation.attribute("dim")])
    return Flow(flow.degree, rows, flow.offset_everywhere())


@unary_rule("""
    TopkBackward0 SortBackward0 CummaxBackward0 CumminBackward0 MedianBackward1 KthvalueBackward0
""")
def _ordered(operation: Operation, flow: Flow) -> Flow:
    """Entries are picked or ordered by size along one dimension."""
    # Which entry comes first depends on the scales, unless they are one.
    dim = operation.attribute("dim")
    rows = operation.same_factor(flow.rows, [dim])
    if len(operation.out) < rows.ndim:
        rows = rows.squeeze(dim)
    return Flow(operation.pure(flow).degree, rows)


# ------------------------------------------------------------------------------------------ pooling


@unary_rule("""
    UpsampleNearest1DBackward0 UpsampleNearestExact1DBackward0 UpsampleLinear1DBackward0
    ReflectionPad1DBackward0 ReplicationPad1DBackward0 AvgPool2DBackward0 AdaptiveAvgPool2DBackward0
    MkldnnAdaptiveAvgPool2DBackward0 MaxPool2DBackward0 MaxPool2DWithIndicesBackward0
    MkldnnMaxPool2DBackward0 AdaptiveMaxPool2DBackward0 FractionalMaxPool2DBackward0
    MaxUnpool2DBackward0 UpsampleNearest2DBackward0 UpsampleNearestExact2DBackward0
    UpsampleBilinear2DBackward0 UpsampleBilinear2DAaBackward0 UpsampleBicubic2DBackward0
    UpsampleBicubic2DAaBackward0 ReflectionPad2DBackward0 ReplicationPad2DBackward0
    GridSampler2DBackward0 AvgPool3DBackward0 AdaptiveAvgPool3DBackward0
    MaxPool3DWithIndicesBackward0 MkldnnMaxPool3DBackward0 AdaptiveMaxPool3DBackward0
    FractionalMaxPool3DBackward0 MaxUnpool3DBackward0 UpsampleNearest3DBackward0
    UpsampleNearestExact3DBackward0 UpsampleTrilinear3DBackward0 ReflectionPad3DBackward0
    ReplicationPad3DBackward0 GridSampler3DBackward0
""")
def _pool(operation: Operation, flow: Flow) -> Flow:
    """Pooling, resampling and padding by repetition: neighbours are averaged or the largest is
    taken, channel by channel."""
    # Neighbours lie along as many of the last dimensions as the name says.
    (count,) = re.findall(r"(\d)D", operation.name)
    dims = range(-int(count), 0)
    offset = flow.offset
    if offset:
        # The largest of x + b is the largest x plus b only if b is the same for all of them.
        if offset.differs_along(dims):
            operation.pure(flow)
        if _pools_zeros(operation):
            offset = spread(offset, dims)
    # The mean of squares of a whole channel is a statistic; a local one (LocalResponseNorm) has a
    # constant beside it that is no epsilon.
    sign = Sign.ANY
    if operation.name.startswith("AdaptiveAvg"):
        sign = _sign_of_reduction(flow)
    rows = operation.same_factor(flow.rows, dims)
    return Flow(flow.degree, rows, offset, sign)


def _pools_zeros(operation: Operation) -> bool:
    """Whether some results are no means or extrema of entries alone, so that an offset differs
    there."""
    # Places outside the grid, and places that no largest entry came from.
    if operation.name.startswith(("Grid", "MaxUnpool")):
        return True
    padding = operation.attribute("padding") or ()
    if any(padding) and operation.attribute("count_include_pad", False):
        return True
    return bool(operation.attribute("divisor_override"))


@unary_rule("Im2ColBackward0")
def _im2col(operation: Operation, flow: Flow) -> Flow:
    """The windows of a convolution as columns: channels times places in the window, by windows."""
    of_channels = operation.same_factor(flow.rows, [-1, -2])
    rows = of_channels.squeeze(-1)
    if rows.size(-2) > 1:
        channels = operation.shape()[-3]
        places = operation.out[-2] // channels
        rows = rows.repeat_interleave(places, -2)
    return Flow(flow.degree, rows, flow.offset_everywhere(rows.ndim))


# ----------------------------------------------------------------------------------- normalizations


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
