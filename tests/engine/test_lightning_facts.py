"""Lightning's private attributes are read in one file, and they are there in this release of
Lightning."""

from __future__ import annotations

import ast
from pathlib import Path

import models
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger

import lightning_normdyn
from lightning_normdyn.engine import lightning_facts
from lightning_normdyn.engine.lightning_facts import (
    accumulates_batch,
    batches_that_stepped,
    callback_metrics,
    callbacks_of,
    is_rank_zero,
    log_every,
    prefix_of,
    progress_bar_metrics,
    set_callbacks,
    wrapped_optimizers,
)

ROOT = Path(lightning_normdyn.__file__).parent
HOME = Path(lightning_facts.__file__)


def private_names(path: Path) -> set[str]:
    """Names with one leading underscore that a file reads of others: as an attribute, by getattr,
    or by an import."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


OF_LIGHTNING = private_names(HOME)


def test_the_names_are_found():
    assert {"_batches_that_stepped", "_get_rank", "_lightning_optimizers"} <= OF_LIGHTNING


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(ROOT.rglob("*.py")) if p != HOME],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_other_file_reads_them(path):
    assert not private_names(path) & OF_LIGHTNING


class Reader(Callback):
    """Reads everything in the middle of a fit."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((batches_that_stepped(trainer), accumulates_batch(trainer)))
        self.wrapped = wrapped_optimizers(trainer)
        self.every = log_every(trainer)
        callback_metrics(trainer)["told"] = torch.tensor(2.0)
        progress_bar_metrics(trainer)["shown"] = 3.0


def test_a_fit_shows_what_is_read():
    reader = Reader()
    trainer = models.fit(
        models.Net(), [reader], max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=7
    )
    steps = [count for count, _ in reader.seen]
    assert steps == [i // 2 for i in range(len(steps))]
    assert [accumulating for _, accumulating in reader.seen[:2]] == [True, False]
    assert [isinstance(o, LightningOptimizer) for o in reader.wrapped] == [True]
    assert reader.every == 7
    assert trainer.callback_metrics["told"] == 2.0
    assert trainer.progress_bar_metrics["shown"] == 3.0
    assert is_rank_zero()
    set_callbacks(trainer, [reader])
    assert callbacks_of(trainer) == [reader]


def test_a_logger_s_prefix(tmp_path):
    assert prefix_of(CSVLogger(tmp_path, prefix="run")) == "run"
    assert prefix_of(CSVLogger(tmp_path)) == ""
