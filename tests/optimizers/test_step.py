"""The phases of a step, and what is noted for it."""

from __future__ import annotations

import pytest
import torch
from models import backward, weight_and_sgd

from lightning_normdyn import (
    Partition,
    Phase,
    StepBracket,
    WeightVectors,
)
from lightning_normdyn.optimizers.scaling import Scaling
from lightning_normdyn.optimizers.step import HostCopy, Ids, Step


def test_phases_then_names_decide_the_order_not_the_registration():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    for phase in sorted(Phase, reverse=True):
        for name in "ba":
            bracket.add(phase, lambda step, event=(phase, name): seen.append(event), order=name)
    backward(weight)
    optimizer.step()
    assert seen == [(phase, name) for phase in sorted(Phase) for name in "ab"]


def test_the_phases_of_architecture():
    assert list(Phase) == sorted(Phase)
    names = [
        "RESOLVE",
        "MEASURE",
        "LR_DROP",
        "SHRINK",
        "SNAPSHOT",
        "LOOK_AGAIN",
        "PROJECT",
        "MEASURE_STEP",
        "RESCALE",
    ]
    assert [p.name for p in Phase] == names


def test_ids_are_worked_out_anew_where_the_weights_are_others():
    first, second = torch.ones(1), torch.ones(1)  # equal, and not the same
    ids = Ids()
    known = ids.of([first])
    assert known == {id(first)}
    assert ids.of([first]) is known
    assert ids.of([second]) == {id(second)}
    assert ids.of([second, first]) == {id(first), id(second)}
    assert ids.of([]) == frozenset()


class FreesGradients(torch.optim.SGD):
    """Leaves no gradient behind, as optimizers do that give memory back early."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


@pytest.mark.parametrize("reads", [None, lambda step: True], ids=["may read", "reads"])
def test_who_asks_after_the_update_hears_of_the_gradients_before_it(reads):
    first, second = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer, seen = FreesGradients([first, second], lr=0.1), []
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.RESCALE, lambda step: seen.append(step.with_gradient), reads_gradients=reads)
    backward(first)
    optimizer.step()
    assert first.grad is None
    assert seen == [{id(first)}]


def test_who_said_that_it_would_not_ask_is_told_no_wrong_answer():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = FreesGradients([weight], lr=0.1)
    bracket = StepBracket.of(optimizer)
    handler = lambda step: step.with_gradient  # noqa: E731
    bracket.add(Phase.RESCALE, handler, reads_gradients=lambda step: False)
    backward(weight)
    with pytest.raises(RuntimeError, match="reads_gradients"):
        optimizer.step()


def a_step(**options):
    return Step(StepBracket.of(weight_and_sgd()[1]), 1, **options)


def test_a_note_waits_until_the_update_is_known_to_have_happened():
    step, said = a_step(), []
    step.when_updated(lambda: said.append("updated"))
    step.when_done(lambda: said.append("done"))
    assert said == []
    step.mark_updated()
    assert said == ["updated"]
    step.mark_happened()
    assert said == ["updated", "done"]
    step.when_done(lambda: said.append("at once"))
    step.when_updated(lambda: said.append("counted at once"))
    step.mark_updated()
    step.mark_happened()
    assert said == ["updated", "done", "at once", "counted at once"]


@pytest.mark.parametrize("happened", [False, True])
def test_only_a_step_that_did_not_happen_is_taken_back(happened):
    weight, optimizer = weight_and_sgd()
    step, undone, before = Step(StepBracket.of(optimizer), 1), [], weight.detach().clone()
    vectors = WeightVectors([weight], [Partition.filters((2, 3))])
    step.scale(Scaling(vectors, torch.tensor([0.5, 0.25])))
    step.undo_with(lambda: undone.append("first"))
    step.undo_with(lambda: undone.append("second"))
    step.seal()
    if happened:
        step.mark_happened()
    step.take_back(gradients_count=False)
    assert torch.equal(weight.detach(), before) is not happened
    assert undone == ([] if happened else ["second", "first"])


@pytest.mark.parametrize(("found_inf", "expected"), [(None, 0.9), (0.0, 0.9), (1.0, 1.0)])
def test_a_factor_is_1_where_the_update_is_skipped_on_the_device(found_inf, expected):
    skipped = None if found_inf is None else torch.tensor(found_inf)
    factor = a_step(skipped=skipped).unless_skipped(torch.full((3,), 0.9), 1.0)
    assert factor.tolist() == pytest.approx([expected] * 3)


def test_a_copy_does_not_follow_the_tensor():
    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy(tensor)
    tensor.mul_(10)
    assert copy.get().tolist() == [1.0, 2.0]
    assert not copy.arrives_later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_from_a_gpu_arrives_later_and_does_not_follow_the_tensor():
    tensor = torch.ones(1000, device="cuda")
    copy = HostCopy(tensor)
    tensor.mul_(10)
    assert copy.arrives_later
    assert copy.get().device.type == "cpu"
    assert float(copy.get().sum()) == 1000
