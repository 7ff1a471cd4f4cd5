"""One operation of an autograd graph, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import Node

from lightning_normdyn.invariance.flow import Shape

# One output of one operation.
Edge = tuple[Node, int]


@dataclass(frozen=True)
class GraphNode:
    """One operation of the graph.

    Args:
        node: torch's own node.
        name: its name without C++ namespaces, e.g. ``"MulBackward0"``.
        sources: for each differentiable input the output that it is; None: a constant.
        inputs: the shapes of these inputs; None: unknown, since a constant leaves no trace.
        outputs: the shapes of the outputs.
    """

    node: Node
    name: str
    sources: tuple[Edge | None, ...]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape, ...]

    @classmethod
    def of(cls, node: Node) -> GraphNode:
        """What torch says about one of its nodes."""
        sources = sources_of(node)
        # A constant leaves no shape behind, since no gradient goes to it.
        inputs = tuple(None if source is None else edge_shape(source) for source in sources)
        outputs = tuple(tuple(output.shape) for output in node._input_metadata)
        return cls(node, node_name(node), sources, inputs, outputs)

    def is_empty(self, k: int) -> bool:
        """Whether output ``k`` has no entries."""
        return k < len(self.outputs) and 0 in self.outputs[k]

    @property
    def gives_nothing(self) -> bool:
        """Whether no output has entries: an expert without tokens."""
        return all(0 in shape for shape in self.outputs)


def node_name(node: Node) -> str:
    """A node's name without C++ namespaces."""
    return node.name().split("::")[-1]


def sources_of(node: Node) -> tuple[Edge | None, ...]:
    """What a node's differentiable inputs are; None: a constant."""
    return tuple(None if source is None else (source, k) for source, k in node.next_functions)


def edge_shape(edge: Edge) -> Shape:
    """The shape of one output of an operation."""
    node, k = edge
    # What is the input of a node's backward is the output of its forward.
    metadata = node._input_metadata
    if k >= len(metadata):
        return ()
    return tuple(metadata[k].shape)


def saved_tensor(node: Node, name: str) -> tuple[bool, Any]:
    """``(readable, value)`` of what a node saved for its backward."""
    # Functions in python have none, nor have nodes that save it in another way.
    raw = getattr(node, f"_raw_saved_{name}", ())
    for one in raw if isinstance(raw, (tuple, list)) else (raw,):
        # With a hook, as checkpoints set them, reading would compute a part of the forward again.
        if getattr(one, "unpack_hook", True) is not None:
            return False, None
    return hasattr(node, f"_saved_{name}"), getattr(node, f"_saved_{name}", None)


def saved_numbers(
    node: Node,
    name: str,
    default: Any = None,
) -> Any:
    """A number or a list of numbers (never a tensor) that a node saved, with negative dims as
    negative numbers."""
    value = getattr(node, f"_saved_{name}", default)
    if isinstance(value, (tuple, list)):
        return [signed(number) for number in value]
    return signed(value)


def signed(value: Any) -> Any:
    """A saved number with its sign: negative dims are saved as uint64."""
    if isinstance(value, int) and value >= 2**63:
        return value - 2**64
    return value
