"""The demo's example: each method runs, leaves its files, and bad flags end in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import digits_resnet
import numpy as np
import pytest
import running
import torch

from lightning_normdyn import load_history
from lightning_normdyn.errors import NormDynWarning

TINY = ("--preset", "tiny", "--accelerator", "cpu")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", running.METHODS)
def test_each_method_trains_and_leaves_history_and_pictures(method: str) -> None:
    run = digits_resnet.main([*TINY, "--method", method, "--logger", "none"])
    assert run.trainer.global_step == 12
    assert run.out == Path("runs/digits_resnet") / method
    for name in ("history.npz", "effective_lr.png", "angular_update.png"):
        assert (run.out / name).stat().st_size > 1000
    names = {key.split("/", 1)[1] for key in run.history.keys() if key.startswith("effective_lr/")}  # noqa: SIM118
    assert names == {
        name for name, p in run.trainer.lightning_module.named_parameters() if p.dim() > 1
    }
    _, norms = run.history.column("weight_norm/network.0.weight")
    assert np.isfinite(norms).all()


@pytest.mark.usefixtures("_no_pictures")
def test_methods_do_what_they_say() -> None:
    """From the same start, only WeightRescaling ends at length 1, and AdaptiveWeightShrink shortens
    faster than nothing does."""
    last = {}
    for method in running.METHODS:
        module = digits_resnet.main(
            [
                *TINY,
                "--method",
                method,
                "--logger",
                "none",
                "--max-steps",
                "15",
                "--every-n-steps",
                "5",
            ]
        ).trainer.lightning_module
        last[method] = module.network[0].weight.detach().flatten(1).norm(dim=1)
    assert torch.allclose(last["wrs"], torch.ones_like(last["wrs"]), atol=1e-5)
    for method in ("none", "decay", "aws", "projection"):
        assert not torch.allclose(last[method], torch.ones_like(last[method]), atol=1e-3)
    assert (last["aws"] < last["decay"]).all()
    assert (last["decay"] < last["none"]).all()


@pytest.mark.usefixtures("_no_pictures")
def test_none_switches_the_optimizers_decay_off_and_decay_keeps_it() -> None:
    for method, expected in (("none", 0.0), ("decay", 5e-3)):
        run = digits_resnet.main(
            [*TINY, "--method", method, "--logger", "none", "--max-steps", "1"]
        )
        assert [group["weight_decay"] for group in run.trainer.optimizers[0].param_groups] == [
            expected,
            0.0,
        ]


def test_init_scale_leaves_the_function_as_it_is() -> None:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    outputs = []
    for scale in (1.0, 5.0):
        torch.manual_seed(0)
        outputs.append(digits_resnet.ResidualDigits(4, init_scale=scale).double()(images))
    torch.testing.assert_close(
        outputs[0], outputs[1], rtol=0, atol=1e-3
    )  # BatchNorm's eps is the difference


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_demo_draws_both_methods_in_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    runs = digits_resnet.main([*TINY, "--demo", "--out", "shown"])
    assert list(runs) == ["decay", "aws"]
    assert Path("shown/compare.png").stat().st_size > 10_000
    assert Path("shown/overview.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "Both runs in one picture: shown/compare.png" in said
    for method in ("decay", "aws"):
        folder = next(Path(f"shown/{method}/wandb").glob("offline-run-*"))
        assert f"wandb leet {folder}" in said
        assert f"wandb sync {folder}" in said


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pictures")
def test_wandb_run_holds_a_curve_for_every_weight() -> None:
    """Read back with W&B's own reader: an effective_lr series per weight, over
    trainer/global_step."""
    run = digits_resnet.main([*TINY, "--method", "aws"])
    file = next(run.out.glob("wandb/offline-run-*/*.wandb"))
    read = subprocess.run(
        ["wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    records = [json.loads(line) for line in read.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    for name, p in run.trainer.lightning_module.named_parameters():
        if p.dim() > 1:
            steps = [row["trainer/global_step"] for row in rows if f"effective_lr/{name}" in row]
            assert len(steps) >= 5
            assert steps == sorted(set(steps))


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--lr", "-1"], "argument --lr: must be above 0 and finite, got -1"),
        (["--lr", "nan"], "argument --lr: must be above 0 and finite"),
        (["--alpha", "0"], "argument --alpha: must be above 0"),
        (["--weight-decay", "-1"], "argument --weight-decay: must be 0 or above"),
        (["--epochs", "0"], "argument --epochs: must be a whole number above 0"),
        (["--batch-size", "many"], "argument --batch-size: invalid"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    ],
)
def test_bad_flags_end_in_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        digits_resnet.main([*TINY, *flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--accelerator", "abacus"], ["--precision", "7-true"], ["--strategy", "luck"]]
)
def test_what_the_trainer_refuses_is_told_in_one_line(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^error: the Trainer does not take these flags: .*"):
        running.run_as_script(lambda: digits_resnet.main([*TINY, "--logger", "none", *flags]))


@pytest.fixture
def _signals():
    """Lightning ignores further Ctrl-C while it shuts down, and leaves it so."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals")
def test_interrupted_run_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = digits_resnet.ResidualDigits.training_step

    def interrupted(module, batch, batch_idx):
        if batch_idx == 7:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    monkeypatch.setattr(digits_resnet.ResidualDigits, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        running.run_as_script(
            lambda: digits_resnet.main([*TINY, "--logger", "csv", "--method", "aws"])
        )
    assert stop.value.code == 1
    assert "Interrupted after 7 steps. What was measured until then:" in capsys.readouterr().out
    steps, norms = load_history("runs/digits_resnet/aws/history.npz").column(
        "weight_norm/network.0.weight"
    )
    assert len(steps) >= 3
    assert steps[-1] < 7
    assert np.isfinite(norms).all()
    assert Path("runs/digits_resnet/aws/effective_lr.png").stat().st_size > 1000


@pytest.mark.usefixtures("_signals")
def test_interrupted_before_anything_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_resnet.ResidualDigits, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        running.run_as_script(lambda: digits_resnet.main([*TINY, "--logger", "none"]))
    assert stop.value.code == 1


def test_interrupted_outside_of_training() -> None:
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted"):
        running.run_as_script(interrupted)


def test_missing_packages_are_named_or_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(
        NormDynWarning, match="matplotlib is not installed: the loggers get no pictures"
    ):
        run = digits_resnet.main([*TINY, "--method", "none"])
    said = capsys.readouterr().out
    assert "W&B is not installed (pip install wandb): logging to CSV." in said
    assert "matplotlib is not installed (pip install matplotlib): no pictures." in said
    assert (run.out / "csv" / "metrics.csv").is_file()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        SystemExit,
        match=r"error: scikit-learn is not installed, and this needs it: pip install scikit-learn, or",
    ):
        running.run_as_script(lambda: digits_resnet.main([*TINY, "--logger", "none"]))


def test_a_missing_module_that_is_no_extra_is_not_explained_away() -> None:
    def main():
        raise ModuleNotFoundError("No module named 'typo'", name="typo")

    with pytest.raises(ModuleNotFoundError, match="typo"):
        running.run_as_script(main)


def test_output_folder_that_is_a_file() -> None:
    Path("taken").write_text("a file")
    with pytest.raises(SystemExit, match="error: --out taken cannot be made a folder"):
        running.run_as_script(lambda: digits_resnet.main([*TINY, "--out", "taken"]))


@pytest.mark.slow
def test_script_runs_from_any_folder_on_two_ranks(examples_folder: Path, tmp_path: Path) -> None:
    script = [
        sys.executable,
        str(examples_folder / "digits_resnet.py"),
        *TINY,
        "--method",
        "aws",
        "--logger",
        "csv",
        "--out",
        "here",
    ]
    done = subprocess.run(
        [*script, "--devices", "2", "--strategy", "ddp"],
        cwd=tmp_path,
        env={**_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("history   here/history.npz") == 1  # rank zero alone tells
    assert (tmp_path / "here" / "history.npz").is_file()
    assert (
        "effective_lr/network.0.weight" in (tmp_path / "here" / "csv" / "metrics.csv").read_text()
    )
