"""WeightDecay against its rules written out, its choice of weights, what it keeps, and what is
predicted under it."""

from __future__ import annotations

import copy
import itertools
from math import isnan, pi
from typing import Any

import lightning as L
import pytest
import reference
import torch
from cases import DECAYING_OPTIMIZERS, EVERY_MATRIX, adamw, sgd, targets_of
from models import (
    TARGETS,
    Net,
    SavesAt,
    against_paper,
    convnet,
    distance,
    fit,
    make,
    same,
    weights_of,
)
from reference import Decay, Project
from replay import Recorder, replay
from torch import nn
from walk import Walk, batches, by_rates, noise, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    LRDropRescaling,
    NormDynamicsMonitor,
    NoTargetsError,
    NotSupportedError,
    RadialProjection,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.engine.effect import Decaying, Effects
from lightning_normdyn.monitor.predictions import balance, predict
from lightning_normdyn.monitor.pulls import options_of, strength_of

RATES = ("lr", "lr_squared", "schedule", "constant")
# λ of each rate, so that all decay alike at a learning rate of about 0.1.
LAMBDA = {"lr": 0.3, "lr_squared": 0.3, "schedule": 0.03, "constant": 0.03}


def every_rule():
    quick = {("momentum", "lr_squared", False), ("adamw", "lr", True), ("adam", "constant", False)}
    names = ("sgd", "momentum", "adam", "adamw")
    for name, rate, cautious in itertools.product(names, RATES, (False, True)):
        slow = (name, rate, cautious) not in quick
        yield pytest.param(name, rate, cautious, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "rate", "cautious"), list(every_rule()))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_rule_written_out(name, rate, cautious, dtype, tolerance):
    make_optimizer, optimizer, lr = DECAYING_OPTIMIZERS[name]
    decay = LAMBDA[rate]
    callback = WeightDecay(decay, rate=rate, cautious=cautious, params=TARGETS)
    got, expected = against_paper(
        [callback],
        make_optimizer,
        optimizer,
        lr=lr,
        steps=8 if dtype is torch.float64 else 4,
        rules={"decay_rule": Decay(decay, rate, cautious)},
        make_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
        reference_lr=lambda t: lr * 0.7**t,
        dtype=dtype,
    )
    assert distance(got, expected) <= tolerance


class Pushed(L.LightningModule):
    """A weight whose gradient is the batch, whatever the weight is."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(start((6, 4)))
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx=0):
        return (batch * self.weight).sum()

    def configure_optimizers(self):
        optimizer = self.make_optimizer([self.weight])
        return [optimizer], [{"scheduler": by_rates(FALLING)(optimizer), "interval": "step"}]


FALLING = [0.1, 0.1, 0.05, 0.02, 0.02, 0.01]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="newer torch only")
@pytest.mark.parametrize(
    ("rate", "cautious"),
    [
        ("lr_squared", False),
        *(pytest.param(rate, True, marks=pytest.mark.slow) for rate in RATES),
        *(pytest.param(rate, False, marks=pytest.mark.slow) for rate in ("lr", "constant")),
    ],
)
def test_equals_the_rule_under_muon(rate, cautious):
    def muon(parameters):
        return torch.optim.Muon(parameters, lr=0.1, weight_decay=0.4)

    module, gradients = Pushed(muon), noise(6, (6, 4))
    expected = copy.deepcopy(module.weight.detach())
    fit(
        module,
        [WeightDecay(rate=rate, cautious=cautious, params="weight")],
        batches(gradients),
        max_epochs=1,
    )
    free = nn.Parameter(expected.clone())
    optimizer = torch.optim.Muon([free], lr=0.1, weight_decay=0.0)
    rule = Decay(0.4, rate, cautious)
    for lr, gradient in zip(FALLING, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        pull = rule.pull(None, lr, 0.1)
        with torch.no_grad():
            before = free.clone()
            free.grad = gradient.clone()
            if not cautious:
                free.mul_(1 - pull)
            optimizer.step()
            if cautious:
                free.copy_(reference.cautiously(free.clone(), before, free.clone(), pull))
    assert distance({"": module.weight.detach()}, {"": free.detach()}) <= 1e-12


# ---- Which decay ----


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_number_of_the_group_is_taken_as_it_stands(name):
    """Whatever momentum or a second moment made of it: SGD becomes SGDW, Adam AdamW."""
    make_optimizer, optimizer, lr = DECAYING_OPTIMIZERS[name]
    got, expected = against_paper(
        [WeightDecay(params=TARGETS)],
        make_optimizer,
        optimizer,
        lr=lr,
        rules={"decay_rule": Decay(0.1)},
    )
    assert distance(got, expected) <= 1e-12
    free, _ = against_paper([], make_optimizer, optimizer, lr=lr, rules={})
    assert distance(got, free) > 1e-3


def test_an_independent_decay_acts_at_a_learning_rate_of_zero_and_others_do_not():
    lengths = {}
    for rate in RATES:
        module = Walk(start(), lambda p: torch.optim.SGD(p, lr=0.0, weight_decay=0.1))
        fit(module, [WeightDecay(rate=rate)], batches(noise(3, (3, 5))), max_epochs=1)
        lengths[rate] = float(module.weight.detach().norm() / start().norm())
    assert lengths.pop("constant") == pytest.approx(0.9**3, rel=1e-12)
    assert set(lengths.values()) == {1.0}


def by_hand(rates):
    """A schedule that leaves neither ``initial_lr`` nor ``max_lr`` in the group."""

    noises = noise(len(rates), (3, 5))

    class ByHand(Walk):
        def training_step(self, batch, batch_idx=0):
            # By the step that it is at, so that a resumed run sees what the whole one saw.
            return super().training_step(noises[self.trainer.global_step])

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for group in optimizer.param_groups:
                group["lr"] = rates[self.trainer.global_step]
            optimizer.step(closure=optimizer_closure)

    return ByHand(start(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2))


def test_a_warm_up_by_hand_knows_its_own_maximum_which_a_resume_keeps(tmp_path):
    rates = [0.05, 0.1, 0.05, 0.02, 0.01, 0.01]
    data = batches(noise(6, (3, 5)))

    def go(extra=(), **arguments):
        module = by_hand(rates)
        callback = WeightDecay(rate="schedule", cautious=True)
        recorder = Recorder()
        fit(module, [callback, recorder, *extra], data, max_epochs=1, **arguments)
        return module.weight.detach(), recorder

    whole, recorder = go([SavesAt(4, tmp_path / "middle.ckpt")])
    rule = Decay(None, "schedule", cautious=True)  # largest so far: 0.05, and then 0.1
    assert distance({"weight": whole}, replay(recorder, ["weight"], decay_rule=rule)) <= 1e-12
    resumed, _ = go(ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(resumed, whole)


def test_a_share_of_more_than_a_half_is_clamped_and_counted():
    module = Walk(start(), lambda p: torch.optim.SGD(p, lr=1e-9))
    callback = WeightDecay(0.8, rate="constant")
    fit(module, [callback], batches(noise(2, (3, 5))), max_epochs=1)
    assert float(module.weight.detach().norm() / start().norm()) == pytest.approx(0.25, rel=1e-6)
    assert callback.plans[0].counters["clamped"].tolist() == [2.0] * 3


# ---- Which weights ----


def second_undecayed(parameters):
    first, second, *rest = (p for p in parameters if p.ndim > 1)
    return sgd([{"params": [first, *rest]}, {"params": [second], "weight_decay": 0.0}])


@pytest.mark.parametrize(
    ("callback", "make_optimizer", "expected"),
    [
        (WeightDecay(), sgd, EVERY_MATRIX),
        (WeightDecay(rate="lr_squared"), sgd, TARGETS),
        (WeightDecay(), second_undecayed, ["net.0.weight", "net.8.weight"]),
        (WeightDecay(0.1), second_undecayed, ["net.0.weight", "net.8.weight"]),
        (WeightDecay(0.1), lambda p: sgd(p, weight_decay=0.0), EVERY_MATRIX),
        (WeightDecay(0.1, params="net.3.*"), second_undecayed, ["net.3.weight"]),
    ],
)
def test_auto_means_what_decays_and_a_name_what_it_names(callback, make_optimizer, expected):
    fit(make(make_optimizer=make_optimizer), [callback], max_steps=1)
    assert targets_of(callback) == expected


def test_nothing_decays_without_any_decay():
    with pytest.raises(NoTargetsError, match=r"WeightDecay.*found no weight"):
        fit(make(make_optimizer=lambda p: sgd(p, weight_decay=0.0)), [WeightDecay()], max_steps=1)


def test_gains_are_never_meant():
    torch.manual_seed(1)
    net = convnet()
    nn.utils.parametrizations.weight_norm(net[8])
    module, callback = Net(adamw, net), WeightDecay()
    fit(module, [callback], max_steps=1)
    assert targets_of(callback) == [*TARGETS, "net.8.parametrizations.weight.original1"]


# ---- Weights stored in 16 bits ----


def test_a_cautious_decay_of_bfloat16_weights_is_refused_by_name_and_a_plain_one_loses_nothing():
    gradients = [torch.zeros(3, 5, dtype=torch.bfloat16)] * 50

    def go(callback):
        module = Walk(start(dtype=torch.bfloat16), lambda p: torch.optim.SGD(p, lr=0.1))
        fit(module, [callback], batches(gradients), max_epochs=1, precision="bf16-true")
        return float(module.weight.detach().double().norm() / start().norm())

    with pytest.raises(NotSupportedError, match="`weight` lies in 16 bits"):
        go(WeightDecay(0.1, cautious=True))
    # In each step a share of 0.001, where bfloat16 can hold no less than 0.004.
    assert go(WeightDecay(0.001, rate="constant")) == pytest.approx(0.999**50, rel=0.005)


# ---- Beside others ----


@pytest.mark.parametrize("cautious", [False, True])
def test_the_mask_of_a_cautious_decay_is_the_optimizers_own_step(cautious):
    """A projection would change the sign of what is left of the step, entry by entry."""
    callbacks = [RadialProjection(), WeightDecay(0.4, cautious=cautious, params=TARGETS)]
    module, recorder = make(make_optimizer=adamw), Recorder()
    fit(module, [recorder, *callbacks])
    rules = {"project": Project(), "decay_rule": Decay(0.4, cautious=cautious)}
    assert distance(weights_of(module), replay(recorder, TARGETS, **rules)) <= 1e-12


def test_a_decay_is_left_to_aws_which_the_table_says(capsys):
    def ends(*callbacks):
        module = make(make_optimizer=adamw)
        fit(module, list(callbacks))
        return weights_of(module)

    alone = ends(AdaptiveWeightShrink(0.5))
    beside = ends(WeightDecay(0.3, params=TARGETS), AdaptiveWeightShrink(0.5))
    assert same(alone, beside)
    assert "its decay left to AdaptiveWeightShrink" in capsys.readouterr().out


def test_a_replay_counts_the_decay_before_the_step_as_that(tmp_path):
    """Replaying a run onto itself changes nothing: then n = n_ref and d = d_ref."""

    def go(*callbacks):
        module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2))
        monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
        fit(module, [monitor, WeightDecay(rate="constant", params=TARGETS), *callbacks])
        return weights_of(module), monitor.history

    recorded, history = go()
    history.save(tmp_path / "history.npz")
    again, _ = go(EffectiveLRReplay(tmp_path / "history.npz"))
    assert distance(again, recorded) <= 1e-9


def test_a_drop_of_the_rate_moves_no_norm_under_a_corrected_decay():
    module = Walk(start(), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
    callbacks = [WeightDecay(rate="lr_squared"), LRDropRescaling()]
    with pytest.raises(NotSupportedError, match="falls with the square of the learning rate"):
        fit(module, callbacks, batches(noise(2, (3, 5))), max_epochs=1)


# ---- What is predicted ----


def group_of(lr: float = 0.05, **more: Any) -> dict[str, Any]:
    return {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.2, **more}


def predicted(decaying: Decaying, group: dict[str, Any], **effects: Any) -> float | None:
    found = predict(
        torch.optim.AdamW,
        group,
        Effects(decaying=decaying, **effects),
        {"lr": group["lr"], "weight_norm": 2.0},
        64,
    )
    return None if found is None else found.angular_update


def test_a_decay_of_another_rate_is_predicted_as_what_it_comes_to():
    plain = predicted(Decaying("replace"), group_of())
    assert plain == pytest.approx((2 * 0.05 * 0.2 * 0.1 / 1.9) ** 0.5)
    corrected = Decaying("replace", "lr_squared", lr_max=lambda: 0.2)
    assert predicted(corrected, group_of()) == pytest.approx(plain / 2)
    # The group names a larger rate than was seen so far.
    named = Decaying("replace", "lr_squared")
    assert predicted(named, group_of(initial_lr=0.2)) == pytest.approx(plain / 2)
    assert predicted(Decaying(0.01, "constant"), group_of()) == pytest.approx(plain)
    cautious = predicted(Decaying("replace", cautious=True), group_of())
    # Less than half of the decay acts: the decay itself makes steps that lengthen rarer.
    assert plain / 2 < cautious < plain / 2**0.5


def test_where_nobody_has_derived_it_there_is_no_prediction():
    group = group_of()
    projection = RadialProjection().projection
    cautious = Effects(decaying=Decaying("replace", cautious=True))
    assert predicted(Decaying("replace", cautious=True), group, projection=projection) is None
    assert options_of(cautious, torch.optim.AdamW, group) is None
    assert isnan(strength_of(torch.optim.AdamW, group, cautious).rate)
    assert balance(cautious, torch.optim.AdamW, group)["cautious"]


def test_a_pull_does_not_need_a_learning_rate():
    constant = Effects(decaying=Decaying(0.01, "constant"))
    assert strength_of(torch.optim.AdamW, group_of(0.0), constant).pull(0.0, 1.0) == 0.01


def walked(callback, make_optimizer, steps, norm, rates=None, shape=(96, 64)):
    """The last row of a monitor beside the callback, on noise."""
    monitor = NormDynamicsMonitor(10, tables=False)
    module = Walk(start(shape, norm), make_optimizer, None if rates is None else by_rates(rates))
    fit(module, [monitor, callback], batches(noise(steps, shape)), max_epochs=1)
    return monitor.history


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
def test_the_course_of_a_walk_is_as_expected_through_a_cosine(rate):
    steps = 400
    rates = [
        0.01 * (0.5 + 0.5 * torch.cos(torch.tensor(pi * t / steps)).item()) for t in range(steps)
    ]
    decay = {"lr": 0.5, "lr_squared": 0.5, "schedule": 0.005, "constant": 0.005}[rate]

    def make_optimizer(p):
        return torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=decay)

    history = walked(WeightDecay(rate=rate), make_optimizer, steps, 3.0, rates)
    _, ratios = history.column("expected_ratio/weight")
    assert abs(ratios[5:] - 1).max() < 0.06
    equivalent = history.column("equivalent_weight_decay/weight")[1][20]
    lr = history.column("effective_lr/weight")[1][20] * history.column("weight_norm/weight")[1][20]
    share = lr / 0.01
    expected = {"lr": 0.5, "lr_squared": 0.5 * share, "schedule": 0.5, "constant": 0.5 / share}
    assert equivalent == pytest.approx(expected[rate], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("cautious", [False, True])
def test_a_settled_walk_turns_as_predicted(cautious):
    def make_optimizer(p):
        return torch.optim.SGD(p, lr=0.05, weight_decay=0.04)

    norm = (0.05 * 63 / (2 * 0.04)) ** 0.25 * (2**0.25 if cautious else 1.0)
    history = walked(WeightDecay(cautious=cautious), make_optimizer, 900, norm)
    _, ratios = history.column("equilibrium_ratio/weight")
    assert ratios[40:].mean() == pytest.approx(1.0, abs=0.03)


# ---- Bad values ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight_decay": -0.1}, r"`weight_decay` must be >= 0 or 'replace', got -0.1"),
        ({"weight_decay": float("nan")}, r"`weight_decay` must be >= 0 or 'replace', got nan"),
        ({"weight_decay": "keep"}, r"`weight_decay` must be >= 0 or 'replace', got 'keep'"),
        ({"rate": "lr^2"}, r"`rate` must be 'lr', 'lr_squared', 'schedule' or 'constant'"),
    ],
)
def test_bad_values_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        WeightDecay(**arguments)


def test_wrs_holds_the_norm_that_the_decay_shrinks_in_between():
    module = make(make_optimizer=adamw)
    fit(module, [WeightDecay(0.4, params=TARGETS), WeightRescaling(4)])
    assert module.net[0].weight.detach().flatten(1).norm(dim=1).tolist() == pytest.approx([1.0] * 4)
