"""The callbacks, one file per rule. Files are found by themselves: a new rule is its file, and its
name in the public list of the package."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def __getattr__(name: str) -> Any:
    for file in iter_modules(__path__):
        value = getattr(import_module(f"{__name__}.{file.name}"), name, None)
        if isinstance(value, type):
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
