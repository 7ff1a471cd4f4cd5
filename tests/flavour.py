"""Runs the tests' own modules with the other of Lightning's two packages.

With ``NORMDYN_TEST_FLAVOUR=pytorch_lightning`` in the environment, ``import lightning as L`` in a
file of this folder, or in a script of the docs that a test imports, imports ``pytorch_lightning``.
Nobody pretends to be another module: what the package under test imports, and what it finds in
``sys.modules``, is what a user of that package has.
"""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from types import ModuleType
from typing import Any

FLAVOUR = os.environ.get("NORMDYN_TEST_FLAVOUR", "lightning.pytorch")
"""The package whose Trainer, LightningModule, loggers and strategies the tests use."""

OTHER = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning"}[FLAVOUR]
"""What a user of it does not import."""

# The longest name first: `lightning` alone stands for its pytorch part.
_NAMES = {
    "lightning.pytorch": "pytorch_lightning",
    "lightning.fabric": "lightning_fabric",
    "lightning": "pytorch_lightning",
}
# The tests, and the docs' scripts, which they import.
_TRANSLATED = tuple(str(Path(__file__).parents[1] / folder) for folder in ("tests", "docs"))


def translated(name: str) -> str:
    """The name of a module of ``lightning`` in `FLAVOUR`; others stay as they are.

    >>> translated("lightning.pytorch.loggers") == f"{FLAVOUR}.loggers"
    True
    """
    if FLAVOUR == "lightning.pytorch":
        return name
    for old, new in _NAMES.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def use_flavour() -> None:
    """Translate what test modules import; once, before any of them is imported."""
    if FLAVOUR == "lightning.pytorch":
        return
    original = builtins.__import__

    def importing(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        importer = (globals or {}).get("__file__") or ""
        if importer.startswith(_TRANSLATED) and not level:
            name = translated(name)
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = importing
