"""The angular updates of a run in short: medians of what was measured, predicted and expected,
all of the same layers at the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .curves import (
    Curves,
    Doubles,
    as_table,
    curves_of,
    invariant_among,
    over_layers,
    recorded_curves,
)
from .history import History
from .records import Ints


class ComparedAngles(NamedTuple):
    """Medians over layers, in radians per step.

    Args:
        names: the layers that the medians are of: those with a prediction; without any, the
            scale-invariant ones, or all.
        which: what to call them.
        predictions: the predicted angles of these layers.
        steps: ``(s,)``, those at which there is something to compare.
        measured: ``(s,)``.
        predicted: ``(s,)``; None where nothing is predicted.
        expected: ``(s,)``; None where nothing is expected.
    """

    names: list[str]
    which: str
    predictions: Curves
    steps: Ints
    measured: Doubles
    predicted: Doubles | None
    expected: Doubles | None


def compared_angles(history: History) -> ComparedAngles:
    """The medians of a run's angular updates.

    Raises:
        NormDynError: where the history has no angular updates.

    Example:
        >>> history = History()
        >>> row = {"angular_update/conv": 0.01, "equilibrium_angular_update/conv": 0.02}
        >>> history.append(0, {**row, "angular_update/head": 1.0}, optimizer_step=1)
        >>> angles = compared_angles(history)
        >>> angles.which, angles.measured.round(3).tolist(), angles.predicted.round(3).tolist()
        ('predicted layers', [0.01], [0.02])
    """
    curves = curves_of(history, "angular_update")
    predictions = {}
    for name, curve in recorded_curves(history, "equilibrium_angular_update").items():
        if name in curves:
            predictions[name] = curve
    # The best that is known of the layers decides which of them are compared.
    if predictions:
        names, which = list(predictions), "predicted layers"
    else:
        names, which = invariant_among(curves, history)

    expected = _of_layers(recorded_curves(history, "expected_angular_update"), names)
    foreseen = {"prediction": predictions, "expected": expected}
    steps, measured, tables = _over_the_same(_of_layers(curves, names), foreseen)
    # The median, not the mean: one layer that turns a thousand times faster must not move it.
    medians = {kind: over_layers(np.nanmedian, table) for kind, table in tables.items()}
    return ComparedAngles(
        names=names,
        which=which,
        predictions=predictions,
        steps=steps,
        measured=over_layers(np.nanmedian, measured),
        predicted=medians["prediction"] if predictions else None,
        expected=medians["expected"] if expected else None,
    )


def _of_layers(curves: Curves, names: list[str]) -> Curves:
    return {name: curves[name] for name in names if name in curves}


def _over_the_same(
    measured: Curves, foreseen: Mapping[str, Curves]
) -> tuple[Ints, Doubles, dict[str, Doubles]]:
    """Measured and foreseen angles of the same layers at the same steps, so that their medians are
    of the same weights.

    Where a layer has no prediction at a step (its rate was 0), its angle has no part in a median
    there; at a step at which nothing is foreseen of any layer, all of them have one.

    Args:
        measured: angles by layer.
        foreseen: curves of some of these layers, by what they are.

    Returns:
        steps ``(s,)``, the measured table ``(l, s)``, and the foreseen ones ``(l, s)``, with NaN
        at the same places.
    """
    steps, table = as_table(measured)
    tables = {}
    for kind, curves in foreseen.items():
        tables[kind] = np.full_like(table, np.nan)
        for row, name in enumerate(measured):
            own_steps, values = curves.get(name, (steps[:0], steps[:0]))
            _, places, own_places = np.intersect1d(steps, own_steps, return_indices=True)
            tables[kind][row, places] = values[own_places]

    compared = ~np.isnan(table)
    for kind, other in tables.items():
        both = compared & ~np.isnan(other)
        if kind == "prediction" and foreseen[kind]:
            # A step without any prediction is no part of a comparison with it.
            compared = both
        else:
            # An expectation may end; what is left is compared with the prediction alone.
            compared = np.where(both.any(axis=0), both, compared)
    kept = compared.any(axis=0)
    masked = np.where(compared, table, np.nan)[:, kept]
    for kind, other in tables.items():
        tables[kind] = np.where(compared, other, np.nan)[:, kept]
    return steps[kept], masked, tables
