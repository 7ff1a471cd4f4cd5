"""Forecasts and advice in words: a line per param group, and a sentence for every condition that
holds, with its numbers and its rule.

What is said is what will happen to norms and angles. No sentence says that a loss will be better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_normdyn.tables import paragraph, render

from .comparison import HARDLY_MATTERS
from .forecast import Advice, GroupForecast
from .words import folded, in_steps, skeleton, times

__all__ = ["GroupLine", "advice_in_words", "as_table"]

MOST_GROUPS = 8
"""Param groups that have lines: a layer-wise learning rate makes hundreds of them."""

MOST_WEIGHTS = 3
"""Single weights that sentences are about."""

MEMORY_LEGEND = "Memory is how many steps weights remember, 1/(lr x decay) at the peak."
LEGEND = (
    "At the largest learning rate: memory is how many steps weights remember, 1/(lr x decay); "
    "rad/step is the angle at which scale-invariant weights settle, within so many steps."
)
MEASURED_LEGEND = (
    "Medians over weights of any kind. coherence: how much ln(norm²) grows per squared angle "
    "turned; rad/step: the angle at which decay would hold their norms."
)

UNKNOWN = "-"

_TURNS = ("turns faster than its like", "turns more slowly than its like")

_OF_A_WHOLE_RUN = ("decay cannot act", "memory longer than the run")

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class GroupLine:
    """What is printed of one param group.

    Args:
        name: of the group, e.g. "AdamW 0".
        weights: how many weights of two or more dimensions are in it.
        decay: its weight decay, as written.
        forecast: where its norms will go.
        steps_per_epoch: optimizer steps of an epoch, if that is known.
        is_whole: whether the forecast is for a whole run, so that shares of it can be told.
        note: what else is to be said of it, a sentence.
    """

    name: str
    weights: int
    decay: float
    forecast: GroupForecast
    steps_per_epoch: float | None = None
    is_whole: bool = True
    note: str = ""


# ------------------------------------------------------------------------------------- advice


def advice_in_words(advice: Advice) -> str:
    """One condition that holds, as a sentence without its subject.

    Example:
        >>> print(advice_in_words(Advice("norm doubles", {"steps": 4321.0, "pull": 0.0})))
        norms double every 4,320 steps; no decay holds them
    """
    words = _SENTENCES[advice.kind](advice.numbers)
    return f"{words}: {advice.reason}" if advice.reason else words


def _decay_cannot_act(numbers: Numbers) -> str:
    lost = percent(1 - numbers["left"])
    text = f"decay hardly acts in {in_steps(numbers['steps'])}: it shortens a norm by {lost}"
    if "relaxation" in numbers:
        text += f"; norms take {in_steps(numbers['relaxation'])} to settle"
    return text


def _longer_memory(numbers: Numbers) -> str:
    return (
        f"weights remember {in_steps(numbers['timescale'])}, {times(numbers['share_of_run'])} the "
        f"run: they still hold what they started from"
    )


def _shorter_memory(numbers: Numbers) -> str:
    return (
        f"weights remember {in_steps(numbers['timescale'])}, {numbers['epochs']:.2g} of an epoch: "
        f"what one batch has taught is forgotten before it comes again"
    )


def _warm_up_too_short(numbers: Numbers) -> str:
    fast = in_steps(numbers["fast_steps"])
    # Zero steps of warm-up are none.
    planned = "there is no warm-up"
    if numbers["warm_up"] > 0:
        planned = f"the warm-up takes {in_steps(numbers['warm_up'])}"
    return (
        f"norms start short: at the full learning rate weights turn more than "
        f"{numbers['times']:g}x as fast as they will settle at, for {fast}; {planned}"
    )


def _no_warm_up_needed(numbers: Numbers) -> str:
    return (
        f"norms start long enough: also without the warm-up of {in_steps(numbers['warm_up'])} "
        f"weights would never turn more than {numbers['times']:g}x as fast as they will settle at"
    )


def _shrinks(numbers: Numbers) -> str:
    return (
        f"in the cool-down norms shrink by {percent(numbers['shrinks'])}, so that gradients of "
        f"scale-invariant weights grow {times(numbers['gradients'])}; a decay in proportion to "
        f"lr², WeightDecay(rate='lr_squared'), leaves norms where they are"
    )


def _doubles(numbers: Numbers) -> str:
    held = "no decay holds them"
    if numbers["pull"] > 0:
        held = "decay does not hold them"
    return f"norms double every {in_steps(numbers['steps'])}; {held}"


def _never_settles(numbers: Numbers) -> str:
    return (
        f"norms never settle under this optimizer (lr {numbers['lr']:.3g}, decay "
        f"{numbers['decay']:.3g})"
    )


def _turns(numbers: Numbers) -> str:
    text = (
        f"turns {times(numbers['times'])} as fast as the median of its optimizer "
        f"({numbers['angle']:.2g} against {numbers['median']:.2g} rad/step, coherence "
        f"{numbers['coherence']:.2g})"
    )
    # What would change it, if anything would.
    if "decay_for_median" in numbers:
        return (
            f"{text}; at this learning rate a decay of {numbers['decay_for_median']:.2g} instead "
            f"of {numbers['decay']:.2g} would balance it at the median"
        )
    if numbers.get("share", 1.0) < HARDLY_MATTERS:
        return f"{text}; decay hardly matters here (its share is {percent(numbers['share'])})"
    return text


_SENTENCES: dict[str, Callable[[Numbers], str]] = {
    "decay cannot act": _decay_cannot_act,
    "memory longer than the run": _longer_memory,
    "memory shorter than an epoch": _shorter_memory,
    "warm-up too short": _warm_up_too_short,
    "no warm-up needed": _no_warm_up_needed,
    "norm shrinks in the cool-down": _shrinks,
    "norm doubles": _doubles,
    "never settles": _never_settles,
    **dict.fromkeys(_TURNS, _turns),
}


# ------------------------------------------------------------------------------------- a table


def as_table(
    title: str,
    lines: Sequence[GroupLine],
    advice: Sequence[Advice] = (),
    *,
    left_out: int = 0,
    width: int | None = None,
) -> str:
    """Lines of param groups, and below them the advice that holds.

    Args:
        title: a line above.
        lines: of the param groups.
        advice: about single weights.
        left_out: how many more param groups there are.
        width: columns of the terminal; None: what the terminal has.
    """
    is_measured = any(line.forecast.coherence is not None for line in lines)
    columns = ["group", "weights", "peak lr", "decay", "memory", "of run", "epochs"]
    # Both columns do not fit into a terminal of 80.
    if is_measured:
        columns[1] = "coherence"
    table = render(
        title,
        [*columns, "rad/step", "within"],
        [_cells(line, is_measured) for line in lines],
        width=width,
    )
    sentences = []
    if left_out:
        sentences.append(f"... and {left_out} more param groups")
    sentences += [_legend(lines, is_measured), *_sentences(lines)]
    for each in advice[:MOST_WEIGHTS]:
        sentences.append(f"{each.weight}: {advice_in_words(each)}.")
    if len(advice) > MOST_WEIGHTS:
        sentences.append(f"... and {len(advice) - MOST_WEIGHTS} more weights unlike the others.")
    return table + "".join(paragraph(sentence, width) for sentence in sentences)


def _legend(lines: Sequence[GroupLine], is_measured: bool) -> str:
    if is_measured:
        return MEASURED_LEGEND
    # Without a scale-invariant weight nobody knows in advance where anything settles.
    if all(line.forecast.angle is None for line in lines):
        return MEMORY_LEGEND
    return LEGEND


def _cells(line: GroupLine, is_measured: bool) -> list[str]:
    forecast = line.forecast
    kappa = forecast.coherence
    second = str(line.weights)
    if is_measured:
        second = UNKNOWN if kappa is None else f"{kappa:.2g}"
    cells = [line.name, second, f"{forecast.peak_lr:.3g}", f"{line.decay:.3g}", *_memory(line)]
    # How long it takes is only worth a number where there is something to settle at.
    if forecast.angle is None or forecast.relaxation is None:
        return [*cells, UNKNOWN, UNKNOWN]
    return [*cells, f"{forecast.angle:.2g}", rounded(forecast.relaxation)]


def _memory(line: GroupLine) -> list[str]:
    """How long weights remember: in steps, in runs, in epochs."""
    steps = line.forecast.timescale
    if steps is None:
        # Without decay nothing is forgotten; where nobody knows the decay, nobody can tell.
        is_free = line.forecast.total_pull == 0
        return ["for ever" if is_free else UNKNOWN, UNKNOWN, UNKNOWN]
    of_run = UNKNOWN
    # A share of a run of unknown length would be a guess.
    if line.is_whole:
        share = steps / line.forecast.steps
        of_run = percent(share) if share < 1 else times(share)
    epochs = UNKNOWN
    if line.steps_per_epoch:
        epochs = rounded(steps / line.steps_per_epoch)
    return [rounded(steps), of_run, epochs]


def _sentences(lines: Sequence[GroupLine]) -> list[str]:
    """What holds of param groups; what holds of several alike once."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        for words in _said_of(line):
            alike.setdefault(skeleton(words), []).append((line.name, words))
    sentences = []
    for together in alike.values():
        names = ", ".join(name for name, _ in together)
        sentences.append(f"{names}: {folded([words for _, words in together])}.")
    return sentences


def _said_of(line: GroupLine) -> list[str]:
    said = []
    if line.note:
        said.append(line.note)
    kinds = [advice.kind for advice in line.forecast.advice]
    for advice in line.forecast.advice:
        # Of a run of unknown length nobody can say that it is too short.
        if advice.kind in _OF_A_WHOLE_RUN and not line.is_whole:
            continue
        # A decay that cannot act leaves a long memory: one of the two says it.
        if advice.kind == "memory longer than the run" and "decay cannot act" in kinds:
            continue
        said.append(advice_in_words(advice))
    return said


# ------------------------------------------------------------------------------- numbers in words


def rounded(number: float) -> str:
    """A number to two or three digits, no exponent.

    Example:
        >>> rounded(333_333.0), rounded(0.123), rounded(15.0)
        ('333,000', '0.12', '15')
    """
    if number < 10:
        return f"{number:.2g}"
    return in_steps(number).split()[0]


def percent(share: float) -> str:
    """A share as whole percent.

    Example:
        >>> percent(0.234), percent(0.0012)
        ('23 %', '0.12 %')
    """
    hundredths = 100 * share
    digits = 0
    # Below one percent, two digits: 0 % would be no share at all.
    if 0 < hundredths < 1:
        digits = 1 - math.floor(math.log10(hundredths))
    return f"{hundredths:.{digits}f} %"
