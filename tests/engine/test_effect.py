"""What callbacks do to a weight, combined: anything that nobody has derived means "no
prediction"."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest

from lightning_normdyn.engine.effect import (
    Effect,
    Effects,
    LengthJumps,
    NoEffect,
    Projection,
    Rescaling,
    ScaledSteps,
    Shrink,
    UnknownEffect,
    combine,
)

SHRINK = Shrink(0.1, "norm", replaces_decay=True)
PROJECTION = Projection("always", "replace", 0.1)
RESCALING = Rescaling(5, 1.0, replaces_decay=True, window="now")

JUMPS = LengthJumps(1.5, 0.25)


@dataclass(frozen=True)
class Turn(Effect):
    """An effect of somebody else."""

    angle: float = 0.01


@dataclass(frozen=True)
class StrongerShrink(Shrink):
    """A subclass of a known effect means something else than its base."""


@pytest.mark.parametrize(
    "order",
    list(permutations([SHRINK, PROJECTION, RESCALING, NoEffect(), JUMPS]))[::17],
)
def test_effects_of_different_kinds_stand_side_by_side_in_any_order(order: Any) -> None:
    assert combine(order) == Effects(
        shrink=SHRINK, projection=PROJECTION, rescaling=RESCALING, jumps=JUMPS
    )


def test_who_only_looks_or_jumps_now_and_then_leaves_the_optimizer_alone() -> None:
    assert combine([NoEffect(), JUMPS]).none
    assert not combine([ScaledSteps()]).none
    assert not combine([UnknownEffect("MyRule")]).none


@pytest.mark.parametrize(
    ("effects", "reason"),
    [
        ([UnknownEffect("MyRule")], "MyRule"),
        ([Turn()], "Turn"),
        ([Effect()], "Effect"),
        ([StrongerShrink(0.1, "norm", True)], "StrongerShrink"),
        ([SHRINK, SHRINK], "2 times Shrink"),
        ([PROJECTION, PROJECTION], "2 times Projection"),
        ([RESCALING, RESCALING], "2 times Rescaling"),
        ([ScaledSteps(), ScaledSteps()], "2 times ScaledSteps"),
    ],
)
def test_what_nobody_derived_is_said(effects: list[Effect], reason: str) -> None:
    assert combine([*effects, NoEffect()]).underived == (reason,)
