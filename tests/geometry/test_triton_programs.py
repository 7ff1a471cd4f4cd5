"""The GPU programs as text: what everybody has who does not have Triton."""

from __future__ import annotations

import ast
import inspect

from lightning_normdyn.geometry import triton_programs


def test_the_file_imports_nothing_of_the_package():
    """It is imported by name, where an import of ours could hide a circle."""
    tree = ast.parse(inspect.getsource(triton_programs))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            names.add(node.module)
    assert names == {"__future__", "linecache", "typing", "triton"}
