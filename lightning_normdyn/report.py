"""One HTML file about one or several runs.

A short path to the files of `lightning_normdyn.monitor.report`; nothing inside the package imports
it.
"""

from lightning_normdyn.monitor.report.page import load_run, write_report

__all__ = ["load_run", "write_report"]
