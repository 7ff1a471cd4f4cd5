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

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_normdyn.invariance.flow import Blocked, Flow, Sign, joined
from lightning_normdyn.invariance.graph import Graph
from lightning_normdyn.invariance.nodes import Edge
from lightning_normdyn.invariance.rows import Rows
from lightning_normdyn.invariance.rules.operation import Operation
from lightning_normdyn.invariance.rules.registry import RULES
from lightning_normdyn.invariance.rules.unsupported import why_not


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
    for step in graph.nodes:
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
                    flows.setdefault((step.node, k), {})[name] = joined(scaling)
    for name, flow in flows.get(graph.root, {}).items():
        for part in flow.parts:
            rows[name].forbid(part.rows, "its scale reaches the loss")
    for name, before in met_before.items():
        # Under tensor parallelism other ranks hold the rest of the rows.
        rows[name].varies |= not rows[name].elsewhere and not bool(rows[name].reached().all())
        rows[name].met |= before


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
        leaving.append(joined(parts) if parts else None)
    return leaving


def _apply_rule(operation: Operation, flows: Sequence[Flow | None]) -> Sequence[Flow | None]:
    rule = RULES.get(operation.name)
    if rule is None:
        raise Blocked(why_not(operation))
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


def _normalization_name(operation: Operation) -> str:
    """The normalization module, or the node that did it by hand and the module it happened in."""
    name, module = operation.module
    by_hand = (
        module is None
        or any(True for _ in module.children())
        or any(p.ndim > 1 for p in module.parameters(recurse=False))
    )
    return operation.place if by_hand else name
