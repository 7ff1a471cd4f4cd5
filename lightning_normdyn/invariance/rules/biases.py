"""What it means for a flow that a bias is added: by a linear layer, a convolution, or a plain sum.

A bias does not scale with the weight, so it becomes the flow's offset. Some biases are put together
from pieces of which some are zeros (keys have no bias in Swin v2), and there nothing is added.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_normdyn.invariance.flow import (
    Flow,
    along,
    expanded,
    joined,
    sizes_of_pieces,
    varying,
)
from lightning_normdyn.invariance.graph import Edge, GraphNode, edge_shape

from .operation import Operation


def with_bias(
    operation: Operation,
    flow: Flow,
    k: int,
) -> Flow:
    """The flow plus input ``k``, along the last dimension."""
    shape = operation.inputs[k]
    out = operation.out
    ndim = len(out)
    last = along([-1], ndim)
    if shape is None:
        frozen = _bias_of_module(operation)
        if frozen:
            return flow.shifted(last, frozen)
    elif math.prod(shape) == out[-1] == shape[-1]:
        # A multiple of the parameter (beta) is another offset than the parameter.
        parameter = None
        if operation.attribute("beta", 1) == 1:
            parameter = operation.parameter(k)
        return with_input(operation, flow, k, last, parameter)
    return with_input(operation, flow, k, varying(shape, ndim))


def with_bias_of_channels(operation: Operation, flow: Flow) -> Flow:
    """The flow plus the bias of a convolution."""
    name = operation.parameter(2) or _bias_of_module(operation)
    channels = along([1], len(operation.out))
    return flow.shifted(channels, name)


def _bias_of_module(operation: Operation) -> str | None:
    """The bias that a module has. A frozen one is no input of the graph, so it is looked up."""
    name, module = operation.module
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.ndim == 1:
        return f"{name}.bias".lstrip(".")
    return None


def with_input(
    operation: Operation,
    flow: Flow,
    k: int,
    varies: tuple[bool, ...],
    parameter: str | None = None,
) -> Flow:
    """The flow plus input ``k``, which varies along ``varies`` and may be a parameter, or zero in
    some places of the last dimension."""
    zeros = _zeros(operation, k)
    # With an offset before the bias, no entry is left that has none.
    if zeros is None or zeros.shape != operation.out[-1:] or flow.offset:
        return flow.shifted(varies, parameter)
    rows = expanded(flow.rows, operation.out, [-1])
    # Two flows of one degree: in one of them the offset is known to be nothing.
    free = replace(flow, rows=torch.where(zeros, rows, 0))
    biased = replace(flow, rows=torch.where(zeros, 0, rows))
    if not bool(biased.rows.any()):
        return free
    last = along([-1], flow.ndim)
    return joined([free, biased.shifted(last)])


def _zeros(operation: Operation, k: int) -> Tensor | None:
    """Which entries of input ``k``, a bias that was put together, no parameter reaches: bool
    ``(n,)``; None: none, or not known.

    They are constants, nearly always zeros (``torch.cat([q, zeros, v])``, ``bias * mask``,
    ``bias[2:4] = 0``): taken as such, and the claim is marked.
    """
    edge = operation.source(k)
    parameters = operation.graph.parameters
    # A whole parameter has no constant entries, and of a constant there is nothing to see.
    if edge is None or edge in parameters:
        return None
    shape = operation.shape(k)
    if len(shape) != 1:
        return None
    zeros = _constant_entries(edge, shape[0], parameters)
    if zeros is None or not bool(zeros.any()):
        return None
    operation.rows.assumed = True
    return zeros


def _constant_entries(
    edge: Edge | None,
    size: int,
    parameters: Mapping[Edge, str],
) -> Tensor | None:
    """Which entries of a tensor of one dimension no parameter reaches: bool ``(size,)``, None where
    it cannot be said."""
    everything = torch.ones(size, dtype=torch.bool, device="cpu")
    if edge is None:
        return everything
    if edge in parameters:
        return ~everything
    node = GraphNode.of(edge[0])
    sources = node.sources
    if node.name == "CatBackward0":
        return _constants_of_pieces(node, size, parameters)
    if node.name == "MulBackward0" and len(sources) == 2 and sources.count(None) == 1:
        k = sources.index(None)
        # Where the constant factor is 0 (a mask), nothing of the bias arrives.
        _, factor = node.saved_tensor(("self", "other")[k])
        below = _constant_entries(sources[1 - k], size, parameters)
        if not isinstance(factor, Tensor) or factor.shape != (size,) or below is None:
            return None
        return below | (factor == 0).cpu()
    if node.name in ("CloneBackward0", "ToCopyBackward0"):
        return _constant_entries(sources[0], size, parameters)
    if node.name == "CopySlices":
        return _overwritten(edge, size, parameters)
    return None


def _constants_of_pieces(
    node: GraphNode,
    size: int,
    parameters: Mapping[Edge, str],
) -> Tensor | None:
    """`_constant_entries` of pieces that were concatenated."""
    sizes = sizes_of_pieces(node.inputs, 0, size)
    if sizes is None:
        return None
    pieces = []
    for source, length in zip(node.sources, sizes, strict=True):
        piece = _constant_entries(source, length, parameters)
        if piece is None:
            return None
        pieces.append(piece)
    return torch.cat(pieces)


def _overwritten(
    edge: Edge,
    size: int,
    parameters: Mapping[Edge, str],
) -> Tensor | None:
    """Entries of a copy of a parameter that were written over in place: those that pass no gradient
    on."""
    # Only copies and casts may lie between: they leave every entry in its place.
    below: Edge | None = edge
    while below is not None and below not in parameters:
        copy = GraphNode.of(below[0])
        if copy.name not in ("CopySlices", "CloneBackward0", "ToCopyBackward0"):
            return None
        below = copy.sources[0]
    if below is None or edge_shape(below) != (size,):
        return None
    # The graph does not say where was written, but its backward does. These nodes save nothing, so
    # running them twice costs the real backward nothing.
    output = GradientEdge(*edge)
    parameter = GradientEdge(*below)
    node, k = edge
    metadata = node._input_metadata[k]
    ones = torch.ones(size, dtype=metadata.dtype, device=metadata.device)
    (passed,) = torch.autograd.grad([output], [parameter], [ones], retain_graph=True)
    return (passed == 0).cpu()
