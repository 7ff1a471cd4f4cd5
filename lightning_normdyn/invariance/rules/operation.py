"""What a rule gets to see of an operation, the checks that many rules share, and which rule holds
for which operation."""

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_normdyn.invariance.flow import Blocked, Flow, Flows, Shape, Sign
from lightning_normdyn.invariance.graph import Edge, Graph, GraphNode, node_name, sources_of
from lightning_normdyn.invariance.rows import Rows

# Variances are of order 1 behind common initializations: an epsilon up to this is small beside
# them.
SMALL_EPSILON = 1e-3


@dataclass(eq=False)
class Operation(GraphNode):
    """One operation while the scale of one weight is followed through it: what a rule gets to see.

    Args:
        rows: what is learnt about the rows of the weight.
        graph: that the operation belongs to.
    """

    rows: Rows
    graph: Graph

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
        return self.graph.module_of(self.node)

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

    def dim(self) -> int:
        """The dimension of the first input that the operation works along."""
        return int(self.attribute("dim")) % max(1, len(self.shape()))

    def source(self, k: int) -> Edge | None:
        """The output of another operation that input ``k`` is; None: a constant, or no such
        input."""
        if k < len(self.sources):
            return self.sources[k]
        return None

    def parameter(self, k: int) -> str | None:
        """Name of the parameter that input ``k`` is, also behind a cast to another dtype."""
        edge = self.source(k)
        parameters = self.graph.parameters
        # Under autocast a bias is cast before it is added: its entries keep their places.
        while edge and edge not in parameters and node_name(edge[0]) == "ToCopyBackward0":
            (edge,) = sources_of(edge[0])
        if edge is None:
            return None
        return parameters.get(edge)

    def sign(self, k: int) -> Sign:
        """What is known of the values of input ``k``, whether they scale or not."""
        return self.graph.signs.of(self.source(k))

    def same_factor(
        self,
        rows: Tensor,
        dims: Iterable[int],
    ) -> Tensor:
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

    def unite(
        self,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        """The entries of ``a`` and ``b`` (broadcast) must share factors; returns the smaller (they
        are one from here on)."""
        self.rows.unite(a, b, f"{self.place} combines entries that scale with entries that do not")
        if a.numel() <= b.numel():
            return a
        return b

    def indices(
        self,
        name: str,
        flow: Flow,
        dims: Iterable[int],
    ) -> Any:
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
            reason = (
                f"the indices of {self.place} are inside a checkpoint, so that it is not known "
                "which rows are read"
            )
            self.rows.veiled.setdefault(reason)
            raise Blocked(reason)
        return None

    def left_out(
        self,
        flow: Flow,
        dims: Iterable[int],
    ) -> None:
        """Entries were left out along ``dims``. Where the rows do not differ along them, another
        cut of the weight has to show which."""
        if any(flow.rows.size(dim) == 1 for dim in dims):
            self.rows.cut_elsewhere = True

    def normalized(
        self,
        flow: Flow,
        dims: Iterable[int],
        *,
        centered: bool = True,
    ) -> Flow:
        """The result of a normalization over ``dims``; ``centered``: it removes a common offset,
        too (LayerNorm, but not RMSNorm)."""
        if not centered:
            # Nothing subtracts a mean, so a bias stays beside what scales.
            self.pure(flow)
        self.refuse_padded(flow)
        dims = [d % flow.ndim for d in dims]
        if flow.offset and flow.offset.differs_along(dims):
            raise Blocked(
                f"{flow.offset.what} is added before {self.place} "
                "and differs within what is normalized together"
            )
        return Flow(0, self.same_factor(flow.rows, dims))

    def forgive(
        self,
        flow: Flow,
        what: str,
    ) -> Flow:
        """A constant beside a statistic is an epsilon: passed on, but the claim then rests on its
        smallness. Anything else is blocked."""
        if flow.sign != Sign.STATISTIC or flow.offset or flow.degree < 0:
            raise Blocked(f"{what} in {self.place}")
        # The graph does not hold the constant. A module that declares an epsilon is taken at its
        # word.
        _, module = self.module
        self.assume_small(declared_epsilon(module, math.inf))
        return replace(flow, padded=True)

    def assume_small(self, epsilon: float) -> None:
        """An epsilon that is not small beside a variance of order 1 marks the claim."""
        if epsilon > SMALL_EPSILON:
            self.rows.assumed = True

    def only(self, flows: Flows) -> Flow:
        """The flow of the first input, if no other input depends on the weight."""
        # A rule of one input would lose what enters by another.
        flow, *others = flows
        if not flow or any(others):
            raise Blocked(f"the scale enters {self.place} by a side input")
        return flow

    def pure(self, flow: Flow) -> Flow:
        """The flow, if nothing constant was added to it."""
        if flow.offset:
            raise Blocked(f"{flow.offset.what} is added before {self.place}")
        return flow

    def refuse_padded(self, flow: Flow) -> None:
        """A constant beside a statistic is an epsilon in a denominator; where it enters as a value,
        it is a value that does not scale."""
        if flow.padded:
            raise Blocked(f"a constant is added to what enters {self.place}")


def present(flows: Flows) -> tuple[int, Flow]:
    """The first input that depends on the weight, and its flow."""
    for k, flow in enumerate(flows):
        if flow:
            return k, flow
    raise AssertionError("an operation without a flow is not visited")


_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")


def declared_epsilon(module: nn.Module | None, otherwise: float) -> float:
    """The epsilon that a module declares under a usual name (``eps``, ``variance_epsilon``, ...),
    the largest if there are several.

    0 for an epsilon of None, which is that of the dtype (RMSNorm).

    Args:
        module: None if it is not known.
        otherwise: what to take where nothing is declared.

    Example:
        >>> declared_epsilon(nn.LayerNorm(4, eps=1e-6), otherwise=0.0)
        1e-06
    """
    if module is None:
        return otherwise
    declared = []
    for name in ("eps", *vars(module), *module._parameters, *module._buffers):
        # The plain test goes first: a module has some twenty attributes, and this runs for every
        # layer.
        if "eps" in name and _EPSILON.search(name) and hasattr(module, name):
            value = getattr(module, name)
            # A tensor is not looked at: that would wait for the device.
            is_number = value is None or isinstance(value, (int, float))
            declared.append(float(value or 0.0) if is_number else math.inf)
    return max(declared, default=otherwise)


# ------------------------------------------------------------------------------------------- rules

Result = Flow | Flows | None
Rule = Callable[[Operation, Flows], Result]
UnaryRule = Callable[[Operation, Flow], Result]

# By the name of the autograd node.
RULES: dict[str, Rule] = {}


def register_rule(node_name: str, rule: Rule) -> None:
    """Tell the target search how a scale passes an operation it does not know, e.g. a custom
    ``torch.autograd.Function``.

    Args:
        node_name: name of the autograd node, as ``tensor.grad_fn.name()`` gives it: the function's
            class name with ``Backward`` appended.
        rule: called as ``rule(operation, flows)`` with one `Flow` (or None: does not depend on the
            weight) for each differentiable input. Returns the flow of the output, or a list with
            one for each output, or raises `Blocked` with a reason. ``homogeneous`` is a ready-made
            rule for :math:`f(cx) = c f(x)`; ``operation.normalized(flow, dims)`` is the result of a
            normalization.

    Raises:
        ValueError: if ``node_name`` is no name, or ``rule`` cannot be called.

    Example:
        A custom root-mean-square normalization over the last axis:

        >>> import torch
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
        >>> def root_mean_square(operation, flows):
        ...     return operation.normalized(flows[0], [-1], centered=False)
        >>> register_rule("RootMeanSquareBackward", root_mean_square)

        A rule holds for the whole process; this example takes its own back.

        >>> del RULES["RootMeanSquareBackward"]
    """
    if not isinstance(node_name, str) or not node_name:
        raise ValueError(f"`node_name` must be the name of an autograd node, got {node_name!r}.")
    if not callable(rule):
        raise ValueError(f"`rule` must be callable as rule(operation, flows), got {rule!r}.")
    # Ours may be replaced, too: who knows an operation better is right.
    RULES[node_name] = rule


def rule_for(names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for autograd nodes of these names, which white space separates."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def unary_rule(names: str) -> Callable[[UnaryRule], Rule]:
    """Decorator like `rule_for`, for operations that a scale may enter only by their first input:
    the rule gets the flow of that one."""

    def register(rule: UnaryRule) -> Rule:
        @functools.wraps(rule)
        def checked(operation: Operation, flows: Flows) -> Result:
            flow = operation.only(flows)
            return rule(operation, flow)

        return rule_for(names)(checked)

    return register


# ------------------------------------------------------------------------ operations without a rule

# Names without ``Backward0``. Functions with f(cx) != c^k f(x), for any k.
NOT_HOMOGENEOUS = """
    Softmax LogSoftmax SafeSoftmax MaskedSoftmax SparseSoftmax SparseLogSoftmax
    Logsumexp Logcumsumexp Logaddexp Logaddexp2
    Gelu Silu Sigmoid Tanh Softplus Elu Celu Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink
    Mish LogSigmoid Logit Threshold
    Exp Exp2 Expm1 Log Log2 Log10 Log1P Xlogy SpecialXlog1Py SpecialEntr Erf Erfc Erfinv
    SpecialErfcx SpecialLogNdtr SpecialNdtri
    Sin Cos Tan Sinc Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    Lgamma Digamma Polygamma Mvlgamma I0 SpecialI0E SpecialI1 SpecialI1E
    Prod Cumprod Round Floor Ceil Trunc Frac Fmod Remainder Renorm
    NllLoss NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy
    BinaryCrossEntropyWithLogits SoftMarginLoss MultiMarginLoss MultilabelMarginLoss
    CtcLoss CudnnCtcLoss MiopenCtcLoss
"""

# Rows could be followed through some of these in principle. Each is rare in front of a
# normalization, and a rule that is wrong would cost more than a target that is missed. ``Linalg``
# stands for all that begin so.
NOT_FOLLOWED = {
    "is a whole recurrent layer, whose gates do not commute with a change of scale": """
        MkldnnRnnLayer CudnnRnn MiopenRnn LstmMps ThnnFusedLstmCell ThnnFusedGruCell
    """,
    "writes into a part of a tensor in place (`x[i] = y`), and that is not followed": """
        CopySlices SelectScatter SliceScatter DiagonalScatter AsStridedScatter MaskedScatter Scatter
        IndexCopy IndexFill Put Fill
    """,
    "reads memory in another layout (`as_strided`), and rows are not followed through it": """
        AsStrided
    """,
    "multiplies groups of rows with one matrix each (experts), and rows are not followed through "
    "it": """
        GroupedMm ScaledGroupedMm ForeachMm
    """,
    "is a Fourier transform, and complex numbers are not followed": """
        FftC2C FftR2C FftC2R
    """,
    "computes with complex numbers, and these are not followed": """
        ViewAsComplex ViewAsReal Complex Conj ConjPhysical Angle Polar
    """,
    "factors, inverts or solves with a matrix, and rows are not followed through it": """
        Linalg Cholesky CholeskyInverse CholeskySolve Geqrf Ormqr LuUnpack TriangularSolve
    """,
    "changes the layout of a sparse tensor, and rows are not followed through it": """
        ToSparse ToSparseCsr ToSparseCsc ToSparseBsr ToSparseBsc ToDense ToPaddedTensor Coalesce
        Values SparseMask SparseSum
    """,
}


def why_not(operation: Operation) -> str:
    """Why the scale does not pass an operation without a rule."""
    nested = "AutogradNestedTensor"
    kind = re.sub(rf"({nested})?Backward({nested})?\d*$", "", operation.name)
    if kind in NOT_HOMOGENEOUS.split():
        return f"{operation.place} does not commute with a change of scale"
    family = "Linalg" if kind.startswith("Linalg") else kind
    for what, kinds in NOT_FOLLOWED.items():
        if family in kinds.split():
            return f"{operation.place} {what}"
    if "Nested" in operation.name:
        return f"{operation.place} works on a nested tensor, whose rows are not followed"
    return f"no rule for {operation.place} (`register_rule` adds one)"
