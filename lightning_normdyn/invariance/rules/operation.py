"""What a rule gets to see of an operation, and the checks that many rules share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_normdyn.invariance.flow import Blocked, Flow, Flows, Shape, Sign
from lightning_normdyn.invariance.graph import Graph
from lightning_normdyn.invariance.nodes import (
    Edge,
    GraphNode,
    node_name,
    saved_tensor,
    signed,
    sources_of,
)
from lightning_normdyn.invariance.rows import Rows

# Variances are of order 1 behind common initializations: an epsilon up to this is small beside
# them.
SMALL_EPSILON = 1e-3


class Operation:
    """One operation while the scale of one weight is followed through it: what a rule gets to see.

    ``name`` is the autograd node's name, ``inputs`` the shapes of its differentiable inputs (None:
    a constant, shape unknown), ``outputs`` the shapes of its outputs.
    """

    def __init__(self, node: GraphNode, rows: Rows, graph: Graph) -> None:
        self.node = node.node
        self.name = node.name
        self.inputs = node.inputs
        self.outputs = node.outputs
        self.rows = rows
        self._sources = node.sources
        self._graph = graph

    @property
    def parameters(self) -> Mapping[Edge, str]:
        """Which edges of the graph are parameters, and their names."""
        return self._graph.parameters

    @property
    def place(self) -> str:
        """The operation and the module it ran in, for messages."""
        name, _ = self.module
        if name:
            return f"{self.name} in {name}"
        return self.name

    @property
    def module(self) -> tuple[str, nn.Module | None]:
        """Name and module in whose forward (innermost) the operation was recorded; ``("", None)``
        if not known."""
        return self._graph.module_of(self.node)

    @property
    def out(self) -> Shape:
        """The shape of the first output."""
        return self.outputs[0]

    def shape(self, k: int = 0) -> Shape:
        """The shape of an input that has a flow: such an input requires grad, so its shape is
        known."""
        shape = self.inputs[k]
        assert shape is not None
        return shape

    def dim(self, key: str = "dim") -> int:
        """The dimension of the first input that the operation works along."""
        return int(self.attribute(key)) % max(1, len(self.shape()))

    def source(self, k: int) -> Edge | None:
        """The output of another operation that input ``k`` is; None: a constant, or no such
        input."""
        if k < len(self._sources):
            return self._sources[k]
        return None

    def parameter(self, k: int) -> str | None:
        """Name of the parameter that input ``k`` is, also behind a cast to another dtype."""
        edge = self.source(k)
        # Under autocast a bias is cast before it is added: its entries keep their places.
        while edge is not None and edge not in self.parameters:
            if node_name(edge[0]) != "ToCopyBackward0":
                return None
            (edge,) = sources_of(edge[0])
        if edge is None:
            return None
        return self.parameters[edge]

    def sign(self, k: int) -> Sign:
        """What is known of the values of input ``k``, whether they scale or not."""
        return self._graph.signs.of(self.source(k))

    def sign_of_output(self, k: int) -> Sign:
        """What is known of the values of output ``k``, whether they scale or not."""
        return self._graph.signs.of((self.node, k))

    def attribute(self, name: str, default: Any = None) -> Any:
        """A saved number or list of numbers of the node (never a tensor), with negative dims as
        negative numbers."""
        value = getattr(self.node, f"_saved_{name}", default)
        # Dims are saved as unsigned numbers.
        if isinstance(value, (tuple, list)):
            return [signed(number) for number in value]
        return signed(value)

    def saved_tensor(self, name: str) -> tuple[bool, Any]:
        """``(readable, value)`` of a saved tensor; under saved-tensor hooks (checkpoints) reading
        would recompute, so it is not done."""
        return saved_tensor(self.node, name)

    def same_factor(self, rows: Tensor, dims: Iterable[int]) -> Tensor:
        """Along ``dims`` all entries must share one factor from here on; returns ``rows`` with size
        1 there."""
        for dim in dims:
            if rows.size(dim) > 1:
                # From here on the first stands for all of them.
                first = rows.narrow(dim, 0, 1)
                mixing = "mixes entries that scale with entries that do not"
                self.rows.unite(rows, first, f"{self.place} {mixing}")
                rows = first
        return rows

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """The entries of ``a`` and ``b`` (broadcast) must share factors; returns the smaller (they
        are one from here on)."""
        self.rows.unite(a, b, f"{self.place} combines entries that scale with entries that do not")
        if a.numel() <= b.numel():
            return a
        return b

    def indices(self, name: str, flow: Flow, dims: Iterable[int]) -> Any:
        """The saved indices with which entries of ``flow`` are picked along ``dims``; None where
        they are saved inside a checkpoint.

        Then it is not known which rows were read, and if rows differ along these dims, they must
        not be scaled.
        """
        readable, index = self.saved_tensor(name)
        if readable:
            return index
        if any(flow.rows.size(dim) > 1 for dim in dims):
            # Another cut of the weight may not differ along these dims and claim what this one must
            # not.
            self.rows.veiled.setdefault(self.place)
            raise Blocked(
                f"the indices of {self.place} are inside a checkpoint, so that it is not known "
                f"which rows are read"
            )
        return None

    def left_out(self, flow: Flow, dims: Iterable[int]) -> None:
        """Entries were left out along ``dims``. Where the rows do not differ along them, another
        cut of the weight has to show which."""
        if any(flow.rows.size(dim) == 1 for dim in dims):
            self.rows.cut_elsewhere = True

    def normalized(self, flow: Flow, dims: Iterable[int], *, centered: bool = True) -> Flow:
        """The result of a normalization over ``dims``; ``centered``: it removes a common offset,
        too (LayerNorm, but not RMSNorm)."""
        if not centered:
            # Nothing subtracts a mean, so a bias stays beside what scales.
            pure(self, flow)
        refuse_padded(self, flow)
        dims = [d % flow.ndim for d in dims]
        if flow.offset and flow.offset.differs_along(dims):
            raise Blocked(
                f"{flow.offset.what} is added before {self.place} and differs within what is "
                f"normalized together"
            )
        return Flow(0, self.same_factor(flow.rows, dims))

    def forgive(self, flow: Flow, what: str) -> Flow:
        """A constant beside a statistic is an epsilon: passed on, but the claim then rests on its
        smallness. Anything else is blocked."""
        if flow.sign != Sign.STATISTIC or flow.offset or flow.degree < 0:
            raise Blocked(f"{what} in {self.place}")
        # The graph does not hold the constant. A module that declares an epsilon is taken at its
        # word.
        epsilon = declared_epsilon(self.module[1])
        self.assume_small(math.inf if epsilon is None else epsilon)
        return replace(flow, padded=True)

    def assume_small(self, epsilon: float) -> None:
        """An epsilon that is not small beside a variance of order 1 marks the claim."""
        if epsilon > SMALL_EPSILON:
            self.rows.assumed = True


def only(operation: Operation, flows: Flows) -> Flow:
    """The flow of the first input, if no other input depends on the weight."""
    # A rule of one input would lose what enters by another.
    flow, *others = flows
    if not flow or any(others):
        raise Blocked(f"the scale enters {operation.place} by a side input")
    return flow


def present(flows: Flows) -> tuple[int, Flow]:
    """The first input that depends on the weight, and its flow."""
    for k, flow in enumerate(flows):
        if flow:
            return k, flow
    raise AssertionError("an operation without a flow is not visited")


def pure(operation: Operation, flow: Flow) -> Flow:
    """The flow, if nothing constant was added to it."""
    if flow.offset:
        raise Blocked(f"{flow.offset.what} is added before {operation.place}")
    return flow


def refuse_padded(operation: Operation, flow: Flow) -> None:
    """A constant beside a statistic is an epsilon in a denominator; where it enters as a value, it
    is a value that does not scale."""
    if flow.padded:
        raise Blocked(f"a constant is added to what enters {operation.place}")


_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")


def declared_epsilon(module: nn.Module | None) -> float | None:
    """The epsilon that a module declares under a usual name (``eps``, ``variance_epsilon``, ...),
    the largest if there are several.

    0 for an epsilon of None, which is that of the dtype (RMSNorm). None if nothing is declared.

    Example:
        >>> declared_epsilon(nn.LayerNorm(4, eps=1e-6))
        1e-06
    """
    if module is None:
        return None
    declared = []
    for name in ("eps", *vars(module), *module._parameters, *module._buffers):
        # The plain test goes first: a module has some twenty attributes, and this runs for every
        # layer.
        if "eps" in name and _EPSILON.search(name) and hasattr(module, name):
            value = getattr(module, name)
            if value is None or isinstance(value, (int, float)):
                declared.append(float(value or 0.0))
            else:
                # A tensor is not looked at: that would wait for the device.
                declared.append(math.inf)
    return max(declared, default=None)
