"""The monitor's predictions, verdicts and warnings: on a walk whose equilibrium is known, and on
networks that are well or about to die."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import exp, log, sqrt
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import Net, convnet, fit, loader, make
from paper_optimizers import SGDP, AdamP, Lion
from ranks import init_process_group, run_ranks
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset
from walk import SETTINGS, SHAPE, Angles, Setting, Walk, batches, by_rates, noise, settled, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.effect import Effects, Rescaling, Shrink
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.monitor import predictions
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.predictions import (
    Course,
    Prediction,
    idle_decay,
    judge,
    least_of,
    log_smallest,
    steps_to_collapse,
    steps_until_overflow,
    urgency,
)
from lightning_normdyn.parametrizations import weight_standardization
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
NOTHING = Effects()
KEYS = ("equilibrium_angular_update/weight", "equilibrium_ratio/weight")


def rms(values: Any) -> float:
    values = [float(v) for v in values]
    return sqrt(sum(v * v for v in values) / len(values))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The monitor's warnings, as texts."""
    texts: list[str] = []
    monkeypatch.setattr("lightning_normdyn.callbacks.norm_dynamics_monitor.warn_once", texts.append)
    return texts


def keys(monitor: NormDynamicsMonitor) -> set[str]:
    return set(monitor.history.keys())


# ---- Predictions ----


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_settled_walk_turns_as_predicted(setting: Setting, order: int) -> None:
    weight, optimizer = settled(setting)
    monitor, angles = NormDynamicsMonitor(1, tables=False), Angles()
    module = Walk(weight, optimizer)
    callbacks = [angles, monitor, *setting.callbacks()][::order]
    fit(module, callbacks, batches(noise(5, weight.shape)), max_epochs=1)
    predicted, ratio = (monitor.history.column(key)[1] for key in KEYS)
    expected = setting.equilibrium(weight.shape[1])[0]
    assert predicted.tolist() == pytest.approx([expected] * 5, rel=0.02)
    assert rms(ratio) == pytest.approx(1, abs=0.03)
    assert ratio.tolist() == pytest.approx(
        [a / p for a, p in zip(angles.seen, predicted.tolist(), strict=True)], rel=1e-5
    )
    overview = monitor.history.column("normdyn/equilibrium_ratio")[1]
    assert overview.tolist() == pytest.approx(ratio.tolist(), rel=1e-5)


def evaluating(kind: type[torch.optim.Optimizer]) -> Any:
    """The same optimizer under the same name, but one that evaluates its closure, as Lightning asks
    for."""

    def step(self: Any, closure: Any) -> Any:
        with torch.enable_grad():
            loss = closure()
        kind.step(self)
        return loss

    return type(kind.__name__, (kind,), {"step": step})


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        lambda p: SGD(p, lr=0.1, momentum=0.8, dampening=0.5, weight_decay=0.01),
        lambda p: ADAM(p, lr=0.1, decoupled_weight_decay=True, weight_decay=0.01),
        lambda p: evaluating(SGDP)(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: evaluating(AdamP)(p, lr=0.1, weight_decay=0.01),
        lambda p: evaluating(Lion)(p, lr=0.1, weight_decay=0.01),
    ],
)
def test_other_optimizers_that_are_understood(make_optimizer: Any) -> None:
    monitor, module = NormDynamicsMonitor(1, tables=False), Walk(start(), make_optimizer)
    runner = fit(module, [monitor], batches(noise(3, SHAPE)), max_epochs=1)
    (optimizer,) = runner.optimizers
    expected = equilibrium_angular_update(type(optimizer), optimizer.param_groups[0])
    assert monitor.history.column(KEYS[0])[1].tolist() == pytest.approx([expected] * 3)
    assert len(monitor.history.column(KEYS[1])[0]) == 3


@pytest.mark.parametrize(
    ("make_optimizer", "others"),
    [
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), []),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1), []),
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), []),
        (lambda p: ADAMW(p, weight_decay=0.1, amsgrad=True), []),
        (lambda p: SGD(p, lr=0.1), []),
        (lambda p: ADAMW(p, weight_decay=0), []),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: AdaptiveWeightShrink(0.1, weight_decay="keep")],
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: AdaptiveWeightShrink(0.1), lambda: WeightRescaling(2)],
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: WeightRescaling(2, weight_decay="keep")],
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [RadialProjection, lambda: WeightRescaling(2)],
        ),
        (
            lambda p: SGD(p, lr=0.1),
            [
                lambda: RadialProjection(weight_decay=0.1),
                lambda: AdaptiveWeightShrink(0.1, weight_decay="keep"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_no_prediction_where_none_is_known(make_optimizer: Any, others: Any, order: int) -> None:
    monitor = NormDynamicsMonitor(1, tables=False)
    callbacks = [monitor, *(other() for other in others)][::order]
    fit(Walk(start(), make_optimizer), callbacks, batches(noise(4, SHAPE)), max_epochs=1)
    assert len(monitor.history) == 4
    assert not [key for key in keys(monitor) if "equilibrium" in key]


def test_no_prediction_for_steps_of_a_recorded_length(tmp_path: Any) -> None:
    def optimizer(p: Any) -> Any:
        return SGD(p, lr=0.1, weight_decay=0.1)

    first, second = (
        NormDynamicsMonitor(1, per_vector=True, tables=False),
        NormDynamicsMonitor(1, tables=False),
    )
    fit(Walk(start(), optimizer), [first], batches(noise(4, SHAPE)), max_epochs=1)
    first.history.save(tmp_path / "history.npz")
    fit(
        Walk(start(), optimizer),
        [EffectiveLRReplay(tmp_path / "history.npz"), second],
        batches(noise(4, SHAPE)),
        max_epochs=1,
    )
    assert KEYS[0] in keys(first)
    assert KEYS[0] not in keys(second)


def test_no_prediction_for_weights_whose_length_the_loss_sees() -> None:
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(make(), [monitor])
    predicted = {
        key.partition("/")[2] for key in keys(monitor) if key.startswith("equilibrium_ratio/")
    }
    assert predicted == {"net.0.weight", "net.3.weight"}
    assert "angular_update/net.8.weight" in keys(monitor)


@pytest.mark.parametrize(
    ("make_optimizer", "every", "others"),
    [
        (lambda p: SGD(p, lr=0.02, weight_decay=0.1), 10, []),
        (lambda p: SGD(p, lr=0.01, momentum=0.5), 20, []),
        (
            lambda p: SGD(p, lr=0.02, momentum=0.5, weight_decay=0.1),
            20,
            [lambda: RadialProjection(weight_decay_ratio=0.0)],
        ),
    ],
)
def test_rescaled_to_a_norm_now_and_then(make_optimizer: Any, every: int, others: Any) -> None:
    monitor = NormDynamicsMonitor(1, tables=False)
    module = Walk(start((96, 64), norm=1.0), make_optimizer)
    fit(
        module,
        [monitor, WeightRescaling(every), *(other() for other in others)],
        batches(noise(5 * every, (96, 64))),
        max_epochs=1,
    )
    ratio = monitor.history.column(KEYS[1])[1]
    assert rms(ratio[2 * every :]) == pytest.approx(1, abs=0.03)
    assert monitor._layers()[0]["verdict"].startswith("length held by WeightRescaling, ")


def test_a_rescaling_window_changes_what_is_predicted() -> None:
    def optimizer(p: Any) -> Any:
        return SGD(p, lr=0.01, weight_decay=0.1)

    monitor = NormDynamicsMonitor(1, tables=False)
    callbacks = [monitor, WeightRescaling(1, start_epoch=1, stop_epoch=2)]
    fit(Walk(start(norm=1.0), optimizer), callbacks, batches(noise(2, SHAPE)), max_epochs=3)
    predicted = monitor.history.column(KEYS[0])[1].tolist()
    alone = sqrt(2 * 0.01 * 0.1)
    assert [predicted[i] for i in (0, 1, 4, 5)] == pytest.approx([alone] * 4)
    assert min(abs(predicted[i] / alone - 1) for i in (2, 3)) > 0.1
    windows: list[str] = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if callbacks[1].plans:
                (target,) = callbacks[1].plans[0].targets
                windows.append(callbacks[1].member.effect(0, target).window)

    fit(
        Walk(start(norm=1.0), optimizer),
        [*callbacks, Looks()],
        batches(noise(2, SHAPE)),
        max_epochs=3,
    )
    assert windows[-2:] == ["now", "over"]


def test_the_strength_of_aws_is_that_of_its_own_statistic() -> None:
    monitor, weight = NormDynamicsMonitor(1, tables=False), start()
    callback = AdaptiveWeightShrink(0.2, statistic="std")
    fit(
        Walk(weight, lambda p: SGD(p, lr=0.1)),
        [monitor, callback],
        batches(noise(1, SHAPE)),
        max_epochs=1,
    )
    std = weight.std(dim=1, correction=0).mean().item()
    row = monitor.history[0]
    assert row["equivalent_weight_decay/weight"] == pytest.approx(0.2 * std)
    assert row[KEYS[0]] == pytest.approx(sqrt(2 * 0.1 * 0.2 * std))


# ---- Verdicts: crafted curves ----


def curves(norm: Any, angle: Any, predicted: Any = None, rows: int = 100) -> History:
    history = History()
    for i in range(rows):
        row = {"weight_norm/w": norm(i), "angular_update/w": angle(i)}
        if predicted is not None:
            row["equilibrium_angular_update/w"] = predicted(i)
        history.append(i, row, optimizer_step=i + 1)
    return history


def course(prediction: Prediction | None, steps: int = 100) -> Course:
    seen = Course()
    for step in range(1, steps + 1):
        seen.add(step, prediction)
    return seen


SLOW, FAST = (Prediction(0.01, relaxation, 4, 1e-4) for relaxation in (50.0, 10.0))


@pytest.mark.parametrize(
    ("prediction", "norm", "ratio", "expected"),
    [
        (FAST, lambda i: 2.0, 1.0, "settled"),
        (FAST, lambda i: 2.0 + 0.001 * (-1) ** i, 0.8, "settled"),
        (FAST, lambda i: 2.0, 1.6, r"settled, 1.6x the prediction \(above\)"),
        (FAST, lambda i: 2.0, 0.4, r"settled, 0.4x the prediction \(below\)"),
        (SLOW, lambda i: 2.0, 0.9, "not settled yet, 0.9x the prediction"),
        (FAST, lambda i: 2.0 * 1.01**-i, 0.5, r"approaching, about \d+ steps left"),
        (FAST, lambda i: 2.0 * 0.99**-i, 2.0, r"approaching, about \d+ steps left"),
        (FAST, lambda i: 2.0, 0.0, "frozen"),
        (FAST, lambda i: 2.0 * 0.99**i, 0.0, "collapsing"),
        (None, lambda i: 2.0, 1.0, "no prediction"),
        (None, lambda i: 2.0, 0.0, "frozen"),
        (
            Prediction(0.01, None, 0, 0.1),
            lambda i: 2.0,
            0.7,
            "length held by WeightRescaling, 0.7x the prediction",
        ),
        (
            Prediction(0.01, 10.0, 3, 1e-4, rough=True),
            lambda i: 2.0,
            1.5,
            r"settled, 1.5x the prediction \(above\) \(a rough one\)",
        ),
        (Prediction(0.01, 10.0, 3, 1e-4, rough=True), lambda i: 2.0, 1.0, "settled"),
    ],
)
def test_verdicts(prediction: Prediction | None, norm: Any, ratio: float, expected: str) -> None:
    predicted = None if prediction is None else lambda i: 0.01
    history = curves(norm, lambda i: 0.01 * ratio, predicted)
    said = judge(history, "w", course(prediction))
    assert re.fullmatch(expected, said), said


def test_a_schedule_faster_than_the_relaxation() -> None:
    falling = Course()
    for step in range(1, 101):
        falling.add(step, Prediction(0.01 * 0.99**step, 20.0, 4, 1e-4 * 0.98**step))
    history = curves(lambda i: 2.0, lambda i: 0.01, lambda i: 0.01 * 0.99**i)
    assert judge(history, "w", falling) == "schedule faster than relaxation"
    # A drop long ago is none.
    dropped = Course()
    for step in range(1, 101):
        dropped.add(step, Prediction(0.01, 5.0, 4, 1e-3 if step < 50 else 1e-4))
    assert judge(curves(lambda i: 2.0, lambda i: 0.01, lambda i: 0.01), "w", dropped) == "settled"
    assert dropped.change(20.0) < 0.1 < dropped.change(60.0)


def verdicts_of_a_wandering_norm(trend: float) -> list[str]:
    """What is said at every tenth step from the seventh relaxation time on: of a norm whose
    logarithm wanders by 0.07 within a relaxation
    time of 50 steps, as in a settled network, and has a trend besides."""
    said, relaxation, rows = [], 50.0, 150
    for seed in range(3):
        wander, kept = (
            torch.randn(rows, generator=torch.Generator().manual_seed(seed)).tolist(),
            exp(-10 / relaxation),
        )
        history, seen, deviation = History(), Course(), 0.0
        for i in range(rows):
            deviation = kept * deviation + sqrt(1 - kept**2) * 0.07 * wander[i]
            norm = exp((deviation + trend * 10 * i / relaxation) / 2)
            row = {
                "weight_norm/w": norm,
                "angular_update/w": 0.01,
                "equilibrium_angular_update/w": 0.01,
            }
            history.append(10 * i, row, optimizer_step=10 * i + 1)
            seen.add(10 * i + 1, Prediction(0.01, relaxation, 4, 1e-4))
            if i >= 35:
                said.append(judge(history, "w", seen).split(",")[0])
    return said


@pytest.mark.parametrize(
    ("trend", "expected"),
    [(0.0, "settled"), (0.05, "settled"), (-0.25, "approaching"), (0.25, "approaching")],
)
def test_verdicts_do_not_flicker(trend: float, expected: str) -> None:
    said = verdicts_of_a_wandering_norm(trend)
    assert said.count(expected) > 0.97 * len(said)


def test_a_norm_that_falls_after_a_burst_is_not_settled() -> None:
    """Over the last two relaxation times it falls as fast as the decay allows, over the last four
    it has grown."""
    relaxation = 50.0
    norm = lambda i: (1.0 if i < 330 else 4.0) * exp(-max(i - 330, 0) / relaxation / 4)  # noqa: E731
    history = curves(norm, lambda i: 0.002, lambda i: 0.01, rows=480)
    assert judge(history, "w", course(Prediction(0.01, relaxation, 4, 1e-4), 480)).startswith(
        "approaching, about "
    )


def test_what_was_before_a_drop_of_the_rate_does_not_count() -> None:
    """A norm that fell until the drop and is still from there on: settled soon after, although four
    relaxation times look back further."""
    seen, history = Course(), History()
    for i in range(100):
        prediction = Prediction(0.01, 10.0, 4, 1e-3 if i < 87 else 1e-4)
        seen.add(i + 1, prediction)
        norm = 0.97 ** min(i, 87)
        history.append(
            i,
            {"weight_norm/w": norm, "angular_update/w": 0.01, "equilibrium_angular_update/w": 0.01},
            optimizer_step=i + 1,
        )
    assert seen.steady_since() == 88
    assert judge(history, "w", seen) == "settled"


def test_too_few_rows() -> None:
    assert judge(History(), "w", Course()) == "too few rows"
    assert (
        judge(curves(lambda i: 1.0, lambda i: 0.01, lambda i: 0.01, rows=2), "w", course(FAST, 2))
        == "too few rows"
    )


def test_the_steps_left_are_those_of_the_closed_form() -> None:
    """A norm far above its equilibrium, ‖w‖^4 falling to it exponentially."""
    relaxation = 100.0
    norm = lambda i: (1 + 15 * 2.718281828 ** (-i / relaxation)) ** 0.25  # noqa: E731
    history = curves(norm, lambda i: 0.01 / norm(i) ** 2, lambda i: 0.01)
    said = judge(history, "w", course(Prediction(0.01, relaxation, 4, 1e-4)))
    left = next(
        steps
        for steps in range(2000)
        if abs(2 * log(norm(100 + steps + 1) / norm(100 + steps))) * relaxation < 0.1
    )
    assert said.startswith("approaching, about ")
    assert int(said.split()[2]) == pytest.approx(left, rel=0.15)


def test_e_foldings_add_up_over_a_schedule() -> None:
    seen = Course()
    for step in range(10, 101, 10):
        seen.add(step, Prediction(0.01, 10.0 if step <= 50 else 100.0, 4, 1.0))
    assert seen.elapsed == pytest.approx(5 + 0.5)
    for step in range(1, 5000):
        seen.add(100 + step, Prediction(0.01, 10.0, 4, 1.0 + step % 7))
    assert len(seen.pulls) <= 513


# ---- Verdicts: crafted runs ----


LR, DECAY = 0.1, 0.05  # relaxation: 50 steps


def verdict_of(
    noises: Any,
    *,
    norm: float = 1.0,
    make_optimizer: Any = None,
    scheduler: Any = None,
    holds: bool = False,
) -> dict[str, Any]:
    """What the end table says of a walk of 1 x its equilibrium norm, times ``norm``."""
    shape = (24, 32)
    settled_norm = (LR * (shape[1] - 1) / (2 * DECAY)) ** 0.25
    monitor = NormDynamicsMonitor(5, tables=False)
    make_optimizer = make_optimizer or (lambda p: SGD(p, lr=LR, weight_decay=DECAY))
    module = Walk(start(shape, norm * settled_norm), make_optimizer, scheduler)
    others = [Holds(norm * settled_norm)] if holds else []
    fit(module, [monitor, *others], batches(noises(shape)), max_epochs=1)
    (layer,) = monitor._layers()
    table = monitor.end_table()
    assert table is not None
    assert all(word in table for word in layer["verdict"].split())
    return layer


def white(steps: int) -> Any:
    return lambda shape: noise(steps, shape)


class Holds(L.Callback):
    """Somebody else's rule: every row has this norm after every step."""

    def __init__(self, norm: float) -> None:
        self.norm = norm

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.weight.mul_(self.norm / pl_module.weight.norm(dim=1, keepdim=True))


def test_a_run_at_its_equilibrium() -> None:
    layer = verdict_of(white(360))
    assert layer["verdict"] == "settled"
    assert layer["e-foldings"] == pytest.approx(360 / 50)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (1.5, r"settled, 0\.4\dx the prediction \(below\)"),
        (0.7, r"settled, 2x the prediction \(above\)"),
    ],
)
def test_runs_that_settle_elsewhere(norm: float, expected: str) -> None:
    """A settled norm implies the predicted angle, whatever the noise, wherever gradients are at
    right angles to the weight and nobody else
    interferes. So it takes somebody who does."""
    said = verdict_of(white(330), norm=norm, holds=True)["verdict"]
    assert re.fullmatch(expected, said), said


def test_a_run_too_short_to_say() -> None:
    layer = verdict_of(white(120))
    assert layer["verdict"].startswith("not settled yet, ")
    assert 2 < layer["e-foldings"] < 3


def test_a_run_on_its_way() -> None:
    layer = verdict_of(white(60), norm=2.0)
    assert layer["verdict"].startswith("approaching, about ")
    # ‖w‖^4 = 16 at the start; until |d ln‖w‖²| x relaxation < 0.1 it must fall to 1.25.
    assert int(layer["verdict"].split()[2]) == pytest.approx(50 * log(15 / 0.25) - 60, rel=0.4)


def test_a_run_under_a_cosine() -> None:
    layer = verdict_of(
        white(200), scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200)
    )
    assert layer["verdict"] == "schedule faster than relaxation"


def test_a_run_that_ends_at_an_lr_of_zero_is_judged_by_what_went_before() -> None:
    layer = verdict_of(white(360), scheduler=by_rates([LR] * 355 + [0.0]))
    assert layer["verdict"] == "settled"
    assert layer["e-foldings"] == pytest.approx(355 / 50)


def test_a_run_that_does_not_turn() -> None:
    silent = lambda shape: [torch.zeros(shape, dtype=torch.float64)] * 40  # noqa: E731
    assert verdict_of(silent)["verdict"] == "collapsing"
    assert verdict_of(silent, make_optimizer=lambda p: SGD(p, lr=0.1))["verdict"] == "frozen"


def test_a_run_without_a_prediction() -> None:
    layer = verdict_of(white(40), make_optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01))
    assert layer["verdict"] == "no prediction"
    assert layer["prediction"] is None
    assert layer["e-foldings"] is None


def test_e_foldings_go_on_after_a_resume(tmp_path: Any) -> None:
    class ByStep(Walk):
        def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            return super().training_step(noise(40, SHAPE)[self.trainer.global_step])

    def go(monitor: NormDynamicsMonitor, **arguments: Any) -> L.Trainer:
        module = ByStep(start(), lambda p: SGD(p, lr=LR, weight_decay=DECAY))
        return fit(module, [monitor], batches(noise(10, SHAPE)), **arguments)

    whole, first, second = (NormDynamicsMonitor(1, tables=False) for _ in range(3))
    go(whole, max_epochs=4)
    go(first, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    go(second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert second._layers() == whole._layers()


# ---- Warnings: dead vectors ----


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
        target = "lightning_normdyn.callbacks.norm_dynamics_monitor.warn_once"
        monkeypatch.setattr(target, lambda text: self.texts.append((self.step, text)))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step + 1


def foretold(text: str) -> float:
    return float(text.split(" steps")[0].split()[-1])


def train_until_nan(
    make_optimizer: Any, monkeypatch: pytest.MonkeyPatch, steps: int, every: int, **arguments: Any
) -> Dying:
    """Exactly one warning before the NaN, right about the number of steps left, and one when it is
    there."""
    module, notes = make(Dying, make_optimizer=make_optimizer, **arguments), Notes(monkeypatch)
    monitor = NormDynamicsMonitor(every, tables=False)
    data = loader(8, torch.float32)
    fit(
        module,
        [notes, monitor],
        data,
        max_epochs=steps,
        max_steps=steps,
        check_val_every_n_epoch=None,
    )
    assert module.died_at is not None
    (said_at, text), (diverged_at, diverged) = notes.texts
    assert "not finite at step" in diverged
    assert module.died_at <= diverged_at <= module.died_at + every
    assert "net.3.parametrizations.weight.original" in text
    assert said_at < module.died_at
    assert said_at + foretold(text) == pytest.approx(module.died_at, rel=0.1)
    assert foretold(text) == pytest.approx(module.died_at - said_at, rel=0.1)
    return module


def in_groups(make_optimizer: Any) -> Any:
    """Decay for the standardized weights alone, so that the bias that keeps the filter dead stays
    where it is."""

    def make_it(parameters: Any) -> Any:
        weights, others = [], []
        for p in parameters:
            (weights if p.ndim == 4 else others).append(p)
        return make_optimizer(
            [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 1e-4}]
        )

    return make_it


def test_a_dead_filter_is_reported_before_the_loss_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = train_until_nan(
        in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)), monkeypatch, 1500, 20
    )
    assert 800 < module.died_at < 1050


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
    fit(module, [NormDynamicsMonitor(10, tables=False)], loader(8, torch.float32), max_epochs=300)
    assert module.died_at is None
    assert said == []


def test_aws_and_a_rescale_save_dead_filters(said: list[str]) -> None:
    for callback in (AdaptiveWeightShrink(0.5), WeightRescaling(50)):
        module = make(
            Dying,
            make_optimizer=in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)),
        )
        fit(
            module,
            [NormDynamicsMonitor(10, tables=False), callback],
            loader(8, torch.float32),
            max_epochs=200,
            max_steps=-1,
        )
        assert module.died_at is None
    assert said == []


def test_the_smallest_of_several_comes_from_a_sum() -> None:
    left = torch.tensor([31.0, 49.0, 40.0, 33.0], dtype=torch.float64)
    assert least_of(urgency(left).sum().item()) == pytest.approx(31, rel=0.01)
    assert least_of(urgency(left.float()).sum().item(), torch.float32) == pytest.approx(
        31, rel=0.05
    )
    assert least_of(
        urgency(torch.full((10,), 52.0, dtype=torch.float64)).sum().item()
    ) == pytest.approx(52, rel=0.05)
    assert least_of(
        urgency(torch.tensor([-float("inf"), 3.0], dtype=torch.float64)).sum().item()
    ) == pytest.approx(1)


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
    # Known of two vectors: the first one to vanish counts.
    dying = [predictions.Dying(50.0, 0.1, moment, 0.3 * moment, 500.0) for moment in (1e-6, 1e-7)]
    group_of_adam = {**adam, "eps": 1e-8}
    first = steps_to_collapse(ADAM, group_of_adam, NOTHING, 48.0, 0.016, dying)
    assert first == dying[1].steps_left(group_of_adam) < dying[0].steps_left(group_of_adam)
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


def dying(weight: nn.Parameter, gradients: Sequence[Tensor]) -> Tensor:
    """What is known of the vectors of ``weight`` after a few steps of Adam, beside another weight:
    ``(4, vectors)``."""
    other = nn.Parameter(torch.ones(2, 3))
    optimizer = ADAM([other, weight], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        other.grad, weight.grad = torch.ones(2, 3), gradient
        optimizer.step()
    vectors = WeightVectors(
        [other, weight], [Partition.filters((2, 3)), Partition.filters(tuple(weight.shape))]
    )
    found = predictions.entries_of_dying(vectors, optimizer.state, 1, optimizer.param_groups[0])
    return vectors.gather(found)[1]


def test_the_last_and_the_first_entry_to_go() -> None:
    weight = nn.Parameter(start((4, 30)))
    gradients = [g * torch.linspace(0.2, 1, 30) for g in noise(3, (4, 30))]
    size, largest, smallest, step = dying(weight, gradients)
    reference = nn.Parameter(start((4, 30)))
    optimizer = ADAM([reference], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        reference.grad = gradient
        optimizer.step()
    seconds = optimizer.state[reference]["exp_avg_sq"]
    assert (largest / seconds.amax(1)).tolist() == pytest.approx([0.95] * 4, abs=0.1)
    assert (smallest / seconds.amin(1)).tolist() == pytest.approx([1.1] * 4, abs=0.2)
    assert size.tolist() == pytest.approx(
        reference.abs()[torch.arange(4), seconds.argmax(1)].tolist(), rel=0.5
    )
    assert step.tolist() == pytest.approx([3.0] * 4)


def test_dying_vectors_in_pieces_are_those_of_the_whole() -> None:
    """Rows, columns, and a rank that holds none of it."""

    def main() -> list[Tensor]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        init_process_group()
        mesh, found = init_device_mesh("cpu", (2,)), []
        for shape, dim in (((4, 6), 0), ((4, 6), 1), ((1, 6), 0)):
            gradients = [distribute_tensor(g, mesh, [Shard(dim)]) for g in noise(3, shape)]
            found.append(
                dying(nn.Parameter(distribute_tensor(start(shape), mesh, [Shard(dim)])), gradients)
            )
        return found

    for values in run_ranks(main).values():
        for value, shape in zip(values, ((4, 6), (4, 6), (1, 6)), strict=True):
            assert torch.allclose(
                value, dying(nn.Parameter(start(shape)), noise(3, shape)), rtol=1e-9
            )


# ---- Warnings: overflow ----


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


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e6])
def test_a_walk_without_decay_does_not_run_away(norm: float, said: list[str]) -> None:
    module = Walk(start(norm=norm), lambda p: SGD(p, lr=0.5, momentum=0.9))
    fit(module, [NormDynamicsMonitor(1, tables=False)], batches(noise(100, SHAPE)), max_epochs=1)
    assert said == []


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


# ---- No false alarm ----


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


class GuardedWalk(Walk):
    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return (noise * self.weight / (self.weight.norm(dim=1, keepdim=True) + 1e-12)).sum()


def test_collapsed_vectors_are_counted() -> None:
    weight = start((6, 5))
    weight[2] *= 1e-5
    weight[4] = 0.0
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(
        GuardedWalk(weight, lambda p: SGD(p, lr=1e-12)),
        [monitor],
        batches(noise(2, (6, 5))),
        max_epochs=1,
    )
    assert monitor.history[0]["normdyn/collapsed_vectors"] == 2


def test_an_infinite_vector_does_not_make_the_others_look_collapsed() -> None:
    weight = start((6, 5))
    weight[4] = 1e308
    monitor = NormDynamicsMonitor(1, tables=False)
    with pytest.warns(
        NormDynWarning, match="`weight` are not finite at step 0"
    ):  # its square overflows
        fit(
            Walk(weight, lambda p: SGD(p, lr=1e-12)),
            [monitor],
            batches(noise(2, (6, 5))),
            max_epochs=1,
        )
    assert monitor.history[0]["normdyn/collapsed_vectors"] == 0


# ---- A decay that cannot act ----


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


def test_weight_standardization_of_this_package_is_safe_and_counted() -> None:
    """A guarded standardization gives no NaN; its dead filter is counted as collapsed."""
    module = make(
        net=convnet(),
        make_optimizer=in_groups(lambda p: SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2)),
        dtype=torch.float32,
    )
    weight_standardization(module.net[3])
    with torch.no_grad():
        module.net[4].bias[1] = -30.0
        module.net[3].parametrizations.weight.original[1] *= 1e-5
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(module, [monitor], max_epochs=2)
    assert monitor.history[-1]["normdyn/collapsed_vectors"] == 1
