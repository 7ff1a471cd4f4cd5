"""The operations between the parameters of a network and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_normdyn.invariance.flow import Shape, Sign
from lightning_normdyn.invariance.nodes import Edge, GraphNode, edge_shape, node_name
from lightning_normdyn.invariance.signs import Padding, padding_of_result, sign_of_result

OPAQUE = (
    "CompiledFunctionBackward",
    "CheckpointFunctionBackward",
)  # a whole subgraph in one node, with weights that no edge shows


@dataclass
class Graph:
    """The operations between some parameters and a loss, inputs first."""

    root: Edge
    parameters: Mapping[Edge, str]
    nodes: list[GraphNode] = field(default_factory=list)
    shapes: dict[Edge, Shape] = field(default_factory=dict)  # of the parameters that occur
    module_of: Callable[[Node], tuple[str, nn.Module | None]] = lambda node: ("", None)
    signs: dict[Edge, Sign] = field(
        default_factory=dict
    )  # what is known of the values, whatever they were computed from; else ANY

    @property
    def opaque(self) -> list[str]:
        """Operations that hide others."""
        return sorted({step.name for step in self.nodes if step.name in OPAQUE})


def trace(
    loss: Tensor,
    parameters: Mapping[Edge, str],
    module_of: Callable[[Node], tuple[str, nn.Module | None]],
) -> Graph:
    """Collect the operations that ``loss`` was computed with, down to the parameters.

    Args:
        loss: any tensor that requires grad.
        parameters: which graph edge is which parameter (edges below are not followed).
        module_of: names the module in whose forward a node was created.
    """
    edge = torch.autograd.graph.get_gradient_edge(loss)
    graph = Graph((edge.node, edge.output_nr), parameters, module_of=module_of)
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(edge.node, False)]
    paddings: dict[Edge, Padding] = {}
    while stack:
        node, done = stack.pop()
        if not done:
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            stack.extend(
                (source, False)
                for source, i in node.next_functions
                if source is not None and (source, i) not in parameters
            )
            continue
        sources = tuple(
            None if source is None else (source, i) for source, i in node.next_functions
        )
        inputs = tuple(None if source is None else edge_shape(source) for source in sources)
        for source, shape in zip(sources, inputs, strict=True):
            if source is not None and shape is not None and source in parameters:
                graph.shapes[source] = shape
        step = GraphNode(
            node,
            node_name(node),
            sources,
            inputs,
            tuple(tuple(m.shape) for m in node._input_metadata),
        )
        graph.nodes.append(step)
        sign = sign_of_result(
            step, [graph.signs.get(s, Sign.ANY) if s is not None else Sign.ANY for s in sources]
        )
        padding = padding_of_result(step, paddings, graph.signs)
        if padding is not None and step.name == "SliceBackward0" and padding.start == 0:
            sign = max(sign, padding.sign)
        elif padding is not None:
            paddings[node, 0] = padding
        if sign != Sign.ANY:
            graph.signs.update({(node, k): sign for k in range(len(step.outputs))})
    return graph
