"""Each layer of a run in one row of numbers: what the report's table shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.curves import notes_on_layers
from lightning_normdyn.monitor.quantities import monitored

_MOST_VECTORS = 2**53
_AS_PREDICTED = (0.9, 1.1)
# How the verdicts begin that a reader should not miss.
_OFF = ("turns", "collapsing", "frozen", "not finite")


class Column(NamedTuple):
    """A column of the table."""

    field: str
    """Of :class:`LayerSummary`."""
    head: str
    hint: str
    style: str = "number"
    """The class of its cells."""


COLUMNS = (
    Column("run", "run", "label of the run", "run"),
    Column("name", "weight", "the parameter's name", "name"),
    Column("kind", "scale-invariant", "per filter, group or layer", ""),
    Column("vectors", "vectors", "weight vectors in it"),
    Column("first_norm", "norm, first", "at the first record"),
    Column("last_norm", "norm, last", "at the last record"),
    Column("effective_lr", "effective LR", "mean over the last tenth of the records"),
    Column(
        "angular_update",
        "angular update",
        "radians per step, root mean square over the last tenth of the records",
    ),
    Column("prediction", "prediction", "radians per step, for the same records"),
    Column("ratio", "ratio", "angular update over prediction"),
    Column(
        "verdict",
        "verdict",
        "of the monitor at the end of the fit; else as predicted: within 10 %",
        "",
    ),
)


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
    verdict: str

    @property
    def is_off(self) -> bool:
        """Whether its verdict is one that a reader should not miss."""
        return self.verdict.startswith(_OFF)


def summaries(label: str, history: History) -> list[LayerSummary]:
    """One row per layer of a run, in the order of the network."""
    measured = {quantity.name for quantity in monitored()}
    # A dict, and not a set, because it keeps the order.
    names: dict[str, None] = {}
    for key in history.keys():  # noqa: SIM118
        quantity, _, name = key.partition("/")
        if name and quantity in measured:
            names[name] = None
    return [_summary(label, name, history) for name in names]


def _summary(label: str, name: str, history: History) -> LayerSummary:
    def values(quantity: str) -> list[float]:
        recorded: list[float] = history.curve(f"{quantity}/{name}")[1].tolist()
        return recorded

    notes = notes_on_layers(history).get(name, {})
    vectors = notes.get("vectors")
    known_vectors = isinstance(vectors, int) and 0 <= vectors < _MOST_VECTORS
    # A standardized weight has no norm that matters: its standard deviation takes the place.
    norms = values("weight_norm") or values("weight_std")
    # As root mean squares, since that is what predictions are.
    angle = _late(values("angular_update"), _root_mean_square)
    prediction = _late(values("equilibrium_angular_update"), _root_mean_square)
    # Not a mean of ratios, which the steps with the smallest predictions would rule.
    if angle is not None and prediction:
        ratio: float | None = angle / prediction
    else:
        ratio = _late(values("equilibrium_ratio"), np.mean)
    return LayerSummary(
        run=label,
        name=name,
        kind=str(notes.get("scale_invariant", "–")),
        vectors=vectors if known_vectors else None,
        first_norm=norms[0] if norms else None,
        last_norm=norms[-1] if norms else None,
        effective_lr=_late(values("effective_lr"), np.mean),
        angular_update=angle,
        prediction=prediction,
        ratio=ratio,
        verdict=_verdict(notes.get("verdict"), ratio),
    )


def _verdict(of_monitor: object, ratio: float | None) -> str:
    """The monitor's, which knows more than the curves do; else how the angular update compares with
    its prediction."""
    if isinstance(of_monitor, str) and of_monitor not in ("", "-"):
        return of_monitor
    if ratio is None:
        return "–"
    # As the hint of the column says: within 10 %.
    low, high = _AS_PREDICTED
    if low <= ratio <= high:
        return "as predicted"
    return "turns faster" if ratio > 1 else "turns slower"


def _late(values: list[float], average: Callable[[Any], Any]) -> float | None:
    """The average over the last tenth of what was recorded: the last value alone is mostly
    noise."""
    # At least one, of however few records.
    tenth = values[-max(1, len(values) // 10) :]
    finite = [value for value in tenth if math.isfinite(value)]
    return float(average(np.asarray(finite, dtype=np.float64))) if finite else None


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
