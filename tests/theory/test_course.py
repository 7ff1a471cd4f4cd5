"""Courses of norms against simulations with real optimizers: gradients of pure noise on
scale-invariant vectors, under schedules, from far off the equilibrium."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from paper_optimizers import SGDP, SOAP, AdamP, Lion, group_of, tangential
from torch import Tensor, nn

from lightning_normdyn.equilibrium import (
    NormCourse,
    equilibrium_norm,
    equivalent_hyperparameters,
    norm_course,
)
from lightning_normdyn.errors import NotSupportedError

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
NADAM, RADAM = torch.optim.NAdam, torch.optim.RAdam
RMSPROP, ADAGRAD = torch.optim.RMSprop, torch.optim.Adagrad
MUON = getattr(torch.optim, "Muon", None)
DECOUPLED = {"decoupled_weight_decay": True}
DIM = 64
WINDOW = 100
STEPS = 1200

Schedule = Callable[[int, int], float]


def constant(step: int, steps: int) -> float:
    return 1.0


def warm_up_and_cosine(step: int, steps: int) -> float:
    warm = steps // 10
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def wsd(step: int, steps: int) -> float:
    warm, stable = steps // 10, round(0.7 * steps)
    if step < warm:
        return (step + 1) / warm
    return 1.0 if step < stable else (steps - step) / (steps - stable)


def linear_to_zero(step: int, steps: int) -> float:
    warm = steps // 20
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def rise_and_fall(step: int, steps: int) -> float:
    return min(step + 1, steps - step) / (steps // 2)


SCHEDULES = [constant, warm_up_and_cosine, wsd, linear_to_zero]


@dataclass(frozen=True)
class Family:
    """An optimizer with its settings, and what a callback does beside it.

    Args:
        norm: where the walk starts at 1x; None: the equilibrium norm.
        alpha: of AWS.
        projected: the step loses its radial part, and ``decay`` is applied to the weight.
        decay: λ that the test applies to the weight.
        decay_rate: what it is multiplied by.
        matrix: the shape of a vector where it is a matrix.
        vectors: how many there are.
        first_window: what the angle may be off in the first window.
    """

    name: str
    optimizer: Any
    hyper: dict[str, Any] = field(default_factory=dict)
    norm: float | None = None
    alpha: float | None = None
    projected: bool = False
    decay: float | None = None
    decay_rate: str = "lr"
    matrix: tuple[int, int] | None = None
    vectors: int = 96
    first_window: float = 0.02
    sigma: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def dim(self) -> int:
        return DIM if self.matrix is None else math.prod(self.matrix)

    def group(self) -> dict[str, Any]:
        shape = self.matrix or (2, 2)
        return self.optimizer([nn.Parameter(torch.ones(*shape))], **self.hyper).param_groups[0]

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.projected:
            options["projected"] = True
        if self.decay is not None:
            options["decay"] = self.decay
        if self.decay_rate != "lr":
            options.update(decay_rate=self.decay_rate, lr_max=self.hyper["lr"])
        return options

    def start(self) -> float:
        if self.norm is not None:
            return self.norm
        options = self.options()
        if self.alpha is not None:
            options.update(shrink=self.alpha, norm=1.0)
        norm = equilibrium_norm(
            self.optimizer,
            self.group(),
            self.sigma**2 * (self.dim - 1),
            dim=self.dim,
            shape=self.matrix,
            **options,
        )
        assert norm is not None
        return float(norm)


class Walk:
    """Vectors of one family under a schedule, and their course beside them."""

    def __init__(self, family: Family, schedule: Schedule, times: float, steps: int) -> None:
        self.family, self.schedule, self.steps = family, schedule, steps
        self.noise = torch.Generator().manual_seed(0)
        norm = times * family.start()
        if family.matrix is None:
            start = self.random(family.vectors, DIM)
            start = start * (norm / start.norm(dim=1, keepdim=True))
            self.weights = [nn.Parameter(start)]
        else:
            starts = [self.random(*family.matrix) for _ in range(family.vectors)]
            self.weights = [nn.Parameter(start * (norm / start.norm())) for start in starts]
        self.optimizer = family.optimizer(self.weights, **family.hyper)
        self.group = self.optimizer.param_groups[0]
        self.course = NormCourse(
            family.optimizer, self.group, [norm], family.dim, shape=family.matrix
        )
        self.energies: list[float] = []
        self.rough: list[bool] = []

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise, dtype=torch.float64)

    def rows(self, weight: Tensor) -> Tensor:
        return (
            weight.detach().clone()
            if self.family.matrix is None
            else weight.detach().reshape(1, -1).clone()
        )

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean squares of angles and norms, measured and expected, of each step."""
        numbers = [self.step(t) for t in range(self.steps)]
        return tuple(np.array(column) for column in zip(*numbers, strict=True))

    @torch.no_grad()
    def step(self, t: int) -> tuple[float, float, float, float]:
        family, course = self.family, self.course
        lr = self.group["lr"] = family.hyper["lr"] * self.schedule(t, self.steps)
        expected_norm = course.weight_norm[0]
        before = [self.rows(weight) for weight in self.weights]
        for weight in self.weights:
            rows = self.rows(weight)
            noise = family.sigma * self.random(*rows.shape)
            gradient = tangential(noise, rows) / rows.norm(dim=1, keepdim=True)
            weight.grad = gradient.reshape(weight.shape)
            self.decay_weight(weight, lr)
        anchors = [self.rows(weight) for weight in self.weights]
        self.optimizer.step()
        if family.projected:
            for weight, anchor in zip(self.weights, anchors, strict=True):
                weight.copy_(anchor + tangential(weight - anchor, anchor))
        old, new = torch.cat(before), torch.cat([self.rows(weight) for weight in self.weights])
        angle = turned(old, new).square().mean().item()
        square = old.square().sum(1).mean().item()

        options = family.options()
        if family.alpha is not None:
            options["shrink"] = family.alpha * course.weight_norm
        energy = np.mean(self.energies[-5:]) if self.energies else None
        scale = family.sigma**2 * (family.dim - 1)
        course.advance(self.group, scale, energy=energy, **options)
        self.rough.append(course.rough)
        # Muon learns the energy of its steps from rows; here every tenth step has one.
        if family.matrix is not None and t % 10 == 0:
            self.energies.append(math.tan(math.sqrt(angle)) ** 2 * square / lr**2)
        return angle, square, course.angular_update[0] ** 2, expected_norm**2

    def decay_weight(self, weight: Tensor, lr: float) -> None:
        """What callbacks do to a weight before its step."""
        family = self.family
        if family.alpha is not None:
            weight.mul_(1 - lr * family.alpha * weight.norm(dim=1, keepdim=True))
        if family.decay is not None:
            corrected = lr / family.hyper["lr"] if family.decay_rate == "lr_squared" else 1.0
            weight.mul_(1 - lr * corrected * family.decay)


def turned(before: Tensor, after: Tensor) -> Tensor:
    radial = (before * after).sum(1) / before.norm(dim=1)
    return torch.atan2(tangential(after, before).norm(dim=1), radial)


def windows(values: np.ndarray) -> np.ndarray:
    """RMS of each window of 100 steps."""
    whole = len(values) // WINDOW * WINDOW
    return np.sqrt(values[:whole].reshape(-1, WINDOW).mean(1))


def assert_on_course(family: Family, schedule: Schedule, times: float, steps: int) -> None:
    angles, norms, expected_angles, expected_norms = Walk(family, schedule, times, steps).run()
    off = np.abs(windows(angles) / windows(expected_angles) - 1)
    assert off[0] < family.first_window
    assert off.max() < max(0.02, family.first_window if off.argmax() == 0 else 0.02)
    assert np.abs(windows(norms) / windows(expected_norms) - 1).max() < 0.02


RECURSIVE = [
    Family("SGD", SGD, {"lr": 0.1, "weight_decay": 1e-2}),
    Family("SGD, momentum", SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}),
    Family(
        "SGD, dampening",
        SGD,
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 5e-3},
    ),
    Family(
        "SGD, Nesterov",
        SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-3},
    ),
    Family("AdamW", ADAMW, {"lr": 3e-3, "weight_decay": 0.3}),
    Family("AdamW .99", ADAMW, {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.99)}),
    Family("AdamW .95", ADAMW, {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.95)}),
    Family("Adam + L2", ADAM, {"lr": 3e-3, "weight_decay": 0.3}, sigma=0.5),
    Family("NAdam", NADAM, {"lr": 3e-3, "weight_decay": 0.3, **DECOUPLED}),
    Family("NAdam + L2", NADAM, {"lr": 3e-3, "weight_decay": 0.3}, norm=0.6),
    Family("RAdam", RADAM, {"lr": 3e-3, "weight_decay": 0.3, **DECOUPLED}),
    Family("RMSprop", RMSPROP, {"lr": 1e-3, "weight_decay": 0.3}, norm=0.5, first_window=0.025),
    Family("Adagrad", ADAGRAD, {"lr": 0.03, "weight_decay": 0.1}, norm=1.0),
    Family("SGDP", SGDP, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3}),
    Family("AdamP", AdamP, {"lr": 3e-3, "weight_decay": 1.5}),
    Family("SGD, projected", SGD, {"lr": 0.05, "momentum": 0.9}, projected=True, decay=5e-3),
    Family("AWS on SGD", SGD, {"lr": 0.05, "momentum": 0.9}, alpha=4e-3),
    Family("AWS on AdamW", ADAMW, {"lr": 3e-3, "weight_decay": 0.0}, alpha=0.1),
    Family(
        "AdamC",
        ADAMW,
        {"lr": 3e-3, "weight_decay": 0.0},
        decay=0.3,
        decay_rate="lr_squared",
        norm=math.sqrt(3e-3 * DIM / 0.6),
    ),
    Family(
        "SOAP",
        SOAP,
        {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.9, 0.98)},
        matrix=(16, 16),
        vectors=16,
    ),
]
BY_COHERENCE = [
    # Its memory of a hundred steps must be short against the relaxation time.
    Family("Lion", Lion, {"lr": 5e-4, "weight_decay": 0.5, "betas": (0.9, 0.98)}),
]
if MUON is not None:
    BY_COHERENCE.append(
        Family(
            "Muon",
            MUON,
            {"lr": 3e-3, "weight_decay": 0.3},
            matrix=(64, 64),
            vectors=4,
        )
    )


QUICK = ("SGD, Nesterov", "AdamW", "Adam + L2", "NAdam", "RAdam", "RMSprop", "Adagrad", "SGDP")


@pytest.mark.parametrize("family", [f for f in RECURSIVE if f.name in QUICK], ids=str)
def test_a_short_run_of_each_family_is_on_course(family: Family) -> None:
    assert_on_course(replace(family, vectors=32), rise_and_fall, 1.5, 100)


def test_a_short_run_under_aws_is_on_course() -> None:
    (family,) = [f for f in RECURSIVE if f.name == "AWS on SGD"]
    assert_on_course(replace(family, vectors=32), rise_and_fall, 1.5, 100)


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("times", [1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", RECURSIVE, ids=str)
def test_every_optimizer_stays_on_course_under_any_schedule(
    family: Family, schedule: Schedule, times: float
) -> None:
    assert_on_course(family, schedule, times, STEPS)


# --- the recursion itself
# --------------------------------------------------------------------------------------------------


def course_of(optimizer: type, norms: Any = (2.0,), dim: Any = DIM, **hyper: Any) -> Any:
    group = group_of(optimizer, **hyper)
    return NormCourse(optimizer, group, norms, dim), group


def followed(
    optimizer: type, hyper: dict[str, Any], scale: float | None, steps: int = 120, **options: Any
) -> tuple[list[float], list[float]]:
    """Angles and norms of a vector that starts with norm 2, while the learning rate falls."""
    course, group = course_of(optimizer, **hyper)
    angles, norms = [], []
    for t in range(steps):
        group["lr"] = hyper["lr"] * (1 - t / steps)
        course.advance(group, scale, **options)
        angles.append(course.angular_update.item())
        norms.append(course.weight_norm.item())
    return angles, norms


@pytest.mark.parametrize(
    ("optimizer", "hyper", "options", "coefficients"),
    [
        (SGD, {"momentum": 0.9, "dampening": 0.2}, {}, reference.sgd_step(0.9, 0.2)),
        (SGD, {"momentum": 0.9, "nesterov": True}, {}, reference.sgd_step(0.9, nesterov=True)),
        (ADAM, {"eps": 1e-3}, {}, reference.adam_step(0.9, 0.999, eps=1e-3)),
        (ADAMW, {}, {}, reference.adam_step(0.9, 0.999)),
        (ADAMW, {}, {"projected": True, "decay": 0.3}, reference.adam_step(0.9, 0.999)),
        (NADAM, {**DECOUPLED}, {}, reference.nadam_step(0.9, 0.999, 4e-3)),
        (RADAM, {**DECOUPLED}, {}, reference.radam_step(0.9, 0.999)),
        (RMSPROP, {"alpha": 0.9}, {}, reference.rmsprop_step(0.9)),
        (ADAGRAD, {"lr_decay": 0.1}, {}, reference.adagrad_step(0.1)),
    ],
)
def test_the_recursion_is_that_of_the_derivation(
    optimizer: type,
    hyper: dict[str, Any],
    options: dict[str, Any],
    coefficients: Any,
) -> None:
    lr, decay, steps = 3e-3, 0.3, 120
    group = {"lr": lr, "weight_decay": decay, **hyper}
    coupled = optimizer is not ADAMW and "decoupled_weight_decay" not in hyper
    expected = reference.course(
        coefficients,
        norm=2.0,
        dim=DIM,
        scale=7.0,
        rates=[lr * (1 - t / steps) for t in range(steps)],
        coupled=decay if coupled else 0.0,
        decoupled=0.0 if coupled else decay,
        projected=options.get("projected", False),
    )
    # A size of gradients that divides itself out is not asked for; RAdam asks for it at first.
    angles, norms = followed(optimizer, group, 7.0, steps, **options)
    assert angles == pytest.approx(expected[0], rel=1e-6)
    assert norms == pytest.approx(expected[1], rel=1e-6)


def test_a_size_of_gradients_that_stays_divides_itself_out_in_the_adam_family() -> None:
    for optimizer, hyper in ((ADAMW, {"eps": 0.0}), (NADAM, {**DECOUPLED, "eps": 0.0})):
        hyper = {"lr": 3e-3, "weight_decay": 0.3, **hyper}
        for of_any, of_small in zip(
            followed(optimizer, hyper, None), followed(optimizer, hyper, 1e-4), strict=True
        ):
            assert of_small == pytest.approx(of_any, rel=1e-12)


@pytest.mark.parametrize("second", [0.999, 0.9])
def test_gradients_that_fall_leave_a_second_moment_that_remembers_larger_ones(
    second: float,
) -> None:
    """Against the derivation, step by step; and by what it makes of a size that has fallen."""
    lr, steps = 3e-3, 300
    hyper = {"lr": lr, "weight_decay": 0.3, "betas": (0.9, second), "eps": 1e-6}
    scales = [5.0 * math.exp(-t / 125) for t in range(steps)]
    step = reference.adam_step(0.9, second, eps=1e-6)
    settings = {"norm": 2.0, "dim": DIM, "rates": [lr] * steps, "decoupled": 0.3}
    expected = reference.course(step, scale=scales, **settings)
    of_constant = reference.course(step, scale=5.0, **settings)
    course, group = course_of(ADAMW, **hyper)
    angles = []
    for scale in scales:
        course.advance(group, scale)
        angles.append(course.angular_update.item())
    assert angles == pytest.approx(expected[0], rel=1e-9)
    assert course.weight_norm.item() == pytest.approx(expected[1][-1], rel=1e-9)
    lost = 1 - angles[-1] / of_constant[0][-1]
    assert lost > 0.3 if second == 0.999 else lost < 0.05


def test_a_size_of_gradients_that_is_not_known_any_more_is_taken_to_stay() -> None:
    hyper = {"lr": 3e-3, "weight_decay": 0.3}
    (told, group), (untold, _) = course_of(ADAMW, **hyper), course_of(ADAMW, **hyper)
    for t in range(60):
        size = 4.0 if t < 30 else 1.0
        told.advance(group, size)
        untold.advance(group, size if t < 40 else None)
    assert untold.angular_update.item() == told.angular_update.item()
    # A course that began without goes on without: its buffers are in another unit.
    late, _ = course_of(ADAMW, **hyper)
    never, _ = course_of(ADAMW, **hyper)
    for t in range(60):
        late.advance(group, None if t < 30 else 1.0)
        never.advance(group)
    assert late.angular_update.item() == never.angular_update.item()


def test_every_vector_has_its_own_norm_and_length() -> None:
    norms, dims = [1.0, 4.0, 2.5], [8, 64, 16]
    hyper = {"lr": 1e-2, "weight_decay": 0.2}
    together, group = course_of(ADAMW, norms, dims, **hyper)
    alone = [
        course_of(ADAMW, [norm], dim, **hyper)[0] for norm, dim in zip(norms, dims, strict=True)
    ]
    for course in (together, *alone):
        for _ in range(30):
            course.advance(group)
    assert together.weight_norm.tolist() == [course.weight_norm.item() for course in alone]
    assert together.angular_update.tolist() == [course.angular_update.item() for course in alone]


def test_norms_are_those_that_the_next_step_finds_and_angles_those_of_the_last() -> None:
    course, group = course_of(SGD, lr=0.1, weight_decay=0.1)
    assert course.weight_norm.tolist() == [2.0]
    assert np.isnan(course.angular_update).all()
    course.advance(group, 4.0)
    assert course.angular_update.item() == pytest.approx(
        math.atan(0.1 * math.sqrt(4 / 4) / 2 / 0.99)
    )
    assert course.weight_norm.item() == pytest.approx(math.sqrt((0.99 * 2) ** 2 + 0.1**2))


@pytest.mark.parametrize(
    ("optimizer", "hyper"), [(SGD, {"lr": 0.1}), (Lion, {"lr": 0.1, "betas": (0.9, 0.99)})]
)
def test_an_angle_is_that_of_directions_however_long_the_step(
    optimizer: type, hyper: dict[str, Any]
) -> None:
    course, group = course_of(optimizer, **hyper)
    course.advance({**group, "lr": 1e9}, 1e4)
    assert course.angular_update.item() == pytest.approx(math.pi / 2)
    small, group = course_of(optimizer, **hyper)
    small.advance({**group, "lr": 1e-9}, 4.0)
    # Both steps are 1 long at first, SGD's because of its gradient and Lion's per entry.
    step = {SGD: 1.0, Lion: math.sqrt(DIM)}[optimizer]
    assert small.angular_update.item() == pytest.approx(1e-9 * step / 2, rel=1e-12)


def test_momentum_is_read_at_every_step() -> None:
    """A one-cycle schedule cycles it."""
    course, group = course_of(SGD, lr=0.1, momentum=0.9)
    course.advance(group, 4.0)
    group["momentum"] = 0.0
    course.advance(group, 4.0)
    plain, _ = course_of(SGD, course_norms := [course.weight_norm.item()], lr=0.1)
    group["momentum"] = 0.0
    course.advance(group, 4.0)
    plain.advance(group, 4.0)
    assert plain.weight_norm == pytest.approx(course.weight_norm)
    assert len(course_norms) == 1


# --- rescales and checkpoints
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}),
        (ADAM, {"lr": 1e-2, "weight_decay": 0.2, "eps": 1e-3}),
        (ADAMW, {"lr": 1e-2, "weight_decay": 0.2}),
        (Lion, {"lr": 1e-3, "weight_decay": 0.2}),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 10.0])
def test_a_rescale_with_its_buffers_is_the_exact_symmetry(
    optimizer: type, hyper: dict[str, Any], scale: float
) -> None:
    """The rescaled course turns as before if the hyperparameters follow."""
    course, group = course_of(optimizer, **hyper)
    for _ in range(20):
        course.advance(group, 5.0)
    rescaled = copy.deepcopy(course)
    rescaled.rescale(scale)
    changed = equivalent_hyperparameters(optimizer, group, scale)
    assert changed is not None
    for _ in range(20):
        course.advance(group, 5.0)
        rescaled.advance({**group, **changed}, 5.0)
        assert rescaled.angular_update == pytest.approx(course.angular_update, rel=1e-10)
    assert rescaled.weight_norm == pytest.approx(scale * course.weight_norm, rel=1e-10)


@pytest.mark.parametrize("buffers", [True, False])
def test_a_rescaled_walk_stays_on_course(buffers: bool) -> None:
    family = replace(RECURSIVE[1], vectors=64)
    walk = Walk(family, constant, 2.0, 300)
    for t in range(100):
        walk.step(t)
    factor = family.start() / walk.course.weight_norm
    with torch.no_grad():
        for weight in walk.weights:
            weight *= float(factor[0])
            if buffers:
                walk.optimizer.state[weight]["momentum_buffer"] /= float(factor[0])
    walk.course.rescale(factor, buffers=buffers)
    assert walk.course.weight_norm == pytest.approx([family.start()])
    numbers = np.array([walk.step(t) for t in range(100, 160)])
    measured, expected = numbers[:20, 0].mean(), numbers[:20, 2].mean()
    assert math.sqrt(measured / expected) == pytest.approx(1, abs=0.02)
    assert np.sqrt(numbers[:, 1] / numbers[:, 3]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        (NADAM, {"lr": 1e-2, "weight_decay": 0.2, **DECOUPLED}),
        (RADAM, {"lr": 1e-2, "weight_decay": 0.2, **DECOUPLED}),
        (Lion, {"lr": 1e-3, "weight_decay": 0.2}),
    ],
)
def test_a_course_goes_on_from_its_state(optimizer: type, hyper: dict[str, Any]) -> None:
    course, group = course_of(optimizer, [2.0, 3.0], **hyper)
    for _ in range(9):
        course.advance(group, 5.0)
    state = json.loads(json.dumps(course.state_dict()))
    resumed, _ = course_of(optimizer, [1.0, 1.0], **hyper)
    resumed.load_state_dict(state)
    assert resumed.weight_norm.tolist() == course.weight_norm.tolist()
    assert resumed.angular_update.tolist() == course.angular_update.tolist()
    for one in (course, resumed):
        for _ in range(5):
            one.advance(group, 5.0)
    # As text: not a number is not equal to itself.
    assert json.dumps(resumed.state_dict()) == json.dumps(course.state_dict())


def test_a_state_of_other_vectors_is_refused() -> None:
    course, _ = course_of(SGD, [2.0, 3.0], lr=0.1)
    other, _ = course_of(SGD, [2.0], lr=0.1)
    with pytest.raises(ValueError, match="of 1 vectors"):
        course.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="lacks carried"):
        course.load_state_dict({k: v for k, v in course.state_dict().items() if k != "carried"})


# --- what is missing, and what is not understood
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "changed", "scale"),
    [
        (SGD, {"lr": None}, 1.0),
        (SGD, {"lr": math.nan}, 1.0),
        (SGD, {"lr": "fast"}, 1.0),
        (SGD, {"momentum": None}, 1.0),
        (SGD, {"lr": torch.empty((), device="meta")}, 1.0),
        (SGD, {}, None),
        (SGD, {}, math.nan),
        (ADAM, {}, None),
        (ADAM, {"amsgrad": True}, 1.0),
        (ADAM, {"betas": (1.0, 1.0)}, 1.0),
        (RADAM, DECOUPLED, None),
        (RMSPROP, {}, None),
        (RMSPROP, {"momentum": 0.9}, 1.0),
        (Lion, {"weight_decouple": False}, 1.0),
    ],
)
def test_what_is_missing_gives_nan_from_there_on_and_raises_nothing(
    optimizer: type, changed: dict[str, Any], scale: float | None
) -> None:
    course, group = course_of(optimizer, lr=0.1, weight_decay=0.1)
    course.advance({**group, **changed}, scale)
    assert np.isnan(course.weight_norm).all()
    assert np.isnan(course.angular_update).all()
    course.advance(group, 1.0)
    assert np.isnan(course.weight_norm).all()
    assert np.isnan(course.angular_update).all()


@pytest.mark.parametrize("rate", ["lr_squared", "constant"])
def test_a_shrink_of_another_rate_and_a_cautious_decay_were_not_derived(rate: str) -> None:
    for options in ({"shrink": 0.1, "decay_rate": rate}, {"cautious": True}):
        course, group = course_of(ADAMW, lr=0.1, weight_decay=0.1)
        course.advance(group, **options)
        assert np.isnan(course.weight_norm).all()


def test_a_gradient_scale_that_comes_too_late_gives_nan() -> None:
    """Buffers were filled in another unit: a coupled decay that starts in mid-run."""
    course, group = course_of(ADAM, lr=0.1)
    course.advance(group)
    assert np.isfinite(course.weight_norm).all()
    group["weight_decay"] = 0.1
    course.advance(group, 1.0)
    assert np.isnan(course.weight_norm).all()


def test_a_learning_rate_of_zero_turns_nothing_and_only_a_constant_decay_acts() -> None:
    course, group = course_of(ADAMW, lr=0.0, weight_decay=0.1)
    course.advance(group)
    assert (course.angular_update, course.weight_norm) == (0.0, 2.0)
    course.advance(group, decay_rate="constant")
    assert course.weight_norm.item() == pytest.approx(2.0 * 0.9)


@pytest.mark.parametrize("rate", ["lr_squared", "schedule", "constant"])
def test_a_decay_of_another_rate_is_a_pull_of_its_own(rate: str) -> None:
    lrs = [0.1, 0.4, 0.2]
    pulls = {
        "lr_squared": [0.3 * 0.1, 0.3 * 0.4, 0.3 * 0.2**2 / 0.4],
        "schedule": [0.3, 0.3, 0.3 * 0.2 / 0.4],
        "constant": [0.3] * 3,
    }[rate]
    course, group = course_of(SGD, lr=0.1, weight_decay=0.3)
    plain, _ = course_of(SGD, lr=0.1)
    for lr, pull in zip(lrs, pulls, strict=True):
        group["lr"] = lr
        # The largest learning rate so far, since the group names none.
        course.advance(group, 2.0, decay_rate=rate)
        plain.advance(group, 2.0, decay=pull / lr)
    assert course.weight_norm == pytest.approx(plain.weight_norm, rel=1e-12)


class OwnStep(SGD):
    """Steps in a way nobody has derived."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        (OwnStep, {}),
        (ADAM, {"amsgrad": True}),
        (RMSPROP, {"momentum": 0.9}),
        (RMSPROP, {"centered": True}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Adafactor, {}),
        *([] if MUON is None else [(MUON, {}), (MUON, {"ns_steps": 4})]),
    ],
)
def test_what_is_not_understood_has_no_course(optimizer: type, hyper: dict[str, Any]) -> None:
    group = group_of(optimizer, lr=0.1, **hyper)
    with pytest.raises(NotSupportedError, match=optimizer.__name__):
        NormCourse(optimizer, group, [1.0], DIM)
    assert norm_course(optimizer, group, [1.0], DIM) is None


def test_a_group_without_its_keys_has_no_course() -> None:
    with pytest.raises(NotSupportedError, match="lacks 'momentum'"):
        NormCourse(SGD, {"lr": 0.1, "weight_decay": 0.0}, [1.0], DIM)


@pytest.mark.parametrize(
    ("norms", "dim", "message"),
    [
        ([0.0], 9, "`norms`"),
        ([math.nan], 9, "`norms`"),
        ([math.inf], 9, "`norms`"),
        ([-1.0], 9, "`norms`"),
        ([], 9, "`norms`"),
        ([[1.0]], 9, "`norms`"),
        ([1.0], 1, "`dim`"),
        ([1.0, 2.0], [9], "`dim`"),
        ([1.0], [9, 9], "`dim`"),
    ],
)
def test_impossible_starts_are_refused(norms: Any, dim: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        course_of(SGD, norms, dim, lr=0.1)


def test_an_unknown_option_is_a_type_error_and_changes_nothing() -> None:
    course, group = course_of(SGD, lr=0.1)
    with pytest.raises(TypeError, match="'projcted'"):
        course.advance(group, 1.0, projcted=True)
    with pytest.raises(ValueError, match="decay_rate"):
        course.advance(group, 1.0, decay_rate="cosine")
    assert course.weight_norm.tolist() == [2.0]


# --- where only the coherence is known
# --------------------------------------------------------------------------------------------------


def test_lion_is_rough_where_its_memory_is_long_against_the_relaxation() -> None:
    def rough(decay: float) -> bool:
        course, group = course_of(Lion, lr=1e-3, weight_decay=decay, betas=(0.9, 0.99))
        course.advance(group)
        return course.rough

    # A memory of 100 steps: 500 steps of relaxation are 1/(2 · 1e-3).
    assert rough(1.05)
    assert not rough(0.95)


@pytest.mark.skipif(MUON is None, reason="newer torch only")
def test_muon_is_rough_until_the_energy_of_its_steps_was_measured() -> None:
    group = group_of(MUON, lr=1e-3, weight_decay=0.1)
    course = NormCourse(MUON, group, [4.0], DIM, shape=(8, 8))
    course.advance(group)
    assert course.rough
    course.advance(group, energy=6.0)
    assert not course.rough


def assert_on_course_by_coherence(family: Family, schedule: Schedule, times: float) -> None:
    walk = Walk(family, schedule, times, STEPS)
    angles, norms, expected_angles, expected_norms = walk.run()
    angle = windows(angles) / windows(expected_angles) - 1
    norm = windows(norms) / windows(expected_norms) - 1
    assert not any(walk.rough[1:])
    assert np.abs(angle).max() < 0.02
    assert np.abs(norm).max() < 0.02


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("times", [1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", BY_COHERENCE, ids=str)
def test_what_is_known_by_its_coherence_stays_on_course(
    family: Family, schedule: Schedule, times: float
) -> None:
    assert_on_course_by_coherence(family, schedule, times)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_steps_that_have_their_settings_in_common_are_those_taken_one_by_one(optimizer):
    weight = torch.nn.Parameter(torch.ones(2, 8))
    options = {"momentum": 0.9} if optimizer is SGD else {}
    group = optimizer([weight], lr=0.1, weight_decay=0.1, **options).param_groups[0]
    single = NormCourse(optimizer, group, [2.0, 3.0], [8, 64])
    several = NormCourse(optimizer, group, [2.0, 3.0], [8, 64])
    treatment = several.under(group)
    for step in range(30):
        lr, scale = 0.1 / (step + 1), np.array([4.0, 5.0 + step])
        # From the middle on a shrink acts, which follows the norm.
        shrink = 0.1 * single.weight_norm if step > 20 else None
        single.advance({**group, "lr": lr}, scale, shrink=shrink)
        several.step(treatment, lr, scale, shrink=shrink)
        if step == 10:
            # What goes on from the arrays of another course goes on as that one.
            dims = np.array([8.0, 64.0])
            several = NormCourse.going_on(optimizer, several.arrays(), dims)
    assert np.isfinite(single.weight_norm).all()
    assert several.state_dict() == single.state_dict()
