"""The GPU programs as text, and compiled for GPUs that are not here."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_process import needs_triton

from lightning_normdyn.geometry import triton_functions, triton_programs


def test_the_file_knows_only_the_functions_of_the_package():
    """It is imported by name, where an import of ours could hide a circle."""
    assert imports(triton_programs) == {
        "__future__", "collections.abc", "contextlib", "linecache", "typing", "triton.language", FUNCTIONS,
    }  # fmt: skip
    assert imports(triton_functions) == {"__future__", "typing", "triton", "triton.language"}


FUNCTIONS = ".triton_functions"


def imports(module) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add("." * node.level + node.module)
        elif isinstance(node, ast.ImportFrom):
            names.update("." * node.level + alias.name for alias in node.names)
    return names


@pytest.mark.slow
@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 float16 float64"])
def test_every_program_compiles_without_spills(dtypes, tmp_path):
    """In a process of its own: where Triton interprets it does not compile."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NORMDYN_KERNELS")}
    # Afresh, so that nothing comes from a cache.
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_programs.py")
    done = subprocess.run(
        [sys.executable, str(script), *dtypes.split()],
        cwd=script.parents[2], env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert done.stdout.count("sm_80") == done.stdout.count("sm_90") > 10
