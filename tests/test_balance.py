"""Expected norms and measured balances in real fits: noise on weights whose norms are known in
closed form, under each callback and in the corners of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import lr_scheduler
from walk import Walk, batches, noise, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.monitor.quantities import monitored

SHAPE, STEPS, EVERY = (96, 32), 161, 10
PULLED = {"coherence", "balanced_angular_update", "balance_ratio", "loss_decay"}
EVERYTHING = [quantity.name for quantity in monitored()]


def adamw(parameters: Any, **options: Any) -> Any:
    given = {"lr": 2e-2, "betas": (0.9, 0.99), "weight_decay": 0.5, **options}
    return torch.optim.AdamW(parameters, **given)


def sgd(parameters: Any, **options: Any) -> Any:
    given = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3, **options}
    return torch.optim.SGD(parameters, **given)


def slow(parameters: Any) -> Any:
    """Whoever rescales buffers after every few steps must not grow much within them."""
    return sgd(parameters, lr=0.015)


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 200)


def dropping(optimizer: Any) -> Any:
    return lr_scheduler.MultiStepLR(optimizer, [55, 115], 0.2)


def fit(
    module: L.LightningModule,
    callbacks: Sequence[Any],
    *,
    steps: int = STEPS,
    every: int = EVERY,
    dtype: torch.dtype = torch.float64,
    per_vector: bool = False,
    max_epochs: int = 1,
    **arguments: Any,
) -> NormDynamicsMonitor:
    """The monitor of a fit."""
    monitor = NormDynamicsMonitor(every, quantities=EVERYTHING, per_vector=per_vector, tables=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, monitor],
        **arguments,
    )
    trainer.fit(module, batches(noise(steps, SHAPE, dtype=dtype)))
    return monitor


def rows_of(*given: Any, **arguments: Any) -> list[dict[str, float]]:
    """The rows of a `fit`."""
    return list(fit(*given, **arguments).history)


def walk(make_optimizer: Any = adamw, scheduler: Any = cosine, norm: float = 2.0) -> Walk:
    return Walk(start(SHAPE, norm), make_optimizer, scheduler)


def column(rows: Sequence[dict[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def names(row: dict[str, float], weight: str = "weight") -> set[str]:
    return {key.split("/")[0] for key in row if key.endswith(f"/{weight}")}


def as_expected(
    rows: Sequence[dict[str, float]],
    weight: str = "weight",
    *,
    least: int = 12,
    within: float = 0.06,
) -> None:
    """Angle and norm of a weight are where they should be, in so many rows."""
    ratios = np.array(column(rows, f"expected_ratio/{weight}"))
    assert len(ratios) >= least
    assert np.abs(ratios - 1).max() < within, ratios
    norms = []
    for row in rows:
        if f"expected_weight_norm/{weight}" in row:
            expected = row[f"expected_weight_norm/{weight}"]
            norms.append(row[f"weight_norm/{weight}"] / expected)
    assert np.abs(np.array(norms) - 1).max() < 0.03, norms


CALLBACKS: dict[str, tuple[Callable[[], list[Any]], Any, Any]] = {
    "nothing": (lambda: [], adamw, cosine),
    "WRS": (lambda: [WeightRescaling(15, target_norm=1.5)], adamw, cosine),
    "WRS to initial norms": (lambda: [WeightRescaling(7, target_norm="initial")], slow, cosine),
    "LR drop, AdamW": (lambda: [LRDropRescaling()], adamw, dropping),
    "LR drop, SGD": (lambda: [LRDropRescaling()], sgd, dropping),
    "AWS": (lambda: [AdaptiveWeightShrink(0.2)], adamw, cosine),
    "AWS, SGD": (lambda: [AdaptiveWeightShrink(0.01)], sgd, cosine),
    "projection": (lambda: [RadialProjection()], adamw, cosine),
    "fixed norms": (
        lambda: [WeightRescaling(1, target_norm="initial"), RadialProjection()],
        slow,
        cosine,
    ),
    "AWS and LR drop": (
        lambda: [AdaptiveWeightShrink(0.2), LRDropRescaling()],
        adamw,
        dropping,
    ),
}


# The rest is a variation of these.
QUICK = ("nothing", "WRS", "LR drop, SGD", "AWS", "projection", "fixed norms")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CALLBACKS]


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_as_expected_under_every_callback(name: str) -> None:
    callbacks, make_optimizer, scheduler = CALLBACKS[name]
    module = walk(make_optimizer, scheduler)
    before = module.weight.detach().norm().item()
    rows = rows_of(module, callbacks())
    as_expected(rows)
    moved = abs(module.weight.detach().norm().item() / before - 1)
    assert moved > 0.05 or "initial" in name or "fixed" in name, "else a fixed norm would pass, too"


def test_a_callback_that_acts_from_some_epoch_on_begins_a_course_of_its_own() -> None:
    """Between two rows, so that neither of them knows in which step."""
    rescaling = WeightRescaling(6, target_norm=1.5, start_epoch=1, stop_epoch=2)
    rows = rows_of(walk(), [rescaling], steps=130, every=25, max_epochs=3)
    as_expected(rows, least=6)
    # Both begin in silence, since nobody knows what the buffers held.
    for begins in (130, 260):
        silent = [row for row in rows if begins <= row["step"] < begins + 100]
        assert not column(silent, "expected_ratio/weight")
    assert column([row for row in rows if row["step"] > 380], "expected_ratio/weight")


def test_a_run_that_turns_too_fast_is_not_as_expected() -> None:
    class Pushed(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 50:
                module.weight.data.mul_(0.5)

    rows = rows_of(walk(), [Pushed()])
    late = [row["expected_ratio/weight"] for row in rows if row["step"] > 60]
    assert max(late) > 1.5


def test_a_replay_has_no_course(tmp_path: Any) -> None:
    decaying = walk(lambda p: sgd(p, momentum=0.0), None)
    recorded = fit(decaying, [], steps=20, every=1, per_vector=True)
    recorded.history.save(tmp_path / "run.npz")
    following = walk(lambda p: sgd(p, momentum=0.0, weight_decay=0.0), None)
    rows = rows_of(following, [EffectiveLRReplay(tmp_path / "run.npz")], steps=20, every=1)
    for row in rows:
        assert not [name for name in names(row) if name.startswith("expected")]
        assert "matrix_angle" in names(row)
        assert not PULLED & names(row)


# ---- Decay and the loss ----


def test_without_decay_there_is_a_coherence_and_no_balance() -> None:
    rows = rows_of(walk(lambda p: adamw(p, weight_decay=0.0)), [])
    as_expected(rows)
    assert column(rows, "coherence/weight")
    for row in rows:
        assert not {"balanced_angular_update", "balance_ratio"} & names(row)
        assert all(np.isfinite(value) for value in row.values())


def test_noise_has_the_coherence_of_its_momentum() -> None:
    rows = rows_of(walk(sgd, None), [], steps=301)
    assert np.median(column(rows[15:], "coherence/weight")) == pytest.approx(19, rel=0.05)


class Held(Walk):
    """A loss that pulls the weight inwards much more than turning grows it."""

    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return super().training_step(noise) * 1e-3 + self.weight.square().sum() * 0.05


def test_a_loss_that_holds_the_norm_has_a_coherence_below_0_and_no_balance() -> None:
    rows = rows_of(Held(start(SHAPE, 2.0), lambda p: sgd(p, momentum=0.0), None), [], steps=81)
    found = column(rows, "coherence/weight")
    assert found
    assert max(found) < 0
    for row in rows:
        assert not {"balanced_angular_update", "balance_ratio"} & names(row)
    # As a decay: the gradient of .05 w² is .1 w.
    assert column(rows, "loss_decay/weight")[-1] == pytest.approx(0.1, rel=0.05)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_run_that_diverges_beyond_all_numbers_goes_on() -> None:
    class Diverges(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            module.weight.data.mul_(1e30)

    for callbacks in ([], [WeightRescaling(7, target_norm="initial")]):
        rows = rows_of(walk(sgd), [*callbacks, Diverges()], steps=15, every=1)
        assert len(rows) == 15


class Linear(Walk):
    """A loss that sees the length, so that a weight of zeros has a gradient."""

    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        return (noise * self.weight).sum()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_a_matrix_of_zeros_is_measured_from_where_it_has_a_length(make_optimizer: Any) -> None:
    rows = rows_of(Linear(torch.zeros(SHAPE, dtype=torch.float64), make_optimizer), [])
    assert not {*PULLED, "matrix_angle", "norm_drift"} & names(rows[0])
    assert {"matrix_angle", "coherence", "balance_ratio"} <= names(rows[-1])
    assert all(np.isfinite(column(rows, "matrix_angle/weight")))


def test_of_16_bits_there_is_no_value_that_needs_a_pull() -> None:
    module = Walk(start(SHAPE, 2.0, torch.bfloat16), adamw, cosine)
    rows = rows_of(module, [], dtype=torch.bfloat16)
    assert {"matrix_angle", "norm_drift", "angular_update"} <= names(rows[-1])
    for row in rows:
        assert not PULLED & names(row)
        assert not [name for name in names(row) if name.startswith("expected")]


# ---- Weights that come and go ----


class Two(L.LightningModule):
    """Two walks side by side.

    Args:
        rests: batches in which the second has no part in the loss.
    """

    def __init__(self, make_optimizer: Any = adamw, rests: range = range(0)) -> None:
        super().__init__()
        self.one = nn.Parameter(start(SHAPE, 2.0))
        self.two = nn.Parameter(start(SHAPE, 3.0))
        self.make_optimizer, self.rests = make_optimizer, rests

    def loss(self, noise: Tensor, weight: Tensor) -> Tensor:
        return (noise * weight / weight.norm(dim=1, keepdim=True)).sum()

    def training_step(self, noise: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(noise, self.one)
        if batch_idx not in self.rests:
            loss = loss + self.loss(noise.flip(0), self.two)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": cosine(optimizer), "interval": "step"}]


def test_a_weight_that_rests_begins_anew_once_its_buffers_are_its_own() -> None:
    rests = range(33, 57)
    rows = rows_of(Two(rests=rests), [], steps=241)
    as_expected(rows, "one", least=20)
    # It is silent from the row in its rest on, until 100 steps after the first row that follows.
    quiet = [row for row in rows if 33 <= row["step"] < 155]
    assert not column(quiet, "expected_ratio/two")
    assert not column([r for r in rows if r["step"] in rests], "matrix_angle/two")
    as_expected(rows, "two", least=8)


def test_a_weight_that_rests_from_the_start_begins_with_its_first_step() -> None:
    rows = rows_of(Two(rests=range(34)), [], steps=241)
    early = [row for row in rows if row["step"] < 135]
    # It was stepped before the first row that has it, so its buffers are not those of a start.
    assert not column(early, "expected_ratio/two")
    as_expected(rows, "two", least=8)


class Joins(Two):
    """The second weight joins the optimizer in the middle of the fit, as a group of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 44:
            self.optimizers().optimizer.add_param_group({"params": [self.two], "lr": 1e-2})

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([self.one])


def test_a_group_that_joins_later_is_followed() -> None:
    rows = rows_of(Joins(), [], steps=241)
    as_expected(rows, "one", least=20)
    as_expected(rows, "two", least=5)
    assert not column(rows[:5], "matrix_angle/two")


class TakesTurns(Two):
    """Two optimizers, the second of which steps in every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, noise: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        pairs = zip(self.optimizers(), ((noise, self.one), (noise.flip(0), self.two)), strict=True)
        for number, (optimizer, (own, weight)) in enumerate(pairs):
            if number and batch_idx % 3:
                continue
            optimizer.zero_grad()
            self.manual_backward(self.loss(own, weight))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [adamw([self.one]), slow([self.two])]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("callbacks", [[], [WeightRescaling(4, target_norm=2.5)]])
def test_optimizers_that_take_turns_have_their_own_steps(callbacks: list[Any]) -> None:
    rows = rows_of(TakesTurns(), callbacks)
    for weight in ("one", "two"):
        as_expected(rows, weight)
    if callbacks:
        # A length that is set between any two rows leaves no span to measure.
        assert not column(rows, "coherence/two")


# ---- Steps that are not what they seem ----


def test_learning_rates_in_tensors_are_read() -> None:
    expected = rows_of(walk(adamw, None), [])
    rows = rows_of(walk(lambda p: adamw(p, lr=torch.tensor(2e-2, dtype=torch.float64)), None), [])
    as_expected(rows)
    for key in ("expected_ratio/weight", "balance_ratio/weight"):
        assert column(rows, key) == pytest.approx(column(expected, key), rel=1e-5)


def test_accumulated_gradients_are_one_step() -> None:
    rows = rows_of(walk(sgd, None), [], accumulate_grad_batches=2, every=5)
    as_expected(rows)
    assert rows[-1]["optimizer_step"] <= STEPS // 2 + 1


class Overflows(Walk):
    """In some batches the loss is infinite, so the scaler skips the step."""

    def training_step(self, noise: Tensor, batch_idx: int = 0) -> Tensor:
        overflows = batch_idx in (0, 10, 11, 45, 70)
        return super().training_step(noise) * (float("inf") if overflows else 1.0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_none(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    module = Overflows(
        start(SHAPE, 2.0, torch.float32), lambda p: adamw(p, fused=fused), lambda o: cosine(o)
    )
    rows = rows_of(
        module,
        [],
        dtype=torch.float32,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    as_expected(rows)
    assert rows[-1]["normdyn/skipped_steps"] == 5
    assert rows[-1]["optimizer_step"] == STEPS - 5
