"""What the loss reads of a masked weight, by whatever operation it is masked; only that counts as
length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import strategies
import torch
from models import fit, loader, make
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.invariance.entry_masks import MaskMemory
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict

KEPT = torch.tensor(
    [[1, 0, 1, 1, 0], [1, 1, 0, 0, 1], [0, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool
)


class Masked(nn.Module):
    """A masked linear layer in front of BatchNorm, as a masked autoencoder (MADE) has it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        self.how = how
        self.register_buffer("mask", KEPT.clone())

    def masked(self) -> Tensor:
        weight, mask = self.weight, self.mask
        if self.how == "product":
            return weight * mask
        if self.how == "product with numbers":
            return mask.to(weight.dtype) * 2 * weight
        if self.how == "where":
            return torch.where(mask, weight, 0.0)
        if self.how == "where not":
            return torch.where(~mask, weight.new_zeros(()), weight)
        if self.how == "masked_fill":
            return weight.masked_fill(~mask, 0.0)
        if self.how == "transposed":
            return (weight.t() * mask.t()).t()
        if self.how == "flat":
            return (weight.flatten() * mask.flatten()).view(4, 5)
        if self.how == "cast":
            return (weight.float() * mask).double()
        if self.how == "twice":
            return weight * mask[:2].repeat(2, 1) * mask
        raise AssertionError(self.how)

    def forward(self, x):
        return F.linear(x, self.masked())


WAYS = (
    "product",
    "product with numbers",
    "where",
    "where not",
    "masked_fill",
    "transposed",
    "flat",
    "cast",
    "twice",
)


def read_of(net: nn.Module, name: str, batches: int = 2) -> Tensor | None:
    """What a search that looks at so many batches says is read."""
    search = ScaleInvarianceSearch(net)
    for batch in range(batches):
        torch.manual_seed(batch)
        with search:
            search.analyze(net(torch.randn(8, 5, dtype=torch.float64)).square().sum())
    return search.verdicts[name].read


@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_mask_is_seen(how):
    net = nn.Sequential(Masked(how), nn.BatchNorm1d(4)).double()
    expected = KEPT & KEPT[:2].repeat(2, 1) if how == "twice" else KEPT
    assert torch.equal(read_of(net, "0.weight"), expected)


@pytest.mark.parametrize(
    ("cut", "kept"), [(torch.tril, torch.ones(4, 5).tril()), (torch.triu, torch.ones(4, 5).triu())]
)
def test_triangles_are_seen_at_once(cut, kept):
    class Triangle(Masked):
        def masked(self):
            return cut(self.weight)

    net = nn.Sequential(Triangle(""), nn.LayerNorm(4)).double()
    assert torch.equal(read_of(net, "0.weight", batches=1), kept.bool())


@pytest.mark.parametrize("times", [1, 2])
def test_pruned_weights_are_seen(times):
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)).double()
    for _ in range(times):
        prune.random_unstructured(net[0], "weight", amount=0.3)
    assert torch.equal(read_of(net, "0.weight_orig"), net[0].weight_mask.bool())


def test_a_mask_that_is_drawn_in_every_step_hides_nothing():
    class DropConnect(Masked):
        def masked(self):
            return self.weight * torch.bernoulli(torch.full_like(self.weight, 0.5))

    net = nn.Sequential(DropConnect(""), nn.BatchNorm1d(4)).double()
    for batches in (1, 2, 3):
        assert read_of(net, "0.weight", batches) is None


def test_a_buffer_that_is_drawn_in_every_step_hides_nothing_from_the_second_batch_on():
    class DropConnect(Masked):
        def masked(self):
            self.mask.copy_(torch.rand(4, 5) < 0.5)
            return self.weight * self.mask

    net = nn.Sequential(DropConnect(""), nn.BatchNorm1d(4)).double()
    assert read_of(net, "0.weight", 2) is None
    assert read_of(net, "0.weight", 3) is None


def test_a_computed_mask_counts_when_a_second_batch_shows_the_same():
    class Made(Masked):
        def masked(self):
            inputs, outputs = torch.arange(5), torch.arange(4)
            return self.weight * (outputs[:, None] >= inputs[None, :] % 4)

    net = nn.Sequential(Made(""), nn.BatchNorm1d(4)).double()
    assert read_of(net, "0.weight", 1) is None
    assert int(read_of(net, "0.weight", 2).sum()) == 14


def test_a_second_use_without_a_mask_reads_everything():
    class Both(Masked):
        def forward(self, x):
            return F.linear(x, self.weight * self.mask) + F.linear(x, self.weight)

    assert read_of(nn.Sequential(Both(""), nn.BatchNorm1d(4)).double(), "0.weight") is None


def test_a_use_that_a_factor_of_zero_switches_off_says_nothing():
    class SwitchedOff(Masked):
        def forward(self, x):
            return F.linear(x, self.weight * self.mask) + F.linear(x, torch.zeros(()) * self.weight)

    assert torch.equal(
        read_of(nn.Sequential(SwitchedOff(""), nn.BatchNorm1d(4)).double(), "0.weight"), KEPT
    )

    class Nothing(Masked):
        def forward(self, x):
            return F.linear(x, 0 * self.weight) + F.linear(x, torch.zeros(()) * self.weight)

    assert read_of(nn.Sequential(Nothing(""), nn.BatchNorm1d(4)).double(), "0.weight") is None


def test_two_masks_of_two_uses_join():
    class Halves(Masked):
        def forward(self, x):
            return F.linear(x, self.weight * self.mask) + F.linear(x, torch.tril(self.weight))

    expected = KEPT | torch.ones(4, 5).tril().bool()
    assert torch.equal(
        read_of(nn.Sequential(Halves(""), nn.BatchNorm1d(4)).double(), "0.weight"), expected
    )


def test_a_product_without_zeros_is_no_mask():
    class Gained(Masked):
        def masked(self):
            return self.weight * self.mask.to(self.weight).add(1)

    assert read_of(nn.Sequential(Gained(""), nn.BatchNorm1d(4)).double(), "0.weight") is None


def test_rows_that_a_mask_hides_belong_to_no_vector():
    class Structured(Masked):
        def masked(self):
            return self.weight * self.mask[:, :1]  # row 2 is hidden whole

    net = nn.Sequential(Structured(""), nn.BatchNorm1d(4)).double()
    (verdict,) = inspect_module(net, torch.randn(8, 5, dtype=torch.float64))
    assert verdict.kind == "partly"
    assert verdict.partition.labels.tolist() == [0, 1, -1, 2]
    assert verdict.batch_norms[0].vector.tolist() == [0, 1, -1, 2]
    assert "mask" in verdict.reason
    again = Verdict.from_state(verdict.name, verdict.state())
    assert torch.equal(again.read, verdict.read)


def test_a_memory_asks_for_a_second_look_and_again_after_pruning():
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)).double()
    memory = MaskMemory(net)
    assert not memory.wants_a_look
    prune.random_unstructured(net[0], "weight", amount=0.3)
    assert memory.wants_a_look
    memory.begin()
    assert not memory.wants_a_look


# ---- sums ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "partition",
    [Partition.filters((4, 5)), Partition.layer((4, 5)), Partition.filters((4, 5), axis=1)],
)
def test_sums_are_those_of_the_entries_that_are_read(partition, dtype):
    torch.manual_seed(0)
    weight, plain = (
        nn.Parameter(torch.randn(4, 5).to(dtype)),
        nn.Parameter(torch.randn(3, 2).to(dtype)),
    )
    weight.grad, plain.grad = torch.randn(4, 5).to(dtype), torch.randn(3, 2).to(dtype)
    hidden = nn.Parameter((weight.detach() * KEPT).to(dtype))
    hidden.grad = weight.grad * KEPT
    plain_partition = Partition.filters((3, 2))
    vectors = WeightVectors([weight, plain], [partition, plain_partition], read=[KEPT, None])
    truth = WeightVectors([hidden, plain], [partition, plain_partition])

    assert torch.allclose(vectors.norms(), truth.norms(), rtol=1e-6)
    assert vectors.length[: partition.n].tolist() == partition.lengths((4, 5), KEPT).tolist()

    def pairs(v):
        return (
            (v.values(), v.gradients()),
            (v.gradients(), v.gradients()),
            (v.values(), None),
        )

    assert torch.allclose(vectors.inner(*pairs(vectors)), truth.inner(*pairs(truth)), rtol=1e-6)

    before = [w.detach().clone() for w in (weight, plain)]
    with torch.no_grad():
        for w in (weight, hidden):
            w.add_(torch.ones_like(w) * (KEPT if w is hidden else 1), alpha=0.25)
        plain.add_(0.25)
    before_of_truth = [before[0] * KEPT, before[1]]
    assert torch.allclose(
        vectors.displacement(before), truth.displacement(before_of_truth), rtol=1e-5
    )
    if dtype != torch.bfloat16:
        share = torch.full((vectors.n,), 0.1, dtype=torch.float64)
        moved = plain.detach().clone()
        removed = vectors.remove_radial_(before, share)
        plain.data.copy_(moved)
        assert torch.allclose(
            removed, truth.remove_radial_(before_of_truth, share), rtol=1e-5, atol=1e-6
        )
        assert torch.allclose(weight.detach() * KEPT, hidden.detach(), rtol=1e-5)


def test_a_copy_on_the_way_keeps_the_hidden_entries():
    weight = nn.Parameter(torch.randn(4, 5))
    vectors = WeightVectors([weight], [Partition.filters((4, 5))], read=[KEPT])
    copy = torch.zeros(4, 5)
    vectors.inner((vectors.values(), vectors.values()), copy=(vectors.values(), [copy]))
    assert torch.equal(copy, weight.detach())


# ---- in a fit ----


def masked_net() -> nn.Sequential:
    conv = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    prune.custom_from_mask(conv[1], "weight", (torch.arange(6 * 36).view(6, 36) % 3 > 0).float())
    return conv


def test_norm_and_angle_are_those_of_what_the_network_computes_with():
    module = make(
        net=masked_net(), make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)
    )
    monitor = NormDynamicsMonitor(1, tables=False)

    class Watches(L.Callback):
        def __init__(self):
            self.weights = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.weights.append(
                (pl_module.net[1].weight_orig * pl_module.net[1].weight_mask).detach().clone()
            )

    watches = Watches()
    fit(module, [watches, monitor], loader())
    norms = [row["weight_norm/net.1.weight_orig"] for row in monitor.history]
    truth = [float(w.norm(dim=1).mean()) for w in watches.weights]
    assert norms == pytest.approx(truth, rel=1e-6)
    angles = [row["angular_update/net.1.weight_orig"] for row in monitor.history]
    pairs = zip(watches.weights, watches.weights[1:], strict=False)
    cosines = [F.cosine_similarity(a, b, dim=1).clamp(max=1) for a, b in pairs]
    truth = [float(torch.arccos(c).square().mean().sqrt()) for c in cosines]
    assert angles[:-1] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize(
    "make_callbacks",
    [lambda: [WeightRescaling(1)], lambda: [WeightRescaling(1), RadialProjection()]],
)
def test_a_rescaled_weight_has_its_norm_where_it_is_read(make_callbacks):
    module = make(net=masked_net())
    fit(module, make_callbacks(), loader())
    read = (module.net[1].weight_orig * module.net[1].weight_mask).detach()
    assert torch.allclose(read.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_shrink_follows_the_norm_that_is_read():
    module = make(net=masked_net(), make_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    before = module.net[1].weight_orig.detach().clone()
    lr = 0.01

    class Rate(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["lr"] = lr

    module.make_optimizer = lambda p: torch.optim.SGD([p[0]] if isinstance(p, list) else p, lr=lr)
    fit(module, [AdaptiveWeightShrink(2.0)], loader(8), max_epochs=1)
    step = (
        module.net[1].weight_orig.detach() + 0
    )  # after one step: f w - lr g, and g is 0 where hidden
    mask = module.net[1].weight_mask
    norm = (before * mask).norm(dim=1, keepdim=True)
    factor = 1 - lr * 2.0 * norm
    hidden = mask == 0
    assert torch.allclose(step[hidden], (factor * before)[hidden])


def test_pruning_in_mid_training_is_followed():
    class Prunes(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                prune.random_unstructured(pl_module.net[1], "weight", amount=0.4)

    net = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    module = make(net=net)
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [Prunes(), monitor, WeightRescaling(1)], loader(), max_epochs=3)
    read = (module.net[1].weight_orig * module.net[1].weight_mask).detach()
    assert torch.allclose(read.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert len(monitor.history) == 12


# ---- on several ranks ----


class MaskedNet(strategies.Net):
    """The strategies' network with a masked convolution and a masked linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("few", torch.arange(9 * 5 * 2).view(5, 9, 2) % 4 > 0)
        self.register_buffer("fewer", torch.arange(7 * 6).view(7, 6) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_norm(self.conv(x[:, None])))
        x = torch.tanh(self.grouped_norm(F.conv_transpose1d(x, self.grouped.weight * self.few)))
        x = torch.tanh(self.block.up(self.mix(x)[:, 0, :12]))
        return self.head(self.block.norm(F.linear(x, self.block.down.weight * self.fewer)))


class MaskedModule(strategies.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(11)
        self.net = MaskedNet().to(self.dtype_)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["ddp", "FSDP2", "FSDP1 FULL_SHARD, one unit, 3 ranks"])
def test_sharded_weights_have_their_norms_where_they_are_read(name):
    strategy = strategies.STRATEGIES[name]
    if name != "ddp":
        strategy = replace(strategy, parallelize=whole_module if strategy.parallelize else None)

    def run() -> dict[str, Tensor]:

        def made():
            return [WeightRescaling(1, params=["net.grouped.weight", "net.block.down.weight"])]

        _, module, _ = strategies.fit(strategy, made, model=MaskedModule)
        return {key: value.clone() for key, value in module.final.items()}

    for final in run_ranks(run, strategy.world).values():
        grouped = final["net.grouped.weight"] * (torch.arange(90).view(5, 9, 2) % 4 > 0)
        groups = grouped.transpose(0, 1).reshape(3, -1)
        assert torch.allclose(groups.norm(dim=1), torch.ones(3, dtype=torch.float64))
        down = final["net.block.down.weight"] * (torch.arange(42).view(7, 6) % 3 > 0)
        assert float(down.norm()) == pytest.approx(1)


def whole_module(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh["data_parallel"])
