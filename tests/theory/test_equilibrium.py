"""The predictions against simulations (real optimizers on scale-invariant weights, gradients of
pure noise), and the exact identities."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from paper_optimizers import SGDP, SOAP, AdamP, Lion, group_of, tangential
from torch import Tensor

from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.theory import equilibrium as eq
from lightning_normdyn.theory import outlook as verdicts
from lightning_normdyn.theory.course import NormCourse
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equilibrium_norm,
    lr_drop_exponent,
    relaxation_steps,
)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


# --- optimizers that torch does not have, written from their papers
# -----------------------------------------------------------------------


# --- simulation
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One optimizer with its settings; what callbacks do beside it: AWS (`alpha`), RadialProjection
    with decay, a decoupled decay."""

    name: str
    optimizer: type
    lr: float
    hyper: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    statistic: str = "norm"
    coupled: bool = False
    projected: bool = False
    decay: float | None = None
    sigma: float = 1.0
    dim: int = 64
    relaxations: float = 9.0

    def __str__(self) -> str:
        return self.name


def size_of(weight: Tensor, statistic: str) -> Tensor:
    return (
        weight.norm(dim=1, keepdim=True)
        if statistic == "norm"
        else weight.std(dim=1, correction=0, keepdim=True)
    )


def predict(row: Row, group: dict[str, Any], units: int = 64) -> tuple[float, float, float]:
    """Angle, norm and relaxation time at equilibrium."""
    d = row.dim
    # E‖g‖²‖w‖² of the noise below: tangential to w, and with std also to the vector of ones.
    scale = row.sigma**2 * (d - 1) if row.statistic == "norm" else row.sigma**2 * (d - 2) * d
    options: dict[str, Any] = {
        "projected": row.projected,
        "decay": row.decay,
        "coupled": row.coupled,
        "shape": (units, d),
    }
    if row.alpha is not None:
        per_norm = row.alpha if row.statistic == "norm" else row.alpha / math.sqrt(d)
        norm = equilibrium_norm(
            row.optimizer, group, scale, dim=d, norm=1.0, shrink=per_norm, **options
        )
        options.update(shrink=per_norm * norm, norm=norm)
    else:
        norm = equilibrium_norm(row.optimizer, group, scale, dim=d, **options)
    angle = equilibrium_angular_update(row.optimizer, group, gradient_scale=scale, dim=d, **options)
    relaxation = relaxation_steps(row.optimizer, group, gradient_scale=scale, dim=d, **options)
    assert angle is not None
    assert norm is not None
    assert relaxation is not None
    return angle, norm, relaxation


def simulate(
    row: Row, *, units: int = 64, start: float = 1.15, seed: int = 0
) -> tuple[float, float, float]:
    """RMS angle and RMS norm over their predictions, after 5.5 relaxation times from `start` x the
    predicted norm; the relaxation time."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(units, row.dim, generator=noise, dtype=torch.float64))
    optimizer = row.optimizer([weight], lr=row.lr, **row.hyper)
    angle, norm, relaxation = predict(row, optimizer.param_groups[0], units)
    with torch.no_grad():
        if row.statistic == "std":
            weight.sub_(weight.mean(1, keepdim=True))
        weight.mul_(start * norm / weight.norm(dim=1, keepdim=True))
    weight.grad = torch.empty_like(weight)
    weight.requires_grad_(False)

    burn_in, steps = math.ceil(5.5 * relaxation), math.ceil(row.relaxations * relaxation)
    angle_squares = torch.zeros((), dtype=torch.float64)
    norm_squares = torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        direction = weight if row.statistic == "norm" else weight - weight.mean(1, keepdim=True)
        gradient = torch.randn(units, row.dim, generator=noise, dtype=torch.float64)
        if row.statistic == "std":
            gradient -= gradient.mean(1, keepdim=True)
        size = size_of(weight, row.statistic)
        gradient = tangential(gradient, direction).mul_(row.sigma / size)
        before = weight.clone()
        if row.alpha is not None and row.coupled:
            gradient += row.alpha * size * weight
        elif row.alpha is not None:
            weight.mul_(1 - row.lr * row.alpha * size)
        elif row.decay is not None:
            weight.mul_(1 - row.lr * row.decay)
        weight.grad.copy_(gradient)
        anchor = weight.clone() if row.projected else weight
        optimizer.step()
        if row.projected:
            weight.copy_(anchor + tangential(weight - anchor, anchor))
        if step >= burn_in:
            angle_squares += turned(before, weight).square().mean()
            norm_squares += weight.square().sum(1).mean()
    measured = steps - burn_in
    return (
        (angle_squares / measured).sqrt().item() / angle,
        (norm_squares / measured).sqrt().item() / norm,
        relaxation,
    )


def turned(before: Tensor, after: Tensor) -> Tensor:
    radial = (before * after).sum(1) / before.norm(dim=1)
    return torch.atan2(tangential(after, before).norm(dim=1), radial)


QUICK = [
    Row("SGD", SGD, 0.2, {"weight_decay": 7e-3}),
    Row("SGD, momentum 0.8", SGD, 0.03, {"momentum": 0.8, "weight_decay": 1e-2}),
    Row("SGD, Nesterov 0.7", SGD, 0.05, {"momentum": 0.7, "nesterov": True, "weight_decay": 1e-2}),
    Row("AdamW", ADAMW, 4e-3, {"weight_decay": 0.5}),
    Row("AWS on SGD", SGD, 0.1, alpha=5e-3),
]
SLOW = [
    # numbers: the rows of the table that the derivation must reproduce
    Row("1 SGD", SGD, 0.7, {"weight_decay": 1e-3}, dim=100, sigma=0.3),
    Row("2 momentum 0.6", SGD, 0.05, {"momentum": 0.6, "weight_decay": 8e-3}, dim=80),
    Row("2 momentum 0.93", SGD, 0.02, {"momentum": 0.93, "weight_decay": 2e-3}, sigma=2.0),
    Row(
        "3 dampening = momentum 0.85",
        SGD,
        0.3,
        {"momentum": 0.85, "dampening": 0.85, "weight_decay": 3e-3},
        dim=72,
    ),
    Row(
        "3 dampening 0.4, momentum 0.7",
        SGD,
        0.1,
        {"momentum": 0.7, "dampening": 0.4, "weight_decay": 4e-3},
    ),
    Row("4 Nesterov 0.5", SGD, 0.04, {"momentum": 0.5, "nesterov": True, "weight_decay": 1.2e-2}),
    Row(
        "4 Nesterov 0.9",
        SGD,
        0.02,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 3e-3},
        dim=96,
    ),
    Row("5 decoupled, momentum 0.8", SGD, 0.05, {"momentum": 0.8}, decay=1.5e-2),
    Row("6 AdamW", ADAMW, 2e-3, {"weight_decay": 0.4, "betas": (0.8, 0.999)}, dim=100, sigma=0.01),
    Row(
        "6 Adam, decoupled_weight_decay",
        ADAM,
        3e-3,
        {"weight_decay": 0.3, "decoupled_weight_decay": True},
        sigma=5.0,
    ),
    Row("7 Adam + L2", ADAM, 3e-3, {"weight_decay": 0.4, "betas": (0.9, 0.999)}, dim=80, sigma=0.7),
    Row(
        "7 Adam + L2, more noise",
        ADAM,
        2e-3,
        {"weight_decay": 4.0, "betas": (0.7, 0.999)},
        sigma=3.0,
    ),
    Row("8 AWS", SGD, 0.3, alpha=1.5e-3, dim=90, sigma=0.5),
    Row("9 AWS std", SGD, 0.2, alpha=8e-3, statistic="std"),
    Row(
        "9 AWS std, momentum 0.7", SGD, 0.05, {"momentum": 0.7}, alpha=1e-2, statistic="std", dim=96
    ),
    Row("10 AWS, momentum 0.8", SGD, 0.04, {"momentum": 0.8}, alpha=4e-3),
    Row("10 AWS, Nesterov 0.8", SGD, 0.04, {"momentum": 0.8, "nesterov": True}, alpha=4e-3),
    Row(
        "11 AWS coupled, momentum 0.8",
        SGD,
        0.05,
        {"momentum": 0.8},
        alpha=1e-3,
        coupled=True,
        dim=80,
    ),
    Row("12 AWS, AdamW", ADAMW, 3e-3, {"weight_decay": 0.0}, alpha=0.6),
    Row("12' AWS coupled, Adam", ADAM, 3e-3, {"betas": (0.8, 0.999)}, alpha=0.8, coupled=True),
    Row("13 projected, momentum 0.6", SGD, 0.1, {"momentum": 0.6}, projected=True, decay=8e-3),
    Row(
        "13 projected, Nesterov 0.7",
        SGD,
        0.1,
        {"momentum": 0.7, "nesterov": True},
        projected=True,
        decay=5e-3,
    ),
    Row(
        "13 projected, AdamW",
        ADAMW,
        3e-3,
        {"weight_decay": 0.0, "betas": (0.8, 0.999)},
        projected=True,
        decay=0.15,
    ),
    Row("13 projected, AWS", SGD, 0.1, {"momentum": 0.6}, projected=True, alpha=5e-3),
    Row("14 SGDP", SGDP, 0.05, {"momentum": 0.8, "weight_decay": 2e-2}),
    Row("15 AdamP", AdamP, 3e-3, {"weight_decay": 1.2, "betas": (0.8, 0.999)}),
    Row("Lion", Lion, 3e-4, {"weight_decay": 1.0, "betas": (0.9, 0.99)}),
    Row(
        "NAdam",
        torch.optim.NAdam,
        3e-3,
        # μ is at its limit from the first step on.
        {"weight_decay": 0.4, "decoupled_weight_decay": True, "momentum_decay": 1e4},
    ),
    Row(
        "RAdam",
        torch.optim.RAdam,
        3e-3,
        {"weight_decay": 0.4, "decoupled_weight_decay": True, "betas": (0.8, 0.99)},
    ),
    Row("SOAP", SOAP, 3e-3, {"weight_decay": 0.4, "betas": (0.9, 0.99)}),
    Row("Lion, equal betas", Lion, 3e-4, {"weight_decay": 1.5, "betas": (0.9, 0.9)}, dim=80),
]


def assert_settles_as_predicted(row: Row) -> None:
    angle, norm, _ = simulate(row)
    assert angle == pytest.approx(1, abs=0.015)
    assert norm == pytest.approx(1, abs=0.03)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("row", QUICK, ids=str)
def test_simulation_settles_as_predicted(row: Row) -> None:
    assert_settles_as_predicted(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=str)
def test_every_row_settles_as_predicted(row: Row) -> None:
    assert_settles_as_predicted(row)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (SGD, {"lr": 0.1, "momentum": 0.6, "weight_decay": 4e-3}),
        # The second moment must forget faster than the norm changes: it is what makes the steps'
        # size that of the present gradient.
        (ADAMW, {"lr": 2e-3, "weight_decay": 0.2, "betas": (0.8, 0.98)}),
    ],
)
def test_the_norm_relaxes_as_predicted_from_twice_its_equilibrium(
    optimizer: type, hyper: dict[str, Any]
) -> None:
    row = Row("", optimizer, hyper["lr"], {k: v for k, v in hyper.items() if k != "lr"})
    group = group_of(optimizer, **hyper)
    _, settled, relaxation = predict(row, group)
    steps = round(relaxation)
    predicted = eq.norm_transient(
        steps, 2 * settled, settled, relaxation, step_response(optimizer, group).power
    )
    assert norm_after(
        row, steps=steps, start=2 * settled
    ).square().mean().sqrt().item() == pytest.approx(predicted, rel=0.02)


def norm_after(row: Row, *, steps: int, start: float, units: int = 64) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    weight = torch.randn(units, row.dim, generator=noise, dtype=torch.float64)
    weight *= start / weight.norm(dim=1, keepdim=True)
    optimizer = row.optimizer([weight], lr=row.lr, **row.hyper)
    for _ in range(steps):
        gradient = tangential(
            torch.randn(units, row.dim, generator=noise, dtype=torch.float64), weight
        )
        weight.grad = gradient * row.sigma / weight.norm(dim=1, keepdim=True)
        optimizer.step()
    return weight.norm(dim=1)


def printed(**values: float) -> list[tuple[str, Any, dict[str, Any], dict[str, Any], float, float]]:
    """The table as it stands in the literature and in the derivations, row by row: (row, optimizer,
    hyper, options, angle, norm)."""
    lr, decay, b, scale, d, alpha, norm = (
        values[k] for k in ("lr", "decay", "b", "scale", "d", "alpha", "norm")
    )
    sgd, adam, aws = (
        {"lr": lr, "weight_decay": decay, "momentum": b},
        {"lr": lr, "weight_decay": decay, "betas": (b, 0.999)},
        alpha * norm,
    )
    shrunk = {"shrink": aws, "norm": norm}
    turn = (1 - b) / (1 + b)
    cube = (lr * math.sqrt(d * scale) / (2 * decay)) ** (1 / 3)
    plain = {"lr": lr, "weight_decay": decay}
    ratio = {"wd_ratio": 0.1}
    return [
        ("1", SGD, plain, {}, math.sqrt(2 * lr * decay), (lr * scale / (2 * decay)) ** 0.25),
        (
            "2",
            SGD,
            sgd,
            {},
            math.sqrt(2 * lr * decay / (1 + b)),
            (lr * scale / (2 * decay * (1 - b))) ** 0.25,
        ),
        (
            "3",
            SGD,
            {**sgd, "dampening": b},
            {},
            math.sqrt(2 * lr * decay * turn),
            (lr * scale / (2 * decay)) ** 0.25,
        ),
        (
            "4",
            SGD,
            {**sgd, "nesterov": True},
            {},
            math.sqrt(2 * lr * decay * (1 + 2 * b - 2 * b**3) / (1 + b)),
            (lr * scale / (2 * decay * (1 - b))) ** 0.25,
        ),
        (
            "5",
            SGD,
            sgd,
            {"decay": decay},
            math.sqrt(2 * lr * decay * turn),
            (lr * scale / (2 * decay * (1 - b) ** 2)) ** 0.25,
        ),
        ("6", ADAMW, adam, {}, math.sqrt(2 * lr * decay * turn), math.sqrt(lr * d / (2 * decay))),
        ("7", ADAM, adam, {}, math.sqrt(turn * d) * lr / cube, cube),
        ("8", SGD, plain, shrunk, math.sqrt(2 * lr * aws), (lr * scale / (2 * alpha)) ** 0.2),
        (
            "10",
            SGD,
            sgd,
            shrunk,
            math.sqrt(2 * lr * aws * turn),
            (lr * scale / (2 * alpha * (1 - b) ** 2)) ** 0.2,
        ),
        (
            "11",
            SGD,
            sgd,
            {**shrunk, "coupled": True},
            math.sqrt(2 * lr * aws / (1 + b)),
            (lr * scale / (2 * alpha * (1 - b))) ** 0.2,
        ),
        (
            "12",
            ADAM,
            adam,
            shrunk,
            math.sqrt(2 * lr * aws * turn),
            (lr * d / (2 * alpha)) ** (1 / 3),
        ),
        (
            "13",
            SGD,
            sgd,
            {"projected": True, "decay": decay},
            math.sqrt(2 * lr * decay),
            (lr * scale / (2 * decay * (1 - b**2))) ** 0.25,
        ),
        (
            "14",
            SGDP,
            {**sgd, **ratio},
            {},
            math.sqrt(0.2 * lr * decay / (1 - b)),
            (lr * scale / (0.2 * decay * (1 + b))) ** 0.25,
        ),
        (
            "15",
            AdamP,
            {**adam, **ratio},
            {},
            math.sqrt(0.2 * lr * decay),
            math.sqrt(lr * d * turn / (0.2 * decay)),
        ),
    ]


TABLE = printed(lr=0.03, decay=7e-3, b=0.85, scale=3.7, d=48, alpha=4e-3, norm=1.9)


@pytest.mark.parametrize(
    ("row", "optimizer", "hyper", "options", "angle", "norm"),
    TABLE,
    ids=[entry[0] for entry in TABLE],
)
def test_one_derivation_gives_every_printed_formula(
    row: str,
    optimizer: type,
    hyper: dict[str, Any],
    options: dict[str, Any],
    angle: float,
    norm: float,
) -> None:
    group = group_of(optimizer, **hyper)
    assert equilibrium_angular_update(
        optimizer, group, gradient_scale=3.7, dim=48, **options
    ) == pytest.approx(angle, rel=1e-12)
    assert equilibrium_norm(optimizer, group, 3.7, dim=48, **options) == pytest.approx(
        norm, rel=1e-12
    )


# --- weight rescaling
# --------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("optimizer", "hyper", "period"),
    [
        (SGD, {"lr": 0.02}, 7),
        (SGD, {"lr": 0.01, "momentum": 0.8}, 60),
        (SGD, {"lr": 0.02, "momentum": 0.6, "nesterov": True}, 40),
        (ADAM, {"lr": 4e-4, "betas": (0.8, 0.999)}, 50),
    ],
)
def test_rescaling_turns_as_predicted(optimizer: type, hyper: dict[str, Any], period: int) -> None:
    dim, units, target, sigma = 64, 64, 1.5, 0.8
    noise = torch.Generator().manual_seed(2)
    weight = torch.randn(units, dim, generator=noise, dtype=torch.float64)
    weight *= target / weight.norm(dim=1, keepdim=True)
    rescaled = optimizer([weight], **hyper)
    squares, direction_lrs = [], []
    for step in range(1, 30 * period + 1):
        gradient = tangential(torch.randn(units, dim, generator=noise, dtype=torch.float64), weight)
        weight.grad = gradient * sigma / weight.norm(dim=1, keepdim=True)
        before = weight.clone()
        direction_lrs.append((hyper["lr"] / weight.square().sum(1)).mean())
        rescaled.step()
        squares.append(turned(before, weight).square().mean())
        if step % period == 0:
            factor = target / weight.norm(dim=1, keepdim=True)
            weight *= factor
            for name, buffer in rescaled.state[
                weight
            ].items():  # the symmetry: first moments / factor, second moments / factor²
                if name in ("momentum_buffer", "exp_avg"):
                    buffer /= factor
                elif name == "exp_avg_sq":
                    buffer /= factor**2
    options = {"gradient_scale": sigma**2 * (dim - 1), "dim": dim, "target_norm": target}
    group = rescaled.param_groups[0]
    settled = slice(5 * period, None)
    angle = torch.stack(squares[settled]).mean().sqrt().item()
    assert angle == pytest.approx(
        eq.wrs_angular_update(optimizer, group, period, **options), rel=0.02
    )
    direction_lr = torch.stack(direction_lrs[settled]).mean().item()
    assert direction_lr == pytest.approx(
        eq.wrs_direction_lr(optimizer, group, period, **options), rel=0.02
    )


def test_rescaling_without_growth_has_the_limit_of_the_first_step() -> None:
    group = group_of(SGD, lr=0.0)
    assert eq.wrs_direction_lr(SGD, group, 10, gradient_scale=1.0) == 0
    group = group_of(SGD, lr=0.1)
    assert eq.wrs_direction_lr(
        SGD, group, 10, gradient_scale=0.0, target_norm=2.0
    ) == pytest.approx(0.025)
    assert eq.wrs_angular_update(SGD, group, 10, gradient_scale=1e-12) == pytest.approx(1e-7)


# --- what is understood, and what is not
# --------------------------------------------------------------------------------------------------


class OtherStep(SGD):
    """Steps in a way nobody has derived."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (OtherStep, {"weight_decay": 0.1}),
        (ADAM, {"weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.NAdam, {"weight_decay": 0.1}),
        (torch.optim.RAdam, {"weight_decay": 0.1}),
        (torch.optim.RMSprop, {"weight_decay": 0.1}),
        (torch.optim.Adagrad, {"weight_decay": 0.1}),
        (torch.optim.Adamax, {"weight_decay": 0.1}),
        (torch.optim.Adafactor, {"weight_decay": 0.1}),
        (SGD, {"weight_decay": 0.0}),
        (ADAMW, {"weight_decay": 0.0}),
    ],
)
def test_no_prediction_for_what_is_not_understood_or_has_no_decay(
    optimizer: type, hyper: dict[str, Any]
) -> None:
    group = group_of(optimizer, lr=0.1, **hyper)
    assert equilibrium_angular_update(optimizer, group, gradient_scale=1.0, dim=10) is None
    assert equilibrium_norm(optimizer, group, 1.0, dim=10) is None
    assert relaxation_steps(optimizer, group, gradient_scale=1.0, dim=10) is None
    assert lr_drop_exponent(optimizer, group) is None
    assert verdicts.free_decay_rate(optimizer, group) is None
    assert verdicts.total_decay(optimizer, group, 1000) is None
    response = step_response(optimizer, group)
    assert response is None or response.decay is None


def test_projection_removes_a_coupled_decay_and_keeps_a_decoupled_one() -> None:
    coupled = group_of(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert equilibrium_angular_update(SGD, coupled, projected=True) is None
    assert equilibrium_angular_update(SGD, coupled, projected=True, decay=5e-4) == pytest.approx(
        math.sqrt(2 * 0.1 * 5e-4)
    )
    decoupled = group_of(ADAMW, lr=1e-3, weight_decay=0.1)
    assert equilibrium_angular_update(ADAMW, decoupled, projected=True) == pytest.approx(
        math.sqrt(2 * 1e-3 * 0.1)
    )


def test_adam_with_coupled_decay_needs_the_gradient_scale_and_is_rough() -> None:
    group = group_of(ADAM, lr=1e-3, weight_decay=0.1)
    assert equilibrium_angular_update(ADAM, group) is None
    assert equilibrium_norm(ADAM, group, dim=10) is None
    assert relaxation_steps(ADAM, group, dim=10) is None
    assert step_response(ADAM, group).rough
    assert not step_response(ADAM, group, shrink=0.1).rough
    assert not step_response(ADAMW, group_of(ADAMW, lr=1e-3)).rough
    # theory: AU falls with the cube root of the noise
    angles = [
        equilibrium_angular_update(ADAM, group, gradient_scale=scale**2, dim=10)
        for scale in (0.5, 2.0)
    ]
    assert angles[0] / angles[1] == pytest.approx(4 ** (1 / 3))


@pytest.mark.parametrize(
    ("optimizer", "hyper", "options", "exponent"),
    [
        (SGD, {"weight_decay": 0.1}, {}, 1 / 4),
        (SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, {}, 1 / 4),
        (SGD, {}, {"projected": True, "decay": 0.1}, 1 / 4),
        (SGDP, {"weight_decay": 0.1}, {}, 1 / 4),
        (ADAMW, {"weight_decay": 0.1}, {}, 1 / 2),
        (ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}, 1 / 2),
        (ADAM, {"weight_decay": 0.1}, {"projected": True, "decay": 0.1}, 1 / 2),
        (AdamP, {"weight_decay": 0.1}, {}, 1 / 2),
        (Lion, {"weight_decay": 0.1}, {}, 1 / 2),
        (ADAM, {"weight_decay": 0.1}, {}, 1 / 3),
        (SGD, {"momentum": 0.9}, {"shrink": 0.01}, 1 / 5),
        (ADAM, {"weight_decay": 0.1}, {"shrink": 0.01}, 1 / 3),
        (ADAMW, {"weight_decay": 0.1}, {"shrink": 0.01}, 1 / 3),
    ],
)
def test_lr_drop_exponents(
    optimizer: type, hyper: dict[str, Any], options: dict[str, Any], exponent: float
) -> None:
    group = group_of(optimizer, lr=0.1, **hyper)
    assert lr_drop_exponent(optimizer, group, **options) == pytest.approx(exponent)
    # The exponent is what the equilibrium norm itself says.
    if "shrink" in options:
        options = {"shrink": 0.01, "norm": 1.0}
    norms = [
        equilibrium_norm(optimizer, {**group, "lr": lr}, 3.0, dim=10, **options)
        for lr in (0.1, 0.01)
    ]
    assert math.log10(norms[0] / norms[1]) == pytest.approx(exponent)


@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAMW, Lion, SGDP, AdamP])
def test_tensors_stay_on_their_device(optimizer: type) -> None:
    # A tensor on "meta" has no values: reading one, or branching on it, raises.
    group = group_of(optimizer, lr=0.1, weight_decay=0.1)
    group["lr"] = torch.empty((), device="meta")
    norms = torch.empty(7, device="meta")
    for options in ({}, {"shrink": norms, "norm": norms}, {"decay": 0.1, "projected": True}):
        scale = {"gradient_scale": norms, "dim": 10}
        assert equilibrium_angular_update(optimizer, group, **scale, **options).shape in {(), (7,)}
        assert equilibrium_norm(optimizer, group, **scale, **options).device.type == "meta"
        assert relaxation_steps(optimizer, group, **scale, **options).device.type == "meta"
    assert eq.wrs_angular_update(optimizer, group, 5, **scale).device.type == "meta"
    assert eq.wrs_direction_lr(optimizer, group, 5, **scale).device.type == "meta"
    assert equilibrium_angular_update(optimizer, group, shrink=norms).shape == (7,)


@pytest.mark.parametrize(
    "ask",
    [
        equilibrium_angular_update,
        equilibrium_norm,
        relaxation_steps,
        lr_drop_exponent,
        step_response,
        verdicts.total_decay,
    ],
)
def test_an_unknown_option_is_a_type_error(ask: Any) -> None:
    """Also for an optimizer that nobody has derived: a misspelled option is never a prediction."""
    arguments = (1000,) if ask is verdicts.total_decay else ()
    for optimizer in (SGD, torch.optim.Adamax):
        with pytest.raises(TypeError, match="'shirnk'"):
            ask(optimizer, group_of(optimizer, lr=0.1), *arguments, shirnk=0.1)


# --- optimizers that ask for more, and decays of other rates
# --------------------------------------------------------------------------------------------------


MUON = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(MUON is None, reason="newer torch only")


@needs_muon
def test_muon_is_predicted_by_the_shape_and_whatever_its_adjustment() -> None:
    group = group_of(MUON, lr=0.02, weight_decay=0.1)
    assert equilibrium_angular_update(MUON, group) is None
    for adjustment in (None, "match_rms_adamw"):
        adjusted = {**group, "adjust_lr_fn": adjustment}
        angle = equilibrium_angular_update(MUON, adjusted, shape=(64, 64))
        assert angle == pytest.approx(math.sqrt(2 * 0.02 * 0.1 / 23.33), rel=1e-3)
    # The norm of the whole matrix, or of one of its rows.
    norm = equilibrium_norm(MUON, group, shape=(128, 64))
    expected = math.sqrt(2) * math.sqrt(0.02 * 0.78 * 64 * 28.54 / 0.2)
    assert norm == pytest.approx(expected, rel=1e-3)
    row = equilibrium_norm(MUON, group, shape=(128, 64), dim=64)
    assert row == pytest.approx(norm / math.sqrt(128))
    assert relaxation_steps(MUON, group, shape=(64, 64)) == pytest.approx(1 / (2 * 0.02 * 0.1))


@needs_muon
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 256)])
def test_muon_settles_as_predicted(rows: int, columns: int) -> None:
    row = Row("Muon", MUON, 0.02, {"weight_decay": 0.1}, dim=columns)
    angle, norm, _ = simulate(row, units=rows)
    assert angle == pytest.approx(1, abs=0.015)
    # The energy of its steps is .62 to .83, and .78 here for all.
    assert norm == pytest.approx(1, abs=0.06)


def test_nadam_and_radam_are_predicted_at_a_step_and_in_their_limit() -> None:
    decoupled = {"lr": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}
    nadam = group_of(torch.optim.NAdam, **decoupled)
    adamw = equilibrium_angular_update(ADAMW, group_of(ADAMW, lr=1e-3, weight_decay=0.1))
    early = equilibrium_angular_update(torch.optim.NAdam, nadam, step=1000)
    assert early == pytest.approx(math.sqrt(2 * 1e-3 * 0.1 / 3.372), rel=1e-3)
    limit = equilibrium_angular_update(torch.optim.NAdam, nadam)
    assert limit == pytest.approx(math.sqrt(2 * 1e-3 * 0.1 / 14.158), rel=1e-3)
    radam = group_of(torch.optim.RAdam, **decoupled)
    assert equilibrium_angular_update(torch.optim.RAdam, radam) == pytest.approx(adamw)
    assert equilibrium_angular_update(torch.optim.RAdam, radam, step=5) is None
    full = equilibrium_norm(torch.optim.RAdam, radam, dim=64)
    assert full == pytest.approx(math.sqrt(1e-3 * 64 / 0.2))
    assert equilibrium_norm(torch.optim.RAdam, radam, dim=64, step=100) < 0.5 * full


def test_soap_settles_as_adamw() -> None:
    hyper = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    for ask in (equilibrium_angular_update, equilibrium_norm):
        assert ask(SOAP, group_of(SOAP, **hyper), dim=64) == ask(
            ADAMW, group_of(ADAMW, **hyper), dim=64
        )


@pytest.mark.parametrize(
    ("optimizer", "hyper", "power"),
    [
        (SGD, {"momentum": 0.9}, 4),
        (ADAMW, {}, 2),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, 2),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, 2),
        (SOAP, {}, 2),
        *([] if MUON is None else [(MUON, {}, 2)]),
    ],
)
def test_the_exponent_of_a_drop_follows_the_rate_of_the_decay(
    optimizer: type, hyper: dict[str, Any], power: int
) -> None:
    group = group_of(optimizer, lr=0.1, weight_decay=0.1, **hyper)
    exponents = {"lr": 1 / power, "schedule": 1 / power, "lr_squared": 0, "constant": 2 / power}
    assert lr_drop_exponent(optimizer, group) == exponents["lr"]
    for rate, exponent in exponents.items():
        assert lr_drop_exponent(optimizer, group, decay_rate=rate) == exponent


@pytest.mark.parametrize(
    ("rate", "pull"),
    [("lr_squared", 0.3 * 0.1**2 / 0.4), ("schedule", 0.3 * 0.25), ("constant", 0.3)],
)
@pytest.mark.parametrize("named", ["option", "initial_lr", "max_lr"])
def test_a_decay_of_another_rate_is_decoupled_and_takes_the_largest_rate(
    rate: str, pull: float, named: str
) -> None:
    group = {**group_of(SGD, lr=0.1, momentum=0.9, weight_decay=0.3), "initial_lr": 0.2}
    options: dict[str, Any] = {"decay_rate": rate}
    if named == "option":
        options["lr_max"] = 0.4
    else:
        group[named] = 0.4
    # As it is written: momentum does not repeat it.
    assert equilibrium_angular_update(SGD, group, **options) == pytest.approx(
        math.sqrt(2 * pull * (1 - 0.9) / (1 + 0.9))
    )
    assert relaxation_steps(SGD, group, **options) == pytest.approx(1 / (4 * pull))


def test_a_decay_at_a_rate_of_zero_or_of_an_unknown_kind_has_no_prediction() -> None:
    group = group_of(ADAMW, lr=0.0, weight_decay=0.1)
    for rate in ("lr_squared", "constant"):
        assert equilibrium_angular_update(ADAMW, group, decay_rate=rate) is None
    with pytest.raises(ValueError, match="decay_rate"):
        equilibrium_angular_update(ADAMW, group, decay_rate="cosine")
    # Nobody has derived a shrink of another rate.
    group["lr"] = 0.1
    options = {"shrink": 0.1, "decay_rate": "constant"}
    assert equilibrium_angular_update(ADAMW, group, **options) is None


def test_under_a_corrected_decay_the_static_angle_holds_at_every_moment() -> None:
    """The equilibrium norm does not move, so a norm that starts there follows the schedule."""
    peak, steps = 3e-3, 600
    group = {**group_of(ADAMW, lr=peak, weight_decay=0.3), "initial_lr": peak}
    corrected = {"decay_rate": "lr_squared"}
    start = equilibrium_norm(ADAMW, group, dim=64, **corrected)
    course = NormCourse(ADAMW, group, [start], 64)
    for t in range(steps):
        group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * t / steps))
        course.advance(group, **corrected)
        # The buffers fill first.
        if t > 60:
            static = equilibrium_angular_update(ADAMW, group, **corrected)
            assert course.angular_update.item() == pytest.approx(static, rel=0.02)


def cautious_walk(optimizer: type, hyper: dict[str, Any], pull: float, start: float) -> Any:
    """RMS angle and norm while a decay acts on entries that the step does not lengthen."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=noise, dtype=torch.float64)
    weight *= start / weight.norm(dim=1, keepdim=True)
    stepped = optimizer([weight], **hyper)
    angles, norms = [], []
    steps = round(6 / pull)
    for t in range(steps):
        gradient = tangential(torch.randn(96, 64, generator=noise, dtype=torch.float64), weight)
        weight.grad = gradient / weight.norm(dim=1, keepdim=True)
        before = weight.clone()
        stepped.step()
        weight -= pull * before * ((weight - before) * before <= 0)
        if t > steps // 2:
            angles.append(turned(before, weight).square().mean())
            norms.append(weight.square().sum(1).mean())
    return torch.stack(angles).mean().sqrt().item(), torch.stack(norms).mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (ADAMW, {"lr": 4e-3, "betas": (0.9, 0.99)}),
        (ADAMW, {"lr": 4e-3, "betas": (0.8, 0.99)}),
        (SGD, {"lr": 0.05, "momentum": 0.9}),
        (SGD, {"lr": 0.2}),
    ],
)
def test_a_cautious_decay_settles_as_predicted(optimizer: type, hyper: dict[str, Any]) -> None:
    pull = 2e-3
    group = {**group_of(optimizer, **hyper), "weight_decay": pull / hyper["lr"]}
    options = {"cautious": True, "decay": pull / hyper["lr"]}
    angle = equilibrium_angular_update(optimizer, group, **options)
    norm = equilibrium_norm(optimizer, group, 63.0, dim=64, **options)
    measured_angle, measured_norm = cautious_walk(
        optimizer, {**hyper, "weight_decay": 0.0}, pull, norm
    )
    assert measured_angle == pytest.approx(angle, rel=0.02)
    assert measured_norm == pytest.approx(norm, rel=0.02)


def test_a_weak_cautious_decay_is_half_the_decay() -> None:
    group = group_of(ADAMW, lr=1e-6, weight_decay=0.1)
    half = {**group, "weight_decay": 0.05}
    for ask in (equilibrium_angular_update, equilibrium_norm, relaxation_steps):
        assert ask(ADAMW, group, dim=64, cautious=True) == pytest.approx(
            ask(ADAMW, half, dim=64), rel=1e-3
        )


@pytest.mark.parametrize(
    ("optimizer", "hyper", "options"),
    [
        (SGD, {"momentum": 0.9}, {}),
        (Lion, {}, {}),
        (ADAMW, {}, {"projected": True, "decay": 0.1}),
        (ADAMW, {}, {"shrink": 0.1}),
    ],
)
def test_a_cautious_decay_is_predicted_only_where_it_was_derived(
    optimizer: type, hyper: dict[str, Any], options: dict[str, Any]
) -> None:
    group = group_of(optimizer, lr=0.1, weight_decay=0.1, **hyper)
    scale = {"gradient_scale": 1.0, "dim": 64}
    assert equilibrium_angular_update(optimizer, group, **scale, **options) is not None
    cautious = {**options, "cautious": True}
    assert equilibrium_angular_update(optimizer, group, **scale, **cautious) is None
    assert equilibrium_norm(optimizer, group, 1.0, dim=64, **cautious) is None
    assert lr_drop_exponent(optimizer, group, **cautious) is None


def test_what_never_settles_says_why() -> None:
    adafactor = group_of(torch.optim.Adafactor)
    assert "norms grow for decay < lr/2" in eq.never_settles(torch.optim.Adafactor, adafactor)
    assert "ever shorter" in eq.never_settles(torch.optim.Adagrad, group_of(torch.optim.Adagrad))
    assert eq.never_settles(SGD, group_of(SGD)) is None
    assert eq.never_settles(int, {}) is None


def test_tensors_and_floats_agree() -> None:
    group = group_of(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    norms = equilibrium_norm(SGD, group, scales, shrink=2e-3 * scales, norm=scales)
    for i, scale in enumerate((0.5, 2.0)):
        assert norms[i].item() == pytest.approx(
            equilibrium_norm(SGD, group, scale, shrink=2e-3 * scale, norm=scale), rel=1e-14
        )


def test_a_learning_rate_of_zero_predicts_no_motion() -> None:
    group = group_of(SGD, lr=0.0, weight_decay=0.1)
    assert equilibrium_angular_update(SGD, group) == 0
    assert relaxation_steps(SGD, group) == math.inf


# --- exact equivalences
# --------------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (SGD, {"lr": 0.1, "weight_decay": 0.02}),
        (SGD, {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9, "nesterov": True}),
        (SGDP, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}),
        (ADAM, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}),
        (ADAMW, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}),
        (AdamP, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}),
        (Lion, {"lr": 1e-3, "weight_decay": 0.2}),
        (
            torch.optim.NAdam,
            {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3, "decoupled_weight_decay": True},
        ),
        (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.2, "eps": 1e-3}),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 10.0])
def test_equivalent_hyperparameters_keep_every_direction(
    optimizer: type, hyper: dict[str, Any], scale: float
) -> None:
    changed = eq.equivalent_hyperparameters(optimizer, group_of(optimizer, **hyper), scale)
    assert changed is not None
    directions = []
    for factor, settings in ((1.0, hyper), (scale, {**hyper, **changed})):
        noise = torch.Generator().manual_seed(3)
        target = torch.randn(4, 6, generator=noise, dtype=torch.float64)
        weight = torch.nn.Parameter(
            factor * torch.randn(4, 6, generator=noise, dtype=torch.float64)
        )
        stepped = optimizer([weight], **settings)
        for _ in range(100):
            sample = target + torch.randn(4, 6, generator=noise, dtype=torch.float64)
            stepped.zero_grad()
            (weight / weight.norm(dim=1, keepdim=True) * sample).sum().backward()
            stepped.step()
        directions.append(weight.detach() / weight.detach().norm(dim=1, keepdim=True))
    assert (directions[0] - directions[1]).abs().max() < 1e-12


@needs_muon
def test_muon_with_equivalent_hyperparameters_keeps_every_direction() -> None:
    """At a power of two, since the orthogonalisation rounds to bfloat16."""
    hyper = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9}
    changed = eq.equivalent_hyperparameters(MUON, group_of(MUON, **hyper), 4.0)
    assert changed["lr"] == 0.08
    assert changed["weight_decay"] == 0.05
    directions = []
    for factor, settings in ((1.0, hyper), (4.0, {**hyper, **changed})):
        noise = torch.Generator().manual_seed(3)
        weight = torch.nn.Parameter(
            factor * torch.randn(4, 6, generator=noise, dtype=torch.float64)
        )
        stepped = MUON([weight], **settings)
        for _ in range(50):
            sample = torch.randn(4, 6, generator=noise, dtype=torch.float64)
            stepped.zero_grad()
            (weight / weight.norm() * sample).sum().backward()
            stepped.step()
        directions.append(weight.detach() / weight.detach().norm())
    assert (directions[0] - directions[1]).abs().max() < 1e-12
