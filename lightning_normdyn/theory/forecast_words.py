"""Forecasts and advice in words: a line per param group, and a sentence for every condition that
holds, with its numbers and its rule.

What is said is what will happen to norms and angles. No sentence says that a loss will be better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_normdyn.tables import paragraph, render

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
    return _SENTENCES[advice.kind](advice.numbers)


def _decay_cannot_act(numbers: Numbers) -> str:
    lost = percent(1 - numbers["left"])
    text = f"decay hardly acts in {in_steps(numbers['steps'])}: by itself it shortens a norm by "
    text += f"{lost}"
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
        f"scale-invariant weights grow {times(numbers['gradients'])}; a decay in proportion to lr² "
        f"(corrected decay) would leave norms where they are"
    )


def _doubles(numbers: Numbers) -> str:
    held = "decay does not hold them" if numbers["pull"] > 0 else "no decay holds them"
    return f"norms double every {in_steps(numbers['steps'])}; {held}"


def _never_settles(numbers: Numbers) -> str:
    return (
        f"norms never settle under this optimizer (lr {numbers['lr']:.3g}, decay "
        f"{numbers['decay']:.3g}): the length of its steps does not depend on gradient and norm as "
        f"an equilibrium asks"
    )


def _turns(numbers: Numbers) -> str:
    text = (
        f"turns {times(numbers['times'])} as fast as the median of its optimizer "
        f"({numbers['angle']:.2g} against {numbers['median']:.2g} rad/step, coherence "
        f"{numbers['coherence']:.2g})"
    )
    if "decay_for_median" in numbers:
        return (
            f"{text}; at this learning rate a decay of {numbers['decay_for_median']:.2g} instead "
            f"of {numbers['decay']:.2g} would balance it at the median"
        )
    if "share" in numbers and numbers["share"] < 0.25:
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
    # All of them do not fit into 80 columns.
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
    legend = MEASURED_LEGEND
    if not is_measured:
        settles = any(line.forecast.angle is not None for line in lines)
        legend = LEGEND if settles else MEMORY_LEGEND
    sentences += [legend, *_sentences(lines)]
    sentences += [f"{each.weight}: {advice_in_words(each)}." for each in advice[:MOST_WEIGHTS]]
    if len(advice) > MOST_WEIGHTS:
        sentences.append(f"... and {len(advice) - MOST_WEIGHTS} more weights unlike the others.")
    return table + "".join(paragraph(sentence, width) for sentence in sentences)


def _cells(line: GroupLine, is_measured: bool) -> list[str]:
    forecast = line.forecast
    second = str(line.weights)
    if is_measured:
        kappa = forecast.coherence
        second = "-" if kappa is None else f"{kappa:.2g}"
    cells = [line.name, second, f"{forecast.peak_lr:.3g}", f"{line.decay:.3g}"]
    memory = forecast.timescale
    if memory is None:
        # Without decay nothing is forgotten; where nobody knows the decay, nobody can tell.
        cells += ["for ever" if forecast.total_pull == 0 else "-", "-", "-"]
    else:
        share = memory / forecast.steps
        of_run = percent(share) if share < 1 else times(share)
        cells += [rounded(memory), of_run if line.is_whole else "-"]
        cells.append(rounded(memory / line.steps_per_epoch) if line.steps_per_epoch else "-")
    # How long it takes is only worth a number where there is something to settle at.
    if forecast.angle is None or forecast.relaxation is None:
        return [*cells, "-", "-"]
    return [*cells, f"{forecast.angle:.2g}", rounded(forecast.relaxation)]


def _sentences(lines: Sequence[GroupLine]) -> list[str]:
    """What holds of param groups; what holds of several alike once."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        kinds = [advice.kind for advice in line.forecast.advice]
        said = [] if not line.note else [line.note]
        for advice in line.forecast.advice:
            if advice.kind in _OF_A_WHOLE_RUN and not line.is_whole:
                continue
            # One of the two says it.
            if advice.kind == "memory longer than the run" and "decay cannot act" in kinds:
                continue
            said.append(advice_in_words(advice))
        for words in said:
            alike.setdefault(skeleton(words), []).append((line.name, words))
    sentences = []
    for together in alike.values():
        names = ", ".join(name for name, _ in together)
        sentences.append(f"{names}: {folded([words for _, words in together])}.")
    return sentences


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
    digits = 0 if hundredths >= 1 or hundredths <= 0 else 1 - math.floor(math.log10(hundredths))
    return f"{hundredths:.{digits}f} %"
