"""Whether what a checkpoint holds for a monitor's history is one: it is read before it is
believed."""

from __future__ import annotations

from typing import Any

from lightning_normdyn.engine.value_checks import DAMAGE, require
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History


def check_history(value: Any, where: str) -> None:
    """What `History.state_dict` gives."""
    require(
        isinstance(value, dict) and isinstance(value.get("header"), str), f"{where} is no history"
    )
    # Loaded, and not only looked at: nothing less shows whether a later load will succeed.
    try:
        History().load_state_dict(value)
    except DAMAGE as error:
        raise NormDynError(f"{where} is no history ({type(error).__name__}: {error})") from error


__all__ = ["check_history"]
