"""The steering rules as plain functions, against the rules written out vector by vector."""

from __future__ import annotations

import math

import pytest
import reference
import torch

from lightning_normdyn.functional import angular_update, displacement_sums, weight_norm
from lightning_normdyn.steering import (
    brake_factor,
    rotation_stretch,
    step_tangent,
    stretch_step,
    stretch_to_tangent,
    stretched_norm,
)

BOUNDS = ("exact", "at_least", "at_most")


def a_step(dtype: torch.dtype = torch.float64, size: float = 0.01) -> tuple[torch.Tensor, ...]:
    """Eight vectors before and after a step that also changes their norms, by up to ten times its
    part across."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    radial = torch.linspace(-10, 10, 8, dtype=torch.float64).unsqueeze(1)
    step = torch.randn(8, 24, generator=generator, dtype=torch.float64) + radial * before / 5
    return before.to(dtype), (before + size * step).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_stretched_step_turns_by_the_angle(bound, dtype):
    before, after = a_step(dtype)
    sums = displacement_sums(before, after)
    theta = float(angular_update(before, after).median())
    stretch = rotation_stretch(*sums, theta, bound)
    turned = angular_update(before.double(), stretch_step(before, after, stretch).double())
    rounding = 1e-12 if dtype == torch.float64 else 1e-4  # of the weights, over an angle of 0.01
    now = angular_update(before, after).double()
    expected = {
        "exact": torch.full_like(now, theta),
        "at_least": now.clamp(min=theta),
        "at_most": now.clamp(max=theta),
    }[bound]
    torch.testing.assert_close(turned, expected, rtol=rounding, atol=0)
    # And as the reference has it: some vectors are stretched, and under a bound some are not.
    rule = reference.Rotate(theta, bound, hold=False, follows="constant", view="filter")
    naive = rule(before.double(), after.double(), 1.0, {})
    steered = stretch_step(before, after, stretch).double()
    assert (steered - naive).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6)
    assert ((stretch == 1).sum() > 0) == (bound != "exact")
    assert (stretch != 1).sum() > 0


@pytest.mark.parametrize("change", ["norm", "radial"])
@pytest.mark.parametrize("shares", [(0.5, 1.0), (0.0, 0.0), (1.0, 0.25)])
def test_a_brake_leaves_a_share_of_the_change(change, shares):
    before, after = a_step()
    factor = brake_factor(*displacement_sums(before, after), *shares, change)
    naive = reference.Brake(*shares, change, view="filter")(before, after)
    torch.testing.assert_close(stretch_step(after, after, 1.0, factor), naive, rtol=0, atol=1e-14)
    if shares == (0.0, 0.0):
        torch.testing.assert_close(weight_norm(naive), weight_norm(before), rtol=1e-13, atol=0)


def test_the_norm_after_a_stretched_step():
    before, after = a_step()
    sums = displacement_sums(before, after)
    for stretch in (0.0, 0.3, 1.0, 40.0):
        moved = stretch_step(before, after, stretch)
        torch.testing.assert_close(
            stretched_norm(*sums, stretch), weight_norm(moved), rtol=1e-12, atol=0
        )


def test_a_running_mean_of_tangents_stretches_by_one_factor():
    before, after = a_step()
    tangent = step_tangent(*displacement_sums(before, after))
    torch.testing.assert_close(tangent, angular_update(before, after).tan(), rtol=1e-12, atol=0)
    theta = 0.01
    torch.testing.assert_close(
        stretch_to_tangent(tangent, theta), math.tan(theta) / tangent, rtol=1e-12, atol=0
    )
    floor, cap = (stretch_to_tangent(tangent, theta, bound) for bound in BOUNDS[1:])
    assert (floor >= 1).all()
    assert (cap <= 1).all()
    assert ((floor == 1) ^ (cap == 1)).all()


S = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
# What the step ends at; by which factor an angle of 0.1 is reached, exactly, as a floor, as a cap.
SPECIAL = {
    "no step": ([2.0, 0.0], math.nan, math.nan, 1.0),
    "a longer weight": ([5.0, 0.0], math.nan, math.nan, 1.0),
    "the other side": ([-1.0, 0.0], math.nan, 1.0, math.nan),
    # tan(0.1) * 2 / (1 + 1.5 * tan(0.1) * 2)
    "backwards": ([-1.0, 1.0], 0.1542419, 1.0, 0.1542419),
    "steeply outwards": ([42.0, 1.0], math.nan, math.nan, 1.0),
    "not finite": ([math.inf, 1.0], math.nan, math.nan, math.nan),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_steps_that_no_stretch_helps_are_nan(name):
    end, *expected = SPECIAL[name]
    sums = displacement_sums(S, torch.tensor([end], dtype=torch.float64))
    got = [float(rotation_stretch(*sums, 0.1, bound)) for bound in BOUNDS]
    assert got == pytest.approx(expected, rel=1e-6, nan_ok=True)
    if name == "backwards":
        turned = angular_update(S, stretch_step(S, torch.tensor([end]).double(), got[0]))
        assert float(turned) == pytest.approx(0.1)


def test_a_vector_without_a_length_has_no_stretch_and_no_brake():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    sums = displacement_sums(zero, S)
    assert all(rotation_stretch(*sums, 0.1, bound).isnan().all() for bound in BOUNDS)
    assert brake_factor(*sums, 0.5, 1.0).isnan().all()
    assert brake_factor(*displacement_sums(S, zero), 0.5, 1.0).isnan().all()
    assert float(stretched_norm(*sums)) == 2.0


@pytest.mark.parametrize("end", [[2.0, 0.0], [2.0, 1.0], [-1.0, 1.0]])
def test_an_angle_of_zero_is_no_step(end):
    sums = displacement_sums(S, torch.tensor([end], dtype=torch.float64))
    got = [float(rotation_stretch(*sums, 0.0, bound)) for bound in BOUNDS]
    moves = end != [2.0, 0.0]
    assert got == [0.0, 1.0, 0.0 if moves else 1.0]
    assert float(stretch_to_tangent(torch.tensor([math.nan]), 0.0)) == 0.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"same shape, got \(1, 2\) and \(2, 2\)"):
        stretch_step(S, torch.zeros(2, 2))
