"""One HTML file about one or several runs.

A short path to the files of `lightning_normdyn.monitor.report`; nothing inside the package imports
it.
"""

from lightning_normdyn.monitor.report.page import write_report
from lightning_normdyn.monitor.report.runs import load_run

__all__ = ["load_run", "write_report"]
