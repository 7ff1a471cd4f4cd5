"""The rows of a run, in memory and in one file.

A short path to `lightning_normdyn.monitor.history`; nothing inside the package imports it.
"""

from lightning_normdyn.monitor.history import (
    Event,
    History,
    load_history,
)

__all__ = [
    "Event",
    "History",
    "load_history",
]
