"""What is said of a weight at the end of a fit, from numbers alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_normdyn.theory.words import (
    Balanced,
    Finding,
    Numbers,
    finding_of,
    folded,
    in_short,
    in_steps,
    skeleton,
    times,
)

MOVING = {"settled_ratio": 0.43, "relaxation": 330.0, "elapsed": 3.0}
BEFORE_DROP = {**MOVING, "since_drop": True}


@pytest.mark.parametrize(
    ("numbers", "kind", "words"),
    [
        ({"expected_ratio": 1.0}, "as expected", "as expected now (1.0x)"),
        (
            {"expected_ratio": 1.02, "settled_ratio": 0.9, "relaxation": 100.0},
            "as expected",
            "as expected now (1.0x); settled",
        ),
        (
            {"expected_ratio": 1.02, **MOVING},
            "as expected",
            "as expected now (1.0x); 0.43x of where it will settle: its norm still shrinks "
            "(1,250 steps to go)",
        ),
        (
            {"expected_ratio": 1.02, **MOVING, "settled_ratio": 2.0},
            "as expected",
            "as expected now (1.0x); 2.0x of where it will settle: its norm still grows "
            "(665 steps to go)",
        ),
        (
            {"expected_ratio": 1.0, **BEFORE_DROP, "can_rescale": True},
            "as expected",
            "as expected now (1.0x); 0.43x of where it will settle: norms are still those of "
            "before the drop (1,250 steps to go), LRDropRescaling removes that",
        ),
        # Not where another callback acts, beside which nobody has derived what it would do.
        (
            {"expected_ratio": 1.0, **BEFORE_DROP},
            "as expected",
            "as expected now (1.0x); 0.43x of where it will settle: norms are still those of "
            "before the drop (1,250 steps to go)",
        ),
        # A norm that is too short is no longer that of before a drop.
        (
            {"expected_ratio": 1.0, **BEFORE_DROP, "settled_ratio": 2.0},
            "as expected",
            "as expected now (1.0x); 2.0x of where it will settle: its norm still grows "
            "(665 steps to go)",
        ),
        (
            {"expected_ratio": 1.0, **MOVING, "elapsed": 0.31},
            "as expected",
            "as expected now (1.0x); decay has not acted yet: 0.3 of a relaxation time in this run",
        ),
        (
            {"expected_ratio": 1.0, "settled_ratio": 1.0, "held_by": "WeightRescaling"},
            "as expected",
            "as expected now (1.0x); its length is held by WeightRescaling",
        ),
        ({"expected_ratio": 1.8}, "too fast", "turns too fast: 1.8x what is expected"),
        ({"expected_ratio": 0.5, **MOVING}, "too slow", "turns too slow: 0.50x what is expected"),
        (
            {"expected_ratio": 1.5, "rough": True},
            "as expected",
            "as expected now (1.5x, a rough expectation)",
        ),
        (
            {"expected_ratio": 1.8, "rough": True},
            "too fast",
            "turns too fast: 1.8x what is expected, a rough expectation",
        ),
        # Without an expectation the prediction says what is to come, and nothing else.
        (
            MOVING,
            "unknown",
            "0.43x of where it will settle: its norm still shrinks (1,250 steps to go)",
        ),
        ({}, "unknown", "no prediction"),
        # So long a weight turns no more.
        ({"angle": 1e-8, "expected_ratio": 0.9}, "as expected", "as expected now (0.90x)"),
        # Less, and more, is what rounding makes.
        (
            {"angle": 1e-8, "expected_ratio": 0.01},
            "frozen",
            "frozen: neither gradient nor decay moves it",
        ),
        (
            {"angle": 1e-8, "expected_ratio": 215.0, "drift": -1e-3},
            "no gradient",
            "no gradient: only decay acts",
        ),
        ({"angle": 0.0}, "frozen", "frozen: neither gradient nor decay moves it"),
        ({"angle": 0.0, "drift": -1e-3}, "no gradient", "no gradient: only decay acts"),
        ({"angle": 3e-8, "drift": -1e-3}, "no gradient", "no gradient: only decay acts"),
    ],
)
def test_what_is_said_of_a_weight(numbers: dict[str, Any], kind: str, words: str) -> None:
    found = finding_of(Numbers(**{"angle": 1e-3, **numbers}))
    assert (found.kind, found.words) == (kind, words)


@pytest.mark.parametrize(
    ("balance", "kind", "words"),
    [
        (Balanced(1.0, elapsed=3.0), "settled", "settled"),
        (Balanced(0.96, elapsed=3.0), "settled", "settled"),
        # Young, but the norm stands where decay would hold it.
        (Balanced(1.0, elapsed=0.1), "settled", "settled"),
        (
            Balanced(1.4, 0.0, 500.0, 3.0),
            "growing",
            "still growing, 1.4x its balance, 794 steps to go",
        ),
        (
            Balanced(0.7, 0.0, 500.0, 3.0),
            "shrinking",
            "still shrinking, 0.70x its balance, 1,170 steps to go",
        ),
        # At a rate of 0 nothing goes anywhere.
        (Balanced(1.4, 0.0, None, 3.0), "growing", "still growing, 1.4x its balance"),
        # After a cosine the rate is nearly 0, and so is what moves the norm.
        (
            Balanced(0.7, 0.0, 1e9, 3.0),
            "shrinking",
            "still shrinking, 0.70x its balance, over a million steps to go",
        ),
        (
            Balanced(1.4, 0.0, 500.0, 0.31),
            "decay has not acted",
            "decay has not acted yet: 0.3 of a relaxation time in this run; 1.4x its balance",
        ),
        (
            Balanced(1.0, 6.1, 500.0, 3.0),
            "held by the loss",
            "held by the loss, not by decay (decay's share 14 %)",
        ),
        (
            Balanced(0.7, 6.1, 500.0, 3.0),
            "shrinking",
            "still shrinking, 0.70x its balance, 1,170 steps to go; held by the loss, not by "
            "decay (decay's share 14 %)",
        ),
        (Balanced(1.0, 2.9, 500.0, 3.0), "settled", "settled"),
        (Balanced(1.0, -0.6, 500.0, 3.0), "settled", "settled; the loss pushes outwards"),
        (Balanced(math.nan, 9.0, 500.0, 3.0), "held by the loss", "held by the loss, not by decay"),
        (Balanced(missing="too few rows"), "too early", "too few rows"),
        (Balanced(missing="no decay acts on it"), "unknown", "no balance: no decay acts on it"),
    ],
)
def test_what_is_said_of_a_weight_without_scale_invariance(
    balance: Balanced, kind: str, words: str
) -> None:
    found = finding_of(Numbers(1e-3, balance=balance))
    assert (found.kind, found.words) == (kind, words)


def test_what_is_expected_now_comes_before_any_balance() -> None:
    numbers = Numbers(1e-3, expected_ratio=1.0, balance=Balanced(2.0, elapsed=3.0))
    assert finding_of(numbers).words == "as expected now (1.0x)"


def test_health_sorts_what_learns_no_more_first_and_what_nobody_knows_last() -> None:
    findings = [
        Finding("too early", ""),
        Finding("decay has not acted", "", 9.0),
        Finding("as expected", "", 1.1),
        Finding("too slow", "", 0.4),
        Finding("too fast", "", 2.0),
        Finding("no gradient", ""),
        Finding("as expected", "", 0.95),
    ]
    findings.sort(key=lambda finding: finding.health, reverse=True)
    assert [(finding.kind, finding.ratio) for finding in findings] == [
        ("no gradient", None),
        ("too slow", 0.4),
        ("too fast", 2.0),
        ("as expected", 1.1),
        ("as expected", 0.95),
        ("decay has not acted", 9.0),
        ("too early", None),
    ]


FINE, FAST, FASTER, SLOW = (
    Finding("as expected", "", 1.0),
    Finding("too fast", "", 1.8),
    Finding("too fast", "", 3.1),
    Finding("too slow", "", 0.5),
)
GROWS = Finding("growing", "", 1.4)


@pytest.mark.parametrize(
    ("findings", "says"),
    [
        ([FINE], "w0 turns as expected."),
        ([SLOW], "w0 turns too slowly, at 0.50x of what is expected."),
        ([FINE] * 3, "3 of 3 weights turn as expected."),
        ([FAST, FINE, FINE], "2 of 3 weights turn as expected; w0 turns 1.8x too fast."),
        ([FAST, FASTER], "Of 2 weights, w0 turns 1.8x too fast; w1 turns 3.1x too fast."),
        (
            [FINE, FAST, FASTER, FAST],
            "1 of 4 weights turns as expected; 3 turn too fast (w2 most, 3.1x).",
        ),
        ([GROWS, FINE], "1 of 2 weights turns as expected; 1 still grows, 1.4x its balance."),
        ([GROWS, GROWS], "2 of 2 weights still grow."),
        (
            [Finding("no gradient", "")] * 3,
            "3 of 3 weights have no gradient: only decay acts (w0, ...).",
        ),
        (
            [Finding("held by the loss", ""), Finding("held by the loss", "", 1.0), FINE],
            "1 of 3 weights turns as expected; 2 are held by the loss, not by decay.",
        ),
    ],
)
def test_one_sentence_about_all_weights(findings: list[Finding], says: str) -> None:
    assert in_short([(f"w{i}", finding) for i, finding in enumerate(findings)]) == says


def test_rows_of_one_kind_are_told_as_one() -> None:
    words = "as expected now ({}x); 0.43x of where it will settle ({} steps to go)"
    several = [words.format("0.96", "1,250"), words.format("1.1", "980")]
    assert len(set(map(skeleton, several))) == 1
    assert folded(several) == words.format("0.96 to 1.1", "980 to 1,250")
    assert folded(several[:1] * 2) == several[0]
    assert folded(["no prediction"] * 3) == "no prediction"
    assert skeleton("turns too fast: 1.8x what is expected") != skeleton("as expected now (1.8x)")


def test_numbers_in_words() -> None:
    assert [times(ratio) for ratio in (0.1, 1, 9.94, 9.96, 123.0)] == [
        "0.10x",
        "1.0x",
        "9.9x",
        "10x",
        "123x",
    ]
    steps = (0.4, 12.3, 999.6, 45_678.0, math.inf)
    assert [in_steps(number) for number in steps] == [
        "1 step",
        "12 steps",
        "1,000 steps",
        "45,700 steps",
        "no end of steps",
    ]
