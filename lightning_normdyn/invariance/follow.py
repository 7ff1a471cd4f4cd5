r"""How a change of scale flows through the autograd graph of a loss.

Multiply row :math:`r` of a weight by :math:`c_r > 0`. What happens to a tensor :math:`T` computed
from it? For many tensors the answer is

.. math:: T_i \to c_{r(i)}^{k}\, (T_i - b_i) + b_i

with a degree :math:`k`, a row :math:`r(i)` for each entry, and an offset :math:`b` that does not
scale (a bias). A `Flow` holds this answer, a *rule* says how one operation changes it, and `follow`
walks the graph of a real loss from the weights to the loss. Where an operation mixes entries of
several rows, these rows are united: from there on they must be scaled together. What reaches degree
0 no longer depends on the scale: its rows have *met* a normalization, and only such rows are
claimed.

Whatever is not understood, or reaches the loss, unites its rows with class 0, "must not be scaled".
So an unknown operation can only cost a target, never invent one. Rows that the loss did not read
(``table[:n]``, an expert without tokens) are neither: nothing is known of them.

Nothing is run again, and no saved tensor is read that a checkpoint would have to recompute.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .flow import Blocked, Flow, Flows, joined
from .graph import Edge, Graph
from .rows import Rows
from .rules.operation import RULES, Operation, why_not


def follow(
    graph: Graph,
    leaves: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
) -> None:
    """Walk ``graph`` once; what is learnt about each weight is left in its `Rows`.

    Args:
        graph: from `trace`.
        leaves: for each weight to follow, 1 + the row of each entry, broadcastable to its shape.
        rows: for each of these weights its `Rows`.
    """
    flows: dict[Edge | None, dict[str, Flow]] = {}
    for edge, name in graph.parameters.items():
        if name in leaves and edge in graph.shapes:
            flows[edge] = {name: Flow(1, leaves[name])}
    # Which rows are met is asked of this loss alone, to see whether it read all of them.
    met_before = {name: rows[name].met for name in leaves}
    for name, met in met_before.items():
        rows[name].met = torch.zeros_like(met)

    for node in graph.nodes:
        incoming = [flows.get(source, {}) for source in node.sources]
        if node.gives_nothing:
            # No entry of an expert's weight reaches the loss where it got no tokens.
            continue
        for name in dict.fromkeys(name for by_name in incoming for name in by_name):
            operation = Operation(**vars(node), rows=rows[name], graph=graph)
            leaving = _leaving(operation, [by_name.get(name) for by_name in incoming])
            for k, flow in enumerate(leaving):
                if not flow or node.is_empty(k):
                    continue
                scaling = list(_still_scaling(operation, k, flow))
                if scaling:
                    flows.setdefault((node.node, k), {})[name] = joined(scaling)

    # What still scales at the loss makes the loss depend on the scale.
    for name, flow in flows.get(graph.root, {}).items():
        for part in flow.parts:
            rows[name].forbid(part.rows, "its scale reaches the loss")
    for name, met in met_before.items():
        known = rows[name]
        # Under tensor parallelism other ranks hold the rest of the rows.
        if not known.varies and not known.elsewhere:
            known.varies = not bool(known.reached().all())
        known.met |= met


def _leaving(operation: Operation, flows: Flows) -> Flows:
    """What leaves an operation; nothing where it blocks the scale, and then its rows must not be
    scaled."""
    try:
        return _apply(operation, flows)
    except Blocked as blocked:
        for part in _parts_of(*flows):
            operation.rows.forbid(part.rows, str(blocked))
        return ()


def _still_scaling(
    operation: Operation,
    k: int,
    flow: Flow,
) -> Iterator[Flow]:
    """The parts of output ``k`` that still depend on the scale; the others have met a
    normalization."""
    sign = operation.graph.signs.of((operation.node, k))
    for part in flow.parts:
        if not bool(part.rows.any()):
            # Nothing of the weight is in it.
            continue
        # Roots and powers leave thirds and such, whose sums are not exactly 0.
        degree = round(part.degree, 9)
        if degree == 0:
            operation.rows.met[part.rows] = True
            operation.rows.norms.setdefault(_normalization_name(operation))
        elif degree != part.degree or sign > part.sign:
            yield replace(part, degree=degree, sign=max(part.sign, sign))
        else:
            yield part


def _apply(operation: Operation, flows: Flows) -> Flows:
    """What leaves an operation, also where entries of one tensor scale by different degrees."""
    if not any(flow and flow.other for flow in flows):
        return _apply_rule(operation, flows)
    k, *others = [k for k, flow in enumerate(flows) if flow]
    if others:
        # Only the rules of matrix products understand several degrees in two factors.
        if operation.name not in ("MmBackward0", "BmmBackward0"):
            raise Blocked(f"{operation.place} combines entries that scale differently")
        return _apply_rule(operation, flows)

    # With one such input, each degree passes by itself.
    results = []
    for part in _parts_of(flows[k]):
        alone: list[Flow | None] = [None] * len(flows)
        alone[k] = part
        results.append(_apply_rule(operation, alone))
    leaving: list[Flow | None] = []
    for outputs in zip(*results, strict=True):
        parts = _parts_of(*outputs)
        leaving.append(joined(parts) if parts else None)
    return leaving


def _parts_of(*flows: Flow | None) -> list[Flow]:
    parts = []
    for flow in flows:
        if flow:
            parts.extend(flow.parts)
    return parts


def _apply_rule(operation: Operation, flows: Flows) -> Flows:
    # Looked up at every operation: a user may have registered one since the last walk.
    rule = RULES.get(operation.name)
    if rule is None:
        raise Blocked(why_not(operation))
    try:
        result = rule(operation, flows)
    except Blocked:
        raise
    except Exception as error:
        # A rule that meets something unforeseen costs a target, not a training run.
        found = f"{type(error).__name__}: {error}"
        raise Blocked(f"the rule for {operation.place} failed ({found})") from None
    if isinstance(result, Sequence):
        return result
    return [result]


def _normalization_name(operation: Operation) -> str:
    """The normalization module, or the node that did it by hand and the module it happened in."""
    name, module = operation.module
    # A module with children, or with a matrix of its own, is no normalization: one happens inside
    # it.
    has_children = module is not None and next(module.children(), None) is not None
    if module is None or has_children or any(p.ndim > 1 for p in module.parameters(False)):
        return operation.place
    return name
