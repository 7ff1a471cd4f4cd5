"""The site: it builds without a warning, has an entry for every public name and a page for every
callback, and what it shows runs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import lightning_normdyn
from lightning_normdyn.theory.words import Kind

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Modules whose names are public beside those of the package itself.
MODULES = (
    "equilibrium",
    "functional",
    "history",
    "lr_schedules",
    "plots",
    "report",
    "steering",
    "targets",
    "workspace",
)
# How each kind of verdict begins on the page, where it is not the kind itself.
WORDS = {
    "too fast": "Too fast",
    "too slow": "Too slow",
    "growing": "still growing",
    "shrinking": "still shrinking",
    "as expected": "As expected now",
    "too early": "too few rows",
    "unknown": "no balance",
}


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def public_names() -> list[str]:
    names = [f"lightning_normdyn.{name}" for name in lightning_normdyn.__all__]
    for module in MODULES:
        own = importlib.import_module(f"lightning_normdyn.{module}")
        # A short path to what the package itself has is no second entry.
        others = [name for name in own.__all__ if name not in lightning_normdyn.__all__]
        names += [f"lightning_normdyn.{module}.{name}" for name in others]
    own = importlib.import_module("lightning_normdyn.metrics")
    for name, value in vars(own).items():
        if getattr(value, "__module__", "") == own.__name__ and not name.startswith("_"):
            names.append(f"lightning_normdyn.metrics.{name}")
    return names


def test_modules_with_public_names_are_all_known_here():
    with_names = {
        path.stem
        for path in Path(lightning_normdyn.__file__).parent.glob("*.py")
        if "\n__all__ = " in path.read_text(encoding="utf-8")
    }
    # Nobody outside uses the names of parametrizations.py.
    assert with_names - {"__init__", "parametrizations"} == set(MODULES)


def test_every_name_of_the_package_is_asked_for_on_one_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md")))
    for name in lightning_normdyn.__all__:
        found = re.findall(rf"^\.\. auto\w+:: lightning_normdyn\.{name}$", pages, re.MULTILINE)
        assert len(found) == 1, name
    for module in (*MODULES, "metrics"):
        assert f".. automodule:: lightning_normdyn.{module}\n" in pages, module


def test_every_callback_has_a_page():
    index = text_of("callbacks/index.md")
    callbacks = [
        path.stem
        for path in sorted((ROOT / "lightning_normdyn" / "callbacks").glob("*.py"))
        if path.stem != "__init__"
    ]
    assert len(callbacks) >= 7
    for callback in callbacks:
        assert f"\n{callback}\n" in index, callback
        page = text_of(f"callbacks/{callback}.md")
        for part in ("**When.**", "**Compatibility.**", ".. autoclass::"):
            assert part in page, (callback, part)


def test_every_verdict_is_on_the_page_about_curves():
    page = text_of("reading_the_curves.md")
    for kind in get_args(Kind):
        assert WORDS.get(kind, kind) in page, kind


def test_every_picture_of_a_verdict_is_made_by_a_run():
    sys.path.insert(0, str(DOCS))
    try:
        from draw_verdicts import RUNS
    finally:
        sys.path.remove(str(DOCS))
    shown = re.findall(r"\]\(pictures/(\w+)\.png\)", text_of("reading_the_curves.md"))
    assert sorted(shown) == sorted(RUNS)
    for name in RUNS:
        # Small: they are in the repository.
        assert (DOCS / "pictures" / f"{name}.png").stat().st_size < 60_000, name


def test_without_chromium_the_picture_of_the_report_stays_and_it_is_said(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(DOCS))
    script = importlib.import_module("draw_report")
    monkeypatch.setattr(script, "chromium", lambda: None)
    script.main(["--out", str(tmp_path / "report.png")])
    assert "No Chromium was found" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_snippets_run():
    """Those of the first three run in test_extending.py and test_readme.py."""
    elsewhere = ("extending.md", "without_lightning.md", "adaptive_weight_shrink.md")
    for path in sorted(DOCS.rglob("*.md")):
        if path.name in elsewhere:
            continue
        for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            exec(compile(block, str(path), "exec"), {"__name__": "snippet"})


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    """What ``make docs`` does."""
    built = tmp_path / "site"
    for command in (
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, built],
        [sys.executable, DOCS / "check_links.py", built],
    ):
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=1000
        )
        assert done.returncode == 0, done.stdout + done.stderr
    from sphinx.util.inventory import InventoryFile

    with (built / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    entries = {name for kind, own in inventory.items() if kind.startswith("py:") for name in own}
    assert [name for name in public_names() if name not in entries] == []
