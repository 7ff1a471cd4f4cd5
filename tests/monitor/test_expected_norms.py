"""Expected norms and angles, on vectors whose gradients are noise, under torch's own optimizers."""

from __future__ import annotations

from math import cos, exp, pi

import numpy as np
import pytest
import torch
from expectations import WeightStep, follow_each
from torch import nn

from lightning_normdyn.engine.effect import (
    Effects,
    LengthJumps,
    Projection,
    Rescaling,
    ScaledSteps,
    Shrink,
    combine,
)
from lightning_normdyn.functional import angular_update, project_tangent
from lightning_normdyn.monitor.expectations import expectations_from, state_of
from lightning_normdyn.monitor.expected_norms import FILLS_BUFFERS, Interval
from lightning_normdyn.monitor.passed_steps import PassedSteps

VECTORS, ENTRIES, EVERY = 128, 32, 20
NOTHING = Effects()


def cosine(t, steps=200, lr=3e-2):
    return lr * (1 + cos(pi * t / steps)) / 2


def adamw(weights, **options):
    return torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.99), weight_decay=0.3, **options)


def sgd(weights):
    return torch.optim.SGD(weights, lr=1.0, momentum=0.9, weight_decay=5e-3)


class Run:
    """Noise on scale-invariant vectors, measured at every ``EVERY``-th step.

    Attributes:
        ratios: measured over expected angle, row by row; NaN without an expectation.
        norms: the same of norms.
    """

    def __init__(
        self,
        make=adamw,
        schedule=cosine,
        effects=NOTHING,
        length=2.0,
        between=None,
        size=lambda number: 1.0,
    ):
        generator = torch.Generator().manual_seed(1)
        self.draw = lambda: torch.randn(
            VECTORS, ENTRIES, generator=generator, dtype=torch.float64, device="cpu"
        )
        start = self.draw()
        start *= length / start.norm(dim=1, keepdim=True)
        self.weight = nn.Parameter(start)
        self.optimizer = make([self.weight])
        self.schedule, self.effects, self.between = schedule, effects, between
        self.size = size
        self.passed = PassedSteps()
        self.expectations = {}
        self.number = 0
        self.ratios: list[float] = []
        self.norms: list[float] = []

    def go(self, steps, *, warm=False):
        for _ in range(steps):
            self.step(warm=warm)
        return self

    def step(self, *, warm=False):
        self.number += 1
        lr = self.schedule(self.number - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.passed.note(self.number, self.optimizer.param_groups)
        weight = self.weight.detach()
        unit = weight / weight.norm(dim=1, keepdim=True)
        noise = self.draw()
        noise -= (noise * unit).sum(1, keepdim=True) * unit
        self.weight.grad = self.size(self.number) * noise / weight.norm(dim=1, keepdim=True)
        before = weight.clone()
        if self.between is not None:
            self.between(self, "before")
        start = weight.clone()
        self.optimizer.step()
        if self.between is not None:
            self.between(self, "after", start)
        turned = angular_update(start, weight.clone()).square().mean().sqrt().item()
        if self.number % EVERY == 1:
            self.row(lr, before, turned, warm)
        if self.between is not None:
            self.between(self, "last")

    def row(self, lr, before, turned, warm):
        norm = before.square().sum(1).mean().sqrt().item()
        scale = (self.weight.grad.square().sum(1) * before.square().sum(1)).mean().item()
        measured = WeightStep(
            "w", 0, self.effects, ENTRIES, (VECTORS, ENTRIES), norm, turned, lr, scale, warm
        )
        known = self.expectations.get("w")
        stretches = [] if known is None else self.passed.since(known.number)
        groups = [dict(group, params=[]) for group in self.optimizer.param_groups]
        interval = Interval(self.optimizer, groups, self.number, stretches)
        found = follow_each(interval, [measured], self.expectations)
        if "w" not in found:
            return
        expected = found["w"]
        self.expectations = {"w": expected.expectation}
        self.newest_angle = turned
        self.ratios.append(np.nan if expected.angle is None else turned / expected.angle)
        self.norms.append(np.nan if expected.norm is None else norm / expected.norm)


def close(run, angle=0.05, norm=0.02):
    assert np.abs(np.array(run.ratios) - 1).max() < angle
    assert np.abs(np.array(run.norms) - 1).max() < norm


@pytest.mark.parametrize("make", [adamw, sgd], ids=["adamw", "sgd"])
@pytest.mark.parametrize("length", [2.0, 6.0])
def test_a_healthy_run_under_a_cosine_is_as_expected(make, length):
    run = Run(make, length=length).go(161)
    assert len(run.ratios) == 9
    close(run)


def test_gradients_that_fall_with_the_loss_are_as_expected_too():
    """While the second moment still remembers larger ones, steps are shorter."""

    def remembering(weights):
        return torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.999), weight_decay=0.3)

    def run(size):
        return Run(remembering, lambda t: 1e-2, length=3.0, size=size).go(361)

    falling = run(lambda number: exp(-number / 400))
    assert len(falling.ratios) == 19
    close(falling, angle=0.07)
    angles = [falling.newest_angle, run(lambda number: 1.0).newest_angle]
    assert angles[0] < 0.8 * angles[1], "else a size that stays would pass too"


def size_of_gradients(make, scales):
    """What the newest of several rows takes the size of gradients to be."""
    optimizer = make([nn.Parameter(torch.ones(4, 8))])
    groups = [dict(group, params=[], lr=1e-3) for group in optimizer.param_groups]
    passed, known = PassedSteps(), {}
    for number, scale in enumerate(scales, 1):
        passed.note(number, groups)
        row = WeightStep("w", 0, NOTHING, 8, (4, 8), 2.0, 1e-3, 1e-3, scale)
        interval = Interval(optimizer, groups, number, passed.since(number - 1))
        known = {"w": follow_each(interval, [row], known)["w"].expectation}
    return known["w"].course["scale"][0]


def test_sizes_of_gradients_are_averaged_over_more_rows_where_steps_are_divided_by_them():
    bursts = [9.0 if i % 10 == 0 else 0.5 for i in range(30)]
    assert size_of_gradients(adamw, bursts) == pytest.approx(np.mean(bursts[-20:]), rel=1e-12)
    # Without a mean to be divided by, an average that is late is a wrong length of the step.
    assert size_of_gradients(sgd, bursts) == pytest.approx(np.mean(bursts[-5:]), rel=1e-12)


def test_the_norm_has_moved_meanwhile():
    run = Run(length=6.0)
    start = run.weight.norm(dim=1).mean().item()
    run.go(161)
    assert run.weight.norm(dim=1).mean().item() < 0.8 * start, "else a fixed norm would pass too"


def test_a_decay_that_changes_between_rows_is_followed():
    def schedule(t):
        for group in run.optimizer.param_groups:
            group["weight_decay"] = 3.0 if 25 <= t < 35 else 0.0  # between the rows at 21 and 41
        return 1e-2

    run = Run(schedule=schedule)
    run.go(101)
    close(run)


def test_a_jump_at_a_drop_of_the_rate_is_followed():
    effects = Effects(jumps=LengthJumps(1.5, 0.5))

    def jump(run, moment, start=None):
        if moment == "before" and run.number == 71:  # the first step at the lower rate
            with torch.no_grad():
                run.weight /= 10**0.5
                run.weight.grad *= 10**0.5
                state = run.optimizer.state[run.weight]
                state["exp_avg"] *= 10**0.5
                state["exp_avg_sq"] *= 10

    run = Run(
        schedule=lambda t: 3e-2 if t < 70 else 3e-3, effects=effects, between=jump, length=1.0
    )
    run.go(141)
    close(run)


@pytest.mark.parametrize("target", [2.0, "initial"])
def test_a_length_that_is_set_every_so_many_steps_is_followed(target):
    effects = Effects(rescaling=Rescaling(15, target, True, "now"))
    lengths = []

    def rescale(run, moment, start=None):
        if moment == "before" and run.number == 1:
            wanted = run.weight.detach().norm(dim=1, keepdim=True)
            lengths.append(wanted if target == "initial" else 2.0)
        if moment == "last" and run.number % 15 == 0:
            with torch.no_grad():
                factor = lengths[0] / run.weight.norm(dim=1, keepdim=True)
                run.weight *= factor
                run.optimizer.state[run.weight]["momentum_buffer"] /= factor

    def make(weights):
        return torch.optim.SGD(weights, lr=1.0, momentum=0.9)

    run = Run(make, schedule=lambda t: 3e-2, effects=effects, between=rescale)
    run.go(161)
    close(run)


def test_a_shrink_is_followed():
    alpha = 0.2
    effects = Effects(shrink=Shrink(alpha, "norm", replaces_decay=True))

    def shrink(run, moment, start=None):
        if moment == "before":
            lr = run.optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                run.weight *= 1 - lr * alpha * run.weight.norm(dim=1, keepdim=True)

    def make(weights):
        return torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)

    close(Run(make, effects=effects, between=shrink, length=4.0).go(161))


def test_a_projection_is_followed():
    effects = Effects(projection=Projection("always", 0.3, 1.0))

    def project(run, moment, start=None):
        if moment == "after":
            lr = run.optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                step = project_tangent(run.weight - start, start)
                run.weight.copy_((1 - lr * 0.3) * start + step)

    def make(weights):
        return torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)

    close(Run(make, effects=effects, between=project).go(161))


@pytest.mark.parametrize(
    "effects",
    [
        Effects(underived=("MyRule",)),
        Effects(scaled_steps=True),
        Effects(jumps=LengthJumps(1.5, None)),
        combine([Shrink(0.1, "norm", replaces_decay=False)]),  # two decays at once
        combine([ScaledSteps()]),
    ],
    ids=str,
)
def test_where_nobody_has_derived_a_course_there_is_none(effects):
    assert Run(effects=effects).go(41).ratios == []


def test_an_optimizer_that_is_not_understood_has_no_course():
    assert Run(lambda weights: torch.optim.Adam(weights, amsgrad=True)).go(41).ratios == []


def test_without_the_steps_between_a_course_begins_anew_and_is_silent_first():
    run = Run(length=6.0).go(41)
    run.passed = PassedSteps()  # nobody noted the next steps
    run.number += 40
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.0
    run.go(2 * EVERY, warm=True)
    assert np.isnan(run.ratios[-1])
    assert run.expectations["w"].silent_until > run.number


def test_a_course_that_begins_in_mid_run_speaks_once_the_buffers_are_full():
    run = Run(length=6.0, schedule=lambda t: 1e-2)
    run.number = 0
    run.go(200)
    run.expectations = {}
    run.ratios, run.norms = [], []
    run.go(FILLS_BUFFERS + 3 * EVERY, warm=True)
    ratios = np.array(run.ratios)
    silent = FILLS_BUFFERS // EVERY
    assert np.isnan(ratios[:silent]).all()
    # The second moment still remembers gradients from before: the weight was longer then.
    assert np.abs(ratios[silent:] - 1).max() < 0.15


def test_over_a_checkpoint_a_course_goes_on_to_the_last_bit():
    whole = Run(sgd).go(121)
    resumed = Run(sgd).go(70)
    resumed.expectations = expectations_from(state_of(resumed.expectations))
    passed = PassedSteps()
    passed.load(resumed.passed.state())
    resumed.passed = passed
    resumed.go(51)
    assert resumed.ratios == whole.ratios


def test_weights_are_followed_together_as_each_alone():
    """Of different lengths, sizes and starts."""
    passed = PassedSteps()
    optimizer = adamw([nn.Parameter(torch.ones(2, 3))])
    group = {**optimizer.param_groups[0], "params": [], "lr": 1e-2}
    steps = []
    for i, (dim, norm) in enumerate([(9, 1.0), (64, 3.0), (9, 2.0)]):
        steps.append(WeightStep(f"w{i}", 0, NOTHING, dim, None, norm, 0.01, 1e-2, 1.0))

    def walk(steps):
        known = {}
        angles = []
        for number in (1, 8, 30):
            for between in range(passed._newest + 1, number + 1):
                passed.note(between, [group])
            newest = {e.number for e in known.values()}
            stretches = passed.since(max(newest)) if newest else []
            interval = Interval(optimizer, [group], number, stretches)
            expected = follow_each(interval, steps, known)
            known = {name: found.expectation for name, found in expected.items()}
            angles.append({name: (found.angle, found.norm) for name, found in expected.items()})
        return angles

    together = walk(steps)
    for step in steps:
        passed.__init__()
        for alone, all_of_them in zip(walk([step]), together, strict=True):
            assert alone[step.name] == pytest.approx(all_of_them[step.name], rel=1e-14)
