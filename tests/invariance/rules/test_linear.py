"""Matrix products, convolutions, attention, and weights that are normalized themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.checks import inspect_module

LINEAR_THEN = {
    "linear": (lambda m, x: m.n(m.a(x)), "filter"),
    "linear on sequences": (lambda m, x: m.n(m.a(x[None]).squeeze(0)), "filter"),
    "linear twice": (lambda m, x: m.n(m.a(m.a(x))), "layer"),
    "matmul": (lambda m, x: m.n(x @ m.a.weight.t()), "filter"),
    "weight times": (
        lambda m, x: m.n(m.a.weight @ x.t()),
        "no",
    ),  # rows against a norm over rows and columns: see below
    "einsum": (lambda m, x: m.n(torch.einsum("nd,ed->ne", x, m.a.weight)), "filter"),
    "einsum in heads": (
        lambda m, x: m.n(torch.einsum("nd,hed->nhe", x, m.a.weight.view(2, 3, 6)).flatten(1)),
        "filter",
    ),
    "bmm": (lambda m, x: m.n(torch.bmm(x[None], m.a.weight.t()[None])[0]), "filter"),
    "baddbmm": (
        lambda m, x: m.n(torch.baddbmm(m.a.bias, x[None], m.a.weight.t()[None])[0]),
        "filter",
    ),
    "mv": (lambda m, x: m.n(torch.stack([m.a.weight.mv(row) for row in x])), "filter"),
    "dot": (
        lambda m, x: m.n(torch.stack([torch.stack([w.dot(row) for w in m.a.weight]) for row in x])),
        "filter",
    ),
    "tensordot": (lambda m, x: m.n(torch.tensordot(x, m.a.weight, ([1], [1]))), "filter"),
    "conv1d": (lambda m, x: m.n(F.conv1d(x[..., None], m.a.weight[..., None], m.a.bias)), "filter"),
    "product with itself": (lambda m, x: m.n(m.a(x) * m.a(x)), "no"),  # the bias
    "outer": (lambda m, x: m.n((x[:, None] * m.a.weight).sum(-1)), "filter"),
    "cast": (lambda m, x: m.n(F.linear(x.float(), m.a.weight.float()).double()), "filter"),
    "normalized rows": (lambda m, x: F.linear(x, F.normalize(m.a.weight)), "filter"),
    "normalized columns": (lambda m, x: F.linear(x, F.normalize(m.a.weight, dim=0)), "filter"),
    "divided by its largest entry": (
        lambda m, x: F.linear(x, m.a.weight / m.a.weight.abs().max()),
        "layer",
    ),
    "divided by its sum of squares": (
        lambda m, x: F.linear(x, m.a.weight / m.a.weight.square().sum().sqrt()),
        "layer",
    ),
    "signs": (
        lambda m, x: F.linear(x, m.a.weight.sign()) + 0 * m.a.weight.sum(),
        "no",
    ),  # straight-through in all but name
    "standardized": (
        lambda m, x: F.linear(
            x, (m.a.weight - m.a.weight.mean(1, keepdim=True)) / m.a.weight.std(1, keepdim=True)
        ),
        "filter",
    ),
    "var_mean": (
        lambda m, x: (lambda v, u: F.linear(x, (m.a.weight - u) * v.rsqrt()))(
            *torch.var_mean(m.a.weight, 1, keepdim=True)
        ),
        "filter",
    ),
    "std_mean": (
        lambda m, x: (lambda s, u: F.linear(x, (m.a.weight - u) / s))(
            *torch.std_mean(m.a.weight, 1, keepdim=True)
        ),
        "filter",
    ),
    "residual": (lambda m, x: m.n(x + m.a(x)), "no"),
    "logged": (
        lambda m, x: (m.n(m.a(x)), m.a.weight.norm()),
        "no",
    ),  # part of the outputs, so of the loss here
}


@pytest.mark.parametrize("name", LINEAR_THEN)
def test_linear_maps_and_normalized_weights(name, claim):
    function, expected = LINEAR_THEN[name]
    torch.manual_seed(0)
    net = zoo.Net(function, a=nn.Linear(6, 6), n=nn.BatchNorm1d(6, affine=False))
    inputs = zoo.vectors(6)
    if name == "linear twice":
        net.a.bias = None
    kind = claim(net, inputs)
    if name == "weight times":  # (6, n) normalized over its rows: all rows together
        expected = "layer"
    assert kind == expected


def test_a_bilinear_map(claim):
    net = zoo.Net(lambda m, x: m.n(m.b(x, x[:, :4])), b=nn.Bilinear(6, 4, 5), n=nn.BatchNorm1d(5))
    assert claim(net, zoo.vectors()) == "filter"
    net = zoo.Net(
        lambda m, x: m.n(m.b(m.a(x), m.a(x))),
        a=zoo.linear(6, 4),
        b=nn.Bilinear(4, 4, 5, bias=False),
        n=nn.BatchNorm1d(5),
    )
    assert claim(net, zoo.vectors()) == "layer"


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_messages_by_a_sparse_matrix(layout, claim):
    adjacency = (torch.rand(8, 8) > 0.5).double().to_sparse(layout=layout)
    for multiply in (torch.sparse.mm, torch.matmul):
        net = zoo.Net(
            lambda m, x, multiply=multiply: m.n(multiply(adjacency, m.a(x))),
            a=zoo.linear(6, 5),
            n=nn.BatchNorm1d(5),
        )
        assert claim(net, zoo.vectors()) == "filter"
        net.n = nn.LayerNorm(5).double()
        assert claim(net, zoo.vectors()) == "layer"


@pytest.mark.parametrize("heads", [2, 4])
def test_values_shared_by_grouped_queries(heads, claim):
    def forward(m, x):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(m.nq(q), m.nk(k), v, enable_gqa=True).transpose(1, 2)
        return m.n(y)

    parts = {"v": zoo.linear(8, 8), "q": zoo.linear(8, 4 * heads), "k": zoo.linear(8, 8)}
    net = zoo.Net(forward, **parts, nq=nn.RMSNorm(4), nk=nn.RMSNorm(4), n=nn.RMSNorm(4))
    assert claim(net, zoo.sequences()) == "group"  # the values of one head
    assert [v.kind for v in inspect_module(net, zoo.sequences())] == ["group"] * 3


def test_filters_behind_an_axis_of_one():
    """StyleGAN2 stores its modulated convolutions as (1, O, I, k, k)."""

    def forward(m, x, style):
        w = m.a * style.view(len(x), 1, 3, 1, 1)
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-30)
        return F.conv2d(x.reshape(1, -1, 8, 8), w.flatten(0, 1), padding=1, groups=len(x))

    net = zoo.Net(forward, a=zoo.weight(1, 4, 3, 3, 3))
    (verdict,) = inspect_module(net, zoo.images(2), torch.rand(2, 3, dtype=torch.float64))
    assert (verdict.kind, verdict.n) == ("filter", 4)


def test_masks_that_are_learnt_are_not_free():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask, self.v, self.n = (
                nn.Parameter(torch.randn(5, 5)),
                nn.Linear(8, 8, bias=False),
                nn.LayerNorm(8),
            )

        def forward(self, x):
            return self.n(
                F.scaled_dot_product_attention(
                    x[:, None], x[:, None], self.v(x)[:, None], attn_mask=self.mask
                )
            )

    kinds = [v.kind for v in inspect_module(Biased().double(), zoo.sequences())]
    assert kinds == ["no", "layer"]
