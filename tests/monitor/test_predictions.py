"""Predictions, on a walk whose equilibrium is known, and none where none has been derived."""

from __future__ import annotations

from math import sqrt
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from models import fit, make
from paper_optimizers import SGDP, AdamP, Lion
from walk import SETTINGS, SHAPE, Angles, Setting, Walk, batches, noise, settled, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.effect import Effects, Rescaling, Shrink
from lightning_normdyn.monitor.predictions import Predictor, relaxation_power
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update

SGD = torch.optim.SGD


ADAM = torch.optim.Adam


ADAMW = torch.optim.AdamW


NOTHING = Effects()


KEYS = ("equilibrium_angular_update/weight", "equilibrium_ratio/weight")


def rms(values: Any) -> float:
    values = [float(v) for v in values]
    return sqrt(sum(v * v for v in values) / len(values))


def keys(monitor: NormDynamicsMonitor) -> set[str]:
    return set(monitor.history.keys())


@pytest.mark.sampled(8)
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


@pytest.mark.sampled(11)
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


@pytest.mark.sampled(1)
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
    assert monitor.member.layers()[0]["verdict"].endswith("; its length is held by WeightRescaling")


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


@pytest.mark.parametrize(
    ("kind", "effects", "power"),
    [
        (SGD, Effects(), 4),
        (torch.optim.AdamW, Effects(), 2),
        (torch.optim.Adadelta, Effects(), 2),
        (SGD, Effects(shrink=Shrink(0.1, "norm", replaces_decay=True)), 5),
    ],
)
def test_how_fast_a_norm_relaxes(kind: Any, effects: Effects, power: float) -> None:
    group = kind([torch.zeros(2, requires_grad=True)], lr=0.1).param_groups[0]
    assert relaxation_power(kind, group, effects, None) == power


SHRUNK = Effects(shrink=Shrink(0.1, "norm", replaces_decay=True))
RESCALED = Effects(rescaling=Rescaling(5, "initial", True, "now"))
EACH = {
    "SGD, AWS": (torch.optim.SGD, {"momentum": 0.9}, SHRUNK),
    "Adam, AWS": (torch.optim.Adam, {"weight_decay": 0.1}, SHRUNK),
    "Adam, coupled": (torch.optim.Adam, {"weight_decay": 0.1}, Effects()),
    "SGD, WRS": (torch.optim.SGD, {"momentum": 0.9}, RESCALED),
    "AdamW, WRS": (torch.optim.AdamW, {"weight_decay": 0.1}, RESCALED),
    "SGD, WRS and decay": (torch.optim.SGD, {"weight_decay": 0.1}, RESCALED),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}, SHRUNK),
}


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("case", EACH)
def test_many_weights_settle_where_each_of_them_does(case, has_scale):
    optimizer_class, options, effects = EACH[case]
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(4, 8))], lr=1e-2, **options)
    measured = {
        "lr": np.full(4, 1e-2),
        # The first is so small that formulas leave the numbers there are.
        "weight_norm": np.array([1e-200, 0.5, 2.0, 7.0]),
        "gradient_scale": np.array([1e-200, 3.0, 0.1, 4.0]) * has_scale,
        # None at all for the last.
        "equivalent_weight_decay": np.array([0.2, 0.05, 0.2, 0.0]),
    }
    lengths = np.array([9.0, 64.0, 27.0, 5.0])
    predictor = Predictor(optimizer, optimizer.param_groups, 10)
    found = predictor.predict_each(0, 1e-2, effects, measured, lengths, None)
    for i, length in enumerate(lengths):
        numbers = {name: values[i].item() for name, values in measured.items()}
        single = predictor.predict(0, effects, numbers, int(length), None)
        if single is None:
            assert found is None or np.isnan(found.angular_update[i])
            continue
        relaxation = np.nan if single.relaxation is None else single.relaxation
        assert found.angular_update[i] == pytest.approx(single.angular_update, rel=1e-14)
        assert found.relaxation[i] == pytest.approx(relaxation, rel=1e-14, nan_ok=True)
        assert found.pull[i] == pytest.approx(single.pull, rel=1e-14)
        assert (found.power, found.rough) == (single.power, single.rough)
