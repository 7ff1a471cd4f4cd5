"""In how many steps a callback acted."""

from __future__ import annotations

from lightning_normdyn.engine.tally import Tally


def test_a_tally_counts_steps_once():
    tally = Tally()
    for number, found in [(1, True), (1, True), (2, False), (5, True)]:
        tally.note(number, found)
    assert (tally.due, tally.acted) == (3, 2)
