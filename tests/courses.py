"""Courses of single weights, through the table that holds those of many."""

from __future__ import annotations

import numpy as np

from lightning_normdyn.monitor.course_table import CourseTable, Predictions
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.verdicts import Course


def predicted(course: Course, step: int, prediction: Prediction | None) -> Course:
    """A course with the prediction of one more optimizer step."""
    predictions = Predictions.none(1)
    predictions.put(np.array([0]), prediction)
    table = CourseTable.from_values(("w",), [course])
    everywhere = np.array([True])
    return table.after(step, predictions, everywhere, everywhere).of(0)
