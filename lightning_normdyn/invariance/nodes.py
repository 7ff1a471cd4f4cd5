"""One operation of an autograd graph, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import Node

from lightning_normdyn.invariance.flow import Shape

Edge = tuple[Node, int]  # one output of one operation


@dataclass(frozen=True)
class GraphNode:
    """One operation of the graph, as plain data."""

    node: Node
    name: str
    sources: tuple[Edge | None, ...]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape, ...]

    def is_empty(self, k: int) -> bool:
        """Whether output ``k`` has no entries."""
        return k < len(self.outputs) and 0 in self.outputs[k]


def node_name(node: Node) -> str:
    """A node's name without C++ namespaces."""
    return node.name().split("::")[-1]


def edge_shape(edge: Edge) -> Shape:
    """The shape of one output of an operation."""
    node, k = edge
    return tuple(node._input_metadata[k].shape) if k < len(node._input_metadata) else ()


def signed(value: Any) -> Any:
    """Negative dims are saved as uint64: undo that."""
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value
