"""The balance of a weight from row to row: which steps its window holds, what is shown of it, and
what a checkpoint gives back."""

from __future__ import annotations

from math import exp, log1p, nan, sqrt

import pytest
import torch

from lightning_normdyn.functional import angle_from_sums, balanced_angular_update
from lightning_normdyn.monitor.measured_balance import (
    OF_ONE_STEP,
    STATE,
    Balance,
    MatrixSums,
    balances_from,
    quantities_of,
    quantities_of_step,
    state_of,
)
from lightning_normdyn.monitor.passed_steps import Stretch
from lightning_normdyn.monitor.pulls import Strength

LR, DECAY, ANGLE, ENTRIES = 0.1, 0.01, 0.02, 10_000
PULL = LR * DECAY
ADAMW = Strength(DECAY)


def sums(ww=4.0, *, angle=ANGLE, size=0.0):
    """Of a step at a right angle to the weight."""
    step = torch.tensor(angle, dtype=torch.float64).tan().item() ** 2
    return MatrixSums(ww, ww, 0.0, step * ww, size * ww)


def after(balance, number, *, strength=ADAMW, known=True, is_set=False, **of_step):
    first = number if balance.end is None else balance.end.number + 1
    stretches = [(Stretch(first, number, [{}]), strength, LR)] if known else []
    return balance.after(number, sums(**of_step), LR, strength, stretches, is_set=is_set)


def followed(rows=8, every=20, **given):
    balance = Balance()
    for row in range(rows):
        balance = after(balance, 1 + row * every, **given)
    return balance


def test_the_angle_is_that_of_all_vectors_as_one():
    assert sqrt(sums(angle=0.3).squared_angle) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize(
    "numbers",
    [
        (4.0, 0.1, 0.3),
        (4.0, -4.0, 5.0),
        (4.0, -1.0, 0.25),  # shortened alone
        (4.0, -4.0, 4.0),  # nothing is left
        (0.0, 0.0, 1.0),
        (4.0, nan, 1.0),
        (1e-6, 1e-9, 1e-12),
    ],
)
def test_the_angle_is_the_one_of_the_formula(numbers):
    ss, sd, dd = numbers
    tensors = torch.tensor(numbers, dtype=torch.float64)
    expected = angle_from_sums(*tensors).item() ** 2
    found = MatrixSums(ss, ss, sd, dd, 0.0).squared_angle
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_size_of_long_vectors_counts_for_more():
    # Two vectors of length 1 and 3: (1 + 27) / (1 + 9).
    assert MatrixSums(10.0, 10.0, 0.0, 0.0, 28.0).size == pytest.approx(2.8)
    assert MatrixSums(0.0, 0.0, 0.0, 0.0, 0.0).size == 0.0


def test_a_settled_weight_turns_by_its_balance():
    shown = quantities_of(followed(), ENTRIES, 19.0)
    kappa = -2 * log1p(-PULL) / ANGLE**2
    assert shown["matrix_angle"] == pytest.approx(ANGLE)
    assert shown["norm_drift"] == 0
    assert shown["coherence"] == pytest.approx(kappa)
    assert shown["balance_ratio"] == pytest.approx(1, abs=1e-3)
    assert shown["balanced_angular_update"] == pytest.approx(
        float(balanced_angular_update(PULL, kappa))
    )
    # Noise alone would grow the norm by 19 θ²/2, and decay takes only P of it.
    assert shown["loss_decay"] == pytest.approx((19 * ANGLE**2 / 2 - PULL) / LR)


def test_the_drift_is_that_since_the_newest_row():
    balance = after(followed(), 161, ww=4.0 * 1.1)
    assert quantities_of(balance, ENTRIES, None)["norm_drift"] == pytest.approx(
        torch.tensor(1.1).double().log().item() / 40, rel=1e-6
    )


def test_without_a_row_nothing_is_shown():
    assert quantities_of(Balance(), ENTRIES, 19.0) == {}


def test_too_few_steps_show_the_angle_the_drift_and_the_pull_alone():
    shown = quantities_of(followed(rows=2), ENTRIES, 19.0)
    assert set(shown) == {"matrix_angle", "norm_drift", "pull"}


def test_of_few_entries_a_longer_span_is_asked_for():
    assert "coherence" not in quantities_of(followed(), 4, 19.0)


@pytest.mark.parametrize("noise_coherence", [19.0, None])
def test_an_unknown_noise_coherence_leaves_the_rest(noise_coherence):
    shown = quantities_of(followed(), ENTRIES, noise_coherence)
    assert ("loss_decay" in shown) == (noise_coherence is not None)
    assert "balance_ratio" in shown


def test_without_decay_nothing_is_0_or_infinite():
    balance = Balance()
    for number in range(1, 162, 20):
        growing = 4.0 * exp(19 * ANGLE**2 * (number - 1))
        balance = after(balance, number, strength=Strength(0.0), ww=growing)
    shown = quantities_of(balance, ENTRIES, 19.0)
    assert shown["coherence"] == pytest.approx(19)
    assert shown["loss_decay"] == pytest.approx(0, abs=1e-9)
    assert not {"balance_ratio", "balanced_angular_update"} & set(shown)


def test_where_nobody_can_tell_the_pull_only_geometry_is_shown():
    shown = quantities_of(followed(strength=Strength(nan)), ENTRIES, 19.0)
    assert set(shown) == {"matrix_angle", "norm_drift"}


def test_what_decay_has_done_adds_up():
    balance = followed()
    assert balance.elapsed == pytest.approx(140 * PULL)
    assert followed(strength=Strength(nan)).elapsed == 0
    # Neighbouring rows, between which there is no step.
    assert followed(every=1, strength=Strength(nan)).elapsed == 0


@pytest.mark.parametrize("known", [True, False])
def test_steps_that_nobody_saw_end_a_window(known):
    balance = after(followed(), 161, known=known)
    assert len(balance.window.points) == (9 if known else 1)
    # Between neighbours there is nothing to know.
    assert len(after(balance, 162, known=False).window.points) == (10 if known else 2)


def test_a_length_that_was_set_ends_a_window_and_so_do_the_steps_right_after():
    balance = after(followed(), 161, is_set=True)
    assert len(balance.window.points) == 1
    # What a callback sets at the step of a row happens after it was measured.
    balance = after(balance, 181)
    assert len(balance.window.points) == 1
    assert len(after(balance, 201).window.points) == 2


def test_a_row_of_zeros_has_no_window():
    balance = after(followed(), 161, ww=0.0)
    assert balance.newest is None
    assert quantities_of(balance, ENTRIES, 19.0) == {}
    assert after(balance, 181).newest.number == 181


def test_a_checkpoint_gives_it_back():
    balances = {"a": followed(), "b": Balance(), "c": followed(strength=Strength(nan))}
    state = state_of(balances)
    STATE(state, "it")
    again = balances_from(state)
    assert again["a"] == balances["a"]
    # By text: a NaN equals nothing.
    assert repr(again) == repr(balances)
    assert repr(after(again["c"], 161)) == repr(after(balances["c"], 161))


def test_what_the_newest_rows_tell_needs_no_span(monkeypatch):
    balance = followed()
    whole = quantities_of(balance, ENTRIES, 19.0)
    expected = {name: whole[name] for name in OF_ONE_STEP}
    monkeypatch.setattr(type(balance.window), "newest_span", None)
    assert quantities_of_step(balance) == expected
    assert quantities_of_step(Balance()) == {}
