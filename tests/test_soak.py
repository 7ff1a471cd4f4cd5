"""A long run costs at its end what it cost at its beginning: memory, checkpoint, operations."""

from __future__ import annotations

import gc
import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from models import fit, loader, make, sgd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    InputSpanMonitor,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.ledger import Ledger


class Counts(TorchDispatchMode):
    """How often each operation runs; one that waits for the device (`_local_scalar_dense`) is among
    them."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Looks(L.Callback):
    """At some steps: objects alive, resident memory, size of the callbacks' state without
    histories, operations of the step."""

    def __init__(self, steps, monitor):
        self.steps, self.monitor = steps, monitor
        self.objects, self.memory, self.sizes, self.operations = [], [], [], []
        self.most_rows = 0
        self.counting = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 in self.steps:
            self.counting = Counts()
            self.counting.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.most_rows = max(self.most_rows, len(self.monitor.history))
        if self.counting is None:
            return
        self.counting.__exit__(None, None, None)
        self.operations.append(self.counting.found)
        self.counting = None
        self.sizes.append(sum(size_of(c.state_dict()) for c in trainer.callbacks if c.state_dict()))
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]))


def size_of(state: dict[str, Any]) -> int:
    """Without what is bounded but thinned again and again, so that it is long or short by chance:
    histories, and the windows of balances (tests/monitor/test_balance.py)."""
    file = io.BytesIO()
    extra = {
        key: value
        for key, value in state.get("extra", {}).items()
        if key not in ("history", "balances")
    }
    torch.save({**state, "extra": extra}, file)
    return len(file.getvalue())


def without_decay(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def record(path: Path, steps: int) -> None:
    """The history of a run, for a replay to follow."""
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    module = make(make_optimizer=without_decay)
    fit(module, [monitor], loader(8 * 100), max_steps=steps, max_epochs=-1)
    monitor.history.save(path)


def soak_replay(steps: tuple[int, ...], path: Path) -> Looks:
    """The replay cannot stand beside the other rules, so it is soaked alone."""
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    look = Looks(steps, monitor)
    module = make(make_optimizer=without_decay)
    callbacks = [EffectiveLRReplay(path), monitor, look]
    fit(module, callbacks, loader(8 * 100), max_steps=steps[-1], max_epochs=-1)
    return look


def soak(steps: tuple[int, ...], every_n_steps: int = 1) -> Looks:
    monitor = NormDynamicsMonitor(every_n_steps, per_vector=True, tables=False)
    look = Looks(steps, monitor)
    callbacks = [
        AdaptiveWeightShrink(0.5, params="net.0.weight"),
        RadialProjection(params="net.0.weight"),
        WeightRescaling(3, params="net.0.weight"),
        LRDropRescaling(exponent=0.3, params="net.3.weight"),
        InputSpanMonitor(10, max_samples=64),
        monitor,
        look,
    ]
    fit(make(make_optimizer=sgd), callbacks, loader(8 * 100), max_steps=steps[-1], max_epochs=-1)
    return look


def short_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of 16 rows at most, which are full, and thinned again, within a short run."""
    short = partial(History, 16, max_vector_bytes=2**12)
    # A new fit's ledger makes one, and so does a ledger that is read from a checkpoint.
    monkeypatch.setattr("lightning_normdyn.monitor.ledger.History", short)
    monkeypatch.setattr(
        "lightning_normdyn.monitor.recording.Ledger", lambda: Ledger(history=short())
    )


@pytest.mark.slow
def test_once_histories_are_full_nothing_grows(monkeypatch):
    short_histories(monkeypatch)
    look = soak(
        (150, 210, 270)
    )  # multiples of 3 and of half the epochs: the same rules act in each of these steps
    assert look.operations[1] == look.operations[2]
    assert look.sizes[1] <= look.sizes[0] + 64  # counters that are written with more digits
    assert look.most_rows <= 16
    assert look.objects[2] <= look.objects[1] + 60  # a history that was just thinned is half empty


@pytest.mark.slow
def test_a_replay_costs_at_its_end_what_it_cost_at_its_beginning(monkeypatch, tmp_path):
    record(tmp_path / "recorded.npz", 90)
    short_histories(monkeypatch)
    look = soak_replay((50, 70, 90), tmp_path / "recorded.npz")
    assert look.operations[1] == look.operations[2]
    assert look.sizes[1] <= look.sizes[0] + 64
    assert look.objects[2] <= look.objects[1] + 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc"
)
def test_twenty_thousand_steps_end_as_they_began():
    # Operations are compared in the middle of epochs in which the same rules act: at the end of a
    # chosen epoch, what InputSpanMonitor works out depends on the data.
    # All of them steps that log: a fit that ends at another one keeps that step's row apart.
    steps = (2_001, 4_950, 10_002, 19_950, 20_001)
    # As often as weights are rescaled, and seldom enough for a history to fill up only after 12,288
    # steps.
    look = soak(steps, every_n_steps=3)
    at = dict(zip(steps, range(len(steps)), strict=True))
    assert look.memory[at[20_001]] <= 1.02 * look.memory[at[10_002]]
    assert look.sizes[at[20_001]] <= look.sizes[at[2_001]] + 256
    assert look.operations[at[4_950]] == look.operations[at[19_950]]
    assert look.most_rows <= 4096
