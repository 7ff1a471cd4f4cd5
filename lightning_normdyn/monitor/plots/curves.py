"""The curves of a history by layer: which ones a picture shows, and all of them as one table.

Legend: ``l`` layers (parameters), ``s`` recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.records import Floats, Ints

Doubles = NDArray[np.float64]


def layer_names(history: History, quantity: str) -> list[str]:
    """Parameters that a quantity was recorded of, in the order of the network."""
    recorded = history.keys()
    return [key[len(quantity) + 1 :] for key in recorded if key.startswith(f"{quantity}/")]


def curves_of(history: History, quantity: str) -> dict[str, tuple[Ints, Floats]]:
    """The curves of a quantity by parameter name, in the order of the network."""
    curves = recorded_curves(history, quantity)
    if not curves:
        keys = history.keys()
        recorded = sorted(
            {key.split("/")[0] for key in keys if "/" in key and not key.startswith("normdyn/")}
        )
        found = f"it has {', '.join(recorded)}" if recorded else "it has no curves of layers at all"
        raise NormDynError(
            f"curves of `{quantity}` were asked for, and this history has none: {found}."
        )
    return curves


def recorded_curves(history: History, quantity: str) -> dict[str, tuple[Ints, Floats]]:
    """The curves of a quantity by parameter name, in the order of the network; empty where the
    history has none."""
    curves = {name: history.column(f"{quantity}/{name}") for name in layer_names(history, quantity)}
    return {name: curve for name, curve in curves.items() if len(curve[0])}


def invariant_layers(history: History) -> set[str] | None:
    """Names of the layers that the run knows to be scale-invariant; None where it does not say (a
    CSV log without predictions)."""
    targets = history.meta.get("targets")
    known: set[str] = set()
    invariant: set[str] = set()
    for name, about in (targets if isinstance(targets, dict) else {}).items():
        kind = about.get("scale_invariant") if isinstance(about, dict) else None
        if isinstance(kind, str):
            known.add(name)
            if kind not in ("no", "unknown"):
                invariant.add(name)
    if known:
        return invariant
    return (
        set(layer_names(history, "equilibrium_angular_update")) or None
    )  # predictions are made of scale-invariant layers only


def invariant_among(names: Iterable[str], history: History) -> tuple[list[str], str]:
    """Those of these layers that are scale-invariant, or all of them where that leaves none; and
    what to call them."""
    invariant = invariant_layers(history) or set()
    chosen = [name for name in names if name in invariant]
    return (chosen, "scale-invariant layers") if chosen else (list(names), "all layers")


def over_layers(reduce: Callable[..., Any], table: Doubles) -> Doubles:
    """``reduce`` over the layers of a table ``(l, s)``, with NaN (and without numpy's warning) at
    steps where no layer has a value."""
    known = ~np.isnan(table).all(axis=0)
    found = np.asarray(reduce(table[:, known], axis=0))
    result = np.full((*found.shape[:-1], table.shape[1]), np.nan)
    result[..., known] = found
    return result


def as_table(curves: Mapping[str, tuple[Ints, Floats]]) -> tuple[Ints, Doubles]:
    """All curves on the union of their steps: steps ``(s,)``, values ``(l, s)`` with NaN where a
    layer has none."""
    steps = np.unique(np.concatenate([steps for steps, _ in curves.values()]))
    table = np.full((len(curves), len(steps)), np.nan)
    for row, (at, values) in zip(table, curves.values(), strict=True):
        row[np.searchsorted(steps, at)] = values
    return steps, table
