"""Rescaling at a learning rate drop: where it lands, what follows the weights, when nothing
happens, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import Net, SavesAt, convnet, fit, loader, make, same, weights_of
from torch import Tensor, nn
from torch.optim import lr_scheduler
from walk import SETTINGS, Angles, Setting, Walk, batches, by_rates, noise, settled

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    WeightRescaling,
)
from lightning_normdyn.callbacks import lr_drop_rescaling
from lightning_normdyn.engine.rescaling import Rescaler
from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.scaling import Scaling
from lightning_normdyn.optimizers.step import Phase

# Lightning has advice about one-cycle schedules by epoch, torch about schedules and skipped steps.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*OneCycleLR.*", "ignore:.*lr_scheduler.step.*:UserWarning"
)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
SHAPE = (3, 5)


# ---- Where it lands ----


def angles_across_a_drop(setting: Setting, k: float, exponent: Any) -> tuple[float, list[float]]:
    """RMS angles over the predicted ones: of the last step before the drop, and of the first ones
    after it."""
    weight, optimizer = settled(setting)
    lr, steps = setting.hyper["lr"], 3
    angles, module = Angles(), Walk(weight, optimizer, by_rates([lr] * steps + [lr / k]))
    fit(
        module,
        [angles, LRDropRescaling(exponent=exponent), *setting.callbacks()],
        batches(noise(steps + 3, weight.shape)),
        max_epochs=1,
    )
    old, new = (setting.equilibrium(weight.shape[1], rate)[0] for rate in (lr, lr / k))
    return angles.seen[steps - 1] / old, [angle / new for angle in angles.seen[steps:]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_first_angle_after_the_drop_is_that_of_the_new_equilibrium(setting: Setting) -> None:
    k = 8.0
    for exponent, right in (("auto", True), (0.0, False), (0.25, setting.exponent == 0.25)):
        before, after = angles_across_a_drop(setting, k, exponent)
        assert before == pytest.approx(1, abs=0.03)
        if right:
            assert after == pytest.approx([1, 1, 1], abs=0.03)
        else:
            # AU goes as lr / ‖w‖², or lr / ‖w‖ where the size of the gradient cancels.
            missing = (float(exponent) - setting.exponent) * (1 if setting.adaptive else 2)
            assert after == pytest.approx([k**missing] * 3, rel=0.03)
            assert abs(after[0] - 1) > 0.1


def test_gradients_and_buffers_left_alone_would_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, momentum = SETTINGS[0], SETTINGS[1]
    with monkeypatch.context() as patch:
        scaling = Rescaler.scaling
        patch.setattr(
            Rescaler, "scaling", lambda self, factor, *, gradients=False: scaling(self, factor)
        )
        assert angles_across_a_drop(plain, 10.0, "auto")[1][0] == pytest.approx(0.56, abs=0.02)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_normdyn.engine.rescaling.state_exponents", lambda optimizer: {})
        assert angles_across_a_drop(momentum, 10.0, "auto")[1][0] == pytest.approx(0.67, abs=0.05)


# ---- Exactly: the same run with every filter divided by k^e at the drop, by hand ----


def by_hand(
    weight: Tensor,
    noises: Sequence[Tensor],
    rates: Sequence[float],
    make_optimizer: Any,
    exponent: float,
    accumulate: int = 1,
) -> Tensor:
    """Plain torch: a drop divides weight and buffers before the gradient is taken, so the gradient
    needs no correction at all."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer, powers = (
        make_optimizer([weight]),
        {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2},
    )
    last = rates[0]
    for step, lr in enumerate(rates):
        k = last / lr
        if k >= 1.5:
            with torch.no_grad():
                weight /= k**exponent
                for key, power in powers.items():
                    if optimizer.state[weight].get(key) is not None:
                        optimizer.state[weight][key] *= k ** (exponent * power)
        last = lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        for given in noises[step * accumulate : (step + 1) * accumulate]:
            ((given * weight / weight.norm(dim=1, keepdim=True)).sum() / accumulate).backward()
        optimizer.step()
    return weight.detach()


def start(seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


RATES = [0.1, 0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.004]
OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "SGD": (lambda p: SGD(p, lr=0.1, weight_decay=0.05), 1 / 4),
    "SGDM": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05), 1 / 4),
    "Nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05), 1 / 4),
    "AdamW": (lambda p: ADAMW(p, lr=0.1, weight_decay=0.5, eps=0), 1 / 2),
    "Adam": (lambda p: ADAM(p, lr=0.1, weight_decay=0.05, eps=0), 1 / 3),
    "fused SGDM": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, fused=True), 1 / 4),
    "fused AdamW": (lambda p: ADAMW(p, lr=0.1, weight_decay=0.5, eps=0, fused=True), 1 / 2),
    "foreach AdamW": (lambda p: ADAMW(p, lr=0.1, weight_decay=0.5, eps=0, foreach=True), 1 / 2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_same_run_at_another_length(optimizer: str) -> None:
    make_optimizer, exponent = OPTIMIZERS[optimizer]
    noises = noise(len(RATES), SHAPE)
    module = Walk(start(), make_optimizer, by_rates(RATES))
    fit(module, [LRDropRescaling()], batches(noises), max_epochs=1)
    expected = by_hand(start(), noises, RATES, make_optimizer, exponent)
    assert torch.allclose(module.weight, expected, rtol=1e-12)
    assert not torch.allclose(
        module.weight, by_hand(start(), noises, RATES, make_optimizer, 0.0), rtol=1e-2
    )


def test_accumulated_gradients_follow() -> None:
    make_optimizer, exponent = OPTIMIZERS["SGDM"]
    noises = noise(3 * len(RATES), SHAPE)
    module = Walk(start(), make_optimizer, by_rates(RATES))
    fit(module, [LRDropRescaling()], batches(noises), max_epochs=1, accumulate_grad_batches=3)
    assert torch.allclose(
        module.weight,
        by_hand(start(), noises, RATES, make_optimizer, exponent, accumulate=3),
        rtol=1e-12,
    )


def test_a_learning_rate_in_a_tensor() -> None:
    def make_optimizer(p: Any) -> Any:
        return ADAMW(
            p, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.5, eps=0, foreach=False
        )

    noises = noise(len(RATES), SHAPE)
    module = Walk(start(), make_optimizer, by_rates(RATES))
    fit(module, [LRDropRescaling()], batches(noises), max_epochs=1)
    expected = by_hand(start(), noises, RATES, OPTIMIZERS["AdamW"][0], 1 / 2)
    assert torch.allclose(module.weight, expected, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["SGDM", "AdamW", "fused SGDM", "fused AdamW"])
def test_a_drop_that_a_scaler_skips_comes_with_the_next_step(optimizer: str) -> None:
    make_optimizer, exponent = OPTIMIZERS[optimizer]
    noises = noise(10, SHAPE, dtype=torch.float32)
    # Both steps at which the rate falls, one more in a row with the second of them, and the first
    # step. (There torch's fused SGD itself goes wrong: it leaves its momentum buffer
    # uninitialized.)
    rates, bad = (
        [0.1, 0.1, 0.1, 0.02, 0.02, 0.02, 0.004, 0.002, 0.002, 0.002],
        [3, 6, 7] + [0] * (optimizer != "fused SGDM"),
    )
    for i in bad:
        noises[i][1, 2] = float("inf")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    callback, monitor = LRDropRescaling(), NormDynamicsMonitor(1, tables=False)
    module = Walk(start(dtype=torch.float32), make_optimizer, by_rates(rates))
    fit(
        module,
        [callback, monitor],
        batches(noises),
        max_epochs=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    real = [i for i in range(10) if i not in bad]
    expected = by_hand(
        start(dtype=torch.float32),
        [noises[i] for i in real],
        [rates[i] for i in real],
        OPTIMIZERS[optimizer.split()[-1]][0],
        exponent,
    )
    assert torch.allclose(module.weight, expected, rtol=1e-4)
    assert callback.steps_of(0) == len(real)
    assert [event.kind for event in monitor.history.events] == ["lr_drop", "lr_drop"]


def test_a_weight_without_a_gradient_is_rescaled_when_it_steps_again() -> None:
    class Idle(Walk):
        """Leaves its second weight out of the batches in ``idle``."""

        idle = (3, 4)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.other = nn.Parameter(start(4))

        def training_step(self, noise: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(noise)
            if batch_idx not in self.idle:
                loss = loss + (noise * self.other / self.other.norm(dim=1, keepdim=True)).sum()
            return loss

    make_optimizer, exponent = OPTIMIZERS["SGDM"]
    noises = noise(len(RATES), SHAPE)
    module = Idle(start(), make_optimizer, by_rates(RATES))
    fit(module, [LRDropRescaling()], batches(noises), max_epochs=1)
    assert torch.allclose(
        module.weight, by_hand(start(), noises, RATES, make_optimizer, exponent), rtol=1e-12
    )
    awake = [i for i in range(len(RATES)) if i not in Idle.idle]
    expected = by_hand(
        start(4), [noises[i] for i in awake], [RATES[i] for i in awake], make_optimizer, exponent
    )
    assert torch.allclose(module.other, expected, rtol=1e-12)


# ---- Groups, optimizers, exponents of their own ----


class Two(Walk):
    """Two weights; who owns which is the test's business."""

    def __init__(self, make_optimizers: Any, automatic: bool = True) -> None:
        super().__init__(start(), make_optimizers)
        self.other = nn.Parameter(start(4))
        self.automatic_optimization = automatic

    def loss_of(self, weight: Tensor, noise: Tensor) -> Tensor:
        return (noise * weight / weight.norm(dim=1, keepdim=True)).sum()

    def training_step(self, noise: Tensor, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss_of(self.weight, noise) + self.loss_of(self.other, noise)
        optimizers = self.optimizers()
        for optimizer, weight in zip(optimizers, (self.weight, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(weight, noise))
            optimizer.step()
        if batch_idx == 2:
            for group in optimizers[0].param_groups:
                group["lr"] /= 10
        return None

    def configure_optimizers(self) -> Any:
        return self._optimizer[0](self.weight, self.other)


def test_param_groups_drop_on_their_own() -> None:
    class DropsSecond(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.optimizers[0].param_groups[1]["lr"] /= 10

    def make_optimizers(weight: Any, other: Any) -> Any:
        return SGD([{"params": [weight]}, {"params": [other]}], lr=0.1, weight_decay=0.05)

    noises, module = noise(6, SHAPE), Two(make_optimizers)
    fit(module, [DropsSecond(), LRDropRescaling()], batches(noises), max_epochs=1)
    first = by_hand(start(), noises, [0.1] * 6, OPTIMIZERS["SGD"][0], 0.25)
    second = by_hand(start(4), noises, [0.1] * 3 + [0.01] * 3, OPTIMIZERS["SGD"][0], 0.25)
    assert torch.allclose(module.weight, first, rtol=1e-12)
    assert torch.allclose(module.other, second, rtol=1e-12)


def test_optimizers_drop_on_their_own() -> None:
    def make_optimizers(weight: Any, other: Any) -> Any:
        return [OPTIMIZERS["AdamW"][0]([weight]), OPTIMIZERS["SGD"][0]([other])]

    noises, module = noise(6, SHAPE), Two(make_optimizers, automatic=False)
    fit(module, [LRDropRescaling()], batches(noises), max_epochs=1)
    first = by_hand(start(), noises, [0.1] * 3 + [0.01] * 3, OPTIMIZERS["AdamW"][0], 0.5)
    second = by_hand(start(4), noises, [0.1] * 6, OPTIMIZERS["SGD"][0], 0.25)
    assert torch.allclose(module.weight, first, rtol=1e-12)
    assert torch.allclose(module.other, second, rtol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_weights_of_one_group_have_their_own_exponents(first: bool) -> None:
    def make_optimizers(weight: Any, other: Any) -> Any:
        return SGD([weight, other], lr=0.1, weight_decay=0.05)

    class Drops(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            norms.append([w.norm().item() for w in (pl_module.weight, pl_module.other)])
            trainer.optimizers[0].param_groups[0]["lr"] = 1e-9

    norms: list[list[float]] = []
    callbacks = [LRDropRescaling(), AdaptiveWeightShrink(0.01, params="other")]
    fit(
        Two(make_optimizers),
        [Drops(), *callbacks[:: 1 if first else -1]],
        batches(noise(2, SHAPE)),
        max_epochs=1,
    )
    # With so small a rate the step itself does nothing.
    k = 0.1 / 1e-9
    assert [a / b for a, b in zip(*norms, strict=True)] == pytest.approx(
        [k ** (1 / 4), k ** (1 / 5)], rel=1e-5
    )


# ---- When nothing happens ----


STEPS = 24
SMOOTH: dict[str, Any] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "cosine to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "cosine to 0 and back": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS // 2),
    "short cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "linear to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 6),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 6)),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 1e-3, 1.0, 6), lr_scheduler.CosineAnnealingLR(o, STEPS - 6)],
        [6],
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
    "warm restarts, ever longer": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "triangles": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 5),
    "off and on again": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.0 if 5 <= t < 9 else 1.0),
    "off, and low after": lambda o: lr_scheduler.LambdaLR(
        o, lambda t: 0.0 if t == 5 else 1.0 if t < 5 else 0.1
    ),
    "small steps": lambda o: lr_scheduler.StepLR(o, 5, 0.7),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("schedule", SMOOTH)
def test_smooth_schedules_do_nothing(
    schedule: str, interval: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[Any] = []
    monkeypatch.setattr(Scaling, "apply", lambda self: applied.append(self.factor))
    module = Walk(start(), OPTIMIZERS["SGDM"][0], SMOOTH[schedule], interval)
    per_epoch = STEPS if interval == "step" else 2
    epochs = 1 if interval == "step" else STEPS
    runner = fit(module, [LRDropRescaling()], batches(noise(per_epoch, SHAPE)), max_epochs=epochs)
    assert runner.global_step == per_epoch * epochs
    assert applied == []


def test_without_a_drop_no_bit_changes() -> None:
    final = []
    for callbacks in ([], [LRDropRescaling()]):
        module = Walk(start(), OPTIMIZERS["SGDM"][0], SMOOTH["cosine to 0"])
        fit(module, callbacks, batches(noise(STEPS, SHAPE)), max_epochs=1)
        final.append(module.weight)
    assert torch.equal(*final)


def test_a_second_fit_knows_nothing_of_the_first() -> None:
    callback = LRDropRescaling()
    for lr in (0.1, 0.01):
        module = Walk(start(), OPTIMIZERS["SGD"][0], by_rates([lr] * 4))
        fit(module, [callback], batches(noise(4, SHAPE)), max_epochs=1)
        expected = by_hand(start(), noise(4, SHAPE), [lr] * 4, OPTIMIZERS["SGD"][0], 0.25)
        assert torch.allclose(module.weight, expected, rtol=1e-12)


# ---- Resume ----


class ByStep(Walk):
    """Takes its noise by the step that it is at, so that a resumed run sees what the uninterrupted
    one saw."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(noise(8, SHAPE)[self.trainer.global_step % 8])


@pytest.mark.parametrize("optimizer", ["SGDM", "fused AdamW"])
@pytest.mark.parametrize("step", [3, 4])  # the rate falls between the third step and the fourth
def test_resume_across_the_drop_divides_once(step: int, optimizer: str, tmp_path: Any) -> None:
    def go(callback: LRDropRescaling, extra: Sequence[Any] = (), ckpt_path: Any = None) -> Walk:
        module = ByStep(start(), OPTIMIZERS[optimizer][0], by_rates(RATES))
        fit(module, [callback, *extra], batches(noise(4, SHAPE)), max_epochs=2, ckpt_path=ckpt_path)
        return module

    path = tmp_path / "at_the_drop.ckpt"
    whole, resumed = LRDropRescaling(), LRDropRescaling()
    expected = go(whole, [SavesAt(step, path)])
    assert torch.equal(go(resumed, ckpt_path=path).weight, expected.weight)
    assert [resumed.state_dict()[key] for key in ("steps", "extra")] == [
        whole.state_dict()[key] for key in ("steps", "extra")
    ]
    by = by_hand(start(), noise(8, SHAPE), RATES, *OPTIMIZERS[optimizer])
    assert torch.allclose(expected.weight, by, rtol=1e-12)
    state = torch.load(path, weights_only=True)["callbacks"][whole.state_key]
    assert state["extra"]["workers"][0]["last_lr"] == pytest.approx({"weight": RATES[step - 1]})


def test_resume_from_a_run_without_it_does_not_invent_a_drop(tmp_path: Any) -> None:
    def go(callbacks: Sequence[Any], ckpt_path: Any = None) -> Walk:
        module = ByStep(start(), OPTIMIZERS["SGD"][0], by_rates([0.1] * 3 + [0.01] * 5))
        fit(module, list(callbacks), batches(noise(4, SHAPE)), max_epochs=2, ckpt_path=ckpt_path)
        return module

    path = tmp_path / "before.ckpt"
    without = go([SavesAt(3, path)])
    assert torch.equal(go([LRDropRescaling()], path).weight, without.weight)


# ---- What lies behind ----


@pytest.mark.parametrize("bias", [False, True])
def test_the_evaluation_does_not_see_the_drop(bias: bool) -> None:
    outputs: dict[str, Tensor] = {}
    before_drop: dict[str, Tensor] = {}
    after_drop: dict[str, Tensor] = {}

    class Looks(L.Callback):
        """Evaluates right before and right after the phase of the drop."""

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            bracket, x = (
                StepBracket.of(trainer.optimizers[0]),
                torch.randn(5, 1, 6, 6, dtype=torch.float64),
            )

            def look(name: str, state: dict[str, Tensor], step: Any) -> None:
                if step.number == 4:
                    pl_module.eval()
                    outputs[name] = pl_module(x).clone()
                    state.update(
                        {key: value.clone() for key, value in pl_module.state_dict().items()}
                    )
                    pl_module.train()

            bracket.add(Phase.MEASURE, partial(look, "before", before_drop))
            bracket.add(Phase.SHRINK, partial(look, "after", after_drop))

    module = make(
        net=convnet(bias),
        make_optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        make_scheduler=lambda o: lr_scheduler.MultiStepLR(o, [3], 1 / 16),
    )
    fit(module, [Looks(), LRDropRescaling()])
    assert torch.allclose(outputs["before"], outputs["after"], atol=1e-12)
    for name in ("net.0.weight", "net.3.weight"):
        assert torch.allclose(after_drop[name], before_drop[name] / 2)
    assert not torch.allclose(
        after_drop["net.4.running_var"], before_drop["net.4.running_var"], rtol=0.5
    )
    assert torch.equal(after_drop["net.8.weight"], before_drop["net.8.weight"])


def test_the_drop_is_marked_and_the_tables_say_how(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = NormDynamicsMonitor(1)
    module = Walk(start(), OPTIMIZERS["AdamW"][0], by_rates([0.1] * 3 + [0.01] * 5))
    fit(module, [LRDropRescaling(), monitor], batches(noise(8, SHAPE)), max_epochs=1)
    assert [(event.step, event.kind) for event in monitor.history.events] == [(3, "lr_drop")]
    assert "÷ k^0.5 at an LR drop by k" in capsys.readouterr().out


# ---- What is refused ----


class Plain(torch.optim.Optimizer):
    """An optimizer of somebody else."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> Any:
        return closure()


@pytest.mark.parametrize(
    ("make_optimizer", "others", "message"),
    [
        (
            lambda p: torch.optim.RMSprop(p, weight_decay=0.1),
            [],
            r"of RMSprop with these settings is not known\. Give exponent=",
        ),
        (
            lambda p: ADAM(p, weight_decay=0.1, amsgrad=True),
            [],
            r"of Adam with these settings is not known\. Give exponent=",
        ),
        (
            lambda p: torch.optim.NAdam(p, weight_decay=0.1),
            [],
            r"of NAdam with these settings is not known\. Give exponent=",
        ),
        (
            lambda p: torch.optim.Adagrad(p, weight_decay=0.1),
            [],
            r"under Adagrad there is no equilibrium \(its steps become ever shorter",
        ),
        (
            lambda p: SGD(p, lr=0.1),
            [],
            r"`weight` under SGD: it has no weight decay.*Give exponent=",
        ),
        (
            lambda p: ADAMW(p, weight_decay=0),
            [],
            r"`weight` under AdamW: it has no weight decay.*Give exponent=",
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: AdaptiveWeightShrink(0.1, weight_decay="keep")],
            r"under the other callbacks on it is not known\. Give exponent=",
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: WeightRescaling(5)],
            r"`weight` is a target of WeightRescaling.*different",
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: WeightRescaling(5, start_epoch=3)],
            r"`weight` is a target of WeightRescaling.*different `params`",
        ),
        (
            Plain,
            [],
            r"state of Plain .* only the state of .* is understood\. Use another optimizer",
        ),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [lambda: LRDropRescaling(params="weight")],
            "Two LRDropRescaling callbacks",
        ),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_refused_at_the_first_step(
    make_optimizer: Any, others: Any, message: str, last: bool
) -> None:
    module, callbacks = (
        Walk(start(), make_optimizer, by_rates([0.1] * 5)),
        [LRDropRescaling(), *(other() for other in others)],
    )
    with pytest.raises(NotSupportedError, match=message):
        fit(module, callbacks[:: 1 if last else -1], batches(noise(6, SHAPE)), max_epochs=1)
    assert module.trainer.global_step == 0
    assert torch.equal(module.weight, start())


def test_refused_where_the_equilibrium_norm_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a decay that falls with the square of the learning rate."""
    corrected = {"decay": 0.1, "decay_rate": "lr_squared"}
    monkeypatch.setattr(lr_drop_rescaling, "balance", lambda *arguments: corrected)
    module = Walk(start(), lambda p: ADAMW(p, weight_decay=0.1), by_rates([0.1] * 5))
    message = "square of the learning rate, so its equilibrium norm does not move"
    with pytest.raises(NotSupportedError, match=message):
        fit(module, [LRDropRescaling()], batches(noise(6, SHAPE)), max_epochs=1)


@pytest.mark.parametrize(
    ("make_optimizer", "others"),
    [
        (lambda p: torch.optim.RMSprop(p, lr=0.1), []),
        (lambda p: SGD(p, lr=0.1), []),
        (
            lambda p: SGD(p, lr=0.1, weight_decay=0.1),
            [AdaptiveWeightShrink(0.1, weight_decay="keep")],
        ),
    ],
)
def test_a_given_exponent_is_taken(make_optimizer: Any, others: Any) -> None:
    norms = []

    class Norms(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            norms.append(pl_module.weight.norm().item())

    module = Walk(start(), make_optimizer, by_rates([0.1, 1e-9]))
    fit(
        module,
        [Norms(), LRDropRescaling(exponent=0.1), *others],
        batches(noise(2, SHAPE)),
        max_epochs=1,
    )
    assert log(norms[0] / norms[1]) == pytest.approx(0.1 * log(1e8), rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"exponent": -1},
        {"exponent": "half"},
        {"exponent": float("nan")},
        {"min_drop": 1},
        {"min_drop": float("inf")},
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        LRDropRescaling(**arguments)


def test_evaluation_changes_nothing() -> None:
    module: Net = make()
    before = weights_of(module)
    runner = fit(module, [LRDropRescaling()], max_steps=1)
    after = weights_of(module)
    runner.validate(module, loader(), verbose=False)
    assert same(weights_of(module), after)
    assert not same(after, before)
