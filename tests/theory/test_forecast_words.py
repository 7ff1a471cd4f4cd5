"""Forecasts and advice in words: every kind has a sentence, and no table is wider than the
terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_normdyn.theory.forecast import Advice, GroupForecast
from lightning_normdyn.theory.forecast_words import (
    MOST_WEIGHTS,
    GroupLine,
    advice_in_words,
    as_table,
)

TURNS = {"times": 2.8, "angle": 0.031, "median": 0.011, "coherence": 4.7}
SENTENCES = [
    (
        "decay cannot act",
        {"steps": 50_000, "left": 0.78, "relaxation": 120_000.0},
        "decay hardly acts in 50,000 steps: it shortens a norm by 22 %; norms take 120,000 steps "
        "to settle",
    ),
    (
        "memory longer than the run",
        {"timescale": 7500.0, "share_of_run": 1.5},
        "weights remember 7,500 steps, 1.5x the run: they still hold what they started from",
    ),
    (
        "memory shorter than an epoch",
        {"timescale": 200.0, "share_of_run": 0.1, "epochs": 0.4},
        "weights remember 200 steps, 0.4 of an epoch: what one batch has taught is forgotten "
        "before it comes again",
    ),
    (
        "warm-up too short",
        {"fast_steps": 900.0, "warm_up": 0, "times": 2.0},
        "norms start short: at the full learning rate weights turn more than 2x as fast as they "
        "will settle at, for 900 steps; there is no warm-up",
    ),
    (
        "warm-up too short",
        {"fast_steps": 900.0, "warm_up": 100, "times": 2.0},
        "norms start short: at the full learning rate weights turn more than 2x as fast as they "
        "will settle at, for 900 steps; the warm-up takes 100 steps",
    ),
    (
        "no warm-up needed",
        {"fast_steps": 0.0, "warm_up": 500, "times": 2.0},
        "norms start long enough: also without the warm-up of 500 steps weights would never turn "
        "more than 2x as fast as they will settle at",
    ),
    (
        "norm shrinks in the cool-down",
        {"shrinks": 0.23, "gradients": 1.3},
        "in the cool-down norms shrink by 23 %, so that gradients of scale-invariant weights grow "
        "1.3x; a decay in proportion to lr², WeightDecay(rate='lr_squared'), leaves norms where they "
        "are",
    ),
    (
        "norm doubles",
        {"steps": 4321.0, "pull": 1e-5},
        "norms double every 4,320 steps; decay does not hold them",
    ),
    (
        "never settles",
        {"lr": 0.01, "decay": 0.1},
        "norms never settle under this optimizer (lr 0.01, decay 0.1)",
    ),
    (
        "turns faster than its like",
        {**TURNS, "share": 0.14},
        "turns 2.8x as fast as the median of its optimizer (0.031 against 0.011 rad/step, "
        "coherence 4.7); decay hardly matters here (its share is 14 %)",
    ),
    (
        "turns more slowly than its like",
        {**TURNS, "times": 0.4, "decay": 0.1, "decay_for_median": 0.62},
        "turns 0.40x as fast as the median of its optimizer (0.031 against 0.011 rad/step, "
        "coherence 4.7); at this learning rate a decay of 0.62 instead of 0.1 would balance it at "
        "the median",
    ),
]


@pytest.mark.parametrize(("kind", "numbers", "words"), SENTENCES)
def test_every_advice_is_a_sentence_with_its_numbers(
    kind: str, numbers: dict[str, float], words: str
) -> None:
    assert advice_in_words(Advice(kind, numbers)) == words


def test_a_reason_follows_its_sentence() -> None:
    advice = Advice("never settles", {"lr": 0.01, "decay": 0.1}, reason="its steps are alike")
    assert advice_in_words(advice).endswith("(lr 0.01, decay 0.1): its steps are alike")


def test_no_sentence_promises_a_loss() -> None:
    for kind, numbers, _ in SENTENCES:
        words = advice_in_words(Advice(kind, numbers))
        for promise in ("loss", "better", "accuracy", "should"):
            assert promise not in words


FORECAST = GroupForecast(
    steps=3000,
    is_assumed=False,
    is_rough=False,
    peak_lr=3e-3,
    timescale=1111.0,
    total_pull=1.2,
    relaxation=556.0,
    angle=0.0097,
    coherence=None,
    settled_norms=None,
    norms=None,
    norm_steps=(),
)
LINE = GroupLine("AdamW 0", 12, 0.3, FORECAST, steps_per_epoch=100)


def line(name: str = "AdamW 0", **changes: Any) -> GroupLine:
    return replace(LINE, name=name, forecast=replace(FORECAST, **changes))


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = text.split("─\n")[1].splitlines()
    return [row.split() for row in lines if row.startswith(("AdamW", "Muon"))]


def test_a_group_is_one_line() -> None:
    text = as_table("forecast", [LINE], width=80)
    assert rows_of(text) == [
        ["AdamW", "0", "12", "0.003", "0.3", "1,110", "37", "%", "11", "0.0097", "556"]
    ]
    assert "scale-invariant weights settle" in text


def test_what_is_not_known_is_a_dash() -> None:
    unknown = replace(line(timescale=None, total_pull=None, angle=None), steps_per_epoch=None)
    free = line(timescale=None, total_pull=0.0, angle=None, relaxation=None)
    text = as_table("", [unknown, free, replace(LINE, is_whole=False)], width=80)
    assert [row[5:] for row in rows_of(text)] == [
        ["-", "-", "-", "-", "-"],
        ["for", "ever", "-", "-", "-", "-"],
        ["1,110", "-", "11", "0.0097", "556"],
    ]
    # A column without a number needs no legend.
    assert "rad/step is" not in as_table("", [unknown], width=80)


def test_the_measured_coherence_has_a_column() -> None:
    text = as_table("", [line(coherence=18.7), line("Muon", coherence=None)], width=80)
    assert "coherence" in text.splitlines()[0]
    # Of a group without a measured coherence there is none to show.
    assert [row[2 if row[0] == "AdamW" else 1] for row in rows_of(text)] == ["19", "-"]


def test_what_holds_of_several_groups_is_said_once() -> None:
    doubles = [Advice("norm doubles", {"steps": steps, "pull": 0.0}) for steps in (400.0, 900.0)]
    lines = [line("AdamW 0", advice=doubles[:1]), line("AdamW 1", advice=doubles[1:])]
    text = as_table("", lines, width=80)
    assert "AdamW 0, AdamW 1: norms double every 400 to 900 steps; no decay holds them." in text


def test_of_two_conditions_that_say_the_same_one_is_printed() -> None:
    weak = Advice("decay cannot act", {"steps": 100, "left": 0.9})
    memory = Advice("memory longer than the run", {"timescale": 900.0, "share_of_run": 9.0})
    both = as_table("", [line(advice=(weak, memory))])
    assert "decay hardly acts in 100 steps" in both
    assert "they started from" not in both
    assert "they started from" in as_table("", [line(advice=(memory,))])
    # What is said of a whole run asks for one.
    part = as_table("", [replace(line(advice=(weak, memory)), is_whole=False)])
    assert "decay hardly acts" not in part
    assert "they started from" not in part


def test_many_groups_and_weights_are_counted() -> None:
    lines = [line(f"AdamW {i}") for i in range(3)]
    odd = [Advice("turns faster than its like", TURNS, f"fc{i}") for i in range(MOST_WEIGHTS + 1)]
    text = as_table("", lines, odd, left_out=2, width=80)
    assert len(rows_of(text)) == 3
    assert "... and 2 more param groups" in text
    assert "fc2: turns" in text
    assert "fc3" not in text
    assert "... and 1 more weights unlike the others." in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_note_stands_below() -> None:
    assert "AdamW 0: said so." in as_table("", [replace(LINE, note="said so")])
