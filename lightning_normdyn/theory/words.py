"""From numbers to words: what a person should read of a weight at the end of a fit.

What is judged is how a weight turns *now*: against the angle that its own norm and the schedule so
far lead to, or, without scale invariance, against the angle at which turning and decay would hold
its norm. Where its norm will settle is no part of that, and is said beside it. In plain floats; the
numbers come from `lightning_normdyn.monitor.verdicts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .outlook import SETTLED, steps_to_go

__all__ = [
    "Balanced",
    "Finding",
    "Kind",
    "Numbers",
    "finding_of",
    "folded",
    "in_short",
    "skeleton",
    "times",
]

AS_EXPECTED = (0.75, 1.33)
"""Angle over what is expected that counts as agreement: 90 % of the windows of a real network with
BatchNorm are within a sixth under Adam, and within a fourth under SGD."""

ROUGHLY_AS_EXPECTED = (0.6, 1.67)
"""The same for an expectation that is itself up to some tens of percent off."""

ANGLE_FLOOR = 1e-7
"""Radians per step that count as not turning at all: rounding of float32 weights makes as much."""

STANDS_STILL = 0.1
"""Angle over what is expected below which, as above `AS_EXPECTED`, such rounding may be all that
there is."""

HELD_BY_LOSS = 3.0
"""The pull of the loss over that of decay from which on the loss holds the norm, and not decay."""

PUSHED_OUT = -0.5
"""The same ratio below which the loss pushes outwards by more than half of the decay."""

MOST_NAMED = 2
"""Weights that turn too fast or too slowly, and are named in a sentence, not counted."""

MOST_TO_GO = 1e6
"""Steps to go beyond which the number itself says nothing."""

TOO_EARLY = ("too few rows", "it has turned too little to tell")
"""Why a balance is not known yet."""

Kind = Literal[
    "not finite",
    "no gradient",
    "frozen",
    "too fast",
    "too slow",
    "as expected",
    "held by the loss",
    "growing",
    "shrinking",
    "decay has not acted",
    "settled",
    "too early",
    "unknown",
]

# Of each kind, what is said of one weight and of several; in the order of a sentence that sums up.
# `{}` takes the ratio.
_PREDICATES: dict[Kind, tuple[str, str]] = {
    "as expected": ("turns as expected", "turn as expected"),
    "too fast": ("turns {} too fast", "turn too fast"),
    "too slow": ("turns too slowly, at {} of what is expected", "turn too slowly"),
    "settled": ("is settled", "are settled"),
    "growing": ("still grows, {} its balance", "still grow"),
    "shrinking": ("still shrinks, {} its balance", "still shrink"),
    "held by the loss": (
        "is held by the loss, not by decay",
        "are held by the loss, not by decay",
    ),
    "decay has not acted": (
        "has not felt its decay yet",
        "have not felt their decay yet",
    ),
    "no gradient": (
        "has no gradient: only decay acts",
        "have no gradient: only decay acts",
    ),
    "frozen": ("does not move", "do not move"),
    "not finite": ("is not finite any more", "are not finite any more"),
    "too early": ("cannot be judged yet", "cannot be judged yet"),
    "unknown": ("has nothing to be held against", "have nothing to be held against"),
}
_NUMBER = re.compile(r"\d(?:[\d,.]*\d)?")
# These are findings: a person has to know which weight it is.
_NAMED: tuple[Kind, ...] = ("too fast", "too slow", "no gradient", "frozen", "not finite")


@dataclass(frozen=True)
class Balanced:
    """The measured balance of a weight: turning against decay.

    Args:
        ratio: its angle over the one that would hold its norm; NaN where the loss holds the norm
            even without decay.
        loss_share: the pull of the loss over that of decay; NaN where the noise of this optimizer
            is not known, and for scale-invariant weights, which no loss can pull at.
        relaxation: optimizer steps; None where no decay acts now.
        elapsed: relaxation times in this run.
        missing: why there is no such number; empty where there is.
    """

    ratio: float = math.nan
    loss_share: float = math.nan
    relaxation: float | None = None
    elapsed: float = 0.0
    missing: str = ""


@dataclass(frozen=True)
class Numbers:
    """What is known of a weight at its end, over its newest rows.

    Args:
        angle: root mean square, radians per step.
        drift: d ln‖w‖² per step.
        expected_ratio: angle over what is expected now; None without an expectation.
        settled_ratio: angle over the one that it will settle at; None without a prediction.
        relaxation: optimizer steps; None where the norm does not relax.
        elapsed: relaxation times in this run.
        rough: whether the expectation is up to some tens of percent off.
        held_by: the callback that holds the norm; empty where none does.
        since_drop: whether the norm is still that of before a drop of the learning rate.
        can_rescale: whether LRDropRescaling could have removed that.
        balance: the measured one; None where there is none.
    """

    angle: float
    drift: float = 0.0
    expected_ratio: float | None = None
    settled_ratio: float | None = None
    relaxation: float | None = None
    elapsed: float = 0.0
    rough: bool = False
    held_by: str = ""
    since_drop: bool = False
    can_rescale: bool = False
    balance: Balanced | None = None


class Finding(NamedTuple):
    """What is said of a weight.

    Args:
        kind: the finding.
        words: all that is to be read.
        ratio: what its health goes by; None where nothing was compared.
    """

    kind: Kind
    words: str
    ratio: float | None = None

    @property
    def health(self) -> float:
        """|ln ratio|: how far it is from what it should be. Infinite for a weight that does not
        learn any more; -1 where nobody can tell."""
        if self.kind in ("not finite", "no gradient", "frozen"):
            return math.inf
        if self.ratio is None or not self.ratio > 0:
            return -1.0
        # A balance that no decay has worked towards yet is no standard.
        if self.kind == "decay has not acted":
            return 0.0
        return abs(math.log(self.ratio))


# ------------------------------------------------------------------------------------ of one weight


def finding_of(numbers: Numbers) -> Finding:
    """What a person should read of a weight.

    Example:
        >>> to_come = {"settled_ratio": 0.43, "relaxation": 330.0, "elapsed": 4.0}
        >>> said = finding_of(Numbers(1e-3, expected_ratio=1.02, **to_come)).words
        >>> print(said.replace("; ", "\\n"))
        as expected now (1.0x)
        0.43x of where it will settle: its norm still shrinks (1,250 steps to go)
        >>> finding_of(Numbers(1e-3, expected_ratio=1.8)).words
        'turns too fast: 1.8x what is expected'
        >>> finding_of(Numbers(1e-3, balance=Balanced(1.4, relaxation=500.0, elapsed=3.0))).words
        'still growing, 1.4x its balance, 794 steps to go'
    """
    ratio = numbers.expected_ratio
    # Where no more was to be expected, so small an angle is that of a long weight.
    is_explained = ratio is not None and STANDS_STILL <= ratio <= AS_EXPECTED[1]
    if numbers.angle <= ANGLE_FLOOR and not is_explained:
        # What does not turn has no gradient. If its norm falls nevertheless, only the decay is
        # left, and it will reach zero.
        if numbers.drift < -ANGLE_FLOOR:
            return Finding("no gradient", "no gradient: only decay acts")
        return Finding("frozen", "frozen: neither gradient nor decay moves it")
    if ratio is not None:
        return _compared(numbers, ratio)
    if numbers.balance is not None and not numbers.balance.missing and not numbers.held_by:
        return _balanced(numbers.balance)
    # Nothing to be held against now: what is still to come can be said, or why there is nothing.
    to_come = _to_come(numbers)
    if to_come:
        return Finding("unknown", to_come)
    if numbers.balance is None:
        return Finding("unknown", "no prediction")
    why = numbers.balance.missing
    if why in TOO_EARLY:
        return Finding("too early", why)
    return Finding("unknown", f"no balance: {why}")


def _compared(numbers: Numbers, ratio: float) -> Finding:
    """Against what is expected now."""
    low, high = ROUGHLY_AS_EXPECTED if numbers.rough else AS_EXPECTED
    rough = ", a rough expectation" if numbers.rough else ""
    if low <= ratio <= high:
        now = f"as expected now ({times(ratio)}{rough})"
        return Finding("as expected", _joined(now, _to_come(numbers)), ratio)
    kind: Kind = "too fast" if ratio > 1 else "too slow"
    return Finding(kind, f"turns {kind}: {times(ratio)} what is expected{rough}", ratio)


def _to_come(numbers: Numbers) -> str:
    """How far a scale-invariant weight is from where it will settle; empty where nobody can
    tell."""
    if numbers.held_by:
        return f"its length is held by {numbers.held_by}"
    ratio, relaxation = numbers.settled_ratio, numbers.relaxation
    if ratio is None or relaxation is None or not math.isfinite(ratio):
        return ""
    low, high = AS_EXPECTED
    if low <= ratio <= high:
        return "settled"
    where = f"{times(ratio)} of where it will settle"
    left = _to_go(ratio, relaxation)
    if numbers.since_drop and ratio < 1:
        said = f"{where}: norms are still those of before the drop ({left})"
        # Beside another rule nobody has derived what it would do.
        return f"{said}, LRDropRescaling removes that" if numbers.can_rescale else said
    if numbers.elapsed < 1:
        return not_acted(numbers.elapsed)
    moves = "grows" if ratio > 1 else "shrinks"
    return f"{where}: its norm still {moves} ({left})"


def _to_go(ratio: float, relaxation: float) -> str:
    """How long a norm still moves at the present learning rate."""
    steps = steps_to_go(ratio, relaxation)
    # At the end of a schedule the rate is nearly 0, and billions of steps are no forecast.
    if MOST_TO_GO < steps < math.inf:
        return "over a million steps to go"
    return f"{in_steps(steps)} to go"


def _balanced(balance: Balanced) -> Finding:
    """Against its own balance."""
    ratio, share = balance.ratio, balance.loss_share
    # Without decay its norm would still shrink: nothing but the loss does that.
    if math.isnan(ratio):
        return Finding("held by the loss", "held by the loss, not by decay")
    held = ""
    if share > HELD_BY_LOSS:
        held = f"held by the loss, not by decay (decay's share {1 / (1 + share):.0%})"
        held = held.replace("%", " %")
    elif share < PUSHED_OUT:
        held = "the loss pushes outwards"
    # A norm that stands may be held by either, one that moves by neither alone.
    if abs(1 / ratio**2 - 1) <= SETTLED:
        if share > HELD_BY_LOSS:
            return Finding("held by the loss", held, ratio)
        return Finding("settled", _joined("settled", held), ratio)
    if balance.elapsed < 1:
        words = f"{not_acted(balance.elapsed)}; {times(ratio)} its balance"
        return Finding("decay has not acted", words, ratio)
    kind: Kind = "growing" if ratio > 1 else "shrinking"
    words = f"still {kind}, {times(ratio)} its balance"
    if balance.relaxation is not None:
        words += f", {_to_go(ratio, balance.relaxation)}"
    return Finding(kind, _joined(words, held), ratio)


def _joined(*clauses: str) -> str:
    """Those that say something."""
    return "; ".join(filter(None, clauses))


# ---------------------------------------------------------------------------------- of many weights


def skeleton(words: str) -> str:
    """Words without their numbers: what is alike of several weights.

    Example:
        >>> skeleton("as expected now (1.0x); 1,250 steps to go")
        'as expected now (#x); # steps to go'
    """
    return _NUMBER.sub("#", words)


def folded(all_words: Sequence[str]) -> str:
    """Words with one `skeleton` as one text, with the smallest and the largest of each number.

    Example:
        >>> folded(["as expected now (0.96x)", "as expected now (1.0x)", "as expected now (1.2x)"])
        'as expected now (0.96 to 1.2x)'
    """
    texts = []
    for alike in zip(*map(_NUMBER.findall, all_words), strict=True):
        ordered = sorted(set(alike), key=lambda text: float(text.replace(",", "")))
        texts.append(" to ".join(dict.fromkeys([ordered[0], ordered[-1]])))
    numbers = iter(texts)
    return _NUMBER.sub(lambda match: next(numbers), all_words[0])


def in_short(findings: Sequence[tuple[str, Finding]]) -> str:
    """One sentence about all weights, by name and finding.

    Example:
        >>> fine, fast = Finding("as expected", "", 1.0), Finding("too fast", "", 1.8)
        >>> in_short([("conv1", fast), *((f"conv{i}", fine) for i in range(2, 11))])
        '9 of 10 weights turn as expected; conv1 turns 1.8x too fast.'
    """
    if len(findings) == 1:
        ((name, finding),) = findings
        return f"{_of_one(name, finding)}."
    clauses = []
    for kind in _PREDICATES:
        alike = [(name, finding) for name, finding in findings if finding.kind == kind]
        if kind in _NAMED and len(alike) <= MOST_NAMED:
            clauses += [_of_one(name, finding) for name, finding in alike]
        elif alike:
            clauses.append(_of_several(alike))
    text = "; ".join(clauses)
    count, of_all = text.partition(" ")[::2]
    # The first number says of how many.
    if count.isdigit():
        return f"{count} of {len(findings)} weights {of_all}."
    return f"Of {len(findings)} weights, {text}."


def _of_one(name: str, finding: Finding) -> str:
    predicate = _PREDICATES[finding.kind][0]
    return f"{name} {predicate.format(_ratio_of(finding))}"


def _of_several(alike: Sequence[tuple[str, Finding]]) -> str:
    """How many they are; of what a person has to see, the worst by its name."""
    _, first = alike[0]
    of_one, of_many = _PREDICATES[first.kind]
    if len(alike) == 1:
        return f"1 {of_one.format(_ratio_of(first))}"
    said = f"{len(alike)} {of_many}"
    if first.kind not in _NAMED:
        return said
    worst, finding = max(alike, key=lambda entry: entry[1].health)
    # Of what is infinitely far off there is no worst one, and no number.
    if finding.ratio is None:
        return f"{said} ({worst}, ...)"
    return f"{said} ({worst} most, {times(finding.ratio)})"


def _ratio_of(finding: Finding) -> str:
    """For the place of a number in a predicate that has one."""
    return "" if finding.ratio is None else times(finding.ratio)


# --------------------------------------------------------------------------------- numbers in words


def times(ratio: float) -> str:
    """A ratio to two digits.

    Example:
        >>> times(1.0), times(0.43), times(12.3)
        ('1.0x', '0.43x', '12x')
    """
    # From 9.95 on two digits need no point.
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:#.2g}x"


def in_steps(steps: float) -> str:
    """A number of steps to three digits, no exponent.

    Example:
        >>> in_steps(1249.6), in_steps(0.2), in_steps(float("inf"))
        ('1,250 steps', '1 step', 'no end of steps')
    """
    if not math.isfinite(steps):
        return "no end of steps"
    digits = 0
    if steps >= 1:
        digits = max(0, math.floor(math.log10(steps)) - 2)
    rounded = max(1, round(steps / 10**digits)) * 10**digits
    return f"{rounded:,} step" + ("s" if rounded > 1 else "")


def not_acted(elapsed: float) -> str:
    """Why a norm is still that of the start.

    Example:
        >>> not_acted(0.31)
        'decay has not acted yet: 0.3 of a relaxation time in this run'
    """
    share = f"{elapsed:.1f}" if elapsed >= 0.1 else f"{elapsed:.1g}"
    return f"decay has not acted yet: {share} of a relaxation time in this run"
