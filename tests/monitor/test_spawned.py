"""A history comes back from processes that the Trainer starts."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from models import Net, SavesAt, loader, make, trainer

from lightning_normdyn import InputSpanMonitor, NormDynamicsMonitor
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.spawned import KeepsHistory


def left_behind() -> set[Path]:
    return set(Path(gettempdir()).glob("lightning-normdyn-*.npz"))


class Fails(Net):
    def training_step(self, batch: Any, batch_idx: int = 0) -> torch.Tensor:
        if batch_idx == 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


def one_row(step: int) -> History:
    history = History()
    history.append(step, {"weight_norm/conv.weight": 2.0}, optimizer_step=step + 1)
    return history


def in_child(keeper: KeepsHistory, history: History) -> None:
    child = multiprocessing.get_context("fork").Process(target=send, args=(keeper, history))
    child.start()
    child.join()
    assert child.exitcode == 0


def send(keeper: KeepsHistory, history: History) -> None:
    class Rank:
        is_global_zero = True

    keeper.history = history
    keeper.send_history(Rank())  # type: ignore[arg-type]


def test_a_history_comes_back_from_a_child_once():
    before, keeper = left_behind(), KeepsHistory()
    assert len(keeper.history) == 0
    for step in (3, 7):  # two fits, the second one replaces the first
        in_child(keeper, one_row(step))
        assert [row["step"] for row in keeper.history] == [step]
        assert [row["step"] for row in keeper.history] == [step]
    assert left_behind() == before


def test_a_copy_is_another_callback():
    keeper = KeepsHistory()
    other = copy.deepcopy(keeper)
    in_child(other, one_row(3))
    assert (len(keeper.history), len(other.history)) == (0, 1)


def test_what_nobody_asked_for_is_removed_with_the_callback():
    before, keeper = left_behind(), KeepsHistory()
    in_child(keeper, one_row(3))
    assert len(left_behind() - before) == 1
    del keeper
    assert left_behind() == before


def test_in_one_process_nothing_is_written():
    before, keeper = left_behind(), KeepsHistory()
    send(keeper, one_row(3))
    assert left_behind() == before
    assert len(keeper.history) == 1


@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp_fork", 1), pytest.param("ddp_fork", 2, marks=pytest.mark.slow)]
)
def test_monitors_bring_their_histories_back_from_a_forked_fit(strategy, devices):
    monitors = [NormDynamicsMonitor(1, tables=False), InputSpanMonitor()]
    runner = trainer(monitors, strategy=strategy, devices=devices, max_epochs=1)
    runner.fit(make(dtype=torch.float32), loader(dtype=torch.float32))
    assert [row["step"] for row in monitors[0].history] == list(range(4 // devices))
    assert monitors[0].history.meta["targets"]
    assert len(monitors[1].history) == 1
    assert runner.callback_metrics["normdyn/angular_update"] > 0  # which Lightning brings back


def test_a_forked_fit_that_fails_brings_back_what_it_had_at_its_last_checkpoint(tmp_path):
    monitor = NormDynamicsMonitor(1, tables=False)
    runner = trainer(
        [monitor, SavesAt(2, tmp_path / "second.ckpt")], strategy="ddp_fork", max_epochs=1
    )
    with pytest.raises(Exception, match="out of memory"):
        runner.fit(make(Fails, dtype=torch.float32), loader(dtype=torch.float32))
    assert [row["step"] for row in monitor.history] == [0, 1]


@pytest.mark.slow
def test_monitors_bring_their_histories_back_from_a_spawned_fit():
    monitor = NormDynamicsMonitor(1, tables=False)
    trainer([monitor], strategy="ddp_spawn", max_epochs=1).fit(
        make(dtype=torch.float32), loader(dtype=torch.float32)
    )
    assert [row["step"] for row in monitor.history] == [0, 1, 2, 3]
