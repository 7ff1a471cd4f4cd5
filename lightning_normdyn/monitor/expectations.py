"""Where the course of each scale-invariant weight stands after its newest row, and how a checkpoint
holds it. Courses go on in `lightning_normdyn.monitor.expected_norms`.

Legend: ``w`` weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.engine.value_checks import (
    Check,
    flag,
    many,
    number,
    record,
    require,
    table,
    text,
    whole,
)
from lightning_normdyn.optimizers.rate_drop import Rate

from .by_weight import Doubles, Flags, Ints
from .gradient_sizes import FEWEST_ROWS, MOST_ROWS, Sizes


class Expectation(NamedTuple):
    """Where the course of one weight stands after the newest row's step. It never changes.

    Args:
        number: of that step.
        course: state of the course, of one vector.
        rate: the learning rate of that step, and how it has changed.
        start: norm at the first step, to which WeightRescaling may set the weight back.
        effects: what callbacks did to the weight in that step, as text.
        silent_until: number of the step from which on it is compared. A course that starts in the
            middle of a run does not know the optimizer's buffers.
        scales: gradient scales of the newest rows.
        energies: tan²θ ‖w‖²/lr² of the newest rows.
    """

    number: int
    course: Mapping[str, Any]
    rate: Rate
    start: float
    effects: str
    silent_until: int = 0
    scales: tuple[float, ...] = ()
    energies: tuple[float, ...] = ()


class Lot(NamedTuple):
    """Weights that are followed together: all but the numbers in arrays is the same of them.

    Args:
        weights: their places among those of the table.
        number: of the newest row's step.
        course: state of the course over all of them.
        rate: as of an `Expectation`.
        effects: as there.
    """

    weights: Ints
    number: int
    course: Mapping[str, Any]
    rate: Rate
    effects: str

    def at(self, places: Ints) -> Lot:
        """Of the lot's weights those at ``places``."""
        if len(places) == len(self.weights):
            return self
        course = {}
        for key, value in self.course.items():
            course[key] = value[places] if isinstance(value, np.ndarray) else value
        return self._replace(weights=self.weights[places], course=course)

    def without(self, weights: Flags) -> Lot:
        """Without some of the weights of the table, ``(w,)``."""
        (left,) = np.nonzero(~weights[self.weights])
        return self.at(left)


@dataclass(frozen=True, eq=False)
class ExpectationTable:
    """`Expectation` of many weights. It never changes; `follow` gives the next one.

    Args:
        names: of the weights.
        lots: no weight stands in two of them.
        starts: ``(w,)``, as of an `Expectation`, as are the others.
        silent_until: ``(w,)``.
        scales: of each weight.
        energies: of each weight.
    """

    names: tuple[str, ...]
    lots: tuple[Lot, ...]
    starts: Doubles
    silent_until: Ints
    scales: Sizes
    energies: Sizes

    @cached_property
    def known(self) -> Flags:
        """``(w,)``, of which weights there is an expectation."""
        known = np.zeros(len(self.names), dtype=np.bool_)
        for lot in self.lots:
            known[lot.weights] = True
        return known

    @classmethod
    def from_values(
        cls, names: tuple[str, ...], values: Sequence[Expectation | None]
    ) -> ExpectationTable:
        """As `of` gave them; None of a weight that is not followed."""
        together: dict[Any, list[int]] = {}
        for place, value in enumerate(values):
            if value is not None:
                shared = [v for v in value.course.values() if not isinstance(v, list)]
                alike = (value.number, value.rate, value.effects, *shared)
                together.setdefault(alike, []).append(place)
        lots = []
        for places in together.values():
            of_lot = [value for value in (values[place] for place in places) if value is not None]
            lots.append(_lot_of(np.array(places, dtype=np.int64), of_lot))
        unknown = Expectation(-1, {}, Rate(nan), nan, "")
        each = [value or unknown for value in values]
        return cls(
            names,
            tuple(lots),
            np.array([value.start for value in each], dtype=np.float64),
            np.array([value.silent_until for value in each], dtype=np.int64),
            Sizes.from_values([value.scales for value in each], MOST_ROWS),
            Sizes.from_values([value.energies for value in each], FEWEST_ROWS),
        )

    def of(self, place: int) -> Expectation:
        """Of one weight."""
        for lot in self.lots:
            (found,) = np.nonzero(lot.weights == place)
            if len(found):
                break
        course = {}
        for key, value in lot.course.items():
            # A list of one: a course is one of vectors.
            course[key] = value[found].tolist() if isinstance(value, np.ndarray) else value
        return Expectation(
            lot.number,
            course,
            lot.rate,
            float(self.starts[place]),
            lot.effects,
            int(self.silent_until[place]),
            self.scales.of(place),
            self.energies.of(place),
        )


def _lot_of(weights: Ints, values: Sequence[Expectation]) -> Lot:
    """Weights that have all in common that is not in lists."""
    first = values[0]
    course: dict[str, Any] = {}
    for key, value in first.course.items():
        course[key] = value
        if isinstance(value, list):
            of_all = [each.course[key][0] for each in values]
            course[key] = np.array(of_all, dtype=np.float64)
    return Lot(weights, first.number, course, first.rate, first.effects)


# -- in checkpoints


def state_of(expectations: Mapping[str, Expectation]) -> dict[str, Any]:
    """Expectations by weight as plain numbers and lists."""
    state = {}
    for name, known in expectations.items():
        state[name] = {
            "number": known.number,
            "course": dict(known.course),
            "rate": [known.rate.lr, known.rate.fall],
            "start": known.start,
            "effects": known.effects,
            "silent_until": known.silent_until,
            "scales": list(known.scales),
            "energies": list(known.energies),
        }
    return state


def expectations_from(state: Mapping[str, Any]) -> dict[str, Expectation]:
    """What `state_of` gave."""
    expectations = {}
    for name, known in state.items():
        lr, fall = known["rate"]
        expectations[str(name)] = Expectation(
            int(known["number"]),
            dict(known["course"]),
            Rate(float(lr), float(fall)),
            float(known["start"]),
            str(known["effects"]),
            int(known["silent_until"]),
            tuple(map(float, known["scales"])),
            tuple(map(float, known["energies"])),
        )
    return expectations


def _several(count: int) -> Check:
    """A list of so many numbers; NaN stands for what nobody knows."""
    each = many(number(finite=False))

    def check(value: Any, where: str) -> None:
        each(value, where)
        require(len(value) == count, f"{where} has {len(value)} numbers, where {count} belong")

    return check


_COURSE = record(
    {
        # Of one weight, so of one vector.
        **dict.fromkeys(("ww", "wm", "mm", "moment", "angle", "scale"), _several(1)),
        "steps": whole(),
        "carried": number(finite=False),
        "largest_rate": number(finite=False),
        "moment_is_new": flag,
        "in_real_units": flag,
        "rough": flag,
    },
    closed=True,
)
STATE: Check = table(
    text(),
    record(
        {
            "number": whole(),
            "course": _COURSE,
            "rate": _several(2),
            "start": number(0.0),
            "effects": text(),
            "silent_until": whole(),
            "scales": many(number(0.0)),
            "energies": many(number(0.0)),
        },
        closed=True,
    ),
)
"""What `state_of` may look like in a checkpoint."""


__all__ = ["Expectation", "ExpectationTable", "Lot", "expectations_from", "state_of"]
