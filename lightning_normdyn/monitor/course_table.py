"""What happened to the predictions of many weights on the way: `lightning_normdyn.monitor.verdicts`
has the course of one.

Legend: ``w`` weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import NamedTuple

import numpy as np

from .by_weight import Doubles, Flags, Ints, Places
from .predictions import Predicted, Prediction
from .verdicts import Course

# A change of lr x decay by this much is worth an entry in a course.
NOTED_CHANGE = 0.01
MOST_PULLS = 512


class Predictions(NamedTuple):
    """A `Prediction` of each of many weights, ``(w,)`` each.

    Args:
        there: which weights have one; the other numbers of those that have none mean nothing.
        angular_update: see there.
        relaxation: see there; NaN for None.
        power: see there.
        pull: see there.
        rough: see there.
    """

    there: Flags
    angular_update: Doubles
    relaxation: Doubles
    power: Doubles
    pull: Doubles
    rough: Flags

    @classmethod
    def none(cls, width: int) -> Predictions:
        """No weight has one yet."""
        angles, relaxations, powers, pulls = np.full((4, width), nan, dtype=np.float64)
        there, rough = np.zeros((2, width), dtype=np.bool_)
        return cls(there, angles, relaxations, powers, pulls, rough)

    def put(self, places: Places, prediction: Prediction | None) -> None:
        """Write one prediction of several weights; only before anybody else has seen these."""
        self.there[places] = prediction is not None
        if prediction is None:
            return
        settles = nan if prediction.relaxation is None else prediction.relaxation
        self.angular_update[places] = prediction.angular_update
        self.relaxation[places] = settles
        self.power[places] = prediction.power
        self.pull[places] = prediction.pull
        self.rough[places] = prediction.rough

    def put_each(self, places: Ints, predicted: Predicted | None) -> None:
        """Write the predictions of several weights, as `put`."""
        # None of them: what the other columns hold means nothing then.
        if predicted is None:
            self.there[places] = False
            return
        self.there[places] = ~np.isnan(predicted.angular_update)
        self.angular_update[places] = predicted.angular_update
        self.relaxation[places] = predicted.relaxation
        self.power[places] = predicted.power
        self.pull[places] = predicted.pull
        self.rough[places] = predicted.rough

    def of(self, place: int) -> Prediction | None:
        """That of one weight."""
        if not self.there[place]:
            return None
        angle, relaxation, power, pull, rough = (column[place].item() for column in self[1:])
        return Prediction(angle, None if isnan(relaxation) else relaxation, power, pull, rough)

    def where(self, chosen: Flags, other: Predictions) -> Predictions:
        """These of the weights that are ``chosen``, and the ``other`` ones of the rest."""
        pairs = zip(self, other, strict=True)
        return Predictions(*(np.where(chosen, mine, theirs) for mine, theirs in pairs))


class Change(NamedTuple):
    """A row at which lr x decay of weights had changed, ``(w,)`` each.

    Args:
        steps: the optimizer step; NaN of weights of which it had not.
        pulls: lr x decay.
    """

    steps: Doubles
    pulls: Doubles


@dataclass(frozen=True, eq=False)
class CourseTable:
    """`Course` of many weights. It never changes; `after` gives the next one.

    Args:
        names: of the weights.
        latest: the newest predictions.
        steps: ``(w,)``, optimizer steps of them.
        elapsed: ``(w,)``, relaxation times since the start.
        changes: from old to new.
        counts: ``(w,)``, how many changes each weight has.
        newest_pulls: ``(w,)``, of the newest change of each; NaN without any.
        known: ``(w,)``, which weights could have had a prediction.
    """

    names: tuple[str, ...]
    latest: Predictions
    steps: Ints
    elapsed: Doubles
    changes: tuple[Change, ...]
    counts: Ints
    newest_pulls: Doubles
    known: Flags

    @classmethod
    def from_values(cls, names: tuple[str, ...], values: Sequence[Course | None]) -> CourseTable:
        """As `of` gave them; None of a weight without a course."""
        courses = [value or Course() for value in values]
        latest = Predictions.none(len(names))
        for place, course in enumerate(courses):
            latest.put(np.array([place], dtype=np.int64), course.latest)
        newest = [course.pulls[-1][1] if course.pulls else nan for course in courses]
        return cls(
            names,
            latest,
            np.array([course.step for course in courses], dtype=np.int64),
            np.array([course.elapsed for course in courses], dtype=np.float64),
            _changes([course.pulls for course in courses]),
            np.array([len(course.pulls) for course in courses], dtype=np.int64),
            np.array(newest, dtype=np.float64),
            np.array([value is not None for value in values], dtype=np.bool_),
        )

    def of(self, place: int) -> Course:
        """Of one weight."""
        return Course(
            self.latest.of(place),
            int(self.steps[place]),
            float(self.elapsed[place]),
            self._pulls_of(place),
        )

    def _pulls_of(self, place: int) -> list[tuple[int, float]]:
        pulls = []
        for change in self.changes:
            if not isnan(change.steps[place]):
                pulls.append((int(change.steps[place]), float(change.pulls[place])))
        return pulls

    def after(
        self, step: int, predictions: Predictions, taken: Flags, judged: Flags
    ) -> CourseTable:
        """With the predictions of an optimizer step.

        Args:
            step: its number.
            predictions: of all weights.
            taken: ``(w,)``, of which of them they count.
            judged: ``(w,)``, which have a course from now on.
        """
        moves = taken & predictions.there & (predictions.relaxation > 0)
        with np.errstate(all="ignore"):
            # Steps since the last look went by at this rate.
            passed = (step - self.steps) / predictions.relaxation
            differs = np.abs(predictions.pull / self.newest_pulls - 1) > NOTED_CHANGE
        notes = moves & (differs | (self.counts == 0))
        table = self._replaced(
            known=self.known | judged,
            # Mostly all of them.
            latest=predictions if taken.all() else predictions.where(taken, self.latest),
            steps=np.where(taken, step, self.steps),
            elapsed=np.where(moves, self.elapsed + passed, self.elapsed),
        )
        return table._noted(step, predictions.pull, notes) if notes.any() else table

    def _noted(self, step: int, pulls: Doubles, notes: Flags) -> CourseTable:
        """With a change of lr x decay of some weights."""
        change = Change(np.where(notes, float(step), nan), np.where(notes, pulls, nan))
        table = self._replaced(
            changes=(*self.changes, change),
            counts=self.counts + notes,
            newest_pulls=np.where(notes, pulls, self.newest_pulls),
        )
        if table.counts.max() <= MOST_PULLS:
            return table
        # A cosine over a long run has an entry for every percent; half of them show it as well.
        thinned = [table._pulls_of(place) for place in range(len(self.names))]
        for of_weight in thinned:
            if len(of_weight) > MOST_PULLS:
                del of_weight[1::2]
        counts = np.array([len(of_weight) for of_weight in thinned], dtype=np.int64)
        return table._replaced(changes=_changes(thinned), counts=counts)

    def _replaced(self, **fields: object) -> CourseTable:
        # As `dataclasses.replace`, which asks every field for its kind first.
        return CourseTable(**{**vars(self), **fields})


def _changes(pulls: Sequence[Sequence[tuple[int, float]]]) -> tuple[Change, ...]:
    """From the changes of each weight those of all of them, with the first ones first."""
    width = len(pulls)
    changes = []
    for i in range(max(map(len, pulls), default=0)):
        change = Change(
            np.full(width, nan, dtype=np.float64), np.full(width, nan, dtype=np.float64)
        )
        for place, of_weight in enumerate(pulls):
            if i < len(of_weight):
                change.steps[place], change.pulls[place] = of_weight[i]
        changes.append(change)
    return tuple(changes)


__all__ = ["Change", "CourseTable", "Predictions"]
