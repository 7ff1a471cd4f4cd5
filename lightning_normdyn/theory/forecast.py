r"""What a fit will do to its norms, before it runs and after.

Everything follows from the param groups, the norms at the start and the schedule. The expected
course of the norms (`lightning_normdyn.theory.course`) is run through a schedule that was stepped
dry (`lightning_normdyn.theory.schedule`). Advice is a condition that holds, with the numbers that
it rests on; the words are others'. No advice says that a loss will be better.

Numbers of the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.optimizers.group_numbers import Group, group_number
from lightning_normdyn.optimizers.step_response import step_response
from lightning_normdyn.optimizers.step_rules import StepResponse

from .course import norm_course
from .equilibrium import equilibrium_norm, never_settles, settles_at
from .growth import Array, grown, noise_energy, squared_step
from .schedule import Schedule

__all__ = [
    "Advice",
    "GroupForecast",
    "GroupWeights",
    "Measured",
    "forecast_group",
]

# A course takes about 70 µs a step. Longer runs are followed by the rule of coherence alone, in at
# most as many blocks of several steps.
_LONGEST_COURSE = 1_000
# Decay cannot act where it shrinks a norm by less than this power of e in the whole run.
_TOO_WEAK = 0.5
# A rotation that is this much faster than at equilibrium calls for a warm-up.
_FAST = 2.0
# A smooth schedule stays near its peak for a while, which is still the peak.
_AT_PEAK = 0.999
# What a norm loses in a cool-down before it is worth a word.
_SHRINKS = 0.1

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


class Advice(NamedTuple):
    """A condition that holds for a group, or for one weight of it.

    Args:
        kind: "decay cannot act", "memory longer than the run", "memory shorter than an epoch",
            "warm-up too short", "no warm-up needed", "norm shrinks in the cool-down", "norm
            doubles", "never settles", or one of `lightning_normdyn.theory.comparison`.
        numbers: what it rests on, by name; steps are optimizer steps.
        weight: its name; empty for the group.
    """

    kind: str
    numbers: Mapping[str, float]
    weight: str = ""


@dataclass(frozen=True)
class GroupForecast:
    """What a fit will do to the weights of one param group; None where nobody can tell.

    Args:
        steps: optimizer steps of the fit.
        is_assumed: whether the learning rate is only assumed to stay.
        is_rough: whether norms follow from a rough length of steps (Muon before any row).
        peak_lr: the largest learning rate.
        timescale: 1/(lr λ) at the peak: how many steps weights remember.
        total_pull: Σ lr λ over the fit; exp(-total_pull) is what decay alone leaves of a norm.
        relaxation: steps in which a deviation of the norm falls by e, at the peak.
        angle: RMS angle that the weights would settle at, at the peak, rad/step; of several weights
            the median.
        coherence: that it rests on, if it was measured; of several weights the median.
        settled_norms: the norms that belong to the angle of pure noise, ``(weights,)``.
        norms: expected norms, ``(rows, weights)``; the first row is the start, the last the end.
        norm_steps: after how many steps each row is.
        advice: the conditions that hold.
    """

    steps: int
    is_assumed: bool
    is_rough: bool
    peak_lr: float
    timescale: float | None
    total_pull: float | None
    relaxation: float | None
    angle: float | None
    coherence: float | None
    settled_norms: Array | None
    norms: Array | None
    norm_steps: tuple[int, ...]
    advice: tuple[Advice, ...] = ()


def forecast_group(
    optimizer_class: type,
    schedule: Schedule,
    weights: GroupWeights,
    *,
    steps_per_epoch: float | None = None,
    measured: Measured | None = None,
    goes_on: bool = False,
) -> GroupForecast:
    """Where the norms of one param group will go.

    Args:
        optimizer_class: class of the optimizer.
        schedule: its param group at every step of the fit.
        weights: what is in it: scale-invariant weights, or any for which something was
            ``measured``. Without any, only what follows from the schedule is told.
        steps_per_epoch: optimizer steps of an epoch, if it is known.
        measured: coherence and energy that a run has shown; then the norms follow from these, for
            weights of any kind.
        goes_on: whether the fit is the rest of a run, whose warm-up is over.

    Raises:
        ValueError: for a schedule of no step, or weights whose numbers do not fit together.

    Example:
        >>> import torch
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
        >>> weights = GroupWeights(norms=[0.1], dims=[64])
        >>> schedule = Schedule((group,) * 1000)
        >>> forecast = forecast_group(torch.optim.AdamW, schedule, weights)
        >>> round(forecast.timescale), [advice.kind for advice in forecast.advice][:2]
        (10000, ['decay cannot act', 'memory longer than the run'])
    """
    fit = _Fit(optimizer_class, schedule, weights)
    pull = total = timescale = None
    if fit.pulls is not None:
        pull = float(fit.pulls[fit.peak])
        total = float((fit.pulls * fit.counts).sum())
    # Without a decay, weights remember for ever, which is no number of steps.
    if pull:
        timescale = 1 / pull
    norms, norm_steps = fit.norms(measured)
    coherence = settled_norms = None
    if measured is None:
        # These are of pure noise, and the loss may hold a weight elsewhere.
        settled_norms = fit.settled_norms()
    elif measured.coherence:
        coherence = float(np.median(measured.coherence))
    forecast = GroupForecast(
        steps=int(fit.counts.sum()),
        is_assumed=schedule.is_assumed,
        is_rough=measured is None and fit.is_rough,
        peak_lr=float(fit.rates[fit.peak]),
        timescale=timescale,
        total_pull=total,
        relaxation=fit.relaxation(pull),
        angle=fit.settled_angle(pull, measured),
        coherence=coherence,
        settled_norms=settled_norms,
        norms=norms,
        norm_steps=norm_steps,
    )
    advice = list(_about_decay(forecast, steps_per_epoch, goes_on=goes_on))
    # Nothing is advised on the ground of a rough prediction, or of a schedule that nobody knows.
    if not (goes_on or forecast.is_rough or forecast.is_assumed):
        advice += _about_warm_up(fit, forecast, pull)
    if not forecast.is_rough:
        advice += _about_norms(fit, forecast, pull)
    if never_settles(optimizer_class, fit.at_peak) is not None:
        decay = group_number(fit.at_peak, "weight_decay")
        advice.append(Advice("never settles", {"lr": forecast.peak_lr, "decay": float(decay)}))
    return replace(forecast, advice=tuple(advice))


class _Fit:
    """What all parts of a forecast are made from.

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
        near_peak = np.flatnonzero(self.rates >= _AT_PEAK * self.rates[self.peak])
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


# ------------------------------------------------------------------------------------- advice


def _about_decay(
    forecast: GroupForecast, steps_per_epoch: float | None, *, goes_on: bool
) -> Iterator[Advice]:
    """Whether decay can act in this fit at all, and how long weights remember."""
    total, timescale = forecast.total_pull, forecast.timescale
    if total is None or timescale is None:
        return
    if total < _TOO_WEAK:
        numbers = {"steps": forecast.steps, "left": math.exp(-total)}
        if forecast.relaxation is not None:
            numbers["relaxation"] = forecast.relaxation
        yield Advice("decay cannot act", numbers)
    # In the units that people plan in.
    numbers = {
        "timescale": timescale,
        "share_of_run": timescale / forecast.steps,
    }
    if steps_per_epoch is not None:
        numbers["epochs"] = timescale / steps_per_epoch
    # Wang and Aitchison (2405.13698): the best timescale lies between an epoch and the run.
    # The rest of a run is not what a memory is to be compared with.
    if timescale > forecast.steps and not goes_on:
        yield Advice("memory longer than the run", numbers)
    elif steps_per_epoch is not None and timescale < steps_per_epoch:
        yield Advice("memory shorter than an epoch", numbers)


def _about_warm_up(fit: _Fit, forecast: GroupForecast, pull: float | None) -> Iterator[Advice]:
    """How long weights would turn too fast without a warm-up, against the one that there is."""
    settled = forecast.settled_norms
    if settled is None or not pull:
        return
    # A schedule that does not rise has no warm-up.
    warm_up = 0
    if fit.rates[0] < _AT_PEAK * forecast.peak_lr:
        warm_up = int(fit.starts[fit.peak])
    share = np.asarray(fit.weights.norms, dtype=np.float64) / settled
    power = fit.power
    # The angle falls as the norm rises to the power of half of P, which relaxes exponentially.
    missing = np.maximum(1 - share**power, 1 - 1 / _FAST**2)
    fast = float(np.median(np.log(missing / (1 - 1 / _FAST**2)))) / (power * pull)
    numbers = {
        "fast_steps": fast,
        "warm_up": warm_up,
        "times": _FAST,
    }
    if fast > 2 * warm_up:
        yield Advice("warm-up too short", numbers)
    elif fast == 0 and warm_up > 0:
        yield Advice("no warm-up needed", numbers)


def _about_norms(fit: _Fit, forecast: GroupForecast, pull: float | None) -> Iterator[Advice]:
    """What becomes of the norms in a cool-down, and without a decay that holds them."""
    norms = forecast.norms
    if norms is None:
        return
    row = int(np.searchsorted(forecast.norm_steps, fit.starts[fit.last_at_peak]))
    with np.errstate(all="ignore"):
        shrunk = 1 - float(np.median(norms[-1] / norms[row]))
        growth = float(np.median(np.log(norms[-1] / norms[0])))
    if fit.last_at_peak + 1 < len(fit.rates) and _SHRINKS < shrunk < 1:
        numbers = {"shrinks": shrunk, "gradients": 1 / (1 - shrunk)}
        yield Advice("norm shrinks in the cool-down", numbers)
    # Of several weights the middle one speaks for the group.
    drift = growth / forecast.steps
    # Decay takes 1 pull of ln‖w‖ per step, so twice as much growth is not held by it.
    unheld = pull is not None and drift > 2 * pull
    if unheld and drift * forecast.steps > math.log(2):
        yield Advice("norm doubles", {"steps": math.log(2) / drift, "pull": float(pull or 0.0)})
