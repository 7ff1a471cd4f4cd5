r"""What a fit will do to its norms, before it runs and after.

Everything follows from the param groups, the norms at the start and the schedule. The expected
course of the norms (`lightning_normdyn.theory.course`) is run through a schedule that was stepped
dry (`lightning_normdyn.theory.schedule`). Advice is a condition that holds, with the numbers that
it rests on; the words are others'. No advice says that a loss will be better.

Numbers of the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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

# Longer runs are followed in as many steps of several.
_LONGEST_COURSE = 20_000
# Decay cannot act where it shrinks a norm by less than this power of e in the whole run.
_TOO_WEAK = 0.5
# A rotation that is this much faster than at equilibrium calls for a warm-up.
_FAST = 2.0
# A smooth schedule stays near its peak for a while, which is still the peak.
_AT_PEAK = 0.999
# What a norm loses in a cool-down before it is worth a word.
_SHRINKS = 0.1


@dataclass(frozen=True)
class GroupWeights:
    """The weights of one param group that are forecast.

    Args:
        norms: RMS norm of the vectors of each weight, at the start.
        dims: entries of a vector of each.
        shape: rows and columns of the matrices, if they are alike; Muon has no forecast without.
        gradient_scale: E‖g‖²‖w‖² of each, if it was measured; SGD and coupled decay have no norms
            in advance without.
    """

    norms: Sequence[float]
    dims: Sequence[int]
    shape: tuple[int, int] | None = None
    gradient_scale: Sequence[float] | None = None


@dataclass(frozen=True)
class Measured:
    """What a run has shown of each weight, for a forecast of weights of any kind.

    Args:
        coherence: κ, as :func:`lightning_normdyn.functional.coherence` measures it.
        energy: tan²θ ‖w‖²/lr² of recent steps; times ‖w‖² for SGD.
    """

    coherence: Sequence[float]
    energy: Sequence[float]


class Advice(NamedTuple):
    """A condition that holds for a group.

    Args:
        kind: "decay cannot act", "memory longer than the run", "memory shorter than an epoch",
            "warm-up too short", "no warm-up needed", "norm shrinks in the cool-down", "norm
            doubles", or "never settles".
        numbers: what it rests on, by name; steps are optimizer steps.
    """

    kind: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class GroupForecast:
    """What a fit will do to the weights of one param group; None where nobody can tell.

    Args:
        steps: optimizer steps of the fit.
        is_assumed: whether the learning rate is only assumed to stay.
        peak_lr: the largest learning rate.
        timescale: 1/(lr λ) at the peak: how many steps weights remember.
        total_pull: Σ lr λ over the fit; exp(-total_pull) is what decay alone leaves of a norm.
        relaxation: steps in which a deviation of the norm falls by e, at the peak.
        angle: RMS angle that the weights would settle at, at the peak, rad/step.
        settled_norms: the norms that belong to it, ``(weights,)``.
        norms: expected norms, ``(rows, weights)``; the first row is the start, the last the end.
        norm_steps: after how many steps each row is; every one up to 20,000 steps.
        advice: the conditions that hold.
    """

    steps: int
    is_assumed: bool
    peak_lr: float
    timescale: float | None
    total_pull: float | None
    relaxation: float | None
    angle: float | None
    settled_norms: Array | None
    norms: Array | None
    norm_steps: tuple[int, ...]
    advice: tuple[Advice, ...]


def forecast_group(
    optimizer_class: type,
    schedule: Schedule,
    weights: GroupWeights,
    *,
    steps_per_epoch: float | None = None,
    measured: Measured | None = None,
) -> GroupForecast:
    """Where the norms of one param group will go.

    Args:
        optimizer_class: class of the optimizer.
        schedule: its param group at every step of the fit.
        weights: what is in it.
        steps_per_epoch: optimizer steps of an epoch, if it is known.
        measured: coherence and energy that a run has shown; then the norms follow from these, for
            weights of any kind.

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
    rates = np.array(schedule.rates)
    if not np.isfinite(rates).all() or rates.size == 0:
        raise ValueError("A forecast needs a learning rate on the host at every step, and a step.")
    if len(weights.norms) != len(weights.dims):
        raise ValueError("`norms` and `dims` must be one each for every weight.")
    peak = int(rates.argmax())
    at_peak = schedule.groups[peak]
    pulls = _pulls(optimizer_class, schedule, rates, weights.shape)
    fit = _Fit(
        optimizer_class,
        schedule,
        weights,
        rates,
        pulls,
        peak,
    )

    pull = total = timescale = None
    if pulls is not None:
        pull, total = float(pulls[peak]), float(pulls.sum())
    # Without a decay, weights remember for ever, which is no number of steps.
    if pull:
        timescale = 1 / pull
    angle, relaxation = fit.settled(at_peak)
    norms, norm_steps = fit.norms(measured)
    forecast = GroupForecast(
        steps=rates.size,
        is_assumed=schedule.is_assumed,
        peak_lr=float(rates[peak]),
        timescale=timescale,
        total_pull=total,
        relaxation=relaxation,
        angle=angle,
        settled_norms=fit.settled_norms(at_peak),
        norms=norms,
        norm_steps=norm_steps,
        advice=(),
    )
    advice = [
        *_about_decay(forecast, steps_per_epoch),
        *_about_warm_up(fit, forecast, pull),
        *_about_norms(fit, forecast, pull),
    ]
    if never_settles(optimizer_class, at_peak) is not None:
        decay = group_number(at_peak, "weight_decay")
        advice.append(Advice("never settles", {"lr": forecast.peak_lr, "decay": float(decay)}))
    return replace(forecast, advice=tuple(advice))


def _pulls(
    optimizer_class: type,
    schedule: Schedule,
    rates: Array,
    shape: tuple[int, int] | None,
) -> Array | None:
    """The relative decay of every step; None where nobody can tell."""
    pulls = np.zeros_like(rates)
    settings: Mapping[str, Any] | None = None
    decay: float | None = None
    for step, group in enumerate(schedule.groups):
        others = {key: value for key, value in group.items() if key != "lr"}
        # λ does not depend on the rate, and most schedules change nothing else.
        if others != settings:
            settings, decay = others, _decay(optimizer_class, group, shape)
        if decay is None:
            return None
        pulls[step] = rates[step] * decay
    return pulls


def _decay(optimizer_class: type, group: Group, shape: tuple[int, int] | None) -> float | None:
    """λ, decoupled; None where nobody can tell."""
    if group_number(group, "weight_decay") == 0:
        return 0.0
    response = step_response(optimizer_class, group, shape=shape)
    if response is None or response.rough or response.effective_decay is None:
        return None
    return float(response.effective_decay)


@dataclass(frozen=True)
class _Fit:
    """What all parts of a forecast are made from."""

    optimizer_class: type
    schedule: Schedule
    weights: GroupWeights
    rates: Array
    pulls: Array | None
    peak: int

    @property
    def scale(self) -> Array | None:
        """E‖g‖²‖w‖² of each weight."""
        given = self.weights.gradient_scale
        if given is None:
            return None
        return np.asarray(given, dtype=np.float64)

    @property
    def power(self) -> int:
        """P of the equilibrium; that of steps of a fixed size for an optimizer nobody knows."""
        response = self.response(self.schedule.groups[self.peak])
        if response is None:
            return 2
        return response.power

    def response(self, group: Group) -> StepResponse | None:
        return step_response(self.optimizer_class, group, shape=self.weights.shape)

    def settled(self, group: Group) -> tuple[float | None, float | None]:
        """The angle that weights would settle at, and the relaxation time."""
        response = self.response(group)
        # What an Adam with coupled decay settles at depends on its gradients.
        if response is None or response.rough:
            return None, None
        settled = settles_at(response)
        if settled is None:
            return None, None
        angle, relaxation = settled
        return float(angle), float(relaxation)

    def settled_norms(self, group: Group) -> Array | None:
        """The norms that belong to it."""
        norms = []
        weights = self.weights
        scales: Sequence[float | None] = weights.gradient_scale or [None] * len(weights.dims)
        for dim, scale in zip(weights.dims, scales, strict=True):
            norm = equilibrium_norm(
                self.optimizer_class, group, scale, dim=dim, shape=weights.shape
            )
            if norm is None:
                return None
            norms.append(float(norm))
        return np.array(norms)

    def norms(self, measured: Measured | None) -> tuple[Array | None, tuple[int, ...]]:
        """Expected norms, and after how many steps."""
        # A course takes about 70 µs a step, which 20,000 steps make a second and a half.
        stride = math.ceil(self.rates.size / _LONGEST_COURSE)
        if measured is None and stride == 1:
            return self._step_by_step()
        known = measured or self._coherence()
        if known is None or self.pulls is None:
            return None, ()
        return self._by_coherence(known, self.pulls, stride)

    def _step_by_step(self) -> tuple[Array | None, tuple[int, ...]]:
        groups, weights = self.schedule.groups, self.weights
        # None as well for Muon without a shape.
        course = norm_course(
            self.optimizer_class, groups[0], weights.norms, weights.dims, shape=weights.shape
        )
        if course is None:
            return None, ()
        rows = [course.weight_norm]
        for group in groups:
            course.advance(group, self.scale)
            rows.append(course.weight_norm)
        norms = np.array(rows)
        # A gradient scale that is needed, and that no run has measured.
        if not np.isfinite(norms).all():
            return None, ()
        return norms, tuple(range(len(rows)))

    def _coherence(self) -> Measured | None:
        """That of pure noise."""
        response = self.response(self.schedule.groups[self.peak])
        if response is None:
            return None
        dims = np.asarray(self.weights.dims, dtype=np.float64)
        energies = noise_energy(response, dims, self.scale)
        if energies is None:
            return None
        coherences = np.full_like(energies, float(response.coherence))
        return Measured(list(coherences), list(energies))

    def _by_coherence(
        self, known: Measured, pulls: Array, stride: int
    ) -> tuple[Array, tuple[int, ...]]:
        """N' = (1 - pull)² N + κ lr² s, several steps at once where there are many."""
        coherence, energy = np.array(known.coherence), np.array(known.energy)
        response = self.response(self.schedule.groups[self.peak])
        square = np.asarray(self.weights.norms, dtype=np.float64) ** 2
        rows, steps = [np.sqrt(square)], [0]
        for start in range(0, self.rates.size, stride):
            block = slice(start, start + stride)
            # A block decays and grows as a whole: its pulls are small against one.
            kept = float(np.prod(1 - pulls[block]))
            step = squared_step(response, energy, square, (self.rates[block] ** 2).sum())
            square = grown(square, kept, coherence, step)
            rows.append(np.sqrt(square))
            steps.append(min(start + stride, self.rates.size))
        return np.array(rows), tuple(steps)


# ------------------------------------------------------------------------------------- advice


def _about_decay(forecast: GroupForecast, steps_per_epoch: float | None) -> Iterator[Advice]:
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
    if timescale > forecast.steps:
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
        warm_up = fit.peak
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
    last_at_peak = int(np.flatnonzero(fit.rates >= _AT_PEAK * forecast.peak_lr)[-1])
    row = int(np.searchsorted(forecast.norm_steps, last_at_peak))
    shrunk = 1 - float(np.median(norms[-1] / norms[row]))
    if last_at_peak + 1 < forecast.steps and shrunk > _SHRINKS:
        numbers = {"shrinks": shrunk, "gradients": 1 / (1 - shrunk)}
        yield Advice("norm shrinks in the cool-down", numbers)
    # Of several weights the middle one speaks for the group.
    drift = float(np.median(np.log(norms[-1] / norms[0]))) / forecast.steps
    # Decay takes 1 pull of ln‖w‖ per step, so twice as much growth is not held by it.
    unheld = pull is not None and drift > 2 * pull
    if unheld and drift * forecast.steps > math.log(2):
        yield Advice("norm doubles", {"steps": math.log(2) / drift})
