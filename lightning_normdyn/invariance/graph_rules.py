r"""How a change of scale flows through the autograd graph of a loss.

Multiply row :math:`r` of a weight by :math:`c_r > 0`. What happens to a tensor :math:`T` computed
from it? For many tensors the answer is

.. math:: T_i \to c_{r(i)}^{k}\, (T_i - b_i) + b_i

with a degree :math:`k`, a row :math:`r(i)` for each entry, and an offset :math:`b` that does not
scale (a bias). A `Flow` holds this
answer, a *rule* says how one operation changes it, and `follow` walks the graph of a real loss from
the weights to the loss. Where an
operation mixes entries of several rows, these rows are united: from there on they must be scaled
together. What reaches degree 0 no
longer depends on the scale: its rows have *met* a normalization, and only such rows are claimed.
Whatever is not understood, or reaches
the loss, unites its rows with class 0, "must not be scaled". So an unknown operation can only cost
a target, never invent one, and rows
that the loss did not read (``table[:n]``, an expert without tokens) are neither: nothing is known
of them.

Nothing is run again, and no saved tensor is read that a checkpoint would have to recompute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

Shape = tuple[int, ...]
Edge = tuple[Node, int]  # one output of one operation


class Blocked(Exception):
    """Raised by a rule: the scale does not pass this operation. The message says why, in words."""


class Sign(IntEnum):
    """What is known about the values of a tensor."""

    ANY = 0
    NONNEGATIVE = 1
    STATISTIC = 2  # a norm, a variance, a mean of squares: a constant added to it is an epsilon


@dataclass(frozen=True)
class Offset:
    """Something added that does not scale with the weight.

    Args:
        varies: for each dimension of the tensor, whether the offset may differ along it.
        token: equal tokens mean equal offsets (``x - x.mean()`` has none).
        parameter: the bias it is, entry for entry along the one dimension it varies along (again
            from its start, where that is longer);
            None when it was changed on the way.
        what: it is, in words.
    """

    varies: tuple[bool, ...]
    token: Hashable
    parameter: str | None = None
    what: str = "something that does not scale"

    def changed(self, varies: Iterable[bool]) -> Offset:
        """After an operation that leaves another value, varying along ``varies``."""
        return replace(self, varies=tuple(varies), token=next(_tokens), parameter=None)


@dataclass(frozen=True)
class Flow:
    """How a tensor depends on the scales of one weight's rows.

    Args:
        degree: the power of the row's scale, e.g. 1 behind a linear layer, 2 behind its square, 0
            behind a normalization.
        rows: int64, as many dimensions as the tensor and broadcastable to it: 1 + the row each
            entry scales with, 0 for a constant entry.
        offset: what is added and does not scale, if anything.
        sign: what is known about the values.
        padded: whether a constant was added as an epsilon. That is what it is in a denominator
            only: ``1 + mean`` as a factor is none.
        other: the flow of other entries of the same tensor, which scale by another degree; ``rows``
            is 0 there. Rules never see it.
    """

    degree: float
    rows: Tensor
    offset: Offset | None = None
    sign: Sign = Sign.ANY
    padded: bool = False
    other: Flow | None = None

    @property
    def parts(self) -> list[Flow]:
        """The flow of each degree, alone."""
        return [replace(self, other=None), *(self.other.parts if self.other is not None else [])]


@dataclass
class Link:
    """A normalization with running statistics that was fed by scaled rows."""

    module: str
    rows: Tensor  # (channels,)
    degree: float
    offset: bool
    bias: str | None

    def same_as(self, other: Link, parent: Tensor) -> bool:
        """Whether both say the same (a module that is called twice), where ``parent`` is the class
        of each row."""
        facts = [(link.module, link.degree, link.offset, link.bias) for link in (self, other)]
        return facts[0] == facts[1] and torch.equal(parent[self.rows], parent[other.rows])


class Rows:
    """The rows of one weight: which have to be scaled together, and what was learnt on the way
    (union-find; class 0 must not be scaled)."""

    def __init__(self, n: int) -> None:
        self.parent = torch.arange(n + 1, dtype=torch.long, device="cpu")
        self.reasons: dict[str, None] = {}  # insertion-ordered sets
        self.norms: dict[str, None] = {}
        self.links: list[Link] = []
        self.stale: dict[str, None] = {}
        self.assumed = False  # an epsilon, a padding value or a condition was taken as harmless
        # Rows that reached an operation of degree 0. One of them may stand for its class: see
        # `reached`.
        self.met = torch.zeros(n + 1, dtype=torch.bool, device="cpu")
        # some loss read only a part of the rows: which part it is may depend on the batch
        self.varies = False
        self.picked = torch.empty(
            0, dtype=torch.long, device="cpu"
        )  # rows picked by an index tensor: the data say which rows meet
        self.veiled: dict[
            str, None
        ] = {}  # places where rows were picked by indices that cannot be looked at
        self.cut_elsewhere = (
            False  # entries were left out along a dimension that these rows are not cut along
        )
        self.sharded = torch.empty(
            0, dtype=torch.long, device="cpu"
        )  # rows of which each rank follows only its part (tensor parallelism)
        self.elsewhere = False  # and other ranks have not been asked yet

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Make entrywise partners scale together; ``reason`` is kept if this costs a row its
        freedom."""
        if a is b or (a.numel() == 1 and b.numel() == 1 and int(a) == int(b)):
            return
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        left, right = self.parent[a].flatten(), self.parent[b].flatten()
        differ = left != right
        if not differ.any():
            return
        size = len(self.parent)
        pairs = distinct(left[differ] * size + right[differ])
        left, right = pairs // size, pairs % size
        if bool(((left == 0) | (right == 0)).any()):
            self.reasons.setdefault(reason)
        while True:  # hook the larger root below the smaller, then flatten, until no pair is apart
            left, right = self.parent[left], self.parent[right]
            apart = left != right
            if not apart.any():
                return
            left, right = left[apart], right[apart]
            self.parent.scatter_reduce_(
                0, torch.maximum(left, right), torch.minimum(left, right), "amin"
            )
            while not torch.equal(flat := self.parent[self.parent], self.parent):
                self.parent = flat

    def forbid(self, rows: Tensor, reason: str) -> None:
        """These rows must not be scaled."""
        self.unite(rows, torch.zeros(1, dtype=torch.long, device="cpu"), reason)

    def link(self, link: Link) -> None:
        """Remember a normalization with running statistics, once."""
        if not any(link.same_as(known, self.parent) for known in self.links):
            self.links.append(link)

    def meet(self, rows: Tensor) -> None:
        """These rows reached an operation of degree 0."""
        self.met[rows] = True

    def pick(self, rows: Tensor) -> None:
        """These rows were picked by an index tensor."""
        self.picked = distinct(torch.cat([rows.flatten(), self.picked]))

    def reached(self) -> Tensor:
        """``(n + 1,)`` bool: rows that met a normalization, or that something forbids to scale. Of
        the others nothing is known."""
        # A rule may go on with one row for all that it has united, so one row speaks for its class.
        classes = torch.zeros_like(self.met)
        classes[self.parent[self.met]] = True
        classes[0] = True
        return classes[self.parent]

    def merge(self, other: Rows) -> None:
        """Take over what another rank learnt about the same weight: what must not be scaled
        separately there must not be here."""
        self.reasons |= other.reasons
        self.unite(
            torch.arange(len(self.parent), dtype=torch.long, device="cpu"),
            other.parent,
            next(iter(other.reasons), "another rank"),
        )
        self.norms |= other.norms
        self.stale |= other.stale
        for link in other.links:
            self.link(link)
        self.assumed |= other.assumed
        self.met |= other.met
        self.varies |= other.varies
        self.veiled |= other.veiled
        self.cut_elsewhere |= other.cut_elsewhere
        self.pick(other.picked)
        self.sharded = distinct(torch.cat([self.sharded, other.sharded]))


@dataclass(frozen=True)
class Step:
    """One operation of the graph, as plain data."""

    node: Node
    name: str
    sources: tuple[Edge | None, ...]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape, ...]

    def is_empty(self, k: int) -> bool:
        """Whether output ``k`` has no entries."""
        return k < len(self.outputs) and 0 in self.outputs[k]


class Operation:
    """One operation while the scale of one weight is followed through it: what a rule gets to see.

    ``name`` is the autograd node's name, ``inputs`` the shapes of its differentiable inputs (None:
    a constant, shape unknown), ``outputs``
    the shapes of its outputs.
    """

    def __init__(self, step: Step, rows: Rows, graph: Graph) -> None:
        self.node, self.name, self.inputs, self.outputs = (
            step.node,
            step.name,
            step.inputs,
            step.outputs,
        )
        self.rows, self._step, self._graph = rows, step, graph

    @property
    def place(self) -> str:
        """The operation and the module it ran in, for messages."""
        name, _ = self.module
        return f"{self.name} in {name}" if name else self.name

    @property
    def module(self) -> tuple[str, nn.Module | None]:
        """Name and module in whose forward (innermost) the operation was recorded; ``("", None)``
        if not known."""
        return self._graph.module_of(self.node)

    def parameter(self, k: int) -> str | None:
        """Name of the parameter that input ``k`` is, also behind a cast to another dtype."""
        edge = self._step.sources[k] if k < len(self._step.sources) else None
        while (
            edge is not None
            and edge not in self._graph.parameters
            and node_name(edge[0]) == "ToCopyBackward0"
        ):
            edge = edge[0].next_functions[0]  # type: ignore[assignment]
        return None if edge is None else self._graph.parameters.get(edge)

    def zeros(self, k: int) -> Tensor | None:
        """Which entries of input ``k``, a bias that was put together, no parameter reaches: bool
        ``(n,)``; None: not known.

        They are constants, nearly always zeros (``torch.cat([q, zeros, v])``, ``bias * mask``,
        ``bias[n : 2 * n] = 0``): taken as such, and
        the claim is marked.
        """
        edge = self._step.sources[k] if k < len(self._step.sources) else None
        shape = self.inputs[k] if k < len(self.inputs) else None
        if edge is None or shape is None or len(shape) != 1 or edge in self._graph.parameters:
            return None
        zeros = _constant_entries(edge, shape[0], self._graph.parameters)
        if zeros is not None and bool(zeros.any()):
            self.rows.assumed = True
        return zeros

    def attribute(self, name: str, default: Any = None) -> Any:
        """A saved number or list of numbers of the node (never a tensor), with negative dims as
        negative numbers."""
        value = getattr(self.node, f"_saved_{name}", default)
        if isinstance(value, (tuple, list)):
            return [signed(v) for v in value]
        return signed(value)

    def saved_tensor(self, name: str) -> tuple[bool, Any]:
        """``(readable, value)`` of a saved tensor; under saved-tensor hooks (checkpoints) reading
        would recompute, so it is not done."""
        raw = getattr(self.node, f"_raw_saved_{name}", None)
        if raw is None:
            return hasattr(self.node, f"_saved_{name}"), getattr(self.node, f"_saved_{name}", None)
        for one in raw if isinstance(raw, (tuple, list)) else (raw,):
            if getattr(one, "unpack_hook", True) is not None:
                return False, None
        return True, getattr(self.node, f"_saved_{name}")

    def same_factor(self, rows: Tensor, dims: Iterable[int]) -> Tensor:
        """Along ``dims`` all entries must share one factor from here on; returns ``rows`` with size
        1 there."""
        for dim in dims:
            if rows.size(dim) > 1:
                first = rows.narrow(dim, 0, 1)
                self.rows.unite(
                    rows, first, f"{self.place} mixes entries that scale with entries that do not"
                )
                rows = first
        return rows

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

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """The entries of ``a`` and ``b`` (broadcast) must share factors; returns the smaller (they
        are one from here on)."""
        self.rows.unite(a, b, f"{self.place} combines entries that scale with entries that do not")
        return a if a.numel() <= b.numel() else b

    def normalized(self, flow: Flow, dims: Iterable[int], *, centered: bool = True) -> Flow:
        """The result of a normalization over ``dims``; ``centered``: it removes a common offset,
        too (LayerNorm, but not RMSNorm)."""
        if not centered:
            pure(self, flow)
        _refuse_padded(self, flow)
        dims = [d % flow.rows.ndim for d in dims]
        if flow.offset is not None and any(flow.offset.varies[d] for d in dims):
            raise Blocked(
                f"{flow.offset.what} is added before {self.place} and differs within what is "
                f"normalized together"
            )
        return Flow(0, self.same_factor(flow.rows, dims))

    def forgive(self, flow: Flow, what: str) -> Flow:
        """A constant beside a statistic is an epsilon: passed on, but the claim then rests on its
        smallness. Anything else is blocked."""
        if flow.sign != Sign.STATISTIC or flow.offset is not None or flow.degree < 0:
            raise Blocked(f"{what} in {self.place}")
        if not self.small_epsilon():
            self.rows.assumed = True
        return replace(flow, padded=True)

    def sign(self, k: int) -> Sign:
        """What is known of the values of input ``k``, whether they scale or not."""
        edge = self._step.sources[k] if k < len(self._step.sources) else None
        return Sign.ANY if edge is None else self._graph.signs.get(edge, Sign.ANY)

    def small_epsilon(self) -> bool:
        """Whether the operation is part of a module that declares an epsilon that is small beside a
        variance of order 1."""
        eps = declared_epsilon(self.module[1])
        return eps is not None and eps <= 1e-3


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
        sizes = [None if source is None else _shape(source)[0] for source in sources]
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
    if below is None or _shape(below) != (size,):
        return None
    output, parameter = (
        torch.autograd.graph.GradientEdge(*edge),
        torch.autograd.graph.GradientEdge(*below),
    )
    metadata = edge[0]._input_metadata[edge[1]]
    ones = torch.ones(size, dtype=metadata.dtype, device=metadata.device)
    (passed,) = torch.autograd.grad([output], [parameter], [ones], retain_graph=True)
    return (passed == 0).cpu()


_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")


def declared_epsilon(module: nn.Module | None) -> float | None:
    """The epsilon that a module declares under a usual name (``eps``, ``variance_epsilon``, ...),
    the largest if there are several.

    0 for an epsilon of None, which is that of the dtype (RMSNorm). None if nothing is declared.

    Example:
        >>> declared_epsilon(torch.nn.LayerNorm(4, eps=1e-6))
        1e-06
    """
    if module is None:
        return None
    found = []
    for name in ("eps", *vars(module), *module._parameters, *module._buffers):
        if _EPSILON.search(name) and hasattr(module, name):
            value = getattr(module, name)
            known = value is None or isinstance(value, (int, float))
            found.append(float(value or 0.0) if known else math.inf)  # a tensor is not looked at
    return max(found, default=None)


Rule = Callable[[Operation, Sequence["Flow | None"]], "Flow | Sequence[Flow | None] | None"]
RULES: dict[str, Rule] = {}


def register_rule(node_name: str, rule: Rule) -> None:
    """Tell the target search how a scale passes an operation it does not know, e.g. a custom
    ``torch.autograd.Function``.

    Args:
        node_name: name of the autograd node, as ``tensor.grad_fn.name()`` gives it: the function's
            class name with ``Backward`` appended.
        rule: called as ``rule(operation, flows)`` with one `Flow` (or None: does not depend on the
            weight) for each differentiable input.
            Returns the flow of the output, or a list with one for each output, or raises `Blocked`
            with a reason. ``homogeneous`` is
            a ready-made rule for :math:`f(cx) = c f(x)`; ``operation.normalized(flow, dims)`` is
            the result of a normalization.

    Example:
        A custom root-mean-square normalization over the last axis:

        >>> class RootMeanSquare(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x / x.pow(2).mean(-1, keepdim=True).sqrt()
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         raise NotImplementedError
        >>> RootMeanSquare.apply(torch.ones(2, 3, requires_grad=True)).grad_fn.name()
        'RootMeanSquareBackward'
        >>> register_rule("RootMeanSquareBackward", lambda operation, flows: operation.normalized(flows[0], [-1], centered=False))
        >>> del RULES["RootMeanSquareBackward"]  # a rule holds for the whole process; this example takes its own back
    """
    if not isinstance(node_name, str) or not node_name:
        raise ValueError(f"`node_name` must be the name of an autograd node, got {node_name!r}.")
    if not callable(rule):
        raise ValueError(f"`rule` must be callable as rule(operation, flows), got {rule!r}.")
    RULES[node_name] = rule


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


# ----------------------------------------------------------------------------------------- the walk


OPAQUE = (
    "CompiledFunctionBackward",
    "CheckpointFunctionBackward",
)  # a whole subgraph in one node, with weights that no edge shows


@dataclass
class Graph:
    """The operations between some parameters and a loss, inputs first."""

    root: Edge
    parameters: Mapping[Edge, str]
    steps: list[Step] = field(default_factory=list)
    shapes: dict[Edge, Shape] = field(default_factory=dict)  # of the parameters that occur
    module_of: Callable[[Node], tuple[str, nn.Module | None]] = lambda node: ("", None)
    signs: dict[Edge, Sign] = field(
        default_factory=dict
    )  # what is known of the values, whatever they were computed from; else ANY

    @property
    def opaque(self) -> list[str]:
        """Operations that hide others."""
        return sorted({step.name for step in self.steps if step.name in OPAQUE})


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
        inputs = tuple(None if source is None else _shape(source) for source in sources)
        for source, shape in zip(sources, inputs, strict=True):
            if source is not None and shape is not None and source in parameters:
                graph.shapes[source] = shape
        step = Step(
            node,
            node_name(node),
            sources,
            inputs,
            tuple(tuple(m.shape) for m in node._input_metadata),
        )
        graph.steps.append(step)
        sign = _sign_of_result(
            step, [graph.signs.get(s, Sign.ANY) if s is not None else Sign.ANY for s in sources]
        )
        padding = _padding_of_result(step, paddings, graph.signs)
        if padding is not None and step.name == "SliceBackward0" and padding.start == 0:
            sign = max(sign, padding.sign)
        elif padding is not None:
            paddings[node, 0] = padding
        if sign != Sign.ANY:
            graph.signs.update({(node, k): sign for k in range(len(step.outputs))})
    return graph


def _sign_of_result(step: Step, inputs: Sequence[Sign]) -> Sign:
    """What is known of the values that an operation gives."""
    name = step.name
    if name in _NEVER_NEGATIVE:
        return Sign.NONNEGATIVE
    if not inputs:
        return Sign.ANY
    lowest = min(inputs)
    square = len(inputs) == 2 and step.sources[0] is not None and step.sources[0] == step.sources[1]
    if name.startswith("Mul") and square:
        return Sign.NONNEGATIVE
    if name in (
        "MmBackward0",
        "BmmBackward0",
        "SumBackward0",
        "SumBackward1",
        "MeanBackward0",
        "MeanBackward1",
        "DotBackward0",
    ):
        return (
            Sign.STATISTIC
            if lowest != Sign.ANY or (square and name == "DotBackward0")
            else Sign.ANY
        )
    if name.startswith(("Mul", "Div")):
        return Sign.NONNEGATIVE if len(inputs) == 2 and lowest != Sign.ANY else Sign.ANY
    return (
        lowest if (name.startswith("Add") and len(inputs) == 2) or name in _KEEPS_SIGN else Sign.ANY
    )


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


def _padding_of_result(
    step: Step, paddings: Mapping[Edge, Padding], signs: Mapping[Edge, Sign]
) -> Padding | None:
    """The padded entries of what an operation gives. After a slice, ``start`` is 0 where nothing
    else is left.

    Linear attention appends ones to its values, so that one product gives the sums of what is
    attended to and of the attention.
    """
    node, name, shapes, outputs = step.node, step.name, step.inputs, step.outputs
    if name == "ConstantPadNdBackward0" and shapes[0] is not None:
        padded = [(k, amount) for k, amount in enumerate(map(signed, node._saved_pad)) if amount]  # type: ignore[attr-defined]
        if (
            len(padded) == 1 and padded[0][0] in (1, 3) and padded[0][1] > 0
        ):  # at the end of one of the last two dimensions
            dim = -1 - padded[0][0] // 2
            return Padding(dim, shapes[0][dim], Sign.NONNEGATIVE)
        return None
    found = [paddings.get(source) if source is not None else None for source in step.sources]
    if name in ("MmBackward0", "BmmBackward0"):
        for k, dim in ((0, -2), (1, -1)):
            padding, factor = found[k], step.sources[1 - k]
            if (
                padding is not None
                and padding.dim == dim
                and factor is not None
                and signs.get(factor, Sign.ANY) != Sign.ANY
            ):
                return replace(padding, sign=Sign.STATISTIC)
        return None
    if len(found) != 1 or found[0] is None or shapes[0] is None or len(outputs[0]) < 2:
        return None
    padding, ndim = found[0], len(outputs[0])
    if name in ("TransposeBackward0", "TBackward0"):
        swapped = (
            {-1, -2}
            if name == "TBackward0"
            else {_from_the_right(node, key, ndim) for key in ("dim0", "dim1")}
        )
        if padding.dim not in swapped:
            return padding
        return replace(padding, dim=-3 - padding.dim) if swapped == {-1, -2} else None
    if name == "SliceBackward0" and _from_the_right(node, "dim", ndim) == padding.dim:
        start = signed(node._saved_start or 0)  # type: ignore[attr-defined]
        start = start + shapes[0][padding.dim] if start < 0 else start
        return replace(padding, start=0) if start >= padding.start else None
    same_end = shapes[0][-2:] == outputs[0][-2:]
    views = (
        "CloneBackward0",
        "ToCopyBackward0",
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "ExpandBackward0",
    )
    return padding if name in views and same_end else None


def _from_the_right(node: Node, key: str, ndim: int) -> int:
    dim = int(signed(getattr(node, f"_saved_{key}")))
    return dim - ndim if dim >= 0 else dim


_NEVER_NEGATIVE = (
    "ReluBackward0", "AbsBackward0", "SigmoidBackward0", "ExpBackward0", "SoftplusBackward0", "SoftmaxBackward0", "SafeSoftmaxBackward0",
)  # fmt: skip
_KEEPS_SIGN = (
    "CloneBackward0", "ToCopyBackward0", "AliasBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0",
    "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "TransposeBackward0", "TBackward0",
    "PermuteBackward0",
    "ExpandBackward0", "RepeatBackward0", "SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0",
    "UnbindBackward0", "CatBackward0", "StackBackward0", "IndexBackward0", "IndexSelectBackward0", "ConstantPadNdBackward0",
    "SqrtBackward0", "NativeDropoutBackward0",
)  # fmt: skip


def follow(graph: Graph, leaves: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> None:
    """Walk ``graph`` once; what is learnt about each weight is left in its `Rows`.

    Args:
        graph: from `trace`.
        leaves: for each weight to follow, 1 + the row of each entry, broadcastable to its shape.
        rows: for each of these weights its `Rows`.
    """
    flows: dict[Edge, dict[str, Flow]] = {
        edge: {name: Flow(1, leaves[name])}
        for edge, name in graph.parameters.items()
        if name in leaves and edge in graph.shapes
    }
    met_before = {name: rows[name].met for name in leaves}
    for name in leaves:
        rows[name].met = torch.zeros_like(met_before[name])
    for step in graph.steps:
        incoming = [flows.get(source, {}) if source is not None else {} for source in step.sources]
        names = dict.fromkeys(name for flow in incoming for name in flow)
        if all(step.is_empty(k) for k in range(len(step.outputs))):
            continue  # an expert without tokens: no entry of its weight reaches the loss
        for name in names:
            entering = [flow.get(name) for flow in incoming]
            operation = Operation(step, rows[name], graph)
            try:
                leaving = _apply(operation, entering)
            except Blocked as blocked:
                for flow in entering:
                    for part in [] if flow is None else flow.parts:
                        rows[name].forbid(part.rows, str(blocked))
                continue
            for k, flow in enumerate(leaving):
                if flow is None or step.is_empty(k):
                    continue
                scaling = []
                for part in flow.parts:
                    degree = round(part.degree, 9)  # thirds and such
                    if not bool(part.rows.any()):  # nothing of the weight is in it
                        continue
                    if degree != 0:
                        sign = max(part.sign, graph.signs.get((step.node, k), Sign.ANY))
                        scaling.append(replace(part, degree=degree, sign=sign))
                    else:
                        rows[name].meet(part.rows)
                        rows[name].norms.setdefault(_normalization_name(operation))
                if scaling:
                    flows.setdefault((step.node, k), {})[name] = _joined(scaling)
    for name, flow in flows.get(graph.root, {}).items():
        for part in flow.parts:
            rows[name].forbid(part.rows, "its scale reaches the loss")
    for name, before in met_before.items():
        # Under tensor parallelism other ranks hold the rest of the rows.
        rows[name].varies |= not rows[name].elsewhere and not bool(rows[name].reached().all())
        rows[name].met |= before


def _joined(parts: Sequence[Flow]) -> Flow:
    """One flow of parts that scale by different degrees."""
    first, *rest = parts
    return replace(first, other=_joined(rest)) if rest else first


def _apply(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow | None]:
    """What leaves an operation, also where entries of one tensor scale by different degrees."""
    if all(flow is None or flow.other is None for flow in flows):
        return _apply_rule(operation, flows)
    present = [k for k, flow in enumerate(flows) if flow is not None]
    if len(present) > 1:
        if operation.name not in ("MmBackward0", "BmmBackward0"):
            raise Blocked(f"{operation.place} combines entries that scale differently")
        return _apply_rule(operation, flows)
    (k,) = present
    flow = flows[k]
    assert flow is not None
    results = [
        _apply_rule(operation, [part if i == k else None for i in range(len(flows))])
        for part in flow.parts
    ]
    leaving: list[Flow | None] = []
    for outputs in zip(*results, strict=True):
        parts = [output for output in outputs if output is not None]
        leaving.append(_joined(parts) if parts else None)
    return leaving


def _apply_rule(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow | None]:
    rule = RULES.get(operation.name)
    if rule is None:
        raise Blocked(_why_not(operation))
    try:
        result = rule(operation, flows)
    except Blocked:
        raise
    except (
        Exception
    ) as error:  # a rule that meets something unforeseen costs a target, not a training run
        raise Blocked(
            f"the rule for {operation.place} failed ({type(error).__name__}: {error})"
        ) from None
    return result if isinstance(result, (list, tuple)) else [result]  # type: ignore[list-item]


def _why_not(operation: Operation) -> str:
    """Why the scale does not pass an operation without a rule."""
    kind = re.sub(r"(AutogradNestedTensor)?Backward(AutogradNestedTensor)?\d*$", "", operation.name)
    if kind in NOT_HOMOGENEOUS.split():
        return f"{operation.place} does not commute with a change of scale"
    for what, kinds in NOT_FOLLOWED.items():
        if kind in kinds.split() or ("Linalg" in kinds and kind.startswith("Linalg")):
            return f"{operation.place} {what}"
    if "Nested" in operation.name:
        return f"{operation.place} works on a nested tensor, whose rows are not followed"
    return f"no rule for {operation.place} (`register_rule` adds one)"


def _normalization_name(operation: Operation) -> str:
    """The normalization module, or the node that did it by hand and the module it happened in."""
    name, module = operation.module
    by_hand = (
        module is None
        or any(True for _ in module.children())
        or any(p.ndim > 1 for p in module.parameters(recurse=False))
    )
    return operation.place if by_hand else name


def node_name(node: Node) -> str:
    """A node's name without C++ namespaces."""
    return node.name().split("::")[-1]


def _shape(edge: Edge) -> Shape:
    node, k = edge
    return tuple(node._input_metadata[k].shape) if k < len(node._input_metadata) else ()


def distinct(values: Tensor) -> Tensor:
    """The distinct values of an int64 tensor, ascending."""
    return values.unique()  # type: ignore[no-untyped-call,no-any-return]


def signed(value: Any) -> Any:
    """Negative dims are saved as uint64: undo that."""
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


# ----------------------------------------------------------------------------- helpers of the rules

_tokens = count()


def new_offset(
    varies: Iterable[bool],
    parameter: str | None = None,
    what: str = "something that does not scale",
) -> Offset:
    """An offset that equals no other, unless it is the same parameter along the same dimension,
    counted from the right."""
    varies = tuple(varies)
    token = (
        (parameter, varies[varies.index(True) :]) if parameter and any(varies) else next(_tokens)
    )
    return Offset(varies, token, parameter, f"bias {parameter}" if parameter else what)


def lift(flow: Flow, ndim: int) -> Flow:
    """Broadcasting: dimensions of size 1 in front."""
    missing = ndim - flow.rows.ndim
    if missing <= 0:
        return flow
    offset = flow.offset and replace(flow.offset, varies=(False,) * missing + flow.offset.varies)
    return replace(
        flow, rows=flow.rows.reshape((1,) * missing + tuple(flow.rows.shape)), offset=offset
    )


def varying(shape: Shape | None, ndim: int) -> tuple[bool, ...]:
    """Along which of ``ndim`` dimensions a broadcast tensor of this shape may vary; unknown shape:
    along all."""
    if shape is None:
        return (True,) * ndim
    return (*[False] * (ndim - len(shape)), *(n > 1 for n in shape))


def either(a: Iterable[bool], b: Iterable[bool]) -> tuple[bool, ...]:
    """Entrywise or."""
    return tuple(x or y for x, y in zip(a, b, strict=True))


def only(operation: Operation, flows: Sequence[Flow | None], k: int = 0) -> Flow:
    """The flow of input ``k``, if no other input depends on the weight."""
    flow = flows[k] if k < len(flows) else None
    if flow is None or any(f is not None for i, f in enumerate(flows) if i != k):
        raise Blocked(f"the scale enters {operation.place} by a side input")
    return flow


def pure(operation: Operation, flow: Flow) -> Flow:
    """The flow, if nothing constant was added to it."""
    if flow.offset is not None:
        raise Blocked(f"{flow.offset.what} is added before {operation.place}")
    return flow


def _refuse_padded(operation: Operation, flow: Flow) -> None:
    """A constant beside a statistic is an epsilon in a denominator; where it enters as a value, it
    is a value that does not scale."""
    if flow.padded:
        raise Blocked(f"a constant is added to what enters {operation.place}")


def expanded(rows: Tensor, shape: Shape, dims: Iterable[int]) -> Tensor:
    """``rows`` with its full size along ``dims``."""
    dims = {d % len(shape) for d in dims}
    return rows.expand([shape[d] if d in dims else rows.size(d) for d in range(len(shape))])


def compact(rows: Tensor) -> Tensor:
    """Size 1 along every dimension along which nothing differs."""
    for dim in range(rows.ndim):
        if rows.size(dim) > 1:
            first = rows.narrow(dim, 0, 1)
            if rows.stride(dim) == 0 or bool((first == rows).all()):
                rows = first
    return rows


def _blocks(old: Shape, new: Shape) -> Iterable[tuple[range, range]]:
    """Pairs of dimension ranges that a reshape maps onto each other (equal products, as short as
    possible)."""
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j, size_i, size_j = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        yield range(start_i, i), range(start_j, j)
    if i < len(old) or j < len(new):  # what is left has size 1
        yield range(i, len(old)), range(j, len(new))


def reshaped(flow: Flow, old: Shape, new: Shape) -> Flow:
    """A view or reshape. Blocks of dimensions along which nothing differs are never expanded."""
    if 0 in old:
        return Flow(
            flow.degree,
            flow.rows.flatten()[:1].reshape((1,) * len(new)),
            flow.offset and flow.offset.changed([True] * len(new)),
            flow.sign,
        )
    full, result, varies = list(flow.rows.shape), [1] * len(new), [False] * len(new)
    parameter = flow.offset.parameter if flow.offset is not None else None
    for before, after in _blocks(old, new):
        if any(flow.rows.size(d) > 1 for d in before):
            for d in before:
                full[d] = old[d]
            for d in after:
                result[d] = new[d]
        if flow.offset and any(flow.offset.varies[d] for d in before):
            for d in after:
                varies[d] = new[d] > 1
            periodic = (
                not any(flow.offset.varies[d] for d in before[:-1])
                and sum(new[d] > 1 for d in after) == 1
                and new[after[-1]] > 1
            )
            parameter = parameter if periodic else None
    offset = None
    if (
        flow.offset is not None
        # broadcasting aligns at the right: what happens in front of the dims it varies along
        # changes
        # nothing
    ):
        tail = len(old) - flow.offset.varies.index(True) if any(flow.offset.varies) else 0
        token = (
            flow.offset.token
            if old[len(old) - tail :] == new[len(new) - tail :]
            else (flow.offset.token, new)
        )
        offset = replace(flow.offset, varies=tuple(varies), token=token, parameter=parameter)
    return replace(flow, rows=compact(flow.rows.expand(full).reshape(result)), offset=offset)


def permuted(flow: Flow, dims: Sequence[int]) -> Flow:
    """A permutation of dimensions."""
    dims = [d % flow.rows.ndim for d in dims]
    offset = flow.offset
    if offset is not None:
        offset = replace(
            offset, varies=tuple(offset.varies[d] for d in dims), token=(offset.token, tuple(dims))
        )
    return replace(flow, rows=flow.rows.permute(dims), offset=offset)


def moved(flow: Flow, rows: Tensor, dims: Iterable[int]) -> Flow:
    """The flow after entries were moved or picked along ``dims``: new rows, and another offset if
    it differs along them."""
    offset = flow.offset
    if offset is not None and any(offset.varies[d] for d in dims):
        offset = offset.changed(offset.varies)
    return replace(flow, rows=rows, offset=offset)


def without_dim(offset: Offset | None, dim: int) -> Offset | None:
    """The offset at one index of ``dim``."""
    if offset is None:
        return None
    varies = [v for d, v in enumerate(offset.varies) if d != dim]
    if offset.varies[dim]:
        return offset.changed(varies)
    # Broadcasting aligns at the right: a dimension that goes in front of those it varies along
    # changes nothing.
    token = offset.token if not any(offset.varies[:dim]) else next(_tokens)
    return replace(offset, varies=tuple(varies), token=token)


def everywhere(flow: Flow) -> Offset | None:
    """The offset after an operation that may make it differ anywhere."""
    return flow.offset and flow.offset.changed([True] * flow.rows.ndim)


# -------------------------------------------------------------------------------------- elementwise

NOT_HOMOGENEOUS = """
    Softmax LogSoftmax SafeSoftmax MaskedSoftmax SparseSoftmax SparseLogSoftmax Logsumexp Logcumsumexp Logaddexp Logaddexp2
    Gelu Silu Sigmoid Tanh Softplus Elu Celu Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink Mish LogSigmoid Logit Threshold
    Exp Exp2 Expm1 Log Log2 Log10 Log1P Xlogy SpecialXlog1Py SpecialEntr Erf Erfc Erfinv SpecialErfcx SpecialLogNdtr SpecialNdtri
    Sin Cos Tan Sinc Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Lgamma Digamma Polygamma Mvlgamma I0 SpecialI0E SpecialI1 SpecialI1E
    Prod Cumprod Round Floor Ceil Trunc Frac Fmod Remainder Renorm
    NllLoss NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits SoftMarginLoss MultiMarginLoss
    MultilabelMarginLoss CtcLoss CudnnCtcLoss MiopenCtcLoss
"""
NOT_FOLLOWED = {
    "is a whole recurrent layer, whose gates do not commute with a change of scale": """
        MkldnnRnnLayer CudnnRnn MiopenRnn LstmMps ThnnFusedLstmCell ThnnFusedGruCell
    """,
    "writes into a part of a tensor in place (`x[i] = y`), and that is not followed": """
        CopySlices SelectScatter SliceScatter DiagonalScatter AsStridedScatter MaskedScatter Scatter IndexCopy IndexFill Put Fill
    """,
    "reads memory in another layout (`as_strided`), and rows are not followed through it": "AsStrided",
    "multiplies groups of rows with one matrix each (experts), and rows are not followed through it": "GroupedMm ScaledGroupedMm ForeachMm",
    "is a Fourier transform, and complex numbers are not followed": "FftC2C FftR2C FftC2R",
    "computes with complex numbers, and these are not followed": "ViewAsComplex ViewAsReal Complex Conj ConjPhysical Angle Polar",
    "factors, inverts or solves with a matrix, and rows are not followed through it": """
        Linalg Cholesky CholeskyInverse CholeskySolve Geqrf Ormqr LuUnpack TriangularSolve
    """,
    "changes the layout of a sparse tensor, and rows are not followed through it": """
        ToSparse ToSparseCsr ToSparseCsc ToSparseBsr ToSparseBsc ToDense ToPaddedTensor Coalesce Values SparseMask SparseSum
    """,
}
"""What operations without a rule are, in words that follow their name."""


@_rule(
    "CloneBackward0", "ToCopyBackward0", "AliasBackward0", "NegBackward0",
    "_DDPSinkBackward", "RegisterPostBackwardFunctionBackward", "RegisterPreBackwardFunctionBackward", "RedistributeBackward",
    "NestedRedistributeBackward", "PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward",
)  # fmt: skip
def unchanged(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow | None]:
    """Copies, casts, and the marks that strategies leave in the graph: input k becomes output k."""
    if operation.name == "NegBackward0":
        return [
            flow
            and replace(
                flow, sign=Sign.ANY, offset=flow.offset and flow.offset.changed(flow.offset.varies)
            )
            for flow in flows
        ]
    return flows


@_rule(
    "ReluBackward0", "LeakyReluBackward0", "LeakyReluBackward1", "PreluKernelBackward0", "RreluWithNoiseBackward0", "AbsBackward0",
)  # fmt: skip
def homogeneous(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """An elementwise function with :math:`f(cx) = c f(x)` for c > 0."""
    flow = pure(operation, only(operation, flows))
    nonnegative = operation.name.startswith(("Relu", "Abs"))
    return replace(flow, sign=max(flow.sign, Sign.NONNEGATIVE) if nonnegative else flow.sign)


@_rule("SignBackward0", "SgnBackward0")
def _sign(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return Flow(0, pure(operation, only(operation, flows)).rows)


@_rule("NativeDropoutBackward0", "FusedDropoutBackward0", "TrilBackward0", "TriuBackward0")
def _masked(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    return replace(flow, offset=everywhere(flow))


@_rule("MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1")
def _multiply(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim, power = len(operation.outputs[0]), -1 if operation.name.startswith("Div") else 1
    a, b = (flow and lift(flow, ndim) for flow in [*flows, None][:2])
    if (a is not None and b is not None and a.padded) or (
        power == 1 and a is not None and b is not None and b.padded
    ):
        raise Blocked(f"a constant is added to a factor in {operation.place}")
    if a is not None and b is not None:
        rows = operation.unite(pure(operation, a).rows, pure(operation, b).rows)
        square = operation.node.next_functions[0] == operation.node.next_functions[1]
        nonnegative = square or min(a.sign, b.sign) != Sign.ANY
        return Flow(
            a.degree + power * b.degree, rows, sign=Sign.NONNEGATIVE if nonnegative else Sign.ANY
        )
    if a is None and b is not None and power == -1:
        return Flow(-b.degree, pure(operation, b).rows)
    flow = a if a is not None else b
    assert flow is not None
    other: Shape | None = ()  # the overload with a python number
    if len(flows) > 1:
        other = operation.inputs[1 if a is not None else 0]
    if other is None and flow.offset is not None:  # a constant: saved for the backward
        readable, saved = operation.saved_tensor("other" if a is not None else "self")
        other = tuple(saved.shape) if readable and isinstance(saved, Tensor) else None
    offset = flow.offset and flow.offset.changed(either(flow.offset.varies, varying(other, ndim)))
    sign: Sign = (
        flow.sign if flow.sign == Sign.STATISTIC else Sign.ANY
    )  # a multiple is still padded
    if (
        flow.sign == Sign.NONNEGATIVE
        and len(flows) > 1
        and operation.sign(1 if a is not None else 0) != Sign.ANY
    ):
        sign = Sign.NONNEGATIVE
    return replace(flow, offset=offset, sign=sign)


@_rule(
    "AddBackward0",
    "AddBackward1",
    "SubBackward0",
    "SubBackward1",
    "RsubBackward0",
    "RsubBackward1",
    "LerpBackward0",
)
def _add(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim = len(operation.outputs[0])
    a, b = (flow and lift(flow, ndim) for flow in [*flows, None][:2])
    if a is not None and b is not None:
        if a.degree != b.degree:
            raise Blocked(f"{operation.place} adds tensors that scale differently")
        offset = a.offset or b.offset
        if a.offset is not None and b.offset is not None:
            plain = operation.name.startswith("Sub") and operation.attribute("alpha", 1) == 1
            same = plain and a.offset.token == b.offset.token  # x - mean(x): what was added cancels
            offset = None if same else a.offset.changed(either(a.offset.varies, b.offset.varies))
        elif offset is not None:
            offset = offset.changed(offset.varies)
        sign = min(a.sign, b.sign) if operation.name.startswith("Add") else Sign.ANY
        return Flow(a.degree, operation.unite(a.rows, b.rows), offset, sign, a.padded or b.padded)
    k = 1 if a is not None else 0
    flow = a if a is not None else b
    assert flow is not None
    if len(flows) == 1:  # a python number
        return (
            operation.forgive(flow, "")
            if flow.sign == Sign.STATISTIC
            else _shifted(flow, (False,) * ndim, None)
        )
    other = operation.inputs[k]
    if other is None:
        return operation.forgive(flow, "a constant is added")
    if len(other) > 1 and math.prod(other) == math.prod(operation.outputs[0]):
        raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
    keep = operation.name.startswith("Add") and operation.attribute("alpha", 1) == 1
    if (
        len(other) == 1
        and (parts := _without_bias_in_part(operation, flow, k, ndim - 1)) is not None
    ):
        return parts
    return _shifted(flow, varying(other, ndim), operation.parameter(k) if keep else None)


def _shifted(flow: Flow, varies: tuple[bool, ...], parameter: str | None) -> Flow:
    """The flow plus something constant."""
    offset = new_offset(varies, parameter if sum(varies) == 1 else None)
    if flow.offset is not None:
        offset = flow.offset.changed(either(varies, flow.offset.varies))
    return replace(flow, offset=offset, sign=Sign.ANY)


@_rule("MaximumBackward0", "MinimumBackward0", "WhereBackward0")
def _choice(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = (flow and lift(flow, len(operation.outputs[0])) for flow in flows)
    if a is None or b is None:
        flow = a if a is not None else b
        assert flow is not None
        return operation.forgive(flow, "chosen between it and something that does not scale")
    if pure(operation, a).degree != pure(operation, b).degree:
        raise Blocked(f"{operation.place} chooses between tensors that scale differently")
    if operation.name == "WhereBackward0":
        operation.rows.assumed = True  # the condition is not part of the graph
    return Flow(a.degree, operation.unite(a.rows, b.rows), sign=min(a.sign, b.sign))


@_rule("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMinBackward1")
def _clamp(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    if len(flows) == 1:
        low, high = operation.attribute("min"), operation.attribute("max")
        if low == 0 and high is None:
            return replace(pure(operation, flow), sign=max(flow.sign, Sign.NONNEGATIVE))
    if len(flows) == 3 or (len(flows) == 1 and high is not None):
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    return operation.forgive(flow, "values are cut off")


@_rule("PowBackward0", "SqrtBackward0", "RsqrtBackward0", "ReciprocalBackward0")
def _power(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = pure(operation, only(operation, flows))
    exponents = {"SqrtBackward0": 0.5, "RsqrtBackward0": -0.5, "ReciprocalBackward0": -1.0}
    exponent = (
        exponents[operation.name]
        if operation.name in exponents
        else float(operation.attribute("exponent"))
    )
    sign = max(flow.sign, Sign.NONNEGATIVE) if exponent % 2 == 0 else flow.sign
    return replace(
        flow, degree=flow.degree * exponent, sign=sign, padded=flow.padded and exponent > 0
    )


# -------------------------------------------------------------------------------------------- views


@_rule(
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2",
)  # fmt: skip
def _view(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return reshaped(only(operation, flows), _known(operation.inputs[0]), operation.outputs[0])


def _known(shape: Shape | None) -> Shape:
    assert shape is not None  # an input with a flow requires grad, so its shape is known
    return shape


@_rule("TransposeBackward0", "TBackward0", "PermuteBackward0")
def _permute(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    dims = list(range(flow.rows.ndim))
    if operation.name == "PermuteBackward0":
        return permuted(flow, operation.attribute("dims"))
    if operation.name == "TBackward0":
        return permuted(flow, dims[::-1])
    i, j = operation.attribute("dim0"), operation.attribute("dim1")
    dims[i], dims[j] = dims[j], dims[i]
    return permuted(flow, dims)


@_rule("ExpandBackward0")
def _expand(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return lift(only(operation, flows), len(operation.outputs[0]))


@_rule("RepeatBackward0")
def _repeat(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = lift(only(operation, flows), len(operation.outputs[0]))
    rows = flow.rows.repeat(
        [r if flow.rows.size(d) > 1 else 1 for d, r in enumerate(operation.attribute("repeats"))]
    )
    return moved(flow, rows, range(rows.ndim))


@_rule("SelectBackward0")
def _select(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(_known(operation.inputs[0])),
    )
    operation.left_out(flow, [dim])
    rows = flow.rows.select(dim, operation.attribute("index") if flow.rows.size(dim) > 1 else 0)
    return replace(flow, rows=rows, offset=without_dim(flow.offset, dim))


@_rule("SliceBackward0")
def _slice(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(_known(operation.inputs[0])),
    )
    if operation.outputs[0][dim] < _known(operation.inputs[0])[dim]:
        operation.left_out(flow, [dim])
    if flow.rows.size(dim) == 1:
        return moved(flow, flow.rows, [dim])
    start = operation.attribute("start") or 0
    size, length, step = (
        _known(operation.inputs[0])[dim],
        operation.outputs[0][dim],
        operation.attribute("step"),
    )
    start = max(0, start + size) if start < 0 else min(start, size)
    index = start + step * torch.arange(length, dtype=torch.long, device="cpu")
    return moved(flow, flow.rows.index_select(dim, index), [dim])


@_rule("SplitBackward0", "SplitWithSizesBackward0", "ChunkBackward0", "UnbindBackward0")
def _split(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow]:
    flow, dim = (
        only(operation, flows),
        operation.attribute("dim") % len(_known(operation.inputs[0])),
    )
    operation.left_out(flow, [dim])  # a piece may be used nowhere
    if operation.name == "UnbindBackward0":
        pieces, offset = (
            expanded(flow.rows, _known(operation.inputs[0]), [dim]).unbind(dim),
            without_dim(flow.offset, dim),
        )
        differs = flow.offset is not None and flow.offset.varies[dim]
        return [
            replace(
                flow,
                rows=piece,
                offset=offset.changed(offset.varies) if offset and differs else offset,
            )
            for piece in pieces
        ]
    if flow.rows.size(dim) == 1:
        return [moved(flow, flow.rows, [dim]) for _ in operation.outputs]
    return [
        moved(flow, piece, [dim])
        for piece in torch.split_with_sizes(
            flow.rows, [shape[dim] for shape in operation.outputs], dim
        )
    ]


@_rule("CatBackward0", "StackBackward0")
def _cat(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    present = [flow for flow in flows if flow is not None]
    ndim, stack = len(operation.outputs[0]), operation.name == "StackBackward0"
    dim = operation.attribute("dim") % ndim
    if len({flow.degree for flow in present}) > 1:
        raise Blocked(f"{operation.place} joins tensors that scale differently")
    known = 0 if stack else sum(shape[dim] for shape in operation.inputs if shape is not None)
    if (
        not stack and sum(shape is None for shape in operation.inputs) > 1
    ):  # one constant takes what the others leave
        raise Blocked(f"{operation.place} joins several constants of unknown size")
    pieces = []
    for flow, shape in zip(flows, operation.inputs, strict=True):
        size = (
            1 if stack else shape[dim] if shape is not None else operation.outputs[0][dim] - known
        )
        rows = (
            torch.zeros([1] * ndim, dtype=torch.long, device="cpu")
            if flow is None
            else flow.rows.unsqueeze(dim)
            if stack
            else flow.rows
        )
        pieces.append(rows.expand([size if d == dim else n for d, n in enumerate(rows.shape)]))
    common = [max(piece.size(d) for piece in pieces) for d in range(ndim)]
    rows = torch.cat(
        [
            piece.expand([piece.size(d) if d == dim else n for d, n in enumerate(common)])
            for piece in pieces
        ],
        dim,
    )
    offset = None
    offsets = [flow.offset for flow in present if flow.offset is not None]
    if (
        len(offsets) == len(flows)
        and len({o.token for o in offsets}) == 1
        and (stack or not offsets[0].varies[dim])
    ):
        same = offsets[0]
        if stack:
            token = same.token if not any(same.varies[:dim]) else next(_tokens)
            same = replace(
                same, varies=(*same.varies[:dim], False, *same.varies[dim:]), token=token
            )
        return Flow(present[0].degree, compact(rows), same, min(flow.sign for flow in present))
    for flow in present:
        if flow.offset is not None:
            varies = (
                *flow.offset.varies[:dim],
                True,
                *flow.offset.varies[dim if stack else dim + 1 :],
            )
            offset = flow.offset.changed(
                varies if offset is None else either(varies, offset.varies)
            )
    return Flow(
        present[0].degree,
        compact(rows),
        offset,
        min(flow.sign for flow in present) if len(present) == len(flows) else Sign.ANY,
    )


@_rule("RollBackward0", "FlipBackward0", "Rot90Backward0")
def _roll(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    dims = [d % len(shape) for d in operation.attribute("dims")] or list(range(len(shape)))
    if operation.name == "Rot90Backward0":
        offset = flow.offset
        if offset is not None and any(offset.varies[d] for d in dims):
            offset = offset.changed(v or d in dims for d, v in enumerate(offset.varies))
        return replace(
            flow,
            rows=compact(
                torch.rot90(expanded(flow.rows, shape, dims), operation.attribute("k"), dims)
            ),
            offset=offset,
        )
    if all(flow.rows.size(d) == 1 for d in dims):
        return moved(flow, flow.rows, dims)
    rows = expanded(flow.rows, shape, dims)
    if operation.name == "FlipBackward0":
        return moved(flow, rows.flip(dims), dims)
    return moved(
        flow, rows.roll(operation.attribute("shifts"), operation.attribute("dims") or []), dims
    )


@_rule("PixelShuffleBackward0", "PixelUnshuffleBackward0", "ChannelShuffleBackward0")
def _shuffle(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    rows = expanded(flow.rows, shape, range(max(0, len(shape) - 4) + (len(shape) > 3), len(shape)))
    if operation.name == "PixelShuffleBackward0":
        rows = torch.pixel_shuffle(rows, operation.attribute("upscale_factor"))
    elif operation.name == "PixelUnshuffleBackward0":
        rows = torch.pixel_unshuffle(rows, operation.attribute("downscale_factor"))
    else:
        rows = torch.channel_shuffle(rows, operation.attribute("groups"))
    return replace(flow, rows=compact(rows), offset=everywhere(flow))


@_rule("DiagonalBackward0")
def _diagonal(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    i, j = operation.attribute("dim1"), operation.attribute("dim2")
    rows = expanded(flow.rows, _known(operation.inputs[0]), [i, j]).diagonal(
        operation.attribute("offset"), i, j
    )
    return replace(
        flow, rows=compact(rows), offset=flow.offset and flow.offset.changed([True] * rows.ndim)
    )


@_rule("UnfoldBackward0")
def _unfold(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, dim = only(operation, flows), operation.attribute("dimension")
    rows = flow.rows.unsqueeze(-1)
    if flow.rows.size(dim) > 1:
        rows = flow.rows.unfold(dim, operation.attribute("size"), operation.attribute("step"))
    return replace(
        flow, rows=compact(rows), offset=flow.offset and flow.offset.changed([True] * rows.ndim)
    )


@_rule("IndexSelectBackward0")
def _index_select(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    dim = operation.attribute("dim") % len(shape)
    operation.left_out(flow, [dim])
    index = operation.indices("index", flow, [dim])
    rows = flow.rows
    if rows.size(dim) > 1:
        rows = compact(rows.index_select(dim, index.cpu()))
        operation.rows.pick(distinct(rows))
    return moved(flow, rows, [dim])


@_rule("IndexBackward0")
def _index(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    index = operation.indices("indices", flow, range(len(shape)))
    if index is None:  # nothing differs, but how many dimensions are left, and where, is not known
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    dims = _indexed_dims(index)
    operation.left_out(flow, dims)
    rows = flow.rows.expand(shape)[tuple(slice(None) if i is None else i.cpu() for i in index)]
    if any(flow.rows.size(d) > 1 for d in dims):
        operation.rows.pick(distinct(rows))
    return replace(
        flow, rows=compact(rows), offset=flow.offset and _picked(flow.offset, index, rows.ndim)
    )


def _indexed_dims(index: Sequence[Tensor | None]) -> list[int]:
    """The dimensions of ``tensor`` that ``tensor[index]`` picks from; a mask stands for as many as
    it has itself."""
    dims: list[int] = []
    dim = 0
    for i in index:
        size = i.ndim if i is not None and i.dtype in (torch.bool, torch.uint8) else 1
        if i is not None:
            dims.extend(range(dim, dim + size))
        dim += size
    return dims


@_rule("MaskedSelectBackward0", "TakeBackward0")
def _select_entries(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Entries are picked from anywhere in the tensor, into one dimension."""
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    masked = operation.name == "MaskedSelectBackward0"
    operation.left_out(flow, range(len(shape)))
    index = operation.indices("mask" if masked else "index", flow, range(len(shape)))
    if index is None:
        return Flow(flow.degree, flow.rows.reshape(1), flow.offset and flow.offset.changed([True]))
    index = index.cpu()
    if masked:
        wide, mask = torch.broadcast_tensors(flow.rows.expand(shape), index)  # type: ignore[no-untyped-call]
        rows = wide[mask]
    else:
        rows = flow.rows.expand(shape).take(index)
    operation.rows.pick(distinct(rows))
    return Flow(flow.degree, compact(rows), flow.offset and flow.offset.changed([True] * rows.ndim))


def _picked(offset: Offset, index: Sequence[Tensor | None], ndim: int) -> Offset:
    """The offset of ``tensor[index]``: dimensions that are not indexed keep it entry for entry."""
    kept: list[
        tuple[int, bool]
    ] = []  # where in the index a dimension stood, and whether the offset differs along it
    indexed, dim = False, 0
    for position, i in enumerate(index):
        size = (
            1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.ndim
        )  # a mask stands for all its dimensions
        if i is None:
            kept.append((position, offset.varies[dim]))
        else:
            indexed |= any(offset.varies[dim : dim + size])
        dim += size
    kept += [(len(index) + d, v) for d, v in enumerate(offset.varies[dim:])]
    where = [position for position, i in enumerate(index) if i is not None]
    together = where == list(
        range(where[0], where[-1] + 1)
    )  # what is indexed comes out there, else in front
    front = [v for position, v in kept if together and position < where[0]]
    varies = [*front, *[indexed] * (ndim - len(kept)), *[v for _, v in kept[len(front) :]]]
    return (
        offset.changed(varies)
        if indexed
        else replace(offset, varies=tuple(varies), token=next(_tokens))
    )


@_rule("IndexPutBackward0")
def _index_put(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """``tensor[indices] = values``: what is not written over stays what it was."""
    shape = operation.outputs[0]
    readable, index = operation.saved_tensor("indices")
    if operation.attribute("accumulate"):
        return _accumulate(operation, flows)
    if not readable:
        raise Blocked(f"the indices of {operation.place} are inside a checkpoint")
    target, values = flows
    flow = pure(operation, target if target is not None else only(operation, flows, 1))
    if target is not None and values is not None and pure(operation, values).degree != flow.degree:
        raise Blocked(f"{operation.place} writes into a tensor that scales differently")
    rows = (
        torch.zeros(shape, dtype=torch.long, device="cpu")
        if target is None
        else target.rows.expand(shape).clone()
    )
    if values is not None and any(rows.size(d) > 1 for d in _indexed_dims(index)):
        operation.rows.pick(
            distinct(values.rows)
        )  # where they come to lie, and so what they meet there, depends on the data
    rows[tuple(slice(None) if i is None else i.cpu() for i in index)] = (
        torch.zeros(1, dtype=torch.long, device="cpu") if values is None else values.rows
    )
    return Flow(flow.degree, compact(rows))


def _accumulate(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Entries are added, averaged or compared at indices along one dimension (messages between the
    nodes of a graph).

    A constant to add to is taken as zeros, and the claim is marked.
    """
    segments = operation.name.startswith("Segment")
    target, source = (None, only(operation, flows)) if segments else flows
    reduce = operation.attribute("reduce", "sum")
    if reduce == "prod":
        raise Blocked(f"{operation.place} does not commute with a change of scale")
    out = operation.outputs[0]
    dims = [operation.attribute("axis" if segments else "dim", 0) % len(out)]
    if operation.name == "IndexPutBackward0":  # at any index of the whole tensor
        dims = list(range(len(out)))
    for flow in (target, source):
        if flow is not None and reduce in ("amax", "amin", "max", "min"):
            pure(operation, flow)
    rows = (
        None
        if source is None
        else operation.same_factor(
            source.rows, dims if source.rows.ndim == len(out) else range(source.rows.ndim)
        )
    )
    if rows is not None and rows.ndim != len(out):
        rows = rows.reshape([1] * len(out))
    if rows is not None and any(n not in (1, out[d]) for d, n in enumerate(rows.shape)):
        raise Blocked(f"no rule for {operation.place} with a source that is larger than its target")
    offset = (
        None
        if source is None or source.offset is None
        else source.offset.changed([True] * len(out))
    )
    if target is None:
        assert source is not None
        assert rows is not None
        if not segments and operation.inputs[0] is not None:
            raise Blocked(f"added to a tensor that does not scale with it ({operation.place})")
        operation.rows.assumed |= not segments
        return Flow(source.degree, rows, offset, _sign_of_sums(reduce, [source.sign]))
    if source is None or rows is None:
        added = operation.inputs[1] if len(operation.inputs) > 1 else None
        if added is not None and 0 in added:  # an expert without tokens adds nothing
            return target
        raise Blocked(f"a constant is added in {operation.place}")
    if target.degree != source.degree:
        raise Blocked(f"{operation.place} adds tensors that scale differently")
    if target.offset is not None:
        offset = target.offset.changed([True] * len(out))
    rows = operation.unite(operation.same_factor(target.rows, dims), rows)
    return Flow(source.degree, rows, offset, _sign_of_sums(reduce, [target.sign, source.sign]))


def _sign_of_sums(reduce: str, signs: Sequence[Sign]) -> Sign:
    """Sums and means of squares over the nodes of a graph are statistics, as they are over an
    axis."""
    lowest = min(signs)
    return Sign.STATISTIC if reduce in ("sum", "mean") and lowest != Sign.ANY else lowest


_rule(
    "IndexAddBackward0",
    "ScatterAddBackward0",
    "ScatterReduceBackward0",
    "IndexReduceBackward0",
    "SegmentReduceBackward0",
)(_accumulate)


@_rule("MaskedFillBackward0", "MaskedFillBackward1")
def _masked_fill(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Zeros and infinities go with any row. The value is not saved: taken as one of these, and the
    claim is marked."""
    flow = lift(only(operation, flows), len(operation.outputs[0]))
    operation.rows.assumed = True
    return replace(flow, offset=everywhere(flow), sign=Sign.ANY)


@_rule("GluBackward0")
def _gated(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Gated linear unit, a * sigmoid(b) of the two halves: the scale passes in the first and is
    seen by the second."""
    flow, dim = only(operation, flows), operation.attribute("dim")
    rows, gates = expanded(flow.rows, _known(operation.inputs[0]), [dim]).chunk(2, dim)
    operation.rows.forbid(gates, f"gates enter a sigmoid in {operation.place}")
    return Flow(flow.degree, compact(rows), everywhere(flow))


@_rule("GatherBackward0")
def _gather(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape, out = only(operation, flows), _known(operation.inputs[0]), operation.outputs[0]
    dim = operation.attribute("dim") % max(1, len(shape))
    if not shape:
        return flow
    others = [d for d in range(len(shape)) if d != dim]
    operation.left_out(flow, [dim, *(d for d in others if out[d] < shape[d])])
    rows = flow.rows
    for d in others:  # the index may be smaller than the tensor there
        if rows.size(d) > 1:
            rows = rows.narrow(d, 0, out[d])
    index = operation.indices("index", flow, [dim])
    if rows.size(dim) > 1:
        wide = rows.expand([shape[d] if d == dim else out[d] for d in range(len(shape))])
        rows = compact(wide.gather(dim, index.cpu()))
        operation.rows.pick(distinct(rows))
    return moved(flow, rows, range(len(shape)))


@_rule(
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


@_rule("ConstantPadNdBackward0")
def _pad(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Zeros go with any row. The value padded with is not saved: taken as 0, and the claim is
    marked."""
    flow, amounts = only(operation, flows), operation.attribute("pad")
    ndim = flow.rows.ndim
    padded = [ndim - 1 - k // 2 for k, amount in enumerate(amounts) if amount > 0]
    if any(amount > 0 for amount in amounts):
        operation.rows.assumed = True
    inside = [
        amount if flow.rows.size(ndim - 1 - k // 2) > 1 else 0 for k, amount in enumerate(amounts)
    ]
    rows = nn.functional.pad(flow.rows, inside) if any(inside) else flow.rows
    offset = flow.offset and flow.offset.changed(
        v or d in padded for d, v in enumerate(flow.offset.varies)
    )
    return replace(flow, rows=rows, offset=offset)


# --------------------------------------------------------------------------- reductions and pooling


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
                token=offset.token if in_front else next(_tokens),
            )
    return Flow(flow.degree * degree, rows, offset, sign)


def _reduction_dims(operation: Operation) -> list[int]:
    ndim = len(_known(operation.inputs[0]))
    dims = operation.attribute("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, list) else [dims])] if ndim else []


@_rule("SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1")
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


@_rule(
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


@_rule("VarMeanBackward0", "StdMeanBackward0")
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


@_rule(*(f"{name}Backward0" for name in _SPATIAL))
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


@_rule("Im2ColBackward0")
def _im2col(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, shape = only(operation, flows), _known(operation.inputs[0])
    rows = operation.same_factor(flow.rows, [-1, -2]).squeeze(-1)
    if rows.size(-2) > 1:
        rows = rows.repeat_interleave(operation.outputs[0][-2] // shape[-3], -2)
    return Flow(flow.degree, rows, flow.offset and flow.offset.changed([True] * rows.ndim))


# -------------------------------------------------------------------------------------- linear maps


def _contract(operation: Operation, a: Flow | None, b: Flow | None) -> Flow:
    """a @ b, both with the same number of dimensions."""
    for factor in (a, b):
        if factor is not None:
            _refuse_padded(operation, factor)
    if (
        a is not None
        and b is not None
        and not all(bool(part.rows.all()) for part in (*a.parts, *b.parts))
    ):
        return _contract_parts(operation, a, b)
    left = operation.same_factor(a.rows, [-1]) if a is not None else None
    right = operation.same_factor(b.rows, [-2]) if b is not None else None
    # Sums of products of what is not negative (linear attention): a statistic, as their sum would
    # be.
    sign = Sign.STATISTIC if _product_is_nonnegative(operation, a, b) else Sign.ANY
    if left is not None and right is not None and a is not None and b is not None:
        pure(operation, a), pure(operation, b)
        return Flow(a.degree + b.degree, operation.unite(left, right), sign=sign)
    flow, rows = (a, left) if a is not None else (b, right)
    assert flow is not None
    assert rows is not None
    offset = flow.offset
    if (
        offset is not None
    ):  # the other factor may differ along its own dimensions, and over the batch
        kept = rows.ndim - 2 if a is not None else rows.ndim - 1
        offset = offset.changed(offset.varies[d] if d == kept else True for d in range(rows.ndim))
    return Flow(flow.degree, rows, offset, sign if offset is None else Sign.ANY)


def _contract_parts(operation: Operation, a: Flow, b: Flow) -> Flow:
    """a @ b where only some entries of a factor scale, or by different degrees: linear attention
    pads its values with ones."""
    factors: list[list[tuple[float, Tensor]]] = []
    for flow, dim in ((a, -1), (b, -2)):
        parts = [
            (pure(operation, part).degree, operation.same_factor(part.rows, [dim]))
            for part in flow.parts
        ]
        scales = torch.stack(torch.broadcast_tensors(*[rows > 0 for _, rows in parts])).any(0)  # type: ignore[no-untyped-call]
        factors.append(
            [*parts, (0.0, torch.where(scales, 0, -1))]
        )  # -1: an entry that does not scale
    by_degree: dict[float, Tensor] = {}
    for degree_a, rows_a in factors[0]:
        for degree_b, rows_b in factors[1]:
            left, right = torch.broadcast_tensors(rows_a, rows_b)  # type: ignore[no-untyped-call]
            both, either_one = (
                (left > 0) & (right > 0),
                ((left > 0) & (right < 0)) | ((left < 0) & (right > 0)),
            )
            operation.unite(left[both], right[both])
            rows = torch.where(both | either_one, torch.maximum(left, right), 0)
            degree = round(degree_a + degree_b, 9)
            by_degree[degree] = (
                torch.maximum(by_degree[degree], rows) if degree in by_degree else rows
            )
    return _joined(
        [Flow(degree, compact(rows)) for degree, rows in by_degree.items() if bool(rows.any())]
    )


def _product_is_nonnegative(operation: Operation, a: Flow | None, b: Flow | None) -> bool:
    """Whether both factors of a matrix product have no negative entries; a factor that does not
    scale may be any tensor of the graph."""
    if operation.name not in ("MmBackward0", "BmmBackward0"):
        return False
    signs = [
        operation.sign(k) if flow is None else max(flow.sign, operation.sign(k))
        for k, flow in enumerate((a, b))
    ]
    return min(signs) != Sign.ANY


@_rule("MmBackward0", "BmmBackward0")
def _matmul(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    return _contract(operation, flows[0], flows[1])


@_rule("AddmmBackward0", "BaddbmmBackward0")
def _matmul_plus(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    if flows[0] is not None:
        raise Blocked(f"the scale enters {operation.place} as the term that is added")
    return _with_bias(operation, _contract(operation, flows[1], flows[2]), 0, -1)


@_rule("SparseAddmmBackward0")
def _sparse_matmul(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """A sparse matrix (an adjacency matrix) times a dense one, plus a multiple of another."""
    if flows[0] is not None or flows[1] is not None or operation.attribute("beta", 0) != 0:
        raise Blocked(f"the scale enters {operation.place} by a side input, or something is added")
    return _contract(operation, None, flows[2])


@_rule("TrilinearBackward0")
def _trilinear(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Sum of products of three tensors (``nn.Bilinear``)."""
    parts = []
    for k, flow in enumerate(flows):
        if flow is not None:
            rows = pure(operation, flow).rows
            for dim in sorted(operation.attribute(f"expand{k + 1}")):
                rows = rows.unsqueeze(dim)
            parts.append((flow.degree, rows))
    rows = parts[0][1]
    for _, other in parts[1:]:
        rows = operation.unite(rows, other)
    summed = operation.attribute("sumdim")
    rows = operation.same_factor(rows, summed)
    for dim in sorted(summed, reverse=True):
        rows = rows.squeeze(dim)
    return Flow(sum(degree for degree, _ in parts), rows)


@_rule("LinearBackward0", "LinearFunctionForZeroStage3Backward")  # DeepSpeed's has the same inputs
def _linear(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    ndim = len(operation.outputs[0])
    weight = flows[1] and lift(permuted(flows[1], [1, 0]), ndim)
    flow = _contract(operation, flows[0], weight)
    return _with_bias(operation, flow, 2, -1) if len(flows) > 2 else flow


def _with_bias(operation: Operation, flow: Flow, k: int, dim: int) -> Flow:
    """Input ``k`` is added; a frozen one (shape unknown) counts as a bias only if the module has
    one."""
    shape, ndim = operation.inputs[k], len(operation.outputs[0])
    if (parts := _without_bias_in_part(operation, flow, k, dim % ndim)) is not None:
        return parts
    name, module = operation.module
    bias = getattr(module, "bias", None)
    along = tuple(d == dim % ndim for d in range(ndim))
    if shape is None and isinstance(bias, Tensor) and bias.ndim == 1:
        return _shifted(flow, along, f"{name}.bias" if name else "bias")
    if shape is not None and math.prod(shape) == operation.outputs[0][dim] == shape[-1]:
        return _shifted(
            flow, along, operation.parameter(k) if operation.attribute("beta", 1) == 1 else None
        )
    return _shifted(flow, varying(shape, ndim), None)


def _without_bias_in_part(operation: Operation, flow: Flow, k: int, dim: int) -> Flow | None:
    """The flow after adding input ``k``, where some of its entries are known to be zero (keys have
    no bias in Swin v2); None: nowhere."""
    size = operation.outputs[0][dim]
    zeros = operation.zeros(k)
    if zeros is None or zeros.shape != (size,) or not bool(zeros.any()) or flow.offset is not None:
        return None
    along = [size if d == dim else 1 for d in range(len(operation.outputs[0]))]
    wide = flow.rows.expand([size if d == dim else n for d, n in enumerate(flow.rows.shape)])
    free = torch.where(zeros.reshape(along), wide, 0)
    biased = torch.where(zeros.reshape(along), 0, wide)
    shifted = _shifted(replace(flow, rows=biased), tuple(d == dim for d in range(len(along))), None)
    return _joined([replace(flow, rows=free), *([shifted] if bool(biased.any()) else [])])


@_rule("MvBackward0")
def _matvec(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = flows
    flow = _contract(
        operation,
        a,
        b and reshaped(b, _known(operation.inputs[1]), (*_known(operation.inputs[1]), 1)),
    )
    return reshaped(flow, (*operation.outputs[0], 1), operation.outputs[0])


@_rule("DotBackward0", "VdotBackward0")
def _dot(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    a, b = (flow and pure(operation, flow) for flow in flows)
    rows = [
        operation.same_factor(flow.rows, [0]).reshape(()) for flow in (a, b) if flow is not None
    ]
    if len(rows) == 2:
        operation.unite(*rows)
    return Flow(sum(flow.degree for flow in (a, b) if flow is not None), rows[0])


@_rule("ConvolutionBackward0")
def _convolution(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    x, weight = flows[:2]
    if len(flows) > 2 and flows[2] is not None:
        raise Blocked(f"the scale enters {operation.place} as its bias")
    groups, channels, ndim = (
        operation.attribute("groups"),
        operation.outputs[0][1],
        len(operation.outputs[0]),
    )
    parts = []
    offset = None
    if x is not None:
        spatial = range(2, ndim)
        rows = operation.same_factor(x.rows, spatial)
        rows = rows.reshape(rows.size(0), -1)
        if rows.size(1) > 1:
            rows = operation.same_factor(rows.reshape(rows.size(0), groups, -1), [2]).expand(
                -1, -1, channels // groups
            )
        parts.append(compact(rows.reshape(rows.size(0), -1)))
        if x.offset is not None:
            border = any(operation.attribute("padding")) or operation.attribute(
                "transposed"
            )  # what is added meets the zeros around it
            offset = x.offset.changed(
                [x.offset.varies[0], True, *(border or x.offset.varies[d] for d in spatial)]
            )
    if weight is not None:
        pure(operation, weight)
        shape = _known(operation.inputs[1])
        if operation.attribute("transposed"):
            rows = expanded(operation.same_factor(weight.rows, range(2, ndim)), shape, [0, 1])
            rows = operation.same_factor(rows.reshape(groups, shape[0] // groups, shape[1]), [1])
        else:
            rows = expanded(operation.same_factor(weight.rows, range(1, ndim)), shape, [0])
        parts.append(rows.reshape(1, channels))
    if x is not None and weight is not None:
        pure(operation, x)
        parts[0] = operation.unite(parts[1], parts[0])
    flow = Flow(
        sum(f.degree for f in (x, weight) if f is not None),
        parts[0].reshape(*parts[0].shape, *[1] * (ndim - 2)),
        offset,
    )
    if any(operation.attribute("bias_sym_sizes_opt") or ()):
        flow = _with_bias_named(operation, flow)
    return flow


def _with_bias_named(operation: Operation, flow: Flow) -> Flow:
    ndim = len(operation.outputs[0])
    name = operation.parameter(2)
    if name is None and isinstance(getattr(operation.module[1], "bias", None), Tensor):  # frozen
        name = f"{operation.module[0]}.bias".lstrip(".")
    return _shifted(flow, tuple(d == 1 for d in range(ndim)), name)


@_rule("EmbeddingBackward0")
def _embedding(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, out = pure(operation, only(operation, flows)), operation.outputs[0]
    _refuse_max_norm(operation)
    operation.left_out(flow, [0])
    index = operation.indices("indices", flow, [0])
    rows = flow.rows
    if rows.size(0) == 1:
        return replace(flow, rows=rows.reshape([1] * (len(out) - 1) + [rows.size(1)]))
    rows = rows[index.cpu()]
    operation.rows.pick(rows)
    return replace(flow, rows=rows)


def _refuse_max_norm(operation: Operation) -> None:
    """A lookup with ``max_norm`` changes the length of rows before it reads them."""
    if getattr(operation.module[1], "max_norm", None) is not None:
        raise Blocked(
            f"max_norm of {operation.module[0] or operation.name} rescales the rows in every "
            f"forward pass"
        )


@_rule("EmbeddingBagBackward0")
def _embedding_bag(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """Rows of a table are added, averaged or compared: which ones meet depends on the data, so all
    that occur go together."""
    flow = pure(operation, only(operation, flows))
    _refuse_max_norm(operation)
    operation.left_out(flow, [0])
    index = operation.indices("indices", flow, [0])
    rows = flow.rows
    if rows.size(0) > 1:
        rows = rows[distinct(index.cpu())]
        operation.rows.pick(rows)
    return replace(flow, rows=operation.same_factor(rows, [0]), sign=Sign.ANY)


@_rule(
    "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0", "ScaledDotProductFusedAttentionOverrideableBackward0",
)  # fmt: skip
def _attention(operation: Operation, flows: Sequence[Flow | None]) -> Flow | None:
    for k, flow in enumerate(flows):
        if (
            k != 2 and flow is not None
        ):  # only these rows are lost: those of the values in the same weight may be free
            operation.rows.forbid(
                flow.rows, f"queries, keys and masks enter a softmax in {operation.place}"
            )
    value = flows[2]
    if value is None:
        return None
    rows, heads = operation.same_factor(value.rows, [-2]), operation.outputs[0][-3]
    if rows.size(-3) not in (1, heads):  # grouped queries: several heads share their values
        rows = rows.repeat_interleave(heads // rows.size(-3), -3)
    return Flow(value.degree, rows, everywhere(value))


# ------------------------------------------------------------------------------- tensor parallelism


@_rule("_ToTorchTensorBackward", "_FromTorchTensorBackward")
def _local_tensor(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    """From a DTensor to this rank's part of it, and back. On DTensors themselves operations show
    their full shapes."""
    flow, before, after = only(operation, flows), _known(operation.inputs[0]), operation.outputs[0]
    if before == after:
        return flow
    rows = operation.rows
    if (
        operation.name == "_FromTorchTensorBackward"
    ):  # the other ranks' entries come from rows that were not followed here: all go together
        together = torch.cat([flow.rows.flatten(), rows.sharded])
        operation.unite(together[:1], together)
        return replace(flow, rows=together[:1].reshape([1] * len(after)), offset=everywhere(flow))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec: Any = operation.node.dtensor_spec  # type: ignore[attr-defined]
    if any(type(placement).__name__ == "_StridedShard" for placement in spec.placements):
        raise Blocked(f"no rule for strided shards in {operation.place}")
    _, start = compute_local_shape_and_global_offset(spec.shape, spec.mesh, spec.placements)
    part = flow.rows
    for dim, size in enumerate(after):
        if part.size(dim) > 1 and size < before[dim]:
            part = part.narrow(dim, start[dim], size)
    if part.numel() < flow.rows.numel():
        rows.elsewhere = True
        rows.sharded = distinct(torch.cat([flow.rows.flatten(), rows.sharded]))
    return moved(flow, part, range(part.ndim))


# ----------------------------------------------------------------------------------- normalizations


@_rule(
    "NativeBatchNormBackward0", "NativeBatchNormLegitBackward0", "BatchNormWithUpdateBackward0", "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0", "SyncBatchNormBackward",
)  # fmt: skip
def _batch_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, channels = only(operation, flows), _known(operation.inputs[0])[1]
    ndim = flow.rows.ndim
    if not operation.attribute("training", True):  # frozen, or in eval mode: an affine map
        offset = new_offset(
            (d == 1 for d in range(ndim)),
            what=f"the fixed mean of {operation.module[0] or operation.name}",
        )
        return replace(
            flow,
            offset=offset
            if flow.offset is None
            else offset.changed(either(offset.varies, flow.offset.varies)),
            sign=Sign.ANY,
        )
    result = operation.normalized(flow, [d for d in range(ndim) if d != 1])
    _check_epsilon(operation)
    rows = result.rows.expand(1, channels, *result.rows.shape[2:]).reshape(-1)
    name, module = operation.module
    statistics = getattr(module, "running_mean", None)
    if isinstance(statistics, Tensor):
        per_sample = rows.reshape(
            -1, statistics.numel()
        )  # InstanceNorm folds the batch into the channels
        if bool((per_sample == per_sample[:1]).all()):
            bias = flow.offset.parameter if flow.offset is not None else None
            operation.rows.link(
                Link(name, per_sample[0], flow.degree, flow.offset is not None, bias)
            )
        else:
            operation.rows.stale.setdefault(name)
    elif not isinstance(
        module, nn.modules.batchnorm._NormBase
    ):  # torch's own hold them there or have none
        readable, running = operation.saved_tensor("running_mean")
        if running is not None or not readable:
            operation.rows.stale.setdefault(operation.place)
    return result


def _check_epsilon(operation: Operation) -> None:
    """An epsilon that is not small marks the claim. Nodes save it or modules declare it; else it is
    not known."""
    eps = operation.attribute("eps")
    declared = eps if isinstance(eps, float) else declared_epsilon(operation.module[1])
    small = declared is None or declared <= 1e-3
    if not small:
        operation.rows.assumed = True


@_rule(
    "NativeLayerNormBackward0", "FusedRmsNormBackward0", "LigerLayerNormFunctionBackward",
    "LigerRMSNormFunctionBackward",
    "FusedLayerNormFunctionBackward", "FusedLayerNormAffineFunctionBackward", "FusedRMSNormFunctionBackward",
    "FusedRMSNormAffineFunctionBackward",
)  # fmt: skip
def _layer_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow = only(operation, flows)
    normalized_shape = (
        operation.attribute("normalized_shape")
        or getattr(operation.node, "normalized_shape", None)
        or (0,)
    )
    _check_epsilon(operation)
    return operation.normalized(
        flow, range(-len(normalized_shape), 0), centered="rms" not in operation.name.lower()
    )


@_rule("NativeGroupNormBackward0")
def _group_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    flow, groups = only(operation, flows), operation.attribute("group")
    shape = _known(operation.inputs[0])
    _check_epsilon(operation)
    if flow.offset is not None and (groups != shape[1] or any(flow.offset.varies[2:])):
        operation.normalized(
            replace(
                flow,
                offset=replace(flow.offset, varies=(False, True) + (False,) * (len(shape) - 2)),
            ),
            [1],
        )
    rows = operation.same_factor(flow.rows, range(2, len(shape)))
    rows = expanded(rows, shape, [1]).reshape(rows.size(0), groups, -1)
    return Flow(
        0, operation.same_factor(rows, [2]).reshape(rows.size(0), groups, *[1] * (len(shape) - 2))
    )


@_rule("WeightNormInterfaceBackward0")
def _weight_norm(operation: Operation, flows: Sequence[Flow | None]) -> Flow:
    direction, gain = flows
    if direction is None:
        assert gain is not None
        return gain
    dim = operation.attribute("dim") % direction.rows.ndim
    return Flow(
        0,
        operation.same_factor(
            only(operation, flows).rows, [d for d in range(direction.rows.ndim) if d != dim]
        ),
    )
