"""What the norm and angle of each scale-invariant weight should be by now, whatever the schedule
has been so far.

Between two logging steps the host only notes with which hyperparameters the steps were taken. At a
logging step it walks through them: `lightning_normdyn.theory.course.NormCourse` has the
mathematics, and takes all weights of a param group at once. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, nan, pi
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.rate_drop import Rate
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import Options, own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.theory.course import NormCourse, norm_course

from .by_weight import Doubles, Flags, Ints
from .expectations import ExpectationTable, Lot
from .gradient_sizes import FEWEST_ROWS, MOST_ROWS, Sizes, averages
from .passed_steps import Stretch
from .pulls import options_of

FILLS_BUFFERS = 100
"""Steps after which it hardly matters what the buffers held at the start of a course: its
angles are up to a tenth off while a second moment remembers a longer weight."""


class Kind(NamedTuple):
    """Weights of one param group that callbacks treat alike.

    Args:
        group: place of the param group.
        effects: what callbacks do to them.
        shape: rows and columns, of matrices.
        weights: their places among those of the optimizer, in order.
    """

    group: int
    effects: Effects
    shape: tuple[int, int] | None
    weights: Ints


class WeightSteps(NamedTuple):
    """One measured step of the weights of an optimizer, ``(w,)`` each but for the kinds.

    Args:
        kinds: of the weights; each is of one kind.
        dims: entries of a vector.
        norms: root of the vectors' mean square norm, before the step.
        angles: root of their mean square angle.
        rates: of the step; NaN where nobody can tell.
        gradient_scales: mean of ‖g‖²‖w‖² over its vectors; 0 without a gradient.
        are_warm: whether the optimizer had stepped this weight before its course began.
        followed: whether the weight is to be followed.
    """

    kinds: Sequence[Kind]
    dims: Doubles
    norms: Doubles
    angles: Doubles
    rates: Doubles
    gradient_scales: Doubles
    are_warm: Flags
    followed: Flags


class Expected(NamedTuple):
    """What a row is compared with, ``(w,)`` each but for the order.

    Args:
        shown: of which weights anything is expected; not while a course is silent.
        angles: RMS, of the row's step.
        norms: before that step, root of the mean square.
        order: places of the weights that are followed, those of a lot together.
    """

    shown: Flags
    angles: Doubles
    norms: Doubles
    order: Ints


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

    @cached_property
    def optimizer_class(self) -> type:
        """The class whose courses the weights take."""
        return class_for_predictions(self.optimizer)


def follow(
    interval: Interval, steps: WeightSteps, known: ExpectationTable
) -> tuple[ExpectationTable, Expected]:
    """What is expected at a measured step; of a weight whose course is not understood, nothing is.

    Args:
        interval: the steps since the newest row.
        steps: the measured one.
        known: what was expected so far. The course of a weight that is not among them starts here.

    Returns:
        What is expected for the next row, and what this one is compared with.
    """
    width = len(known.names)
    shown = np.zeros(width, dtype=np.bool_)
    angles = np.full(width, nan, dtype=np.float64)
    norms = np.full(width, nan, dtype=np.float64)
    # Of weights that are not followed, what was there stays.
    starts, silent_until = known.starts.copy(), known.silent_until.copy()
    scales, energies = known.scales.copy(), known.energies.copy()
    newest = _energies(steps)
    lots: list[Lot] = []
    for kind, before in _together(interval, steps, known):
        walk = _Walk(interval, steps, known, kind, before)
        if not walk.is_understood:
            continue
        weights = kind.weights
        lots.append(walk.lot())
        angles[weights] = walk.angles
        norms[weights] = walk.norms
        starts[weights] = walk.starts
        silent_until[weights] = walk.silent_until
        scales.put(weights, walk.scales)
        energies.put(weights, walk.energies.with_one_more(newest[weights]))
        is_silent = walk.is_silent
        shown[weights] = np.isfinite(walk.angles) & (walk.angles > 0) & ~is_silent
    order = np.concatenate([np.zeros(0, dtype=np.int64), *(lot.weights for lot in lots)])
    followed = np.zeros(width, dtype=np.bool_)
    followed[order] = True
    others = [left for lot in known.lots if len((left := lot.without(followed)).weights)]
    table = ExpectationTable(known.names, (*others, *lots), starts, silent_until, scales, energies)
    return table, Expected(shown, angles, norms, order)


def _together(
    interval: Interval, steps: WeightSteps, known: ExpectationTable
) -> list[tuple[Kind, Lot | None]]:
    """Weights that can be followed together, with the lot that they go on from; None of a start."""
    lot_of = np.full(len(known.names), -1, dtype=np.int64)
    for i, lot in enumerate(known.lots):
        if _is_known_since(lot, interval):
            has_norm = np.isfinite(lot.course["ww"])
            lot_of[lot.weights[has_norm]] = i
    # A weight that has no length yet begins when it has one.
    followed = steps.followed & (steps.norms > 0) & np.isfinite(steps.norms)
    together: list[tuple[Kind, Lot | None]] = []
    for kind in steps.kinds:
        weights = kind.weights[followed[kind.weights]]
        for part in _alike(interval, steps, weights, lot_of):
            i = int(lot_of[part[0]])
            before = None
            # An epoch has begun or ended in which a callback acts, and in which step nobody knows
            # here.
            if i >= 0 and known.lots[i].effects == kind.effects.text:
                lot = known.lots[i]
                before = lot.at(np.searchsorted(lot.weights, part))
            together.append((kind._replace(weights=part), before))
    together.sort(key=lambda entry: int(entry[0].weights[0]))
    return together


def _is_known_since(lot: Lot, interval: Interval) -> bool:
    """Whether all steps since a lot's row are known."""
    if lot.number >= interval.number or not interval.stretches:
        return False
    # A weight that had no gradient at the newest row was left alone nobody knows how often.
    return interval.stretches[0].first == lot.number + 1


def _alike(interval: Interval, steps: WeightSteps, weights: Ints, lot_of: Ints) -> Iterator[Ints]:
    """Weights of a kind, apart by the lots that they go on from and by measured rates."""
    if not len(weights):
        return
    own = lot_of[weights]
    # Nearly always they have all come the same way.
    lots = [int(own[0])] if (own == own[0]).all() else np.unique(own).tolist()
    for i in lots:
        part = weights[own == i]
        if interval.reads_rates:
            yield part
            continue
        # Only measured rates may differ within a group, and then by more than rounding.
        rates = np.array([f"{rate:.6g}" for rate in steps.rates[part].tolist()])
        for rate in dict.fromkeys(rates.tolist()):
            yield part[rates == rate]


def _energies(steps: WeightSteps) -> Doubles:
    """``(w,)``, tan²θ ‖w‖²/lr² of the measured step; NaN where it says nothing of the next one."""
    with np.errstate(all="ignore"):
        size = np.tan(steps.angles) * steps.norms / steps.rates
    # A step by a quarter turn or more is an accident.
    is_usual = (steps.rates > 0) & (steps.angles < pi / 2)
    return np.where(is_usual, size * size, nan)


class _Walk:
    """The steps since the newest row, of weights that can be followed together, ``(m,)``.

    Args:
        interval: the steps since the newest row.
        steps: the measured one, of all weights.
        known: what was expected after the newest row, of all weights.
        kind: the weights.
        before: the lot that they go on from; None for a start.

    Attributes:
        is_understood: whether somebody has derived their course; the others mean nothing if not.
        angles: of the measured step.
        norms: that this step found.
        starts: norms at the first step.
        silent_until: number of the step from which on they are compared.
        scales: sizes of the gradients of the newest rows, the present one among them.
        energies: sizes of the steps of the rows before.
    """

    def __init__(
        self,
        interval: Interval,
        steps: WeightSteps,
        known: ExpectationTable,
        kind: Kind,
        before: Lot | None,
    ) -> None:
        weights = kind.weights
        self._interval = interval
        self._kind = kind
        self._before = before
        self._class = interval.optimizer_class
        self._lr = float(steps.rates[weights[0]])
        self._group = {**interval.groups[kind.group], "lr": self._lr}
        self._dims = steps.dims[weights]
        self._response = own_response(self._class, self._group, Subject(kind.shape))
        self._are_warm = steps.are_warm[weights]
        earlier, self.energies = known.scales.at(weights), known.energies.at(weights)
        self._rate = Rate(self._lr)
        self.starts = steps.norms[weights]
        # A course that starts in the middle of a run does not know the optimizer's buffers.
        self.silent_until = np.where(self._are_warm, interval.number + FILLS_BUFFERS, 0)
        if before is None:
            earlier, self.energies = earlier.none(), self.energies.none()
        else:
            self._rate = before.rate
            self.starts, self.silent_until = known.starts[weights], known.silent_until[weights]
        self.scales = earlier.with_one_more(steps.gradient_scales[weights])
        self._scales_at_ends = self._averaged(earlier)
        self._energy = self._measured_energy()
        norms = steps.norms[weights]
        course = norm_course(self._class, self._group, norms, self._dims, shape=kind.shape)
        found = None
        if course is not None:
            if before is not None:
                course.load_state_dict(before.course)
            found = self._walk(course)
        self.is_understood = found is not None
        if course is None or found is None:
            return
        self.norms = found
        self.angles = course.angular_update
        self._course = course.arrays()

    def lot(self) -> Lot:
        """What the next row goes on from."""
        kind = self._kind
        number = self._interval.number
        return Lot(kind.weights, number, self._course, self._rate, kind.effects.text)

    @property
    def is_silent(self) -> Flags:
        """Which weights are not compared at the measured step."""
        if self._before is None:
            return self._are_warm
        return self._interval.number < self.silent_until

    # -- step by step

    def _walk(self, course: NormCourse) -> Doubles | None:
        """Take all steps; the norms that the measured one finds, None where nobody has derived
        them."""
        norms = course.weight_norm
        for stretch in self._stretches():
            # The group was not there yet.
            if self._kind.group >= len(stretch.settings):
                return None
            group = {**self._group, **stretch.settings[self._kind.group]}
            treatment = options_of(self._kind.effects, self._interval.optimizer, group)
            if treatment is None:
                return None
            for at in range(stretch.first, stretch.last + 1):
                if at == self._interval.number:
                    norms = course.weight_norm
                self._step(course, at, group, *treatment)
        return norms

    def _stretches(self) -> Sequence[Stretch]:
        if self._before is not None:
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
        effects = self._kind.effects
        share = self._share(number)
        lr = self._lr_at(group, share)
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
            length = self.starts if target == "initial" else target
            course.rescale(length / course.weight_norm, buffers=rescaling.rescales_state)

    def _share(self, number: int) -> float:
        """How far from the newest row to the measured step."""
        if self._before is None:
            return 1.0
        start = self._before.number
        return (number - start) / (self._interval.number - start)

    def _lr_at(self, group: Mapping[str, Any], share: float) -> float:
        written = group.get("lr")
        if self._interval.reads_rates and isinstance(written, float):
            return written
        # Only rows tell it: between two of them it is taken to change evenly.
        before = self._lr if self._before is None else self._before.rate.lr
        return before + share * (self._lr - before)

    def _averaged(self, earlier: Sizes) -> tuple[Doubles, Doubles] | None:
        """Size of the gradients, averaged over the newest rows, at the newest row and now; None
        where one of the weights never had a gradient."""
        most = FEWEST_ROWS
        if self._response is not None and self._response.normalized:
            most = MOST_ROWS
        now = self.scales
        if not (now.counts > 0).all():
            return None
        means = averages(now, most)
        then = means.copy()
        (weights,) = np.nonzero(earlier.counts > 0)
        # Between neighbouring rows lies no step that the earlier size is asked for.
        has_steps_between = self._before is None or self._before.number + 1 < self._interval.number
        if len(weights) and has_steps_between:
            then[weights] = averages(earlier.at(weights), most)
        return then, means

    def _scale(self, share: float) -> Doubles | None:
        """Size of the gradients, even between the two rows."""
        if self._scales_at_ends is None:
            return None
        then, now = self._scales_at_ends
        return then + share * (now - then)

    def _measured_energy(self) -> Doubles | None:
        """Size of the steps, where noise alone does not tell it well; None for the first rows."""
        response = self._response
        if response is None or not response.energy_is_rough:
            return None
        # Of earlier rows alone: with the present one, the expectation would follow what it is
        # compared with.
        return self.energies.means() if (self.energies.counts > 0).all() else None


__all__ = [
    "Expected",
    "Interval",
    "Kind",
    "WeightSteps",
    "follow",
]
