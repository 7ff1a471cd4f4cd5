"""The growth of a norm from coherence and energy alone, against random walks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from paper_optimizers import Lion, group_of

from lightning_normdyn.optimizers.step_response import own_response
from lightning_normdyn.theory.growth import grown, noise_energy, squared_step

DIMS = np.array([16.0, 64.0])


def test_steps_that_forget_each_other_add_up_as_in_a_random_walk() -> None:
    """Steps at right angles to the weight: the squared norm grows by their squared length."""
    square = grown(np.array([4.0, 9.0]), 0.9, 1.0, np.array([0.5, 2.0]))
    weight = torch.tensor([[2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    step = torch.tensor([[0.0, math.sqrt(0.5)], [0.0, math.sqrt(2.0)]], dtype=torch.float64)
    assert square == pytest.approx((0.9 * weight + step).square().sum(1).tolist())


@pytest.mark.parametrize(("kind", "falls"), [(torch.optim.SGD, True), (Lion, False)])
def test_only_steps_in_proportion_to_the_gradient_fall_with_the_norm(
    kind: type, falls: bool
) -> None:
    response = own_response(kind, group_of(kind, lr=0.1))
    energy, square = np.array([3.0]), np.array([4.0])
    expected = 0.01 * 3.0 / (4.0 if falls else 1.0)
    assert squared_step(response, energy, square, 0.01) == pytest.approx([expected])
    assert squared_step(None, energy, square, 0.01) == pytest.approx([0.03])


def test_steps_of_noise_are_as_long_as_the_optimizer_makes_them() -> None:
    sgd = own_response(torch.optim.SGD, group_of(torch.optim.SGD, lr=0.1, momentum=0.9))
    # Each gradient of squared length 5 comes back with 1, .9, .81, ...
    assert noise_energy(sgd, DIMS, np.array([5.0, 5.0])) == pytest.approx([5 / (1 - 0.81)] * 2)
    assert noise_energy(sgd, DIMS, None) is None
    # Every entry of a sign is 1.
    lion = own_response(Lion, group_of(Lion, lr=0.1))
    assert noise_energy(lion, DIMS, None) == pytest.approx(DIMS)
