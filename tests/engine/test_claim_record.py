"""When values of the Euler test are enough to confirm a claim, to doubt it, and to withdraw it."""

from __future__ import annotations

from lightning_normdyn.engine.claim_record import CLOSE_LOOKS, Record
from lightning_normdyn.invariance.verdict import Verdict


def a_record(**given):
    return Record(Verdict.unknown("w", (4, 4)), **given)


def looks(record, values, *, logs=True):
    return [record.take(mean, number, logs=logs) for mean, number in values]


def test_eight_values_confirm_and_eight_contradict():
    record = a_record()
    assert looks(record, [(1e-6, 1.0)] * 7) == [None] * 7
    assert not record.confirmed
    assert record.take(1e-6, 1.0, logs=True) is None
    assert record.confirmed
    assert looks(a_record(), [(0.25, 4.0)] * 2) == [None, (0.5, 8)]


def test_steps_without_a_gradient_confirm_nothing():
    record = a_record()
    looks(record, [(0.0, 0.0)] * 3 * CLOSE_LOOKS)
    assert not record.confirmed
    looks(record, [(1e-6, 1.0)] * 8)
    assert record.confirmed


def test_what_has_been_seen_before_does_not_hide_what_comes_late():
    record = a_record()
    looks(record, [(1e-8, 100.0)] * 10_000)
    found = looks(record, [(1.0, 1.0)] * 9)
    assert found == [None] * 8 + [(1.0, 8)]


def test_a_single_odd_step_withdraws_nothing_and_calls_for_fewer_and_fewer_close_looks():
    record = a_record()
    looks(record, [(1e-8, 1.0)] * 8)
    close = 0
    for _ in range(200):
        found = looks(record, [(0.05, 1.0)])
        while record.close:
            close += 1
            found.append(record.take(1e-8, 1.0, logs=False))
        assert found == [None] * len(found)
    assert 8 <= close <= 8 * 9


def test_a_weight_that_is_rarely_used_is_withdrawn_all_the_same():
    record = a_record()
    looks(record, [(1e-8, 8.0)])
    found = []
    for _ in range(12):
        found.append(record.take(1.0, 1.0, logs=True))
        found += looks(record, [(0.0, 0.0)] * CLOSE_LOOKS, logs=False)
        if any(found):
            break
    assert any(found)


def test_a_record_survives_a_checkpoint():
    record = a_record()
    looks(record, [(1e-8, 1.0)] * 8)
    looks(record, [(1.0, 1.0)] * 3)
    again = Record.from_state(record.claim, record.state())
    assert again == record
    assert looks(again, [(1.0, 1.0)] * 6) == looks(record, [(1.0, 1.0)] * 6)
