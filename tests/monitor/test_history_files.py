"""Where the history of a fit lies: beside each logger's own files, also where a fit is interrupted,
resumed or done twice."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from models import Net, SavesAt, fit, loader, make, trainer

from lightning_normdyn import AdaptiveWeightShrink, InputSpanMonitor, NormDynamicsMonitor
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.monitor.history_files import KeepsHistory
from lightning_normdyn.monitor.outcome import Outcome
from lightning_normdyn.monitor.report.runs import load_run

NAMES = ["net.0.weight", "net.3.weight", "net.8.weight"]


pytestmark = pytest.mark.usefixtures("_no_run_left")


@pytest.fixture
def bucket():
    import fsspec

    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_remote_log_has_its_history_and_pictures_beside_it(kind, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = NormDynamicsMonitor(1, tables=False)
    logger = kind("memory://bucket/runs")
    fit(make(), [watch], logger=logger, max_epochs=1)
    assert list(load_history(f"{logger.log_dir}/history.npz")) == list(watch.history)
    if kind is CSVLogger:
        names = {Path(name).name for name in bucket.find("/bucket/runs")}
        assert {"weight_norm.png", "angular_update.png", "metrics.csv"} <= names
        assert bucket.cat(f"{logger.log_dir}/angular_update.png").startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.npz"))  # nothing in a local folder named "memory:"
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(Outcome, "pictures", {})


class Ends(Callback):
    """Ends the fit by an exception in the third batch."""

    def __init__(self, how: BaseException) -> None:
        self.how = how

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            raise self.how


def sigterm() -> BaseException:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return SIGTERMException()


ENDS = {
    "error": lambda: RuntimeError("out of memory"),
    "ctrl-c": KeyboardInterrupt,
    "sigterm": sigterm,
    "exit": lambda: SystemExit(3),
}


@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
@pytest.mark.parametrize("how", ENDS)
def test_an_interrupted_fit_keeps_its_history(how, first, tmp_path):
    watch, others = (
        NormDynamicsMonitor(1, tables=False),
        [AdaptiveWeightShrink(0.5), Ends(ENDS[how]())],
    )
    logger = CSVLogger(tmp_path)
    with pytest.raises(BaseException):  # noqa: B017  # whatever Lightning makes of it
        fit(make(), [watch, *others] if first else [*others, watch], logger=logger)
    expected = 3 if first else 2  # the third batch's end never came to a monitor that stands last
    assert len(watch.history) == expected
    kept = load_history(Path(logger.log_dir) / "history.npz")
    assert list(kept) == list(watch.history)
    assert kept.meta["targets"].keys() == set(NAMES)
    assert load_run(logger.log_dir).keys() == kept.keys()


def test_numbers_on_their_way_from_a_device_are_in_the_interrupted_history(tmp_path, monkeypatch):
    from lightning_normdyn.optimizers.step import HostCopy

    monkeypatch.setattr(HostCopy, "arrives_later", True)
    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError):
        fit(make(), [NormDynamicsMonitor(1, tables=False), Ends(RuntimeError())], logger=logger)
    assert [row["step"] for row in load_history(Path(logger.log_dir) / "history.npz")] == [0, 1, 2]


def test_what_cannot_be_written_does_not_hide_what_interrupted_the_fit(tmp_path, monkeypatch):
    def fail(self: History, path: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(History, "save", fail)
    with (
        pytest.warns(NormDynWarning, match="disk full"),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        fit(
            make(),
            [NormDynamicsMonitor(1, tables=False), Ends(ENDS["error"]())],
            logger=CSVLogger(tmp_path),
        )


@pytest.mark.usefixtures("without_pictures")
def test_every_checkpoint_keeps_the_history_so_far(tmp_path):
    """What a run that is killed leaves behind."""
    logger, watch, found = CSVLogger(tmp_path), NormDynamicsMonitor(1, tables=False), []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_: Any) -> None:
            if trainer.global_step in (2, 5):
                trainer.save_checkpoint(tmp_path / "some.ckpt")
                found.append(list(load_history(Path(logger.log_dir) / "history.npz")))

    fit(make(), [watch, Looks()], logger=logger)
    rows = list(watch.history)
    assert found == [rows[:2], rows[:5]]


def histories_in(folder: Any) -> dict[str, list[dict[str, float]]]:
    return {
        path.name: list(load_history(path)) for path in sorted(Path(folder).glob("history*.npz"))
    }


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("same_start", [True, False])
def test_one_run_fitted_twice_keeps_both_histories(kind, same_start, tmp_path):
    logger, watch, module = kind(tmp_path), NormDynamicsMonitor(1, tables=False), make()
    fit(module, [watch], logger=logger, max_epochs=1)
    first = list(watch.history)
    fit(make() if same_start else module, [watch], logger=logger)
    assert histories_in(logger.log_dir) == {
        "history.npz": first,
        "history.fit2.npz": list(watch.history),
    }


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("again", [False, True], ids=["a new logger", "fitted twice before"])
def test_a_resumed_fit_goes_on_in_its_own_file(again, tmp_path):
    def go(epochs: int, checkpoint: Any = None) -> list[dict[str, float]]:
        watch = NormDynamicsMonitor(1, tables=False)
        logger = TensorBoardLogger(tmp_path, name="", version="run")
        fit(
            make(),
            [watch, SavesAt(3, tmp_path / "third.ckpt")],
            logger=logger,
            max_epochs=epochs,
            ckpt_path=checkpoint,
        )
        return list(watch.history)

    before = go(1)
    if again:
        go(1)
    whole = go(2, tmp_path / "third.ckpt")
    expected = (
        {"history.npz": before, "history.fit2.npz": whole} if again else {"history.npz": whole}
    )
    assert histories_in(tmp_path / "run") == expected
    assert len(whole) == 8


@pytest.mark.usefixtures("without_pictures")
def test_mlflow_keeps_both_histories_of_a_run_that_is_fitted_twice(tmp_path):
    logger, watch = (
        MLFlowLogger("tests", tracking_uri=f"file:{tmp_path}"),
        NormDynamicsMonitor(1, tables=False),
    )
    for _ in range(2):
        fit(make(), [watch], logger=logger, max_epochs=1)
    artifacts = {
        Path(each.path).name for each in logger.experiment.list_artifacts(logger.run_id, "normdyn")
    }
    assert {name for name in artifacts if name.endswith(".npz")} == {
        "history.npz",
        "history.fit2.npz",
    }


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
