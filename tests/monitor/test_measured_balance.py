"""The balance of a weight from row to row: which steps its window holds, what is shown of it, and
what a checkpoint gives back."""

from __future__ import annotations

from math import exp, log1p, nan

import balances
import numpy as np
import pytest
import torch
from balances import shown_of, sums_of

from lightning_normdyn.functional import angle_from_sums, balanced_angular_update
from lightning_normdyn.monitor import measured_balance
from lightning_normdyn.monitor.balance import Passed
from lightning_normdyn.monitor.measured_balance import (
    OF_ONE_STEP,
    SHOWN,
    STATE,
    Balance,
    BalanceRow,
    BalanceTable,
    MatrixSums,
    balances_from,
    quantities_of,
    state_of,
)
from lightning_normdyn.monitor.pulls import End, Strength, Taken, passed_between

LR, DECAY, ANGLE, ENTRIES = 0.1, 0.01, 0.02, 10_000
PULL = LR * DECAY
ADAMW = Strength(DECAY)


def sums(ww=4.0, *, angle=ANGLE, size=0.0):
    """Of a step at a right angle to the weight."""
    step = torch.tensor(angle, dtype=torch.float64).tan().item() ** 2
    return sums_of(ww, ww, 0.0, step * ww, size * ww)


def after(balance, number, *, strength=ADAMW, known=True, is_set=False, **of_step):
    first = number if balance.end is None else balance.end.number + 1
    steps = [Taken(first, number, strength, LR)] if known else []
    return balances.after(balance, number, sums(**of_step), LR, strength, steps, is_set=is_set)


def followed(rows=8, every=20, **given):
    balance = Balance()
    for row in range(rows):
        balance = after(balance, 1 + row * every, **given)
    return balance


def test_the_angle_is_that_of_all_vectors_as_one():
    assert sums(angle=0.3).squared_angle == pytest.approx(0.3**2, rel=1e-12)


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
    (found,) = sums_of(ss, ss, sd, dd).squared_angle
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_the_size_of_long_vectors_counts_for_more():
    # Two vectors of length 1 and 3: (1 + 27) / (1 + 9).
    assert sums_of(10.0, 10.0, 0.0, 0.0, 28.0).size == pytest.approx(2.8)
    assert sums_of().size == 0.0


def test_a_settled_weight_turns_by_its_balance():
    shown = shown_of(followed(), ENTRIES, 19.0)
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
    assert shown_of(balance, ENTRIES, None)["norm_drift"] == pytest.approx(
        torch.tensor(1.1).double().log().item() / 40, rel=1e-6
    )


def test_without_a_row_nothing_is_shown():
    assert shown_of(Balance(), ENTRIES, 19.0) == {}


def test_too_few_steps_show_the_angle_the_drift_and_the_pull_alone():
    shown = shown_of(followed(rows=2), ENTRIES, 19.0)
    assert set(shown) == {"matrix_angle", "norm_drift", "pull"}


def test_of_few_entries_a_longer_span_is_asked_for():
    assert "coherence" not in shown_of(followed(), 4, 19.0)


@pytest.mark.parametrize("noise_coherence", [19.0, None])
def test_an_unknown_noise_coherence_leaves_the_rest(noise_coherence):
    shown = shown_of(followed(), ENTRIES, noise_coherence)
    assert ("loss_decay" in shown) == (noise_coherence is not None)
    assert "balance_ratio" in shown


def test_without_decay_nothing_is_0_or_infinite():
    balance = Balance()
    for number in range(1, 162, 20):
        growing = 4.0 * exp(19 * ANGLE**2 * (number - 1))
        balance = after(balance, number, strength=Strength(0.0), ww=growing)
    shown = shown_of(balance, ENTRIES, 19.0)
    assert shown["coherence"] == pytest.approx(19)
    assert shown["loss_decay"] == pytest.approx(0, abs=1e-9)
    assert not {"balance_ratio", "balanced_angular_update"} & set(shown)


def test_where_nobody_can_tell_the_pull_only_geometry_is_shown():
    shown = shown_of(followed(strength=Strength(nan)), ENTRIES, 19.0)
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
    assert shown_of(balance, ENTRIES, 19.0) == {}
    assert after(balance, 181).newest.number == 181


def test_a_checkpoint_gives_it_back():
    known = {"a": followed(), "b": Balance(), "c": followed(strength=Strength(nan))}
    state = state_of(known)
    STATE(state, "it")
    again = balances_from(state)
    assert again["a"] == known["a"]
    # By text: a NaN equals nothing.
    assert repr(again) == repr(known)
    assert repr(after(again["c"], 161)) == repr(after(known["c"], 161))


def test_what_the_newest_rows_tell_needs_no_span(monkeypatch):
    table = BalanceTable.from_values(("w", "new"), [followed(), None])
    entries = np.full(2, float(ENTRIES))
    wanted = np.ones((len(SHOWN), 2), dtype=np.bool_)
    whole = quantities_of(table, entries, entries, wanted)
    of_one_step = [name in OF_ONE_STEP for name in SHOWN]
    wanted[~np.array(of_one_step)] = False
    monkeypatch.setattr(measured_balance, "spans_of", None)
    found = quantities_of(table, entries, entries, wanted)
    assert found[of_one_step, 0].tolist() == whole[of_one_step, 0].tolist()
    assert np.isnan(found[:, 1]).all()


def test_many_weights_at_once_have_what_each_has_alone():
    """Of other lengths, pulls and windows: one begins late, one is set, one misses a row."""
    names = ("plain", "late", "set", "missing", "zero")
    table = BalanceTable.from_values(names, [None] * len(names))
    alone = dict.fromkeys(names, Balance())
    strength = Strength(*np.array([[DECAY, 2 * DECAY, DECAY, nan, DECAY], [0.0] * 5, [0.0] * 5]))
    for row in range(8):
        number = 1 + 20 * row
        ww = np.array([4.0, 1.0, 9.0, 4.0, 0.0]) * 1.01**row
        stepped = np.array([True, row > 2, True, row != 4, True])
        is_set = np.array([False, False, row == 5, False, False])
        first = 2 + 20 * (row - 1)
        of_all = MatrixSums(*(np.outer([1, 1, 0, ANGLE**2, 0, 0, 0], ww)))
        end = End(number, np.full(5, LR), of_all.size)
        parts = []
        for place, name in enumerate(names):
            one = Strength(*(column[place].item() for column in strength))
            steps = [Taken(first, number, one, LR)] if row else []
            before = End(*(column[[place]] for column in table.ends))
            present = End(number, end.lr[:1], end.size[[place]])
            parts.append(np.ravel(np.broadcast_arrays(*passed_between(before, present, steps))))
            if not stepped[place]:
                alone[name] = Balance()
                continue
            sums_alone = MatrixSums(*(column[[place]] for column in of_all))
            alone[name] = balances.after(
                alone[name], number, sums_alone, LR, one, steps, is_set=bool(is_set[place])
            )
        known = np.full(5, bool(row))
        passed = Passed(*np.array(parts).T)
        table = table.after(
            BalanceRow(number, of_all, end.lr, strength, passed, known, is_set, stepped)
        )
        for place, name in enumerate(names):
            if stepped[place]:
                assert repr(table.of(place)) == repr(alone[name])
    assert [len(table.of(place).window.points) for place in range(5)] == [8, 5, 2, 3, 0]
