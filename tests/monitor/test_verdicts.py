"""Verdicts at the end of a fit: on curves that are given, and on walks whose equilibrium is
known."""

from __future__ import annotations

import re
from math import exp, log, sqrt
from typing import Any

import lightning as L
import pytest
import torch
from models import fit
from torch import Tensor
from walk import SHAPE, Walk, batches, by_rates, noise, start

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.verdicts import Course, judge

SGD = torch.optim.SGD


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
    logarithm wanders by 0.07 within a relaxation time of 50 steps, as in a settled network, and has
    a trend besides."""
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
    (layer,) = monitor.member.layers()
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
    right angles to the weight and nobody else interferes. So it takes somebody who does."""
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
    assert second.member.layers() == whole.member.layers()
