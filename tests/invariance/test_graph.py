"""The operations between parameters and a loss."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from lightning_normdyn.invariance.graph import trace


def edge_of(tensor: torch.Tensor):
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def traced(loss: torch.Tensor, **parameters: torch.Tensor):
    names = {edge_of(tensor): name for name, tensor in parameters.items()}
    return trace(loss, names, lambda node: ("", None)), names


def test_inputs_come_first_and_every_operation_once():
    w = torch.ones(2, 3, requires_grad=True)
    shared = w.relu()
    graph, _ = traced((shared * shared.exp()).sum(), w=w)
    assert [node.name for node in graph.nodes] == [
        "ReluBackward0",
        "ExpBackward0",
        "MulBackward0",
        "SumBackward0",
    ]
    done = set(graph.parameters)
    for node in graph.nodes:
        assert {source for source in node.sources if source is not None} <= done
        done.update((node.node, k) for k in range(len(node.outputs)))
    assert graph.root in done


def test_only_parameters_that_occur_have_a_shape():
    used, other = torch.ones(2, 3, requires_grad=True), torch.ones(5, requires_grad=True)
    graph, names = traced(used.sum(), used=used, other=other)
    assert {names[edge]: shape for edge, shape in graph.shapes.items()} == {"used": (2, 3)}


def test_what_a_parameter_was_computed_from_is_not_followed():
    source = torch.ones(3, requires_grad=True)
    w = source.exp()
    graph, _ = traced(w.relu().sum(), w=w)
    assert "ExpBackward0" not in [node.name for node in graph.nodes]


def test_a_deep_graph_needs_no_recursion():
    w = torch.ones(1, requires_grad=True)
    x = w
    for _ in range(3000):
        x = x + 1
    graph, _ = traced(x, w=w)
    assert len(graph.nodes) == 3000


def test_operations_that_hide_others_are_named():
    w = torch.ones(3, requires_grad=True)
    graph, _ = traced(checkpoint(torch.exp, w, use_reentrant=True).sum(), w=w)
    assert graph.opaque == ["CheckpointFunctionBackward"]
    assert traced(w.exp().sum(), w=w)[0].opaque == []
