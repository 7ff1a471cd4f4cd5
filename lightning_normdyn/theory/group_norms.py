"""The norms of the weights of one param group, through a whole schedule.

Short runs are followed step by step (`lightning_normdyn.theory.course`), long ones and such of
which coherence and energy were measured in blocks (`lightning_normdyn.theory.growth`). Numbers of
the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_normdyn.optimizers.group_numbers import Group, group_number
from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.optimizers.step_rules import StepResponse

from .course import norm_course
from .equilibrium import equilibrium_norm, settles_at
from .growth import Array, grown, noise_energy, squared_step
from .schedule import Schedule

__all__ = ["AT_PEAK", "GroupNorms", "GroupWeights", "Measured", "Shape"]

AT_PEAK = 0.999
"""A smooth schedule stays near its peak for a while, which is still the peak."""

# A course takes about 70 µs a step. Longer runs are followed by the rule of coherence alone, in at
# most as many blocks of several steps.
_LONGEST_COURSE = 1_000

Shape = tuple[int, int] | None


@dataclass(frozen=True)
class GroupWeights:
    """The weights of one param group that are forecast.

    Args:
        norms: RMS norm of the vectors of each weight, at the start.
        dims: entries of a vector of each.
        shapes: rows and columns of each, where it is a matrix; Muon has no forecast without.
        gradient_scale: E‖g‖²‖w‖² of each, if it was measured; SGD and coupled decay have no norms
            in advance without.
    """

    norms: Sequence[float]
    dims: Sequence[int]
    shapes: Sequence[Shape] | None = None
    gradient_scale: Sequence[float] | None = None

    @classmethod
    def of(cls, weights: Iterable[tuple[float, int, Shape]]) -> GroupWeights:
        """From the norm, the entries and the shape of each weight.

        Example:
            >>> GroupWeights.of([(0.5, 64, (8, 8)), (1.0, 9, None)]).norms
            [0.5, 1.0]
        """
        norms: list[float] = []
        dims: list[int] = []
        shapes: list[Shape] = []
        for norm, dim, shape in weights:
            norms.append(norm)
            dims.append(dim)
            shapes.append(shape)
        return cls(norms, dims, shapes)


@dataclass(frozen=True)
class Measured:
    """What a run has shown of each weight, for a forecast of weights of any kind.

    Args:
        coherence: κ, as :func:`lightning_normdyn.functional.coherence` measures it.
        energy: tan²θ ‖w‖²/lr² of recent steps; times ‖w‖² for SGD.
    """

    coherence: list[float]
    energy: list[float]


class GroupNorms:
    """What becomes of the norms of one param group.

    Args:
        optimizer_class: class of the optimizer.
        schedule: its param group at every step of the fit.
        weights: what is in it.

    Raises:
        ValueError: for a schedule of no step, or weights whose numbers do not fit together.

    Attributes:
        rates: learning rate of each row of the schedule.
        counts: for how many steps each of them stands.
        starts: the steps before each of them.
        pulls: relative decay of a step in each; None where nobody can tell.
        peak: the first row with the largest rate.
        at_peak: the param group there.
        last_at_peak: the last row with a rate about as large.
    """

    def __init__(self, optimizer_class: type, schedule: Schedule, weights: GroupWeights) -> None:
        self.optimizer_class = optimizer_class
        self.schedule = schedule
        self.weights = weights
        count = len(weights.norms)
        self.shapes: Sequence[Shape] = weights.shapes or [None] * count
        if len(weights.dims) != count or len(self.shapes) != count:
            raise ValueError("`norms`, `dims` and `shapes` must be one each for every weight.")
        # As arrays once: every row of the schedule computes with them.
        self.dims = np.asarray(weights.dims, dtype=np.float64)
        self.rates = np.array(schedule.rates, dtype=np.float64)
        if not np.isfinite(self.rates).all() or self.rates.size == 0:
            raise ValueError(
                "A forecast needs a learning rate on the host at every step, and a step."
            )
        self.counts = schedule.counts
        self.starts = schedule.starts
        self.peak = int(self.rates.argmax())
        self.at_peak = schedule.groups[self.peak]
        near_peak = np.flatnonzero(self.rates >= AT_PEAK * self.rates[self.peak])
        self.last_at_peak = int(near_peak[-1])
        self.pulls = self._pulls()

    def _pulls(self) -> Array | None:
        pulls = np.zeros_like(self.rates)
        settings: Mapping[str, Any] | None = None
        decay: float | None = None
        for row, group in enumerate(self.schedule.groups):
            others = {key: value for key, value in group.items() if key != "lr"}
            # λ does not depend on the rate, and most schedules change nothing else.
            if others != settings:
                settings, decay = others, self._decay(group)
            if decay is None:
                return None
            pulls[row] = self.rates[row] * decay
        return pulls

    def _decay(self, group: Group) -> float | None:
        """λ, decoupled; None where nobody can tell."""
        if group_number(group, "weight_decay") == 0:
            return 0.0
        # How a decay acts depends on no shape, but Muon does not answer without one.
        response = step_response(self.optimizer_class, group, shape=(1, 1))
        if response is None or response.rough or response.effective_decay is None:
            return None
        return float(response.effective_decay)

    def _scale_of(self, members: Sequence[int]) -> Array | None:
        """E‖g‖²‖w‖² of some of the weights."""
        given = self.weights.gradient_scale
        if given is None:
            return None
        return np.asarray(given, dtype=np.float64)[members]

    @property
    def power(self) -> int:
        """P of the equilibrium; that of steps of a fixed size for an optimizer nobody knows."""
        response = self.response((1, 1))
        if response is None:
            return 2
        return response.power

    @property
    def is_rough(self) -> bool:
        """Whether the length of its steps is known roughly only."""
        # Of any shape: that its steps are known roughly is a matter of the optimizer.
        response = self.response((1, 1))
        return response is not None and response.energy_is_rough

    def response(self, shape: Shape) -> StepResponse | None:
        """How the optimizer answers gradients at the peak, once it has been there for long."""
        step = int(self.starts[self.last_at_peak] + self.counts[self.last_at_peak])
        return step_response(self.optimizer_class, self.at_peak, shape=shape, step=step)

    def relaxation(self, pull: float | None) -> float | None:
        """The relaxation time at the peak."""
        # Without decay nothing draws a norm back.
        if not pull:
            return None
        return 1 / (self.power * pull)

    def settled_angle(self, pull: float | None, measured: Measured | None) -> float | None:
        """The angle that the weights would settle at, at the peak."""
        if not pull:
            return None
        angles = []
        if measured is not None:
            # Where the loss holds the norm, there is no angle at which decay would.
            coherences = [kappa for kappa in measured.coherence if kappa > 0]
            angles = [math.sqrt(2 * pull / kappa) for kappa in coherences]
        else:
            for shape in self.shapes:
                response = self.response(shape)
                # What an Adam with coupled decay settles at depends on its gradients.
                if response is None or response.rough:
                    return None
                settled = settles_at(response)
                if settled is None:
                    return None
                angles.append(float(settled[0]))
        if not angles:
            return None
        # Of several weights the middle one speaks for the group.
        return float(np.median(angles))

    def settled_norms(self) -> Array | None:
        """The norms that belong to it."""
        norms = []
        weights = self.weights
        scales: Sequence[float | None] = weights.gradient_scale or [None] * len(weights.dims)
        for dim, scale, shape in zip(weights.dims, scales, self.shapes, strict=True):
            norm = equilibrium_norm(self.optimizer_class, self.at_peak, scale, dim=dim, shape=shape)
            if norm is None:
                return None
            norms.append(float(norm))
        if not norms:
            return None
        return np.array(norms)

    def norms(self, measured: Measured | None) -> tuple[Array | None, tuple[int, ...]]:
        """Expected norms, and after how many steps."""
        rows = len(self.rates)
        if not self.weights.norms:
            return None, ()
        # A course needs every single step.
        if measured is None and rows <= _LONGEST_COURSE and self.counts.max() == 1:
            return self._step_by_step()
        known = measured or self._coherence()
        if known is None or self.pulls is None:
            return None, ()
        return self._by_coherence(known, self.pulls, math.ceil(rows / _LONGEST_COURSE))

    def _step_by_step(self) -> tuple[Array | None, tuple[int, ...]]:
        starts = np.asarray(self.weights.norms, dtype=np.float64)
        # A row before the first step, and one after each.
        norms = np.zeros((len(self.rates) + 1, starts.size), dtype=np.float64)
        for shape, members in self._lots():
            course = norm_course(
                self.optimizer_class,
                self.schedule.groups[0],
                starts[members],
                self.dims[members],
                shape=shape,
            )
            if course is None:
                return None, ()
            norms[0, members] = course.weight_norm
            for row, group in enumerate(self.schedule.groups, start=1):
                course.advance(group, self._scale_of(members))
                norms[row, members] = course.weight_norm
        # A gradient scale that is needed, and that no run has measured.
        if not np.isfinite(norms).all():
            return None, ()
        return norms, tuple(range(len(norms)))

    def _lots(self) -> list[tuple[Shape, list[int]]]:
        """Weights that one course can follow together, as places."""
        # Most optimizers do not ask for the shape.
        if self.response(None) is not None:
            return [(None, list(range(len(self.shapes))))]
        lots: dict[Shape, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            lots.setdefault(shape, []).append(place)
        return list(lots.items())

    def _coherence(self) -> Measured | None:
        """That of pure noise."""
        coherences = np.zeros_like(self.dims)
        energies = np.zeros_like(self.dims)
        for shape, members in self._lots():
            response = self.response(shape)
            if response is None:
                return None
            energy = noise_energy(response, self.dims[members], self._scale_of(members))
            if energy is None:
                return None
            coherences[members] = float(response.coherence)
            energies[members] = energy
        # Noise alone, as if a run had shown it.
        return Measured(list(coherences), list(energies))

    def _by_coherence(
        self, known: Measured, pulls: Array, per_block: int
    ) -> tuple[Array, tuple[int, ...]]:
        """Several rows at once where there are many."""
        coherence, energy = np.array(known.coherence), np.array(known.energy)
        response = self.response((1, 1))
        square = np.asarray(self.weights.norms, dtype=np.float64) ** 2
        rows, steps = [np.sqrt(square)], [0]
        for start in range(0, len(self.rates), per_block):
            block = slice(start, start + per_block)
            counts = self.counts[block]
            # A block decays and grows as a whole: its pulls are small against one.
            kept = float(np.prod((1 - pulls[block]) ** counts))
            squared_rate = float((self.rates[block] ** 2 * counts).sum())
            step = squared_step(response, energy, square, squared_rate)
            # The loss may hold a norm more strongly than its steps make it grow, but not below 0.
            square = np.maximum(grown(square, kept, coherence, step), 0.0)
            rows.append(np.sqrt(square))
            steps.append(steps[-1] + int(counts.sum()))
        return np.array(rows), tuple(steps)
