"""What happened in a run beside its curves, as pictures and pages say it: drops of the learning
rate and rescalings, by kind and step, with the factor of a drop and the callback behind it."""

from __future__ import annotations

from typing import NamedTuple

from .curves import layer_names
from .history import History

LR_DROP = "lr_drop"
# Which callback acts at an event of a kind, if it is in the run.
_ACTS = {LR_DROP: "LRDropRescaling", "rescale": "WeightRescaling"}
# A rate that fell by less than this between two rows fell before them, or glides.
_LEAST_DROP = 1.05


class Happenings(NamedTuple):
    """All events of a kind.

    Args:
        kind: as the history has it.
        words: what they are, for a legend.
        steps: when, in order.
        labels: what stands at each step; empty where the words say everything.
    """

    kind: str
    words: str
    steps: list[int]
    labels: list[str]


def happenings(history: History) -> list[Happenings]:
    """What is marked in a history, by kind, in words.

    Example:
        >>> history = History()
        >>> for step, rate in enumerate([0.4, 0.4, 0.1, 0.1]):
        ...     row = {"effective_lr/conv.weight": rate / 2, "weight_norm/conv.weight": 2.0}
        ...     history.append(step, row, optimizer_step=step)
        >>> history.mark(2, "lr_drop")
        >>> happenings(history)
        [Happenings(kind='lr_drop', words='LR drop', steps=[2], labels=['LR ÷ 4'])]
    """
    told = []
    for kind, steps in steps_by_kind(history).items():
        labels = [""] * len(steps)
        if kind == LR_DROP:
            labels = [_drop_in_words(history, step) for step in steps]
        told.append(Happenings(kind, _in_words(history, kind), steps, labels))
    return told


def steps_by_kind(history: History, name: str | None = None) -> dict[str, list[int]]:
    """The steps of the events of each kind, in order; with a name, of those about it or about
    all."""
    steps: dict[str, set[int]] = {}
    for event in history.events:
        if name is None or event.name in ("", name):
            steps.setdefault(event.kind, set()).add(event.step)
    return {kind: sorted(own) for kind, own in steps.items()}


def _in_words(history: History, kind: str) -> str:
    words = kind.replace("_", " ")
    if kind == LR_DROP:
        words = "LR drop"
    callbacks = history.meta.get("callbacks")
    acts = _ACTS.get(kind)
    # A file from elsewhere may hold anything in place of the callbacks.
    if acts is not None and isinstance(callbacks, dict) and acts in callbacks:
        return f"{words} ({acts})"
    return words


def _drop_in_words(history: History, step: int) -> str:
    """By how much the learning rate fell at a step; only that it fell where no curve tells."""
    for name in layer_names(history, "effective_lr"):
        factor = _drop_of(history, name, step)
        if factor is not None and factor > _LEAST_DROP:
            return f"LR ÷ {factor:.2g}"
    return "LR drop"


def _drop_of(
    history: History,
    name: str,
    step: int,
) -> float | None:
    """The learning rate of a weight before a step over the one from it on."""
    rates = {}
    steps, effective = history.curve(f"effective_lr/{name}")
    norm_steps, norms = history.curve(f"weight_norm/{name}")
    by_step = dict(zip(norm_steps.tolist(), norms.tolist(), strict=True))
    for at, rate in zip(steps.tolist(), effective.tolist(), strict=True):
        # Of many vectors both are means, whose product is lr up to a factor; a drop leaves the
        # factor as it is, also if it rescales all of them.
        if at in by_step:
            rates[at] = rate * by_step[at]
    earlier = [at for at in rates if at < step]
    later = [at for at in rates if at >= step]
    # A rate of 0 has no factor to be told.
    if not earlier or not later or not rates[min(later)] > 0:
        return None
    return float(rates[max(earlier)] / rates[min(later)])
