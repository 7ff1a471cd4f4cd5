"""The benchmarks run: each section of `cost.py --quick`, and the smaller scripts; what they
measure is what their tables say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from forked import run_script

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.slow

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def output_of(script: str, *arguments: str, folder: Path, fork: bool = False) -> str:
    """What a script prints, in a process of its own or a fork of this one: it patches classes to
    time them."""
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(FOLDER.parent)
    if fork:
        return run_script([str(FOLDER / script), *arguments], folder, environment)
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of all tables in a text, by their first cell."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *others = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows[first] = others
    return rows


def section(name: str, folder: Path, fork: bool = True) -> dict[str, list[str]]:
    arguments = ("--quick", "--threads", "1", "--only", name)
    return rows_of(output_of("cost.py", *arguments, folder=folder, fork=fork))


def test_small_shapes_with_every_callback(tmp_path):
    rows = section("small", tmp_path)
    operations = {name: int(cells[-2]) for name, cells in rows.items() if cells[-1].isdigit()}
    waits = {name: int(cells[-1]) for name, cells in rows.items() if cells[-1].isdigit()}
    bare = operations["SGD fused"]
    # Lightning's own loop is not counted among the optimizer's operations.
    assert bare <= 3
    assert operations["monitor, idle"] == bare
    assert operations["WRS, idle"] <= bare + 1
    assert operations["LRDropRescaling, no drop"] == bare
    acting = (
        "AWS (norm)",
        "AWS (std)",
        "RadialProjection on SGD",
        "RadialProjection on AdamW",
        "RadialProjection, cosine gate",
        "WRS, rescaling",
        "monitor, logging",
        "suite, idle",
        "suite, logging",
    )
    for name in acting:
        # At least one operation for each of the 7 targeted weights.
        assert operations[name] >= bare + 7, name
        added, over_floors = map(float, rows[name][1:3])
        assert added > 0, name
        assert over_floors > 0, name
    assert waits["monitor, idle"] == waits["WRS, idle"] == 0
    assert waits["monitor, logging"] == 1


def test_projections_beside_peers_alone_in_a_process(tmp_path):
    rows = section("alone", tmp_path, fork=False)
    assert int(rows["RadialProjection on SGD"][1]) > int(rows["SGD fused"][1])
    assert int(rows["RadialProjection on AdamW"][1]) > int(rows["AdamW fused"][1])


def test_growth(tmp_path):
    rows = section("growth", tmp_path)
    for name in ("AWS (norm)", "RadialProjection", "monitor, logging"):
        sizes, _, _, per_layer = rows[f"{name}, layers (of 16 filters of 64 entries)"]
        assert sizes == "10, 20, 40"
        # Small layers are taken together: their number is no matter.
        assert float(per_layer) == 0, name


def test_training_steps(tmp_path):
    rows = section("training", tmp_path)
    # One row of the table remains for each model: its last one.
    for model in ("digits example", "ResNet-18, CIFAR"):
        _, what, _, share = rows[model]
        assert what == "suite, logging every 50 steps"
        assert float(share.removesuffix(" %")) > 0


def test_many_small_layers_cost_as_many_operations_as_few(tmp_path):
    rows = section("many", tmp_path)
    # A peer stands below them where it is installed.
    assert len([name for name in rows if not name.startswith("peer")]) == 11, list(rows)
    for name, cells in rows.items():
        # A peer that is installed takes each weight by itself.
        if name != "case" and not name.startswith("peer"):
            assert float(cells[-1]) == 0, name


def test_a_whole_fit_of_many_layers(tmp_path):
    rows = section("start", tmp_path)
    assert {"10", "20"} <= rows.keys()
    for layers in ("10", "20"):
        plain, beyond, _ = rows[layers]
        assert float(plain) > 0, layers
        assert float(beyond.split(" (")[0]) < 5, layers


def test_what_two_ranks_send(tmp_path):
    text = output_of(
        "cost.py", "--quick", "--threads", "1", "--only", "collectives", folder=tmp_path, fork=True
    )
    lines = [line for line in text.splitlines() if line.startswith("| monitor, logging")]
    whole, sharded = lines
    assert whole == "| monitor, logging | DDP (whole weights on every rank) | 0 | 0 |"
    # Sums over the ranks that share vectors, and the row's own.
    calls, sent = sharded.strip("| ").split(" | ")[-2:]
    assert int(calls) > 0
    assert int(sent) > 0
    assert text.count("| 0 | 0 | held |") == 2


@needs_wandb
def test_logging_in_a_trainer(tmp_path):
    # A fork would share the connection of this process to W&B.
    rows = section("logged", tmp_path, fork=False)
    # What is more than what depends on the machine, so only that both were measured.
    assert float(rows["no logging (floor)"][0]) > 0
    assert float(rows["NormDynamicsMonitor, CSV"][0]) > 0


def test_cuda(tmp_path):
    text = output_of("cost.py", "--quick", "--only", "cuda", folder=tmp_path, fork=True)
    assert "## CUDA" in text
    assert "not run: no CUDA device" in text or "| 16-mixed, fused, skipped steps" in text


@needs_wandb
def test_logging_cost(tmp_path):
    written = tmp_path / "logging_cost.md"
    arguments = ("--steps", "12", "--rounds", "1", "--layers", "4", "--out", str(written))
    text = output_of("logging_cost.py", *arguments, folder=tmp_path)
    assert written.read_text().strip() == text.strip()
    rows = rows_of(text)
    for logger in ("W&B", "CSV", "TensorBoard"):
        assert float(rows[f"NormDynamicsMonitor, {logger}"][0]) > 0
        assert len(rows[logger]) == 1


def test_scale_invariance(tmp_path):
    written = tmp_path / "scale_invariance.md"
    text = output_of("scale_invariance.py", "--out", str(written), folder=tmp_path, fork=True)
    assert written.read_text().strip() == text.strip()
    precision, missed, false_hits = rows_of(text)["graph (this package)"]
    assert precision == "float64"
    assert false_hits.startswith("0 of ")
    assert int(missed.split(" of ")[1]) > 0


def test_readme_s_picture(tmp_path):
    """What it shows: too slow after a drop by about the root of its factor, and not if rescaled."""
    picture = tmp_path / "drop.png"
    printed = output_of("lr_drop_picture.py", "--out", str(picture), folder=tmp_path, fork=True)
    plain, rescaled = (
        [float(number) for number in re.search(r"turn ([\d.]+) to ([\d.]+) times", line).groups()]
        for line in printed.splitlines()
        if " times what is expected" in line
    )
    assert max(plain) < 0.4
    assert min(rescaled) > 0.5
    assert max(rescaled) < 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_imports_are_cheap_and_bring_nothing_heavy(tmp_path):
    text = output_of("import_cost.py", "--rounds", "2", folder=tmp_path)
    rows = rows_of(text)
    # Shares: in a busy machine seconds say little.
    assert float(rows["`import lightning_normdyn`"][-1].rstrip(" |")) < 0.05
    assert float(rows["all public names, beside Lightning"][-1].rstrip(" |")) < 0.2
    assert "does not: nothing." in text


def test_the_gpu_script_runs_dry(tmp_path):
    text = output_of("gpu.py", "--dry-run", folder=tmp_path)
    assert "failed:" not in text
    assert text.count("\n## ") + text.startswith("## ") == 10
    assert "| tiny: projection, SGD |" in text
    rows = rows_of(text)
    for layout in ("DDP", "FSDP2", "TP"):
        assert rows[f"{layout}: bare"][-1] == "0"
        # Gates need sums of all weights, however these lie.
        gated = int(rows[f"{layout}: projection, cosine gate"][-1])
        assert gated >= (0 if layout == "DDP" else 2)


def test_the_gpu_script_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "gpu.md"
    output_of("gpu.py", "--dry-run", "--only", "graphs", "--out", str(out), folder=tmp_path)
    first = out.read_text()
    assert "## CUDA graphs" in first
    more = output_of(
        "gpu.py", "--dry-run", "--only", "resources", "--out", str(out), folder=tmp_path
    )  # fmt: skip
    assert "## CUDA graphs" not in more
    assert out.read_text().startswith(first.rstrip())
    assert "## Memory, compilation, host" in out.read_text()
