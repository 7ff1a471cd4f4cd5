"""What a worker may say of itself, and what is made of a rule whose worker says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import fit, make
from walk import SHAPE, Walk, batches, noise, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.effect import Effect, NoEffect, UnknownEffect
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.decay import DecayOwner
from lightning_normdyn.optimizers.step import Phase


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


@dataclass(frozen=True)
class Turn(Effect):
    """An effect of somebody else."""


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


# ---- Which methods act ----


def test_a_subclass_acts_in_the_phases_of_its_base_and_in_its_own() -> None:
    assert HalfStep.phases == {Phase.MEASURE: "look", Phase.PROJECT: "halve"}
    assert FurtherPhase.phases == {Phase.RESCALE: "rescale", Phase.SHRINK: "act"}
    assert OtherShrinkWorker.phases == {Phase.SHRINK: "shrink"}  # an override needs no mark
    assert Worker.phases == {}


@pytest.mark.parametrize(
    ("worker", "says"),
    [
        (HalfStep, UnknownEffect("FixedStep")),
        (TurnWorker, Turn()),
        (DictWorker, UnknownEffect("FixedStep")),
        (LookingWorker, UnknownEffect("FixedStep")),
        (OtherShrinkWorker, UnknownEffect("FixedStep")),
        (FurtherPhase, UnknownEffect("FixedStep")),
    ],
)
def test_an_effect_is_believed_where_the_class_that_states_it_is_the_one_that_acts(
    worker: Any, says: Effect
) -> None:
    made = worker.__new__(worker)
    made.rule = FixedStep()
    assert made.stated_effect(None) == says


def test_who_only_looks_does_nothing() -> None:
    made = LookingWorker.__new__(LookingWorker)
    made.rule = Looks()
    assert made.stated_effect(None) == NoEffect()  # type: ignore[arg-type]


def test_a_claim_of_decay_ends_with_the_plan() -> None:
    class Pulls(Worker[Any]):
        def __init__(self, part: Any, plan: Any) -> None:
            super().__init__(part, plan)
            self.claim_decay(DecayOwner.SHRINK)

        @during(Phase.SHRINK)
        def pull(self, step: Any) -> None:
            owners.append(step.bracket.decay_owner(self.plan.targets[0].weight))

    owners: list[Any] = []
    callback = type("Pulling", (NormDynCallback,), {"worker": Pulls})()
    module = make()
    trainer = fit(module, [callback], max_steps=2)
    assert owners == [DecayOwner.SHRINK] * 2
    assert StepBracket.of(trainer.optimizers[0]).decay_owners() == {}


class OwnTurnsWorker(WeightRescaling.worker):
    """Acts at other steps than its base says."""

    @during(Phase.RESCALE)
    def rescale(self, step: Any) -> None:
        self.part.seen.append(self.plan.vectors.has_gradient(step))


class OwnTurns(WeightRescaling):
    worker = OwnTurnsWorker


def test_what_a_base_says_of_gradients_is_not_believed_of_a_class_that_acts_otherwise() -> None:
    rule, module = OwnTurns(10**9), make()

    class Noting(rule.part):  # type: ignore[name-defined, misc]
        seen: ClassVar[list[Any]] = []

    rule.part = Noting
    fit(module, [rule], max_steps=2)
    assert Noting.seen == [(True, True)] * 2
