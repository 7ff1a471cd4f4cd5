"""Which layers of a run a reader should look at first, and why: those whose verdict says so, and
those that turn unlike the others.

A verdict holds a layer against what is to be expected of it, given its length and its learning
rate. A layer that began twenty times too long, or got ten times the rate, turns as expected then;
that it is unlike its neighbours shows only beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, get_args

from lightning_normdyn.monitor.curves import notes_on_layers
from lightning_normdyn.monitor.history import History
from lightning_normdyn.theory.words import Finding, Kind, in_short, times

from .summary import LayerSummary, late_average

MOST_STANDOUTS = 3
"""Layers that stand on top of a report."""

ALIKE = 2.0
"""Angles within this factor of the median, in either direction, are alike."""

LEAST_LAYERS = 4
"""Of fewer layers, the median is nearly one of them."""

_STUCK = ("not finite", "no gradient", "frozen")
_OFF = (*_STUCK, "too fast", "too slow")
# How the words of each kind begin, for histories that keep the words alone.
_BEGINNINGS: dict[str, Kind] = {
    "turns too fast": "too fast",
    "turns too slow": "too slow",
    "no gradient": "no gradient",
    "collapsing": "no gradient",
    "frozen": "frozen",
    "not finite": "not finite",
    "as ": "as expected",
    "settled": "settled",
    "still growing": "growing",
    "still shrinking": "shrinking",
    "held by the loss": "held by the loss",
    "decay has not acted": "decay has not acted",
    "too few": "too early",
    "it has turned too little": "too early",
}


class Standout(NamedTuple):
    """A layer to look at.

    Args:
        layer: its numbers.
        tag: what is the matter in two or three words.
        why: the same as a sentence with numbers.
        facts: its numbers beside those of the median layer.
        is_off: whether something is the matter; a healthy run has layers that are farthest from
            the others, too.
        distance: |ln| of how far it is off; infinite for what does not learn any more.
    """

    layer: LayerSummary
    tag: str
    why: str
    facts: list[str]
    is_off: bool
    distance: float


def in_one_sentence(history: History, layers: Sequence[LayerSummary]) -> str:
    """What the table at the end of the fit says of all weights."""
    notes = notes_on_layers(history)
    found = []
    for layer in layers:
        finding = _finding(layer, notes.get(layer.name, {}))
        found.append((layer.name, finding))
    return in_short(found)


def standouts(history: History, layers: Sequence[LayerSummary]) -> list[Standout]:
    """The layers that are farthest off, the farthest first.

    Args:
        history: of the run.
        layers: its layers, from `summaries`.
    """
    notes = notes_on_layers(history)
    # Read once: each layer is compared with all others.
    angles = {layer.name: _angle(history, layer) for layer in layers}
    far = []
    for layer in layers:
        alike = _alike(layer, layers)
        finding = _finding(layer, notes.get(layer.name, {}))
        beside = _over_median(layer, alike, lambda other: angles[other.name])
        found = _standout(layer, finding, beside, alike)
        # 0 also where nobody can tell: such a layer stands out from nothing.
        if found.distance > 0:
            far.append(found)
    # Stable: of the same distance, in the order of the network.
    return sorted(far, key=lambda each: each.distance, reverse=True)[:MOST_STANDOUTS]


def like(layer: LayerSummary, layers: Sequence[LayerSummary]) -> list[str]:
    """Names of the layers that one is drawn beside: its like, or all where these are few."""
    alike = _alike(layer, layers)
    # To see that a layer stands still, any others will do.
    if len(alike) < LEAST_LAYERS:
        alike = list(layers)
    return [other.name for other in alike]


def _alike(layer: LayerSummary, layers: Sequence[LayerSummary]) -> list[LayerSummary]:
    """The layers that one is compared with, itself among them."""
    # A head turns as its own loss asks, scale-invariant layers as their optimizer does: one median
    # over both would be of neither.
    return [other for other in layers if _is_invariant(other) == _is_invariant(layer)]


def _standout(
    layer: LayerSummary, finding: Finding, beside: float | None, alike: Sequence[LayerSummary]
) -> Standout:
    """What is to be said of a layer.

    Args:
        layer: the layer.
        finding: its verdict.
        beside: its angle over that of the median layer; None where that cannot be told.
        alike: the layers that it is compared with, itself among them.
    """
    # Below 0: nothing is known of it.
    by_verdict = max(finding.health, 0.0)
    by_others = 0.0
    if beside is not None and beside > 0:
        by_others = abs(math.log(beside))
    is_off = finding.kind in _OFF
    tag: str = finding.kind
    why = layer.verdict
    # A layer that does not turn at all is far from the others for the reason that its verdict has.
    if finding.kind not in _STUCK and beside is not None and by_others > by_verdict:
        tag = f"{'faster' if beside > 1 else 'slower'} than the others"
        why = f"turns {times(beside)} as far in a step as the median layer"
        if layer.verdict != "–":
            why += f"; {layer.verdict}"
        is_off = is_off or by_others > math.log(ALIKE)
    return Standout(
        layer=layer,
        tag=tag,
        why=why,
        facts=_facts(layer, beside, alike),
        is_off=is_off,
        distance=max(by_verdict, by_others),
    )


def _facts(
    layer: LayerSummary,
    beside: float | None,
    alike: Sequence[LayerSummary],
) -> list[str]:
    """Numbers of a layer over those of the median layer, in words."""
    ratios = {
        "angle": beside,
        "norm": _over_median(layer, alike, lambda other: other.last_norm),
        "effective LR": _over_median(layer, alike, lambda other: other.effective_lr),
    }
    facts = []
    for what, ratio in ratios.items():
        if ratio is not None:
            facts.append(f"{what} {_in_digits(ratio)}")
    return facts


def _in_digits(ratio: float) -> str:
    # More digits would say no more.
    if ratio < 1e-3:
        return "under 0.001x"
    return times(ratio)


def _over_median(
    layer: LayerSummary,
    alike: Sequence[LayerSummary],
    number: Callable[[LayerSummary], float | None],
) -> float | None:
    """A number of a layer over the median of its like; None where it cannot be told."""
    own = _finite(number(layer))
    known = []
    for other in alike:
        value = _finite(number(other))
        if value is not None:
            known.append(value)
    if own is None or len(known) < LEAST_LAYERS:
        return None
    usual = median(known)
    # Where most do not turn at all, no angle is unusual.
    if not usual > 0:
        return None
    return own / usual


def _angle(history: History, layer: LayerSummary) -> float | None:
    # Of a weight without scale-invariant vectors, the whole matrix is what turns.
    if layer.angular_update is not None:
        return layer.angular_update
    return late_average(history, f"matrix_angle/{layer.name}")


def _is_invariant(layer: LayerSummary) -> bool:
    return layer.kind not in ("no", "unknown", "–")


def _finding(layer: LayerSummary, notes: Mapping[str, Any]) -> Finding:
    """The monitor's finding; of a history without one, what its words begin with."""
    known: Mapping[object, Kind] = {kind: kind for kind in get_args(Kind)}
    kind = notes.get("finding")
    # A file from elsewhere may hold anything there.
    if isinstance(kind, str) and kind in known:
        return Finding(known[kind], layer.verdict, _finite(notes.get("ratio")))
    ratio = layer.ratio
    # What is expected now is about these very steps; a prediction is about steps to come.
    if layer.now is not None:
        ratio = layer.now
    for beginning, of_words in _BEGINNINGS.items():
        if layer.verdict.startswith(beginning):
            return Finding(of_words, layer.verdict, ratio)
    return Finding("unknown", layer.verdict, ratio)


def _finite(number: object) -> float | None:
    if isinstance(number, (int, float)) and math.isfinite(number):
        return float(number)
    return None
