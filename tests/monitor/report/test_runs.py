"""Runs are read whoever wrote them down; what is damaged or hostile is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from histories import reported_run

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.report import runs as run_reading
from lightning_normdyn.monitor.report.runs import load_run


def write_csv(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_history_file_and_the_folder_with_it(tmp_path):
    path = reported_run().save(tmp_path / "run" / "history.npz")
    assert list(load_run(path)) == list(load_run(path.parent)) == list(reported_run())


def test_a_csv_log_as_lightning_writes_it(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    logger.log_metrics({"train_loss": 2.0}, step=0)
    logger.log_metrics({"effective_lr/conv.weight": 0.5, "angular_update/conv.weight": 0.1}, step=0)
    logger.log_metrics(
        {"effective_lr/conv.weight": 0.25, "angular_update/conv.weight": float("nan")}, step=9
    )
    logger.log_metrics(
        {"val_loss": 1.0, "epoch": 0}, step=7
    )  # validation may be logged for an earlier step
    logger.save()
    for run in (load_run(logger.log_dir), load_run(Path(logger.log_dir) / "metrics.csv")):
        assert list(run) == [
            {
                "step": 0,
                "optimizer_step": 0,
                "train_loss": 2.0,
                "effective_lr/conv.weight": 0.5,
                "angular_update/conv.weight": pytest.approx(0.1),
            },
            {"step": 7, "optimizer_step": 7, "val_loss": 1.0, "epoch": 0.0},
            {
                "step": 9,
                "optimizer_step": 9,
                "effective_lr/conv.weight": 0.25,
                "angular_update/conv.weight": pytest.approx(float("nan"), nan_ok=True),
            },
        ]


def test_a_csv_log_of_a_run_that_crashed_and_went_on(tmp_path):
    path = write_csv(
        tmp_path / "metrics.csv",
        "step,effective_lr/a",
        "0,1",
        "10,2",
        "20,3",
        "10,4",
        "20,5",
        "30,6",
    )
    steps, values = load_run(path).column("effective_lr/a")
    assert steps.tolist() == [0, 10, 20, 30]
    assert values.tolist() == [1, 4, 5, 6]


@pytest.fixture(scope="module")
def recorded_wandb_run(tmp_path_factory):
    """A real offline run, with everything that a row of W&B may hold. Recorded once: W&B's service
    takes seconds to start."""
    wandb = pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as environment:
        place = str(tmp_path_factory.mktemp("wandb"))
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            environment.setenv(name, place)
        environment.setenv("WANDB_SILENT", "true")
        return record(wandb)


@pytest.fixture
def wandb_run(recorded_wandb_run, tmp_path):
    """A copy, which a test may damage."""
    return Path(shutil.copytree(recorded_wandb_run, tmp_path / recorded_wandb_run.name))


def record(wandb):
    settings = wandb.Settings(x_disable_stats=True, console="off")
    config = {"lr": 0.1, "normdyn": {"targets": {"a.weight": {"vectors": 3}}}}
    run = wandb.init(mode="offline", project="test", config=config, settings=settings)
    for step in range(5):
        run.log(
            {
                "effective_lr/a.weight": 1.0 / (step + 1),
                "angular_update/a.weight": float("nan") if step == 2 else 0.5,
                "weight_norm/a.weight": float("inf") if step == 3 else 2.0,
                "filter_norm/a.weight": wandb.Histogram(np.arange(5.0)),
                "text": "hello",
                "flag": True,
                "epoch": 0,
                "trainer/global_step": 10 * step,
            }
        )
    folder = Path(run.dir).parent
    run.finish()
    wandb.teardown()  # its service may still be writing when finish() returns
    return folder


def test_an_offline_wandb_run(wandb_run):
    for path in (wandb_run, next(wandb_run.glob("*.wandb"))):
        history = load_run(path)
        assert history.column("effective_lr/a.weight")[0].tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_allclose(
            history.column("effective_lr/a.weight")[1], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
        )
        assert history.column("angular_update/a.weight")[0].tolist() == [0, 10, 20, 30, 40]
        np.testing.assert_array_equal(
            history.column("angular_update/a.weight")[1], np.float32([0.5, 0.5, np.nan, 0.5, 0.5])
        )
        assert history.column("weight_norm/a.weight")[1].tolist() == [2, 2, 2, float("inf"), 2]
        assert history.meta == {"targets": {"a.weight": {"vectors": 3}}}
        assert set(history.keys()) == {
            "effective_lr/a.weight",
            "angular_update/a.weight",
            "weight_norm/a.weight",
            "epoch",
        }


def test_an_interrupted_wandb_run_is_read_as_far_as_it_goes(wandb_run):
    path = next(wandb_run.glob("*.wandb"))
    content = path.read_bytes()
    mentions = [found.start() for found in re.finditer(rb"effective_lr", content)]
    path.write_bytes(content[: mentions[len(mentions) // 2]])
    history = load_run(path)
    assert 1 <= len(history) < 5
    assert "interrupted" in history.meta["note"]


def test_a_damaged_wandb_run_is_refused(wandb_run):
    path = next(wandb_run.glob("*.wandb"))
    content = path.read_bytes()
    inside = content.index(b"effective_lr")
    for damaged in (b"", b"junk" * 1000, content[:inside] + b"\xff" + content[inside + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(NormDynError, match=r"cannot be read as a W&B run|holds no logged rows"):
            load_run(wandb_run)


def reader_that(monkeypatch, *, stdout: str = "", stderr: str = "", code: int = 0):
    def run(command, **options):
        options["stdout"].write(stdout.encode())
        options["stderr"].write(stderr.encode())
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(run_reading.subprocess, "run", run)


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "[" * 100_000,
        '{"type": "history"}',
        '{"type": "run", "run": {"config": []}}',
        '{"type": "history", "history": {"item": {"a": 1}}}',
        '{"type": "history", "history": {"item": {"_step": "x", "a": 1}}}',
        '{"type": "history", "history": {"item": {"_step": 1e400}}}',
        '{"type": "history", "history": {"item": {"_step": 1000000000000000000000000000000, "a": '
        "1}}}",
    ],
)
def test_what_the_wandb_reader_might_say_is_not_trusted(tmp_path, monkeypatch, line):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(monkeypatch, stdout=line + "\n")
    with pytest.raises(NormDynError, match=r"run\.wandb"):
        load_run(tmp_path)


def test_a_number_too_large_for_any_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(
        monkeypatch,
        stdout='{"type": "history", "history": {"item": {"_step": 1, "a": %s}}}\n' % 10**400,
    )
    with pytest.raises(NormDynError, match="none that a run can log"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "said", ["/usr/bin/python: No module named wandb", "Error: No such command 'leet'."]
)
def test_without_a_wandb_that_can_read_it_is_said_which_one_can(tmp_path, monkeypatch, said):
    (tmp_path / "run.wandb").write_bytes(b"")
    reader_that(monkeypatch, stderr=said, code=1)
    with pytest.raises(NormDynError, match=r"pip install 'wandb>=0\.30'"):
        load_run(tmp_path)


def test_a_wandb_reader_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "run.wandb").write_bytes(b"")
    monkeypatch.setattr(run_reading, "_WANDB_SECONDS", 0.2)
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nsleep 5\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    with pytest.raises(NormDynError, match="did not finish"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "": "no column `step`",
        "epoch,loss\n0,1\n": "no column `step`",
        "step,a\n": "holds no logged rows",
        "step,a\n0,1\n1\n": "line 3 is no row of numbers",
        "step,a\n0,one\n": "line 2 is no row of numbers",
        "step,a\n,1\n": "line 2 is no row of numbers with a step",
        "step,a\nnan,1\n": "line 2 is no row of numbers",
        "step,a\n1e400,1\n": "line 2 is no row of numbers",
        "step,a\n1e30,1\n": "none that a run can log",
        "step,a,a\n0,1,2\n": "two of its columns have the same name",
        'step,a\n0,"1': "cannot be read as a CSV log",
        "step,a\n0," + "1" * 200_000: "cannot be read as a CSV log",
        "step," + ",".join(f"k{i}" for i in range(10_001)) + "\n" + "1," * 10_001 + "1\n": (
            "more than 10000 different series"
        ),
        "step,a,normdyn/optimizer_step\n0,1,inf\n": "none that a run can log",
        "step,=cmd()\n0,=cmd()\n": "line 2 is no row of numbers",
    }.items(),
)
def test_a_damaged_csv_log_is_refused(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(NormDynError, match=re.escape(message)) as error:
        load_run(tmp_path)
    assert "metrics.csv" in str(error.value)


def test_a_csv_log_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n\xff\xfe\x00,1\n")
    with pytest.raises(NormDynError, match="cannot be read as a CSV log"):
        load_run(tmp_path)


def test_a_folder_without_a_run_says_what_is_below_it(tmp_path):
    with pytest.raises(NormDynError, match="holds no run; name a history file"):
        load_run(tmp_path)
    write_csv(tmp_path / "version_0" / "metrics.csv", "step,a", "0,1")
    with pytest.raises(NormDynError, match="version_0"):
        load_run(tmp_path)
    with pytest.raises(NormDynError, match="there is no run"):
        load_run(tmp_path / "nowhere")


def test_a_folder_with_two_runs_asks_which(tmp_path):
    reported_run().save(tmp_path / "a.npz")
    reported_run().save(tmp_path / "b.npz")
    with pytest.raises(NormDynError, match=r"holds 2 runs; name one of .*a\.npz, .*b\.npz"):
        load_run(tmp_path)


@pytest.mark.parametrize("cell", ["9" * 4000, "-" + "9" * 4000, "1e999"])
@pytest.mark.parametrize("column", ["step", "effective_lr/conv.weight", "normdyn/optimizer_step"])
def test_a_number_of_thousands_of_digits_in_a_log_is_refused_or_infinite(cell, column, tmp_path):
    cells = {
        "step": "1",
        "effective_lr/conv.weight": "0.5",
        "normdyn/optimizer_step": "2",
        column: cell,
    }
    (tmp_path / "metrics.csv").write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    if column == "effective_lr/conv.weight":
        assert abs(load_run(tmp_path)[0][column]) == float("inf")
    else:
        with pytest.raises(NormDynError, match="is damaged") as said:
            load_run(tmp_path)
        assert len(str(said.value)) < 500
