"""Every pair of callbacks on one weight does what the table of docs/callbacks/index.md says: both
act, one has no effect, or the pair is refused by name."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TARGETS
from models import fit, make, same, weights_of

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    LRDropRescaling,
    NormDynamicsMonitor,
    NotSupportedError,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
)

PAGE = Path(__file__).parent.parent / "docs" / "callbacks" / "index.md"
OUTCOMES = {"both act", "no effect", "refused"}


def dropping(optimizer: torch.optim.Optimizer) -> Any:
    """One drop, for those who act on it."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.1)


def ends(callbacks: list[Any], decay: float = 0.1) -> dict[str, torch.Tensor]:
    module = make(
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=decay),
        make_scheduler=dropping,
    )
    fit(module, callbacks, max_steps=6)
    return weights_of(module)


@functools.cache
def recorded() -> Path:
    """The history of a run that decayed more."""
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    ends([monitor], decay=0.6)
    path = Path(tempfile.mkdtemp()) / "history.npz"
    monitor.history.save(path)
    return path


# All of them on the same two weights.
MAKE: dict[str, Callable[[], Any]] = {
    "AdaptiveWeightShrink": lambda: AdaptiveWeightShrink(0.5),
    "WeightRescaling": lambda: WeightRescaling(4),
    "RadialProjection": lambda: RadialProjection(),
    "WeightDecay": lambda: WeightDecay(0.4, params=TARGETS),
    "RotationControl, norm held": lambda: RotationControl(0.02, params=TARGETS),
    "RotationControl, norm free": lambda: RotationControl(0.03, norm="free", params="net.[03].*t"),
    "RadialBrake": lambda: RadialBrake(0.0, 0.0, params=TARGETS),
    "EffectiveLRReplay": lambda: EffectiveLRReplay(recorded()),
    "LRDropRescaling": lambda: LRDropRescaling(exponent=0.3),
}


@functools.cache
def alone(name: str) -> dict[str, torch.Tensor]:
    return ends([MAKE[name]()] if name else [])


def table() -> dict[tuple[str, str], str]:
    """The table: what becomes of a pair, by its names in alphabetical order."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| together |"))
    found = {}
    columns = [cell.strip().replace("`", "") for cell in lines[first].split("|")[2:-1]]
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :]):
        row, *cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        for column, cell in zip(columns, cells, strict=True):
            if cell:
                found[row, column] = cell
    return found


PAIRS = table()


def test_the_table_has_every_pair_once():
    pairs = {frozenset(pair) for pair in PAIRS}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(MAKE, 2)}
    assert len(PAIRS) == len(pairs)
    assert set(PAIRS.values()) == OUTCOMES


@pytest.mark.sampled(4)
@pytest.mark.parametrize("pair", list(PAIRS), ids=" + ".join)
def test_a_pair_does_what_the_table_says(pair: tuple[str, str]) -> None:
    outcome = PAIRS[pair]
    row, column = pair
    kinds = {name.partition(",")[0] for name in pair}
    for order in (pair, pair[::-1]):
        callbacks = [MAKE[name]() for name in order]
        if outcome == "refused":
            with pytest.raises(NotSupportedError, match=r"`net\.\d\.weight`") as refusal:
                ends(callbacks)
            assert all(kind in str(refusal.value) for kind in kinds)
            assert "different `params`" in str(refusal.value)
            continue
        together = ends(callbacks)
        assert not same(together, alone("")), "one of the two does something"
        assert not same(together, alone(row))
        # The one in the row has no effect beside the one in the column.
        assert same(together, alone(column)) == (outcome == "no effect")
