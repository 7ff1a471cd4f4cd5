"""The curves of a history by layer: which ones a picture shows, and all of them as one table.

Legend: ``l`` layers (parameters), ``s`` recorded steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_normdyn.errors import NormDynError

from .history import History
from .quantities import QUANTITIES, Place, shown_in
from .records import Floats, Ints

Doubles = NDArray[np.float64]
# Steps and values, by parameter name, in the order of the network.
Curves = dict[str, tuple[Ints, Floats]]

MOST_COLUMNS = 300
"""Steps of a map of layer by step."""

FARTHEST_RATIO = 10.0
"""Beyond it, and below its inverse, all ratios of a map are of one colour."""

# A deviation below this is no news: all curves lie on each other.
_LEAST_DEVIATION = 0.01


def layer_names(history: History, quantity: str) -> list[str]:
    """Parameters that a quantity was recorded of, in the order of the network."""
    prefix = f"{quantity}/"
    keys = history.keys()
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def numbered(names: Sequence[str]) -> dict[str, str]:
    """By name, the number of a layer in the order of the network, with zeros in front: a table or
    a page that sorts by text keeps that order.

    Example:
        >>> numbered([f"layers.{i}" for i in range(12)])["layers.9"]
        '10'
        >>> numbered(["conv", "head"])
        {'conv': '1', 'head': '2'}
    """
    digits = len(str(len(names)))
    return {name: f"{place:0{digits}}" for place, name in enumerate(names, start=1)}


def recorded_curves(history: History, quantity: str) -> Curves:
    """The curves of a quantity; empty where the history has none."""
    names = layer_names(history, quantity)
    recorded = history.curves([f"{quantity}/{name}" for name in names])
    curves = {}
    for name, (steps, values) in zip(names, recorded.values(), strict=True):
        # Empty where all rows with this key were thinned away.
        if len(steps):
            curves[name] = (steps, values)
    return curves


def evenly_spaced(count: int, most: int) -> NDArray[np.int_]:
    """At most ``most`` of the places 0 to ``count - 1``, with the first and the last.

    Example:
        >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
        ([0, 4, 8], [0, 1])
    """
    places = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return np.unique(places)


def thinned_evenly(curves: Curves, most: int) -> Curves:
    """All curves with at most ``most`` points together, each with its first and its last.

    Example:
        >>> steps = np.arange(100)
        >>> {name: len(x) for name, (x, _) in thinned_evenly({"a": (steps, steps)}, 10).items()}
        {'a': 10}
    """
    # All curves share the limit: with hundreds of layers, whole curves would be left out.
    share = max(2, most // max(1, len(curves)))
    fewer = {}
    for name, (steps, values) in curves.items():
        chosen = evenly_spaced(len(steps), share)
        fewer[name] = (steps[chosen], values[chosen])
    return fewer


def curves_of(history: History, quantity: str) -> Curves:
    """The curves of a quantity.

    Raises:
        NormDynError: where the history has none.
    """
    curves = recorded_curves(history, quantity)
    if curves:
        return curves
    layer_keys = [key.split("/")[0] for key in history.keys() if "/" in key]  # noqa: SIM118
    others = sorted({*layer_keys} - {"normdyn"})
    hint = f"it has {', '.join(others)}" if others else "it has no curves of layers at all"
    raise NormDynError(f"curves of `{quantity}` were asked for, and this history has none: {hint}.")


def notes_on_layers(history: History) -> dict[str, dict[str, Any]]:
    """What the monitor noted of each layer: its vectors, whether it is scale-invariant, its
    verdict."""
    targets = history.meta.get("targets")
    # The file may hold anything in their place.
    if not isinstance(targets, dict):
        return {}
    layers = {}
    for name, notes in targets.items():
        if isinstance(notes, dict):
            layers[name] = notes
    return layers


def rates_followed(history: History) -> list[str]:
    """The learning rates that tell how fast the layers' directions change: ``direction_lr`` for
    those that SGD trains, ``effective_lr`` for all others; both of a run with both."""
    followed = {notes.get("follows") for notes in notes_on_layers(history).values()}
    rates = [quantity.name for quantity in QUANTITIES.values() if quantity.steps]
    # A CSV log, and a history of an earlier version, do not say it.
    return [rate for rate in rates if rate in followed] or rates[:1]


def pictured(
    history: History,
    place: Place,
    named: Sequence[str] | None = None,
) -> list[str]:
    """The quantities of a place that a history has, in the table's order.

    Args:
        history: what was recorded.
        place: where they are shown.
        named: what a user asked for; None: all, but of the two learning rates only what the layers
            follow. Under SGD, layers with a large lr/‖w‖ can be those that turn least.
    """
    recorded = [quantity for quantity in shown_in(place) if layer_names(history, quantity)]
    if named is not None:
        return [quantity for quantity in recorded if quantity in named]
    followed = rates_followed(history)
    chosen = []
    for quantity in recorded:
        if not QUANTITIES[quantity].steps or quantity in followed:
            chosen.append(quantity)
    return chosen


def invariant_layers(history: History) -> set[str] | None:
    """Names of the layers that the run knows to be scale-invariant; None where it does not say (a
    CSV log without predictions)."""
    kinds = {}
    for name, notes in notes_on_layers(history).items():
        kind = notes.get("scale_invariant")
        if isinstance(kind, str):
            kinds[name] = kind
    if kinds:
        return {name for name, kind in kinds.items() if kind not in ("no", "unknown")}
    # Predictions are made of scale-invariant layers only.
    return set(layer_names(history, "equilibrium_angular_update")) or None


def invariant_among(names: Iterable[str], history: History) -> tuple[list[str], str]:
    """Those of these layers that are scale-invariant, or all of them where that leaves none; and
    what to call them."""
    names = list(names)
    invariant = invariant_layers(history) or set()
    chosen = [name for name in names if name in invariant]
    if chosen:
        return chosen, "scale-invariant layers"
    return names, "all layers"


def as_table(curves: Mapping[str, tuple[Ints, Floats]]) -> tuple[Ints, Doubles]:
    """All curves on the union of their steps: steps ``(s,)``, values ``(l, s)`` with NaN where a
    layer has none."""
    recorded = [own_steps for own_steps, _ in curves.values()]
    steps = np.unique(np.concatenate(recorded))
    # float64: medians and logarithms of float32 would round a second time.
    table = np.full((len(curves), len(steps)), np.nan)
    for row, (own_steps, values) in zip(table, curves.values(), strict=True):
        row[np.searchsorted(steps, own_steps)] = values
    return steps, table


def over_layers(reduce: Callable[..., Any], table: Doubles) -> Doubles:
    """``reduce`` over the layers of a table ``(l, s)``; NaN at steps where no layer has a value."""
    # numpy's nan-functions warn of columns without a number: they never see one.
    known = ~np.isnan(table).all(axis=0)
    reduced = np.asarray(reduce(table[:, known], axis=0))
    # Several quantiles are several rows.
    rows = reduced.shape[:-1]
    result = np.full((*rows, table.shape[1]), np.nan)
    result[..., known] = reduced
    return result


def late_value(values: Floats) -> float:
    """The median over the last tenth of what was recorded; NaN where nothing in it is finite."""
    # At least one, of however few records; the last one alone is mostly noise.
    tenth = values[-max(1, len(values) // 10) :].astype(np.float64)
    return _median(tenth)


def deviations(curves: Curves, scale: str) -> dict[str, float]:
    """How far each layer is from the others at the end of its curve.

    Args:
        curves: by layer.
        scale: of the quantity's axis. ``"log"``: |ln| of a value over the median of all;
            ``"ratio"``: |ln| of the value itself; ``"linear"``: its distance from the median, in
            units of the median distance.

    Example:
        >>> steps = np.arange(3)
        >>> curves = {name: (steps, np.full(3, norm)) for name, norm in zip("abc", (1.0, 1.0, 20))}
        >>> {name: round(far, 1) for name, far in deviations(curves, "log").items()}
        {'a': 0.0, 'b': 0.0, 'c': 3.0}
    """
    late = np.array([late_value(values) for _, values in curves.values()])
    if scale == "linear":
        distance = np.abs(late - _median(late))
        # Without those that lie on the median, which a spread of 0 would make infinitely far.
        spread = _median(distance[distance > 0])
        far = 0 * distance
        if spread > 0:
            far = distance / spread
    else:
        usual = 1.0
        if scale != "ratio":
            usual = _median(late[late > 0])
        # A value of 0 is infinitely far off, which is what it should be.
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.abs(np.log(late / usual))
    return dict(zip(curves, far.tolist(), strict=True))


def _median(values: Doubles) -> float:
    """Of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return float("nan")
    return float(np.median(finite))


def farthest(
    curves: Curves,
    scale: str,
    count: int,
) -> list[str]:
    """The ``count`` layers that are farthest from the others at the end, the farthest first; fewer
    where the rest lie on each other."""
    far = deviations(curves, scale)
    # NaN compares with nothing: a curve that has no value at its end has no place to be named at.
    noted = [name for name in curves if far[name] > _LEAST_DEVIATION]
    return sorted(noted, key=lambda name: far[name], reverse=True)[:count]
