"""Windows of many matrices: those with the same rows lie together, and each is extended by itself.

What a window says is tested in `test_balance.py`, through the same class.
"""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.monitor.balance import Passed, log_of_kept
from lightning_normdyn.monitor.balance_windows import MatrixRow, Windows, spans_of

WEIGHTS = 4
ALL = np.ones(WEIGHTS, dtype=np.bool_)
PULLS = np.array([1e-3, 2e-3, 3e-3, 4e-3])


def row(number, norms=1.0, pulls=PULLS):
    norms = np.broadcast_to(norms, WEIGHTS).astype(np.float64)
    angles = np.array([1e-4, 2e-4, 3e-4, 4e-4])
    return MatrixRow(number, norms, angles, pulls, np.full(WEIGHTS, 0.1), np.zeros(WEIGHTS))


def passed(steps, pulls=PULLS):
    kept = steps * log_of_kept(pulls)
    return Passed(steps, steps * pulls, kept, np.full(WEIGHTS, 0.1 * steps))


def walked(numbers):
    windows = Windows()
    for number in numbers:
        windows = windows.extended(row(number), passed(19), ALL, ALL)
    return windows


def test_weights_with_the_same_rows_lie_together():
    (window,) = walked(range(1, 102, 20)).shared
    assert window.places.tolist() == [0, 1, 2, 3]
    assert window.numbers == tuple(range(1, 102, 20))


def test_each_ends_by_itself_and_those_that_begin_together_stay_so():
    windows = walked(range(1, 102, 20))
    jumped = PULLS * np.array([1.0, 5.0, 1.0, 1.0])
    is_known = np.array([True, True, True, False])
    norms = np.array([1.0, 1.0, 0.0, 1.0])
    windows = windows.extended(row(121, norms, jumped), passed(19), is_known, ALL)
    lengths = [len(windows.of(place).points) for place in range(WEIGHTS)]
    assert lengths == [7, 1, 0, 1]
    # The one that was pulled otherwise and the one of unknown steps.
    assert [window.places.tolist() for window in windows.shared] == [[0], [1, 3]]
    gone = windows.extended(row(141), passed(19), ALL, np.array([False, True, True, True]))
    assert [len(gone.of(place).points) for place in range(WEIGHTS)] == [0, 2, 1, 2]


def test_what_single_windows_hold_becomes_the_same_again():
    windows = walked(range(1, 102, 20)).extended(
        row(121), passed(19), ~np.eye(WEIGHTS, dtype=np.bool_)[1], ALL
    )
    each = [windows.of(place) for place in range(WEIGHTS)]
    again = Windows.from_windows(each)
    assert [again.of(place) for place in range(WEIGHTS)] == each
    assert len(again.shared) == 2


def test_spans_of_many_are_those_of_each():
    windows = walked(range(1, 402, 20))
    entries = np.array([10.0**8, 1000.0, 3.0])
    weights = np.array([0, 1, 3])
    span, is_enough = spans_of(windows.shared[0], weights, entries)
    assert is_enough.tolist() == [True, True, False]
    for i in range(2):
        alone = windows.of(weights[i]).newest_span(int(entries[i]))
        assert span.steps[i] == alone.steps
        assert span.coherence[i] == pytest.approx(alone.coherence, rel=1e-14)
        assert span.ratio[i] == pytest.approx(alone.ratio, rel=1e-14)
        assert span.loss_decay(19.0)[i] == pytest.approx(alone.loss_decay(19.0), rel=1e-14)
    assert windows.of(3).newest_span(3) is None
