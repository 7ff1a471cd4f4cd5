"""What inputs see of weights: exact where it is known, from the training batches or a loader, the
same on any number of ranks, and without a trace in the fit."""

from __future__ import annotations

import logging
import random
import sys
from math import isnan
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from cases import (
    MODES,
    ByStep,
    KeepsRows,
    Remembers,
    adamw,
    compiled,
    everything,
    identical,
    run,
    sgd,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from models import BEFORE_2_6, Net, SavesAt, fit, images, loader, make, same, weights_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_normdyn import (
    InputSpanMonitor,
    NormDynamicsMonitor,
    NormDynError,
    NormDynWarning,
    NoTargetsError,
    NotSupportedError,
    load_history,
)
from lightning_normdyn.input_span import gather as input_layers
from lightning_normdyn.input_span import rows as input_rows
from lightning_normdyn.input_span.gather import InputGatherer
from lightning_normdyn.input_span.rows import InputRows
from lightning_normdyn.input_span.summary import BINS, REACH
from lightning_normdyn.parametrizations import weight_normalization
from lightning_normdyn.plots import (
    plot_input_span,
    plot_weight_histogram,
    plot_weight_shape,
)

QUANTITIES = [
    "input_span_energy",
    "input_span_noise",
    "input_span_rank",
    "ggd_shape_input",
    "ggd_shape_parameter",
]


def frozen(parameters: Any) -> torch.optim.Optimizer:
    """A learning rate of 0: the weights are those that the test has set."""
    return torch.optim.SGD(parameters, lr=0.0)


def batches_of(x: Tensor, batch_size: int = 16) -> DataLoader[Any]:
    labels = torch.zeros(len(x), dtype=torch.long)
    return DataLoader(TensorDataset(x, labels), batch_size=batch_size)


def measure(
    net: nn.Module,
    x: Tensor,
    *,
    monitor: InputSpanMonitor | None = None,
    **arguments: Any,
) -> dict[str, float]:
    """The last row for a network on given inputs."""
    monitor = InputSpanMonitor(energy=1.0) if monitor is None else monitor
    data = batches_of(x)
    module = Net(frozen, net, dtype=x.dtype)
    fit(module, [monitor], data, max_epochs=1, **arguments)
    return monitor.history[-1]


def head(layer: nn.Module) -> nn.Sequential:
    """A layer under test, and what makes a loss of its output."""
    return nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))


# ---- Known spans ----

LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), (40,)),
    "tokens": (lambda: nn.Linear(10, 7), (40, 3)),
    "conv": (lambda: nn.Conv2d(10, 7, 3, padding=1), (40, 5, 5)),
    "conv 1d": (lambda: nn.Conv1d(10, 6, 3, stride=2, dilation=2, bias=False), (40, 11)),
    "grouped": (lambda: nn.Conv2d(10, 6, (3, 2), groups=2), (60, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(10, 6, 3, stride=2, groups=2, padding=1), (60, 4, 4)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("own_loader", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_the_noise_share_is_that_of_a_known_span(name, dtype, own_loader):
    make_layer, (count, *places) = LAYERS[name]
    layer = make_layer()
    groups = getattr(layer, "groups", 1)
    channels = 10 // groups
    # Each group's channels vary in 3 directions only, around a mean that the border of zeros must
    # not show: none with padding.
    basis = torch.linalg.qr(torch.randn(groups, channels, 3, dtype=torch.float64))[0]
    x = torch.einsum(
        "gck,ngk...->ngc...", basis, torch.randn(count, groups, 3, *places, dtype=torch.float64)
    ).flatten(1, 2)
    if name == "tokens":
        x = x.movedim(1, -1)
    if name in ("linear", "grouped"):
        x = x + torch.randn(1, 10, *[1] * len(places), dtype=torch.float64)
    x = x.to(dtype)
    monitor = InputSpanMonitor(energy=1.0, dataloader=batches_of(x) if own_loader else None)
    row = measure(head(layer), x, monitor=monitor)

    w = (
        layer.weight.detach().double()
    )  # entries of one filter with one place of the kernel: a vector of channels
    if name == "transposed":
        w = w.reshape(groups, channels, -1, *w.shape[2:]).movedim(1, 2).flatten(0, 1)
    w = w.reshape(groups, len(w) // groups, channels, -1)
    seen = torch.einsum("gck,gocp->gokp", basis, w).square().sum((2, 3)) / w.square().sum((2, 3))
    assert row["input_span_energy/net.0.weight"] == pytest.approx(float(seen.mean()), abs=1e-6)
    assert row["input_span_noise/net.0.weight"] == pytest.approx(1 - float(seen.mean()), abs=1e-6)
    assert row["input_span_rank/net.0.weight"] == 3 * w.shape[-1]
    assert 0.05 < row["input_span_noise/net.0.weight"] < 0.95


def test_the_share_is_that_of_vectors_at_the_asked_granularity():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    x = torch.randn(40, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    by_filter, by_layer = (
        measure(head(layer), x, monitor=InputSpanMonitor(energy=1.0, granularity=g))
        for g in ("filter", "layer")
    )
    assert by_filter["input_span_energy/net.0.weight"] == pytest.approx(0.5, abs=1e-7)
    assert by_layer["input_span_energy/net.0.weight"] == pytest.approx(0.9, abs=1e-7)


def test_a_smaller_share_of_the_spectrum_makes_a_smaller_span():
    x = torch.randn(2000, 6, dtype=torch.float64) * torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.03])
    rows = [
        measure(head(nn.Linear(6, 3)), x, monitor=InputSpanMonitor(energy=e))
        for e in (0.85, 0.97, 0.999, 1.0)
    ]
    assert [row["input_span_rank/net.0.weight"] for row in rows] == [1, 2, 3, 6]
    assert rows[3]["input_span_noise/net.0.weight"] == pytest.approx(0, abs=1e-9)


def test_zero_filters_constant_inputs_and_rank_deficient_inputs():
    layer, x = nn.Linear(6, 4), torch.zeros(40, 6, dtype=torch.float64) + 3
    with torch.no_grad():
        layer.weight[1] = 0
    constant = measure(head(layer), x)
    assert (
        constant["input_span_energy/net.0.weight"],
        constant["input_span_rank/net.0.weight"],
    ) == (0, 0)
    assert "ggd_shape_input/net.0.weight" not in constant
    x[:, 0] += torch.randn(40, dtype=torch.float64)
    deficient = measure(head(layer), x)
    w = layer.weight.detach()
    expected = (w[:, 0] ** 2 / w.square().sum(1))[
        [0, 2, 3]
    ].mean()  # the filter of zeros has no share
    assert deficient["input_span_energy/net.0.weight"] == pytest.approx(float(expected), abs=1e-6)
    assert deficient["input_span_rank/net.0.weight"] == 1
    with torch.no_grad():
        layer.weight.zero_()
    nothing = measure(head(layer), x)
    assert [q for q in QUANTITIES if f"{q}/net.0.weight" in nothing] == ["input_span_rank"]


def test_inputs_that_are_not_finite_are_told_and_shown():
    x = torch.randn(40, 6, dtype=torch.float64)
    x[3, 2] = torch.inf
    with pytest.warns(
        NormDynWarning,
        match=r"inputs or weights of `net.0.weight`.* are not finite at step \d+; NaN",
    ):
        row = measure(head(nn.Linear(6, 4)), x)
    assert isnan(row["ggd_shape_input/net.0.weight"])
    assert isnan(row["input_span_energy/net.0.weight"])


# ---- Shapes ----


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", ["moments", "mle"])
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_the_shape_in_input_space_is_found(shape, method):
    gennorm = pytest.importorskip("scipy.stats").gennorm
    d, n = 50, 400  # 20,000 weights
    x = torch.randn(300, d, dtype=torch.float64) * torch.linspace(1, 3, d)
    _, basis = torch.linalg.eigh(torch.cov(x.T, correction=0))
    # One sample from each 20,000th of the distribution: the moments' own sampling error is 3 % at
    # shape 4.
    generator = np.random.default_rng(0)
    quantiles = (generator.permutation(n * d) + generator.random(n * d)) / (n * d)
    v = torch.from_numpy(gennorm.ppf(quantiles, shape)).view(n, d)
    layer = nn.Linear(d, n)
    layer.weight = nn.Parameter(v @ basis.T)
    row = measure(
        head(layer.double()), x, monitor=InputSpanMonitor(method=method, params="net.0.weight")
    )
    assert row["ggd_shape_input/net.0.weight"] == pytest.approx(shape, rel=0.03)
    if shape != 2.0:  # turned back, the entries are sums of many
        assert abs(row["ggd_shape_parameter/net.0.weight"] - 2) < abs(shape - 2) / 2


def test_histograms_count_every_weight():
    monitor, layer = InputSpanMonitor(), nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 1000
    measure(head(layer), torch.randn(40, 6, dtype=torch.float64), monitor=monitor)
    for kind in ("histogram_input", "histogram_parameter"):
        steps, counts = monitor.history.vectors(f"{kind}/net.0.weight")
        assert (steps.tolist(), counts.shape, counts.sum()) == (
            [2],
            (1, BINS),
            24,
        )
    assert monitor.history.meta["histogram_reach"] == REACH


# ---- From which inputs ----


class Labelled(Dataset):
    """Augments its images with all three generators of random numbers."""

    def __init__(self, count: int, augment: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand() + float(torch.rand(1, dtype=torch.float64))
        return self.x[i] + self.augment * noise * torch.randn(1, 6, 6, dtype=torch.float64), i % 2


def smooth() -> nn.Sequential:
    """The same weights at every call, and no BatchNorm, whose statistics differ with the number of
    ranks."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 2),
    )


def _measured(own_loader: bool, batch_size: int, **arguments: Any) -> dict[str, float]:
    """The row of a fit over 40 images at a learning rate of 0."""
    own = DataLoader(Labelled(40), batch_size=5) if own_loader else None
    monitor = InputSpanMonitor(dataloader=own)
    module = make(make_optimizer=frozen, net=smooth())
    data = DataLoader(Labelled(40), batch_size=batch_size)
    fit(module, [monitor], data, max_epochs=1, **arguments)
    return monitor.history[-1] if len(monitor.history) else {}


def agree(one: dict[str, float], other: dict[str, float]) -> None:
    measured = [key for key in one if key not in ("step", "optimizer_step")]
    assert len(measured) == 5 * 3
    for key in measured:
        assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("own_loader", [False, True])
def test_two_ranks_measure_what_one_measures(own_loader):
    alone = _measured(own_loader, 8)
    first, second = run_ranks(lambda: _measured(own_loader, 4, strategy="ddp", devices=2)).values()
    assert second == {}
    agree(first, alone)


@pytest.mark.parametrize("own_loader", [False, True])
def test_ranks_share_the_number_of_rows(own_loader):
    def rows() -> dict[str, int]:
        own = DataLoader(Labelled(40), batch_size=5) if own_loader else None
        monitor = InputSpanMonitor(max_samples=100, dataloader=own)
        data = DataLoader(Labelled(40), batch_size=4)
        module = make(make_optimizer=frozen, net=smooth())
        fit(module, [monitor], data, max_epochs=1, strategy="ddp", devices=2)
        about = monitor.history.meta.get("targets", {})
        return {name: of_weight["rows"] for name, of_weight in about.items()}

    first, second = run_ranks(rows).values()
    assert (first, second) == ({"net.0.weight": 100, "net.2.weight": 100, "net.5.weight": 40}, {})


class Sharded(Net):
    """FSDP2: both convolutions and the root are cut over the ranks."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self.net, "unshard"):
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)


def _sharded(own_loader: bool) -> tuple[dict[str, float], bool]:
    # Three batches, so that the second rank runs one that does not count.
    own = DataLoader(Labelled(40), batch_size=16) if own_loader else None
    monitor = InputSpanMonitor(dataloader=own)
    module = make(Sharded, make_optimizer=frozen, net=smooth())
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    data = DataLoader(Labelled(40), batch_size=4)
    fit(module, [monitor], data, max_epochs=2, strategy=strategy, devices=2)
    row = monitor.history[-1] if len(monitor.history) else {}
    return row, all(hasattr(p, "full_tensor") for p in module.parameters())


@pytest.mark.parametrize("own_loader", [False, True])
def test_fsdp2_measures_what_one_process_measures(own_loader):
    (first, cut), (second, _) = run_ranks(lambda: _sharded(own_loader)).values()
    assert cut
    assert second == {}
    agree(first, _measured(False, 8))


def test_another_seed_is_another_choice_of_rows_and_the_same_seed_the_same():
    def energy(seed: int) -> float:
        monitor = InputSpanMonitor(max_samples=10, seed=seed, params="net.0.weight")
        return measure(smooth(), Labelled(40).x, monitor=monitor)["input_span_energy/net.0.weight"]

    assert energy(3) == energy(3)
    assert energy(3) != energy(4)


class Swapped(Net):
    """Whatever runs outside of a training step sees inputs of another span."""

    def validation_step(self, batch: Any, batch_idx: int = 0) -> None:
        self.net(torch.ones_like(batch[0]))

    def on_train_batch_end(self, *args: Any) -> None:
        self.net(torch.ones(8, 1, 6, 6, dtype=torch.float64))


def test_only_training_batches_count():
    def rows(monitor: InputSpanMonitor, **arguments: Any) -> dict[str, int]:
        module = make(Swapped, make_optimizer=frozen, net=smooth())
        validates = {"num_sanity_val_steps": 2, "val_check_interval": 1}
        fit(module, [monitor], batches_of(Labelled(40).x), loader(), **validates, **arguments)
        return {name: about["rows"] for name, about in monitor.history.meta["targets"].items()}

    monitor = InputSpanMonitor()
    assert rows(monitor, max_epochs=2)["net.5.weight"] == 40
    agree(monitor.history[-1], measure(smooth(), Labelled(40).x, monitor=InputSpanMonitor()))
    assert rows(InputSpanMonitor(), max_epochs=1, accumulate_grad_batches=2)["net.5.weight"] == 40


class Alternates(Net):
    """Two optimizers by hand; every step runs the first layers twice."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.net[:4], self.net[4:])]

    def training_step(self, batch: Any, batch_idx: int = 0) -> None:
        for optimizer in self.optimizers():
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_manual_optimization_with_two_optimizers():
    monitor = InputSpanMonitor()
    module = make(Alternates, make_optimizer=frozen, net=smooth())
    fit(module, [monitor], batches_of(Labelled(40).x), max_epochs=1)
    rows = {name: about["rows"] for name, about in monitor.history.meta["targets"].items()}
    assert rows["net.5.weight"] == 80
    agree(monitor.history[-1], measure(smooth(), Labelled(40).x, monitor=InputSpanMonitor()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_counts_once(reentrant):
    class Checkpointed(Net):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            x = batch[0].requires_grad_()
            hidden = checkpoint(self.net[:4], x, use_reentrant=reentrant)
            return nn.functional.cross_entropy(self.net[4:](hidden), batch[1])

    monitor = InputSpanMonitor()
    module = make(Checkpointed, make_optimizer=frozen, net=smooth())
    fit(module, [monitor], batches_of(Labelled(40).x), max_epochs=2)
    rows = {name: about["rows"] for name, about in monitor.history.meta["targets"].items()}
    assert rows == {"net.0.weight": 40 * 16, "net.2.weight": 40 * 16, "net.5.weight": 40}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(*images().tensors, strict=True)])


@pytest.mark.parametrize(
    "data",
    [lambda: DataLoader(Stream(), batch_size=8), lambda: {"a": loader()}],
    ids=["stream", "dict"],
)
def test_training_data_of_any_kind(data):
    class AnyKind(Net):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch)

    monitor = InputSpanMonitor(max_samples=20)
    fit(make(AnyKind), [monitor], data(), max_epochs=2)
    assert len(monitor.history) == 2
    assert monitor.history.meta["targets"]["net.0.weight"]["rows"] == 20


def test_at_most_so_many_rows_are_taken_and_they_are_spread():
    monitor = InputSpanMonitor(max_samples=100)
    measure(smooth(), torch.randn(40, 1, 6, 6, dtype=torch.float64), monitor=monitor)
    assert {name: about["rows"] for name, about in monitor.history.meta["targets"].items()} == {
        "net.0.weight": 100, "net.2.weight": 100, "net.5.weight": 40,
    }  # fmt: skip
    assert monitor.history.meta["batches"] == 3


def test_layers_that_do_not_fit_together_take_turns(monkeypatch):
    x = torch.randn(40, 1, 6, 6, dtype=torch.float64)
    net = smooth()
    at_once = measure(net, x)
    monkeypatch.setattr(input_layers, "BLOCK_BYTES", 8 * 96**2)

    in_turn = InputSpanMonitor(energy=1.0)
    module = Net(frozen, net, dtype=x.dtype)
    fit(module, [in_turn], batches_of(x), max_epochs=3)
    names = [sorted({key.split("/")[1] for key in row if "/" in key}) for row in in_turn.history]
    assert names == [["net.0.weight", "net.2.weight"], ["net.5.weight"], names[0]]
    assert list(in_turn.history.meta["targets"]) == ["net.0.weight", "net.2.weight", "net.5.weight"]
    values = {key: value for row in in_turn.history for key, value in row.items()}
    agree(values, at_once)

    passes = InputSpanMonitor(energy=1.0, dataloader=batches_of(x))
    assert measure(net, x, monitor=passes) == pytest.approx(at_once)


def test_a_layer_that_is_called_twice_takes_half_of_its_rows_from_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.layer(self.layer(x)))

    monitor = InputSpanMonitor(max_samples=80)
    measure(Twice(), torch.randn(20, 6, dtype=torch.float64), monitor=monitor)
    rows = {name: about["rows"] for name, about in monitor.history.meta["targets"].items()}
    assert rows == {"net.layer.weight": 40, "net.out.weight": 20}


def test_rows_are_copied_a_few_at_a_time(monkeypatch):
    x = torch.randn(40, 1, 6, 6, dtype=torch.float64)
    at_once = measure(smooth(), x)
    monkeypatch.setattr(input_rows, "_MOST_ENTRIES", 200)
    taken: list[int] = []
    monkeypatch.setattr(
        InputRows,
        "take",
        lambda self, index, _own=InputRows.take: taken.append(len(index)) or _own(self, index),
    )
    assert measure(smooth(), x) == pytest.approx(at_once)
    assert max(taken) == 200 // 9


def test_it_says_so_where_fewer_rows_were_taken_than_a_filter_has_entries(caplog):
    def net() -> nn.Module:
        return head(nn.Linear(50, 4))

    def said(x: Tensor, most: int, **arguments: Any) -> list[str]:
        caplog.clear()
        measure(net(), x, monitor=InputSpanMonitor(max_samples=most), **arguments)
        return [record.message for record in caplog.records if "fewer rows" in record.message]

    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    x = torch.randn(80, 50, dtype=torch.float64)
    (text,) = said(x, 30)
    assert "fewer rows than a filter has entries of `net.0.weight` (30 for 50 entries)" in text
    (text,) = said(x.view(40, 2, 50), 40)  # half of the 80 rows in 40 examples
    assert "(40 for 50 entries)" in text
    assert said(x, 60) == []
    assert said(x[:30], 60) == []  # there are no more


# ---- No trace ----


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("mode", "own"),
    [*((mode, None) for mode in MODES), *((mode, loader()) for mode in ("sgd", "adamw", "manual"))],
)
def test_it_changes_no_bit(mode, own):
    plain = weights_of(run([], MODES[mode])[0])
    monitor = InputSpanMonitor(max_samples=64, dataloader=own)
    module, _ = run([monitor], MODES[mode])
    assert same(weights_of(module), plain)
    assert len(monitor.history)
    assert all(np.isfinite(list(row.values())).all() for row in monitor.history)


class Restless(Net):
    """Whatever a forward pass may disturb: dropout, running statistics, a buffer that counts, logs,
    a part kept in evaluation mode."""

    def __init__(self, make_optimizer: Any = sgd, dtype: torch.dtype = torch.float64) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64, 2),
        )
        super().__init__(make_optimizer, net, dtype=dtype)
        self.register_buffer("calls", torch.zeros(1))
        self.seen: list[Any] = []

    def on_train_start(self) -> None:
        self.net[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log("from_forward", 1.0)
        random.random()
        np.random.rand()
        return self.net(x + 0.1 * torch.randn_like(x))

    def on_train_epoch_start(self) -> None:
        self.seen.append(
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        )
        self.seen.append([m.training for m in self.modules()])

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        self.seen.append(batch[1].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("own_loader", [False, True])
def test_model_buffers_flags_random_numbers_order_and_loggers_are_left_as_they_were(own_loader):
    def go(callbacks: list[Any]) -> tuple[Any, ...]:
        random.seed(1)
        np.random.seed(1)
        module, logger = make(Restless), KeepsRows()
        fit(
            module,
            callbacks,
            DataLoader(Labelled(24), batch_size=8, shuffle=True),
            max_epochs=3,
            logger=logger,
            log_every_n_steps=1,
        )
        return (
            dict(module.state_dict()),
            module.seen,
            [r for r in logger.rows if "from_forward" in r],
        )

    own = DataLoader(Labelled(24, augment=0.5), batch_size=8, shuffle=True) if own_loader else None
    expected, got = go([]), go([InputSpanMonitor(dataloader=own)])
    assert expected[0]["calls"].item() == 9
    assert identical(got, expected)


def test_leaves_nothing_behind_also_after_an_exception():
    module, monitor = make(Remembers, make_optimizer=sgd), InputSpanMonitor()
    fit(module, [monitor])
    assert module.as_made()
    module = make(Remembers, make_optimizer=sgd)
    module.fails_at = 5
    with pytest.raises(RuntimeError, match="the training step fails"):
        fit(module, [monitor])
    assert module.as_made()
    assert len(monitor.history) == 1

    class FailsInEvaluation(Remembers):
        def forward(self, x):
            if not self.training and self.trainer.global_step:
                raise RuntimeError("the evaluation fails")
            return super().forward(x)

    module = make(FailsInEvaluation, make_optimizer=sgd)
    with pytest.raises(RuntimeError, match="the evaluation fails"):
        fit(module, [InputSpanMonitor(dataloader=loader())])
    assert module.as_made()
    assert module.training
    assert "log" not in vars(module)


# ---- When, and where to ----


def test_rows_go_to_the_loggers_and_the_history_at_the_chosen_epochs(tmp_path):
    logger, monitor = KeepsRows(), InputSpanMonitor(2)
    steps = []
    logger.log_metrics = lambda metrics, step=None: steps.append((step, metrics))
    fit(make(), [monitor], max_epochs=5, logger=logger)
    rows = [(step, row) for step, row in steps if "input_span_noise/net.0.weight" in row]
    assert [step for step, _ in rows] == [7, 15]
    assert [(r["step"], r["optimizer_step"]) for r in monitor.history] == [(7, 8), (15, 16)]
    names = ["net.0.weight", "net.3.weight", "net.8.weight"]
    assert set(rows[0][1]) == {f"{q}/{name}" for q in QUANTITIES for name in names}
    assert list(load_history(monitor.history.save(tmp_path / "h.npz"))) == list(monitor.history)


def test_barebones_measures_nothing_and_a_fast_dev_run_sees_few_batches():
    monitor = InputSpanMonitor()
    runner = L.Trainer(accelerator="cpu", barebones=True, callbacks=[monitor], max_epochs=1)
    runner.fit(make(), loader())
    assert len(monitor.history) == 0
    fit(make(), [monitor], fast_dev_run=2)
    assert monitor.history.meta["batches"] == 2


def test_a_second_fit_starts_afresh_and_an_evaluation_measures_nothing():
    monitor = InputSpanMonitor()
    fit(make(), [monitor], max_epochs=3)
    module = make()
    runner = fit(module, [monitor], max_epochs=2)
    assert [r["step"] for r in monitor.history] == [3, 7]
    runner.validate(module, loader(), verbose=False)
    assert len(monitor.history) == 2


class SavesAtEpochEnd(L.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


class SavesAfterValidation(SavesAtEpochEnd):
    """As ModelCheckpoint does where it monitors a value of the validation: before the end of the
    epoch."""

    on_train_epoch_end = L.Callback.on_train_epoch_end

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def resumed_and_whole(
    saves: Any, path: Any, first: bool, make_monitor: Any
) -> tuple[list[Any], list[Any]]:
    """Rows of a fit that resumes from a checkpoint, and of the uninterrupted one; all else is
    compared here."""

    def go(monitor: InputSpanMonitor, *extra: Any, **arguments: Any) -> Any:
        module = make(ByStep, make_optimizer=adamw)
        callbacks = [*extra, monitor] if first else [monitor, *extra]
        runner = fit(module, callbacks, val_data=loader(), max_epochs=3, **arguments)
        return everything(module, runner, [])

    whole, resumed = make_monitor(), make_monitor()
    expected = go(whole, saves(path))
    assert identical(go(resumed, ckpt_path=path), expected)
    torch.load(path, weights_only=True)
    return list(resumed.history), list(whole.history)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("own_loader", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("saves", [SavesAtEpochEnd, SavesAfterValidation])
def test_resume_from_the_end_of_an_epoch_equals_the_uninterrupted_run(
    saves, every, first, own_loader, tmp_path
):
    own = loader() if own_loader else None
    path = tmp_path / "end.ckpt"
    resumed, whole = resumed_and_whole(
        saves, path, first, lambda: InputSpanMonitor(every, dataloader=own)
    )
    assert resumed == whole
    assert len(whole) == 3 // every


@pytest.mark.parametrize("own_loader", [False, True])
def test_resume_within_an_epoch_goes_on_gathering(own_loader, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    own = loader() if own_loader else None
    resumed, whole = resumed_and_whole(
        lambda path: SavesAt(5, path),
        tmp_path / "middle.ckpt",
        False,
        lambda: InputSpanMonitor(dataloader=own),
    )
    assert [row["step"] for row in resumed] == [3, 7, 11]
    assert resumed == whole
    assert not [r for r in caplog.records if "the fit was resumed there" in r.message]


def test_what_is_too_large_for_a_checkpoint_is_gathered_from_what_is_left(
    tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    monkeypatch.setattr("lightning_normdyn.input_span.part.MOST_SAVED_BYTES", 1000)
    resumed, whole = resumed_and_whole(
        lambda path: SavesAt(5, path), tmp_path / "middle.ckpt", False, InputSpanMonitor
    )
    assert [a == b for a, b in zip(resumed, whole, strict=True)] == [True, False, True]
    (said,) = [r.message for r in caplog.records if "the fit was resumed there" in r.message]
    assert "in epoch 1 what comes after its first 1 batches" in said


@pytest.mark.parametrize("own_loader", [False, True])
def test_an_epoch_whose_last_batch_came_before_the_checkpoint_is_measured_after_it(
    own_loader, tmp_path
):
    own = loader() if own_loader else None
    resumed, whole = resumed_and_whole(
        lambda path: SavesAt(8, path),
        tmp_path / "last.ckpt",
        True,
        lambda: InputSpanMonitor(dataloader=own),
    )
    assert resumed == whole


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda gathered: gathered.pop("sums"),
        lambda gathered: gathered["sums"].clear(),
        lambda gathered: gathered["seen"].update(nobody=1),
        lambda gathered: gathered["sums"]["net.0.weight"].update(mean=torch.zeros(1, 3)),
        lambda gathered: gathered.update(generator=torch.zeros(3)),
        lambda gathered: gathered["sums"]["net.0.weight"].update(count=-1),
    ],
)
def test_sums_of_a_checkpoint_are_checked_before_they_are_believed(spoil, tmp_path):
    path = tmp_path / "middle.ckpt"
    monitor = InputSpanMonitor()
    fit(make(), [monitor, SavesAt(5, path)], max_epochs=3)
    saved = torch.load(path, weights_only=False)
    (key,) = [k for k in saved["callbacks"] if "InputSpanMonitor" in k]
    gathered = saved["callbacks"][key]["extra"]["epoch"]["gathered"]
    spoil(gathered)
    layers = {f"net.{i}.weight": make().net[i] for i in (0, 3, 8)}
    readers = {layer.weight: [layer] for layer in layers.values()}
    gatherer = InputGatherer(readers, torch.device("cpu"), most=10, seed=0)
    gatherer.close()
    names = dict(zip(readers, layers, strict=True))
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        gatherer.load(gathered, names)


def test_an_epoch_that_ends_early_is_measured():
    monitor = InputSpanMonitor()
    fit(make(), [monitor], max_steps=6, max_epochs=-1)
    assert [row["step"] for row in monitor.history] == [3, 5]
    assert monitor.history.meta["batches"] == 2


def test_with_the_other_callbacks_of_the_suite():
    monitor, watching = InputSpanMonitor(), NormDynamicsMonitor(1, tables=False)
    plain, _ = run([watching], MODES["sgd"])
    module, _ = run([monitor, NormDynamicsMonitor(1, tables=False)], MODES["sgd"])
    assert same(weights_of(module), weights_of(plain))
    assert monitor.history.meta["targets"]["net.0.weight"]["scale_invariant"] == "filter"


@pytest.mark.parametrize(
    "rich",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(BEFORE_2_6, reason="not into pytest's files")),
    ],
)
def test_progress_is_shown_on_a_terminal_only(rich, monkeypatch, capsys):
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    def go() -> str:
        bar = RichProgressBar() if rich else TQDMProgressBar(refresh_rate=1000)
        monitor = InputSpanMonitor(dataloader=loader())
        fit(make(), [monitor, bar], max_epochs=1, enable_progress_bar=True)
        captured = capsys.readouterr()
        return captured.out + captured.err

    text = "inputs of 3 weights" if rich else "Inputs of 3 weights"
    assert text not in go()
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    assert text in go()


# ---- Which layers, and what the model is called with ----


class Attends(nn.Module):
    """A layer whose weight is used without its forward, one that takes indices, and one that is
    never used."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = (
            nn.Embedding(5, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.out, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x.abs().long().flatten(1).clamp(max=4))
        return self.out(self.attention(x, x, x)[0].mean(1))


NOT_CALLED = {
    "net.attention.out_proj.weight": "`forward` does not call the layer that it belongs to",
    "net.unused.weight": "`forward` does not call the layer",
}
NO_ROWS = {
    "net.embed.weight": "it is not the weight of a linear layer or a convolution",
    "net.attention.in_proj_weight": "it is not the weight of a linear layer or a convolution",
}


@pytest.mark.parametrize("own_loader", [False, True])
def test_auto_takes_what_it_can_see(own_loader, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    monitor = InputSpanMonitor(dataloader=loader() if own_loader else None)
    fit(make(net=Attends()), [monitor], max_epochs=3)
    assert list(monitor.history.meta["targets"]) == ["net.out.weight"]
    said = [r.message for r in caplog.records if "saw no inputs" in r.message]
    assert len(said) == (0 if own_loader else 2)  # once, and the loader was tried before
    assert all("was not called in the training step" in text for text in said)


@pytest.mark.parametrize("name", [*NOT_CALLED, *NO_ROWS])
def test_a_named_weight_that_a_loader_does_not_reach_is_refused_with_the_reason(name):
    says = {**NOT_CALLED, **NO_ROWS}[name]
    monitor = InputSpanMonitor(params=["net.out.*", name], dataloader=loader())
    with pytest.raises(
        NotSupportedError,
        match=f"`{name}` was asked to be a target of InputSpanMonitor, but {says}",
    ):
        fit(make(net=Attends()), [monitor])


@pytest.mark.parametrize("name", NO_ROWS)
def test_a_named_weight_without_input_rows_is_refused(name):
    with pytest.raises(NotSupportedError, match=f"`{name}` was asked .*, but {NO_ROWS[name]}"):
        fit(make(net=Attends()), [InputSpanMonitor(params=["net.out.*", name])])


@pytest.mark.parametrize("name", NOT_CALLED)
def test_a_named_weight_that_no_training_step_reads_is_told_by_name(name):
    monitor = InputSpanMonitor(params=["net.out.*", name])
    with pytest.warns(NormDynWarning, match=f"saw no inputs of `{name}`: its layer was not called"):
        fit(make(net=Attends()), [monitor], max_epochs=1)
    assert list(monitor.history.meta["targets"]) == ["net.out.weight"]


def test_a_layer_that_is_too_large_is_refused_by_the_number_needed(monkeypatch):
    monkeypatch.setattr(input_layers, "BLOCK_BYTES", 8 * 36**2 - 1)
    says = r"`net.3.weight` was asked .* rows of 36 entries need 0.0 GiB for 1 covariance\(s\), and at most .* Leave it out with"
    with pytest.raises(NotSupportedError, match=says):
        fit(make(), [InputSpanMonitor(params="net.3.weight")])
    monitor = InputSpanMonitor()
    with pytest.warns(
        NormDynWarning, match="leaves out `net.3.weight`: its rows of 36 entries need"
    ):
        fit(make(), [monitor])
    assert list(monitor.history.meta["targets"]) == ["net.0.weight", "net.8.weight"]


class Autoencoder(nn.Module):
    """A convolution, and a transposed or a grouped one with the same weight."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.down = nn.Conv2d(2 if grouped else 4, 4, 3, padding=1, bias=False)
        self.up = (
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            if grouped
            else nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)
        )
        self.up.weight, self.out = self.down.weight, nn.Linear(4 * 25, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.down(x)).flatten(1))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_weight_that_layers_share_and_divide_differently_is_left_out(grouped):
    x = torch.randn(40, 2 if grouped else 4, 5, 5, dtype=torch.float64)
    kinds = "Conv2d" if grouped else "Conv2d and ConvTranspose2d"
    says = rf"it is shared by layers \({kinds}\) that divide it into different filters"
    with pytest.warns(NormDynWarning, match=f"leaves out `net.down.weight`: {says}"):
        row = measure(Autoencoder(grouped), x)
    assert [key for key in row if "noise" in key] == ["input_span_noise/net.out.weight"]
    with pytest.raises(NotSupportedError, match=says):
        measure(Autoencoder(grouped), x, monitor=InputSpanMonitor(params="net.down.weight"))


def test_parametrized_compiled_and_tied_layers():
    net = smooth()
    weight_normalization(net[2])
    monitor = InputSpanMonitor()
    fit(make(net=net), [monitor])
    assert list(monitor.history.meta["targets"]) == [
        "net.0.weight",
        "net.2.parametrizations.weight.original1",
        "net.5.weight",
    ]
    monitor = InputSpanMonitor(dataloader=loader())
    fit(make(net=compiled()), [monitor])
    assert [n.replace("_orig_mod.", "") for n in monitor.history.meta["targets"]] == [
        "net.0.0.weight",
        "net.0.3.weight",
        "net.3.weight",
    ]

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x.abs().long().flatten(1).clamp(max=4)).mean(1))

    fit(make(net=Tied()), [monitor])
    assert list(monitor.history.meta["targets"]) == ["net.embed.weight"]


def test_compiled_layers_are_named_and_everything_else_is_measured():
    monitor = InputSpanMonitor()
    with pytest.warns(NormDynWarning) as caught:
        fit(make(net=compiled()), [monitor], max_epochs=2)
    said = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    assert ["net.0.0.weight" in said[0], "net.0.3.weight" in said[1], len(said)] == [True, True, 2]
    assert all("compiled code (torch.compile)" in text for text in said)
    assert list(monitor.history.meta["targets"]) == ["net.3.weight"]
    with pytest.raises(NotSupportedError, match="runs inside compiled code"):
        fit(make(net=compiled()), [InputSpanMonitor(params="*")])
    whole = make()
    whole.net.compile(backend="eager")
    with pytest.raises(NoTargetsError, match="that it can measure: its layer runs inside compiled"):
        fit(whole, [InputSpanMonitor()])


class Mappings(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": images().tensors[0][i], "label": i % 2, "path": str(i)}


class TakesNames(Net):
    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(image * scale)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])


class TakesTheBatch(TakesNames):
    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["image"])

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch["label"])


@pytest.mark.parametrize("model", [TakesNames, TakesTheBatch])
def test_mappings_are_given_by_name_or_whole(model):
    data = DataLoader(Mappings(), batch_size=8)
    monitor = InputSpanMonitor(dataloader=data)
    fit(make(model), [monitor], data, max_epochs=1)
    assert len(monitor.history) == 1


class NeedsBoth(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self(*batch)


def test_a_forward_that_wants_something_else_is_refused_before_training_unless_told_how():
    module = make(NeedsBoth)
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError,
        match=r"calls `NeedsBoth.forward` with the first element .* TypeError: .*'y'\s.*override `InputSpan",
    ):
        fit(module, [InputSpanMonitor(dataloader=loader())])
    assert same(weights_of(module), before)
    with pytest.raises(NotSupportedError, match="`dataloader` has no batch"):
        fit(module, [InputSpanMonitor(dataloader=[])])

    class CallsBoth(InputSpanMonitor):
        def call_model(self, module, batch):
            module(*batch)

    monitor = CallsBoth(dataloader=loader())
    fit(make(NeedsBoth), [monitor])
    assert len(monitor.history) == 2


def test_a_model_without_layers_to_look_at_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 36))

        def forward(self, x):
            return x.flatten(1) @ self.weight.T

    with pytest.raises(
        NoTargetsError, match=r"found no linear layer or convolution in `Net` that it can measure"
    ):
        fit(make(net=Bare()), [InputSpanMonitor()])

    class Elsewhere(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x

        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(
        NoTargetsError, match=r"found no linear layer or convolution that `Elsewhere.forward` uses"
    ):
        fit(make(Elsewhere), [InputSpanMonitor(dataloader=loader())])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer >= 1, got 0"),
        ({"max_samples": 1.5}, "`max_samples` must be an integer >= 2, got 1.5"),
        ({"energy": 0.0}, r"`energy` must be in \(0, 1\], got 0.0"),
        ({"energy": True}, "`energy` must be"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"dataloader": iter([1])}, "`dataloader` must be iterable once per chosen epoch"),
        ({"method": "fit"}, "`method` must be 'moments' or 'mle', got 'fit'"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        InputSpanMonitor(**arguments)


def test_lightning_cli_builds_it(tmp_path):
    class CliNet(Net):
        def __init__(self) -> None:
            super().__init__(sgd)

        def train_dataloader(self):
            return loader()

    (tmp_path / "config.yaml").write_text(
        "trainer: {accelerator: cpu, max_epochs: 1, logger: false, enable_checkpointing: false, "
        "enable_progress_bar: false, callbacks: ["
        "{class_path: lightning_normdyn.InputSpanMonitor, init_args: {every_n_epochs: 1, "
        "max_samples: 50, energy: 0.9, method: mle}}]}"
    )
    cli = LightningCLI(CliNet, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, InputSpanMonitor))
    assert (len(monitor.history), monitor.method) == (1, "mle")


# ---- Pictures ----


@pytest.fixture
def recorded():
    monitor = InputSpanMonitor()
    fit(make(), [monitor], max_epochs=3)
    return monitor.history


def test_pictures_show_every_layer_run_and_epoch(recorded):
    noise = [
        recorded.column(f"input_span_noise/{name}")[1][-1] for name in recorded.meta["targets"]
    ]
    figure, panels = plot_input_span({"first": recorded, "second": recorded})
    figure.savefig("span.png")
    assert [
        len([line for line in panel.get_lines() if len(line.get_xdata()) == 3]) for panel in panels
    ] == [2, 2, 2]
    assert np.allclose(panels[2].get_lines()[0].get_ydata(), noise)
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["net.0", "net.3", "net.8"]
    figure, ax = plot_weight_shape(recorded, "net.0.weight")
    figure.savefig("shape.png")
    assert [line.get_xdata().tolist() for line in ax.get_lines()] == [[3, 7, 11], [3, 7, 11]]
    figure, ax = plot_weight_histogram(recorded)
    figure.savefig("histogram.png")
    assert len(ax.patches) == 2
    for patch in ax.patches:
        values, edges, _ = patch.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1)


def test_pictures_say_what_is_missing(recorded):
    watching = NormDynamicsMonitor(1, tables=False)
    fit(make(), [watching])
    with pytest.raises(NormDynError, match="curves of `input_span_noise` were asked for"):
        plot_input_span(watching.history)
    with pytest.raises(NormDynError, match="needs at least one, got none"):
        plot_weight_shape({})
    with pytest.raises(NormDynError, match=r"net\.9\.weight"):
        plot_weight_histogram(recorded, "net.9.weight")
    with pytest.raises(NormDynError, match="has 3 panels, and `ax` holds 1 axes"):
        plot_input_span(recorded, [plot_weight_shape(recorded)[1]])
