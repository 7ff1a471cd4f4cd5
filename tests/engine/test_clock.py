"""The x axis of curves, over interruptions."""

from __future__ import annotations

import lightning as L
import pytest
from models import fit, make

from lightning_normdyn.engine.clock import Clock

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
)


class Reads(L.Callback):
    """Reads a clock in every hook of a fit; goes on from a position, if there is one."""

    def __init__(self, position=None):
        self.position, self.read = position, {hook: [] for hook in HOOKS}

    def on_fit_start(self, trainer, pl_module):
        self.clock = Clock(trainer)
        if self.position is not None:
            self.went_on = self.clock.go_on_from(self.position)

    def note(self, hook):
        if hook == "on_train_batch_end":
            self.clock.end_batch()
        clock = self.clock
        self.read[hook].append((clock.now, clock.position(), clock.is_inside_batch))


def noting(hook):
    return lambda self, *args, **kwargs: self.note(hook)


for name in HOOKS:
    setattr(Reads, name, noting(name))


def test_positions_are_those_of_the_next_batch():
    reads = Reads()
    fit(make(), [reads], max_epochs=1)
    for hook in HOOKS[:3]:
        assert reads.read[hook] == [(step, [step, step], True) for step in range(4)]
    # Lightning counts a batch only after its last hook.
    ends = reads.read["on_train_batch_end"]
    assert ends == [(step, [step + 1, step], False) for step in range(4)]
    assert reads.read["on_train_epoch_end"] == [(4, [4, 4], False)]


def test_a_batch_that_only_accumulates_is_no_step():
    reads = Reads()
    fit(make(), [reads], max_epochs=1, accumulate_grad_batches=2)
    positions = [position for _, position, _ in reads.read["on_train_batch_end"]]
    assert positions == [[0, 0], [1, 0], [1, 1], [2, 1]]


@pytest.mark.parametrize(("position", "start"), [([7, 0], 7), ([7, 5], 0)])
def test_it_goes_on_where_the_loops_were_restored_with_it(position, start):
    reads = Reads(position)
    fit(make(), [reads], max_epochs=1)
    assert reads.went_on == (start == 7)
    assert [now for now, *_ in reads.read["on_train_batch_start"]] == [start + i for i in range(4)]


@pytest.mark.parametrize(("every", "expected"), [(2, [0, 1, 1, 2]), (0, [0, 0, 0, 0])])
def test_logging_steps(every, expected):
    seen = []

    class Counts(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(Clock(trainer).logging_step)

    fit(make(), [Counts()], max_epochs=1, log_every_n_steps=every)
    assert seen == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"max_steps": 3}, 3), ({"max_epochs": 2}, 8), ({"max_epochs": 2, "max_steps": 6}, 6)],
)
def test_the_last_batch_is_known_before_it_is_over(arguments, expected):
    seen = []

    class Asks(L.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            seen.append(Clock(trainer).is_last)

    fit(make(), [Asks()], **{"max_epochs": -1, **arguments})
    assert seen == [False] * (expected - 1) + [True]
