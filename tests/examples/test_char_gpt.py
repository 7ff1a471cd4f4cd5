"""The transformer examples: on Python's help texts and a text file, on one device and sharded over
two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import char_gpt
import numpy as np
import pytest
import running
import torch
from data_modules import Text

from lightning_normdyn import load_history

TINY = ("--preset", "tiny", "--accelerator", "cpu", "--logger", "none")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", [*running.METHODS, *char_gpt.STEERED])
def test_each_method_trains(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = char_gpt.main([*TINY, "--method", method])
    assert run.trainer.global_step == 4
    assert (run.out / "angular_update.png").stat().st_size > 1000
    assert "The model writes:" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_only_queries_and_keys_are_scale_invariant(norm: str) -> None:
    run = char_gpt.main([*TINY, "--norm", norm])
    found = {
        name: target["scale_invariant"] for name, target in run.history.meta["targets"].items()
    }
    invariant = {name for name, kind in found.items() if kind in ("filter", "group", "layer")}
    assert invariant == {
        "network.blocks.0.attention.query.weight",
        "network.blocks.0.attention.key.weight",
    }
    assert found["network.blocks.0.attention.query.weight"] == "group"  # one vector per head
    assert "network.blocks.0.attention.value.weight" in found  # the tables have the others too


@pytest.mark.usefixtures("_no_pictures")
def test_the_plain_gpt_has_no_scale_invariant_weight_and_its_blocks_are_steered() -> None:
    run = char_gpt.main([*TINY, "--norm", "plain", "--method", "rotation"])
    found = run.history.meta["targets"]
    # "waits": rows of the embedding that no batch has held yet.
    assert not {t["scale_invariant"] for t in found.values()} & {"filter", "group", "layer"}
    steered = [name for name in found if "blocks" in name]
    assert len(steered) == 6
    for step, row in enumerate(run.history):
        lr = 3e-3 * (step + 1) / 50
        for name in steered:
            assert row[f"matrix_angle/{name}"] == pytest.approx(lr, rel=1e-3)


@pytest.mark.usefixtures("_no_pictures")
def test_a_text_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("äbc\n" * 2000, encoding="utf-8")
    run = char_gpt.main([*TINY, "--text", str(text)])
    assert run.trainer.datamodule.characters == ["\n", "b", "c", "ä"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file is there"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"short", "at least 340 are needed"),
    ],
)
def test_unusable_text_ends_in_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        running.run_as_script(lambda: char_gpt.main([*TINY, "--text", str(text)]))


def test_width_that_heads_do_not_divide() -> None:
    with pytest.raises(SystemExit, match="error: --width 16 must be a multiple of --heads 3"):
        running.run_as_script(lambda: char_gpt.main([*TINY, "--heads", "3"]))


def test_targets_are_the_next_characters() -> None:
    data = Text(batch_size=2, context=10)
    data.setup()
    codes, following = data.train.tensors
    assert torch.equal(codes[:, 1:], following[:, :-1])
    assert torch.equal(codes[1:, 0], following[:-1, -1])
    assert data.decode(codes[0].tolist()) == data.decode(data._codes[:10].tolist())


def test_the_model_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    module = char_gpt.CharGPT(5, context=8, width=8, layers=2, heads=2).double()
    codes = torch.tensor([[1, 2, 3, 4, 0, 1]])
    changed = codes.clone()
    changed[0, 4] = 2
    torch.testing.assert_close(module(codes)[:, :4], module(changed)[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(module(codes)[:, 4], module(changed)[:, 4])


def run_script(script: Path, folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *TINY, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1000,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    # Two whole trainings each; tests/test_strategies.py has every rule under every strategy.
    [
        pytest.param("aws", marks=pytest.mark.rare),
        "projection",
        pytest.param("wrs", marks=pytest.mark.rare),
    ],
)
def test_two_cpu_ranks_have_the_same_curves_under_ddp_and_fsdp2(
    examples_folder: Path, tmp_path: Path, method: str
) -> None:
    flags = ("--method", method, "--devices", "2", "--every-n-steps", "2")
    said = run_script(examples_folder / "char_gpt.py", tmp_path, *flags, "--strategy", "ddp")
    assert said.count(f"history   runs/char_gpt/{method}/history.npz") == 1  # rank zero alone tells
    said = run_script(examples_folder / "fsdp_transformer.py", tmp_path, *flags)
    assert said.count(f"history   runs/fsdp_transformer/{method}/history.npz") == 1
    whole, sharded = (
        load_history(tmp_path / "runs" / name / method / "history.npz")
        for name in ("char_gpt", "fsdp_transformer")
    )
    keys = [
        key
        for key in whole.keys()  # noqa: SIM118
        if key.startswith(("weight_norm/", "angular_update/", "effective_lr/"))
    ]
    assert "angular_update/network.blocks.0.attention.query.weight" in keys
    for key in keys:
        np.testing.assert_array_equal(sharded.column(key)[0], whole.column(key)[0])
        np.testing.assert_allclose(
            sharded.column(key)[1], whole.column(key)[1], rtol=1e-3, err_msg=key
        )


@pytest.mark.slow
def test_fsdp2_on_one_cpu_rank(examples_folder: Path, tmp_path: Path) -> None:
    said = run_script(
        examples_folder / "fsdp_transformer.py", tmp_path, "--method", "aws", "--devices", "1"
    )
    assert said.count("history   runs/fsdp_transformer/aws/history.npz") == 1
