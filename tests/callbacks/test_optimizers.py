"""Every callback under optimizers that torch does not have: right by the rule in float64, or
refused by name."""

from __future__ import annotations

import doubles
import lightning as L
import numpy as np
import pytest
import torch
from models import TARGETS, Net, fit, make, same, weights_of

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.theory.equilibrium import equilibrium_angular_update


class Watch(L.Callback):
    """Weights and gradients right before each step, and weights at the end."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.before.append(weights_of(pl_module))
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


def norms(w):
    return w.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1))


def rate_of(kind, step, w):
    """The rate of 0-based ``step``, by what each double says of itself."""
    if kind is doubles.Prodigy:
        return 1e-2 * 1.25**step * 2.0
    if kind is doubles.RelativeStep:
        return min(1e-2, (step + 1) ** -0.5) * max(1e-3, float(w.norm()) / w.numel() ** 0.5)
    return 0.05


CASES = {
    "d·lr": (doubles.Prodigy, {"lr": 2.0, "weight_decay": 0.1}),
    "relative step": (doubles.RelativeStep, {"weight_decay": 0.1}),
    "an unknown class": (doubles.Plain, {"lr": 0.05, "weight_decay": 0.1}),
    "modes": (doubles.HasModes, {"lr": 0.05, "weight_decay": 0.1}),
    "numbers in the state": (doubles.Counting, {"lr": 0.05, "weight_decay": 0.1}),
    "numpy": (doubles.Plain, {"lr": np.float32(0.05), "weight_decay": np.float32(0.1)}),
    "tensor": (
        doubles.Plain,
        {
            "lr": torch.tensor(0.05, dtype=torch.float64),
            "weight_decay": torch.tensor(0.1, dtype=torch.float64),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_aws_shrinks_at_the_rate_of_the_step_and_takes_its_decay_over(name, capsys):
    kind, options = CASES[name]
    watch, alpha = Watch(), 0.5
    fit(make(make_optimizer=lambda p: kind(p, **options)), [AdaptiveWeightShrink(alpha), watch])
    for step, (before, gradients) in enumerate(
        zip(watch.before[:-1], watch.gradients, strict=False)
    ):
        for target in TARGETS:
            w = before[target]
            shrink_rate = rate_of(kind, step, w)
            shrunk = w * (1 - shrink_rate * alpha * norms(w))
            expected = shrunk - rate_of(kind, step, shrunk) * gradients[target]
            torch.testing.assert_close(
                watch.before[step + 1][target],
                expected,
                rtol=1e-6 if name == "numpy" else 1e-12,
                atol=1e-12,
            )
    assert len(watch.before) == 8
    assert "as a trial showed to be exact" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["d·lr", "relative step", "an unknown class", "numpy", "tensor"])
def test_the_monitor_divides_the_rate_of_the_step_by_the_norm(name):
    kind, options = CASES[name]
    watch, monitor = Watch(), NormDynamicsMonitor(1)
    fit(make(make_optimizer=lambda p: kind(p, **options)), [watch, monitor])
    for step, (row, before) in enumerate(zip(monitor.history, watch.before, strict=True)):
        w = before[TARGETS[0]]
        expected = (rate_of(kind, step, w) / norms(w)).mean()
        assert row[f"effective_lr/{TARGETS[0]}"] == pytest.approx(float(expected), rel=1e-6)


def test_projection_decays_at_the_rate_of_the_step():
    watch = Watch()
    fit(
        make(make_optimizer=lambda p: doubles.Prodigy(p, lr=2.0)),
        [RadialProjection(weight_decay=0.5, weight_decay_ratio=1.0), watch],
    )
    for step, (before, gradients) in enumerate(
        zip(watch.before[:-1], watch.gradients, strict=False)
    ):
        w, rate = before[TARGETS[0]], rate_of(doubles.Prodigy, step, None)
        g = gradients[TARGETS[0]]
        across = g - (g * w).flatten(1).sum(1).view(-1, 1, 1, 1) / norms(w) ** 2 * w
        torch.testing.assert_close(
            watch.before[step + 1][TARGETS[0]],
            w * (1 - 0.5 * rate) - rate * across,
            rtol=1e-12,
            atol=1e-12,
        )


WRITERS = {
    "aws": lambda: AdaptiveWeightShrink(0.5),
    "wrs": lambda: WeightRescaling(3),
    "wrs, state kept": lambda: WeightRescaling(3, optimizer_state="keep"),
    "projection": lambda: RadialProjection(),
    "gated projection": lambda: RadialProjection(gate="cosine"),
    "lr drop": lambda: LRDropRescaling(exponent=0.5),
}
SETS_BACK = {"slow copy": doubles.SlowCopy, "dual averaging": doubles.DualAveraging}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", SETS_BACK)
def test_writers_are_refused_where_the_optimizer_sets_weights_back(name, writer):
    kind = SETS_BACK[name]
    module = make(make_optimizer=kind)
    before = weights_of(module)
    with pytest.raises(NotSupportedError, match=kind.__name__):
        fit(module, [WRITERS[writer]()])
    assert same(weights_of(module), before)  # before the first step


@pytest.mark.parametrize("name", SETS_BACK)
def test_what_sets_weights_back_is_measured(name):
    monitor = NormDynamicsMonitor(1)
    fit(make(make_optimizer=SETS_BACK[name]), [monitor])
    assert len(monitor.history) == 8


@pytest.mark.parametrize("writer", ["aws", "projection", "gated projection"])
def test_where_nobody_can_tell_the_rate_writers_are_refused(writer):
    with pytest.raises(NotSupportedError, match=r"NoRate applies in each step.*cannot be told"):
        fit(make(make_optimizer=lambda p: doubles.NoRate(p, lr=None)), [WRITERS[writer]()])


@pytest.mark.parametrize("options", [{}, {"lr": None}])
def test_where_nobody_can_tell_the_rate_the_monitor_says_so_and_measures_the_rest(options):
    monitor = NormDynamicsMonitor(1)
    with pytest.warns(
        NormDynWarning,
        match=r"NoRate applies in its next step cannot be told.*effective_lr.*left out",
    ):
        fit(make(make_optimizer=lambda p: doubles.NoRate(p, **options)), [monitor])
    assert len(monitor.history) == 8
    keys = set(monitor.history.keys())
    assert f"angular_update/{TARGETS[0]}" in keys
    assert not any(
        key.startswith(("effective_lr", "direction_lr", "equilibrium")) or "/effective_lr" in key
        for key in keys
    )


def test_schedule_free_is_refused_for_the_monitor_as_well():
    with pytest.raises(NotSupportedError, match=r"ScheduleFree keeps a second copy"):
        fit(make(make_optimizer=doubles.ScheduleFree), [NormDynamicsMonitor()])


class LateCopy(doubles.WantsClosure):
    """Cannot be tried without a loss; its slow copy is there after the first step only."""

    def update(self, p, g, group, state):
        super().update(p, g, group, state)
        state.setdefault("slow_buffer", p.clone())


@pytest.mark.parametrize("writer", ["aws", "wrs, state kept", "projection"])
def test_state_that_appears_in_the_first_step_is_looked_at_then(writer):
    module = make(make_optimizer=LateCopy)
    with pytest.raises(
        NotSupportedError, match=r"LateCopy keeps a second copy of the weights \(`slow_buffer`\)"
    ):
        fit(module, [WRITERS[writer]()])


class LateBuffer(torch.optim.SGD):
    """Steps as SGD in a trial, and keeps one more buffer once a real one."""

    def step(self, closure=None):
        loss = super().step(closure)
        if closure is not None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["extra"] = torch.zeros_like(p)
        return loss


def test_a_buffer_that_appears_in_the_first_step_is_refused_by_the_end_of_it():
    with pytest.raises(NotSupportedError, match=r"LateBuffer.*\['extra'\]"):
        fit(
            make(make_optimizer=lambda p: LateBuffer(p, lr=0.1, momentum=0.9)), [WeightRescaling(5)]
        )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("writer", ["aws", "projection", "wrs", "lr drop"])
def test_a_schedule_over_numpy_numbers(writer):
    factors = np.linspace(1.0, 0.1, 20, dtype=np.float32)
    runs = []
    for number in (float, np.float32):

        def scheduler(optimizer, number=number):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: number(factors[step]))

        module = make(
            make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
            make_scheduler=scheduler,
            dtype=torch.float32,
        )
        monitor = NormDynamicsMonitor(1)
        fit(module, [WRITERS[writer](), monitor])
        runs.append(
            (weights_of(module), [row[f"effective_lr/{TARGETS[0]}"] for row in monitor.history])
        )
    for name, w in runs[0][0].items():
        torch.testing.assert_close(w, runs[1][0][name], rtol=1e-5, atol=1e-6)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4)


def test_a_logging_subclass_is_predicted_and_rescaled_as_its_base():
    monitor = NormDynamicsMonitor(1)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    fit(make(make_optimizer=lambda p: doubles.LoggingSGD(p, **options)), [monitor])
    row = list(monitor.history)[-1]
    group = torch.optim.SGD([torch.zeros(1)], **options).param_groups[0]
    assert row[f"equilibrium_angular_update/{TARGETS[0]}"] == pytest.approx(
        equilibrium_angular_update(torch.optim.SGD, group), rel=1e-5
    )
    fit(make(make_optimizer=lambda p: doubles.LoggingSGD(p, **options)), [WeightRescaling(3)])

    clipped = NormDynamicsMonitor(1)
    fit(make(make_optimizer=lambda p: doubles.ClippingSGD(p, **options)), [clipped])
    assert not any(key.startswith("equilibrium") for key in set(clipped.history.keys()))


RESUMED = {
    "numbers in the state, aws": (
        doubles.Counting,
        lambda: [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)],
    ),
    "a buffer called z": (doubles.DualAveraging, lambda: [NormDynamicsMonitor(1)]),
    "modes": (doubles.HasModes, lambda: [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)]),
    "a rate of its own": (
        lambda p: doubles.Prodigy(p, lr=2.0),
        lambda: [AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)],
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_goes_on_as_if_nothing_had_happened(name, tmp_path):
    kind, callbacks = RESUMED[name]
    path = tmp_path / "last.ckpt"
    fit(make(make_optimizer=kind), callbacks(), max_epochs=1).save_checkpoint(path)
    module, straight = make(make_optimizer=kind), make(make_optimizer=kind)
    fit(module, callbacks(), ckpt_path=path)
    fit(straight, callbacks())
    assert same(weights_of(module), weights_of(straight))


def test_the_net_is_what_the_cases_assume():
    assert isinstance(make(), Net)
    assert set(TARGETS) < set(weights_of(make()))
