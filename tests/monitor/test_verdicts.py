"""Verdicts at the end of a fit: on curves that are given, and on walks whose equilibrium is
known."""

from __future__ import annotations

import math
import re
from math import exp, log, sqrt, tan
from typing import Any

import lightning as L
import pytest
import torch
from balances import after, sums_of
from courses import predicted
from models import fit
from torch import Tensor
from walk import SHAPE, Walk, batches, by_rates, noise, start

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.measured_balance import Balance
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.pulls import Strength, Taken
from lightning_normdyn.monitor.verdicts import Course, Grounds, balance_of, judge, norm_has_settled
from lightning_normdyn.theory.words import Balanced

SGD = torch.optim.SGD


def curves(
    norm: Any, angle: Any, predicted: Any = None, expected: Any = None, rows: int = 100
) -> History:
    history = History()
    for i in range(rows):
        row = {"weight_norm/w": norm(i), "angular_update/w": angle(i)}
        if predicted is not None:
            row["equilibrium_angular_update/w"] = predicted(i)
        if expected is not None:
            row["expected_angular_update/w"] = expected(i)
        history.append(i, row, optimizer_step=i + 1)
    return history


def course(prediction: Prediction | None, steps: int = 100) -> Course:
    seen = Course()
    for step in range(1, steps + 1):
        seen = predicted(seen, step, prediction)
    return seen


SLOW, FAST = (Prediction(0.01, relaxation, 4, 1e-4) for relaxation in (50.0, 10.0))


HELD = Prediction(0.01, None, 0, 0.1)
STANDS = lambda i: 2.0  # noqa: E731


@pytest.mark.parametrize(
    ("prediction", "norm", "ratios", "expected"),
    [
        (FAST, STANDS, (1.0, 1.0), "as expected now (1.0x); settled"),
        (FAST, lambda i: 2.0 + 0.001 * (-1) ** i, (0.8, 0.8), "as expected now (0.80x); settled"),
        (
            FAST,
            STANDS,
            (1.6, 1.0),
            "as expected now (1.0x); 1.6x of where it will settle: its norm still grows (18 steps "
            "to go)",
        ),
        # The schedule is no excuse: what it has led to so far is what is expected.
        (FAST, STANDS, (1.0, 0.4), "turns too slow: 0.40x what is expected"),
        (FAST, STANDS, (1.0, 1.6), "turns too fast: 1.6x what is expected"),
        (
            Prediction(0.01, 200.0, 4, 1e-4),
            STANDS,
            (0.5, 1.0),
            "as expected now (1.0x); decay has not acted yet: 0.5 of a relaxation time in this run",
        ),
        (SLOW, STANDS, (0.9, None), "settled"),
        (FAST, STANDS, (0.0, 0.0), "frozen: neither gradient nor decay moves it"),
        (FAST, lambda i: 2.0 * 0.99**i, (0.0, 0.0), "no gradient: only decay acts"),
        (None, STANDS, (None, None), "no prediction"),
        (None, STANDS, (0.0, None), "frozen: neither gradient nor decay moves it"),
        (
            HELD,
            STANDS,
            (0.7, 1.0),
            "as expected now (1.0x); its length is held by WeightRescaling",
        ),
    ],
)
def test_verdicts(
    prediction: Prediction | None, norm: Any, ratios: tuple[Any, Any], expected: str
) -> None:
    """``ratios``: of the angle to the prediction, and to what is expected now."""
    of_prediction, of_expected = ratios
    angle = 0.01 * (1.0 if of_prediction is None else of_prediction)
    history = curves(
        norm,
        lambda i: angle,
        None if prediction is None else lambda i: 0.01,
        None if of_expected is None else lambda i: angle / (of_expected or 1.0) or 0.01,
    )
    assert judge(history, "w", course(prediction)).words == expected


def test_a_rough_expectation_is_called_so() -> None:
    history = curves(STANDS, lambda i: 0.015, None, lambda i: 0.01)
    assert judge(history, "w", Course(), Grounds(rough=True)).words == (
        "as expected now (1.5x, a rough expectation)"
    )
    assert judge(history, "w", Course()).kind == "too fast"


def test_without_an_expectation_its_own_balance_tells() -> None:
    history = curves(STANDS, lambda i: 0.01)
    balanced = Balanced(1.4, 0.0, 500.0, 3.0)
    assert judge(history, "w", Course(), Grounds(balanced=balanced)).words == (
        "still growing, 1.4x its balance, 794 steps to go"
    )


@pytest.mark.parametrize("alone", [True, False])
def test_a_norm_that_is_still_that_of_before_a_drop(alone: bool) -> None:
    """The prediction falls by √10 at step 60, and the norm has not moved since."""
    dropped = Course()
    for step in range(1, 101):
        relaxation = 20.0 if step <= 60 else 200.0
        dropped = predicted(
            dropped, step, Prediction(0.01, relaxation, 4, 1e-3 if step <= 60 else 1e-4)
        )
    falling = lambda i: 0.01 if i < 60 else 0.01 / sqrt(10)  # noqa: E731
    slower = lambda i: 0.01 if i < 60 else 0.001  # noqa: E731
    history = curves(STANDS, slower, falling, slower)
    said = judge(history, "w", dropped, Grounds(optimizer_alone=alone)).words
    remedy = ", LRDropRescaling removes that" if alone else ""
    assert said == (
        "as expected now (1.0x); 0.32x of where it will settle: norms are still those of before "
        f"the drop (900 steps to go){remedy}"
    )


def test_a_schedule_that_glides_is_no_drop() -> None:
    gliding = Course()
    for step in range(1, 101):
        gliding = predicted(gliding, step, Prediction(0.01 * 0.9**step, 20.0, 4, 1e-4 * 0.81**step))
    history = curves(
        STANDS, lambda i: 0.005 * 0.9**i, lambda i: 0.01 * 0.9**i, lambda i: 0.005 * 0.9**i
    )
    assert judge(history, "w", gliding).words == (
        "as expected now (1.0x); 0.50x of where it will settle: its norm still shrinks (68 steps "
        "to go)"
    )


def measured(
    rows: int = 40, growth: float = 0.0, pull: float = 1e-3, angle: float = 1e-2
) -> Balance:
    """Rows at every tenth step, of a matrix whose norm grows by e^growth in each of them."""
    balance = Balance()
    for i in range(rows):
        squared = exp(2 * growth * i)
        # A step at a right angle to the weight.
        sums = sums_of(squared, squared, 0.0, squared * tan(angle) ** 2)
        number = 1 + 10 * i
        strength = Strength(pull / 0.1)
        between = [Taken(number - 9, number, strength, 0.1)]
        balance = after(balance, number, sums, 0.1, strength, between if i else [])
    return balance


def test_the_measured_balance_of_a_weight() -> None:
    still = balance_of(measured(), 10**6, 2.0, None)
    assert still is not None
    assert still.ratio == pytest.approx(1, abs=1e-3)
    assert math.isnan(still.loss_share)
    assert still.relaxation == pytest.approx(500)
    # Two times ΣP of all steps.
    assert still.elapsed == pytest.approx(2 * 390 * 1e-3, rel=0.05)
    grows = balance_of(measured(growth=0.01), 10**6, 2.0, None)
    assert grows is not None
    # It grows by 1e-3 a step, as much as decay takes: the root of 2.
    assert grows.ratio == pytest.approx(sqrt(2), rel=0.01)


@pytest.mark.parametrize(
    ("noise", "share"),
    # κ is 2P/θ² = 20 where the norm stands: noise alone would grow it by κ0/κ as much.
    [(20.0, 0.0), (100.0, 4.0), (5.0, -0.75)],
)
def test_what_the_loss_does_to_a_norm(noise: float, share: float) -> None:
    balanced = balance_of(measured(), 10**6, 2.0, noise)
    assert balanced is not None
    assert balanced.loss_share == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("balance", "entries", "in_16_bits", "why"),
    [
        (measured(3), 10**6, False, "too few rows"),
        (measured(), 10, False, "it has turned too little to tell"),
        (measured(pull=0.0), 10**6, False, "no decay acts on it"),
        (measured(pull=math.nan), 10**6, False, "nobody knows its decay"),
        (measured(), 10**6, True, "weights of 16 bits are rounded by more than decay does"),
    ],
)
def test_why_a_weight_has_no_balance(
    balance: Balance, entries: int, in_16_bits: bool, why: str
) -> None:
    balanced = balance_of(balance, entries, 2.0, 19.0, in_16_bits=in_16_bits)
    assert balanced is not None
    assert balanced.missing == why
    assert balance_of(Balance(), entries, 2.0, 19.0) is None
    assert balance_of(None, entries, 2.0, 19.0) is None


def verdicts_of_a_wandering_norm(trend: float) -> list[bool]:
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
            seen = predicted(seen, 10 * i + 1, Prediction(0.01, relaxation, 4, 1e-4))
            if i >= 35:
                said.append(norm_has_settled(history, "w", seen))
    return said


@pytest.mark.parametrize(
    ("trend", "expected"),
    [(0.0, True), (0.05, True), (-0.25, False), (0.25, False)],
)
def test_verdicts_do_not_flicker(trend: float, expected: bool) -> None:
    said = verdicts_of_a_wandering_norm(trend)
    assert said.count(expected) > 0.97 * len(said)


def test_a_norm_that_falls_after_a_burst_is_not_settled() -> None:
    """Over the last two relaxation times it falls as fast as the decay allows, over the last four
    it has grown."""
    relaxation = 50.0
    norm = lambda i: (1.0 if i < 330 else 4.0) * exp(-max(i - 330, 0) / relaxation / 4)  # noqa: E731
    history = curves(norm, lambda i: 0.002, lambda i: 0.01, rows=480)
    assert not norm_has_settled(history, "w", course(Prediction(0.01, relaxation, 4, 1e-4), 480))


def test_what_was_before_a_drop_of_the_rate_does_not_count() -> None:
    """A norm that fell until the drop and is still from there on: settled soon after, although four
    relaxation times look back further."""
    seen, history = Course(), History()
    for i in range(100):
        prediction = Prediction(0.01, 10.0, 4, 1e-3 if i < 87 else 1e-4)
        seen = predicted(seen, i + 1, prediction)
        norm = 0.97 ** min(i, 87)
        history.append(
            i,
            {"weight_norm/w": norm, "angular_update/w": 0.01, "equilibrium_angular_update/w": 0.01},
            optimizer_step=i + 1,
        )
    assert seen.steady_since() == 88
    assert norm_has_settled(history, "w", seen)


def test_too_few_rows() -> None:
    assert judge(History(), "w", Course()).words == "too few rows"
    short = curves(lambda i: 1.0, lambda i: 0.01, lambda i: 0.01, rows=2)
    assert judge(short, "w", course(FAST, 2)).words == "too few rows"


@pytest.mark.slow
def test_e_foldings_add_up_over_a_schedule() -> None:
    seen = Course()
    for step in range(10, 101, 10):
        seen = predicted(seen, step, Prediction(0.01, 10.0 if step <= 50 else 100.0, 4, 1.0))
    assert seen.elapsed == pytest.approx(5 + 0.5)
    for step in range(1, 5000):
        seen = predicted(seen, 100 + step, Prediction(0.01, 10.0, 4, 1.0 + step % 7))
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
    assert "weight turns as expected." in table or layer["finding"] != "as expected"
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
    assert re.fullmatch(r"as expected now \((1\.0|0\.9\d)x\); settled", layer["verdict"])
    assert layer["finding"] == "as expected"
    assert layer["ratio"] == pytest.approx(1, abs=0.05)
    assert layer["e-foldings"] == pytest.approx(360 / 50)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("norm", "kind", "expected"), [(1.5, "too slow", 0.44), (0.7, "too fast", 2.04)]
)
def test_runs_that_somebody_else_holds(norm: float, kind: str, expected: float) -> None:
    """A norm that another rule, of which nothing is known here, sets after every step: nothing of
    what noise and decay would lead to."""
    layer = verdict_of(white(330), norm=norm, holds=True)
    assert layer["finding"] == kind
    assert layer["ratio"] == pytest.approx(expected, rel=0.1)


def test_a_run_on_its_way() -> None:
    layer = verdict_of(white(60), norm=2.0)
    said = re.fullmatch(
        r"as expected now \(.*x\); (0\.\d+)x of where it will settle: its norm still shrinks "
        r"\(([\d,]+) steps to go\)",
        layer["verdict"],
    )
    assert said is not None, layer["verdict"]
    # ‖w‖^4 is 16 times its equilibrium at the start, and within a tenth of it at the end.
    assert int(said[2]) == pytest.approx(50 * log(15 / 0.1) - 60, rel=0.1)


def test_a_run_under_a_cosine() -> None:
    layer = verdict_of(
        white(200), scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200)
    )
    assert layer["finding"] == "as expected"
    assert layer["ratio"] == pytest.approx(1, abs=0.05)


def test_a_run_that_ends_at_an_lr_of_zero_is_judged_by_what_went_before() -> None:
    layer = verdict_of(white(360), scheduler=by_rates([LR] * 355 + [0.0]))
    assert layer["finding"] == "as expected"
    assert layer["e-foldings"] == pytest.approx(355 / 50)


def test_a_run_that_does_not_turn() -> None:
    silent = lambda shape: [torch.zeros(shape, dtype=torch.float64)] * 40  # noqa: E731
    assert verdict_of(silent)["verdict"] == "no gradient: only decay acts"
    still = verdict_of(silent, make_optimizer=lambda p: SGD(p, lr=0.1))
    assert still["verdict"] == "frozen: neither gradient nor decay moves it"


def test_a_run_without_a_prediction() -> None:
    layer = verdict_of(white(40), make_optimizer=lambda p: torch.optim.Adadelta(p, lr=0.01))
    assert layer["finding"] in ("too early", "unknown")
    assert layer["prediction"] is None


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
