"""What a person should hear of while a run goes on: weights that collapse, explode or are not
finite, and a decay that does nothing. Each is said once.

Above, when it is said; below, how it is foretold: a vector that only decays and underflows, a norm
that grows until it overflows, a decay that cannot act within the run. Formulas:
`lightning_normdyn.theory.outlook`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, inf, isfinite, log, nan
from typing import Any

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.flavours import Trainer
from lightning_normdyn.engine.messages import show, warn_once
from lightning_normdyn.engine.plan import Target
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.recognition import class_for_predictions
from lightning_normdyn.theory.outlook import free_decay_rate, steps_to_overflow, total_decay

from .loggers import publish_alert
from .measure import StepGauge
from .norm_table import Norms
from .predictions import balance
from .step_sums import least_of

COLLAPSE = "Weights collapse"
EXPLOSION = "Weights explode"
DIVERGED = "Weights are not finite"

# Below this many powers of e, a decay does next to nothing to a norm within the whole run.
IDLE_DECAY = 0.1
# A norm that has grown by this factor and still grows exponentially is on its way to overflow: a
# random walk never gets there.
RUNAWAY = 1e4
# And it still grows exponentially if its newest rate is at least this share of the one before.
STILL_GROWING = 0.8


class Alarms:
    """Warnings of one fit, and W&B alerts where they are asked for.

    Args:
        trainer: of the fit.
        alert: whether loggers that can are to alert a person.
    """

    def __init__(self, trainer: Trainer, *, alert: bool) -> None:
        self._trainer = trainer
        self._alert = alert
        self._said: set[tuple[str, str]] = set()

    def dead(
        self,
        gauge: StepGauge,
        target: Target,
        group: Mapping[str, Any],
        sums: Mapping[str, tuple[float, float]],
    ) -> None:
        """A vector without gradient only decays: say so before something divides by its length.

        Args:
            gauge: who measured it.
            target: the weight.
            group: its param group at the measured step.
            sums: totals and counts by name.
        """
        number = sums["dead"][0]
        lr, vectors = sums["lr"]
        # A weight that was spoken of needs no forecast any more; every row would compute one.
        if not number or not vectors or (COLLAPSE, target.name) in self._said:
            return
        plan = gauge.plan
        effects = gauge.effects[target.name]
        # The rate that the step applied: some optimizers scale the one in the param group.
        present = {**group, "lr": lr / vectors}
        # The shortest vector goes first; sums over ranks are all that is known of them.
        e_foldings = least_of(sums["urgency"][0], plan.vectors.sum_dtype)
        rate = sums["dead_rate"][0] / number
        left = steps_to_collapse(plan.optimizer, present, effects, e_foldings, rate)
        if not self._is_within_fit(left):
            return
        # A measured rate changes: under Adam with coupled decay it does, in both directions.
        is_known = known_fall(plan.optimizer, present, effects) is not None
        if_steady = "" if is_known else " if it goes on as fast as now"
        vectors_shrink = "vector gets no gradient and only shrinks"
        if number > 1:
            vectors_shrink = "vectors get no gradient and only shrink"
        self._say(
            COLLAPSE,
            target.name,
            f"{number:.0f} {vectors_shrink}: at the present learning rate the length underflows in "
            f"about {left:.0f} steps{if_steady}, and what divides by it (weight standardization, "
            f"weight normalization) then gives NaN. Lower the decay of this weight, or use "
            f"AdaptiveWeightShrink, which shrinks short vectors ever more slowly.",
        )

    def overflow(self, target: Target, seen: Norms) -> None:
        """A norm that grows exponentially: say so before it overflows."""
        # The step of the first norm is not kept. The forecast takes no rate from it, so any will
        # do.
        left = steps_until_overflow([0, *seen.steps], [seen.first, *seen.norms])
        if not self._is_within_fit(left):
            return
        self._say(
            EXPLOSION,
            target.name,
            f"its norm has grown from {seen.first:.2g} to {seen.norms[-1]:.2g} and grows "
            f"exponentially: at the present rate its square overflows in about {left:.0f} steps. "
            f"Lower the learning rate or the decay of this weight: lr x decay must stay far below "
            f"2.",
        )

    def not_finite(
        self,
        names: Sequence[str],
        step: int,
        row: Mapping[str, float],
    ) -> None:
        """A run has diverged: its losses may be averaged away, and curves that end are easily
        overlooked."""
        first = names[0]
        others = ""
        if len(names) == 2:
            others = f" and `{names[1]}`"
        elif len(names) > 2:
            others = f" and {len(names) - 1} more weights"
        what = f"weights of `{first}`{others} are"
        # A weight that is still finite will be none after the next step.
        if isfinite(row.get(f"weight_norm/{first}", nan)):
            what = f"a gradient or an update of `{first}`{others} is"
        text = (
            f"{what} not finite at step {step}: the run has diverged, and from here on its curves "
            f"show NaN. Look at the loss and the learning rate before this step."
        )
        # No name: once a weight is NaN all others follow, and one sentence is enough for the run.
        self._say(DIVERGED, "", text)

    def idle_decays(self, gauges: Iterable[StepGauge]) -> None:
        """The usual AdamW trap: a decay too small to change any norm within this run."""
        said: set[int] = set()
        steps = self._trainer.estimated_stepping_batches
        for gauge in gauges:
            for target in gauge.plan.targets:
                group = gauge.plan.group_of(target)
                # A rule that steers the norm may well be there because the decay is weak.
                is_plain = gauge.effects[target.name].none and target.scale_invariant
                if id(group) in said or not is_plain:
                    continue
                # Once for a group: its weights share the decay, and there may be hundreds.
                said.add(id(group))
                text = idle_decay(class_for_predictions(gauge.plan.optimizer), group, steps)
                if text is not None:
                    show(self._trainer, f"lightning-normdyn: {text}")

    def _is_within_fit(self, steps: float) -> bool:
        """Whether something that comes in so many optimizer steps comes before the fit ends."""
        if not isfinite(steps):
            return False
        planned = self._trainer.estimated_stepping_batches
        if planned <= 0:  # nobody knows when it ends
            return True
        # Lightning's `global_step` counts the steps of all optimizers together.
        taken = self._trainer.global_step / max(1, len(self._trainer.optimizers))
        return steps <= planned - taken

    def _say(
        self,
        title: str,
        name: str,
        text: str,
    ) -> None:
        """Once per weight and kind of trouble; without a name, once for all weights."""
        if (title, name) in self._said:
            return
        self._said.add((title, name))
        if name:
            text = f"`{name}`: {text}"
        warn_once(text)
        # Other ranks have no experiment that could alert anybody.
        if self._alert and self._trainer.is_global_zero:
            publish_alert(self._trainer.loggers, title, text)


# ------------------------------------------------------------------------------- vectors that decay


def known_fall(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
) -> float | None:
    """-d ln‖w‖ per step of a vector without gradient, as the optimizer's decay has it; None where
    no theory tells it, so that it has to be measured.

    Adam with coupled decay is such a case: its second moments fade, and the vector falls ever
    faster than it does now.
    """
    options = _fixed_decay(effects, optimizer, group)
    if options is None:
        return None
    return free_decay_rate(class_for_predictions(optimizer), group, **options)


def steps_to_collapse(
    optimizer: AnOptimizer,
    group: Mapping[str, Any],
    effects: Effects,
    e_foldings: float,
    rate: float,
) -> float:
    """Optimizer steps until a vector without gradient has shrunk by ``e_foldings`` powers of e, at
    the present learning rate: the logarithm of its length falls on a line.

    Args:
        optimizer: the optimizer, or its class.
        group: the weight's param group.
        effects: what the callbacks do to the weight.
        e_foldings: how far it has to go.
        rate: -d ln‖w‖ per step as measured, for optimizers that are not understood; soon after the
            last gradient the momentum still moves the vector, so `known_fall` is the better one.

    Returns:
        ``inf`` where it does not get there: AWS shrinks ever slower, WRS puts the length back until
        its last epoch. ``inf`` also where nobody knows, because a callback of somebody else acts on
        it.

    Example:
        >>> import torch
        >>> group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False}
        >>> group["weight_decay"] = 1e-2
        >>> to_fall = log(0.17 / 2.6e-23)
        >>> # Measured: 4490.
        >>> round(steps_to_collapse(torch.optim.SGD, group, Effects(), to_fall, 0.0))
        4489
    """
    is_put_back = effects.rescaling is not None and effects.rescaling.window != "over"
    if effects.underived or is_put_back:
        return inf
    if effects.shrink is not None and _fixed_decay(effects, optimizer, group) is None:
        return inf
    known = known_fall(optimizer, group, effects)
    if known is not None:
        rate = known
    return e_foldings / rate if rate > 0 else inf


def _fixed_decay(
    effects: Effects, optimizer: AnOptimizer, group: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`balance` of the decay that does not fade with the length: all but AWS. None where there is
    no other or none is known."""
    if effects.shrink is None:
        return balance(effects, optimizer, group)
    if effects.shrink.replaces_decay:
        return None
    options = balance(replace(effects, shrink=None), optimizer, group)
    if options is None or not (options.get("decay") or group.get("weight_decay")):
        return None
    return options


# ------------------------------------------------------------------------------ norms that run away


def steps_until_overflow(steps: Sequence[float], norms: Sequence[float]) -> float:
    """Steps until the square of a norm overflows float32, if it has run away and keeps growing
    exponentially; else ``inf``.

    Args:
        steps: of the recorded norms.
        norms: the first one of the run, and the last ones.

    Example:
        >>> norms = [1.0, 1.5**28, 1.5**29, 1.5**30, 1.5**31]
        >>> round(steps_until_overflow([0, 28, 29, 30, 31], norms))
        78
        >>> steps_until_overflow([0, 28, 29, 30, 31], [1.0, 2.30, 2.32, 2.34, 2.36])
        inf
    """
    if len(norms) < 5 or not (0 < norms[0] * RUNAWAY < norms[-1] < inf):
        return inf
    rates = []
    newest = zip(steps[1:], norms[1:], strict=True)
    for (step, norm), (next_step, next_norm) in pairwise(newest):
        if norm > 0:
            rates.append(log(next_norm / norm) / (next_step - step))
    if len(rates) < 3 or min(rates) <= 0 or rates[-1] < STILL_GROWING * rates[0]:
        return inf
    # The slowest of the rates: one jump must not raise an alarm.
    return steps_to_overflow(norms[-1], min(rates))


# ------------------------------------------------------------------------------- decay that is idle


def idle_decay(
    optimizer_class: type,
    group: Mapping[str, Any],
    steps: float,
) -> str | None:
    """A sentence about a decay that cannot act within a run of ``steps`` optimizer steps; None
    where there is nothing to say.

    Args:
        optimizer_class: of the optimizer.
        group: a param group; during a warm-up its ``initial_lr`` or ``max_lr`` counts.
        steps: of the whole run.

    Example:
        >>> import torch
        >>> group = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 5e-4}
        >>> print(idle_decay(torch.optim.AdamW, group, 30_000))
        weight decay 0.0005 at lr 0.001 shrinks a weight by 1.5 % over the 30000 steps of this run:
        it does next to nothing.
    """
    if not 0 < steps < inf:
        return None
    # The highest rate of the schedule: during a warm-up the present one says nothing of the run.
    lr = max(float(group.get(key) or 0.0) for key in ("lr", "initial_lr", "max_lr"))
    pull = total_decay(optimizer_class, {**group, "lr": lr}, int(steps))
    if pull is None or not isfinite(pull) or not 0 < pull < IDLE_DECAY:
        return None
    share = f"{100 * (1 - exp(-pull)):.2g} %"
    settings = f"weight decay {float(group['weight_decay']):g} at lr {lr:g}"
    return (
        f"{settings} shrinks a weight by {share} over the {steps:.0f} steps of this run: it does "
        f"next to nothing."
    )
