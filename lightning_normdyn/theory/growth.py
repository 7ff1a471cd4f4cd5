r"""How a squared norm N grows in one step of which only coherence and energy are known.

The energy s says how long steps are, the coherence κ how they add up:

    tan²θ = lr² s/N         N' = (1 - lr·λ)² N + κ lr² s.

Courses of Lion and Muon follow it (`lightning_normdyn.theory.course`), and so does every forecast
from what a run has shown (`lightning_normdyn.theory.forecast`). Numbers of the host, in numpy's
float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.optimizers.step_rules import StepResponse

__all__ = ["Array", "grown", "noise_energy", "squared_step"]

Array = NDArray[np.float64]


def noise_energy(response: StepResponse, dims: Array, gradient_scale: Array | None) -> Array | None:
    """The energy s of steps of pure noise, ``(n,)``.

    Args:
        response: how the optimizer answers gradients.
        dims: ``(n,)``, entries of each vector.
        gradient_scale: ``(n,)``, E‖g‖²‖w‖²; asked for where steps are not divided by the size of
            the gradient.

    Returns:
        None where the gradient scale is asked for and missing.

    Example:
        >>> import torch
        >>> from lightning_normdyn.optimizers.step_response import step_response
        >>> group = {"lr": 0.1, "betas": (0.0, 0.99), "weight_decay": 0.1}
        >>> noise_energy(step_response(torch.optim.AdamW, group), np.array([64.0]), None)
        array([64.])
    """
    turn = float(response.turn)
    # A divided gradient has entries of a known size, whatever the loss.
    if response.normalized:
        return dims * float(response.entry_energy) * turn
    if gradient_scale is None:
        return None
    return gradient_scale * turn


def squared_step(
    response: StepResponse | None, energy: Array, square: Array, squared_rate: float
) -> Array:
    """The squared length of steps, ``(n,)``.

    Args:
        response: how the optimizer answers gradients; None: its steps are taken to be as long
            whatever the gradient.
        energy: ``(n,)``, s.
        square: ``(n,)``, N.
        squared_rate: lr², or its sum over several steps.
    """
    # Steps that are not divided by the size of the gradient fall as the norm grows.
    if response is not None and not response.normalized:
        energy = energy / square
    return squared_rate * energy


def grown(square: Array, kept: Array | float, coherence: Array | float, step: Array) -> Array:
    """N', ``(n,)``, after a decay and a step.

    Args:
        square: ``(n,)``, N.
        kept: 1 - lr·λ, what the decay leaves of a norm; of several steps, the product.
        coherence: κ.
        step: ``(n,)``, from `squared_step`.

    Example:
        >>> grown(np.array([4.0]), 0.5, 19.0, np.array([0.01]))
        array([1.19])
    """
    return kept * kept * square + coherence * step
