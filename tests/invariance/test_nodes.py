"""What torch says about one operation, as plain data."""

from __future__ import annotations

import torch

from lightning_normdyn.invariance.nodes import (
    GraphNode,
    edge_shape,
    node_name,
    saved_tensor,
    signed,
    sources_of,
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
    readable, value = saved_tensor((weight(2) * mask).grad_fn, "other")
    assert readable
    assert torch.equal(value, mask)

    def unpack(packed):
        raise AssertionError("read")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        product = weight(2) * mask
    assert saved_tensor(product.grad_fn, "other") == (False, None)
    assert saved_tensor(product.grad_fn, "nothing") == (False, None)
