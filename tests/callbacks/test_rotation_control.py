"""Rotation control against the rule written out naively, and against what it promises: an angle,
a norm."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import reference
import torch
from cases import Case, check, refused, run, sgd
from models import TARGETS, Net, distance, fit, make, weights_of
from reference import Rotate
from replay import Recorder, replay

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}
# What a person writes, and what the reference calls the same.
RULES: dict[str, tuple[dict[str, Any], Rotate]] = {
    "hold": ({"angle": 0.03}, Rotate(0.03)),
    "hold, filters": (
        {"angle": 0.005, "granularity": "auto", "target_norm": 2.0},
        Rotate(0.005, target=2.0, view="filter"),
    ),
    "lr": ({"angle": "lr"}, Rotate("lr")),
    "floor": (
        {"angle": 0.2, "bound": "at_least", "norm": "free"},
        Rotate(0.2, "at_least", hold=False),
    ),
    "floor of filters": (
        {"angle": 0.2, "bound": "at_least", "norm": "free", "granularity": "filter"},
        Rotate(0.2, "at_least", hold=False, view="filter"),
    ),
    "cap": (
        {"angle": 0.01, "bound": "at_most", "norm": "free", "weight_decay": "keep"},
        Rotate(0.01, "at_most", hold=False, weight_decay="keep"),
    ),
    "cap, held": ({"angle": 0.01, "bound": "at_most"}, Rotate(0.01, "at_most")),
    "smooth": (
        {"angle": 0.03, "smoothing": 0.9, "norm": "free"},
        Rotate(0.03, smoothing=0.9, hold=False),
    ),
    "root": ({"angle": 0.03, "follows": "sqrt_lr"}, Rotate(0.03, follows="sqrt_lr")),
    "constant": ({"angle": 0.03, "follows": "constant"}, Rotate(0.03, follows="constant")),
}
QUICK = {("hold", "sgd"), ("floor of filters", "adamw"), ("cap", "momentum"), ("smooth", "adamw")}


def falling(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


def rules_and_optimizers():
    for rule in RULES:
        for optimizer in OPTIMIZERS:
            marks = () if (rule, optimizer) in QUICK else pytest.mark.slow
            yield pytest.param(rule, optimizer, marks=marks, id=f"{rule}-{optimizer}")


@pytest.mark.parametrize(("rule", "optimizer"), list(rules_and_optimizers()))
def test_it_is_the_rule(rule, optimizer):
    arguments, rotate = RULES[rule]
    case = Case(lambda: [RotationControl(**arguments)], {"rotate": rotate})
    mode = {"make_optimizer": OPTIMIZERS[optimizer], "make_scheduler": falling}
    check(*run(case.callbacks(), mode), case)
    check(*run(case.callbacks(), mode, dtype=torch.float32), case, 1e-6)


def trained(callback, make_optimizer=sgd, steps=20, dtype=torch.float64, **arguments):
    """Weights before and after every step."""
    recorder = Recorder()
    weights = []

    class Watch(Net):
        def on_train_batch_end(self, *args):
            weights.append(weights_of(self))

    module = make(Watch, dtype=dtype, make_optimizer=make_optimizer, **arguments)
    weights.append(weights_of(module))
    fit(module, [recorder, callback], max_steps=steps, max_epochs=-1)
    return weights


def turns(weights, name=TARGETS[1]):
    """The angle of each step of a whole weight, and its norm after it."""
    angles, norms = [], []
    for before, after in itertools.pairwise(weights):
        a, b = before[name].flatten().double(), after[name].flatten().double()
        across = b - (b @ a) / (a @ a) * a
        angles.append(math.atan2(float(across.norm()), float(b @ a / a.norm())))
        norms.append(float(b.norm()))
    return torch.tensor(angles).double(), torch.tensor(norms).double()


@pytest.mark.parametrize("steps", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 5e-5)])
def test_every_step_turns_by_the_angle_and_the_norm_is_held(dtype, rounding, steps):
    weights = trained(RotationControl(0.01), steps=steps, dtype=dtype)
    angles, norms = turns(weights)
    assert len(angles) == steps
    assert (angles / 0.01 - 1).abs().max() <= rounding
    assert (norms / weights[0][TARGETS[1]].double().norm() - 1).abs().max() <= 1e-6


def test_muon_whole_matrices_and_their_rows():
    def muon(parameters):
        matrices = [p for p in parameters if p.ndim == 2]
        return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)

    def net():
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(36, 8, bias=False), torch.nn.BatchNorm1d(8),
            torch.nn.Linear(8, 2, bias=False),
        )  # fmt: skip

    for granularity in ("layer", "filter"):
        callback = RotationControl(0.02, params="net.1.weight", granularity=granularity)
        weights = trained(callback, muon, net=net())
        rows = [{name: w.reshape(1, -1) for name, w in all_.items()} for all_ in weights]
        if granularity == "filter":
            rows = [{name: w[3:4] for name, w in all_.items()} for all_ in weights]
        angles, norms = turns(rows, "net.1.weight")
        assert (angles / 0.02 - 1).abs().max() <= 1e-6
        assert (norms / norms[0] - 1).abs().max() <= 1e-6


def watched_muon(seen):
    """Muon that notes each weight before its step, and where the step takes it before anybody
    else acts."""

    def make_optimizer(parameters):
        matrices = [p for p in parameters if p.ndim == 2]
        optimizer = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
        pair = []
        optimizer.register_step_pre_hook(lambda *_: pair.append(matrices[0].detach().clone()))
        optimizer.register_step_post_hook(
            lambda *_: seen.append((pair.pop(), matrices[0].detach().clone()))
        )
        return optimizer

    return make_optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", ["hold", "floor of filters", "cap, held", "lr"])
def test_it_is_the_rule_under_muon(rule, dtype):
    arguments, rotate = RULES[rule]
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 8, bias=False), torch.nn.BatchNorm1d(8),
        torch.nn.Linear(8, 2, bias=False),
    ).to(dtype)  # fmt: skip
    seen = []
    callback = RotationControl(**{**arguments, "params": "net.1.weight"})
    weights = trained(callback, watched_muon(seen), steps=8, dtype=dtype, net=net)
    memory = {}
    naive = dataclasses.replace(rotate)
    for (before, moved), after in zip(seen, weights[1:], strict=True):
        expected = naive(before.double(), moved.double(), 0.02, memory)
        found = after["net.1.weight"].double()
        rounding = 1e-12 if dtype == torch.float64 else 1e-6
        assert distance({"": found}, {"": expected}) <= rounding


def test_bounds_hold_at_every_step():
    floor, _ = turns(trained(RotationControl(0.05, bound="at_least", norm="free")))
    assert (floor >= 0.05 * (1 - 1e-6)).all()
    cap, _ = turns(trained(RotationControl(0.01, bound="at_most", norm="free")))
    assert (cap <= 0.01 * (1 + 1e-6)).all()
    assert floor.max() > 0.0501
    assert cap.min() < 0.0099 or (cap / 0.01 - 1).abs().max() <= 1e-6


def test_equilibrium_is_what_theory_predicts_and_follows_the_schedule():
    callback = RotationControl("equilibrium")
    weights = trained(callback, OPTIMIZERS["adamw"], steps=8, make_scheduler=falling)
    angles, _ = turns(weights)
    for step, angle in enumerate(angles.tolist()):
        lr = 0.02 * 0.8**step
        assert angle == pytest.approx(math.sqrt(2 * lr * 0.1 * 0.1 / 1.9), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rate_of_zero_turns_nothing_and_counts_nothing(optimizer):
    def warmup(o):
        return torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4))

    for angle in (0.03, "lr"):
        callback = RotationControl(angle)
        weights = trained(callback, OPTIMIZERS[optimizer], steps=8, make_scheduler=warmup)
        angles, _ = turns(weights)
        assert torch.equal(weights[0][TARGETS[1]], weights[1][TARGETS[1]])
        lr = 0.1 if optimizer == "sgd" else 0.02
        peak = math.atan(lr) if angle == "lr" else angle
        shares = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1, 1, 1]).double()
        expected = (shares * lr).atan() if angle == "lr" else shares * peak
        torch.testing.assert_close(angles, expected, rtol=1e-6, atol=1e-9)
        assert not callback.plans[0].counters["clamped"].any()


def test_a_warm_up_by_hand_shows_its_own_maximum_only():
    class ByHand(Net):
        def on_train_batch_start(self, batch, batch_idx):
            rate = 0.025 * min(4, self.trainer.global_step + 1)
            self.trainer.optimizers[0].param_groups[0]["lr"] = rate

    module = make(ByHand, make_optimizer=OPTIMIZERS["sgd"])
    weights = [weights_of(module)]
    fit(module, [RotationControl(0.03)], max_steps=1)
    weights.append(weights_of(module))
    assert turns(weights)[0].tolist() == pytest.approx([0.03])


# ---- What the monitor makes of it ----


def test_the_expected_angle_is_the_target_and_every_steered_weight_shows_its_matrix_angle(capsys):
    monitor = NormDynamicsMonitor(1)
    callbacks = [
        RotationControl(0.03, params="net.0.weight", granularity="auto", target_norm=2.0),
        RotationControl(0.02, params="net.3.weight"),
        RotationControl("lr", params="net.8.weight"),
        monitor,
    ]
    fit(make(make_optimizer=OPTIMIZERS["sgd"], make_scheduler=falling), callbacks, max_epochs=3)
    for step, row in enumerate(monitor.history):
        share = 0.8**step
        whole, head = (row[f"matrix_angle/net.{i}.weight"] for i in (3, 8))
        assert "matrix_angle/net.0.weight" in row
        assert whole == pytest.approx(0.02 * share, rel=1e-6)
        assert head == pytest.approx(math.atan(0.1 * share), rel=1e-6)
        assert row["expected_angular_update/net.0.weight"] == pytest.approx(0.03 * share, rel=1e-6)
        assert row["expected_ratio/net.0.weight"] == pytest.approx(1, rel=1e-6)
        assert row["expected_weight_norm/net.0.weight"] == 2.0
        assert row["normdyn/expected_ratio"] == pytest.approx(1, rel=1e-6)
    assert "expected_ratio/net.3.weight" not in row  # its filters turn as they like
    verdicts = {layer["weight"]: layer["verdict"] for layer in monitor.member.layers()}
    assert verdicts["net.0.weight"].startswith("as expected now (1.0x)")
    assert verdicts["net.8.weight"] == "its length is held by RotationControl"


def test_a_floor_has_a_balance_and_no_expectation():
    monitor = NormDynamicsMonitor(1)
    callbacks = [RotationControl(0.2, bound="at_least", norm="free", granularity="auto"), monitor]
    fit(make(make_optimizer=OPTIMIZERS["adamw"]), callbacks)
    keys = {key.split("/")[0] for key in set(monitor.history.keys()) if TARGETS[0] in key}
    assert not keys & {"expected_ratio", "equilibrium_ratio"}
    assert "matrix_angle" in keys


# ---- What is refused, and what is left alone ----


def zero_a_filter(module):
    with torch.no_grad():
        module.net[3].weight[2] = 0
    return module


def test_vectors_of_zeros_are_refused_with_their_count_and_the_way_out_works():
    says = r"initial norm, but some are zero: 1 of `net\.3\.weight`. Give target_norm="
    callback = RotationControl(0.03, granularity="filter")
    refused(zero_a_filter(make()), [callback], NotSupportedError, says)
    # The whole weight has a length, so as one vector it is held.
    fit(zero_a_filter(make()), [RotationControl(0.03)], max_steps=2)
    module = make()
    with torch.no_grad():
        module.net[8].weight[1] = 0
    common = {"params": "net.8.weight", "granularity": "filter"}
    callback = RotationControl(0.03, target_norm=0.5, **common)
    fit(module, [callback], max_steps=2)
    assert module.net[8].weight.detach()[1].norm() == pytest.approx(0.5)
    assert callback.plans[0].counters["clamped"].sum() == 1  # its first step turned nothing
    fit(zero_a_filter(make()), [RotationControl(0.03, norm="free", granularity="filter")])


def test_a_weight_that_comes_later_is_held_at_the_norm_of_its_first_step():
    class Late(Net):
        def on_train_batch_start(self, batch, batch_idx):
            first = self.net[0].weight
            first.requires_grad_(self.trainer.global_step >= 3)
            if self.trainer.global_step < 3:
                with torch.no_grad():
                    first.mul_(2)

    module = make(Late, make_optimizer=sgd)
    start = module.net[0].weight.detach().norm()
    callback = RotationControl(0.03, params=["net.0.weight", "net.3.weight"])
    fit(module, [callback])
    assert module.net[0].weight.detach().norm() == pytest.approx(8 * float(start))


def test_16_bit_weights_without_a_master_are_refused_by_name():
    says = r"RotationControl is about what single steps change.*`net\.0\.weight`.*bf16-mixed"
    module = make(make_optimizer=sgd, dtype=torch.float32)
    with pytest.raises(NotSupportedError, match=says):
        fit(module, [RotationControl(0.03)], precision="bf16-true")


def test_a_step_that_no_stretch_helps_is_left_and_counted():
    class Outwards(torch.optim.SGD):
        """Makes the weights longer, and nothing else."""

        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.copy_(self.before[p] * 1.5)
            return loss

    def outwards(parameters):
        optimizer = Outwards(list(parameters), 0.1)
        optimizer.before = {}
        optimizer.register_step_pre_hook(
            lambda o, *_: o.before.update(
                {p: p.detach().clone() for g in o.param_groups for p in g["params"]}
            )
        )
        return optimizer

    callback = RotationControl(0.03, norm="free", weight_decay="keep", follows="constant")
    weights = trained(callback, outwards, steps=2)
    assert distance(weights[1], {n: 1.5 * w for n, w in weights[0].items()}) < 1e-12
    assert callback.plans[0].counters["clamped"].tolist() == [2.0, 2.0]


BAD: list[tuple[dict[str, Any], str]] = [
    *[({"angle": a}, r"`angle` must be radians > 0 and < π/2, 'equil") for a in
      (0, -1.0, math.nan, math.pi / 2, math.inf, True, "fast", None)],
    ({"angle": 0.1, "bound": "about"}, "`bound` must be 'exact', 'at_least' or 'at_most'"),
    ({"angle": 0.1, "norm": "kept"}, "`norm` must be"),
    ({"angle": 0.1, "follows": "me"}, "`follows` must be"),
    ({"angle": 0.1, "weight_decay": "none"}, "`weight_decay` must be"),
    ({"angle": 0.1, "target_norm": 0}, "`target_norm` must be > 0 or 'initial'"),
    ({"angle": 0.1, "target_norm": 1.0, "norm": "free"}, "is for norm='hold'"),
    *[({"angle": 0.1, "smoothing": q}, r"`smoothing` must be in \[0, 1\)") for q in
      (-0.1, 1.0, math.nan)],
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_values_are_named_with_their_range(arguments, says):
    with pytest.raises(ValueError, match=says):
        RotationControl(**arguments)


@pytest.mark.parametrize(
    ("make_optimizer", "arguments", "says"),
    [
        (lambda p: sgd(p, weight_decay=0.0), {"angle": "equilibrium"}, "decay of 0.0 settles"),
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), {"angle": "equilibrium"}, "Adagrad"),
        (
            lambda p: torch.optim.Adam(p, weight_decay=0.1),
            {"angle": 0.1, "norm": "free"},
            "coupled weight decay 0.1 of Adam",
        ),
    ],
)
def test_what_has_no_equilibrium_or_no_decoupled_decay_is_refused(make_optimizer, arguments, says):
    callback = RotationControl(**arguments)
    refused(make(make_optimizer=make_optimizer), [callback], NotSupportedError, says)


OTHERS = {
    "aws": (lambda: AdaptiveWeightShrink(0.5), True),
    "wrs": (lambda: WeightRescaling(3), True),
    "projection": (RadialProjection, True),
    "lr drop": (lambda: LRDropRescaling(exponent=0.3), True),
    "brake": (RadialBrake, True),
    "decay": (WeightDecay, True),
    "monitor": (lambda: NormDynamicsMonitor(1, tables=False), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_beside_other_callbacks_a_norm_that_is_held_is_refused_and_a_free_one_is_not(name):
    other, is_refused = OTHERS[name]
    if is_refused:
        held = [RotationControl(0.03, granularity="auto"), other()]
        says = r"both target `net\.0\.weight`.*norm='hold' sets the norm"
        refused(make(make_optimizer=sgd), held, NotSupportedError, says)
    fit(make(make_optimizer=sgd), [RotationControl(0.03, norm="free"), other()], max_steps=2)


def test_beside_a_replay_it_is_always_refused(tmp_path):
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    fit(make(make_optimizer=sgd), [monitor], max_steps=2)
    path = tmp_path / "history.npz"
    monitor.history.save(path)
    both = [RotationControl(0.03, norm="free"), EffectiveLRReplay(path)]
    refused(make(make_optimizer=sgd), both, NotSupportedError, "sets how far a step turns")


def test_aws_owns_the_decay_of_a_free_norm_and_projection_comes_first():
    recorder = Recorder()
    module = make(make_optimizer=sgd)
    callbacks = [
        RotationControl(0.03, norm="free"), RadialProjection(), AdaptiveWeightShrink(0.5),
    ]  # fmt: skip
    fit(module, [recorder, *callbacks])
    rules = {
        "shrink": reference.Shrink(0.5),
        "project": reference.Project(),
        "rotate": Rotate(0.03, hold=False),
    }
    assert distance(weights_of(module), replay(recorder, TARGETS, **rules)) <= 1e-12


def test_the_start_table_says_what_is_done(capsys):
    fit(make(make_optimizer=sgd), [RotationControl(0.03)], max_steps=1)
    text = " ".join(capsys.readouterr().out.split())
    assert "turned by 0.03 rad, norm held, without decay (replaces 0.1, acting like 1)" in text
    named = RotationControl("lr", bound="at_most", norm="free", params="net.8.weight")
    fit(make(make_optimizer=sgd), [named], max_steps=1)
    text = " ".join(capsys.readouterr().out.split())
    assert "(by request)" in text
    assert "by at most atan(lr), decay (replaces 0.1, acting like 1)" in text


def test_decays_that_come_about_later_are_said_once():
    class Switches(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                self.trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1

    def adam(parameters):
        return torch.optim.Adam(parameters, 0.01)

    module = make(Switches, make_optimizer=adam)
    with pytest.warns(NormDynWarning, match="cannot turn the weight decay 0.1 that Adam has now"):
        fit(module, [RotationControl(0.03, norm="free")])
