"""A W&B workspace for weight dynamics.

A short path to `lightning_normdyn.monitor.workspace`; nothing inside the package imports it.
"""

from lightning_normdyn.monitor.workspace import wandb_workspace

__all__ = ["wandb_workspace"]
