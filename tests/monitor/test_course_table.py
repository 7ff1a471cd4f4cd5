"""Predictions of many weights on the way are those of each."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.monitor.course_table import MOST_PULLS, CourseTable, Predictions
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.verdicts import Course


def after(table, step, predictions, taken):
    found = Predictions.none(len(predictions))
    for place, prediction in enumerate(predictions):
        found.put(np.array([place]), prediction)
    return table.after(step, found, np.array(taken), np.array(taken))


def test_a_course_adds_up_relaxation_times_and_notes_changes():
    slow, fast = Prediction(0.01, 100.0, 4.0, 1e-3), Prediction(0.02, 50.0, 4.0, 2e-3)
    held = Prediction(0.01, None, 0.0, 0.1)
    table = CourseTable.from_values(("a", "held", "none", "absent"), [None] * 4)
    taken = [True, True, True, False]
    table = after(table, 10, [slow, held, None, slow], taken)
    table = after(table, 20, [slow, held, None, slow], taken)
    table = after(table, 30, [fast, held, None, slow], taken)
    assert table.of(0) == Course(fast, 30, pytest.approx(0.4), [(10, 1e-3), (30, 2e-3)])
    assert table.of(1) == Course(held, 30, 0.0, [])
    assert table.of(2) == Course(None, 30, 0.0, [])
    assert table.known.tolist() == taken


def test_changes_of_a_long_run_are_thinned_weight_by_weight():
    table = CourseTable.from_values(("often", "seldom"), [None, None])
    for step in range(MOST_PULLS + 1):
        often = Prediction(0.01, 100.0, 4.0, 1.1**step)
        seldom = Prediction(0.01, 100.0, 4.0, 1.0 + step // 300)
        table = after(table, step, [often, seldom], [True, True])
    steps = [step for step, _ in table.of(0).pulls]
    assert steps == list(range(0, MOST_PULLS + 1, 2))
    assert table.of(1).pulls == [(0, 1.0), (300, 2.0)]
    assert len(table.changes) == len(steps)


def test_what_a_checkpoint_holds_goes_on():
    course = Course(Prediction(0.01, 100.0, 4.0, 1e-3, True), 7, 0.5, [(1, 2e-3), (5, 1e-3)])
    table = CourseTable.from_values(("a", "b"), [course, None])
    assert table.of(0) == course
    assert not table.known[1]
    same = after(table, 17, [course.latest, None], [True, False]).of(0)
    assert same.pulls == course.pulls
    assert same.elapsed == pytest.approx(0.6)
    assert table.newest_pulls[0] == 1e-3
    assert np.isnan(table.newest_pulls[1])
