"""Every test runs with small models, our own warnings as errors (pyproject.toml), and nothing of
W&B outside its temporary folder."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys

import pytest
import torch
from flavour import FLAVOUR, OTHER, use_flavour

from lightning_normdyn.optimizers.step import HostCopy

os.environ.setdefault("WANDB_SILENT", "true")

use_flavour()

# Every Trainer reads the entry points of every installed package: a tenth of the time of a short
# fit. What is installed does not change while the tests run. Before Lightning is imported: it takes
# the function by its name.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.fixture(scope="session", autouse=True)
def _one_flavour():
    """A user of ``pytorch_lightning`` imports nothing of ``lightning``."""
    yield
    if FLAVOUR != "lightning.pytorch":
        assert OTHER not in sys.modules


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """A test leaves no file in the repository and no W&B setting behind."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    # Tables are read whole, whatever terminal or worker runs the tests.
    monkeypatch.setenv("COLUMNS", "200")
    # WandbLogger(offline=True) sets this for the whole process.
    monkeypatch.setenv("WANDB_MODE", "offline")
    torch.manual_seed(0)
    yield
    # What a test has compiled is not compiled for the next one: claims ask torch.compile's
    # counters.
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters.clear()


@pytest.fixture(params=["at once", "later"])
def arrival(request, monkeypatch):
    """Both ways for numbers to come to the host: from the CPU, and as from a GPU, one batch
    later."""
    if request.param == "later":
        monkeypatch.setattr(HostCopy, "arrives_later", True)


@pytest.fixture
def _no_run_left(monkeypatch):
    # MLflow 3 wants a database, which its light package (mlflow-skinny) does not bring; and it
    # would report its use to its makers.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    # Only tests of loggers import it: it takes a while.
    import wandb

    wandb.finish()
