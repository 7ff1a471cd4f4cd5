"""The life of a fit: refusals that come late, weights that nobody trains, and what the end table
says of them."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from weakref import ref

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from models import TARGETS, Net, fit, make, weights_of
from reference import Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)
from lightning_normdyn.engine.selection import Selection
from lightning_normdyn.engine.session import Guard


def end_table(capsys):
    return capsys.readouterr().out


def test_the_end_table_says_in_how_many_steps_a_callback_acted(capsys):
    class Half(Net):
        def on_before_optimizer_step(self, optimizer):
            if (
                self.trainer.global_step % 2
            ):  # the head goes on: a step without any gradient is none
                self.net[:6].zero_grad()

    with pytest.warns(NormDynWarning, match="WeightRescaling acted in 0 of 8 steps"):
        fit(make(Half), [AdaptiveWeightShrink(0.5), WeightRescaling(4), NormDynamicsMonitor(1)])
    said = end_table(capsys)
    assert "AdaptiveWeightShrink acted in 4 of 8 steps" in said
    assert "WeightRescaling acted in 0 of 8 steps: no weight" in said


def test_a_callback_that_never_acts_warns():
    class Never(Net):
        def on_before_optimizer_step(self, optimizer):
            self.net[:6].zero_grad()

    with pytest.warns(
        NormDynWarning,
        match="AdaptiveWeightShrink acted in 0 of 8 steps: no weight that it acts on had a gradient",
    ):
        fit(make(Never), [AdaptiveWeightShrink(0.5)])


def test_a_callback_that_was_never_to_act_says_so_without_a_warning(capsys):
    fit(make(), [LRDropRescaling(exponent=0.25), NormDynamicsMonitor(1)])
    assert "LRDropRescaling acted in 0 of 8 steps; it was to act in 0." in end_table(capsys)


def test_nothing_is_said_of_a_callback_that_always_acts(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), RadialProjection(), NormDynamicsMonitor(1)])
    assert "acted in" not in end_table(capsys)


class RefusingWorker(AdaptiveWeightShrink.worker):
    def shrink(self, step):
        if step.number == self.rule.refuses_at:
            raise NotSupportedError("this is not understood. Leave it out.")
        super().shrink(step)


class RefusesLater(AdaptiveWeightShrink):
    """Refuses its weights in a step: a stand-in for whatever may come up during a fit."""

    worker = RefusingWorker

    def __init__(self, at):
        super().__init__(0.5)
        self.refuses_at = at


def test_a_refusal_in_the_first_step_is_an_error():
    with pytest.raises(NotSupportedError, match="this is not understood"):
        fit(make(), [RefusesLater(1)])


def test_a_later_refusal_stops_the_callback_by_name_and_not_the_fit(capsys):
    module = make()
    with pytest.warns(
        NormDynWarning,
        match=r"RefusesLater does not act on `net.0.weight`, `net.3.weight` \(SGD\) after step 4: this",
    ) as caught:
        fit(module, [RefusesLater(5), NormDynamicsMonitor(1)])
    assert len([w for w in caught if w.category is NormDynWarning]) == 1
    said = end_table(capsys)
    assert "RefusesLater does not act on `net.0.weight`, `net.3.weight` (SGD) after step 4" in said
    assert "RefusesLater acted in 4 of 8 steps" in said


def test_the_optimizer_has_its_decay_back_after_a_refusal():
    owned = []

    class Watches(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            owned.append(len(StepBracket.of(trainer.optimizers[0]).decay_owners()))

    with pytest.warns(NormDynWarning, match="does not act"):
        fit(make(), [RefusesLater(3), NormDynamicsMonitor(1, tables=False), Watches()], max_steps=4)
    assert owned == [2, 2, 0, 0]


def test_a_weight_that_is_refused_later_is_left_alone_and_the_others_go_on(monkeypatch):
    module, aws = make(), AdaptiveWeightShrink(0.5, params=TARGETS)
    check = Selection.check_weight

    def refuse(self, weight, name):
        check(self, weight, name)
        brackets = self.session.attachment.brackets
        if name == "net.3.weight" and brackets and brackets[0].steps:
            raise NotSupportedError("`net.3.weight` gets sparse gradients. Leave it out.")

    monkeypatch.setattr(Selection, "check_weight", refuse)

    class Adds(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.optimizers[0].add_param_group(
                    {"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]}
                )

    with pytest.warns(
        NormDynWarning,
        match=r"does not act on `net.3.weight` after step \d: `net.3.weight` gets sparse",
    ):
        fit(module, [aws, Adds()])
    assert [t.name for t in aws.plans[0].targets] == ["net.0.weight"]
    assert aws.steps_of(0) == 8


def test_shrinking_a_replay_is_as_ever():
    module, recorder = make(), Recorder()
    fit(module, [AdaptiveWeightShrink(0.5), recorder])
    expected = replay(recorder, TARGETS, shrink=Shrink(0.5))
    assert all(
        torch.allclose(weights_of(module)[name], expected[name], rtol=1e-12) for name in TARGETS
    )


class Watch:
    def __init__(self):
        self.stopped = 0
        self.guard = Guard(self.stop)

    def stop(self):
        self.stopped += 1


def test_it_stands_first_and_leaves_the_others_as_they_are():
    other, watch = Callback(), Watch()
    callbacks = [other]
    trainer = SimpleNamespace(callbacks=callbacks)
    for _ in range(2):
        watch.guard.stand_first(trainer)
    assert trainer.callbacks == [watch.guard, other]
    assert callbacks == [other]  # Lightning may be going through this list
    for _ in range(2):
        watch.guard.leave(trainer)
    assert trainer.callbacks == [other]


def test_it_ends_the_watch_at_an_exception_and_at_the_end():
    watch = Watch()
    watch.guard.on_exception(None, None, ValueError())
    watch.guard.teardown(None, None, "fit")
    assert watch.stopped == 2


def test_it_keeps_nothing_alive():
    watch = Watch()
    guard, kept = watch.guard, ref(watch)
    del watch
    gc.collect()
    assert kept() is None
    guard.teardown(None, None, "fit")
