"""What the norm and angle of each scale-invariant weight should be by now, whatever the schedule
has been so far.

Between two logging steps the host only notes with which hyperparameters the steps were taken. At a
logging step it walks through them: `lightning_normdyn.theory.course.NormCourse` has the
mathematics, and takes all weights of a param group at once. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, pi, tan
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.value_checks import (
    Check,
    flag,
    many,
    number,
    record,
    require,
    table,
    text,
    whole,
)
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.rate_drop import Rate
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import Options, own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.theory.course import NormCourse, norm_course

from .course_states import joined, shared_numbers, split
from .gradient_sizes import FEWEST_ROWS, MOST_ROWS, averages, with_one_more
from .passed_steps import Stretch
from .pulls import options_of

Doubles = NDArray[np.float64]

FILLS_BUFFERS = 100
"""Steps after which it hardly matters what the buffers held at the start of a course: its
angles are up to a tenth off while a second moment remembers a longer weight."""


class WeightStep(NamedTuple):
    """One measured step of one weight.

    Args:
        name: of the weight.
        group: place of its param group.
        effects: what callbacks do to it.
        dim: entries of a vector.
        shape: rows and columns, of a matrix.
        norm: root of the vectors' mean square norm, before the step.
        angle: root of their mean square angle.
        lr: the rate of the step; NaN where nobody can tell.
        gradient_scale: mean of ‖g‖²‖w‖² over its vectors; 0 without a gradient.
        is_warm: whether the optimizer had stepped this weight before its course began.
    """

    name: str
    group: int
    effects: Effects
    dim: int
    shape: tuple[int, int] | None
    norm: float
    angle: float
    lr: float
    gradient_scale: float
    is_warm: bool = False


class Expectation(NamedTuple):
    """Where the course of one weight stands after the newest row's step. It never changes.

    Args:
        number: of that step.
        course: state of the course, of one vector.
        rate: the learning rate of that step, and how it has changed.
        start: norm at the first step, to which WeightRescaling may set the weight back.
        effects: what callbacks did to the weight in that step, as text.
        silent_until: number of the step from which on it is compared. A course that starts in the
            middle of a run does not know the optimizer's buffers.
        scales: gradient scales of the newest rows.
        energies: tan²θ ‖w‖²/lr² of the newest rows.
    """

    number: int
    course: Mapping[str, Any]
    rate: Rate
    start: float
    effects: str
    silent_until: int = 0
    scales: tuple[float, ...] = ()
    energies: tuple[float, ...] = ()

    @property
    def shared(self) -> tuple[Any, ...]:
        """What weights must have in common to be followed together."""
        return (self.number, self.rate, *shared_numbers(self.course))


class Expected(NamedTuple):
    """What a row is compared with.

    Args:
        expectation: for the next row.
        angle: RMS, of the row's step; None while the course is silent.
        norm: before that step, root of the mean square; None while the course is silent.
        rough: whether both are some percent off.
    """

    expectation: Expectation
    angle: float | None
    norm: float | None
    rough: bool


@dataclass(frozen=True)
class Interval:
    """The steps of one optimizer since its newest row, the measured one included.

    Args:
        optimizer: the optimizer, or its class.
        groups: its param groups at the measured step.
        number: of the measured step.
        stretches: the steps since the newest row; empty where they are not known.
        reads_rates: whether the learning rate of a param group is the rate that a step applies.
    """

    optimizer: AnOptimizer
    groups: Sequence[Mapping[str, Any]]
    number: int
    stretches: Sequence[Stretch]
    reads_rates: bool = True


def follow(
    interval: Interval, steps: Sequence[WeightStep], known: Mapping[str, Expectation]
) -> dict[str, Expected]:
    """What is expected at a measured step, by weight; a weight whose course is not understood has
    no entry.

    Args:
        interval: the steps since the newest row.
        steps: the measured one, of each weight that took it.
        known: what was expected so far. The course of a weight that is not among them starts here.
    """
    lots: dict[Any, list[tuple[WeightStep, Expectation | None]]] = {}
    for step in steps:
        # A weight that has no length yet begins when it has one.
        if not (step.norm > 0 and isfinite(step.norm)):
            continue
        before = _going_on(known.get(step.name), step, interval)
        shared = None if before is None else before.shared
        # Only measured rates may differ within a group, and then by more than rounding.
        rate = None if interval.reads_rates else f"{step.lr:.6g}"
        key = (step.group, step.effects, step.shape, shared, rate)
        lots.setdefault(key, []).append((step, before))
    expected: dict[str, Expected] = {}
    for together in lots.values():
        # All of a lot go on, or none does.
        goes_on = [before for _, before in together if before is not None]
        expected.update(_Lot(interval, [step for step, _ in together], goes_on).expected())
    return expected


def _going_on(
    before: Expectation | None, step: WeightStep, interval: Interval
) -> Expectation | None:
    """An expectation, if all steps since are known, and where the norm stood before them."""
    if before is None or before.number >= interval.number or not interval.stretches:
        return None
    # A weight that had no gradient at the newest row was left alone nobody knows how often.
    if interval.stretches[0].first != before.number + 1:
        return None
    # An epoch has begun or ended in which a callback acts, and in which step nobody knows here.
    if before.effects != step.effects.text:
        return None
    return before if isfinite(before.course["ww"][0]) else None


class _Lot:
    """Weights of one param group that can be followed together.

    Args:
        interval: the steps since the newest row.
        steps: the measured one, of each weight.
        before: what was expected of each after the newest row; empty for a start.
    """

    def __init__(
        self, interval: Interval, steps: Sequence[WeightStep], before: Sequence[Expectation]
    ) -> None:
        self._interval = interval
        self._steps = steps
        self._before = before
        self._first = steps[0]
        self._kind = class_for_predictions(interval.optimizer)
        self._group = {**interval.groups[self._first.group], "lr": self._first.lr}
        self._dims = np.array([step.dim for step in steps], dtype=np.float64)
        self._response = own_response(self._kind, self._group, Subject(self._first.shape))
        self._energy = self._measured_energy()
        self._norms = np.array([step.norm for step in steps], dtype=np.float64)
        self._starts = np.array([b.start for b in before] or self._norms, dtype=np.float64)
        self._rate = before[0].rate if before else Rate(self._first.lr)

    def expected(self) -> dict[str, Expected]:
        """By weight; empty where the course is not understood."""
        first = self._first
        course = norm_course(self._kind, self._group, self._norms, self._dims, shape=first.shape)
        if course is None:
            return {}
        if self._before:
            course.load_state_dict(joined([before.course for before in self._before]))
        found_norm = self._walk(course)
        if found_norm is None:
            return {}
        angles = course.angular_update
        states = split(course.state_dict(), len(self._steps))
        expected = {}
        for i, step in enumerate(self._steps):
            expectation = self._expectation(i, states[i])
            is_known = isfinite(angles[i]) and angles[i] > 0
            is_silent = step.is_warm and not self._before
            is_silent = is_silent or expectation.number < expectation.silent_until
            shown = is_known and not is_silent
            expected[step.name] = Expected(
                expectation,
                float(angles[i]) if shown else None,
                float(found_norm[i]) if shown else None,
                course.rough,
            )
        return expected

    def _expectation(self, i: int, state: Mapping[str, Any]) -> Expectation:
        step = self._steps[i]
        number = self._interval.number
        silent_until = 0
        scales: tuple[float, ...] = ()
        energies: tuple[float, ...] = ()
        if self._before:
            before = self._before[i]
            silent_until, scales, energies = before.silent_until, before.scales, before.energies
        elif step.is_warm:
            silent_until = number + FILLS_BUFFERS
        scales = with_one_more(scales, step.gradient_scale)
        # A step by a quarter turn or more is an accident, which says nothing of the next one.
        is_usual = step.lr > 0 and step.angle < pi / 2
        size = tan(step.angle) * step.norm / step.lr if is_usual else nan
        # As a product: the power of a float that is too large raises.
        energy = size * size
        if energy > 0 and isfinite(energy):
            energies = (*energies, energy)[-FEWEST_ROWS:]
        return Expectation(
            number,
            state,
            self._rate,
            float(self._starts[i]),
            step.effects.text,
            silent_until,
            scales,
            energies,
        )

    # -- step by step

    def _walk(self, course: NormCourse) -> Doubles | None:
        """Take all steps; the norms that the measured one finds, None where nobody has derived
        them."""
        norms = course.weight_norm
        for stretch in self._stretches():
            # The group was not there yet.
            if self._first.group >= len(stretch.settings):
                return None
            group = {**self._group, **stretch.settings[self._first.group]}
            treatment = options_of(self._first.effects, self._interval.optimizer, group)
            if treatment is None:
                return None
            for at in range(stretch.first, stretch.last + 1):
                norms = course.weight_norm
                self._step(course, at, group, *treatment)
        return norms

    def _stretches(self) -> Sequence[Stretch]:
        if self._before:
            return self._interval.stretches
        # A course that starts takes the measured step alone.
        number = self._interval.number
        return [Stretch(number, number, self._interval.groups)]

    def _step(
        self,
        course: NormCourse,
        number: int,
        group: Mapping[str, Any],
        options: Options,
        alpha: float,
    ) -> None:
        effects = self._first.effects
        share = self._share(number)
        lr = self._lr(group, share)
        jumps = effects.jumps
        drop, self._rate = self._rate.then(lr, inf if jumps is None else jumps.min_drop)
        # LRDropRescaling acts before the first step at the lower rate.
        if jumps is not None and jumps.exponent is not None and drop != 1:
            course.rescale(drop**-jumps.exponent)
        if alpha and effects.shrink is not None:
            by_std = effects.shrink.statistic == "std"
            size = course.weight_norm / np.sqrt(self._dims) if by_std else course.weight_norm
            options = {**options, "shrink": alpha * size}  # type: ignore[typeddict-item]
        course.advance({**group, "lr": lr}, self._scale(share), energy=self._energy, **options)
        # WeightRescaling acts after every so many steps.
        rescaling = effects.rescaled_now
        if rescaling is not None and number % rescaling.every_n_steps == 0:
            target = rescaling.target_norm
            length = self._starts if target == "initial" else target
            course.rescale(length / course.weight_norm, buffers=rescaling.rescales_state)

    def _share(self, number: int) -> float:
        """How far from the newest row to the measured step."""
        if not self._before:
            return 1.0
        start = self._before[0].number
        return (number - start) / (self._interval.number - start)

    def _lr(self, group: Mapping[str, Any], share: float) -> float:
        written = group.get("lr")
        if self._interval.reads_rates and isinstance(written, float):
            return written
        # Only rows tell it: between two of them it is taken to change evenly.
        before = self._before[0].rate.lr if self._before else self._first.lr
        return before + share * (self._first.lr - before)

    def _scale(self, share: float) -> Doubles | None:
        """Size of the gradients, averaged over the newest rows, and even between two of them."""
        most = FEWEST_ROWS
        if self._response is not None and self._response.normalized:
            most = MOST_ROWS
        now = []
        then = []
        for i, step in enumerate(self._steps):
            known = self._before[i].scales if self._before else ()
            newest = with_one_more(known, step.gradient_scale)
            if not newest:
                return None
            now.append(newest)
            then.append(known or newest)
        start = averages(then, most)
        return start + share * (averages(now, most) - start)

    def _measured_energy(self) -> Doubles | None:
        """Size of the steps, where noise alone does not tell it well; None for the first rows."""
        response = self._response
        if response is None or not response.energy_is_rough:
            return None
        # Of earlier rows alone: with the present one, the expectation would follow what it is
        # compared with.
        if not self._before or not all(before.energies for before in self._before):
            return None
        return np.array([fmean(b.energies) for b in self._before], dtype=np.float64)


# -- in checkpoints


def state_of(expectations: Mapping[str, Expectation]) -> dict[str, Any]:
    """Expectations by weight as plain numbers and lists."""
    state = {}
    for name, known in expectations.items():
        state[name] = {
            "number": known.number,
            "course": dict(known.course),
            "rate": [known.rate.lr, known.rate.fall],
            "start": known.start,
            "effects": known.effects,
            "silent_until": known.silent_until,
            "scales": list(known.scales),
            "energies": list(known.energies),
        }
    return state


def expectations_from(state: Mapping[str, Any]) -> dict[str, Expectation]:
    """What `state_of` gave."""
    expectations = {}
    for name, known in state.items():
        lr, fall = known["rate"]
        expectations[str(name)] = Expectation(
            int(known["number"]),
            dict(known["course"]),
            Rate(float(lr), float(fall)),
            float(known["start"]),
            str(known["effects"]),
            int(known["silent_until"]),
            tuple(map(float, known["scales"])),
            tuple(map(float, known["energies"])),
        )
    return expectations


def _several(count: int) -> Check:
    """A list of so many numbers; NaN stands for what nobody knows."""
    each = many(number(finite=False))

    def check(value: Any, where: str) -> None:
        each(value, where)
        require(len(value) == count, f"{where} has {len(value)} numbers, where {count} belong")

    return check


_COURSE = record(
    {
        # Of one weight, so of one vector.
        **dict.fromkeys(("ww", "wm", "mm", "moment", "angle", "scale"), _several(1)),
        "steps": whole(),
        "carried": number(finite=False),
        "largest_rate": number(finite=False),
        "moment_is_new": flag,
        "in_real_units": flag,
        "rough": flag,
    },
    closed=True,
)
STATE: Check = table(
    text(),
    record(
        {
            "number": whole(),
            "course": _COURSE,
            "rate": _several(2),
            "start": number(0.0),
            "effects": text(),
            "silent_until": whole(),
            "scales": many(number(0.0)),
            "energies": many(number(0.0)),
        },
        closed=True,
    ),
)
"""What `state_of` may look like in a checkpoint."""


__all__ = [
    "Expectation",
    "Expected",
    "Interval",
    "WeightStep",
    "expectations_from",
    "follow",
    "state_of",
]
