"""Windows of a weight's balance, against sums over every single step."""

from __future__ import annotations

from math import inf, isnan, nan

import numpy as np
import pytest

from lightning_normdyn.monitor.balance import LEAST_STEPS, BalanceWindow, Passed, log_of_kept
from lightning_normdyn.monitor.balance_windows import MOST_POINTS, MatrixRow, Windows

ENTRIES = 10_000


def extended(window, row, passed):
    """One weight's window with one more row; ``passed`` None where that is not known."""
    is_known = np.array([passed is not None])
    passed = passed or Passed(0, 0.0, 0.0, 0.0)
    windows = Windows.from_windows([window])
    return windows.extended(row, passed, is_known, np.array([True])).of(0)


class History:
    """A norm that grows by ``kappa`` per squared angle and shrinks by a pull, step by step."""

    def __init__(self, angles, pulls, kappa=5.0, lr=0.1):
        self.squared = np.asarray(angles, dtype=np.float64) ** 2
        self.pulls = np.broadcast_to(np.asarray(pulls, dtype=np.float64), self.squared.shape)
        growth = kappa * self.squared + 2 * np.log1p(-self.pulls)
        self.norms = np.exp(np.concatenate([[0.0], growth.cumsum()]))
        self.lr = lr

    def row(self, number):
        i = number - 1
        numbers = (self.norms[i], self.squared[i], self.pulls[i], self.lr, 0.0)
        return MatrixRow(number, *(np.array([x]) for x in numbers))

    def passed(self, before, now):
        between = self.pulls[before : now - 1]
        return Passed(len(between), between.sum(), np.log1p(-between).sum(), self.lr * len(between))

    def window(self, numbers):
        window = BalanceWindow()
        before = None
        for number in numbers:
            passed = None if before is None else self.passed(before, number)
            window = extended(window, self.row(number), passed)
            before = number
        return window


def test_with_a_row_at_every_step_the_coherence_is_exact():
    angles = 0.01 * (1 + 0.5 * np.sin(np.arange(100)))
    window = History(angles, 1e-3, kappa=7.0).window(range(1, 61))
    assert window.whole.steps == 59
    assert window.whole.coherence == pytest.approx(7.0, rel=1e-10)


def test_between_rows_angles_are_interpolated_and_pulls_are_not():
    steps = np.arange(1000)
    angles = 0.01 * np.exp(-steps / 800)
    pulls = 1e-3 * (1 + 0.3 * np.cos(steps / 3))  # changes much faster than there are rows
    window = History(angles, pulls, kappa=7.0).window(range(1, 1000, 50))
    assert window.whole.pulls == pytest.approx(pulls[:950].sum(), rel=1e-12)
    assert window.whole.coherence == pytest.approx(7.0, rel=0.01)


def test_the_ratio_tells_how_far_the_norm_is_from_its_balance():
    kappa, pull = 4.0, 1e-3
    balanced = np.sqrt(2 * pull / kappa)
    for times in (0.5, 1.0, 2.0):
        window = History(np.full(200, times * balanced), pull, kappa).window(range(1, 200, 20))
        assert window.whole.ratio == pytest.approx(times, rel=1e-3)


def test_a_loss_that_pulls_inwards_is_told_from_decay():
    kappa0, pull, lr, loss = 19.0, 1e-4, 0.1, 2e-3
    angle = 0.005
    # What noise grows, less what the loss and the decay take away: equation (0.5) solved for drift.
    drift = kappa0 * angle**2 / 2 - pull - lr * loss
    kappa = 2 * (drift + pull) / angle**2
    window = History(np.full(200, angle), pull, kappa, lr).window(range(1, 200, 20))
    assert window.whole.loss_decay(kappa0) == pytest.approx(loss, rel=1e-2)


def test_where_the_loss_holds_the_norm_there_is_a_coherence_and_no_ratio():
    window = History(np.full(200, 0.01), 0.0, kappa=-3.0).window(range(1, 200, 20))
    assert window.whole.coherence == pytest.approx(-3.0)
    assert isnan(window.whole.ratio)


def test_without_decay_there_is_a_coherence_and_no_ratio():
    window = History(np.full(200, 0.01), 0.0, kappa=3.0).window(range(1, 200, 20))
    assert window.whole.coherence == pytest.approx(3.0)
    assert isnan(window.whole.ratio)


def test_the_newest_span_is_the_shortest_that_is_long_and_exact_enough():
    history = History(np.full(2000, 0.01), 1e-4, kappa=5.0)
    long = history.window(range(1, 2000, 10))
    assert long.newest_span(10**8).steps == LEAST_STEPS
    few = long.newest_span(1000)
    # 2 / (θ sqrt(κ T d)) = 0.1
    assert few.steps == pytest.approx(400 / (1e-4 * 5 * 1000), rel=0.1)
    assert long.newest_span(10) is None
    assert history.window(range(1, 131, 60)).newest_span(10**8) is None, "three rows"
    assert history.window(range(1, 41)).newest_span(10**8) is None, "forty steps"


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.0])
def test_a_jump_of_a_constant_pull_ends_a_window(factor):
    pulls = np.full(400, 1e-3)
    pulls[200:] *= factor
    window = History(np.full(400, 0.01), pulls).window(range(1, 400, 20))
    assert window.points[0].number == 201


@pytest.mark.parametrize(
    "of", [lambda t: np.exp(-5 * t), lambda t: np.cos(t * 1.5) ** 2, lambda t: t]
)
def test_a_gliding_pull_does_not(of):
    pulls = 1e-3 * of(np.arange(400) / 400 + 1e-9)
    window = History(np.full(400, 0.01), pulls).window(range(1, 400, 40))
    assert window.points[0].number == 1


def test_a_window_begins_anew_where_its_past_is_not_known():
    history = History(np.full(400, 0.01), 1e-3)
    window = history.window(range(1, 200, 20))
    assert len(extended(window, history.row(201), None).points) == 1


@pytest.mark.parametrize(
    "change", [{"squared_norm": 0.0}, {"squared_norm": nan}, {"squared_angle": inf}]
)
def test_what_is_no_measurement_leaves_nothing(change):
    history = History(np.full(400, 0.01), 1e-3)
    window = history.window(range(1, 200, 20))
    broken = history.row(201)._replace(**{name: np.array([x]) for name, x in change.items()})
    assert extended(window, broken, history.passed(181, 201)) == BalanceWindow()


def test_an_unknown_pull_leaves_the_drift_and_no_coherence():
    history = History(np.full(400, 0.01), 1e-3)
    window = BalanceWindow()
    for number in range(1, 200, 20):
        row = history.row(number)._replace(pull=np.array([nan]))
        window = extended(window, row, None if number == 1 else Passed(19, nan, nan, 1.9))
    assert window.whole.growth == pytest.approx(np.log(history.norms[180] / history.norms[0]) / 2)
    assert window.newest_span(10**8) is None
    # And once it is known, the window is one of known pulls.
    known = extended(window, history.row(201), history.passed(181, 201))
    assert known.points[0].number == 201


def test_a_long_window_keeps_its_sums():
    history = History(np.full(3000, 0.01), 1e-4, kappa=5.0)
    window = history.window(range(1, 3000, 5))
    assert len(window.points) <= MOST_POINTS
    assert window.whole.steps == 2995
    assert window.whole.angles == pytest.approx(2995e-4)
    assert window.whole.coherence == pytest.approx(5.0)


def test_a_decay_that_leaves_nothing_has_no_logarithm():
    assert isnan(log_of_kept(1.0))
    assert log_of_kept(0.5) == pytest.approx(np.log(0.5))
