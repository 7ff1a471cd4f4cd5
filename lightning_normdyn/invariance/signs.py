"""What is known of the signs of the values in a graph, whatever they were computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.autograd.graph import Node

from lightning_normdyn.invariance.flow import Sign
from lightning_normdyn.invariance.nodes import Edge, GraphNode, signed

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


def sign_of_result(step: GraphNode, inputs: Sequence[Sign]) -> Sign:
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


def padding_of_result(
    step: GraphNode, paddings: Mapping[Edge, Padding], signs: Mapping[Edge, Sign]
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
