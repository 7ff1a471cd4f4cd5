"""What it means that a bias is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import Flow, joined, shifted, varying
from lightning_normdyn.invariance.nodes import Edge, edge_shape, node_name
from lightning_normdyn.invariance.rules.operation import Operation


def with_bias(operation: Operation, flow: Flow, k: int, dim: int) -> Flow:
    """Input ``k`` is added; a frozen one (shape unknown) counts as a bias only if the module has
    one."""
    shape, ndim = operation.inputs[k], len(operation.outputs[0])
    if (parts := without_bias_in_part(operation, flow, k, dim % ndim)) is not None:
        return parts
    name, module = operation.module
    bias = getattr(module, "bias", None)
    along = tuple(d == dim % ndim for d in range(ndim))
    if shape is None and isinstance(bias, Tensor) and bias.ndim == 1:
        return shifted(flow, along, f"{name}.bias" if name else "bias")
    if shape is not None and math.prod(shape) == operation.outputs[0][dim] == shape[-1]:
        return shifted(
            flow, along, operation.parameter(k) if operation.attribute("beta", 1) == 1 else None
        )
    return shifted(flow, varying(shape, ndim), None)


def with_bias_named(operation: Operation, flow: Flow) -> Flow:
    """The flow plus the bias of a convolution, which may be frozen."""
    ndim = len(operation.outputs[0])
    name = operation.parameter(2)
    if name is None and isinstance(getattr(operation.module[1], "bias", None), Tensor):  # frozen
        name = f"{operation.module[0]}.bias".lstrip(".")
    return shifted(flow, tuple(d == 1 for d in range(ndim)), name)


def without_bias_in_part(operation: Operation, flow: Flow, k: int, dim: int) -> Flow | None:
    """The flow after adding input ``k``, where some of its entries are known to be zero (keys have
    no bias in Swin v2); None: nowhere."""
    size = operation.outputs[0][dim]
    zeros = _zeros(operation, k)
    if zeros is None or zeros.shape != (size,) or not bool(zeros.any()) or flow.offset is not None:
        return None
    along = [size if d == dim else 1 for d in range(len(operation.outputs[0]))]
    wide = flow.rows.expand([size if d == dim else n for d, n in enumerate(flow.rows.shape)])
    free = torch.where(zeros.reshape(along), wide, 0)
    biased = torch.where(zeros.reshape(along), 0, wide)
    offset_by = shifted(
        replace(flow, rows=biased), tuple(d == dim for d in range(len(along))), None
    )
    return joined([replace(flow, rows=free), *([offset_by] if bool(biased.any()) else [])])


def _zeros(operation: Operation, k: int) -> Tensor | None:
    """Which entries of input ``k``, a bias that was put together, no parameter reaches: bool
    ``(n,)``; None: not known.

    They are constants, nearly always zeros (``torch.cat([q, zeros, v])``, ``bias * mask``,
    ``bias[n : 2 * n] = 0``): taken as such, and
    the claim is marked.
    """
    edge = operation.source(k)
    shape = operation.inputs[k] if k < len(operation.inputs) else None
    if edge is None or shape is None or len(shape) != 1 or edge in operation.parameters:
        return None
    zeros = _constant_entries(edge, shape[0], operation.parameters)
    if zeros is not None and bool(zeros.any()):
        operation.rows.assumed = True
    return zeros


def _constant_entries(
    edge: Edge | None, size: int, parameters: Mapping[Edge, str]
) -> Tensor | None:
    """Which entries of a tensor of one dimension no parameter reaches: bool ``(size,)``, None where
    it cannot be said."""
    everything = torch.ones(size, dtype=torch.bool, device="cpu")
    if edge is None:
        return everything
    if edge in parameters:
        return ~everything
    node, name = edge[0], node_name(edge[0])
    sources = [None if source is None else (source, i) for source, i in node.next_functions]
    if name == "CatBackward0":
        sizes = [None if source is None else edge_shape(source)[0] for source in sources]
        if sizes.count(None) > 1:  # one constant takes what the others leave
            return None
        left = size - sum(n for n in sizes if n is not None)
        pieces = [
            _constant_entries(s, left if n is None else n, parameters)
            for s, n in zip(sources, sizes, strict=True)
        ]
        known = [piece for piece in pieces if piece is not None]
        return torch.cat(known) if len(known) == len(pieces) else None
    source = sources[0] if sources else None
    if name == "MulBackward0" and len(sources) == 2 and sources.count(None) == 1:
        key = "other" if sources[1] is None else "self"
        hooks = getattr(getattr(node, f"_raw_saved_{key}", None), "unpack_hook", None)
        factor = (
            getattr(node, f"_saved_{key}", None) if hooks is None else None
        )  # inside a checkpoint it would have to be computed again
        below = _constant_entries(sources[0] or sources[1], size, parameters)
        if not isinstance(factor, Tensor) or factor.shape != (size,) or below is None:
            return None
        return below | (factor == 0).cpu()
    if name in ("CloneBackward0", "ToCopyBackward0") and source is not None:
        return _constant_entries(source, size, parameters)
    if name == "CopySlices" and source is not None:
        return _overwritten(edge, size, parameters)
    return None


def _overwritten(edge: Edge, size: int, parameters: Mapping[Edge, str]) -> Tensor | None:
    """Entries of a copy of a parameter that were written over in place: those that pass no gradient
    on. Nothing is saved in this graph."""
    below: Edge | None = edge
    while below is not None and below not in parameters:
        if node_name(below[0]) not in ("CopySlices", "CloneBackward0", "ToCopyBackward0"):
            return None
        source, i = below[0].next_functions[0]
        below = None if source is None else (source, i)
    if below is None or edge_shape(below) != (size,):
        return None
    output, parameter = (
        torch.autograd.graph.GradientEdge(*edge),
        torch.autograd.graph.GradientEdge(*below),
    )
    metadata = edge[0]._input_metadata[edge[1]]
    ones = torch.ones(size, dtype=metadata.dtype, device=metadata.device)
    (passed,) = torch.autograd.grad([output], [parameter], [ones], retain_graph=True)
    return (passed == 0).cpu()
