"""When the graph is read again: at once where it may help, and ever more rarely where it did
not."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from lightning_normdyn import StepBracket
from lightning_normdyn.engine.looks import FIRST_LOOKS, Looks
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.optimizers.step import Step


def layer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    net = nn.Linear(3, 2)
    net.weight.grad = torch.ones(2, 3)
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def step_of(optimizer: torch.optim.Optimizer, number: int) -> Step:
    return Step(StepBracket.of(optimizer), number)


def batches(looks: Looks, count: int, **arguments: bool) -> list[int]:
    """The batches that are worth a look."""
    wanted = {"wanted": False, **arguments}
    return [batch for batch in range(count) if looks.begin_batch(**wanted)]


def test_nothing_calls_for_a_look():
    assert not batches(Looks(), 20)


def test_the_first_batches_and_then_exponentially_fewer():
    looks = Looks()
    seen = batches(looks, 200, wanted=True)
    assert seen[:FIRST_LOOKS] == list(range(FIRST_LOOKS))
    later = seen[FIRST_LOOKS - 1 :]
    assert all((b + 1) >= 1.5 * (a + 1) - 1 for a, b in pairwise(later))
    assert looks.taken == len(seen) < 20


def test_a_batch_without_a_loss_calls_for_the_next():
    looks = Looks()
    looks.seen(had_loss=False)
    assert batches(looks, 1) == [0]
    looks.seen(had_loss=True)
    assert not batches(looks, 5)


def test_new_weights_are_looked_at_however_often_it_was_looked_before():
    looks = Looks()
    batches(looks, 100, wanted=True)
    assert not looks.begin_batch(wanted=True)
    looks.ask_at_once()
    assert looks.begin_batch(wanted=False)


def test_a_weight_of_unknown_kind_is_missed_once_it_has_a_gradient():
    net, optimizer = layer()
    looks = Looks()
    looks.decided(0, [net.weight], {})
    assert not batches(looks, 1)
    looks.note_gradients(0, step_of(optimizer, 1), 0)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {})
    assert not batches(looks, 1)


def test_unread_rows_with_a_gradient_are_missed_until_fewer_are_unread():
    net, optimizer = layer()
    rows = Partition((0,), torch.tensor([-1, 0]), "filter")
    looks = Looks()
    looks.decided(0, [], {net.weight: rows})
    net.weight.grad[1] = 0.0
    looks.note_gradients(0, step_of(optimizer, 1), 0)
    assert not batches(looks, 1)
    net.weight.grad[1] = 1.0
    looks.note_gradients(0, step_of(optimizer, 2), 0)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {net.weight: rows})
    assert batches(looks, 1) == [0]  # the look has found nothing
    looks.decided(0, [], {})
    assert not batches(looks, 1)


def test_gradients_of_unread_rows_are_copied_to_the_host_at_logging_steps_only():
    net, optimizer = layer()
    looks = Looks()
    looks.decided(0, [], {net.weight: Partition((0,), torch.tensor([-1, 0]), "filter")})
    looks.note_gradients(0, step_of(optimizer, 100), 3)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {})
    looks.decided(0, [], {net.weight: Partition((0,), torch.tensor([-1, 0]), "filter")})
    looks.note_gradients(0, step_of(optimizer, 101), 3)
    assert not batches(looks, 1)
