"""The documents name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_normdyn"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_architecture_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in PACKAGE.rglob("*.py")}
    folders = {f"{path.name}/" for path in PACKAGE.rglob("*") if path.is_dir()}
    named = set(re.findall(r"`(\w+\.py)`", text)) - {"tests/test_package.py"}
    assert len(named) > 40
    assert named <= files
    assert set(re.findall(r"`(\w+/)`", text)) <= folders


def test_architecture_shows_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("```")[1]
    for path in PACKAGE.iterdir():
        if path.name in ("__init__.py", "__pycache__", "py.typed"):
            continue
        assert path.name in tree, path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|docs|examples|benchmarks)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_workflow_and_hooks_call_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in (".github/workflows/ci.yml", ".pre-commit-config.yaml", "CONTRIBUTING.md"):
        called = re.findall(r"make ([\w-]+)", (ROOT / name).read_text(encoding="utf-8"))
        called = [word for word in called if word not in ("targets", "and")]
        assert called
        assert set(called) <= targets, name
