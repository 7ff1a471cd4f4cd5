"""States of single vectors are views of the state of all, and become it again."""

from __future__ import annotations

from lightning_normdyn.monitor.course_states import joined, shared_numbers, split

STATE = {"ww": [1.0, 2.0, 3.0], "angle": [0.1, 0.2, 0.3], "steps": 7, "rough": False}


def test_split_and_joined_are_inverse():
    parts = split(STATE, 3)
    assert dict(parts[1]) == {"ww": [2.0], "angle": [0.2], "steps": 7, "rough": False}
    assert joined(parts) == STATE
    assert joined([parts[2], parts[0]])["ww"] == [3.0, 1.0]


def test_a_view_is_what_a_checkpoint_gives_back():
    (first, *_) = split(STATE, 3)
    plain = dict(first)
    assert first == plain
    assert shared_numbers(first) == shared_numbers(plain) == (7, False)
    # A run that goes on has both kinds.
    assert joined([plain, first])["angle"] == [0.1, 0.1]
