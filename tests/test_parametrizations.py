"""The weight-normalization family: the papers' formulas, the invariance they promise, and what
people do to modules."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import init_process_group, run_ranks
from torch import nn

from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.functional import gradient_cosine, weight_norm, weight_std
from lightning_normdyn.parametrizations import (
    bounded_weight_normalization,
    centered_weight_normalization,
    is_weight_standardized,
    remove_weight_normalizations,
    weight_normalization,
    weight_standardization,
)

FAMILY = [
    weight_normalization,
    centered_weight_normalization,
    weight_standardization,
    bounded_weight_normalization,
]


def direction(layer, name="weight"):
    chain = layer.parametrizations[name]
    return chain.original1 if hasattr(chain, "original1") else chain.original


def filters(weight):
    return [w.double() for w in weight.detach()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formulas_of_the_paper(dtype):
    torch.manual_seed(0)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]

    def check(layer, expected):
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(
            layer.weight.double(), torch.stack(expected), rtol=tolerance, atol=tolerance
        )

    def conv():
        return nn.Conv2d(4, 6, 3, dtype=dtype)

    layer = conv()
    w = filters(layer.weight)
    check(weight_normalization(layer), w)  # the gain starts as the norm: nothing changes
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(2.0)
    check(layer, [2 * v / v.norm() for v in w])

    layer = conv()
    w = filters(layer.weight)
    check(centered_weight_normalization(layer), [v - v.mean() for v in w])
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(2.0)
    check(layer, [2 * (v - v.mean()) / (v - v.mean()).norm() for v in w])

    layer = conv()
    w = filters(layer.weight)
    check(weight_standardization(layer), [(v - v.mean()) / v.std(correction=0) for v in w])
    layer = conv()
    w = filters(layer.weight)
    check(
        weight_standardization(layer, eps=0.1),
        [(v - v.mean()) / (v.std(correction=0) + 0.1) for v in w],
    )

    layer = conv()
    w = filters(layer.weight)
    check(bounded_weight_normalization(layer, length=3.0), [3 * v / v.norm() for v in w])
    layer = conv()
    w = filters(layer.weight)
    rms = torch.stack([v.norm() for v in w]).square().mean().sqrt()
    check(bounded_weight_normalization(layer), [rms * v / v.norm() for v in w])


def test_weight_normalization_has_the_keys_and_values_of_the_one_in_torch():
    layer, theirs = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
    weight_normalization(layer)
    torch.nn.utils.parametrizations.weight_norm(theirs)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs.weight, layer.weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("normalize", FAMILY)
def test_filters_of_a_transposed_convolution(normalize, groups):
    layer = nn.ConvTranspose2d(4, 6, 2, groups=groups, dtype=torch.float64)
    before = layer.weight.detach().clone()
    normalize(layer)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    out = layer(x)
    # An output channel is what one filter makes: scaling the channel's direction must not change
    # it.
    per_group = 6 // groups
    with torch.no_grad():
        scaled = direction(layer).view(groups, 4 // groups, per_group, 2, 2)
        scaled *= torch.linspace(0.5, 3, 6, dtype=torch.float64).view(groups, 1, per_group, 1, 1)
    torch.testing.assert_close(layer(x), out)
    if normalize is weight_normalization:
        torch.testing.assert_close(layer.weight, before)
        assert layer.parametrizations.weight.original0.shape == (6, 1, 1, 1)


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = norm(8)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.relu(self.norm(self.stem(x))))))


def data(step=0):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=rng), torch.randint(4, (8,), generator=rng)


def train(net, optimizer, steps=20):
    for step in range(steps):
        x, y = data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("normalize", FAMILY)
def test_directions_stay_orthogonal_to_their_gradients_in_float32(normalize):
    torch.manual_seed(0)
    net = normalize(Net(), ["*weight", "!head.*"])
    train(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    x, y = data(99)
    for scale in (1.0, "0.1"):
        if scale == "0.1":  # the least norm that this is claimed for
            with torch.no_grad():
                for layer in (net.stem, net.body[0], net.body[3]):
                    w = direction(layer)
                    w.mul_((0.1 / weight_norm(w)).view(-1, *[1] * (w.dim() - 1)))
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        for layer in (net.stem, net.body[0], net.body[3]):
            w = direction(layer)
            assert w.grad.abs().max() > 0
            assert gradient_cosine(w, w.grad).abs().max() <= 1e-5
            if normalize in (
                centered_weight_normalization,
                weight_standardization,
            ):  # and to the ones: shifts are not seen either
                assert gradient_cosine(torch.ones_like(w), w.grad).abs().max() <= 1e-5


def test_the_gradient_goes_as_one_over_the_norm_or_the_standard_deviation():
    """AWS paper, eq. 12 and 13: the size in the effective learning rate is the norm for WN and the
    standard deviation for WS."""
    x = torch.randn(5, 6, dtype=torch.float64)
    for normalize, size in (
        (bounded_weight_normalization, weight_norm),
        (weight_standardization, weight_std),
    ):
        torch.manual_seed(0)
        layer = normalize(nn.Linear(6, 3, dtype=torch.float64))
        grads, sizes = [], []
        for _ in range(2):
            layer.zero_grad()
            layer(x).sin().sum().backward()
            grads.append(direction(layer).grad.clone())
            sizes.append(size(direction(layer).detach()))
            with torch.no_grad():
                direction(layer).mul_(7.0)
        torch.testing.assert_close(sizes[0][:, None] * grads[0], sizes[1][:, None] * grads[1])


@pytest.mark.parametrize("normalize", FAMILY)
def test_a_zero_or_constant_filter_gives_zero_and_finite_gradients(normalize):
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0.0
    normalize(layer)
    assert torch.equal(layer.weight[0], torch.zeros(3))
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e3 for p in layer.parameters())


@pytest.mark.parametrize("normalize", FAMILY)
def test_a_model_by_pattern_and_back(normalize):
    torch.manual_seed(0)
    net = normalize(Net(), ["*weight", "!head.weight"])
    names = {
        n.split(".parametrizations.")[0]
        for n, _ in net.named_parameters()
        if ".parametrizations." in n
    }
    assert names == {"stem", "body.0", "body.3"}
    x, _ = data()
    before = net.eval()(x)
    remove_weight_normalizations(net)
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in Net().named_parameters()}
    torch.testing.assert_close(net(x), before)
    Net().load_state_dict(net.state_dict())


@pytest.mark.parametrize("normalize", FAMILY)
def test_state_dict_loads_back_and_deepcopy_is_independent(normalize):
    torch.manual_seed(0)
    net = normalize(Net(), "*weight")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), steps=3)
    x, _ = data(5)
    expected = net.eval()(x)
    other = normalize(Net(), "*weight")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), expected)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        direction(net.stem).add_(1.0)
    assert torch.equal(copied(x), expected)
    copied.train()
    before = direction(copied.stem).detach().clone()
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1), steps=1)
    assert not torch.equal(direction(copied.stem), before)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("normalize", FAMILY)
def test_compiled_training_equals_eager_training(normalize):
    torch.manual_seed(0)
    eager = normalize(Net(), "*weight")
    compiled = copy.deepcopy(eager)
    train(eager, torch.optim.SGD(eager.parameters(), lr=0.1), steps=3)
    train(
        torch.compile(compiled, backend="eager", fullgraph=True),
        torch.optim.SGD(compiled.parameters(), lr=0.1),
        steps=3,
    )
    for (name, p), (_, q) in zip(
        eager.named_parameters(), compiled.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, msg=name)


def _distributed(normalize, kind):
    torch.manual_seed(0)
    net = normalize(Net(norm=lambda c: nn.GroupNorm(2, c)), "*weight")
    if kind != "alone":
        init_process_group()
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(net.body, mesh=mesh)
        fully_shard(net, mesh=mesh)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), steps=4)
    full = {
        n.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
        for n, p in net.named_parameters()
    }
    return {n: p.detach() for n, p in full.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("normalize", FAMILY)
def test_two_ranks_equal_one(normalize, kind):
    alone = run_ranks(_distributed, world=1, args=(normalize, "alone"))[0]
    both = run_ranks(_distributed, world=2, args=(normalize, kind))
    assert alone.keys() == both[0].keys() == both[1].keys()
    for name, expected in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", FAMILY)
def test_recurrent_attention_and_embedding_weights(normalize):
    torch.manual_seed(0)
    lstm = normalize(nn.LSTM(4, 5, batch_first=True), "weight_hh_l0")
    attention = normalize(nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight")
    embedding = normalize(nn.Embedding(7, 4))
    x = embedding(torch.arange(6).view(2, 3))
    out = attention(lstm(x)[0][..., :4], x, x)[0]
    out.sin().sum().backward()
    for module, name in (
        (lstm, "weight_hh_l0"),
        (attention, "in_proj_weight"),
        (embedding, "weight"),
    ):
        w = direction(module, name)
        assert w.grad.abs().max() > 0
        assert gradient_cosine(w, w.grad).abs().max() <= 1e-5


def test_the_statistic_of_a_weight_is_known_by_its_name():
    net = weight_standardization(Net(), "body.0.weight")
    weight_normalization(net, "stem.weight")
    standardized = [n for n, _ in net.named_parameters() if is_weight_standardized(net, n)]
    assert standardized == ["body.0.parametrizations.weight.original"]
    assert is_weight_standardized(
        weight_standardization(nn.Linear(3, 3)), "parametrizations.weight.original"
    )
    assert not is_weight_standardized(net, "gone.parametrizations.weight.original")
    compiled = torch.compile(net, backend="eager")
    assert is_weight_standardized(compiled, standardized[0])


def test_refusals_leave_the_model_as_it_was():
    net = Net()
    keys = list(net.state_dict())
    with pytest.raises(
        NoTargetsError, match=r"'stam\.\*' matches none of 4 weights; nearest: \['stem.weight'"
    ):
        weight_normalization(net, ["*weight", "stam.*"])
    with pytest.raises(NoTargetsError, match="leaves none"):
        weight_normalization(net, ["head.*", "!head.*"])
    with pytest.raises(NotSupportedError, match=r"`bias` has shape \(4,\)"):
        weight_normalization(net.head, "bias")
    with pytest.raises(ValueError, match="`eps` must be >= 0, got -1"):
        weight_standardization(net, "*", eps=-1)
    with pytest.raises(ValueError, match="`length` must be > 0, got 0"):
        bounded_weight_normalization(net, "*", length=0)
    with pytest.raises(
        NotSupportedError,
        match=r"filter of one entry is always 0; got a weight of shape \(4, 1, 1\)",
    ):
        weight_standardization(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(4, 4, 1, groups=4)), "*")
    with pytest.raises(NotSupportedError, match=r"`weight` is lazy"):
        weight_normalization(nn.LazyLinear(3))
    with pytest.raises(NotSupportedError, match=r"`0.weight` is lazy"):
        weight_normalization(nn.Sequential(nn.LazyLinear(3)), "*")
    with pytest.raises(NotSupportedError, match=r"torch.complex64"):
        weight_normalization(nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(NoTargetsError, match="'missing' matches none"):
        weight_normalization(nn.Linear(3, 3), "missing")
    net.body[3].weight = nn.Parameter(torch.randn(16, 32))
    net.tied = nn.Linear(32, 16)
    net.tied.weight = net.body[3].weight
    with pytest.raises(
        NotSupportedError, match=r"\['body.3.weight', 'tied.weight'\] are one tensor"
    ):
        weight_normalization(net, "*")
    del net.tied
    assert list(net.state_dict()) == keys
    weight_normalization(net.stem)
    with pytest.raises(NotSupportedError, match="`weight` is parametrized already"):
        weight_standardization(net.stem)
    weight_normalization(net, "*")  # what is parametrized already is no candidate
    with pytest.raises(NoTargetsError):
        remove_weight_normalizations(Net())
