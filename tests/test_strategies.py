"""The same numbers on every strategy: each callback on several ranks against one process and the same global batches."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import strategies
import torch
from ranks import run_ranks
from strategies import DEEPSPEED, STEPS, STRATEGIES, adamw, fit, sgd
from torch import Tensor

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor, RadialProjection, WeightRescaling

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# The monitor goes with each of them, so that logged values are compared where somebody writes, too.
CALLBACKS: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], Any]]] = {
    "AWS norm": (lambda: [AdaptiveWeightShrink(0.5)], sgd),
    "AWS std": (lambda: [AdaptiveWeightShrink(1.0, statistic="std")], adamw),
    "WRS": (lambda: [WeightRescaling(2)], adamw),
    "WRS to initial norms": (lambda: [WeightRescaling(3, target_norm="initial")], sgd),
    "projection always": (lambda: [RadialProjection()], adamw),
    "projection cosine": (lambda: [RadialProjection(gate="cosine", delta=0.5)], sgd),
    "AWS + projection": (lambda: [RadialProjection(), AdaptiveWeightShrink(0.5)], sgd),
    "monitor": (lambda: [], adamw),
}


def fits(strategy: strategies.Strategy, dtype: torch.dtype) -> dict[str, Any]:
    """In a rank: what every entry of CALLBACKS leads to."""
    found = {}
    for name, (writers, optimizer) in CALLBACKS.items():
        monitor = NormDynamicsMonitor(1, per_vector=True)
        _, module, _ = fit(strategy, lambda w=writers, m=monitor: [*w(), m], dtype=dtype, optimizer=optimizer)  # type: ignore[misc]
        found[name] = (module.final, list(monitor.history), monitor.history.meta["targets"])
    return found


@functools.cache
def outcome(name: str, dtype: torch.dtype) -> dict[int, Any]:
    """All ranks of one strategy; forked once."""
    if name in DEEPSPEED and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `make test-deepspeed` does it in an environment of its own")
    strategy = {**STRATEGIES, **DEEPSPEED}[name]
    return run_ranks(fits, strategy.world, (strategy, dtype), timeout=200)


@functools.cache
def reference(dtype: torch.dtype) -> dict[str, Any]:
    """One process. ddp as well, since that is how Lightning treats data alike."""
    return run_ranks(fits, 1, (STRATEGIES["ddp"], dtype), timeout=200)[0]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in b)


def assert_same_rows(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float, angle_tolerance: float) -> None:
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if key.startswith(("angular_update", "effective_step_size", "normdyn/angular_update", "normdyn/effective_step_size")):
                assert mine[key] == pytest.approx(value, rel=angle_tolerance), key
            else:
                assert abs(mine[key] - value) <= tolerance * max(1, abs(value)) or math.isnan(value), (key, mine[key], value)


QUICK = ["ddp", "ddp, ZeroRedundancyOptimizer", "FSDP2", "TP", "FSDP1 FULL_SHARD"]
MATRIX = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STRATEGIES]
MATRIX += [pytest.param(name, marks=pytest.mark.deepspeed) for name in DEEPSPEED]


@pytest.mark.parametrize("callbacks", CALLBACKS)
@pytest.mark.parametrize("strategy", MATRIX)
def test_matrix(strategy: str, callbacks: str):
    dtype = {**STRATEGIES, **DEEPSPEED}[strategy].dtypes[0]
    expected, rows, targets = reference(dtype)[callbacks]
    answers = {rank: found[callbacks] for rank, found in outcome(strategy, dtype).items()}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for weights, _, _ in answers.values():
        assert distance(weights, expected) <= tolerance
    assert answers[0][2] == targets
    # Values are logged in float32.
    assert_same_rows(answers[0][1], rows, 1e-5, 1e-3)
    assert not any(len(history) for rank, (_, history, _) in answers.items() if rank)
