"""The operations between the parameters of a network and its loss, read once from torch's autograd
graph; what is known of the signs of their values; and in which module's forward each was created.

A sum of what is not negative is a statistic, and a constant beside a statistic is an epsilon.
Linear attention is why signs are asked of tensors that no weight reaches: it divides by a sum over
attention weights, which are not negative because they were computed by a ReLU or an exponential.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .flow import Shape, Sign

# ------------------------------------------------------------------------------------ one operation

# One output of one operation.
Edge = tuple[Node, int]


@dataclass(eq=False)
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

    def attribute(
        self,
        name: str,
        default: Any = None,
    ) -> Any:
        """A saved number or list of numbers of the node (never a tensor), with negative dims as
        negative numbers."""
        value = getattr(self.node, f"_saved_{name}", default)
        if isinstance(value, (tuple, list)):
            return [signed(number) for number in value]
        return signed(value)

    def saved_tensor(self, name: str) -> tuple[bool, Any]:
        """``(readable, value)`` of a saved tensor; under saved-tensor hooks (checkpoints) reading
        would recompute, so it is not done."""
        # Functions in python have none, nor have nodes that save it in another way.
        raw = getattr(self.node, f"_raw_saved_{name}", ())
        for one in raw if isinstance(raw, (tuple, list)) else (raw,):
            # With a hook, as checkpoints set them, reading would compute a part of the forward
            # again.
            if getattr(one, "unpack_hook", True) is not None:
                return False, None
        key = f"_saved_{name}"
        return hasattr(self.node, key), getattr(self.node, key, None)


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


def signed(value: Any) -> Any:
    """A saved number with its sign: negative dims are saved as uint64."""
    if isinstance(value, int) and value >= 2**63:
        return value - 2**64
    return value


# ------------------------------------------------------------------------------------ whose forward

# Name and module of a forward; ``("", None)`` outside of all.
Owner = tuple[str, nn.Module | None]


class ModuleSpans:
    """Forward passes as intervals on the number line of autograd nodes.

    Nodes are numbered in the order of their creation, so that a node belongs to the forward passes
    whose interval its number lies in.
    """

    def __init__(self) -> None:
        # Those that are running, the innermost last.
        self._open: list[Owner] = [("", None)]
        # From which node on somebody owns them, and who, in the order of time.
        self._starts: list[int] = [0]
        self._owners: list[Owner] = self._open.copy()

    def enter(
        self,
        module: nn.Module,
        name: str,
    ) -> None:
        """The forward of ``module`` begins."""
        self._open.append((name, module))
        self._mark()

    def leave(self, module: nn.Module) -> None:
        """The forward of ``module`` is over."""
        if not any(entered is module for _, entered in self._open):
            return
        # Modules above it in the stack were ended by an exception.
        entered = None
        while entered is not module:
            _, entered = self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """Whose the nodes are from now on."""
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._owners.append(self._open[-1])

    def module_of(self, node: Node) -> Owner:
        """Name and module of the innermost forward in which ``node`` was created; ``("", None)``
        outside of all."""
        # Of several that begin at one number the last is meant: the others created no node.
        k = bisect.bisect_right(self._starts, node._sequence_nr())
        return self._owners[k - 1]


# ---------------------------------------------------------------------------------- signs of values


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_NEGATIVE = _names("""
    ReluBackward0 AbsBackward0 SigmoidBackward0 ExpBackward0 SoftplusBackward0 SoftmaxBackward0
    SafeSoftmaxBackward0
""")
_SUMS = _names("""
    MmBackward0 BmmBackward0 DotBackward0 SumBackward0 SumBackward1 MeanBackward0 MeanBackward1
""")
# Some of these may move the last two dimensions: whether they do is checked.
_MAY_KEEP_PADDING = _names("""
    CloneBackward0 ToCopyBackward0 ViewBackward0 UnsafeViewBackward0 ReshapeAliasBackward0
    ExpandBackward0
""")
_KEEPS_SIGN = _MAY_KEEP_PADDING | _names("""
    AliasBackward0 UnsqueezeBackward0 SqueezeBackward0 SqueezeBackward1 SqueezeBackward2
    TransposeBackward0 TBackward0 PermuteBackward0 RepeatBackward0 SelectBackward0 SliceBackward0
    SplitBackward0 SplitWithSizesBackward0 UnbindBackward0 CatBackward0 StackBackward0
    IndexBackward0 IndexSelectBackward0 ConstantPadNdBackward0 SqrtBackward0 NativeDropoutBackward0
""")


@dataclass(frozen=True)
class Padding:
    """Entries at the end of one dimension whose values have one sign: a constant, or sums of
    products of it with what is not negative.

    Args:
        dim: counted from the right, -1 or -2.
        start: where they begin.
        sign: what is known of them.
    """

    dim: int
    start: int
    sign: Sign


class ValueSigns:
    """The signs of the values in one graph, collected as its operations are read, inputs first."""

    def __init__(self) -> None:
        self._signs: dict[Edge | None, Sign] = {}
        self._paddings: dict[Edge | None, Padding] = {}

    def of(self, edge: Edge | None) -> Sign:
        """What is known of one output of an operation; nothing of a constant."""
        return self._signs.get(edge, Sign.ANY)

    def add(self, node: GraphNode) -> None:
        """Take in one operation."""
        sign = self._sign_of_result(node)
        padding = self._padding_of_result(node)
        if padding is not None:
            if node.name == "SliceBackward0" and padding.start == 0:
                # The slice has left nothing but the padded entries.
                sign = max(sign, padding.sign)
            else:
                self._paddings[node.node, 0] = padding
        if sign != Sign.ANY:
            for k in range(len(node.outputs)):
                self._signs[node.node, k] = sign

    def _sign_of_result(self, node: GraphNode) -> Sign:
        name = node.name
        sources = node.sources
        if name in _NEVER_NEGATIVE:
            return Sign.NONNEGATIVE
        has_two = len(sources) == 2
        if has_two and sources[0] is not None and sources[0] == sources[1]:
            # A tensor times itself is a square, whatever its own sign.
            if name.startswith("Mul"):
                return Sign.NONNEGATIVE
            if name == "DotBackward0":
                return Sign.STATISTIC

        # A constant may be anything, so it makes everything it meets unknown.
        lowest = min(map(self.of, sources), default=Sign.ANY)
        if lowest == Sign.ANY:
            return Sign.ANY
        if name in _SUMS:
            return Sign.STATISTIC
        if name in _KEEPS_SIGN or (has_two and name.startswith("Add")):
            return lowest
        if has_two and name.startswith(("Mul", "Div")):
            return Sign.NONNEGATIVE
        return Sign.ANY

    def _padding_of_result(self, node: GraphNode) -> Padding | None:
        """The padded entries of what an operation gives. After a slice, ``start`` is 0 where
        nothing else is left.

        Linear attention appends ones to its values, so that one product gives the sums of what is
        attended to and of the attention.
        """
        if node.name == "ConstantPadNdBackward0":
            return _new_padding(node)
        if not self._paddings:
            return None
        if node.name in ("MmBackward0", "BmmBackward0"):
            return self._padding_of_product(node)
        if len(node.sources) != 1 or len(node.outputs[0]) < 2:
            return None
        padding = self._paddings.get(node.sources[0])
        return padding and _moved_padding(node, padding)

    def _padding_of_product(self, node: GraphNode) -> Padding | None:
        # Rows that were appended to the first factor, or columns to the second, come out as
        # appended.
        for k, dim in ((0, -2), (1, -1)):
            padding = self._paddings.get(node.sources[k])
            factor = self.of(node.sources[1 - k])
            if padding and padding.dim == dim and factor != Sign.ANY:
                # Each such entry is a sum of products of what is not negative.
                return replace(padding, sign=Sign.STATISTIC)
        return None


def _new_padding(node: GraphNode) -> Padding | None:
    """What `torch.nn.functional.pad` appends, if it is at the end of one of the last two
    dimensions."""
    shape = node.inputs[0]
    amounts: list[int] = node.attribute("pad")
    used = [k for k, amount in enumerate(amounts) if amount]
    # Pairs of amounts, before and after, from the last dimension on.
    if shape is None or used not in ([1], [3]) or amounts[used[0]] < 0:
        return None
    dim = -1 - used[0] // 2
    return Padding(dim, shape[dim], Sign.NONNEGATIVE)


def _moved_padding(node: GraphNode, padding: Padding) -> Padding | None:
    """Where the padded entries of the one input lie in the output."""
    shape = node.inputs[0]
    out = node.outputs[0]
    if shape is None:
        return None
    if node.name in ("TransposeBackward0", "TBackward0"):
        swapped = {-1, -2}
        if node.name == "TransposeBackward0":
            first = _from_the_right(node, "dim0")
            second = _from_the_right(node, "dim1")
            swapped = {first, second}
        if padding.dim not in swapped:
            return padding
        # -1 becomes -2 and the other way round. Further in front it is not followed.
        if swapped == {-1, -2}:
            return replace(padding, dim=-3 - padding.dim)
        return None
    if node.name == "SliceBackward0":
        if _from_the_right(node, "dim") == padding.dim:
            start: int = node.attribute("start") or 0
            if start < 0:
                start += shape[padding.dim]
            if start >= padding.start:
                return replace(padding, start=0)
        return None
    if node.name in _MAY_KEEP_PADDING and shape[-2:] == out[-2:]:
        return padding
    return None


def _from_the_right(node: GraphNode, key: str) -> int:
    dim: int = node.attribute(key)
    ndim = len(node.outputs[0])
    return dim % ndim - ndim


# --------------------------------------------------------------------------------------- operations

# A whole subgraph in one node, with weights that no edge shows.
OPAQUE = ("CompiledFunctionBackward", "CheckpointFunctionBackward")

# Names the module in whose forward (innermost) a node was recorded.
ModuleOf = Callable[[Node], Owner]


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


def trace(
    loss: Tensor,
    parameters: Mapping[Edge, str],
    module_of: ModuleOf,
) -> Graph:
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
