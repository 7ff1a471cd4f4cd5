"""What a report says of each layer at the end of a run, in numbers and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.curves import as_table, notes_on_layers
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.quantities import monitored
from lightning_normdyn.monitor.records import Floats, Ints
from lightning_normdyn.theory.words import AS_EXPECTED, times

# Curves of a layer by quantity; empty where the run did not record one.
Recorded = Mapping[str, tuple[Ints, Floats]]

_MOST_VECTORS = 2**53
# What the numbers of a row are made of.
_NEEDED = (
    "weight_norm",
    "weight_std",
    "effective_lr",
    "angular_update",
    "expected_angular_update",
    "expected_ratio",
    "equilibrium_angular_update",
    "equilibrium_ratio",
    "balance_ratio",
)
# How the verdicts begin that a reader should not miss; "collapsing" was said by older versions.
_OFF = ("turns", "no gradient", "collapsing", "frozen", "not finite")


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
        "now",
        "ratio now",
        "angular update over what is expected at these steps; without scale invariance, over its "
        "balance",
    ),
    Column(
        "verdict",
        "verdict",
        "of the monitor at the end of the fit; else by the ratio now, or without one by the ratio",
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
    now: float | None
    verdict: str

    @property
    def is_off(self) -> bool:
        """Whether its verdict is one that a reader should not miss."""
        return self.verdict.startswith(_OFF)


def side_by_side(
    runs: Mapping[str, History], layers: Mapping[str, Sequence[LayerSummary]]
) -> list[LayerSummary]:
    """The same layer of all runs in neighbouring rows, in the order of the first run that has
    it.

    Args:
        runs: histories by label.
        layers: of each run, from `summaries`.

    Raises:
        NormDynError: for a run without layers.
    """
    by_name: dict[str, list[LayerSummary]] = {}
    for label, history in runs.items():
        if not layers[label]:
            keys = ", ".join(history.keys()[:5]) or "nothing at all"
            raise NormDynError(
                f"run `{label}` has no curves of layers, it has {keys}; record with "
                f"`NormDynamicsMonitor`."
            )
        for layer in layers[label]:
            by_name.setdefault(layer.name, []).append(layer)
    return [layer for alike in by_name.values() for layer in alike]


def summaries(label: str, history: History) -> list[LayerSummary]:
    """One row per layer of a run, in the order of the network."""
    measured = {quantity.name for quantity in monitored()}
    # A dict, and not a set, because it keeps the order.
    names: dict[str, None] = {}
    for key in history.keys():  # noqa: SIM118
        quantity, _, name = key.partition("/")
        if name and quantity in measured:
            names[name] = None
    notes = notes_on_layers(history)
    return [
        _summary(label, name, recorded, notes.get(name, {}))
        for name, recorded in _by_layer(history, list(names)).items()
    ]


def _by_layer(history: History, names: Sequence[str]) -> dict[str, Recorded]:
    """All that the rows of a table need, read in one pass over the history."""
    keys = [f"{quantity}/{name}" for name in names for quantity in _NEEDED]
    curves = history.curves(keys)
    by_layer: dict[str, Recorded] = {}
    for name in names:
        by_layer[name] = {quantity: curves[f"{quantity}/{name}"] for quantity in _NEEDED}
    return by_layer


def _summary(
    label: str,
    name: str,
    recorded: Recorded,
    notes: Mapping[str, Any],
) -> LayerSummary:
    def values(quantity: str) -> Floats:
        return recorded[quantity][1]

    vectors = notes.get("vectors")
    known_vectors = isinstance(vectors, int) and 0 <= vectors < _MOST_VECTORS
    norms = values("weight_norm").tolist()
    # A standardized weight has no norm that matters: its standard deviation takes the place.
    if not norms:
        norms = values("weight_std").tolist()
    # As root mean squares, since that is what predictions are.
    angle = _late(values("angular_update"), _root_mean_square)
    prediction = _late(values("equilibrium_angular_update"), _root_mean_square)
    # Not a mean of ratios, which the steps with the smallest predictions would rule.
    ratio = _late_ratio(recorded, "equilibrium")
    now = _late_ratio(recorded, "expected")
    if now is None:
        now = _late(values("balance_ratio"), np.mean)
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
        now=now,
        verdict=_verdict(notes.get("verdict"), now, ratio),
    )


def _late_ratio(recorded: Recorded, foreseen: str) -> float | None:
    """The angular update over another angle, as root mean squares of the same records: of the last
    tenth, those with both."""
    quantities = ("angular_update", f"{foreseen}_angular_update")
    curves = {quantity: recorded[quantity] for quantity in quantities}
    if not all(len(steps) for steps, _ in curves.values()):
        # A log may have the ratios alone.
        return _late(recorded[f"{foreseen}_ratio"][1], np.mean)
    _, table = as_table(curves)
    measured, other = table[:, -max(1, table.shape[1] // 10) :]
    both = np.isfinite(measured) & (other > 0)
    if not both.any():
        return None
    return _root_mean_square(measured[both]) / _root_mean_square(other[both])


def _verdict(
    of_monitor: object,
    now: float | None,
    ratio: float | None,
) -> str:
    """The monitor's, which knows more than the curves do; else how the angular update compares with
    what is expected now, or with its prediction."""
    if isinstance(of_monitor, str) and of_monitor not in ("", "-"):
        return of_monitor
    compared, what = (ratio, "predicted") if now is None else (now, "expected")
    if compared is None:
        return "–"
    low, high = AS_EXPECTED
    if low <= compared <= high:
        return f"as {what}"
    return f"turns too {'fast' if compared > 1 else 'slow'}: {times(compared)} what is {what}"


def _late(values: Floats, average: Callable[[Any], Any]) -> float | None:
    """The average over the last tenth of what was recorded: the last value alone is mostly
    noise."""
    # At least one, of however few records.
    tenth = values[-max(1, len(values) // 10) :].astype(np.float64)
    finite = tenth[np.isfinite(tenth)]
    if not finite.size:
        return None
    return float(average(finite))


def late_average(history: History, key: str) -> float | None:
    """The root mean square over the last tenth of a curve; None where it has no finite value."""
    return _late(history.curve(key)[1], _root_mean_square)


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
