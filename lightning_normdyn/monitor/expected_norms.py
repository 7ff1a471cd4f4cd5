"""What the norm and angle of each scale-invariant weight should be by now, whatever the schedule
has been so far.

Between two logging steps the host only notes with which hyperparameters the steps were taken. At a
logging step it walks through them: `lightning_normdyn.theory.course.NormCourse` has the
mathematics, and takes all weights of a param group at once. Numbers of the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, nan, pi
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.rate_drop import Rate
from lightning_normdyn.theory.course import NormCourse, Treatment

from .by_weight import Doubles, Flags, Ints, places_among
from .expectations import ExpectationTable, Lot
from .gradient_sizes import FEWEST_ROWS, MOST_ROWS, Sizes, averages
from .group_theory import GroupTheory, Settings
from .passed_steps import Stretch

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
        answers: of the theory at earlier rows of this optimizer.
    """

    optimizer: AnOptimizer
    groups: Sequence[Mapping[str, Any]]
    number: int
    stretches: Sequence[Stretch]
    reads_rates: bool = True
    answers: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def theory(self) -> GroupTheory:
        """What is known of the param groups."""
        return GroupTheory(self.optimizer, self.answers)

    @cached_property
    def _merged(self) -> dict[tuple[int, int], Mapping[str, Any]]:
        return {}

    def group_in(self, stretch: Stretch, group: int) -> Mapping[str, Any]:
        """A param group as it was in a stretch of steps; the same object whenever it is asked
        for.

        Args:
            stretch: of these steps.
            group: the place of the group, which was there already.
        """
        settings = stretch.settings[group]
        # By identity: they are held here as long as this is, and mostly the same from one stretch
        # to the next.
        key = id(settings), group
        if key not in self._merged:
            self._merged[key] = {**self.groups[group], **settings}
        return self._merged[key]


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
    angles, norms = np.full((2, width), nan, dtype=np.float64)
    # Of weights that are not followed, what was there stays.
    starts, silent_until = known.starts.copy(), known.silent_until.copy()
    scales, energies = known.scales.copy(), known.energies.copy()
    newest = _energies(steps)
    lots: list[Lot] = []
    for kind, before in _together(interval, steps, known):
        walk = _Walk(interval, steps, known, kind, before)
        if not walk.is_understood:
            continue
        weights = places_among(kind.weights, width)
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
    others: list[Lot] = []
    # Nearly always all weights are followed, and each lot has given way to its next one.
    if len(order) < width:
        followed = np.zeros(width, dtype=np.bool_)
        followed[order] = True
        for lot in known.lots:
            left = lot.without(followed)
            # A lot whose weights all go on in others is gone.
            if len(left.weights):
                others.append(left)
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
                # Nearly always a lot goes on as a whole.
                is_whole = len(part) == len(lot.weights)
                before = lot if is_whole else lot.at(np.searchsorted(lot.weights, part))
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
        self._interval = interval
        self._kind = kind
        self._before = before
        self._lr = float(steps.rates[kind.weights[0]])
        self._group = {**interval.groups[kind.group], "lr": self._lr}
        weights = places_among(kind.weights, len(known.names))
        self._dims = steps.dims[weights]
        self._are_warm = steps.are_warm[weights]
        earlier, self.energies = known.scales.at(weights), known.energies.at(weights)
        norms = steps.norms[weights]
        if before is None:
            earlier, self.energies = earlier.none(), self.energies.none()
            self._rate = Rate(self._lr)
            self.starts = norms
            # A course that starts in the middle of a run does not know the optimizer's buffers.
            self.silent_until = np.where(self._are_warm, interval.number + FILLS_BUFFERS, 0)
        else:
            self._rate = before.rate
            self.starts, self.silent_until = known.starts[weights], known.silent_until[weights]
        self.scales = earlier.with_one_more(steps.gradient_scales[weights])
        of_group = interval.groups[kind.group]
        self.is_understood = interval.theory.has_course(of_group, kind.shape)
        if not self.is_understood:
            return
        self._sizes = interval.theory.sizes(of_group, kind.shape)
        self._scales_at_ends = self._averaged(earlier)
        self._energy = self._measured_energy()
        course = self._course_from(norms)
        found = self._walk(course)
        self.is_understood = found is not None
        # The settings have changed on the way to ones that nobody has derived.
        if found is None:
            return
        self.norms = found
        self.angles = course.angular_update
        self._course = course.arrays()

    def _course_from(self, norms: Doubles) -> NormCourse:
        """The course that they go on with, or a new one from their present norms."""
        optimizer_class = self._interval.theory.optimizer_class
        shape = self._kind.shape
        # Only a new one is checked: the others are of a state that a course has left.
        if self._before is None:
            return NormCourse(optimizer_class, self._group, norms, self._dims, shape=shape)
        return NormCourse.going_on(optimizer_class, self._before.course, self._dims, shape=shape)

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
        theory, effects = self._interval.theory, self._kind.effects
        settings: Settings | None = None
        treatment: Treatment | None = None
        alpha = 0.0
        for stretch in self._stretches():
            # The group was not there yet.
            if self._kind.group >= len(stretch.settings):
                return None
            group = self._interval.group_in(stretch, self._kind.group)
            own = theory.settings_of(group)
            # A schedule of the learning rate alone leaves all else of a step as it was. What
            # WeightDecay does follows the largest rate so far, and is asked for anew.
            if treatment is None or own is None or own != settings or effects.decaying is not None:
                found = theory.options(group, effects)
                if found is None:
                    return None
                options, alpha = found
                treatment = course.under(group, **options)
            settings = own
            for at in range(stretch.first, stretch.last + 1):
                if at == self._interval.number:
                    norms = course.weight_norm
                self._step(course, at, treatment, group.get("lr"), alpha)
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
        treatment: Treatment,
        written: object,
        alpha: float,
    ) -> None:
        effects = self._kind.effects
        share = self._share(number)
        lr = self._lr_at(written, share)
        jumps = effects.jumps
        drop, self._rate = self._rate.then(lr, inf if jumps is None else jumps.min_drop)
        # LRDropRescaling acts before the first step at the lower rate.
        if jumps is not None and jumps.exponent is not None and drop != 1:
            course.rescale(drop**-jumps.exponent)
        shrink = None
        if alpha and effects.shrink is not None:
            by_std = effects.shrink.statistic == "std"
            size = course.weight_norm / np.sqrt(self._dims) if by_std else course.weight_norm
            shrink = alpha * size
        course.step(
            treatment,
            lr,
            self._scale(share),
            energy=self._energy,
            shrink=shrink,
            # A row shows the angle of its own step alone.
            wants_angle=number == self._interval.number,
        )
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

    def _lr_at(self, written: object, share: float) -> float:
        if self._interval.reads_rates and isinstance(written, float):
            return written
        # Only rows tell it: between two of them it is taken to change evenly.
        before = self._lr if self._before is None else self._before.rate.lr
        return before + share * (self._lr - before)

    def _averaged(self, earlier: Sizes) -> tuple[Doubles, Doubles] | None:
        """Size of the gradients, averaged over the newest rows, at the newest row and now; None
        where one of the weights never had a gradient."""
        is_normalized = self._sizes is not None and self._sizes.normalized
        most = MOST_ROWS if is_normalized else FEWEST_ROWS
        now = self.scales
        if not now.counts.all():
            return None
        means = averages(now, most)
        # Between neighbouring rows lies no step that the earlier size is asked for.
        if self._before is not None and self._before.number + 1 == self._interval.number:
            return means, means
        (weights,) = np.nonzero(earlier.counts)
        if not len(weights):
            return means, means
        then = means.copy()
        then[weights] = averages(earlier.at(places_among(weights, len(then))), most)
        return then, means

    def _scale(self, share: float) -> Doubles | None:
        """Size of the gradients, even between the two rows."""
        if self._scales_at_ends is None:
            return None
        then, now = self._scales_at_ends
        if then is now:
            return now
        return then + share * (now - then)

    def _measured_energy(self) -> Doubles | None:
        """Size of the steps, where noise alone does not tell it well; None for the first rows."""
        if self._sizes is None or not self._sizes.energy_is_rough:
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
