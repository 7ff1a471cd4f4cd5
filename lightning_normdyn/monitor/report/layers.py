"""Each layer of a run in one row of numbers: what the report's table shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import monitored

_MOST_STEPS = 2**53


class LayerSummary(NamedTuple):
    """A layer of a run at its end; None where the run did not record a number."""

    run: str
    name: str
    kind: str
    vectors: int | None
    first_norm: float | None
    last_norm: float | None
    effective_lr: float | None
    angular_update: float | None
    prediction: float | None
    ratio: float | None
    said: str | None
    """What the monitor said of it at the end of the fit, which knows more than the curves do."""

    @property
    def verdict(self) -> str:
        """The monitor's own; else how the angular update compares with its prediction."""
        if self.said and self.said != "-":
            return self.said
        if self.ratio is None:
            return "–"
        return (
            "as predicted"
            if 0.9 <= self.ratio <= 1.1
            else "turns faster"
            if self.ratio > 1
            else "turns slower"
        )


def summaries(label: str, history: History) -> list[LayerSummary]:
    """One row per layer of a run, in the order of the network."""
    targets = history.meta.get("targets")
    keys = history.keys()
    of_layers = {quantity.name for quantity in monitored()}
    names = dict.fromkeys(
        key.split("/", 1)[1] for key in keys if key.split("/")[0] in of_layers and "/" in key
    )

    def values(quantity: str, name: str) -> list[float]:
        key = f"{quantity}/{name}"
        return history.column(key)[1].tolist() if key in keys else []

    layers = []
    for name in names:
        about = targets.get(name) if isinstance(targets, dict) else None
        about = about if isinstance(about, dict) else {}
        vectors = about.get("vectors")
        norms = values("weight_norm", name) or values("weight_std", name)
        angle = _late(values("angular_update", name), _root_mean_square)
        prediction = _late(values("equilibrium_angular_update", name), _root_mean_square)
        layers.append(
            LayerSummary(
                run=label,
                name=name,
                kind=str(about.get("scale_invariant", "–")),
                vectors=vectors
                if isinstance(vectors, int) and 0 <= vectors < _MOST_STEPS
                else None,
                first_norm=norms[0] if norms else None,
                last_norm=norms[-1] if norms else None,
                effective_lr=_late(values("effective_lr", name), np.mean),
                angular_update=angle,
                prediction=prediction,
                ratio=angle / prediction
                if angle is not None and prediction
                else _late(values("equilibrium_ratio", name), np.mean),
                said=about["verdict"] if isinstance(about.get("verdict"), str) else None,
            )
        )
    return layers


def _late(values: list[float], average: Callable[[Any], Any]) -> float | None:
    """The average over the last tenth of what was recorded: the last value alone is mostly
    noise."""
    last = [value for value in values[-max(1, len(values) // 10) :] if math.isfinite(value)]
    return float(average(np.asarray(last, dtype=np.float64))) if last else None


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
