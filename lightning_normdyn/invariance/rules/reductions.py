"""Rules for sums, means, norms, extrema and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_normdyn.invariance.flow import Flow, Offset, Shape, Sign, everywhere, new_token
from lightning_normdyn.invariance.rules.operation import Operation, known, only, pure
from lightning_normdyn.invariance.rules.registry import rule_for


def _reduced(
    operation: Operation,
    flow: Flow,
    dims: Sequence[int],
    out: Shape,
    *,
    degree: float = 1,
    offset: Offset | None = None,
    sign: Sign = Sign.ANY,
) -> Flow:
    rows = operation.same_factor(flow.rows, dims)
    if len(out) != rows.ndim:
        keep = [d for d in range(rows.ndim) if d not in dims]
        rows = rows.reshape([rows.size(d) for d in keep])
        if (
            offset is not None
        ):  # broadcasting aligns at the right: dims removed in front change nothing
            in_front = all(d < v for d in dims for v, varies in enumerate(offset.varies) if varies)
            offset = replace(
                offset,
                varies=tuple(offset.varies[d] for d in keep),
                token=offset.token if in_front else new_token(),
            )
    return Flow(flow.degree * degree, rows, offset, sign)


def _reduction_dims(operation: Operation) -> list[int]:
    ndim = len(known(operation.inputs[0]))
    dims = operation.attribute("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, list) else [dims])] if ndim else []


@rule_for("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1")
def _sum(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dims = only(operation, flows), _reduction_dims(operation)
    offset = flow.offset
    if offset is not None and (
        operation.name.startswith("Sum") or any(offset.varies[d] for d in dims)
    ):
        offset = offset.changed(
            v and d not in dims for d, v in enumerate(offset.varies)
        )  # else the mean of what is constant is the same constant
    sign = Sign.STATISTIC if flow.sign != Sign.ANY else Sign.ANY
    return _reduced(operation, flow, dims, operation.outputs[0], offset=offset, sign=sign)


@rule_for(
    "LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3", "StdBackward0",
    "VarBackward0",
    "MaxBackward0", "MaxBackward1", "MinBackward0", "MinBackward1", "AmaxBackward0", "AminBackward0", "MedianBackward0",
)  # fmt: skip
def _statistic(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dims = only(operation, flows), _reduction_dims(operation)
    spread = operation.name.startswith(("Std", "Var"))
    flow = _without_constant(operation, flow, dims) if spread else pure(operation, flow)
    if operation.name.startswith("LinalgVectorNorm") and operation.attribute("ord") == 0:
        return _reduced(operation, flow, dims, operation.outputs[0], degree=0)
    measure = spread or "Norm" in operation.name
    sign = Sign.STATISTIC if measure or flow.sign != Sign.ANY else Sign.ANY
    return _reduced(
        operation,
        flow,
        dims,
        operation.outputs[0],
        degree=2 if operation.name.startswith("Var") else 1,
        sign=sign,
    )


def _without_constant(operation: Operation, flow: Flow, dims: Sequence[int]) -> Flow:
    """The flow without an offset that is constant along ``dims``."""
    if flow.offset is not None and any(flow.offset.varies[d] for d in dims):
        pure(operation, flow)
    return replace(flow, offset=None)


@rule_for("VarMeanBackward0", "StdMeanBackward0")
def _spread_and_mean(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow]:
    flow, dims = only(operation, flows), _reduction_dims(operation)
    centered = _without_constant(operation, flow, dims)
    degree = 2 if operation.name.startswith("Var") else 1
    return [
        _reduced(
            operation, centered, dims, operation.outputs[0], degree=degree, sign=Sign.STATISTIC
        ),
        _reduced(operation, flow, dims, operation.outputs[1], offset=flow.offset),
    ]


@rule_for(
    "TopkBackward0", "SortBackward0", "CumsumBackward0", "CummaxBackward0", "CumminBackward0", "MedianBackward1",
    "KthvalueBackward0",
)  # fmt: skip
def _along_one_dim(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Entries are picked, ordered or added along one dimension."""
    flow, dim = only(operation, flows), operation.attribute("dim")
    rows = operation.same_factor(flow.rows, [dim])
    if len(operation.outputs[0]) < rows.ndim:
        rows = rows.squeeze(dim)
    if operation.name == "CumsumBackward0":
        return Flow(flow.degree, rows, everywhere(flow))
    return Flow(pure(operation, flow).degree, rows)


_SPATIAL = {  # over how many last dimensions
    "AvgPool2D": 2, "AvgPool3D": 3, "AdaptiveAvgPool2D": 2, "AdaptiveAvgPool3D": 3, "MkldnnAdaptiveAvgPool2D": 2,
    "MaxPool2DWithIndices": 2, "MaxPool3DWithIndices": 3, "MaxPool2D": 2, "MkldnnMaxPool2D": 2, "MkldnnMaxPool3D": 3,
    "AdaptiveMaxPool2D": 2, "AdaptiveMaxPool3D": 3, "FractionalMaxPool2D": 2, "FractionalMaxPool3D": 3,
    "UpsampleNearest1D": 1, "UpsampleNearest2D": 2, "UpsampleNearest3D": 3, "UpsampleNearestExact1D": 1, "UpsampleNearestExact2D": 2,
    "UpsampleNearestExact3D": 3, "UpsampleLinear1D": 1, "UpsampleBilinear2D": 2, "UpsampleBilinear2DAa": 2, "UpsampleBicubic2D": 2,
    "UpsampleBicubic2DAa": 2, "UpsampleTrilinear3D": 3, "ReflectionPad1D": 1, "ReflectionPad2D": 2, "ReflectionPad3D": 3,
    "ReplicationPad1D": 1, "ReplicationPad2D": 2, "ReplicationPad3D": 3, "GridSampler2D": 2, "GridSampler3D": 3,
    "MaxUnpool2D": 2, "MaxUnpool3D": 3,
}  # fmt: skip


@rule_for(*(f"{name}Backward0" for name in _SPATIAL))
def _pool(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Pooling, resampling and padding by repetition: neighbours are averaged or the largest is
    taken, channel by channel."""
    flow = only(operation, flows)
    dims = range(
        flow.rows.ndim - _SPATIAL[operation.name.removesuffix("Backward0")], flow.rows.ndim
    )
    offset = flow.offset
    if offset is not None:
        if any(offset.varies[d] for d in dims):
            pure(operation, flow)
        zeros = any(operation.attribute("padding") or ()) and operation.attribute(
            "count_include_pad", False
        )
        if (
            zeros
            or operation.attribute("divisor_override")
            or operation.name.startswith(("Grid", "MaxUnpool"))
        ):
            offset = offset.changed(v or d in dims for d, v in enumerate(offset.varies))
    # The mean of squares of a whole channel is a statistic; a local one (LocalResponseNorm) has a
    # constant beside it that is no epsilon.
    sign = (
        Sign.STATISTIC
        if flow.sign != Sign.ANY and operation.name.startswith("AdaptiveAvg")
        else Sign.ANY
    )
    return Flow(flow.degree, operation.same_factor(flow.rows, dims), offset, sign)


@rule_for("Im2ColBackward0")
def _im2col(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), known(operation.inputs[0])
    rows = operation.same_factor(flow.rows, [-1, -2]).squeeze(-1)
    if rows.size(-2) > 1:
        rows = rows.repeat_interleave(operation.outputs[0][-2] // shape[-3], -2)
    return Flow(flow.degree, rows, flow.offset and flow.offset.changed([True] * rows.ndim))
