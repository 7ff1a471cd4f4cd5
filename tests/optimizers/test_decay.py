"""Who decays a weight and by how much: told in one place, measured on weights that nothing but the
decay moves."""

from __future__ import annotations

import re
from dataclasses import replace
from math import log
from typing import Any

import doubles
import lightning as L
import pytest
import torch
from models import fit
from torch import Tensor, nn
from walk import Walk, batches, noise

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    NormDynamicsMonitor,
    NormDynError,
    NotSupportedError,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.optimizers.decay import (
    Decay,
    DecayOwner,
    DecayRule,
    applied_decay,
    decay_kind,
    decay_of,
    highest_claim,
    optimizer_decay,
    supports_decay_takeover,
    taken_over_by_trial,
)
from lightning_normdyn.optimizers.facts import TABLE
from lightning_normdyn.optimizers.step import Phase

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
SHAPE = (3, 5)
LR, DECAY = 1e-3, 0.05
MOMENTUM = {"momentum": 0.9}


def weight() -> Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- What an optimizer's own decay acts like ----


@pytest.mark.parametrize(
    ("kind", "options", "factor"),
    [
        (SGD, {}, 1.0),
        (SGD, MOMENTUM, 10.0),
        (SGD, {**MOMENTUM, "nesterov": True}, 10.0),
        (SGD, {**MOMENTUM, "dampening": 0.5}, 5.0),
        (SGD, {"dampening": 0.5}, 1.0),  # torch dampens the momentum buffer only
        (SGD, {"momentum": 0.5, "maximize": True}, 2.0),
        (ADAMW, {}, 1.0),
        (ADAMW, {"amsgrad": True}, 1.0),
        (ADAM, {"decoupled_weight_decay": True}, 1.0),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, 1.0),
    ],
)
def test_a_decay_acts_like_its_decoupled_equivalent(kind: Any, options: Any, factor: float) -> None:
    parameter = nn.Parameter(weight())
    optimizer = kind([parameter], lr=LR, weight_decay=DECAY, **options)
    found = optimizer_decay(optimizer, optimizer.param_groups[0])
    assert found == pytest.approx(factor * DECAY)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(200):  # the buffer fills
        optimizer.step()
    before = parameter.norm().item()
    for _ in range(100):
        optimizer.step()
    assert log(before / parameter.norm().item()) / 100 == pytest.approx(LR * float(found), rel=6e-3)


@pytest.mark.parametrize(
    "kind", [ADAM, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]
)
def test_a_decay_that_the_gradient_divides_has_no_equivalent(kind: Any) -> None:
    optimizer = kind([nn.Parameter(weight())], lr=LR, weight_decay=DECAY)
    assert optimizer_decay(optimizer, optimizer.param_groups[0]) is None
    optimizer.param_groups[0]["weight_decay"] = 0
    assert optimizer_decay(optimizer, optimizer.param_groups[0]) == 0


def test_who_claims_a_decay_and_who_acts_besides() -> None:
    group = {"lr": 0.1, "momentum": 0.0, "dampening": 0, "nesterov": False, "weight_decay": DECAY}
    shrink, kept = (DecayRule(DecayOwner.SHRINK, claims, alpha=0.2) for claims in (True, False))
    projection, rescaling = (
        DecayRule(DecayOwner.PROJECTION, True, "replace", 0.1),
        DecayRule(DecayOwner.RESCALING, True),
    )

    def told(*rules: DecayRule) -> Decay:
        return decay_of(SGD, group, rules, highest_claim(rules))

    assert told() == Decay(None, DECAY)
    assert told(shrink, projection, rescaling) == Decay(DecayOwner.SHRINK, 0.0, 0.2)
    assert told(rescaling, projection) == Decay(DecayOwner.PROJECTION, pytest.approx(0.1 * DECAY))
    assert told(rescaling) == Decay(DecayOwner.RESCALING, 0.0)
    assert told(kept) == Decay(None, DECAY, 0.2)
    assert told(kept, rescaling) == Decay(DecayOwner.RESCALING, 0.0, 0.2)
    assert told(kept).doubled
    assert not told(shrink).doubled
    # Somebody has claimed it whose rule nobody knows.
    assert decay_of(SGD, group, [kept], DecayOwner.PROJECTION).rate is None
    assert decay_of(SGD, group, [kept, kept], None).rate is None


@pytest.mark.parametrize(
    ("pace", "rate", "per_step"),
    [("lr", 0.2, 0.0), ("lr_squared", 0.05, 0.0), ("schedule", 0.5, 0.0), ("constant", 0.0, 0.2)],
)
def test_a_decay_of_another_pace_in_one_step(pace: Any, rate: float, per_step: float) -> None:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 0.2}
    rule = DecayRule(DecayOwner.WEIGHT_DECAY, True, "as_written", pace=pace, lr_max=0.4)
    found = decay_of(SGD, group, [rule], DecayOwner.WEIGHT_DECAY)
    assert found == Decay(DecayOwner.WEIGHT_DECAY, pytest.approx(rate), per_step=per_step)
    assert rule.equivalent(SGD, group) == pytest.approx(rate or per_step / 0.1)
    # At rest only what does not ask for the rate goes on.
    at_rest = decay_of(SGD, {**group, "lr": 0.0}, [rule], DecayOwner.WEIGHT_DECAY)
    assert at_rest.per_step == per_step
    assert at_rest.rate is not None
    # Of a cautious one nobody knows how much of a vector it takes.
    cautious = replace(rule, cautious=True)
    assert decay_of(SGD, group, [cautious], DecayOwner.WEIGHT_DECAY).rate is None


# ---- What a record holds ----


class Norms(L.Callback):
    """The norms before the first and after every step."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.seen = [pl_module.weight.detach().norm(dim=1)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(pl_module.weight.detach().norm(dim=1))


def plain(p: Any) -> Any:
    return SGD(p, lr=0.1, weight_decay=DECAY)


def decoupled(p: Any) -> Any:
    return ADAMW(p, lr=0.1, weight_decay=DECAY)


def recorded(
    make_optimizer: Any, callbacks: Any, steps: int = 4, scale: float = 0.0, **arguments: Any
) -> tuple[Any, Tensor]:
    """The shares in the history, and those that the weights really lost, ``(steps, vectors)``
    each."""
    monitor, norms = NormDynamicsMonitor(1, per_vector=True, tables=False), Norms()
    data = batches([scale * n for n in noise(steps, SHAPE)])
    fit(
        Walk(weight(), make_optimizer),
        [monitor, norms, *callbacks],
        data,
        max_epochs=1,
        **arguments,
    )
    lengths = torch.stack(norms.seen)
    shares = torch.from_numpy(monitor.history.vectors("decay/weight")[1]).double()
    return shares, 1 - lengths[1:] / lengths[:-1]


FAR = 1000


@pytest.mark.sampled(20)
@pytest.mark.parametrize("make_optimizer", [plain, decoupled], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [lambda: AdaptiveWeightShrink(0.2)],
        [lambda: AdaptiveWeightShrink(0.2, weight_decay="keep")],
        [RadialProjection],
        [lambda: RadialProjection(weight_decay=0.3)],
        [lambda: RadialProjection(weight_decay_ratio=1.0)],
        [lambda: WeightRescaling(FAR)],
        [lambda: WeightRescaling(FAR, weight_decay="keep")],
        [lambda: WeightRescaling(FAR, start_epoch=1)],
        [lambda: WeightRescaling(FAR), RadialProjection],
        [lambda: AdaptiveWeightShrink(0.2), RadialProjection, lambda: WeightRescaling(FAR)],
        [lambda: AdaptiveWeightShrink(0.2, weight_decay="keep"), RadialProjection],
        [lambda: AdaptiveWeightShrink(0.2, weight_decay="keep"), lambda: WeightRescaling(FAR)],
    ],
    ids=[
        "none",
        "aws",
        "aws keep",
        "projection",
        "projection own",
        "projection whole",
        "wrs",
        "wrs keep",
        "wrs later",
        "wrs projection",
        "aws projection wrs",
        "aws keep projection",
        "aws keep wrs",
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_record_holds_what_the_weights_lost(
    make_optimizer: Any, callbacks: Any, order: int
) -> None:
    """Without a gradient nothing but the decay moves them."""
    shares, lost = recorded(make_optimizer, [make() for make in callbacks][::order])
    assert torch.allclose(shares, lost, rtol=1e-5, atol=1e-12)


def test_under_momentum_a_record_holds_what_the_decay_acts_like() -> None:
    def optimizer(p: Any) -> Any:
        return SGD(p, lr=0.002, momentum=0.9, weight_decay=DECAY)

    shares, lost = recorded(optimizer, [], steps=100)
    assert torch.allclose(shares, torch.full_like(shares, 0.002 * 10 * DECAY), rtol=1e-6)
    assert torch.allclose(shares[-1], lost[-1], rtol=0.02)
    shares, lost = recorded(optimizer, [RadialProjection(weight_decay_ratio=1.0)])
    assert torch.allclose(shares, torch.full_like(shares, 0.002 * 10 * DECAY), rtol=1e-6)
    assert torch.allclose(shares, lost, rtol=1e-5)
    shares, lost = recorded(optimizer, [RadialProjection()])
    assert torch.allclose(shares, lost, rtol=1e-5)


@pytest.mark.parametrize(("delta", "ratio"), [(1e9, 0.1), (1e-30, 1.0)], ids=["open", "closed"])
def test_a_gate_decides_which_decay_is_recorded(delta: float, ratio: float) -> None:
    shares, lost = recorded(plain, [RadialProjection(gate="cosine", delta=delta)], scale=1e-7)
    assert torch.allclose(shares, torch.full_like(shares, 0.1 * DECAY * ratio), rtol=1e-6)
    assert torch.allclose(shares, lost, rtol=1e-4)


class PullingWorker(Worker[Any]):
    def __init__(self, part: Any, plan: Any) -> None:
        super().__init__(part, plan)
        self.claim_decay(DecayOwner.SHRINK)

    @during(Phase.SHRINK)
    def pull(self, step: Any) -> None:
        pass


class Pulls(NormDynCallback):
    """Takes the decay over and says nothing about what it does instead."""

    worker = PullingWorker


@pytest.mark.parametrize(
    ("make_optimizer", "callbacks"),
    [
        (lambda p: ADAM(p, lr=0.1, weight_decay=DECAY), []),
        (plain, [Pulls]),
        (plain, [lambda: AdaptiveWeightShrink(0.2, granularity="layer")]),
    ],
    ids=["coupled Adam", "a rule of somebody else", "by the size of other vectors"],
)
def test_what_nobody_can_tell_is_recorded_as_such_and_not_replayed(
    make_optimizer: Any, callbacks: Any, tmp_path: Any
) -> None:
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    fit(
        Walk(weight(), make_optimizer),
        [monitor, *(make() for make in callbacks)],
        batches(noise(3, SHAPE)),
        max_epochs=1,
    )
    shares = torch.from_numpy(monitor.history.vectors("decay/weight")[1])
    assert shares.isnan().all()
    monitor.history.save(tmp_path / "history.npz")
    with pytest.raises(NormDynError, match="holds no decay for `weight`"):
        fit(
            Walk(weight(), plain),
            [EffectiveLRReplay(tmp_path / "history.npz")],
            batches(noise(3, SHAPE)),
            max_epochs=1,
        )


def test_a_replay_beside_a_rule_of_somebody_else_is_refused_by_name(tmp_path: Any) -> None:
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    fit(Walk(weight(), plain), [monitor], batches(noise(3, SHAPE)), max_epochs=1)
    monitor.history.save(tmp_path / "history.npz")
    callbacks = [EffectiveLRReplay(tmp_path / "history.npz"), Pulls()]
    with pytest.raises(NotSupportedError, match="nobody can tell that of `weight`"):
        fit(Walk(weight(), plain), callbacks, batches(noise(3, SHAPE)), max_epochs=1)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "kind"),
    [
        (torch.optim.SGD, {"lr": 0.1}, "coupled"),
        (torch.optim.Adam, {}, "coupled"),
        (torch.optim.AdamW, {}, "decoupled"),
        (torch.optim.NAdam, {}, "coupled"),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, "decoupled"),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, "decoupled"),
        (torch.optim.Adamax, {}, "coupled"),
        (torch.optim.RMSprop, {}, "coupled"),
        (torch.optim.Adagrad, {}, "coupled"),
        (torch.optim.Adadelta, {}, "coupled"),
        (torch.optim.ASGD, {}, "coupled"),
        (torch.optim.Adafactor, {}, "decoupled"),
        *([(torch.optim.Muon, {}, "decoupled")] if hasattr(torch.optim, "Muon") else []),
    ],
)
def test_decay_kind_is_what_a_step_without_gradient_does(optimizer_class, options, kind):
    weight = nn.Parameter(torch.tensor([[1.0, 100.0]], dtype=torch.float64))
    optimizer = optimizer_class([weight], weight_decay=0.1, **options)
    assert decay_kind(optimizer, optimizer.param_groups[0]) == kind
    if optimizer_class in (torch.optim.SGD, torch.optim.ASGD):
        return  # without momentum, SGD's two kinds are one
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    both = weight.detach() / torch.tensor([[1.0, 100.0]], dtype=torch.float64)
    # decoupled: one factor for all entries; coupled and then normalized: the same step for all
    # entries
    assert torch.allclose(both[0, 0], both[0, 1], rtol=1e-9) == (kind == "decoupled")


def test_decay_kind_of_the_unknown_is_none():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

        def step(self, closure=None):
            return None

    own = Own([nn.Parameter(torch.randn(2, 2))])
    assert decay_kind(own, own.param_groups[0]) is None
    rprop = torch.optim.Rprop([nn.Parameter(torch.randn(2, 2))])
    assert decay_kind(rprop, rprop.param_groups[0]) is None
    assert "changes nothing" in supports_decay_takeover(own)


def test_decay_takeover_survives_the_wrappers_that_torch_puts_around_step():
    weight = nn.Parameter(torch.randn(2, 2))
    for row in TABLE:
        if row.known_class is not None:
            assert supports_decay_takeover(row.known_class([weight], lr=0.1)) is None
    optimizer = torch.optim.SGD([weight], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert supports_decay_takeover(optimizer) is None


def test_decay_takeover_rests_on_a_trial_where_the_step_is_not_torchs():
    weight = nn.Parameter(torch.randn(2, 2))
    known = torch.optim.AdamW([weight], weight_decay=0.1)
    assert not taken_over_by_trial(known)
    assert not taken_over_by_trial(
        doubles.LoggingSGD([weight], lr=0.1, weight_decay=0.1)
    )  # shown to step as SGD
    assert taken_over_by_trial(doubles.Options([weight], weight_decay=0.1))
    cached = doubles.CachesDecay([weight], weight_decay=0.1)
    assert re.search(
        "of CachesDecay it is not known how it decays: .*changes nothing",
        supports_decay_takeover(cached),
    )


def test_a_fixed_decay_is_applied_as_it_acts():
    own = weight()
    optimizer = doubles.Lion([own], lr=0.1, weight_decay=0.01, fixed_decay=True)
    assert applied_decay(optimizer, optimizer.param_groups[0], own).factor == pytest.approx(0.99)
    assert (
        optimizer_decay(optimizer, optimizer.param_groups[0]) is None
    )  # not in proportion to the rate
    optimizer.param_groups[0]["fixed_decay"] = False  # an option that changes is looked at again
    assert applied_decay(optimizer, optimizer.param_groups[0], own).factor == pytest.approx(0.999)
