"""One fit's record: when a step is measured, when its row comes, and how rows go on after an
interruption."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import pytest
import strategies
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from models import BEFORE_2_5, TARGETS, ManualNet, Net, SavesAt, fit, images, loader, make, trainer
from monitoring import KeepsRowsWithSteps, Trajectory, Turns, momentum, monitor
from ranks import run_ranks
from torch.utils.data import DataLoader

from lightning_normdyn import (
    AdaptiveWeightShrink,
    InputSpanMonitor,
    NormDynamicsMonitor,
    WeightRescaling,
)
from lightning_normdyn.callbacks.norm_dynamics_monitor import MonitorWorker
from lightning_normdyn.engine.state import seal
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.ledger import Ledger
from lightning_normdyn.monitor.recording import Recording
from lightning_normdyn.monitor.rows import RowDraft
from lightning_normdyn.optimizers.step import HostCopy


def steps_of(watch):
    return [int(row["step"]) for row in watch.history]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("every", "arguments", "in_history", "logged"),
    [
        (1, {}, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, {}, [0, 2, 5, 7], [2, 5]),
        (None, {"log_every_n_steps": 4}, [0, 3, 7], [3, 7]),
        (None, {"log_every_n_steps": 0}, [0, 7], []),
        (5, {"log_every_n_steps": 0}, [0, 4, 7], [4]),
        (2, {"accumulate_grad_batches": 2}, [0, 1, 3], [1, 3]),
        (100, {"max_steps": 5}, [0, 4], []),
        (100, {"max_epochs": 1}, [0, 3], []),
        (100, {"limit_train_batches": 3}, [0, 5], []),
    ],
)
@pytest.mark.usefixtures("arrival")
def test_rows_come_at_logging_steps_and_at_both_ends(every, arguments, in_history, logged):
    watch, rows = monitor(every), KeepsRowsWithSteps()
    fit(make(), [watch], logger=rows, **arguments)
    assert steps_of(watch) == in_history
    assert [step for step, _ in rows.ours()] == logged


@pytest.mark.usefixtures("arrival")
def test_two_optimizers_and_one_that_waits():
    class TakesTurns(ManualNet):
        def training_step(self, batch, batch_idx=0):
            optimizer = self.optimizers()[batch_idx % 2]
            loss = Net.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    watch = monitor()
    fit(make(TakesTurns), [watch])
    rows = list(watch.history)
    assert len(rows) == 8
    for i, row in enumerate(rows):
        here, there = TARGETS if i % 2 == 0 else TARGETS[::-1]
        assert f"angular_update/{here}" in row
        assert f"angular_update/{there}" not in row


class Looks(L.Callback):
    """How many rows there are after every batch and every epoch, and what a checkpoint in the
    middle of an epoch holds."""

    def __init__(self, watch: NormDynamicsMonitor, checkpoint: Any = None) -> None:
        self.watch, self.checkpoint = watch, checkpoint
        self.after_batches: list[int] = []
        self.after_epochs: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_batches.append(len(self.watch.history))
        if self.checkpoint is not None and trainer.global_step == 3:
            trainer.save_checkpoint(self.checkpoint)
            state = torch.load(self.checkpoint, weights_only=True)["callbacks"][
                self.watch.state_key
            ]
            saved = History()
            saved.load_state_dict(state["extra"]["history"])
            self.in_checkpoint = list(saved)

    def on_train_epoch_end(self, trainer, pl_module):
        self.after_epochs.append(len(self.watch.history))


def everything(tmp_path, **arguments):
    """A fit with all that a row can tell of, the rows that were logged, and who looked on."""
    watch, rows = monitor(per_vector=True), KeepsRowsWithSteps()
    look = Looks(watch, tmp_path / "middle.ckpt")
    fit(
        make(make_optimizer=momentum),
        [watch, look, AdaptiveWeightShrink(50.0), WeightRescaling(3)],
        logger=rows,
        **arguments,
    )
    return watch, rows, look


def test_from_a_gpu_rows_come_one_batch_later_and_are_the_same(monkeypatch, tmp_path):
    watch, rows, look = everything(tmp_path)
    monkeypatch.setattr(HostCopy, "arrives_later", True)
    watch_later, rows_later, look_later = everything(tmp_path)
    assert look.after_batches == [1, 2, 3, 4, 5, 6, 7, 8]
    # The fourth was fetched at the epoch's end.
    assert look_later.after_batches == [0, 1, 2, 3, 4, 5, 6, 7]
    assert look.after_epochs == look_later.after_epochs == [4, 8]
    assert look_later.in_checkpoint == look.in_checkpoint == list(watch.history)[:3]
    assert rows_later.ours() == rows.ours()
    assert list(watch_later.history) == list(watch.history)
    assert watch_later.history.events == watch.history.events
    assert any(row["normdyn/clamped_vectors"] for row in watch.history)
    assert {event.kind for event in watch.history.events} == {"rescale"}


@pytest.mark.skipif(BEFORE_2_5, reason="a resumed run trains a batch twice, without us as well")
def test_a_resume_continues_the_rows_that_were_on_their_way(monkeypatch, tmp_path):
    monkeypatch.setattr(HostCopy, "arrives_later", True)
    watch, _, _ = everything(tmp_path)
    again = monitor(per_vector=True)
    fit(
        make(make_optimizer=momentum),
        [again, AdaptiveWeightShrink(50.0), WeightRescaling(3)],
        ckpt_path=tmp_path / "middle.ckpt",
    )
    assert steps_of(again) == steps_of(watch)
    assert (
        list(again.history)[:3] == list(watch.history)[:3]
    )  # from the checkpoint; the other batches come in another order


def test_what_happened_in_a_skipped_step_is_told_with_the_next_row(monkeypatch):
    class Marks(WeightRescaling):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:  # its update is skipped
                next(iter(self.plans.values())).mark("something")
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("inf") if batch_idx == 2 else 1.0
            )

    for later in (False, True):
        monkeypatch.setattr(HostCopy, "arrives_later", later)
        watch = monitor()
        module = make(
            Overflows,
            make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
            dtype=torch.float32,
        )
        precision = MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8)
        )
        fit(module, [Marks(1000), watch], plugins=[precision], max_epochs=1)
        assert steps_of(watch) == [0, 1, 3]
        assert [(event.step, event.kind) for event in watch.history.events] == [(3, "something")]


def sharded_rows(later):
    """In a rank: the rows of a monitor over sharded weights."""
    HostCopy.arrives_later = later  # type: ignore[method-assign,assignment]
    watch = monitor()
    strategies.fit(strategies.STRATEGIES["FSDP2"], lambda: [watch, AdaptiveWeightShrink(0.1)])
    return list(watch.history)


def test_rows_that_come_later_on_two_ranks():
    at_once, later = (run_ranks(sharded_rows, 2, (late,)) for late in (False, True))
    assert later == at_once
    assert len(later[0]) == strategies.STEPS
    assert later[1] == []  # rank zero keeps them


@pytest.mark.usefixtures("arrival")
def test_a_fit_that_stops_early_still_has_its_last_norm():
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 6

    watch = monitor(100)
    fit(make(), [watch, Stops()])
    assert steps_of(watch)[0] == 0
    assert steps_of(watch)[-1] == 5


def test_the_last_batches_of_an_unknown_length_are_not_lost():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*images().tensors, strict=True))

    watch = monitor(100)
    runner = trainer([watch], max_epochs=1)
    runner.fit(make(), DataLoader(Stream(), batch_size=8))
    assert steps_of(watch)[0] == 0
    assert steps_of(watch)[-1] == 3


def steps_with(watch, name):
    return watch.history.column(f"angular_update/{name}")[0].tolist()


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("arrival")
@pytest.mark.parametrize(
    ("offset", "expected"),
    [(0, [0, 5, 10, 15, 20]), (2, [2, 7, 12, 17, 22]), (4, [4, 9, 14, 19, 24])],
)
def test_an_optimizer_that_misses_the_logging_steps_is_measured_at_its_next_step(offset, expected):
    watch, rows = monitor(5), KeepsRowsWithSteps()
    module = make(Turns)
    module.offset = offset
    fit(module, [watch], loader(25 * 8), max_epochs=1, logger=rows)
    assert steps_with(watch, TARGETS[0]) == [0, 4, 9, 14, 19, 24]
    assert steps_with(watch, TARGETS[1]) == expected
    # As ever, the first step is in the history alone, unless it is a logging step or comes after
    # one.
    logged = [step for step, row in rows.ours() if f"angular_update/{TARGETS[1]}" in row]
    assert logged == [step for step in expected if step >= 4]


def test_every_few_batches_only_and_on_no_logging_step_it_is_measured_again_and_again():
    # Steps in even batches, logs in odd ones: no logging step is ever met.
    class Accumulates(ManualNet):
        def training_step(self, batch, batch_idx=0):
            loss = Net.training_step(self, batch, batch_idx) / 2
            self.manual_backward(loss)
            if batch_idx % 2 == 0:
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()

    watch = monitor(4)
    fit(make(Accumulates), [watch], loader(16 * 8), max_epochs=1)
    assert steps_of(watch)[:-1] == [0, 4, 8, 12]


@pytest.mark.usefixtures("arrival")
def test_of_several_steps_in_a_batch_a_row_holds_the_first_with_its_own_number():
    look, watch = Trajectory(), monitor(2)
    module = make(Turns)
    module.repeats = 3
    with torch.no_grad():
        module.net[0].weight[1] = (
            1e-9 * module.net[0].weight[1]
        )  # collapsed, whatever it is compared with
    fit(module, [look, watch], loader(6 * 8), max_epochs=1)
    rows = list(watch.history)
    assert steps_of(watch) == [0, 1, 3, 5]
    assert [int(row["optimizer_step"]) for row in rows] == [1, 4, 10, 16]
    for row in rows:
        assert row["normdyn/collapsed_vectors"] <= 1  # not once for every step
        expected = look.weights[int(row["step"])][TARGETS[0]].flatten(1).norm(dim=1).mean()
        assert row[f"weight_norm/{TARGETS[0]}"] == pytest.approx(
            float(expected), rel=1e-6
        )  # before the batch: of its first step


def test_a_resume_puts_promised_numbers_back(tmp_path):
    """An EarlyStopping that asks for them every epoch gets them although the next row is far away,
    and no row is added for it."""

    def stop():
        return EarlyStopping("normdyn/angular_update", check_on_train_epoch_end=True, patience=100)

    whole, again = monitor(50), monitor(50)
    expected = fit(
        make(make_optimizer=momentum),
        [whole, stop(), SavesAt(4, tmp_path / "four.ckpt")],
        max_epochs=4,
    )
    found = fit(
        make(make_optimizer=momentum),
        [again, stop()],
        ckpt_path=tmp_path / "four.ckpt",
        max_epochs=4,
    )
    assert steps_of(again) == steps_of(whole) == [0, 15]
    assert found.callback_metrics["normdyn/angular_update"] == pytest.approx(
        float(expected.callback_metrics["normdyn/angular_update"]), rel=0.2
    )


def test_a_row_that_the_end_of_a_fit_asked_for_is_gone_when_the_run_goes_on(tmp_path):
    first, again = monitor(5, per_vector=True), monitor(5, per_vector=True)
    fit(make(make_optimizer=momentum), [first], max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    assert steps_of(first) == [0, 4, 7]
    fit(make(make_optimizer=momentum), [again], ckpt_path=tmp_path / "two.ckpt", max_epochs=4)
    assert steps_of(again) == [0, 4, 9, 14, 15]
    assert again.history.vectors("weight_norm/net.0.weight")[0].tolist() == [0, 4, 9, 14, 15]


def test_a_finished_run_shows_its_history(tmp_path):
    first, again = (
        monitor(5, per_vector=True, quantities=["effective_lr"]),
        monitor(5, per_vector=True, quantities=["effective_lr"]),
    )
    fit(make(make_optimizer=momentum), [first], max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    runner = fit(
        make(make_optimizer=momentum), [again], ckpt_path=tmp_path / "two.ckpt", max_epochs=2
    )
    assert list(again.history) == list(first.history)
    runner.save_checkpoint(tmp_path / "again.ckpt")
    third = monitor(5, per_vector=True, quantities=["effective_lr"])
    fit(make(make_optimizer=momentum), [third], ckpt_path=tmp_path / "again.ckpt", max_epochs=4)
    assert steps_of(third) == [0, 4, 9, 14, 15]


def test_an_old_checkpoint_in_a_new_schedule_ends_no_fit(tmp_path):
    """Weights and optimizer go on, the loops begin anew: rows that lie ahead are forgotten, with a
    warning."""
    fit(
        make(make_optimizer=momentum),
        [monitor(), InputSpanMonitor(1, max_samples=40)],
        max_epochs=2,
    ).save_checkpoint(tmp_path / "old.ckpt")
    state = torch.load(tmp_path / "old.ckpt", weights_only=True)
    fresh = fit(make(make_optimizer=momentum), max_steps=0)
    fresh.save_checkpoint(tmp_path / "fresh.ckpt")
    state["loops"] = torch.load(tmp_path / "fresh.ckpt", weights_only=True)["loops"]
    state["epoch"] = state["global_step"] = 0
    torch.save(state, tmp_path / "new.ckpt")
    watch = monitor(2)
    with pytest.warns(NormDynWarning) as said:
        fit(
            make(make_optimizer=momentum),
            [watch, InputSpanMonitor(1, max_samples=40)],
            ckpt_path=tmp_path / "new.ckpt",
            max_epochs=1,
        )
    assert steps_of(watch) == [0, 1, 3]
    assert [int(row["optimizer_step"]) for row in watch.history] == [9, 10, 12]
    texts = " ".join(str(warning.message) for warning in said)
    assert (
        "The history of the checkpoint reaches to step 7, and this fit counts from step 0" in texts
    )
    assert "InputSpanMonitor's history reaches to step 7" in texts


def test_a_checkpoint_of_another_shape_starts_a_new_history(tmp_path):
    fit(make(), [monitor()], max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)
    [(key, mine)] = state["callbacks"].items()
    for damage in (
        {"last_step": "x"},
        {"history": {}},
        {"elapsed": [3]},
        {"position": [float("nan"), 2]},
        {"norms": {"a": 3}},
    ):
        state["callbacks"][key] = seal({**mine, "extra": {**mine["extra"], **damage}})
        torch.save(state, tmp_path / "damaged.ckpt")
        watch = monitor()
        with pytest.warns(NormDynWarning, match="starts a new history"):
            fit(make(), [watch], ckpt_path=tmp_path / "damaged.ckpt", max_epochs=2)
        assert steps_of(watch) == [4, 5, 6, 7]


def test_skipped_and_clamped_go_on_over_a_resume(tmp_path):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("inf") if batch_idx == 2 else 1.0
            )

    def go(callbacks, **arguments):
        precision = MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8)
        )
        return fit(
            make(Overflows, dtype=torch.float32), callbacks, plugins=[precision], **arguments
        )

    whole, again, shrink = monitor(), monitor(), AdaptiveWeightShrink(50.0)
    go([whole, AdaptiveWeightShrink(50.0), SavesAt(8, tmp_path / "eight.ckpt")], max_epochs=3)
    go([again, shrink], ckpt_path=tmp_path / "eight.ckpt", max_epochs=3)
    for key in ("normdyn/skipped_steps", "normdyn/clamped_vectors"):
        assert again.history[-1][key] == whole.history[-1][key] > 0
    assert (
        sum(shrink.member.session.combined.counted_by_weight("clamped").values())
        == again.history[-1]["normdyn/clamped_vectors"]
    )


class Interrupts:
    """Calls ``act`` at every line of the given functions, as a signal handler may be called."""

    def __init__(self, act, *functions):
        self.act, self.codes, self.inside, self.calls = (
            act,
            {f.__code__ for f in functions},
            False,
            0,
        )

    def __call__(self, frame, event, argument):
        if frame.f_code not in self.codes or self.inside:
            return None
        if event == "line":
            self.inside = True
            self.calls += 1
            try:
                self.act()
            finally:
                self.inside = False
        return self


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("arrival")
def test_a_checkpoint_may_be_asked_for_between_any_two_lines_of_the_monitor():
    recording = Recording
    functions = [
        recording.batch_end, recording._receive, recording._send, recording._drafted, recording._with_row, recording._recorded,
        recording._show, recording.add, recording._publish_about, recording.train_end, recording._append_final,
        RowDraft.fill, RowDraft.finish, MonitorWorker.after, Ledger.with_row, History.append, History.show,
    ]  # fmt: skip
    quiet, watch = monitor(per_vector=True), monitor(per_vector=True)
    fit(
        make(make_optimizer=momentum),
        [quiet, AdaptiveWeightShrink(50.0), WeightRescaling(2)],
        max_steps=2,
    )
    expected, states = list(quiet.history), []
    interrupts = Interrupts(lambda: states.append(watch.state_dict()["extra"]), *functions)

    class Starts(L.Callback):
        def on_train_start(self, trainer, pl_module):
            sys.settrace(interrupts)

    try:
        fit(
            make(make_optimizer=momentum),
            [watch, AdaptiveWeightShrink(50.0), WeightRescaling(2), Starts()],
            max_steps=2,
        )
    finally:
        sys.settrace(None)
    assert interrupts.calls > 100
    assert list(watch.history) == expected
    assert watch.history.events == quiet.history.events
    for state in states:  # each holds the rows of the batches that are over, each once
        saved = History()
        saved.load_state_dict(state["history"])
        rows = list(saved)
        assert rows == expected[: len(rows)]
        assert len(rows) == len(expected) or int(rows[-1]["step"] if rows else -1) + 1 >= state[
            "position"
        ][0] - int(len(rows) == 0)
        for name in saved.vector_names():
            assert saved.vectors(name)[0].tolist() == [int(row["step"]) for row in rows]
