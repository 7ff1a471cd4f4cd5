"""What a person should hear of while a run goes on: weights that collapse, explode or are not
finite, and a decay that does nothing. Each is said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from lightning.pytorch import Trainer

from lightning_normdyn.engine.messages import show, warn_once
from lightning_normdyn.engine.target import Target
from lightning_normdyn.monitor.forecasts import (
    idle_decay,
    known_fall,
    least_of,
    steps_to_collapse,
    steps_until_overflow,
)
from lightning_normdyn.monitor.ledger import Norms
from lightning_normdyn.monitor.loggers import publish_alert
from lightning_normdyn.monitor.measure import StepGauge
from lightning_normdyn.optimizers.recognition import class_for_predictions

COLLAPSE = "Weights collapse"
EXPLOSION = "Weights explode"
DIVERGED = "Weights are not finite"


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

    def not_finite(self, names: Sequence[str], step: int, row: Mapping[str, float]) -> None:
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

    def idle_decays(self, gauges: Sequence[StepGauge]) -> None:
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

    def _say(self, title: str, name: str, text: str) -> None:
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
