"""The README's snippets are files, and the files run; its tables name what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_normdyn
from lightning_normdyn.callbacks.norm_dynamics_monitor import QUANTITIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = sorted((ROOT / "examples" / "readme").glob("*.py"))


def test_every_python_block_is_a_snippet_file():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sorted(blocks) == sorted(s.read_text(encoding="utf-8") for s in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.stem)
def test_snippet_runs(snippet, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(snippet)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tables_name_every_callback_and_every_log_key():
    for name in lightning_normdyn.__all__:
        if name.endswith(("Shrink", "Rescaling", "Projection", "Monitor", "Replay")):
            assert f"`{name}`" in README, name
    for quantity in QUANTITIES:
        assert f"`{quantity}`" in README, quantity


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
