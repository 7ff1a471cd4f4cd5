"""Tests that need Triton's interpreter, in a process of their own: Triton reads once, when it is
imported, whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = {"TRITON_INTERPRET": "1", "NORMDYN_KERNELS": "triton"}
ROOT = Path(__file__).parents[1]


def run_tests(*arguments: str) -> None:
    """Run pytest with Triton's interpreter; fails where one of them
    fails, and where none is found."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | INTERPRETED, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
