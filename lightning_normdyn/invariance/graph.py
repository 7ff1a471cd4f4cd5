"""The operations between the parameters of a network and its loss, read once from torch's autograd
graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_normdyn.invariance.flow import Shape
from lightning_normdyn.invariance.nodes import Edge, GraphNode, sources_of
from lightning_normdyn.invariance.signs import ValueSigns

# A whole subgraph in one node, with weights that no edge shows.
OPAQUE = ("CompiledFunctionBackward", "CheckpointFunctionBackward")

# Name and module in whose forward (innermost) a node was recorded; ``("", None)`` if not known.
ModuleOf = Callable[[Node], tuple[str, nn.Module | None]]


@dataclass
class Graph:
    """The operations between some parameters and a loss, inputs first.

    Args:
        root: the loss.
        parameters: which graph edge is which parameter.
        module_of: names the module in whose forward a node was created.
        nodes: the operations.
        shapes: of the parameters that occur.
        signs: what is known of the values, whatever they were computed from.
    """

    root: Edge
    parameters: Mapping[Edge, str]
    module_of: ModuleOf
    nodes: list[GraphNode] = field(default_factory=list)
    shapes: dict[Edge, Shape] = field(default_factory=dict)
    signs: ValueSigns = field(default_factory=ValueSigns)

    @property
    def opaque(self) -> list[str]:
        """Operations that hide others."""
        return sorted({node.name for node in self.nodes if node.name in OPAQUE})


def trace(loss: Tensor, parameters: Mapping[Edge, str], module_of: ModuleOf) -> Graph:
    """Collect the operations that ``loss`` was computed with, down to the parameters.

    Args:
        loss: any tensor that requires grad.
        parameters: which graph edge is which parameter (edges below are not followed).
        module_of: names the module in whose forward a node was created.
    """
    edge = torch.autograd.graph.get_gradient_edge(loss)
    graph = Graph((edge.node, edge.output_nr), parameters, module_of)
    for torch_node in _inputs_first(edge.node, parameters):
        node = GraphNode.of(torch_node)
        # Sources come first, so what is known of their signs is there.
        graph.nodes.append(node)
        graph.signs.add(node)
        for source, shape in zip(node.sources, node.inputs, strict=True):
            if source in parameters and source is not None and shape is not None:
                graph.shapes[source] = shape
    return graph


def _inputs_first(root: Node, parameters: Mapping[Edge, str]) -> Iterator[Node]:
    """The nodes that ``root`` was computed with, each after all of its inputs."""
    # A stack of our own: the graph of a recurrent network is deeper than python's recursion goes.
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, inputs_are_done = stack.pop()
        if inputs_are_done:
            yield node
        elif node not in seen:
            seen.add(node)
            # Met again once everything above it on the stack, its inputs, is done.
            stack.append((node, True))
            for edge in sources_of(node):
                if edge is not None and edge not in parameters:
                    stack.append((edge[0], False))
