"""The Noisy Rayleigh Quotient's formulas against special functions and simulated values."""

import pytest
import torch
from paper_optimizers import group_of

from lightning_normdyn.theory import nrq
from lightning_normdyn.theory.equilibrium import equilibrium_norm


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dim", [2, 3, 7, 20, 501])
@pytest.mark.parametrize("concentration", [0.0, 1e-3, 0.7, 13.0, 300.0, 650.0])
def test_limit_risk_is_the_ratio_of_kummer_functions(dim: int, concentration: float) -> None:
    special = pytest.importorskip("scipy.special")
    ratio = special.hyp1f1(1.5, dim / 2 + 1, concentration) / (
        dim * special.hyp1f1(0.5, dim / 2, concentration)
    )
    assert nrq.nrq_limit_risk(concentration, dim) == pytest.approx(1 - ratio, rel=1e-9)


def test_limit_risk_where_the_kummer_functions_overflow() -> None:
    for dim in (2, 20, 1001):
        for concentration in (1e4, 1e6, 1e9):
            # 1 - f has a Gamma distribution, cut at 1: mean (p-1)/2c, with the next term of its
            # expansion
            first = nrq.nrq_limit_risk_first_order(concentration, dim)
            assert nrq.nrq_limit_risk(concentration, dim) == pytest.approx(
                first * (1 + 0.5 / concentration), rel=3 * first / concentration + 1e-9
            )


def test_limit_risk_reproduces_the_simulated_table() -> None:
    rows = [
        (20, 1.0, 1.0, 0.01, 0.01, 0.03087),
        (20, 1.0, 1.0, 0.01, 0.04, 0.06186),
        (20, 0.3, 1.0, 0.01, 0.01, 0.00925),
    ]
    rows += [(20, 1.0, 3.0, 0.01, 0.01, 0.01028), (50, 0.5, 1.0, 0.05, 0.02, 0.07840)]
    for dim, sigma, gap, lr, decay, risk in rows:
        concentration = nrq.nrq_concentration(lr, decay, dim=dim, sigma=sigma, gap=gap)
        assert nrq.nrq_limit_risk(concentration, dim) == pytest.approx(risk, abs=6e-6)


def test_the_norm_formula_is_that_of_plain_sgd() -> None:
    group = group_of(torch.optim.SGD, lr=0.03, weight_decay=0.02)
    settled = equilibrium_norm(torch.optim.SGD, group, 19 * 0.7**2)
    assert nrq.nrq_norm(1e9, 3.0, 0.03, 0.02, dim=20, sigma=0.7) == pytest.approx(settled)
    assert nrq.nrq_norm(0, 3.0, 0.03, 0.02, dim=20, sigma=0.7) == pytest.approx(3.0)
    steps = torch.tensor([0.0, 1e9], dtype=torch.float64)
    assert nrq.nrq_norm(steps, 3.0, 0.03, 0.02, dim=20, sigma=0.7).tolist() == pytest.approx(
        [3.0, settled]
    )
