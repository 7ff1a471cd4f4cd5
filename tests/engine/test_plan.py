"""The targets of one optimizer as vectors, and what rules ask about them in a step."""

from __future__ import annotations

from math import inf, isnan, nan
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normdyn.engine.plan import Plan, Target
from lightning_normdyn.engine.vector_state import VectorState
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.verdict import Verdict
from lightning_normdyn.optimizers.bracket import StepBracket
from lightning_normdyn.optimizers.decay import DecayOwner
from lightning_normdyn.optimizers.group_numbers import group_number
from lightning_normdyn.optimizers.step import Phase, Step


def target(name: str, rows: int, *, by_request: bool = False) -> Target:
    weight = nn.Parameter(torch.ones(rows, 2, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    shape = (rows, 2)
    verdict = Verdict.unknown(name, shape)
    return Target(name, weight, Partition.filters(shape), verdict, by_request)


def two_groups(**options: Any) -> tuple[Plan, torch.optim.Optimizer]:
    """Two weights, of 2 and 3 rows, in a group each, with a bias that is no target."""
    a, b = target("a", 2), target("b", 3)
    bias = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(
        [{"params": [a.weight, bias], "lr": 0.1}, {"params": [b.weight], "lr": 0.2}], lr=1.0
    )
    return Plan(0, StepBracket.of(optimizer), [a, b], **options), optimizer


def step_of(plan: Plan, number: int = 1, **arguments: Any) -> Step:
    stepped = [t.weight for t in plan.targets if t.weight.grad is not None]
    return Step(plan.bracket, number, stepped=stepped, **arguments)


def test_acting_is_noted_with_what_had_to_be_left_alone():
    plan, _ = two_groups()
    values = torch.tensor([1.0, inf, 1.0, nan, 1.0], dtype=torch.float64)
    good = plan.note_acting(step_of(plan), values)
    assert good.tolist() == [True, False, True, False, True]
    assert plan.bad.tolist() == [False, True, False, True, False]
    plan.targets[0].weight.grad = plan.targets[1].weight.grad = None
    plan.note_acting(step_of(plan, 2), torch.ones_like(values))
    assert plan.bad.tolist() == [False, True, False, True, False]
    assert (plan.tally.due, plan.tally.acted) == (2, 1)


def test_groups_and_their_vectors():
    plan, optimizer = two_groups()
    assert [where for _, where in plan.groups] == [slice(0, 2), slice(2, 5)]
    assert [g is o for (g, _), o in zip(plan.groups, optimizer.param_groups, strict=True)]
    assert plan.group_of(plan.targets[1]) is optimizer.param_groups[1]
    assert plan.claimed.keys() == {t.weight for t in plan.targets}
    assert plan.invariant == [True, True]
    assert Plan(0, plan.bracket, [target("c", 1, by_request=True)]).invariant == [False]


def test_rates_are_read_at_every_step():
    plan, optimizer = two_groups()
    assert plan.rates().tolist() == [0.1, 0.1, 0.2, 0.2, 0.2]
    assert plan.rates() is plan.rates()  # while the numbers stay
    optimizer.param_groups[1]["lr"] = 0.4
    assert plan.rates().tolist() == [0.1, 0.1, 0.4, 0.4, 0.4]
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.5, dtype=torch.float64)
    assert plan.rates()[0] == 0.5
    rate.fill_(0.25)  # a tensor may be written to
    assert plan.rates()[0] == 0.25


def test_a_rate_that_a_step_moves_on_is_read_once_a_step():
    weight = target("a", 2)
    optimizer = torch.optim.ASGD([weight.weight], lr=0.1, lambd=0.5)
    plan = Plan(0, StepBracket.of(optimizer), [weight])
    seen = []
    plan.on_close(plan.bracket.add(Phase.MEASURE, lambda step: seen.append(plan.rates())))
    plan.on_close(plan.bracket.add(Phase.RESCALE, lambda step: seen.append(plan.rates())))
    for _ in range(2):
        optimizer.step()
    first, after_first, second, _ = seen
    assert torch.equal(first, after_first)
    assert not torch.equal(first, second)


def test_which_vectors_have_a_gradient():
    plan, _ = two_groups()
    assert plan.active(step_of(plan)) is None
    plan.targets[0].weight.grad = None
    step = step_of(plan)
    assert plan.active(step).tolist() == [False, False, True, True, True]
    assert plan.active(step) is plan.active(step)
    assert plan.treated(step).tolist() == [False, False, True, True, True]
    skipped = step_of(plan, skipped=torch.ones(1))
    assert not plan.treated(skipped).any()


def test_a_guard_leaves_alone_what_cannot_be_treated_and_remembers_it():
    plan, _ = two_groups()
    values = torch.tensor([2.0, nan, 2.0, inf, 2.0])
    norms = torch.tensor([0.0, 1.0, 1.0, 1.0, nan])
    assert plan.guard(values, 1.0, step_of(plan), norms).tolist() == [1, 1, 2, 1, 1]
    assert plan.bad.tolist() == [True, True, False, True, True]
    plan.targets[1].weight.grad = None
    assert plan.guard(torch.full((5,), 3.0), 1.0, step_of(plan)).tolist() == [3, 3, 1, 1, 1]
    skipped = step_of(plan, skipped=torch.ones(1))
    assert plan.guard(torch.full((5,), 3.0), 1.0, skipped).tolist() == [1] * 5


def test_counters_state_and_tally_go_on_in_the_next_plan():
    memory = VectorState()
    plan, optimizer = two_groups(memory=memory, steps_before=4)
    assert plan.number(step_of(plan, 3)) == 7
    plan.counter("clamped")
    step = step_of(plan)
    plan.count("clamped", torch.tensor([1.0, 0, 0, 0, 1], dtype=torch.float64), step)
    assert not plan.counters["clamped"].any()  # the update may still not come
    step.mark_updated()
    owed = plan.state("owed", 1.0, torch.float32)
    owed *= 0.5
    plan.mark("rescale")
    plan.guard(torch.full((5,), nan), 1.0, step)
    joined = target("c", 1)
    optimizer.add_param_group({"params": [joined.weight]})
    later = Plan(0, plan.bracket, [plan.targets[1], joined], memory=memory, earlier=plan)
    assert later.counter("clamped").tolist() == [0, 0, 1, 0]
    assert later.state("owed", 1.0, torch.float32).tolist() == [0.5, 0.5, 0.5, 1]
    assert later.bad.tolist() == [True, True, True, False]
    assert later.events == {"rescale": 1}
    assert later.tally is plan.tally
    assert later.before.keys() == {"a", "b"}


def test_who_owns_the_decay():
    plan, _ = two_groups()
    weight = plan.targets[1].weight
    plan.on_close(plan.bracket.add(Phase.SHRINK, lambda step: None))
    plan.on_close(plan.bracket.claim_decay(plan, DecayOwner.SHRINK, {weight}))
    step = step_of(plan)
    assert plan.owns_decay(step, DecayOwner.SHRINK).tolist() == [0, 0, 1, 1, 1]
    assert not plan.owns_decay(step, DecayOwner.PROJECTION).any()
    assert plan.owns_none(step, DecayOwner.PROJECTION)
    assert not plan.owns_none(step, DecayOwner.SHRINK)
    assert not plan.owns_all(step, DecayOwner.SHRINK)
    plan.close()
    assert plan.bracket.decay_owners() == {}
    plan.close()


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
def test_numbers_of_the_groups(key):
    plan, optimizer = two_groups()
    optimizer.param_groups[1][key] = 0.5
    numbers = [group_number(group, key) for group, _ in plan.groups]
    assert plan.spread_groups(key, numbers).tolist() == [0, 0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("by_request", [True, False])
def test_what_a_person_asked_for_is_not_taken_for_scale_invariant(by_request):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    verdict = Verdict.unknown("w", (2, 2))
    target = Target("w", weight, Partition.filters((2, 2)), verdict, by_request)
    assert target.scale_invariant is not by_request
    assert not target.weight_standardized


def test_numbers_of_another_plan_are_taken_for_the_same_vectors_and_for_whole_weights():
    """Of the same rows, of the whole weight, of other rows, and of a weight that is not there."""
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    bracket = StepBracket.of(optimizer)

    def plan(partitions):
        targets = []
        for i, partition in enumerate(partitions):
            if partition is not None:
                verdict = Verdict.unknown(f"w{i}", (4, 3))
                targets.append(Target(f"w{i}", weights[i], partition, verdict, by_request=False))
        return Plan(0, bracket, targets)

    rows, whole = Partition.filters((4, 3)), Partition.layer((4, 3))
    ours = plan([rows, rows, whole, rows])
    theirs = plan([rows, whole, rows, None])
    values = torch.arange(1.0, 10.0, dtype=torch.float64)
    taken = ours.taken_from(theirs, values).tolist()
    assert taken[:8] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert isnan(taken[8])
    assert taken[9:] == [0, 0, 0, 0]
