"""What callbacks do to a weight, combined: anything that nobody has derived means "no
prediction"."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from models import fit, make
from walk import SHAPE, Walk, batches, noise, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NotSupportedError,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.callback import NormDynCallback
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
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.optimizers.step import Phase

SHRINK = Shrink(0.1, "norm", replaces_decay=True)
PROJECTION = Projection("always", "replace", 0.1)
RESCALING = Rescaling(5, 1.0, replaces_decay=True, window="now")


@dataclass(frozen=True)
class Turn(Effect):
    """An effect of somebody else."""

    angle: float = 0.01


@dataclass(frozen=True)
class StrongerShrink(Shrink):
    """A subclass of a known effect means something else than its base."""


@pytest.mark.parametrize(
    "order", list(permutations([SHRINK, PROJECTION, RESCALING, NoEffect(), LengthJumps()]))[::17]
)
def test_effects_of_different_kinds_stand_side_by_side_in_any_order(order: Any) -> None:
    assert combine(order) == Effects(shrink=SHRINK, projection=PROJECTION, rescaling=RESCALING)


def test_who_only_looks_or_jumps_now_and_then_leaves_the_optimizer_alone() -> None:
    assert combine([NoEffect(), LengthJumps()]).none
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


# ---- Rules of somebody else, in a fit ----


class HalfStep(Worker[Any]):
    """Every step gets half its length."""

    @during(Phase.MEASURE)
    def look(self, step: Any) -> None:
        step.bracket.request_snapshot(self.plan.vectors.storages())

    @during(Phase.PROJECT)
    def halve(self, step: Any) -> None:
        vectors = self.plan.vectors
        half = torch.full((vectors.n,), 0.5, dtype=vectors.sum_dtype)
        before = vectors.snapshots(step.bracket)
        vectors.scale_(half)
        vectors.add_scaled_(half, before)


class FixedStep(NormDynCallback):
    """A rule that says nothing about its effect."""

    worker = HalfStep


class ReadsAllMatrices(FixedStep):
    """``writes = False`` only says which weights "auto" means; its worker still changes them."""

    writes = False


class DictWorker(HalfStep):
    def effect(self, target: Any) -> Any:
        return {"alpha": 0.1}


class SaysADict(FixedStep):
    worker = DictWorker


class TurnWorker(HalfStep):
    def effect(self, target: Any) -> Effect:
        return Turn()


class Turning(FixedStep):
    worker = TurnWorker


class OtherShrinkWorker(AdaptiveWeightShrink.worker):  # type: ignore[name-defined,misc]
    """Shrinks otherwise, and inherits the effect of its base."""

    def shrink(self, step: Any) -> None:
        vectors = self.plan.vectors
        vectors.scale_(torch.full((vectors.n,), 0.99, dtype=vectors.sum_dtype))


class OtherShrink(AdaptiveWeightShrink):
    worker = OtherShrinkWorker


class FurtherPhase(WeightRescaling.worker):  # type: ignore[name-defined,misc]
    @during(Phase.SHRINK)
    def act(self, step: Any) -> None:
        pass


class OtherPhases(WeightRescaling):
    worker = FurtherPhase


class LookingWorker(Worker[Any]):
    @during(Phase.MEASURE)
    def look(self, step: Any) -> None:
        pass


class Looks(NormDynCallback):
    worker = LookingWorker
    writes = False


class RenamedWorker(AdaptiveWeightShrink.worker):  # type: ignore[name-defined,misc]
    def treatments(self) -> list[str]:
        return ["shrunk" for _ in self.plan.targets]


class Renamed(AdaptiveWeightShrink):
    """Changes nothing but its name and what it says about itself."""

    worker = RenamedWorker

    def __init__(self) -> None:
        super().__init__(0.1)


def predicted(*callbacks: Any, granularity: Any = "auto") -> bool:
    """Whether a scale-invariant weight has a prediction beside these callbacks."""
    monitor = NormDynamicsMonitor(1, tables=False, granularity=granularity)
    module = Walk(start(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    fit(module, [monitor, *callbacks], batches(noise(3, SHAPE)), max_epochs=1)
    measured = set(monitor.history.keys())
    assert "angular_update/weight" in measured
    return any("equilibrium" in key for key in measured)


@pytest.mark.parametrize(
    "callback",
    [
        FixedStep,
        ReadsAllMatrices,
        SaysADict,
        Turning,
        lambda: OtherShrink(0.1),
        lambda: OtherPhases(2),
    ],
    ids=["says nothing", "writes=False", "a dict", "own effect", "own act", "own phases"],
)
def test_a_rule_of_somebody_else_has_no_prediction(callback: Any) -> None:
    assert not predicted(callback())


@pytest.mark.parametrize("callback", [Looks, Renamed, LRDropRescaling, RadialProjection])
def test_a_known_rule_keeps_its_prediction(callback: Any) -> None:
    assert predicted(callback())


@pytest.mark.parametrize(
    "rule",
    [
        lambda g: AdaptiveWeightShrink(0.1, granularity=g),
        lambda g: WeightRescaling(2, granularity=g),
    ],
)
def test_a_rule_on_other_vectors_than_the_monitors_has_no_prediction(rule: Any) -> None:
    """The length of a layer is not that of its filters, so alpha or a fixed length mean something
    else for them."""
    assert predicted(rule("auto"))
    assert not predicted(rule("layer"))
    assert predicted(rule("layer"), granularity="layer")


# ---- Who comes first ----


def shrinks_by_a_square(name: str, phase: Phase, rank: int = 0) -> Any:
    """A rule that does not commute with a change of scale, under any name."""

    @during(phase)
    def act(self: Any, step: Any) -> None:
        norms = self.plan.vectors.norms()
        self.plan.vectors.scale_(1 / (1 + 0.1 * norms**2))

    worker = type(f"{name}Worker", (Worker,), {"act": act})
    return type(name, (NormDynCallback,), {"worker": worker, "rank": rank})()


def ends(*callbacks: Any) -> torch.Tensor:
    module = Walk(start(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    fit(module, list(callbacks), batches(noise(5, SHAPE)), max_epochs=1)
    return module.weight.detach().clone()


PAIRS = [
    (Phase.RESCALE, lambda: WeightRescaling(1, target_norm=2.0)),
    (Phase.SHRINK, lambda: AdaptiveWeightShrink(0.2)),
    (Phase.PROJECT, RadialProjection),
]


@pytest.mark.parametrize(("phase", "known"), PAIRS)
@pytest.mark.parametrize("name", ["Ball", "Sphere"])
@pytest.mark.parametrize("order", [1, -1])
def test_two_rules_in_one_phase_are_refused_by_name_where_nobody_ranks_them(
    phase: Phase, known: Any, name: str, order: int
) -> None:
    callbacks = [known(), shrinks_by_a_square(name, phase)][::order]
    with pytest.raises(
        NotSupportedError, match=rf"both change `weight` in phase {phase.name}.*`rank`"
    ) as refusal:
        ends(*callbacks)
    assert name in str(refusal.value)
    assert type(known()).__name__ in str(refusal.value)


@pytest.mark.parametrize(("phase", "known"), PAIRS[:2])
def test_ranked_rules_end_at_the_same_bits_whatever_their_names_and_order(
    phase: Phase, known: Any
) -> None:
    found = {}
    for rank in (-1, 1):
        runs = [
            ends(*[known(), shrinks_by_a_square(name, phase, rank)][::order])
            for name in ("Ball", "Sphere", "Zoo")
            for order in (1, -1)
        ]
        assert all(torch.equal(run, runs[0]) for run in runs)
        found[rank] = runs[0]
    assert not torch.allclose(found[-1], found[1]), (
        "the order makes a difference, so the test can fail"
    )


def test_rules_of_different_phases_or_on_different_weights_need_no_rank() -> None:
    ends(AdaptiveWeightShrink(0.2), shrinks_by_a_square("Ball", Phase.RESCALE))
    free = shrinks_by_a_square("Ball", Phase.SHRINK)
    free.params = ["!net.0.weight"]
    module = make()
    fit(module, [AdaptiveWeightShrink(0.2, params="net.0.weight"), free], max_steps=2)
    assert [t.name for t in free.plans[0].targets] == ["net.3.weight"]


def test_a_rule_that_acts_where_others_look_is_one_that_acts() -> None:
    with pytest.raises(NotSupportedError, match="both change `weight` in phase MEASURE_STEP"):
        ends(
            shrinks_by_a_square("Ball", Phase.MEASURE_STEP),
            shrinks_by_a_square("Sphere", Phase.MEASURE_STEP),
        )


def test_who_looks_comes_before_who_acts_in_one_phase() -> None:
    """The angle of a step must not depend on the name of a rule that acts in the same phase as the
    monitor looks."""
    angles = []
    for name in ("Ball", "Sphere"):
        monitor = NormDynamicsMonitor(1, tables=False)
        ends(monitor, shrinks_by_a_square(name, Phase.MEASURE_STEP))
        angles.append(monitor.history.column("radial_update/weight")[1].tolist())
    assert angles[0] == angles[1]
