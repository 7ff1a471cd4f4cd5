"""The rows of a run, in memory and in one file.

A short path to `lightning_normdyn.monitor.history`; nothing inside the package imports it.
"""

from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.monitor.records import Event

__all__ = ["Event", "History", "load_history"]
