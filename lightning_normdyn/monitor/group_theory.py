"""What theory says of the param groups of one optimizer, asked at every row and worked out once.

Between two rows a param group mostly keeps its decay and its momentum, and at most its learning
rate moves. How its steps answer gradients, what its decay amounts to and whether its norms can be
followed then stay as they are, and to work them out again takes longer than all arithmetic on a few
dozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.optimizers.decay import AnOptimizer
from lightning_normdyn.optimizers.recognition import (
    class_for_predictions,
    follows_from_groups,
    row_of,
)
from lightning_normdyn.optimizers.step_response import Options, own_response
from lightning_normdyn.optimizers.step_rules import Subject
from lightning_normdyn.theory.course import is_understood

from .predictions import noise_coherence
from .pulls import Strength, options_of, strength_of

Group = Mapping[str, Any]
Shape = tuple[int, int] | None
T = TypeVar("T")

MOST_ANSWERS = 1024
"""Answers that are kept. Under a schedule each row has a learning rate of its own, and what was
answered for the rates before it is never asked for again."""

_PLAIN = (float, bool, int, str, type(None))


class Sizes(NamedTuple):
    """Of steps, what says how their size is averaged over rows.

    Args:
        normalized: whether steps are divided by the size of gradients.
        energy_is_rough: whether noise alone tells their length only roughly.
    """

    normalized: bool
    energy_is_rough: bool


class GroupTheory:
    """The answers for one optimizer at one row.

    Args:
        optimizer: the optimizer, or its class.
        answers: those of earlier rows of the same optimizer; new ones are written to it.

    Attributes:
        optimizer_class: the class whose predictions hold.
    """

    def __init__(self, optimizer: AnOptimizer, answers: dict[Any, Any]) -> None:
        self._optimizer = optimizer
        self._answers = answers
        # Of other optimizers, something may have changed that no param group shows. Asked at every
        # row: a step function may be replaced during a fit.
        self._keeps_answers = follows_from_groups(optimizer)
        self.optimizer_class = class_for_predictions(optimizer)
        # By identity, of groups that are held here: several questions are about each.
        self._known_settings: dict[int, tuple[Group, Settings | None]] = {}

    def strength(self, group: Group, effects: Effects) -> Strength:
        """`strength_of` a decay, which does not depend on the learning rate."""
        return self._once(
            ("strength",),
            group,
            effects,
            lambda: strength_of(self._optimizer, group, effects),
        )

    def options(self, group: Group, effects: Effects) -> tuple[Options, float] | None:
        """`options_of` what callbacks do to a weight, which does not depend on it either."""
        return self._once(
            ("options",),
            group,
            effects,
            lambda: options_of(effects, self._optimizer, group),
        )

    def noise_coherence(self, group: Group, effects: Effects, shape: Shape) -> float | None:
        """`noise_coherence` of a weight, a ratio of lengths of steps at the same rate."""
        return self._once(
            ("noise", shape),
            group,
            effects,
            lambda: noise_coherence(self._optimizer, group, effects, shape),
        )

    def sizes(self, group: Group, shape: Shape) -> Sizes | None:
        """How the size of steps goes; None where nobody has derived it."""

        def ask() -> Sizes | None:
            response = own_response(self.optimizer_class, group, Subject(shape))
            if response is None:
                return None
            return Sizes(response.normalized, response.energy_is_rough)

        return self._once(("sizes", shape), group, None, ask)

    def has_course(self, group: Group, shape: Shape) -> bool:
        """Whether norms can be followed step by step."""
        return self._once(
            ("course", shape),
            group,
            None,
            lambda: is_understood(self.optimizer_class, group, shape),
        )

    def asks_for_step(self, group: Group) -> bool:
        """Whether the answer to a gradient depends on the weight or on the number of the step."""
        row = row_of(self.optimizer_class, group)
        return row is None or row.response_of is not None

    def at_rate(
        self, group: Group, lr: float, effects: Effects, shape: Shape, ask: Callable[[], T]
    ) -> T:
        """What ``ask`` finds for weights of a group that have all of this in common; it depends on
        nothing else."""
        return self._once(("rate", lr, shape), group, effects, ask)

    def settings_of(self, group: Group) -> Settings | None:
        """`settings_of` a group that nobody changes during this row."""
        known = self._known_settings.get(id(group))
        # The group with its answer, so that its id is not given to another one.
        if known is None:
            known = self._known_settings[id(group)] = (group, settings_of(group))
        return known[1]

    def _once(
        self,
        question: tuple[Any, ...],
        group: Group,
        effects: Effects | None,
        ask: Callable[[], T],
    ) -> T:
        settings = self.settings_of(group)
        # The largest rate of a schedule, which some decays follow, rises in a warm-up without being
        # another effect.
        moves = effects is not None and effects.decaying is not None
        if settings is None or moves or not self._keeps_answers:
            return ask()
        key = (question, effects, settings)
        answers = self._answers
        if key not in answers:
            # All at once: which of them are of rates that are gone, only time would tell.
            if len(answers) >= MOST_ANSWERS:
                answers.clear()
            answers[key] = ask()
        found: T = answers[key]
        return found


Settings = tuple[tuple[str, Any], ...]
"""All that a param group sets but for its learning rate, to be compared with other steps'."""


def settings_of(group: Group) -> Settings | None:
    """The settings of a param group; None where one of them is no plain number, text or flag.

    Args:
        group: its numbers as floats, as `lightning_normdyn.optimizers.group_numbers` reads them.

    Example:
        >>> settings_of({"lr": 0.1, "betas": (0.9, 0.99)})
        (('betas', (0.9, 0.99)),)
    """
    settings = []
    for entry in group.items():
        key, value = entry
        if key in ("lr", "params"):
            continue
        entries = value if type(value) is tuple else (value,)
        for each in entries:
            # A tensor may be written to in place, and would still be found as the same.
            if type(each) not in _PLAIN:
                return None
        settings.append(entry)
    return tuple(settings)


__all__ = ["GroupTheory", "Sizes", "settings_of"]
