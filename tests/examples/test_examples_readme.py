"""examples/README.md names every example and every configuration, and every script explains
itself."""

from __future__ import annotations

import ast
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = {"cifar10.py", "data_modules.py", "image_classifier.py", "running.py"}


def test_every_example_is_in_the_table() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    for name in scripts | {f"cli/{path.name}" for path in (EXAMPLES / "cli").glob("*.yaml")}:
        assert name in text


def test_every_script_says_how_it_is_run() -> None:
    for path in EXAMPLES.glob("*.py"):
        if path.name not in SHARED:
            assert f"python examples/{path.name}" in (
                ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            ), path.name
