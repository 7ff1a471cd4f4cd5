"""Reads private attributes of torch and DeepSpeed, each behind a check that names the versions
this was tested with.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_normdyn.errors import NotSupportedError

TESTED = "torch 2.13"


def private(owner: Any, *names: str) -> list[Any]:
    """Attributes that are not part of torch's public interface."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise untested(f"{type(owner).__name__} has no `{missing[0]}`")
    return [getattr(owner, name) for name in names]


def untested(what: str) -> NotSupportedError:
    """The error that says ``what`` is not as it was where this was tested."""
    return NotSupportedError(
        f"{what}. The layout of sharded weights was tested with {TESTED}; here is torch "
        f"{torch.__version__}. "
        "Use the tested version, or another strategy."
    )
