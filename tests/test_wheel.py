"""The wheel as a person gets it: installed into an empty environment, README's first minute."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import README, masked

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
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
def test_the_wheel_in_an_empty_environment_does_what_readme_shows(tmp_path):
    pip = (sys.executable, "-m", "pip")
    built = run(*pip, "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT, folder=tmp_path)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("no package index can be reached")
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env", folder=tmp_path)
    scripts = tmp_path / "env" / "bin"
    constraints = ROOT / "constraints.txt"
    installed = run(
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
    done = run(scripts / "python", "quickstart.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.search(r"the worst weight first:\n\n```\n(.*?)```", README, re.DOTALL)[1]
    end = done.stdout[done.stdout.index("lightning-normdyn: after ") :]
    assert masked(end)[: len(masked(shown))] == masked(shown)

    # The example is in the wheel; what it imports is an extra.
    demo = run(scripts / "lightning-normdyn", "demo", folder=tmp_path)
    assert demo.returncode == 1
    assert "`pip install 'lightning-normdyn[examples]'`" in demo.stderr
