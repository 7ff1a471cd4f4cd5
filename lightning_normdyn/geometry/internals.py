"""Reads private attributes of torch and DeepSpeed, each behind a check that names the tested
version."""

from __future__ import annotations

from typing import Any

import torch

from lightning_normdyn.errors import NotSupportedError

TESTED = "torch 2.13"


def private(
    owner: Any,
    *names: str,
) -> list[Any]:
    """Attributes that are not part of a public interface.

    Raises:
        NotSupportedError: if one of them is not there.
    """
    # All are looked for before the first is used, so that the message names the layout, not a
    # failure somewhere behind it.
    for name in names:
        if not hasattr(owner, name):
            raise untested(f"{type(owner).__name__} has no `{name}`")
    return [getattr(owner, name) for name in names]


def untested(what: str) -> NotSupportedError:
    """The error that says ``what`` is otherwise than in the tested version."""
    return NotSupportedError(
        f"{what}. The layout of sharded weights was tested with {TESTED}; here is torch "
        f"{torch.__version__}. Use the tested version, or another strategy."
    )
