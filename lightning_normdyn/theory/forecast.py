r"""What a fit will do to its norms, before it runs and after.

Everything follows from the param groups, the norms at the start and the schedule. The expected
course of the norms (`lightning_normdyn.theory.course`) is run through a schedule that was stepped
dry (`lightning_normdyn.theory.schedule`). Advice is a condition that holds, with the numbers that
it rests on; the words are others'. No advice says that a loss will be better.

Numbers of the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lightning_normdyn.optimizers.group_numbers import group_number

from .equilibrium import never_settles
from .group_norms import AT_PEAK, GroupNorms, GroupWeights, Measured, Shape
from .growth import Array
from .schedule import Schedule

__all__ = [
    "Advice",
    "GroupForecast",
    "GroupWeights",
    "Measured",
    "Shape",
    "forecast_group",
]

# Decay cannot act where it shrinks a norm by less than this power of e in the whole run.
_TOO_WEAK = 0.5
# A rotation that is this much faster than at equilibrium calls for a warm-up.
_FAST = 2.0
# What a norm loses in a cool-down before it is worth a word.
_SHRINKS = 0.1


class Advice(NamedTuple):
    """A condition that holds for a group, or for one weight of it.

    Args:
        kind: "decay cannot act", "memory longer than the run", "memory shorter than an epoch",
            "warm-up too short", "no warm-up needed", "norm shrinks in the cool-down", "norm
            doubles", "never settles", or one of `lightning_normdyn.theory.comparison`.
        numbers: what it rests on, by name; steps are optimizer steps.
        weight: its name; empty for the group.
        reason: in words, where no number says it.
    """

    kind: str
    numbers: Mapping[str, float]
    weight: str = ""
    reason: str = ""


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
    fit = GroupNorms(optimizer_class, schedule, weights)
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
    reason = never_settles(optimizer_class, fit.at_peak)
    if reason is not None:
        decay = group_number(fit.at_peak, "weight_decay")
        numbers = {"lr": forecast.peak_lr, "decay": float(decay)}
        advice.append(Advice("never settles", numbers, reason=reason))
    return replace(forecast, advice=tuple(advice))


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


def _about_warm_up(
    fit: GroupNorms, forecast: GroupForecast, pull: float | None
) -> Iterator[Advice]:
    """How long weights would turn too fast without a warm-up, against the one that there is."""
    settled = forecast.settled_norms
    if settled is None or not pull:
        return
    # A schedule that does not rise has no warm-up.
    warm_up = 0
    if fit.rates[0] < AT_PEAK * forecast.peak_lr:
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


def _about_norms(fit: GroupNorms, forecast: GroupForecast, pull: float | None) -> Iterator[Advice]:
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
