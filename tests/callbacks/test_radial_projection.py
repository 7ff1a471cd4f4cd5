"""Radial projection against SGDP and AdamP as their papers have them, and against the statements
that they rest on."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import reference
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import (
    TARGETS,
    Net,
    SavesAt,
    against_paper,
    convnet,
    distance,
    fit,
    gradients,
    loader,
    make,
    same,
    weights_of,
)
from reference import Project, Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
)
from lightning_normdyn.callbacks import radial_projection
from lightning_normdyn.optimizers.step import Snapshots


def matrices_only(norm):
    """No parameter of one dimension: SGDP decays those decoupled, torch's SGD does not."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 2, bias=False),
    )  # fmt: skip


NETS = {
    "batch norm": partial(matrices_only, lambda c: nn.BatchNorm2d(c, affine=False)),
    "one group": partial(matrices_only, lambda c: nn.GroupNorm(1, c, affine=False)),
    "no norm": partial(matrices_only, lambda c: nn.Identity()),
}
# Which network, which threshold, and what the gate must then have said of its weights. The head of
# each is not scale-invariant, and the filters in front of a GroupNorm of one group are orthogonal
# to their gradients only together.
GATES = {
    "filter and closed": ("batch norm", 0.1, {"filter", None}),
    "layer and closed": ("one group", 0.1, {"layer", None}),
    "closed": ("no norm", 0.001, {None}),
    "open to everything": ("no norm", 1000.0, {"filter"}),
}


def both(monkeypatch, make_optimizer, algorithm, gate, steps=8, **options):
    """Final weights of a Trainer with the callback, of the paper's algorithm, and what the paper's
    gate said on the way."""
    net, delta, _ = GATES[gate]
    module, other = (make(make_optimizer=make_optimizer, net=seeded(NETS[net])) for _ in range(2))
    fit(module, [RadialProjection(gate="cosine", delta=delta)], max_steps=steps, max_epochs=-1)
    original, views = reference.open_gate, set()
    monkeypatch.setattr(
        reference, "open_gate", lambda w, g, d: views.add(found := original(w, g, d)) or found
    )
    expected = algorithm(
        weights_of(other), gradients(other, list(loader())), steps=steps, delta=delta, **options
    )[-1]
    return weights_of(module), expected, views


def seeded(net):
    torch.manual_seed(1)
    return net()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"dampening": 0.5}],
    ids=["heavy ball", "nesterov", "dampening"],
)
@pytest.mark.parametrize("gate", GATES)
def test_sgd_with_the_gate_is_sgdp(monkeypatch, gate, options):
    def make_optimizer(p):
        return torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, **options)

    got, expected, views = both(
        monkeypatch,
        make_optimizer,
        reference.sgdp,
        gate,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        **options,
    )
    assert views >= GATES[gate][2]
    assert distance(got, expected) <= 1e-12


@pytest.mark.parametrize("gate", GATES)
def test_adamw_with_the_gate_is_adamp(monkeypatch, gate):
    def make_optimizer(p):
        return torch.optim.AdamW(p, lr=0.02, weight_decay=0.5)

    got, expected, views = both(
        monkeypatch, make_optimizer, reference.adamp, gate, lr=0.02, weight_decay=0.5
    )
    assert views >= GATES[gate][2]
    assert distance(got, expected) <= 1e-12


@pytest.mark.sampled(5)
@pytest.mark.parametrize("gate", ["always", "cosine"])
@pytest.mark.parametrize(
    ("make_optimizer", "optimizer", "lr"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), reference.SGD(weight_decay=0.1), 0.1),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
            reference.SGD(0.9, weight_decay=0.1),
            0.1,
        ),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
            reference.SGD(0.9, nesterov=True),
            0.1,
        ),
        (lambda p: torch.optim.Adam(p, 0.02), reference.Adam(), 0.02),
        (
            lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.5),
            reference.AdamW(weight_decay=0.5),
            0.02,
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw"],
)
def test_projects_the_step_of_any_optimizer(make_optimizer, optimizer, lr, gate):
    targets = TARGETS if gate == "always" else [*TARGETS, "net.8.weight"]
    callback, rules = RadialProjection(gate=gate), {"project": Project(gate)}
    assert (
        distance(
            *against_paper(
                [callback], make_optimizer, optimizer, lr=lr, targets=targets, rules=rules
            )
        )
        <= 1e-12
    )
    got, expected = against_paper(
        [RadialProjection(gate=gate)],
        make_optimizer,
        optimizer,
        lr=lr,
        targets=targets,
        rules=rules,
        dtype=torch.float32,
        steps=4,
    )
    assert distance(got, expected) <= 1e-6


class Schedule(torch.optim.lr_scheduler.LRScheduler):
    """Changes momentum, and learning rate, from step to step; at times there is no momentum at
    all."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["momentum"] = (0.9, 0.0, 0.5, 0.95)[self.last_epoch % 4]
        return [base * (1 - 0.1 * (self.last_epoch % 3)) for base in self.base_lrs]


class OwnStep(torch.optim.SGD):
    """Steps twice as far as SGD does."""

    @torch.no_grad()
    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in weights]
        loss = super().step(closure)
        for p, b in zip(weights, before, strict=True):
            p.add_(p - b)
        return loss


class Skips(Net):
    """Its first layer gets a gradient in every second step only."""

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.global_step % 2 == 1:
            self.net[0].weight.grad = None


def final_and_copies(monkeypatch, model=Net, plugins=(), **arguments):
    """The weights after eight projected steps, and in which of these the weights were copied."""
    taken, take = [], Snapshots.take_snapshots
    with monkeypatch.context() as patch:
        patch.setattr(
            Snapshots,
            "take_snapshots",
            lambda self: taken.append(bool(self._requests)) or take(self),
        )
        module = make(model, **arguments)
        fit(module, [RadialProjection()], plugins=list(plugins))
    return weights_of(module), taken


def test_a_buffer_that_a_skipped_update_never_filled_is_not_looked_at(monkeypatch):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("inf") if self.trainer.current_epoch + batch_idx == 0 else 1.0
            )

    # torch reads that buffer in the next step, with whatever the memory holds: here it holds zeros.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    got, copied = final_and_copies(
        monkeypatch,
        Overflows,
        [MixedPrecision("16-mixed", "cpu", scaler)],
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        dtype=torch.float32,
    )
    assert all(copied)
    assert len(copied) == 8
    assert all(w.isfinite().all() for w in got.values())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"fused": True}, {}),
        ({"foreach": True}, {}),
        ({"maximize": True, "lr": 1e-3}, {}),
        ({"dampening": 0.5}, {}),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, {}),
        ({}, {"make_scheduler": Schedule}),
        ({}, {"model": Skips}),
    ],
    ids=[
        "plain",
        "fused",
        "foreach",
        "maximize",
        "dampening",
        "lr tensor",
        "schedule",
        "no gradient",
    ],
)
def test_the_momentum_buffer_tells_as_much_as_a_copy_of_the_weights(
    monkeypatch, options, arguments
):
    def make_optimizer(p):
        return torch.optim.SGD(p, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options})

    got, copied = final_and_copies(monkeypatch, make_optimizer=make_optimizer, **arguments)
    # Copies until it is known how long steps are, and where the schedule took the momentum away.
    if "make_scheduler" in arguments:
        assert copied == [True, True, True, False, False, True, False, False]
    else:
        assert copied == [True] * 2 + [False] * 6
    monkeypatch.setattr(radial_projection, "step_buffer", lambda optimizer, group: None)
    expected, copied = final_and_copies(monkeypatch, make_optimizer=make_optimizer, **arguments)
    assert all(copied)
    assert distance(got, expected) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lr", [1e2, 1e4, 1e6])
def test_steps_that_are_far_longer_than_weights(monkeypatch, lr, dtype):
    """What rounding has left of a weight beside such a step tells nothing of it: a copy must."""
    copied, take = [], Snapshots.take_snapshots
    monkeypatch.setattr(
        Snapshots,
        "take_snapshots",
        lambda self: copied.append(bool(self._requests)) or take(self),
    )
    got, expected = against_paper(
        [RadialProjection()],
        lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        reference.SGD(momentum=0.9),
        lr=lr,
        steps=4,
        dtype=dtype,
        rules={"project": Project()},
    )
    assert copied == [True] * 4
    assert distance(got, expected) <= (1e-9 if dtype is torch.float64 else 2e-4)


def test_a_learning_rate_that_jumps_is_told_by_a_copy_at_once(monkeypatch):
    def jump(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 1e4)

    _, copied = final_and_copies(
        monkeypatch,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        make_scheduler=jump,
        dtype=torch.float32,
    )
    assert copied == [True, True, False, False, False, True, True, True]


@pytest.mark.parametrize("lr", [0.1, 100.0])
def test_how_long_steps_were_is_known_after_a_resume(monkeypatch, tmp_path, lr):
    def go(callbacks, **arguments):
        module = make(
            make_optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9), dtype=torch.float32
        )
        same_batch = loader(8, torch.float32)  # Lightning does not fast-forward an ordinary loader
        fit(
            module,
            [RadialProjection(), *callbacks],
            same_batch,
            max_steps=6,
            max_epochs=-1,
            **arguments,
        )
        return weights_of(module)

    copied, take = [], Snapshots.take_snapshots
    monkeypatch.setattr(
        Snapshots,
        "take_snapshots",
        lambda self: copied.append(bool(self._requests)) or take(self),
    )
    for step in range(1, 5):
        straight = go([SavesAt(step, tmp_path / f"{step}.ckpt")])
        copied.clear()
        assert same(go([], ckpt_path=tmp_path / f"{step}.ckpt"), straight)
        assert copied == [lr > 1 or t < 2 for t in range(step, 6)]


def test_a_step_of_its_own_is_told_by_a_copy_of_the_weights(monkeypatch):
    got, copied = final_and_copies(
        monkeypatch, make_optimizer=lambda p: OwnStep(p, lr=0.05, momentum=0.9)
    )
    expected, _ = final_and_copies(
        monkeypatch, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    assert all(copied)
    assert distance(got, expected) <= 1e-13


@pytest.mark.parametrize(
    "make_optimizer",
    [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.02)],
)
def test_a_monitor_changes_no_bit(make_optimizer):
    def final(*others):
        module = make(make_optimizer=make_optimizer, dtype=torch.float32)
        fit(module, [*others, RadialProjection()])
        return weights_of(module)

    expected, got = final(), final(NormDynamicsMonitor(3, tables=False))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_with_aws_over_300_steps():
    # w <- f w - lr Pi_w(step): AWS is the decay, the projection takes the radial part of the rest.
    recorder = Recorder()
    # AWS shortens the weights until an ordinary eps would matter, and they would no longer be
    # scale-invariant.
    norm = partial(nn.BatchNorm2d, eps=1e-12)
    module = make(
        net=seeded(partial(convnet, norm=norm)),
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    )
    fit(
        module,
        [RadialProjection(), AdaptiveWeightShrink(0.1), recorder],
        max_steps=300,
        max_epochs=-1,
    )
    assert len(recorder.steps[0]) == 300
    got = weights_of(module)
    assert distance(got, replay(recorder, TARGETS, shrink=Shrink(0.1), project=Project())) <= 1e-12
    assert distance(got, replay(recorder, TARGETS, shrink=Shrink(0.1))) > 1e-3


@pytest.mark.parametrize("granularity", ["group", "layer"])
def test_vectors_larger_than_a_filter(granularity):
    recorder, groups = Recorder(), {"group": 2, "layer": 1}[granularity]
    module = make(
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        net=seeded(partial(convnet, norm=lambda c: nn.GroupNorm(2, c))),
    )
    fit(module, [RadialProjection(granularity=granularity), recorder], max_steps=1)
    for name in TARGETS:
        w, g = recorder.start[name], recorder.steps[0][0][name][0]
        parts = zip(w.chunk(groups), g.chunk(groups), strict=True)
        expected = torch.cat([a - 0.1 * (b - (a * b).sum() / (a * a).sum() * a) for a, b in parts])
        torch.testing.assert_close(weights_of(module)[name], expected, rtol=1e-13, atol=1e-15)


# ---- What it is for ----


def norms(weights):
    return torch.cat([weights[name].flatten(1).norm(dim=1) for name in TARGETS])


class EachStep(Recorder):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trajectory = [*getattr(self, "trajectory", [self.start]), weights_of(pl_module)]


def test_norms_grow_by_the_projected_step_only():
    """SGDP, lemma 2.1: ‖w'‖² = ‖w‖² + ‖Π(Δ)‖²; with momentum and no projection it is more."""
    look = EachStep()
    module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    fit(module, [RadialProjection(), look])
    for before, after in itertools.pairwise(look.trajectory):
        step = norms({name: after[name] - before[name] for name in TARGETS})
        torch.testing.assert_close(
            norms(after) ** 2, norms(before) ** 2 + step**2, rtol=1e-13, atol=0
        )
    free = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    fit(free, [])
    assert (norms(weights_of(free)) > norms(weights_of(module))).all()


def test_projecting_does_not_erase_weight_decay():
    runs = {}
    for decay in (0.0, 0.5):
        module = make(
            make_optimizer=lambda p, decay=decay: torch.optim.SGD(
                p, lr=0.1, momentum=0.9, weight_decay=decay
            )
        )
        fit(module, [RadialProjection(weight_decay_ratio=1.0)], max_steps=20, max_epochs=-1)
        runs[decay] = norms(weights_of(module))
    assert (runs[0.5] < 0.5 * runs[0.0]).all()


# ---- Whose decay, and how much ----


@pytest.mark.parametrize(
    ("given", "optimizer_decay", "rule"),
    [
        ({"weight_decay": 0.3}, 0.0, Project(weight_decay=0.3)),
        (
            {"weight_decay": 0.3},
            0.2,
            Project(weight_decay=0.3),
        ),  # instead of the optimizer's, not on top of it
        ({"weight_decay": 0.0}, 0.2, Project(weight_decay=0.0)),
        ({"weight_decay_ratio": 1.0}, 0.2, Project(weight_decay_ratio=1.0)),
        ({"weight_decay_ratio": 0.0}, 0.2, Project(weight_decay_ratio=0.0)),
    ],
)
def test_decay_of_its_own(given, optimizer_decay, rule):
    def make_optimizer(p):
        return torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=optimizer_decay)

    optimizer = reference.SGD(0.5, weight_decay=optimizer_decay)
    assert (
        distance(
            *against_paper(
                [RadialProjection(**given)],
                make_optimizer,
                optimizer,
                lr=0.1,
                rules={"project": rule},
            )
        )
        <= 1e-12
    )


def test_a_number_serves_optimizers_whose_decay_has_no_decoupled_equivalent():
    def make_optimizer(p):
        return torch.optim.Adam(p, lr=0.02, weight_decay=0.5)

    module = make(make_optimizer=make_optimizer)
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError,
        match=r"cannot turn the coupled weight decay 0\.5 of Adam .*Give a number",
    ):
        fit(module, [RadialProjection()])
    assert same(weights_of(module), before)
    rules = {"project": Project(weight_decay=0.3)}
    got = against_paper(
        [RadialProjection(weight_decay=0.3)],
        make_optimizer,
        reference.Adam(weight_decay=0.5),
        lr=0.02,
        rules=rules,
    )
    assert distance(*got) <= 1e-12


def test_adam_with_the_flag_of_adamw_is_decoupled():
    def make_optimizer(p):
        return torch.optim.Adam(p, lr=0.02, weight_decay=0.5, decoupled_weight_decay=True)

    got = against_paper(
        [RadialProjection()],
        make_optimizer,
        reference.AdamW(weight_decay=0.5),
        lr=0.02,
        rules={"project": Project()},
    )
    assert distance(*got) <= 1e-12


def test_a_coupled_decay_is_refused_before_the_first_step_of_named_weights():
    class Untouched(Net):
        def training_step(self, batch, batch_idx=0):
            raise AssertionError("a training step was run")

    module = make(
        Untouched, make_optimizer=lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1)
    )
    with pytest.raises(
        NotSupportedError, match=r"cannot turn the coupled weight decay 0\.1 of RMSprop"
    ):
        fit(module, [RadialProjection(params="net.0.weight")])


# ---- Edges ----


@pytest.mark.parametrize("gate", ["always", "cosine"])
def test_a_zero_filter_is_stepped_as_if_nobody_projected(gate):
    module, recorder = (
        make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
        Recorder(),
    )
    with torch.no_grad():
        module.net[0].weight[1] = 0
    fit(module, [RadialProjection(gate=gate), recorder], max_steps=1)
    g = recorder.steps[0][0]["net.0.weight"][0]
    torch.testing.assert_close(weights_of(module)["net.0.weight"][1], -0.1 * g[1])
    assert all(w.isfinite().all() for w in weights_of(module).values())


def test_a_gradient_that_is_not_finite_closes_the_gate():
    # |cos| < delta is false for NaN, so nothing of the tensor is projected; and no other tensor is
    # touched.
    module, recorder = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), Recorder()
    module.net[3].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), float("nan")))
    fit(module, [RadialProjection(gate="cosine", delta=100.0), recorder], max_steps=1)
    w, g = recorder.start["net.3.weight"], recorder.steps[0][0]["net.3.weight"][0]
    finite = [0, 1, 3, 4, 5]
    torch.testing.assert_close(
        weights_of(module)["net.3.weight"][finite], (w - 0.1 * g)[finite], rtol=0, atol=1e-15
    )
    assert (
        distance(
            {"a": weights_of(module)["net.0.weight"]},
            {"a": replay(recorder, TARGETS, project=Project())["net.0.weight"]},
        )
        < 1e-12
    )


def test_weights_that_are_not_finite_are_left_alone_and_named():
    module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    module.net[3].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([2]), float("nan")))
    with pytest.warns(
        NormDynWarning,
        match=r"RadialProjection left vectors alone .* not finite: 1 in net\.3\.weight\.$",
    ):
        fit(module, [RadialProjection()], max_steps=1)


def test_a_weight_without_a_gradient_keeps_its_decay_to_itself():
    class HeadOnly(Net):
        def forward(self, x):
            if self.trainer.global_step == 0:
                return self.net(x)
            with torch.no_grad():
                x = self.net[:3](x)
            return self.net[3:](x)

    look, module = (
        EachStep(),
        make(HeadOnly, make_optimizer=lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3)),
    )
    fit(module, [RadialProjection(), look])
    assert torch.equal(look.trajectory[1]["net.0.weight"], look.trajectory[-1]["net.0.weight"])
    assert distance(weights_of(module), replay(look, TARGETS, project=Project())) < 1e-12


def test_the_gate_takes_every_matrix_and_always_only_what_is_scale_invariant():
    always, gated = RadialProjection(), RadialProjection(gate="cosine")
    for callback in (always, gated):
        fit(make(), [callback], max_steps=1)
    assert [t.name for t in always.plans[0].targets] == TARGETS
    assert [t.name for t in gated.plans[0].targets] == [*TARGETS, "net.8.weight"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gate": "sometimes"}, "`gate` must be 'always' or 'cosine', got 'sometimes'"),
        ({"delta": 0.0}, "`delta` must be > 0, got 0.0"),
        ({"delta": float("nan")}, "`delta` must be > 0, got nan"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0 or 'replace', got -0.1"),
        ({"weight_decay": "keep"}, "`weight_decay` must be >= 0 or 'replace', got 'keep'"),
        ({"weight_decay_ratio": -1}, "`weight_decay_ratio` must be >= 0, got -1"),
        ({"gate": "cosine", "granularity": "layer"}, "gate='cosine' brings its own granularity"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        RadialProjection(**arguments)


@pytest.mark.parametrize(
    ("callback", "others", "says"),
    [
        (
            lambda: RadialProjection(),
            [],
            "projected, decay 0.005 (replaces 0.005, acting like 0.05)",
        ),
        (
            lambda: RadialProjection(weight_decay=0.2),
            [],
            "projected, decay 0.02 (replaces 0.005, acting like 0.05)",
        ),
        (lambda: RadialProjection(), [lambda: AdaptiveWeightShrink(0.1)], "projected"),
        (lambda: RadialProjection(weight_decay_ratio=0.0), [], "projected"),
    ],
)
def test_the_tables_say_which_decay_it_applies_in_whose_place(callback, others, says):
    projection = callback()
    module = make(
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.005)
    )
    fit(module, [projection, *(other() for other in others)], max_steps=1)
    assert projection.member.treatments(0)[0] == says


# ---- Steps that are far longer than their weights ----


@pytest.mark.parametrize("ratio", [1e0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_longer_than_their_weights_are_projected_as_the_rule_says(ratio, dtype):
    """The momentum buffer tells w only as now - step, which loses digits; a copy does not."""
    recorder = Recorder()
    module = make(
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1 * ratio, momentum=0.9), dtype=dtype
    )
    fit(module, [RadialProjection(), recorder], max_steps=8, max_epochs=-1)
    expected = replay(recorder, TARGETS, project=Project())
    got = weights_of(module)
    for name in TARGETS:
        error = (got[name].double() - expected[name].double()).norm() / expected[
            name
        ].double().norm()
        assert float(error) < (1e-9 if dtype == torch.float64 else 1e-4)


def test_long_steps_are_told_by_copies_from_then_on():
    callback = RadialProjection()
    module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=1e3, momentum=0.9))
    fit(module, [callback], max_steps=8, max_epochs=-1)
    assert callback.member.workers[0].has_long_steps
    short = RadialProjection()
    fit(
        make(make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
        [short],
        max_steps=8,
        max_epochs=-1,
    )
    assert not short.member.workers[0].has_long_steps
