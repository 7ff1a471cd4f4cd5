"""How a scale flows through single operations: what is claimed holds, what is expected is found,
what is not understood is said."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance import graph_rules
from lightning_normdyn.invariance.checks import inspect_module, verify_scale_invariance
from lightning_normdyn.invariance.graph_rules import (
    Flow,
    Offset,
    Rows,
    compact,
    new_offset,
    register_rule,
    reshaped,
)
from lightning_normdyn.invariance.search import ScaleInvarianceSearch

# -------------------------------------------------------------------------- union-find and reshapes


def naive_classes(n: int, pairs) -> list[int]:
    label = list(range(n))
    for a, b in pairs:
        a, b = label[a], label[b]
        label = [min(a, b) if x in (a, b) else x for x in label]
    return label


@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_a_naive_union_find(seed):
    torch.manual_seed(seed)
    rows, n = Rows(40), 41
    pairs = []
    for _ in range(4):
        a, b = torch.randint(n, (2, 6)).unbind()
        rows.unite(a, b, "because")
        pairs += list(zip(a.tolist(), b.tolist(), strict=True))
    assert rows.parent.tolist() == naive_classes(n, pairs)


def test_rows_broadcast_and_give_the_reason_only_when_freedom_is_lost():
    rows = Rows(6)
    rows.unite(torch.tensor([[1], [2]]), torch.tensor([[3, 4]]), "meeting")
    assert rows.parent.tolist() == [0, 1, 1, 1, 1, 5, 6]
    assert not rows.reasons
    rows.forbid(torch.tensor([4]), "stopped")
    assert rows.parent.tolist() == [0, 0, 0, 0, 0, 5, 6]
    assert list(rows.reasons) == ["stopped"]


@pytest.mark.parametrize(
    ("small", "old", "new"),
    [
        ((1, 6, 1), (4, 6, 5), (4, 2, 3, 5)), ((1, 6, 1), (4, 6, 5), (4, 30)), ((4, 1, 1), (4, 6, 5), (2, 2, 6, 5)),
        ((1, 1, 5), (4, 6, 5), (24, 5)),
        ((1, 6), (4, 6), (1, 4, 6)), ((1, 6), (4, 6), (24,)), ((1, 6, 1), (4, 6, 1), (4, 6)), ((6,), (6,), (1, 6, 1, 1)),
        ((1, 1), (4, 6), (3, 8)),
        ((1,), (1,), ()), ((), (), (1, 1)), ((4, 6), (4, 6), (2, 12)), ((1, 6), (1, 6), (6,)), ((2, 1, 6), (2, 3, 6), (6, 6)),
    ],
)  # fmt: skip
def test_reshapes_equal_expanding_first(small, old, new):
    rows = torch.arange(torch.Size(small).numel()).reshape(small)
    flow = reshaped(Flow(1, rows), old, new)
    assert flow.rows.ndim == len(new)
    assert torch.equal(flow.rows.expand(new), rows.expand(old).reshape(new))


def test_reshapes_of_nothing():
    assert reshaped(Flow(1, torch.ones(1, 3, dtype=torch.long)), (0, 3), (3, 0)).rows.shape == (
        1,
        1,
    )


@pytest.mark.parametrize(
    ("varies", "old", "new", "after", "parameter"),
    [
        ((False, True, False), (4, 6, 5), (4, 6, 5, 1), (False, True, False, False), "b"),
        ((False, True, False), (4, 6, 5), (4, 2, 3, 5), (False, True, True, False), None),
        (
            (False, True, False),
            (4, 6, 5),
            (1, 24, 5),
            (False, True, False),
            "b",
        ),  # InstanceNorm: the bias again from its start
        ((True, False, False), (4, 6, 5), (1, 24, 5), (False, True, False), None),
        ((False, True), (4, 6), (24,), (True,), "b"),
    ],
)
def test_reshapes_of_offsets(varies, old, new, after, parameter):
    offset = Offset(varies, 0, "b")
    result = reshaped(
        Flow(1, torch.ones([1] * len(old), dtype=torch.long), offset), old, new
    ).offset
    assert result.varies == after
    assert result.parameter == parameter


def test_compact():
    assert compact(torch.tensor([[1, 1], [2, 2]])).tolist() == [[1], [2]]
    assert compact(torch.tensor([[1, 2], [1, 2]])).tolist() == [[1, 2]]


def test_new_offsets_differ():
    assert new_offset([True]).token != new_offset([True]).token


# -------------------------------------------------------------------------------- single operations


def claim(net: nn.Module, *inputs) -> str:
    """Kind of the first weight, after making sure that what is claimed holds (in float64, with tiny
    epsilons)."""
    for part in net.modules():
        if isinstance(getattr(part, "eps", None), float):
            part.eps = 1e-30
    verdicts = inspect_module(net, *inputs)
    assert not any("failed" in v.reason for v in verdicts)
    assert verify_scale_invariance(net, *inputs, verdicts=verdicts, tolerance=1e-6)
    return verdicts[0].kind


MISSED = "no"  # scale-invariant, but the bias is lost track of in rearrangements as rare as these

TO_ROWS = torch.tensor([1, 0, 1, 3])[:, None, None, None].expand(4, 4, 6, 6)

# What stands between a convolution and its BatchNorm: (operation, kind without a bias, kind with
# one).
BETWEEN = {
    "nothing": (lambda x: x, "filter", "filter"),
    "relu": (F.relu, "filter", "no"),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), "filter", "no"),
    "relu by clamp": (lambda x: x.clamp(min=0), "filter", "no"),
    "negative part": (lambda x: x.clamp(max=0), "no", "no"),
    "rrelu": (lambda x: F.rrelu(x, training=True), "filter", "no"),
    "abs": (torch.abs, "filter", "no"),
    "square": (torch.square, "filter", "no"),
    "square root of the absolute value": (lambda x: x.abs().sqrt(), "filter", "no"),
    "maxout": (lambda x: torch.maximum(x[:, ::2], x[:, 1::2]).repeat(1, 2, 1, 1), "group", "no"),
    "relu6": (F.relu6, "no", "no"),
    "gelu": (F.gelu, "no", "no"),
    "sigmoid gate": (lambda x: x * torch.sigmoid(x), "no", "no"),
    "softmax": (lambda x: x.softmax(1), "no", "no"),
    "dropout": (lambda x: F.dropout(x, 0.3), "filter", "no"),
    "dropout2d": (lambda x: F.dropout2d(x, 0.3), "filter", "no"),
    "scalar": (lambda x: 3 * x / 2, "filter", "filter"),
    "plus one": (lambda x: x.mul(2).add(torch.ones(4, 1, 1, dtype=x.dtype, requires_grad=True)), "filter", "filter"),
    "minus": (lambda x: torch.ones(4, 1, 1, dtype=x.dtype, requires_grad=True) - x, "filter", "filter"),
    "max_pool": (lambda x: F.max_pool2d(x, 2), "filter", "filter"),
    "max_pool with padding": (lambda x: F.max_pool2d(x, 3, padding=1), "filter", "filter"),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), "filter", "filter"),
    "avg_pool with padding": (lambda x: F.avg_pool2d(x, 2, padding=1), "filter", "no"),
    "avg_pool without counting the padding": (lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False), "filter", "filter"),
    "avg_pool in ceil mode": (lambda x: F.avg_pool2d(x, 3, ceil_mode=True), "filter", "filter"),
    "avg_pool with a divisor": (lambda x: F.avg_pool2d(x, 3, ceil_mode=True, divisor_override=4), "filter", "no"),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, 3), "filter", "filter"),
    "adaptive_max_pool": (lambda x: F.adaptive_max_pool2d(x, 3), "filter", "filter"),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), "filter", "no"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), "filter", "filter"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "filter", "filter"),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "filter", "filter"),
    "zero padding": (lambda x: F.pad(x, (1, 1, 1, 1)), "filter", "no"),
    "cropping": (lambda x: F.pad(x, (-1, -1, -1, -1)), "filter", "filter"),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "filter", "filter"),
    "replication": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), "filter", "filter"),
    "slice": (lambda x: x[:, :, 1:-1, ::2], "filter", "filter"),
    "slice of channels": (lambda x: x[:, 1:3].repeat(1, 2, 1, 1), "partly", "partly"),
    "roll": (lambda x: x.roll(1, 2), "filter", "filter"),
    "roll of channels": (lambda x: x.roll(1, 1), "filter", "filter"),
    "flip": (lambda x: x.flip(3), "filter", "filter"),
    "index": (lambda x: x[torch.tensor([1, 0, 3, 2])], "filter", "filter"),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 2, 1, 0])), "filter", "filter"),
    "index of pairs": (lambda x: x[torch.arange(4), :, torch.arange(4) % 3, :, None], "filter", "filter"),
    "index of places": (lambda x: x[:, :, torch.tensor([0, 2, 4]), torch.tensor([1, 1, 5]), None], "filter", "filter"),
    "packed by a mask": (
        lambda x: x.permute(0, 2, 3, 1)[torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5][..., None, None],
        "filter",
        "filter",
    ),
    "parts of the batch": (lambda x: torch.cat([part[:1] for part in x.chunk(2)]), "filter", "filter"),
    "unbound and stacked": (lambda x: torch.stack(x.unbind(2), 2), "filter", "filter"),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), "filter", "filter"),
    "rot90 of channels": (lambda x: torch.rot90(x[:, :, :4], 1, (1, 2)), "layer", "no"),
    "max_unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), "filter", "no"),
    "masked_fill": (lambda x: x.masked_fill(torch.ones(6, 6).tril() > 0, 0.0), "filter", "no"),
    "masked_fill with a tensor": (lambda x: x.masked_fill(torch.ones(6, 6).tril() > 0, torch.tensor(0.0)), "filter", "no"),
    "glu": (lambda x: F.glu(x, 1).repeat(1, 2, 1, 1), "partly", "no"),
    "glu of a row with itself": (lambda x: F.glu(torch.cat([x, x], 1), 1), "no", "no"),
    "index_add": (lambda x: torch.zeros_like(x).index_add(0, torch.tensor([1, 0, 1, 3]), x), "filter", "no"),
    "index_add to itself": (lambda x: x.index_add(0, torch.tensor([1, 0]), x[:2]), "filter", "no"),
    "index_add of channels": (lambda x: torch.zeros_like(x).index_add(1, torch.tensor([1, 0, 1, 3]), x), "layer", "no"),
    "index_add to what does not scale": (lambda x: torch.ones_like(x).requires_grad_().index_add(0, torch.arange(4), x), "no", "no"),
    "index_put that adds": (
        lambda x: torch.zeros_like(x).index_put((torch.tensor([1, 0, 1, 3]),), x, accumulate=True), "layer", "no"
    ),
    "scatter_add": (
        lambda x: torch.zeros_like(x).scatter_add(0, TO_ROWS, x), "filter", "no"
    ),
    "scatter_reduce": (
        lambda x: torch.zeros_like(x).scatter_reduce(0, TO_ROWS, x, "amax"), "filter", "no"
    ),
    "scatter_reduce by products": (
        lambda x: torch.ones_like(x).scatter_reduce(0, TO_ROWS, x, "prod"), "no", "no"
    ),
    "index_reduce": (
        lambda x: torch.zeros_like(x).index_reduce(0, torch.arange(4), x, "mean", include_self=False), "filter", MISSED
    ),
    "segment_reduce": (lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([1, 3]), axis=0), "filter", MISSED),
    "root mean square of a channel": (lambda x: x * torch.rsqrt(F.adaptive_avg_pool2d(x * x, 1) + 1e-30), "filter", "no"),
    "local response normalization": (lambda x: F.local_response_norm(x, 3, alpha=1.0), "no", "no"),
    "one plus a mean as a factor": (lambda x: x * (1 + x.relu().mean((2, 3), keepdim=True)), "no", "no"),
    "divided by a mean plus a small number": (lambda x: x / (x.abs().mean((2, 3), keepdim=True) + 1e-30), "filter", "no"),
    "boolean index": (lambda x: x[torch.tensor([True, False, True, True])], "filter", "filter"),
    "sort": (lambda x: x.sort(3)[0], "filter", "no"),
    "top": (lambda x: x.topk(2, 3)[0], "filter", "no"),
    "cumsum": (lambda x: x.cumsum(2), "filter", "no"),
    "gather": (lambda x: x.gather(3, torch.zeros(4, 4, 6, 2, dtype=torch.long)), "filter", "filter"),
    "cat with itself": (lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1), "filter", "partly"),
    "stack": (lambda x: torch.stack([x, x], 2).flatten(2, 3), "filter", "filter"),
    "split": (lambda x: torch.cat(x.split(1, 1)[::-1], 1), "filter", "filter"),
    "unbind": (lambda x: torch.stack(x.unbind(1), 1), "filter", "filter"),
    "permute": (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "filter", "filter"),
    "flatten": (lambda x: x.flatten(2).unflatten(2, (6, 6)), "filter", "filter"),
    "squeeze": (lambda x: x[None].squeeze(0), "filter", "filter"),
    "sum": (lambda x: x.sum(3, keepdim=True), "filter", "filter"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "filter", "filter"),
    "median": (lambda x: x.median(3, keepdim=True)[0], "filter", "no"),
    "amax": (lambda x: x.amax(3, keepdim=True), "filter", "no"),
    "norm": (lambda x: x.norm(dim=3, keepdim=True), "filter", "no"),
    "std": (lambda x: x.std(3, keepdim=True), "filter", "filter"),
    "diagonal": (lambda x: x.diagonal(0, 2, 3)[..., None], "filter", MISSED),
    "windows": (lambda x: x.unfold(2, 3, 1).mean(-1), "filter", MISSED),
    "im2col": (lambda x: F.unfold(x, 2).unflatten(1, (4, 4)).mean(2)[..., None], "filter", MISSED),
    "triangle": (lambda x: x.tril(), "filter", "no"),
    "pixel_unshuffle": (lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), "filter", MISSED),
    "two branches": (lambda x: x + x.relu(), "filter", "no"),
    "where": (lambda x: torch.where(x > 0, x, 0.5 * x), "filter", "no"),
    "lerp": (lambda x: torch.lerp(x, x.relu(), 0.3), "filter", "no"),
    "centered": (lambda x: (x - x.mean((0, 2, 3), keepdim=True)).relu(), "filter", "filter"),
    "centered twice over": (lambda x: torch.sub(x, x.mean((0, 2, 3), keepdim=True), alpha=2).relu(), "filter", "no"),
    "centered by rows": (lambda x: (x - x.mean(3, keepdim=True)).relu(), "filter", "filter"),
    "not centered": (lambda x: (x[:, :2] - x[:, 2:]).repeat(1, 2, 1, 1).relu(), "group", "no"),
    "added to what does not scale": (lambda x: x + torch.ones_like(x).requires_grad_(), "no", "no"),
    "added constant": (lambda x: x + torch.ones_like(x), "no", "no"),
    "einsum": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(4, dtype=x.dtype) + 1), "layer", MISSED),
    "written into": (lambda x: torch.zeros_like(x).index_put((torch.tensor([2, 1, 0, 3]),), x), "filter", "no"),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_between_a_convolution_and_its_norm(name, bias):
    operation, without, with_bias = BETWEEN[name]
    torch.manual_seed(0)
    net = zoo.Net(
        lambda m, x: m.n(operation(m.a(x))),
        a=nn.Conv2d(3, 4, 1, bias=bias),
        n=nn.BatchNorm2d(4, affine=False),
    )
    assert claim(net, zoo.images(4, 3, 6)) == (with_bias if bias else without)


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
def test_linear_maps_and_normalized_weights(name):
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


NORMS = {
    "BatchNorm": (nn.BatchNorm1d(8), "filter", "filter"),
    "BatchNorm without statistics": (
        nn.BatchNorm1d(8, track_running_stats=False),
        "filter",
        "filter",
    ),
    "LayerNorm": (nn.LayerNorm(8), "layer", "no"),
    "RMSNorm": (nn.RMSNorm(8), "layer", "no"),
    "GroupNorm(2)": (nn.GroupNorm(2, 8), "group", "no"),
    "GroupNorm(1)": (nn.GroupNorm(1, 8), "layer", "no"),
    "normalize": (zoo.Net(lambda m, x: F.normalize(x)), "layer", "no"),
    "RMSNorm by hand": (
        zoo.Net(lambda m, x: x / x.pow(2).mean(-1, keepdim=True).add(1e-30).sqrt()),
        "layer",
        "no",
    ),
    "LayerNorm by hand": (
        zoo.Net(lambda m, x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)),
        "layer",
        "no",
    ),
    "BatchNorm by hand": (
        zoo.Net(lambda m, x: (x - x.mean(0)) * (x.var(0) + 1e-30).rsqrt()),
        "filter",
        "filter",
    ),
    "mean absolute value": (
        zoo.Net(lambda m, x: x / x.abs().mean(-1, keepdim=True)),
        "layer",
        "no",
    ),
    "clamped norm": (
        zoo.Net(lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)),
        "layer",
        "no",
    ),
    "per batch": (zoo.Net(lambda m, x: x / x.norm()), "layer", "no"),
    "heads": (zoo.Net(lambda m, x: F.rms_norm(x.view(-1, 4, 2), (2,)).flatten(1)), "group", "no"),
    "max": (zoo.Net(lambda m, x: x / x.amax(1, keepdim=True)), "layer", "no"),
    "none": (nn.Identity(), "no", "no"),
    "not quite centered": (
        zoo.Net(lambda m, x: torch.sub(x, x.mean(0), alpha=2).square().mean(0)),
        "no",
        "no",
    ),
    "only centered": (zoo.Net(lambda m, x: x - x.mean(0)), "no", "no"),
    "detached": (zoo.Net(lambda m, x: x / x.norm(dim=-1, keepdim=True).detach()), "no", "no"),
    "a constant": (zoo.Net(lambda m, x: x / 3), "no", "no"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_normalizations(name, bias):
    norm, without, with_bias = NORMS[name]
    torch.manual_seed(0)
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Linear(6, 8, bias=bias), n=norm)
    assert claim(net, zoo.vectors()) == (with_bias if bias else without)


def test_group_norm_of_single_channels_forgives_a_bias_unless_it_is_spatial():
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=nn.Conv2d(3, 4, 1), n=nn.GroupNorm(4, 4))
    assert claim(net, zoo.images()) == "filter"
    net = zoo.Net(
        lambda m, x: m.n(m.a(x) + m.position),
        a=nn.Conv2d(3, 4, 1),
        position=nn.Parameter(torch.randn(4, 8, 1)),
        n=nn.GroupNorm(4, 4),
    )
    assert claim(net, zoo.images()) == "no"


def test_a_bilinear_map():
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
def test_messages_by_a_sparse_matrix(layout):
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
def test_values_shared_by_grouped_queries(heads):
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


def test_embedding_bags_go_together():
    net = zoo.Net(
        lambda m, ids: m.n(m.e(ids)), e=nn.EmbeddingBag(7, 4, mode="sum"), n=nn.LayerNorm(4)
    )
    assert claim(net, zoo.tokens()) == "layer"
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=nn.EmbeddingBag(7, 4), n=nn.BatchNorm1d(4))
    assert claim(net, zoo.tokens()) == "filter"  # its columns


def test_one_bias_before_and_after_a_rearrangement_is_one_offset():
    """The same layer called twice adds the same bias; what is equal cancels, and one BatchNorm
    removes it from both."""
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.a(2 * x)])), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)
    )
    assert claim(net, zoo.vectors()) == "filter"
    (link,) = inspect_module(net, zoo.vectors())[0].batch_norms
    assert link.bias == "a.bias"
    net = zoo.Net(
        lambda m, x: m.n(torch.cat([m.a(x), m.b(x)])),
        a=nn.Linear(6, 5),
        b=nn.Linear(6, 5),
        n=nn.BatchNorm1d(5),
    )
    assert claim(net, zoo.vectors()) == "no"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x.flip(0)), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "filter"
    net = zoo.Net(lambda m, x: F.normalize(m.a(x) - m.a(x).roll(1, 1), dim=0), a=nn.Linear(6, 5))
    assert claim(net, zoo.vectors()) == "no"


def test_the_bias_of_a_batch_in_parts_is_known():
    """Ghost batch normalization: one BatchNorm on parts of the batch, whose statistics follow a
    rescale."""
    net = zoo.Net(
        lambda m, x: torch.cat([m.n(part) for part in m.a(x).chunk(2)]),
        a=nn.Linear(6, 5),
        n=nn.BatchNorm1d(5),
    )
    verdict = inspect_module(net, zoo.vectors())[0]
    assert (
        verdict.kind,
        verdict.stale_statistics,
        [link.bias for link in verdict.batch_norms],
    ) == ("filter", (), ["a.bias"])


def test_embedding_rows_that_meet_are_one_layer():
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=nn.Embedding(7, 4), n=nn.LayerNorm((5, 4)))
    assert claim(net, zoo.tokens()) == "layer"
    net = zoo.Net(
        lambda m, ids: m.n(m.e(ids).transpose(1, 2)), e=nn.Embedding(7, 4), n=nn.BatchNorm1d(4)
    )
    assert claim(net, zoo.tokens()) == "filter"  # its columns
    net = zoo.Net(lambda m, ids: m.e(ids), e=nn.Embedding(7, 4))
    assert claim(net, zoo.tokens()) == "no"


# ------------------------------------------------------------------------- reasons and registration

REASONS = {
    "GeluBackward0 does not commute": lambda m, x: m.n(F.gelu(m.a(x))),
    "bias a.bias is added before ReluBackward0": lambda m, x: m.n(F.relu(m.a(x))),
    "added to a tensor that does not scale with it": lambda m, x: m.n(m.b(x) + m.a(x)),
    "its scale reaches the loss": lambda m, x: m.a(x),
    "LinalgDetBackward0 factors, inverts or solves with a matrix": lambda m, x: (
        m.n(m.a(x)) * torch.linalg.det(m.a.weight)
    ),
    "scale differently": lambda m, x: m.n(
        F.linear(x, m.a.weight) + F.linear(x, m.a.weight).square()
    ),
    "a constant is added": lambda m, x: m.n(m.a(x) + torch.ones_like(x)),
    "SafeSoftmaxBackward0 does not commute": lambda m, x: m.n(torch._safe_softmax(m.a(x), -1)),
    "CopySlices writes into a part of a tensor in place": lambda m, x: m.n(written_over(m.a(x))),
    "SliceScatterBackward0 writes into a part of a tensor": lambda m, x: m.n(
        m.a(x).slice_scatter(torch.ones(6, 2).double(), 1, 0, 2)
    ),
    "AsStridedBackward0 reads memory in another layout": lambda m, x: m.n(
        m.a(x).as_strided((6, 6), (6, 1))
    ),
    "GroupedMmBackward0 multiplies groups of rows": lambda m, x: m.n(grouped(m.a(x)).double()),
    "FftR2CBackward0 is a Fourier transform": lambda m, x: m.n(
        torch.fft.rfft(m.a(x), 6).abs()[:, [0, 1, 2, 3, 2, 1]]
    ),
    "FftC2CBackward0 is a Fourier transform": lambda m, x: m.n(
        torch.fft.fft(x.mul(1j) @ m.a.weight.mul(1.0 + 0j)).real
    ),
    "computes with complex numbers": lambda m, x: m.n(
        torch.view_as_complex(m.a(x).view(6, 3, 2)).abs().repeat(1, 2)
    ),
    "LinalgInvExBackward0 factors, inverts": lambda m, x: m.n(
        m.b(x) @ torch.linalg.inv(m.a.weight)
    ),
    "a constant is added to what enters NativeLayerNorm": lambda m, x: F.layer_norm(
        attended(x @ m.a.weight) + 1.0, (6,)
    ),
    "a constant is added to what enters MmBackward0": lambda m, x: m.n(
        (attended(x @ m.a.weight) + 1.0) @ m.b.weight.t()
    ),
    "LogcumsumexpBackward0 does not commute": lambda m, x: m.n(m.a(x).logcumsumexp(1)),
}


def written_over(x):
    x = x.clone()
    x[:, 0] = 1.0
    return x


def attended(x):
    """Means of what is not negative, weighted by an attention that does not depend on it."""
    return torch.ones(len(x), len(x), dtype=x.dtype, requires_grad=True).softmax(-1) @ x.abs()


def grouped(x):
    tokens = torch.cat([x, x, x[:, :4]], 1).bfloat16()
    experts = torch.ones(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    return torch._grouped_mm(tokens, experts, offs=torch.tensor([2, 6], dtype=torch.int32))[:, :6]


@pytest.mark.parametrize("reason", REASONS)
def test_the_blocking_operation_is_named(reason):
    net = zoo.Net(REASONS[reason], a=nn.Linear(6, 6), b=nn.Linear(6, 6), n=nn.BatchNorm1d(6))
    assert re.search(re.escape(reason), inspect_module(net, zoo.vectors(6))[0].reason)


def test_a_recurrent_layer_says_what_it_is():
    verdict = inspect_module(nn.LSTM(6, 6), torch.randn(3, 2, 6))[0]
    assert "MkldnnRnnLayerBackward0" in verdict.reason
    assert (
        "is a whole recurrent layer, whose gates do not commute with a change of scale"
        in verdict.reason
    )


class NamedEpsilon(nn.Module):
    """A root-mean-square normalization written by hand, with its epsilon under another name."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, value)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(self, self.name))


@pytest.mark.parametrize(
    "name",
    [
        "eps",
        "epsilon",
        "variance_epsilon",
        "layer_norm_epsilon",
        "norm_eps",
        "rms_norm_eps",
        "_eps",
    ],
)
def test_an_epsilon_is_known_by_its_name(name):
    for value, harmless in ((1e-6, True), (1e-2, False)):
        net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(6, 6), n=NamedEpsilon(name, value))
        with ScaleInvarianceSearch(net) as search:
            search.analyze(net(zoo.vectors()).sum())
        assert search.verdicts["a.weight"].kind == "layer"
        assert search.verdicts["a.weight"].eps is not harmless


def test_an_epsilon_that_no_name_tells_is_marked():
    for name in ("steps", "reps"):
        net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(6, 6), n=NamedEpsilon(name, 1e-6))
        with ScaleInvarianceSearch(net) as search:
            search.analyze(net(zoo.vectors()).sum())
        assert search.verdicts["a.weight"].eps
    assert graph_rules.declared_epsilon(nn.Linear(2, 2)) is None
    assert graph_rules.declared_epsilon(nn.RMSNorm(2)) == 0.0
    tensor = nn.Module()
    tensor.register_buffer("eps", torch.tensor(1e-6))
    assert graph_rules.declared_epsilon(tensor) == float("inf")


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


def test_conditions_are_marked():
    def verdicts(threshold):
        net = zoo.Net(
            lambda m, x: m.n(torch.where(m.a(x) > threshold, m.a(x), 0.1 * m.a(x))),
            a=zoo.linear(6, 4),
            n=nn.LayerNorm(4),
        )
        with ScaleInvarianceSearch(net) as search:
            search.analyze(net(zoo.vectors()).sum())
        return net, search.verdicts["a.weight"]

    net, verdict = verdicts(0)
    assert verdict.kind == "layer"
    assert verdict.eps
    assert verify_scale_invariance(net, zoo.vectors())
    net, verdict = verdicts(
        0.3
    )  # a condition that looks at the scale: the graph is the same, only the function tells
    assert verdict.kind == "layer"
    assert not verify_scale_invariance(net, zoo.vectors())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_rules_for_custom_functions(monkeypatch):
    monkeypatch.setattr(graph_rules, "RULES", dict(graph_rules.RULES))
    net = zoo.Net(
        lambda m, x: m.n(Doubled.apply(F.linear(x, m.a.weight))),
        a=nn.Linear(6, 8),
        n=nn.LayerNorm(8),
    )
    verdict = inspect_module(net, zoo.vectors())[0]
    assert verdict.kind == "no"
    assert "no rule for DoubledBackward (`register_rule` adds one)" in verdict.reason
    register_rule("DoubledBackward", graph_rules.homogeneous)
    assert claim(net, zoo.vectors()) == "layer"

    def broken(operation, flows):
        raise KeyError("x")

    register_rule("DoubledBackward", broken)
    assert (
        "rule for DoubledBackward failed (KeyError: 'x')"
        in inspect_module(net, zoo.vectors())[0].reason
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [("", graph_rules.homogeneous), (1, graph_rules.homogeneous), ("XBackward", "homogeneous")],
)
def test_bad_registrations(name, rule):
    with pytest.raises(ValueError, match=r"must be (the name|callable)"):
        register_rule(name, rule)


def test_every_rule_is_for_an_operation_that_exists():
    """Of this torch; those of python functions are listed. No GPU was at hand for the names that
    only occur there."""
    known = set(dir(torch._C._functions))
    elsewhere = {name for name in graph_rules.RULES if name not in known}
    assert elsewhere - {"RootMeanSquareBackward", "HiddenPenaltyBackward"} == {
        # strategies
        "_DDPSinkBackward", "RegisterPreBackwardFunctionBackward", "RegisterPostBackwardFunctionBackward",
        # DeepSpeed
        "PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward", "LinearFunctionForZeroStage3Backward",
        # DTensor
        "RedistributeBackward", "NestedRedistributeBackward", "_ToTorchTensorBackward", "_FromTorchTensorBackward",
        # kernels
        "SyncBatchNormBackward", "LigerLayerNormFunctionBackward", "LigerRMSNormFunctionBackward",
        "FusedLayerNormFunctionBackward", "FusedLayerNormAffineFunctionBackward", "FusedRMSNormFunctionBackward",
        "FusedRMSNormAffineFunctionBackward",
    }  # fmt: skip
    assert all(f"{name}Backward0" in known for name in graph_rules.NOT_HOMOGENEOUS.split())


# -------------------------------------------------------------------------- what is missed, and why

MISSES = {
    "circular padding": (
        lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
        "CopySlices",
    ),  # in-place writes into views
    "nan_to_num": (lambda x: x.nan_to_num(), "NanToNum"),
    "fft": (lambda x: torch.fft.fft(x).real, "FftR2C"),
    "as_strided": (lambda x: x.as_strided((4, 4, 6, 6), (144, 36, 6, 1)), "AsStrided"),
    "softplus with a tiny beta": (
        lambda x: F.threshold(x, 0.0, 0.0),
        "Threshold",
    ),  # the value is not saved
}


@pytest.mark.parametrize("name", MISSES)
def test_known_misses_are_misses(name):
    operation, node = MISSES[name]
    net = zoo.Net(
        lambda m, x: m.n(operation(m.a(x))), a=nn.Conv2d(3, 4, 1, bias=False), n=nn.BatchNorm2d(4)
    )
    assert claim(net, zoo.images(4, 3, 6)) == "no"
    assert node in inspect_module(net, zoo.images(4, 3, 6))[0].reason
