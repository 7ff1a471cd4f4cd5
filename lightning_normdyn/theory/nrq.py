r"""The Noisy Rayleigh Quotient: a scale-invariant loss whose stationary state is known exactly.

The loss is :math:`L(X) = X^TAX / 2X^TX` in p = ``dim`` dimensions. One eigenvalue of A is smaller
than all others by ``gap``, and plain SGD with weight decay sees gradients with noise of standard
deviation ``sigma`` per coordinate. The risk is 1 - f, where f is the squared cosine between X and
the best direction. The formulas are those of the NRQ paper, corrected where the printed ones are
wrong; ``examples/noisy_rayleigh_quotient.py`` compares them with a simulation.
"""

import math

import torch

from lightning_normdyn.optimizers.group_numbers import Number

from .equilibrium import norm_transient


def nrq_concentration(
    lr: float, weight_decay: float, *, dim: int, sigma: float, gap: float = 1.0
) -> float:
    r"""How sharply the stationary directions gather around the best one.

    It is the c of the stationary density :math:`\rho(f) \propto e^{cf} f^{-1/2}(1-f)^{(p-3)/2}`:
    :math:`c = gap\sqrt{p-1}/(\sigma\sqrt{2\eta\lambda})`. NRQ paper, eq. 25, where c = 2κ; the gap
    is missing from the printed κ.

    Example:
        >>> round(nrq_concentration(0.01, 0.01, dim=20, sigma=1.0), 2)
        308.22
    """
    return gap * math.sqrt(dim - 1) / (sigma * math.sqrt(2 * lr * weight_decay))


def nrq_limit_risk(concentration: float, dim: int) -> float:
    """The risk that training ends at, E[1 - f] under the density of :func:`nrq_concentration`.

    Right to about 12 digits for any concentration >= 0.

    Example:
        >>> round(nrq_limit_risk(308.22, 20), 5)  # simulated: 0.03082
        0.03087
        >>> round(nrq_limit_risk(0.0, 20), 6)  # no preferred direction: 1 - 1/p
        0.95
    """
    # Integrate over x = logit(u) with u = 1 - f, and not over f, where the density has poles. In x
    # it is u^a (1-u)^(1/2) e^(-cu) with a = (p-1)/2: smooth, with one maximum and exponential
    # tails, so a sum over equal steps converges as fast as any quadrature rule.
    a = (dim - 1) / 2
    spread = a + 0.5 + concentration
    root = math.sqrt(spread**2 - 4 * a * concentration)
    mode = 2 * a / (spread + root)
    width = 1 / math.sqrt(root * mode * (1 - mode))
    step = min(width, 1.0) / 4
    # Both tails fall at least as exp(-|x|/2): what lies beyond 100 is below 1e-21.
    half = math.ceil(100 / step)
    grid = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu")
    logit = math.log(mode / (1 - mode)) + step * grid
    u = torch.sigmoid(logit)
    log_sigmoid = torch.nn.functional.logsigmoid
    log_density = a * log_sigmoid(logit) + 0.5 * log_sigmoid(-logit) - concentration * u
    density = torch.exp(log_density - log_density.max())
    return float((density * u).sum() / density.sum())


def nrq_limit_risk_first_order(concentration: float, dim: int) -> float:
    """The limit risk for a small product of learning rate and decay: (p-1)/2c.

    That is σ√(p-1)√(2ηλ) / (2 gap): NRQ paper, eq. 26, corrected.

    Example:
        >>> round(nrq_limit_risk_first_order(308.22, 20), 5)
        0.03082
    """
    return (dim - 1) / (2 * concentration)


def nrq_norm(
    steps: Number, norm: Number, lr: float, weight_decay: float, *, dim: int, sigma: float
) -> Number:
    """The norm after ``steps`` steps that began at ``norm``, as E[‖X‖⁴]^(1/4).

    This is :func:`~lightning_normdyn.theory.equilibrium.norm_transient` with E‖g̃‖² = (p-1)σ²: NRQ
    paper, eq. 17, whose M is ‖X‖².

    Example:
        >>> round(nrq_norm(1e9, 5.0, 0.01, 0.01, dim=20, sigma=1.0), 4)  # ((p-1)σ²η/2λ)^(1/4)
        1.7556
    """
    equilibrium = ((dim - 1) * sigma**2 * lr / (2 * weight_decay)) ** 0.25
    return norm_transient(steps, norm, equilibrium, 1 / (4 * lr * weight_decay))
