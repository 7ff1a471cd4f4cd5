"""The operations between parameters and a loss; what is known of the signs of values, whatever they
were computed from; which module's forward created a node: the innermost, also after an exception
and inside an open forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_normdyn.invariance.flow import Sign
from lightning_normdyn.invariance.graph import (
    GraphNode,
    ModuleSpans,
    edge_shape,
    node_name,
    signed,
    sources_of,
    trace,
)


def weight(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def test_a_node_knows_its_inputs_and_outputs():
    a = weight(2, 3)
    node = GraphNode.of((a * torch.ones(3)).split(2, 1)[0].grad_fn)
    assert node.name == "SplitBackward0"
    assert node.inputs == ((2, 3),)
    assert node.outputs == ((2, 2), (2, 1))
    (source,) = node.sources
    product = GraphNode.of(source[0])
    assert product.name == "MulBackward0"
    assert product.sources[1] is None
    assert product.inputs == ((2, 3), None)


def test_what_has_no_entries_is_seen():
    pieces = weight(3, 2).split([3, 0])
    node = GraphNode.of(pieces[0].grad_fn)
    assert [node.is_empty(k) for k in range(3)] == [False, True, False]
    assert not node.gives_nothing
    assert GraphNode.of(weight(3, 2)[:0].grad_fn).gives_nothing


def test_names_have_no_namespace():
    assert node_name(weight(1).exp().grad_fn) == "ExpBackward0"

    class Named:
        def name(self):
            return "torch::autograd::AccumulateGrad"

    assert node_name(Named()) == "AccumulateGrad"


def test_shapes_and_sources_of_edges():
    a = weight(4, 5)
    ((node, k),) = sources_of(a.relu().grad_fn)
    assert edge_shape((node, k)) == (4, 5)
    assert edge_shape((node, 7)) == ()


def test_negative_numbers_come_back():
    dim = weight(2, 3).sum(-1).grad_fn._saved_dim[0]
    assert dim >= 2**63
    assert signed(dim) == -1
    assert signed(1) == 1
    assert signed(None) is None


def test_saved_tensors_are_not_read_where_reading_computes():
    mask = torch.tensor([1.0, 0.0])
    readable, value = GraphNode.of((weight(2) * mask).grad_fn).saved_tensor("other")
    assert readable
    assert torch.equal(value, mask)

    def unpack(packed):
        raise AssertionError("read")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        product = weight(2) * mask
    node = GraphNode.of(product.grad_fn)
    assert node.saved_tensor("other") == (False, None)
    assert node.saved_tensor("nothing") == (False, None)


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


def sign_of(result: torch.Tensor) -> Sign:
    graph = trace(result, {}, lambda node: ("", None))
    return graph.signs.of(graph.root)


def x() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


SIGNS = {
    "a tensor": (lambda: x() + x(), Sign.ANY),
    "relu": (lambda: x().relu(), Sign.NONNEGATIVE),
    "softmax": (lambda: x().softmax(1), Sign.NONNEGATIVE),
    "a square": (lambda: (lambda a: a * a)(x()), Sign.NONNEGATIVE),
    "a product": (lambda: x() * x(), Sign.ANY),
    "a product of what is not negative": (lambda: x().relu() * x().abs(), Sign.NONNEGATIVE),
    "a product with a constant": (lambda: x().relu() * torch.randn(4), Sign.ANY),
    "a sum of what is not negative": (lambda: x().exp().sum(1), Sign.STATISTIC),
    "a mean of anything": (lambda: x().mean(), Sign.ANY),
    "a product of matrices": (lambda: x().relu() @ x().relu().t(), Sign.STATISTIC),
    "a vector with itself": (lambda: (lambda a: a.dot(a))(x()[0]), Sign.STATISTIC),
    "a view": (lambda: x().relu().view(2, 6).t(), Sign.NONNEGATIVE),
    "joined with anything": (lambda: torch.cat([x().relu(), x()]), Sign.ANY),
    "two terms": (lambda: x().relu() + x().exp(), Sign.NONNEGATIVE),
    "a difference": (lambda: x().relu() - x().exp(), Sign.ANY),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_values(name):
    make, expected = SIGNS[name]
    assert sign_of(make()) == expected


def test_nothing_is_known_of_a_constant():
    graph = trace(x().relu(), {}, lambda node: ("", None))
    assert graph.signs.of(None) == Sign.ANY


# Linear attention: ones are appended to the values, attended to with the values, and cut off as the
# denominator.
APPENDED = {
    "columns": (lambda: (x().relu() @ F.pad(values(), (0, 1), value=1.0))[:, 2:], True),
    "columns of both": (lambda: (x().relu() @ F.pad(values(), (0, 1), value=1.0))[:, 1:], False),
    "rows": (
        lambda: (F.pad(values().t(), (0, 0, 0, 1), value=1.0) @ x().relu().t())[2:],
        True,
    ),
    "rows that were turned": (
        lambda: (F.pad(values(), (0, 1), value=1.0).transpose(0, 1) @ x().relu().t())[2:],
        True,
    ),
    "weights of any sign": (lambda: (x() @ F.pad(values(), (0, 1), value=1.0))[:, 2:], False),
    "in front": (lambda: (x().relu() @ F.pad(values(), (1, 0), value=1.0))[:, :1], False),
    "cut from the end": (lambda: (x().relu() @ F.pad(values(), (0, 1)))[:, -1:], True),
}


def values() -> torch.Tensor:
    return torch.randn(4, 2, requires_grad=True)


@pytest.mark.parametrize("name", APPENDED)
def test_sums_of_what_was_appended_are_statistics(name):
    make, is_statistic = APPENDED[name]
    assert (sign_of(make()) == Sign.STATISTIC) is is_statistic


def node_of(spans: ModuleSpans, x: Tensor) -> tuple[str, nn.Module | None]:
    assert x.grad_fn is not None
    return spans.module_of(x.grad_fn)


def test_a_node_belongs_to_the_innermost_forward():
    spans, outer, inner = ModuleSpans(), nn.Identity(), nn.Identity()
    x = torch.ones(2, requires_grad=True)
    before = x * 2
    spans.enter(outer, "outer")
    first = before * 2
    spans.enter(inner, "outer.inner")
    second = first * 2
    spans.leave(inner)
    third = second * 2
    spans.leave(outer)
    after = third * 2
    assert [node_of(spans, y) for y in (before, first, second, third, after)] == [
        ("", None),
        ("outer", outer),
        ("outer.inner", inner),
        ("outer", outer),
        ("", None),
    ]


def test_a_forward_that_is_still_open_reaches_until_now():
    spans, module = ModuleSpans(), nn.Identity()
    spans.enter(module, "root")
    x = torch.ones(2, requires_grad=True) * 2
    assert node_of(spans, x) == ("root", module)


def test_modules_that_an_exception_ended_are_left_with_the_one_above_them():
    spans, outer, broken = ModuleSpans(), nn.Identity(), nn.Identity()
    x = torch.ones(2, requires_grad=True)
    spans.enter(outer, "outer")
    spans.enter(broken, "outer.broken")
    spans.leave(outer)
    after = x * 2
    assert node_of(spans, after) == ("", None)
    spans.leave(broken)  # it was never closed: nothing to do
