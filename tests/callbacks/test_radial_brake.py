"""The radial brake against both published rules, written out naively."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from cases import Case, check, refused, run, sgd
from models import TARGETS, distance, fit, make, weights_of
from reference import Brake
from replay import Recorder, replay

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NotSupportedError,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.monitor import balance

# Without a decay norms of scale-invariant weights grow, with this one they shrink.
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p, decay: torch.optim.SGD(p, 0.1, weight_decay=decay),
    "momentum": lambda p, decay: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=decay / 5),
    "adamw": lambda p, decay: torch.optim.AdamW(p, 0.02, weight_decay=5 * decay),
}
RULES: dict[str, tuple[dict[str, Any], Brake]] = {
    "half": ({}, Brake()),
    "pinned filters": (
        {"outward": 0.0, "inward": 0.0, "granularity": "filter"},
        Brake(0.0, 0.0, view="filter"),
    ),
    "radial": ({"change": "radial"}, Brake(change="radial")),
    "inwards": ({"outward": 1.0, "inward": 0.25}, Brake(1.0, 0.25)),
}
QUICK = {("half", "adamw"), ("pinned filters", "momentum"), ("radial", "adamw")}


def rules_and_optimizers():
    for rule in RULES:
        for optimizer in OPTIMIZERS:
            marks = () if (rule, optimizer) in QUICK else pytest.mark.slow
            yield pytest.param(rule, optimizer, marks=marks, id=f"{rule}-{optimizer}")


@pytest.mark.parametrize(("rule", "optimizer"), list(rules_and_optimizers()))
def test_it_is_the_rule(rule, optimizer):
    arguments, brake = RULES[rule]
    case = Case(lambda: [RadialBrake(**arguments)], {"brake": brake})
    decay = 1.0 if rule == "inwards" else 0.0
    mode = {"make_optimizer": lambda p: OPTIMIZERS[optimizer](p, decay)}
    check(*run(case.callbacks(), mode), case)
    check(*run(case.callbacks(), mode, dtype=torch.float32), case, 1e-6)


def test_a_pinned_radius_stays():
    module = make(make_optimizer=sgd)
    start = weights_of(module)
    fit(module, [RadialBrake(0, 0)])
    for name in TARGETS:
        moved = weights_of(module)[name]
        assert moved.norm() == pytest.approx(float(start[name].norm()), rel=1e-12)
        assert distance({name: moved}, {name: start[name]}) > 1e-3


def test_a_weight_of_zeros_grows_as_it_likes_and_is_counted():
    module = make(make_optimizer=sgd)
    with torch.no_grad():
        module.net[8].weight.zero_()
    callback = RadialBrake(0, 0, params="net.8.weight")
    fit(module, [callback], max_steps=3)
    assert module.net[8].weight.norm() > 0
    assert callback.plans[0].counters["clamped"].tolist() == [1.0]


def test_16_bit_weights_without_a_master_are_refused_by_name():
    module = make(make_optimizer=sgd, dtype=torch.float32)
    with pytest.raises(
        NotSupportedError, match=r"RadialBrake is about what single steps.*`net\.0\.weight`"
    ):
        fit(module, [RadialBrake()], precision="bf16-true")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *[({"outward": v}, r"`outward` must be in \[0, 1\]") for v in (-0.1, 1.5, math.nan, "a")],
        *[({"inward": v}, r"`inward` must be in \[0, 1\]") for v in (-0.1, 1.5, math.nan, True)],
        ({"change": "angle"}, "`change` must be 'norm' or 'radial'"),
    ],
)
def test_bad_values_are_named_with_their_range(arguments, says):
    with pytest.raises(ValueError, match=says):
        RadialBrake(**arguments)


@pytest.mark.parametrize(
    "other",
    [lambda: WeightRescaling(3), lambda: LRDropRescaling(exponent=0.3)],
    ids=["wrs", "lr drop"],
)
def test_who_sets_norms_on_purpose_is_refused(other):
    says = r"both target `net\.0\.weight`.*brakes changes of the norm"
    refused(make(make_optimizer=sgd), [RadialBrake(), other()], NotSupportedError, says)


@pytest.mark.parametrize("other", [WeightDecay, lambda: AdaptiveWeightShrink(0.5)])
def test_beside_a_decay_it_acts(other):
    brake = RadialBrake()
    fit(make(make_optimizer=sgd), [brake, other()], max_steps=2)
    assert len(brake.plans[0].targets) == 2


def test_it_acts_after_a_projection_and_a_rotation():
    recorder = Recorder()
    module = make(make_optimizer=sgd)
    callbacks = [
        RadialBrake(), RotationControl(0.3, norm="free"), RadialProjection(), AdaptiveWeightShrink(0.5),
    ]  # fmt: skip
    fit(module, [recorder, *callbacks])
    rules = {
        "shrink": reference.Shrink(0.5),
        "project": reference.Project(),
        "rotate": reference.Rotate(0.3, hold=False),
        "brake": Brake(),
    }
    assert distance(weights_of(module), replay(recorder, TARGETS, **rules)) <= 1e-12


def test_the_start_table_says_what_is_done(capsys):
    fit(make(make_optimizer=sgd), [RadialBrake(change="radial")], max_steps=1)
    text = " ".join(capsys.readouterr().out.split())
    assert "radial part braked to 0.5 outwards, 1 inwards" in text


@pytest.mark.parametrize(
    "callback",
    [
        lambda: RadialBrake(0, 0, granularity="auto"),
        lambda: RadialBrake(0.5, 1.0),
        lambda: RotationControl(0.05),
    ],
    ids=["pinned filters", "half", "held"],
)
def test_what_it_takes_from_a_norm_is_no_part_of_the_coherence(callback, monkeypatch):
    """Steps of plain SGD are at right angles to a scale-invariant weight, so every one lengthens it
    by its own squared angle, and the coherence is 1, whatever is done to the norm after it."""
    monkeypatch.setattr(balance, "LEAST_STEPS", 4)
    monkeypatch.setattr(balance, "MOST_ERROR", math.inf)
    monitor = NormDynamicsMonitor(1, quantities=["coherence", "norm_drift"], tables=False)
    module = make(make_optimizer=lambda p: torch.optim.SGD(p, 0.02))
    fit(module, [callback(), monitor], max_epochs=4)
    last = monitor.history[-1]
    for name in TARGETS:
        assert last[f"coherence/{name}"] == pytest.approx(1, abs=0.02)
    if isinstance(callback(), RotationControl):
        assert abs(last[f"norm_drift/{TARGETS[0]}"]) < 1e-12


def test_of_other_vectors_than_the_weights_own_there_is_no_balance():
    monitor = NormDynamicsMonitor(1, quantities=["coherence", "norm_drift"], granularity="layer")
    module = make(make_optimizer=sgd)
    fit(module, [RadialBrake(granularity="filter"), monitor], max_epochs=4)
    keys = [key for key in sorted(monitor.history.keys()) if TARGETS[0] in key]
    assert not any(key.startswith(("coherence", "norm_drift")) for key in keys)
