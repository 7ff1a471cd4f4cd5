"""The README's snippets are files, and the files run; its tables name what exists."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_normdyn
from lightning_normdyn.monitor.history import load_history
from lightning_normdyn.monitor.quantities import markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages with snippets that are files beside README's.
PAGES = [
    ROOT / "docs" / "without_lightning.md",
    ROOT / "docs" / "callbacks" / "adaptive_weight_shrink.md",
]
CURVES = ROOT / "docs" / "reading_the_curves.md"
SNIPPETS = sorted((ROOT / "examples" / "readme").glob("*.py"))


def test_every_python_block_is_a_snippet_file():
    text = "".join([README, *(page.read_text(encoding="utf-8") for page in PAGES)])
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert sorted(blocks) == sorted(s.read_text(encoding="utf-8") for s in SNIPPETS)


def run_as_process(name: str, folder: Path) -> str:
    """What a snippet prints, in a folder of its own and with nothing of ours in the environment but
    the package."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("WANDB", "PL_", "PYTHON"))
    }
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "readme" / name)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_here(code: str) -> tuple[str, dict[str, Any]]:
    """What a snippet prints, and its names; in this process, which has imported torch already."""
    printed, names = io.StringIO(), {"__name__": "__main__"}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "snippet", "exec"), names)
    return printed.getvalue(), names


def test_snippets_need_no_file_of_the_examples():
    ours = {path.stem for path in (ROOT / "examples").glob("*.py")}
    for snippet in SNIPPETS:
        nodes = ast.walk(ast.parse(snippet.read_text(encoding="utf-8")))
        assert not {n.module for n in nodes if isinstance(n, ast.ImportFrom)} & ours, snippet


def run_in_this_process(name: str, folder: Path) -> str:
    """What a snippet prints in ``folder``, where every test stands."""
    assert Path.cwd() == folder
    return run_here((ROOT / "examples" / "readme" / name).read_text(encoding="utf-8"))[0]


def masked(text: str) -> list[str]:
    """The words of a table in order, numbers masked: how wide columns are depends on them."""
    text = re.sub(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?", "#", text)
    return re.sub("─+", "─", text).split()


def test_the_quickstart_is_short():
    code = (ROOT / "examples" / "readme" / "quickstart.py").read_text(encoding="utf-8")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


# 600 steps: in fewer, decay would not have acted, and there would be little to show.
@pytest.mark.slow
def test_the_quickstart_prints_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    printed = run_in_this_process("quickstart.py", tmp_path)
    shown = re.search(r"the worst weight first:\n\n```\n(.*?)```", README, re.DOTALL)[1]
    end = printed[printed.index("lightning-normdyn: after ") :]
    assert masked(end)[: len(masked(shown))] == masked(shown)


# Starting a process that imports Lightning takes seconds.
@pytest.mark.parametrize(
    "run", [run_in_this_process, pytest.param(run_as_process, marks=pytest.mark.slow)]
)
def test_the_run_with_a_rule_trains_logs_and_begins_with_the_alpha_of_its_own_rule(run, tmp_path):
    printed = run("with_a_rule.py", tmp_path)
    angle = float(re.search(r"angular update: ([\d.]+) rad per step", printed)[1])
    assert 1e-4 < angle < 0.1
    (metrics,) = tmp_path.glob("logs/lightning_logs/*/metrics.csv")
    with metrics.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["effective_lr/net.0.weight"]) > 0
    assert float(rows[-1]["normdyn/angular_update"]) == pytest.approx(angle, abs=1e-4)
    # "alpha = decay / (1 - momentum) / norm": to begin where the decay is that it replaces.
    code = (ROOT / "examples" / "readme" / "with_a_rule.py").read_text(encoding="utf-8")
    decay, momentum = (
        float(re.search(rf"{key}=([\d.e-]+)", code)[1]) for key in ("weight_decay", "momentum")
    )
    # Not among the five that loggers get of a weight.
    first = load_history(metrics.parent / "history.npz")[0]
    begins = [first[f"equivalent_weight_decay/net.{layer}.weight"] for layer in (0, 3)]
    assert begins == pytest.approx([decay / (1 - momentum)] * 2, rel=0.15)
    # The table says the same.
    assert f"(replaces {decay:g}, acting like {decay / (1 - momentum):g})" in " ".join(
        printed.split()
    )


def test_the_raw_loop_shrinks():
    code = (ROOT / "examples" / "readme" / "raw_loop.py").read_text(encoding="utf-8")
    assert "alpha=2.5e-3" in code
    norms = []
    for alpha in ("2.5e-3", "0.0"):
        _, names = run_here(code.replace("alpha=2.5e-3", f"alpha={alpha}"))
        norms.append(names["vectors"].norms().tolist())
    shrunk = [a / b for a, b in zip(*norms, strict=True)]
    # Three steps, each by lr · alpha · norm, with a norm of about 0.58.
    assert shrunk == pytest.approx([1 - 3 * 0.1 * 2.5e-3 * norm for norm in norms[1]], abs=2e-5)


def test_the_fabric_loop_tells_how_far_each_step_turned():
    code = (ROOT / "examples" / "readme" / "fabric_loop.py").read_text(encoding="utf-8")
    printed, _ = run_here(code)
    found = re.findall(r"step (\d): turned by ([\d.e-]+) rad", printed)
    assert [int(step) for step, _ in found] == [1, 2, 3]
    # A step of AdamW moves an entry by at most about lr: 27 entries of a filter of norm 0.58.
    assert all(1e-4 < float(angle) < 1.2 * 1e-3 * 27**0.5 / 0.58 for _, angle in found)


def test_tables_name_every_callback():
    for name in lightning_normdyn.__all__:
        if name.endswith(("Shrink", "Rescaling", "Projection", "Monitor", "Replay", "Decay")):
            assert f"`{name}`" in README, name


def test_the_table_of_log_keys_is_that_of_the_quantities():
    table = markdown_table()
    assert table in CURVES.read_text(encoding="utf-8"), (
        f"the table of what is logged in {CURVES.name} must be:\n{table}"
    )


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def run_in(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in ``folder``, as a person without a checkout runs it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = {**kept, "COLUMNS": "110", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.long
def test_the_wheel_in_an_empty_environment_does_what_readme_shows(tmp_path):
    pip = (sys.executable, "-m", "pip")
    built = run_in(*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT, folder=tmp_path)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("no package index can be reached")
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    run_in(sys.executable, "-m", "venv", tmp_path / "env", folder=tmp_path)
    scripts = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    installed = run_in(
        scripts / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        constraints,
        wheel,
        folder=tmp_path,
    )
    assert installed.returncode == 0, installed.stderr[-3000:]

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "quickstart.py").write_text(code, encoding="utf-8")
    done = run_in(scripts / "python", "quickstart.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.search(r"the worst weight first:\n\n```\n(.*?)```", README, re.DOTALL)[1]
    end = done.stdout[done.stdout.index("lightning-normdyn: after ") :]
    assert masked(end)[: len(masked(shown))] == masked(shown)

    # The example is in the wheel; what it imports is an extra.
    demo = run_in(scripts / "lightning-normdyn", "demo", folder=tmp_path)
    assert demo.returncode == 1
    assert "`pip install 'lightning-normdyn[examples]'`" in demo.stderr
