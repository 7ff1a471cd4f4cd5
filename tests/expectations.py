"""Expectations of single weights, through the table that holds those of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.monitor.expectations import Expectation, ExpectationTable
from lightning_normdyn.monitor.expected_norms import Interval, Kind, WeightSteps, follow


class WeightStep(NamedTuple):
    """One measured step of one weight."""

    name: str
    group: int
    effects: Effects
    dim: int
    shape: tuple[int, int] | None
    norm: float
    angle: float
    lr: float
    gradient_scale: float
    is_warm: bool = False


class Followed(NamedTuple):
    """What is expected of a weight; None of angle and norm while its course is silent."""

    expectation: Expectation
    angle: float | None
    norm: float | None


def follow_each(
    interval: Interval, steps: Sequence[WeightStep], known: Mapping[str, Expectation]
) -> dict[str, Followed]:
    """By weight; one whose course is not understood has no entry."""
    names = tuple(step.name for step in steps)
    alike: dict[tuple, list[int]] = {}
    for place, step in enumerate(steps):
        alike.setdefault((step.group, step.effects, step.shape), []).append(place)

    def column(name):
        return np.array([getattr(step, name) for step in steps], dtype=np.float64)

    of_all = WeightSteps(
        kinds=[Kind(*key, np.array(places)) for key, places in alike.items()],
        dims=column("dim"),
        norms=column("norm"),
        angles=column("angle"),
        rates=column("lr"),
        gradient_scales=column("gradient_scale"),
        are_warm=np.array([step.is_warm for step in steps]),
        followed=np.ones(len(steps), dtype=np.bool_),
    )
    before = ExpectationTable.from_values(names, [known.get(name) for name in names])
    table, expected = follow(interval, of_all, before)
    followed = {}
    for place in expected.order.tolist():
        shown = expected.shown[place]
        followed[names[place]] = Followed(
            table.of(place),
            float(expected.angles[place]) if shown else None,
            float(expected.norms[place]) if shown else None,
        )
    return followed
