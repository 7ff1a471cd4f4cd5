"""Warnings: networks that are about to die hear of it in time, and healthy ones do not; forecasts
against closed forms and against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import Net, convnet, fit, fit_batches, loader, make
from monitoring import in_groups
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset
from walk import SHAPE, Walk, batches, noise, start

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor, WeightRescaling
from lightning_normdyn.engine.effect import Effects, Rescaling, Shrink
from lightning_normdyn.monitor.alarms import idle_decay, steps_to_collapse, steps_until_overflow
from lightning_normdyn.monitor.step_sums import log_smallest

SGD = torch.optim.SGD


ADAM = torch.optim.Adam


ADAMW = torch.optim.AdamW


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The monitor's warnings, as texts."""
    texts: list[str] = []
    monkeypatch.setattr("lightning_normdyn.monitor.alarms.warn_once", texts.append)
    return texts


def keys(monitor: NormDynamicsMonitor) -> set[str]:
    return set(monitor.history.keys())


class Standardized(nn.Module):
    """The AWS paper's eq. 3 as it is printed, without a guard against a deviation of 0."""

    statistic = "std"

    def forward(self, weight: Tensor) -> Tensor:
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt()


class Dying(Net):
    """A weight-standardized network with dead filters: BatchNorm's bias of -30 in front of a ReLU.
    Ends at the first loss of NaN."""

    def __init__(self, make_optimizer: Any, dead: Sequence[int] = (1,)) -> None:
        super().__init__(make_optimizer, dtype=torch.float32)
        for i in (0, 3):
            parametrize.register_parametrization(self.net[i], "weight", Standardized())
        with torch.no_grad():
            self.net[4].bias[list(dead)] = -30.0
        self.died_at: int | None = None

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        loss = super().training_step(batch)
        if self.died_at is None and loss.isnan():
            self.died_at, self.trainer.should_stop = self.trainer.global_step, True
        return loss


class Notes(L.Callback):
    """The step at which each of our warnings came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[tuple[int, str]] = []
        self.step = 0
        target = "lightning_normdyn.monitor.alarms.warn_once"
        monkeypatch.setattr(target, lambda text: self.texts.append((self.step, text)))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step + 1


def foretold(text: str) -> float:
    return float(text.split(" steps")[0].split()[-1])


def one_batch(steps: int) -> list[Any]:
    """The same batch for every step of one epoch: an epoch a step would take longer."""
    (batch,) = loader(8, torch.float32)
    return [batch] * steps


def train_until_nan(
    make_optimizer: Any, monkeypatch: pytest.MonkeyPatch, steps: int, every: int, **arguments: Any
) -> Dying:
    """Exactly one warning before the NaN, right about the number of steps left where the rate of
    the fall is known, and one when it is there."""
    module, notes = make(Dying, make_optimizer=make_optimizer, **arguments), Notes(monkeypatch)
    monitor = NormDynamicsMonitor(every, tables=False)
    fit_batches(module, [notes, monitor], one_batch(steps))
    assert module.died_at is not None
    (said_at, text), (diverged_at, diverged) = notes.texts
    assert "not finite at step" in diverged
    assert module.died_at <= diverged_at <= module.died_at + every
    assert "net.3.parametrizations.weight.original" in text
    assert said_at < module.died_at
    # Where only the present rate of the fall is known, the forecast is rough.
    tolerance = 0.5 if "as fast as now" in text else 0.1
    assert foretold(text) == pytest.approx(module.died_at - said_at, rel=tolerance)
    return module


@pytest.mark.slow
def test_a_dead_filter_is_reported_before_the_loss_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = train_until_nan(
        in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)), monkeypatch, 1500, 20
    )
    assert 800 < module.died_at < 1050


@pytest.mark.slow
def test_a_dead_filter_under_adam_is_foretold_although_it_falls_ever_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = train_until_nan(
        in_groups(lambda p: ADAM(p, lr=1e-2, weight_decay=1e-2)), monkeypatch, 1300, 20
    )
    assert 800 < module.died_at < 1100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_optimizer", "steps", "dead"),
    [
        (lambda p: ADAM(p, lr=3e-3, weight_decay=1e-4), 3000, (0, 2)),
        (lambda p: ADAM(p, lr=1e-2, weight_decay=5e-2), 3000, (1,)),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2), 6000, (1,)),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2), 6000, (0, 2, 3, 4)),
        (lambda p: SGD(p, lr=0.5, weight_decay=5e-2), 4000, (1, 2)),
    ],
)
def test_dead_filters_in_the_papers_failures(
    make_optimizer: Any, steps: int, dead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until_nan(in_groups(make_optimizer), monkeypatch, steps, 50, dead=dead)


def test_a_death_beyond_the_end_of_the_run_is_not_reported(said: list[str]) -> None:
    module = make(
        Dying, make_optimizer=in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2))
    )
    fit_batches(module, [NormDynamicsMonitor(10, tables=False)], one_batch(300))
    assert module.died_at is None
    assert said == []


def test_aws_and_a_rescale_save_dead_filters(said: list[str]) -> None:
    for callback in (AdaptiveWeightShrink(0.5), WeightRescaling(50)):
        module = make(
            Dying,
            make_optimizer=in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)),
        )
        fit_batches(module, [NormDynamicsMonitor(10, tables=False), callback], one_batch(200))
        assert module.died_at is None
    assert said == []


def test_a_norm_on_its_way_to_overflow_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Norms(L.Callback):
        overflown: int | None = None

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if self.overflown is None and pl_module.weight.square().sum(1).isinf().any():
                self.overflown, trainer.should_stop = trainer.global_step, True

    notes, norms = Notes(monkeypatch), Norms()
    module = Walk(
        start(dtype=torch.float32), lambda p: SGD(p, lr=0.5, weight_decay=4.6)
    )  # w -> -1.3 w
    callbacks = [notes, norms, NormDynamicsMonitor(3, tables=False)]
    fit(module, callbacks, batches(noise(400, SHAPE, dtype=torch.float32)), max_epochs=1)
    assert norms.overflown is not None
    [(said_at, text)] = [note for note in notes.texts if "not finite" not in note[1]]
    assert "`weight`: its norm has grown from" in text
    assert said_at < norms.overflown
    assert foretold(text) == pytest.approx(norms.overflown - said_at, rel=0.1)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e6])
def test_a_walk_without_decay_does_not_run_away(norm: float, said: list[str]) -> None:
    module = Walk(start(norm=norm), lambda p: SGD(p, lr=0.5, momentum=0.9))
    fit(module, [NormDynamicsMonitor(1, tables=False)], batches(noise(100, SHAPE)), max_epochs=1)
    assert said == []


@pytest.mark.sampled
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-3),
        lambda p: SGD(p, lr=1.0, weight_decay=5e-2),
        lambda p: ADAMW(p, lr=0.01, weight_decay=0.5),
        lambda p: ADAM(p, lr=0.01, weight_decay=0.01),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_healthy_networks_raise_no_alarm(
    make_optimizer: Any, scale: float, said: list[str]
) -> None:
    module = make(net=convnet(), make_optimizer=make_optimizer, dtype=torch.float32)
    with torch.no_grad():
        for i in (0, 3):
            module.net[i].weight.mul_(scale)
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [monitor], max_epochs=12)
    assert said == []
    assert monitor.history[-1]["normdyn/collapsed_vectors"] == 0


class Rows(Walk):
    """An embedding in front of a LayerNorm: rows that are never used get no gradient, and no decay
    either without one of their own."""

    def __init__(self) -> None:
        super().__init__(start((6, 5)), lambda p: SGD(p, lr=0.1, weight_decay=0.01))
        self.embedding = nn.Embedding(8, 5, padding_idx=0, dtype=torch.float64)

    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return super().training_step(noise) + F.mse_loss(self.embedding(torch.arange(1, 7)), noise)


def test_rows_of_zeros_that_no_norm_follows_are_no_alarm(said: list[str]) -> None:
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(Rows(), [monitor], batches(noise(120, (6, 5))), max_epochs=1)
    assert "weight_norm/embedding.weight" in keys(monitor)
    assert said == []
    assert monitor.history[-1]["normdyn/collapsed_vectors"] == 0


def test_an_idle_decay_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def optimizer(p: Any) -> Any:
        return ADAMW(p, lr=1e-3, weight_decay=0.01)

    fit(make(make_optimizer=optimizer), [NormDynamicsMonitor(1)], max_epochs=5)
    out = capsys.readouterr().out
    assert out.count("does next to nothing") == 1
    assert (
        "weight decay 0.01 at lr 0.001 shrinks a weight by 0.02 % over the 20 steps of this run"
        in out
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("make_optimizer", "make_scheduler", "others"),
    [
        (lambda p: SGD(p, lr=0.1, weight_decay=0.5), None, []),
        (lambda p: ADAMW(p, lr=1e-3, weight_decay=0.0), None, []),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=0.01), None, []),
        (lambda p: SGD(p, lr=1e-3, weight_decay=0.01), None, [lambda: AdaptiveWeightShrink(0.5)]),
        # The first rate of a warm-up is not the rate of the run.
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.5),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1e-4, total_iters=5),
            [],
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.5),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=21),
            [],
        ),
    ],
)
def test_nothing_is_said_of_a_decay_that_acts(
    make_optimizer: Any, make_scheduler: Any, others: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make(make_optimizer=make_optimizer, make_scheduler=make_scheduler)
    fit(module, [NormDynamicsMonitor(1), *(other() for other in others)], max_epochs=5)
    assert "does next to nothing" not in capsys.readouterr().out


def test_a_run_of_unknown_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(noise(5, SHAPE))

    monitor = NormDynamicsMonitor(1)
    fit(
        Walk(start(), lambda p: ADAMW(p, weight_decay=1e-4)),
        [monitor],
        DataLoader(Stream(), batch_size=None),
        max_epochs=1,
    )
    assert len(monitor.history) == 5
    assert idle_decay(ADAMW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-3}, -1) is None
    assert (
        idle_decay(ADAMW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-3}, float("inf"))
        is None
    )


NOTHING = Effects()


def test_steps_to_collapse() -> None:
    left = log(0.17) - log_smallest(torch.float32)
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 1e-2}
    # Measured: the first look at a variance of 0, every 10 steps.
    assert steps_to_collapse(SGD, group, NOTHING, left, 1.0) == pytest.approx(4490, abs=10)
    assert steps_to_collapse(
        SGD, {**group, "weight_decay": 1e-3}, NOTHING, left, 1.0
    ) == pytest.approx(49650, rel=0.003)
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}
    assert steps_to_collapse(ADAM, adam, NOTHING, 48.0, 0.016) == pytest.approx(3000)
    assert steps_to_collapse(
        SGD, group, Effects(shrink=Shrink(0.1, "norm", True)), left, 0.01
    ) == float("inf")
    # AWS fades with the length, a decay that is kept beside it does not.
    kept = Effects(shrink=Shrink(0.1, "norm", False))
    assert steps_to_collapse(SGD, group, kept, left, 1.0) == steps_to_collapse(
        SGD, group, NOTHING, left, 1.0
    )
    assert steps_to_collapse(SGD, {**group, "weight_decay": 0}, kept, left, 1.0) == float("inf")
    later, over = (
        Effects(rescaling=Rescaling(2, 1.0, True, window)) for window in ("later", "over")
    )
    assert steps_to_collapse(SGD, group, later, left, 0.01) == float("inf")
    assert steps_to_collapse(SGD, group, Effects(underived=("MyRule",)), left, 0.01) == float("inf")
    assert steps_to_collapse(SGD, group, over, left, 1.0) == steps_to_collapse(
        SGD, group, NOTHING, left, 1.0
    )
    assert log_smallest(torch.bfloat16) == log_smallest(torch.float32) > log_smallest(torch.float64)


def test_what_counts_as_running_away() -> None:
    steps = [0, 50, 60, 70, 80]
    assert steps_until_overflow(
        steps, [1.0, *(1e5 * 2.0 ** (i / 10) for i in (0, 10, 20, 30))]
    ) == pytest.approx(10 * (log(1.84e19) - log(8e5)) / log(2), rel=0.01)
    assert steps_until_overflow(steps, [1.0, 1e5, 2e5, 2.2e5, 2.21e5]) == float(
        "inf"
    )  # slowing down
    assert steps_until_overflow(steps, [1.0, 1e5, 1e5, 1e5, 1e5]) == float("inf")
    assert steps_until_overflow(steps[:3], [1.0, 1e5, 2e5]) == float("inf")
    assert steps_until_overflow(steps, [1.0, 1e5, 2e5, 4e5, float("inf")]) == float("inf")
    assert steps_until_overflow(steps, [0.0, 1e5, 2e5, 4e5, 8e5]) == float("inf")
