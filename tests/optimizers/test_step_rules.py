"""The arithmetic of each rule, against the coefficients that the optimizer's own step applies."""

from __future__ import annotations

import pytest
import torch
from paper_optimizers import group_of
from torch import nn

from lightning_normdyn.optimizers import step_rules

CASES = {
    "plain": (step_rules.sgd, torch.optim.SGD, {}),
    "momentum": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.9}),
    "dampening": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
    "nesterov": (step_rules.sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_coefficients_are_those_of_the_step(name):
    """One gradient of 1 among zeros: how far each later step moves the weight is a coefficient."""
    rule, kind, options = CASES[name]
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = kind([weight], lr=1.0, **options)
    moved = []
    # The first step fills the buffer without dampening, so the gradient comes in the second.
    for gradient in (0.0, 1.0, *[0.0] * 300):
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        moved.append(before - weight.item())
    response = rule(group_of(kind, lr=1.0, **options))
    assert (response.newest, response.older) == pytest.approx((moved[1], moved[2]))
    assert response.total == pytest.approx(sum(moved))
    assert response.turn == pytest.approx(sum(c**2 for c in moved))


def test_a_projected_step_grows_the_norm_by_its_length_alone():
    response = step_rules.sgd(group_of(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert response.norm_growth == pytest.approx(100.0)
    assert response.projected().norm_growth == pytest.approx(1 / (1 - 0.9**2))


def test_a_coupled_decay_acts_as_often_as_a_gradient():
    group = group_of(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3)
    assert step_rules.sgd(group).effective_decay == pytest.approx(0.05)
    group = group_of(torch.optim.AdamW, lr=0.1, weight_decay=5e-3)
    assert step_rules.adamw(group).effective_decay == 5e-3


def test_settings_that_nobody_has_derived_have_no_response():
    assert step_rules.adam(group_of(torch.optim.Adam, amsgrad=True)) is None
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "wd_ratio": 0.1}
    assert step_rules.sgdp({**group, "nesterov": True, "dampening": 0.5}) is None
    assert step_rules.sgdp({**group, "nesterov": False, "dampening": 0.5}) is not None


def test_nadam_is_nesterov_with_a_momentum_that_rises():
    """Over thousands of steps: at the default pace κ0 is 3.4 after a thousand."""
    options = {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}
    group = group_of(torch.optim.NAdam, **options)
    coherences = {1000: 3.37, 10_000: 9.95, None: 14.16}
    for step, coherence in coherences.items():
        response = step_rules.nadam(group, step_rules.Subject(step=step))
        assert response.total == pytest.approx(1)
        assert response.coherence == pytest.approx(coherence, abs=0.005)
    # Without a pace, μ stays at half of β1.
    still = step_rules.nadam({**group, "momentum_decay": 0.0}, step_rules.Subject())
    assert still.newest == pytest.approx(1 - 0.9 * 0.45)


def test_the_coefficients_of_nadam_are_those_of_its_step():
    """Of signs, whose second moment is always 1, at a pace that leaves no change of μ."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.NAdam([weight], lr=1.0, eps=0.0, momentum_decay=1e4)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (400,), generator=generator, dtype=torch.float64) * 2 - 1
    before = 0.0
    for sign in signs:
        before = weight.item()
        weight.grad = sign.reshape(1)
        optimizer.step()
    response = step_rules.nadam(optimizer.param_groups[0], step_rules.Subject(step=400))
    past = signs.flip(0)
    expected = response.newest * past[0]
    for lag in range(1, 400):
        expected += response.older * response.memory ** (lag - 1) * past[lag]
    assert before - weight.item() == pytest.approx(expected.item())


def test_radam_has_a_rectified_rate_from_its_sixth_step_on():
    group = group_of(torch.optim.RAdam, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1)
    assert step_rules.radam(group, step_rules.Subject(step=5)) is None
    young = step_rules.radam(group, step_rules.Subject(step=6))
    settled = step_rules.radam(group, step_rules.Subject())
    assert 0 < young.entry_energy < 0.01
    assert settled.entry_energy == 1
    assert settled.coherence == young.coherence == pytest.approx(19)
    # A memory of three gradients is never enough.
    assert step_rules.radam({**group, "betas": (0.9, 0.6)}, step_rules.Subject()) is None


MUON = {
    "lr": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
    "ns_steps": 5,
    "adjust_lr_fn": None,
}


@pytest.mark.parametrize(
    ("shape", "coherence"),
    [
        ((64, 64), 23.3),
        ((48, 64), 25.4),
        ((64, 32), 28.5),
        ((64, 256), 30.7),
        ((512, 64), 32.3),
        ((1, 4096), 32.9),
    ],
)
def test_the_coherence_of_muon_depends_on_the_aspect_of_the_matrix(shape, coherence):
    response = step_rules.muon(MUON, step_rules.Subject(shape))
    assert response.coherence == pytest.approx(coherence, abs=0.05)
    assert response.power == 2


def test_between_two_aspects_muons_table_is_linear():
    low, middle, high = (step_rules._muon_shares(aspect) for aspect in (0.5, 0.625, 0.75))
    assert middle == pytest.approx([(a + b) / 2 for a, b in zip(low, high, strict=True)])


def test_muon_without_momentum_forgets_every_step():
    response = step_rules.muon({**MUON, "momentum": 0.0}, step_rules.Subject((64, 64)))
    assert response.coherence == 1


@pytest.mark.parametrize(
    ("adjustment", "shape", "mean_square"),
    [
        (None, (64, 32), 0.78 * 2 / 64),
        ("original", (32, 64), 0.78 / 64),
        ("match_rms_adamw", (32, 64), 0.78 * 0.04),
    ],
)
def test_the_size_of_muons_steps_follows_its_adjustment(adjustment, shape, mean_square):
    group = {**MUON, "adjust_lr_fn": adjustment}
    response = step_rules.muon(group, step_rules.Subject(shape))
    assert response.entry_energy == pytest.approx(mean_square)
    assert response.energy_is_rough


@pytest.mark.parametrize("changed", [{"ns_steps": 4}, {"ns_coefficients": (3.0, -4.0, 2.0)}])
def test_another_iteration_of_muon_is_not_known(changed):
    assert step_rules.muon({**MUON, **changed}, step_rules.Subject((64, 64))) is None
    assert step_rules.muon(MUON, step_rules.Subject()) is None
