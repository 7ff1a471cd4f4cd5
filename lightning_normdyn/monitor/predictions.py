"""What theory makes of the monitor's measurements: a prediction beside each curve, a verdict at the
end, warnings before it is too late.

Numbers of the host, but for `urgency` and `entries_of_dying`. Formulas:
`lightning_normdyn.theory.equilibrium`, `lightning_normdyn.theory.outlook`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import copysign, exp, inf, isfinite, log
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.engine.effect import Effects, Rescaling
from lightning_normdyn.geometry.vectors import WeightVectors
from lightning_normdyn.monitor.history import History
from lightning_normdyn.optimizers.decay import AnOptimizer, Decay, decay_of, highest_claim
from lightning_normdyn.optimizers.group_numbers import is_zero
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.optimizers.step_response import is_rough, step_response
from lightning_normdyn.theory.equilibrium import settles_at, wrs_angular_update
from lightning_normdyn.theory.outlook import (
    adam_collapse_steps,
    free_decay_rate,
    reading,
    steps_to_overflow,
    steps_to_underflow,
    total_decay,
)

# Relaxation times after which a start within 20 % of the equilibrium is forgotten.
SETTLED_AFTER = 6.0
# A norm counts as drifting if it does so both over the last 2 and over the last 4 relaxation times
# (and these many rows): within one, the
# norms of a settled network wander by a tenth all the time.
WINDOWS = ((2.0, 6), (4.0, 12))
# But a drift by this much within a relaxation time is none of that: after a burst the two windows
# may even disagree on the direction.
WANDERING = 0.3
# Below this many powers of e, a decay does next to nothing to a norm within the whole run.
IDLE_DECAY = 0.1
# A norm that has grown by this factor and still grows exponentially is on its way to overflow: a
# random walk never gets there.
RUNAWAY = 1e4


def balance(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any], shrink: float | None = None
) -> dict[str, Any] | None:
    """What pulls a weight shorter and what its steps lose, in the words of
    `lightning_normdyn.theory.equilibrium`.

    Args:
        effects: what the callbacks do to the weight.
        optimizer: its optimizer, or the class of it.
        group: its param group.
        shrink: the decay that AWS amounts to now.

    Returns:
        The options ``shrink``, ``projected`` and ``decay``; None where nothing has been derived: a
        callback of somebody else, two decays
        at once, steps of a recorded length, a norm that WRS sets now and then (for which there is
        `lightning_normdyn.theory.equilibrium.wrs_angular_update`).
    """
    if effects.underived or effects.scaled_steps or effects.rescaled_now is not None:
        return None
    decay = _decay(effects, optimizer, group)
    if decay.doubled:
        return None
    options: dict[str, Any] = {}
    if effects.projection is not None:
        options["projected"] = True
    if effects.shrink is not None:
        options["shrink"] = shrink
    elif effects.projection is not None:
        if decay.rate is None:
            return None
        options["decay"] = decay.rate
    return options


def _decay(effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]) -> Decay:
    """Who decays the weight, and by how much."""
    rules = effects.decay_rules
    return decay_of(optimizer, group, rules, highest_claim(rules))


@dataclass(frozen=True)
class Prediction:
    """What a weight settles at if its hyperparameters stay as they are.

    Args:
        angular_update: RMS, radians per optimizer step.
        relaxation: optimizer steps in which a deviation of the norm falls by e; None where WRS sets
            the norm.
        power: P of `lightning_normdyn.theory.equilibrium`.
        pull: lr x decay; under AWS, lr x alpha. Changes with the schedule only.
        rough: 13-38 % off on a real network (Adam with coupled decay).
    """

    angular_update: float
    relaxation: float | None
    power: float
    pull: float
    rough: bool = False


def predict(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    measured: Mapping[str, float],
    length: int,
) -> Prediction | None:
    """What a scale-invariant weight settles at; None where nothing has been derived, never a guess.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group at this step.
        effects: what the callbacks do to the weight.
        measured: means over the weight's vectors at this step: ``lr``, ``weight_norm``, and where
            they are asked for ``gradient_scale``
            (E‖g‖²‖w‖²: WRS on SGD, Adam with coupled decay) and ``equivalent_weight_decay`` (AWS).
        length: entries of a vector.

    Example:
        >>> group = {"weight_decay": 5e-4, "momentum": 0.9, "dampening": 0, "nesterov": False}
        >>> found = predict(torch.optim.SGD, group, Effects(), {"lr": 0.1, "weight_norm": 2.0}, 27)
        >>> round(found.angular_update, 6), round(found.relaxation)
        (0.007255, 500)
    """
    group = {**group, "lr": measured["lr"]}
    norm, scale = (
        measured["weight_norm"],
        measured.get("gradient_scale") or None,
    )  # without any gradient, none is known
    if effects.rescaled_now is not None:
        return _predict_rescaled(
            optimizer, group, effects, effects.rescaled_now, norm, scale, length
        )
    options = balance(effects, optimizer, group, measured.get("equivalent_weight_decay"))
    if options is None:
        return None
    response = step_response(class_for_predictions(optimizer), group, **options)
    if response is None or response.decay is None:
        return None
    settled = settles_at(response, gradient_scale=scale, dim=length, norm=norm)
    if settled is None or not 0 < float(settled[0]) < inf:
        return None
    angle, relaxation = settled
    pull = float(response.lr * response.decay) / (norm if response.adaptive else 1.0)
    return Prediction(float(angle), float(relaxation), response.power, pull, response.rough)


def _predict_rescaled(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    rescaling: Rescaling,
    norm: float,
    scale: float | None,
    length: int,
) -> Prediction | None:
    """Under WRS, which has been derived for steps without any decay."""
    if effects.underived or effects.scaled_steps or effects.shrink is not None:
        return None
    rate = _decay(effects, optimizer, group).rate
    if rate is None or not is_zero(rate):
        return None
    angle = wrs_angular_update(
        class_for_predictions(optimizer),
        group,
        rescaling.every_n_steps,
        gradient_scale=scale,
        dim=length,
        target_norm=norm if rescaling.target_norm == "initial" else rescaling.target_norm,
        projected=effects.projection is not None,
    )
    return (
        None
        if angle is None or not 0 < float(angle) < inf
        else Prediction(float(angle), None, 0, float(group["lr"]))
    )


# ----------------------------------------------------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """What happened to a weight's prediction on the way: the e-foldings elapsed, and how the
    schedule moved.

    Args:
        latest: the newest prediction.
        step: optimizer step of it.
        elapsed: relaxation times since the start.
        pulls: (optimizer step, lr x decay), an entry for each change by a hundredth.
    """

    latest: Prediction | None = None
    step: int = 0
    elapsed: float = 0.0
    pulls: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, prediction: Prediction | None) -> None:
        """Take in the prediction of an optimizer step, counted from 1."""
        if prediction is not None and prediction.relaxation:
            # Steps since the last look went by at this rate.
            self.elapsed += (step - self.step) / prediction.relaxation
            if not self.pulls or abs(prediction.pull / self.pulls[-1][1] - 1) > 0.01:
                self.pulls.append((step, prediction.pull))
            if len(self.pulls) > 512:
                del self.pulls[1::2]
        self.latest, self.step = prediction, step

    def fork(self) -> Course:
        """A course that starts as this one and goes on by itself."""
        return replace(self, pulls=list(self.pulls))

    def steady_since(self) -> float:
        """The step since which lr x decay has been within a tenth of what it is now; before,
        another equilibrium was aimed at."""
        if not self.pulls:
            return -inf
        now = self.pulls[-1][1]
        changed = [i for i, (_, pull) in enumerate(self.pulls) if abs(pull / now - 1) > 0.1]
        return float(self.pulls[changed[-1] + 1][0]) if changed else -inf

    def change(self, window: float) -> float:
        """Largest relative change of lr x decay within the last ``window`` steps."""
        start = self.step - window
        within = [pull for step, pull in self.pulls if step > start]
        before = [pull for step, pull in self.pulls if step <= start]
        now = self.pulls[-1][1]
        return max((abs(pull / now - 1) for pull in [*before[-1:], *within]), default=0.0)


def judge(history: History, name: str, course: Course) -> str:
    """What a person should read from the curves of weight ``name``, judged by its norm.

    Args:
        history: rows with ``weight_norm``, ``angular_update`` and, where there is a prediction,
            ``equilibrium_angular_update``.
        name: the weight.
        course: its predictions on the way.

    Returns:
        a verdict of `lightning_normdyn.theory.outlook.reading`; "not settled yet" instead of "settled"
        before `SETTLED_AFTER` e-foldings;
        under WRS the comparison alone; "too few rows"; "not finite since step 5" for a weight that
        ended with NaN.
    """
    diverged = _not_finite_since(history, name)
    if diverged is not None:
        return f"not finite since step {diverged}"
    at, norms, angles, predicted = _aligned(history, name)
    if len(at) < 3:
        return "too few rows"
    if course.step:
        at *= course.step / (
            at[-1] + 1
        )  # its own optimizer may step more or less often than others
    prediction = course.latest
    relaxation = None if prediction is None else prediction.relaxation
    recent, longer = (
        _window(at, relaxations * (relaxation or inf), rows, course.steady_since())
        for relaxations, rows in WINDOWS
    )
    turned = _root_mean_square(angles[recent])
    known = recent & np.isfinite(predicted)
    ratio = (
        _root_mean_square(angles[known]) / _root_mean_square(predicted[known])
        if known.any() and prediction is not None
        else None
    )
    growth = 2 * np.log(np.maximum(norms, 1e-300))
    drift, before = _slope(at[recent], growth[recent]), _slope(at[longer], growth[longer])
    if relaxation and abs(drift) * relaxation < WANDERING:
        drift = _common(drift, before)
    if prediction is not None and relaxation is None and ratio is not None and turned > 0:
        return f"length held by WeightRescaling, {ratio:.2g}x the prediction"
    said = reading(
        drift,
        relaxation,
        ratio,
        course.change(relaxation) if relaxation else 0.0,
        angular_update=turned,
        power=prediction.power if prediction is not None else 4,
        age=(at[-1] - at[recent][0]) / 2,  # a slope is that of the middle of its window
    )
    if said.startswith("settled") and course.elapsed < SETTLED_AFTER:
        said = f"not settled yet, {ratio:.2g}x the prediction"
    rough = prediction is not None and prediction.rough and "prediction" in said
    return f"{said} (a rough one)" if rough and said != "no prediction" else said


def _not_finite_since(history: History, name: str) -> int | None:
    """The first of the steps, up to the newest row, at which the norm or the angle was NaN or
    infinite; None if the newest is finite."""
    since: list[int] = []
    for key in (f"weight_norm/{name}", f"angular_update/{name}"):
        if not history.has(key):
            continue
        steps, values = history.column(key)
        finite = np.flatnonzero(np.isfinite(values))
        trailing = steps[finite[-1] + 1 :] if len(finite) else steps
        since += trailing[:1].tolist()
    return min(since, default=None)


def _aligned(history: History, name: str) -> list[Any]:
    """Steps, norms, angles and predictions (NaN where there is none) of the rows that have an
    angle, float64."""
    keys = [
        f"{quantity}/{name}"
        for quantity in ("weight_norm", "angular_update", "equilibrium_angular_update")
    ]
    curves = [
        dict(zip(*(c.tolist() for c in history.column(key)), strict=True))
        if history.has(key)
        else {}
        for key in keys
    ]
    # A number of a single step that was not finite, after which the run went on, is no part of a
    # curve.
    steps = [
        step
        for step in curves[1]
        if step in curves[0] and isfinite(curves[0][step]) and isfinite(curves[1][step])
    ]
    columns = [[curve.get(step, float("nan")) for step in steps] for curve in curves]
    return [np.array(column, dtype=np.float64) for column in (steps, *columns)]


def _window(at: Any, length: float, rows: int, since: float) -> Any:
    """Which rows to look at: the last ``length`` steps, at least ``rows`` rows, but not more than
    the second half of the run, and nothing
    from before ``since``; three rows in any case."""
    half = (at[0] + at[-1]) / 2
    start = min(at[-1] - length, at[-min(rows, len(at))])
    chosen = at >= max(start, half, since)
    chosen[-3:] = True
    return chosen


def _common(first: float, second: float) -> float:
    """The smaller of two slopes that agree on the direction; else 0."""
    return copysign(min(abs(first), abs(second)), first) if first * second > 0 else 0.0


def _slope(x: Any, y: Any) -> float:
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / np.square(centred).sum())


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.square(values).mean()))


# ----------------------------------------------------------------------------------------------------------------------------------------
# Warnings
# ----------------------------------------------------------------------------------------------------------------------------------------


def log_smallest(dtype: torch.dtype) -> float:
    """ln of the norm whose square vanishes in ``dtype``; float32 for weights that are stored
    shorter.

    Example:
        >>> round(exp(log_smallest(torch.float32)) / 1e-23, 2)
        2.65
    """
    return -steps_to_underflow(
        1.0, 1.0, dtype if dtype in (torch.float32, torch.float64) else torch.float32
    )


def urgency(e_foldings: Tensor) -> Tensor:
    """A power of each vector's e-foldings left, so high that the sum over vectors tells the
    smallest: see `least_of`."""
    return e_foldings.clamp(min=1.0).pow(-_sharpness(e_foldings.dtype))


def least_of(total: float, dtype: torch.dtype = torch.float64) -> float:
    """The smallest of the e-foldings whose `urgency` sums to ``total``; a little less where several
    are equally small.

    Sums are all that ranks exchange, so the smallest must come from a sum.

    Example:
        >>> round(least_of(float(urgency(torch.tensor([31.0, 50.0, 44.0], dtype=torch.float64)).sum())), 1)
        31.0
    """
    return inf if total <= 0 else total ** (-1 / _sharpness(dtype))


def _sharpness(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 20  # 60 to this power is still a number


class Dying(NamedTuple):
    """A vector without gradient under Adam with coupled decay, as far as its first and its last
    entry to go tell.

    Args:
        e_foldings: how far it has to fall.
        weight: size of its last entry.
        second_moment: Adam's ``exp_avg_sq`` of its last entry.
        smallest_second_moment: and of its first.
        step: Adam's step count.
    """

    e_foldings: float
    weight: float
    second_moment: float
    smallest_second_moment: float
    step: float

    def steps_left(self, group: Mapping[str, Any]) -> float:
        """Until it vanishes."""
        return adam_collapse_steps(group, **self._asdict())


def falls_ever_faster(optimizer: AnOptimizer, group: Mapping[str, Any], effects: Effects) -> bool:
    """Whether a vector without gradient falls at a rate that its second moments decide (Adam with
    coupled decay).

    Example:
        >>> falls_ever_faster(torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2}, Effects())
        True
    """
    options = _fixed_decay(effects, optimizer, group)
    return options is not None and is_rough(class_for_predictions(optimizer), group, **options)


def entries_of_dying(
    vectors: WeightVectors, state: Mapping[Tensor, Any], position: int, group: Mapping[str, Any]
) -> Tensor:
    """What `Dying` has to know of the entries of each vector of one weight: Adam shrinks that with
    the largest second moment last.

    Means over the entries with the root of the second moment to a high power as their weight,
    because sums are all that ranks exchange.
    Every rank must call it.

    Args:
        vectors: index space of the weights.
        state: the optimizer's state.
        position: of the weight among them.
        group: its param group.

    Returns:
        ``(4, n)``: ``weight``, ``second_moment``, ``smallest_second_moment``, ``step``; NaN for
        other weights and without second moments.
    """
    weight, nothing = vectors.weights[position], [None] * len(vectors.weights)

    def of_this(tensor: Tensor) -> list[Tensor | None]:
        return [*nothing[:position], tensor, *nothing[position + 1 :]]

    known = state.get(weight, {})
    local = vectors.local(of_this(known["exp_avg_sq"]))[position] if "exp_avg_sq" in known else None
    values, at = vectors.values()[position].abs(), 0.0
    second = torch.zeros_like(values, dtype=vectors.sum_dtype)
    last = first = second
    if local is not None:
        at, second = float(known["step"]), local.to(vectors.sum_dtype)
        root = (second / (1 - group["betas"][1] ** at)).sqrt() + group["eps"]
        power = 16 if vectors.sum_dtype == torch.float64 else 4
        # An entry without any second moment is 0 and stays so.
        last, first = (
            root.pow(power),
            torch.where(second > 0, root.pow(-power), torch.zeros_like(root)),
        )
    pairs = ((last, None), (last, values), (last, second), (first, None), (first, second))
    sums = vectors.inner(*((of_this(a), None if b is None else of_this(b)) for a, b in pairs))
    return torch.stack(
        [sums[1] / sums[0], sums[2] / sums[0], sums[4] / sums[3], sums[0] * at / sums[0]]
    )


def steps_to_collapse(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    e_foldings: float,
    rate: float,
    dying: Sequence[Dying] = (),
) -> float:
    """Optimizer steps until a vector without gradient has shrunk by ``e_foldings`` powers of e, at
    the present learning rate.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        effects: what the callbacks do to the weight.
        e_foldings: how far it has to go.
        rate: -d ln‖w‖ per step as measured, for optimizers that are not understood; soon after the
            last gradient the momentum still
            moves the vector, so the known rate is the better one.
        dying: where the vector `falls_ever_faster`, what is known of each of them.

    Returns:
        ``inf`` where it does not get there: AWS shrinks ever slower, WRS puts the length back until
        its last epoch. ``inf`` also where
        nobody knows, because a callback of somebody else acts on it.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, "weight_decay": 1e-2}
        >>> round(steps_to_collapse(torch.optim.SGD, group, Effects(), log(0.17 / 2.6e-23), 0.0))  # measured: 4490
        4489
    """
    options = _fixed_decay(effects, optimizer, group)
    put_back = effects.rescaling is not None and effects.rescaling.window != "over"
    if effects.underived or put_back or (effects.shrink is not None and options is None):
        return inf
    if dying and falls_ever_faster(optimizer, group, effects):
        return min(vector.steps_left(group) for vector in dying)
    known = (
        None
        if options is None
        else free_decay_rate(class_for_predictions(optimizer), group, **options)
    )
    rate = rate if known is None else known
    return e_foldings / rate if rate > 0 else inf


def _fixed_decay(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`balance` of the decay that does not fade with the length: all but AWS. None where there is
    no other or none is known."""
    if effects.shrink is None:
        return balance(effects, optimizer, group)
    options = (
        None
        if effects.shrink.replaces_decay
        else balance(replace(effects, shrink=None), optimizer, group)
    )
    return (
        options
        if options is not None and (options.get("decay") or group.get("weight_decay"))
        else None
    )


def steps_until_overflow(steps: Sequence[float], norms: Sequence[float]) -> float:
    """Steps until the square of a norm overflows float32, if it has run away and keeps growing
    exponentially; else ``inf``.

    Args:
        steps: of the recorded norms.
        norms: the first one of the run, and the last ones.

    Example:
        >>> round(steps_until_overflow([0, 28, 29, 30, 31], [1.0, 1.5**28, 1.5**29, 1.5**30, 1.5**31]))
        78
        >>> steps_until_overflow([0, 28, 29, 30, 31], [1.0, 2.30, 2.32, 2.34, 2.36])
        inf
    """
    if len(norms) < 5 or not (0 < norms[0] * RUNAWAY < norms[-1] < inf):
        return inf
    rates = [
        log(b / a) / (t - s)
        for s, t, a, b in zip(steps[1:], steps[2:], norms[1:], norms[2:], strict=False)
        if a > 0
    ]
    if len(rates) < 3 or min(rates) <= 0 or rates[-1] < 0.8 * rates[0]:
        return inf
    return steps_to_overflow(norms[-1], min(rates))


def idle_decay(optimizer_class: type, group: Mapping[str, Any], steps: float) -> str | None:
    """A sentence about a decay that cannot act within a run of ``steps`` optimizer steps; None
    where there is nothing to say.

    Args:
        optimizer: the optimizer, or its class.
        group: a param group; during a warm-up its ``initial_lr`` or ``max_lr`` counts.
        steps: of the whole run.

    Example:
        >>> print(idle_decay(torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-4}, 30_000))
        weight decay 0.0005 at lr 0.001 shrinks a weight by 1.5 % over the 30000 steps of this run:
        it does next to nothing.
    """
    if not 0 < steps < inf:
        return None
    lr = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
    pull = total_decay(optimizer_class, {**group, "lr": lr}, int(steps))
    if pull is None or not isfinite(pull) or not 0 < pull < IDLE_DECAY:
        return None
    much = f"{100 * (1 - exp(-pull)):.2g} %"
    settings = f"weight decay {float(group['weight_decay']):g} at lr {lr:g}"
    return f"{settings} shrinks a weight by {much} over the {steps:.0f} steps of this run: it does next to nothing."
