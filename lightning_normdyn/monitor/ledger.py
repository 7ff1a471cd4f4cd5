"""What a monitor has recorded so far, in one object that is never changed but replaced by the next
one.

A signal handler of the cluster may save a checkpoint between any two lines of Python. Everything
that a new row changes (the history, the courses of the predictions, what waits for the next row) is
therefore prepared aside, and one assignment puts it in place: whoever looks finds either all of it
or nothing.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray

from lightning_normdyn.engine.value_checks import DAMAGE
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.predictions import Prediction
from lightning_normdyn.monitor.verdicts import Course

# No run counts as far, and beyond it a float no longer counts by ones.
_MOST = 2**53


@dataclass(frozen=True)
class Norms:
    """A weight's first norm and its last four, with their steps: enough to see it run away.

    Example:
        >>> norms = Norms(1.0)
        >>> for step in range(1, 7):
        ...     norms = norms.seen_at(step, 2.0**step)
        >>> norms.first, norms.steps
        (1.0, (3, 4, 5, 6))
    """

    first: float
    steps: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def seen_at(self, step: float, norm: float) -> Norms:
        """With one more norm."""
        # Four are enough for a forecast, and a run may have millions of steps.
        return Norms(self.first, (*self.steps[-3:], step), (*self.norms[-3:], norm))


@dataclass(frozen=True)
class Row:
    """What a history is told about one step.

    Args:
        step: the x axis.
        optimizer_step: optimizer steps that really happened so far.
        values: numbers by log key.
        events: kinds of events to mark at this step.
        vectors: per-vector arrays by name.
        amends: whether the values belong to the newest row there is, and not to a row of their own.
    """

    step: int
    optimizer_step: int
    values: Mapping[str, float]
    events: tuple[str, ...] = ()
    vectors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    amends: bool = False


@dataclass(frozen=True)
class Ending:
    """A row that only the end of a fit asked for, and what was known before it: a run that goes on
    has no such row.

    Args:
        before: the ledger without the row.
        row: the row.
    """

    before: Ledger
    row: Row


@dataclass(frozen=True)
class Ledger:
    """All that a new row changes, at one moment.

    Args:
        history: the rows, as far as they were asked for.
        evidence: rows with all that verdicts rest on; the same object where everything was asked
            for.
        last_step: x of the newest row; -1 without any.
        courses: by weight, what happened to its prediction.
        norms: by weight, its first and its last norms.
        rates: by weight, its last two learning rates.
        measured: by optimizer, x of its newest row that was due.
        counted: by optimizer, its own count of steps at its newest row.
        events: what happened since the newest row; the next one marks it.
        marked: how often each event had happened when the newest row was measured.
        promised: the newest values of the keys that other callbacks may rely on.
        results: what was measured in this batch.
        sent: what is on its way to the host.
        ending: if the newest row is one that only the end of a fit asked for.
    """

    history: History
    evidence: History
    last_step: int = -1
    courses: Mapping[str, Course] = field(default_factory=dict)
    norms: Mapping[str, Norms] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    measured: Mapping[int, int] = field(default_factory=dict)
    counted: Mapping[int, int] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    marked: Mapping[Any, int] = field(default_factory=dict)
    promised: Mapping[str, float] = field(default_factory=dict)
    results: tuple[Any, ...] = ()
    sent: tuple[Any, ...] = ()
    ending: Ending | None = None

    @classmethod
    def new(cls, *, separate: bool) -> Ledger:
        """An empty one.

        Args:
            separate: whether less is asked for than verdicts rest on.
        """
        history = History()
        # The same object where both would hold the same rows: each is then kept and written once.
        return cls(history, History() if separate else history)

    def without(self, name: str) -> Ledger:
        """Another weight has taken the place of the one that was called ``name``: its rows stay,
        what they led to expect does not."""
        return replace(
            self,
            courses=_all_but(self.courses, name),
            norms=_all_but(self.norms, name),
            rates=_all_but(self.rates, name),
        )

    @property
    def lasting(self) -> Ledger:
        """Without a row that only the end of a fit asked for."""
        if self.ending is None:
            return self
        # What is on its way was measured after that row, so a run that goes on still needs it.
        return replace(self.ending.before, results=self.results, sent=self.sent)

    def new_events(self, counts: Mapping[Any, int]) -> tuple[str, ...]:
        """Kinds of what happened since the newest results that were sent.

        Args:
            counts: how often each event has happened by now; the last of a key is its kind.
        """
        known = self.sent[-1].marked if self.sent else self.marked
        # Each kind once: a rescale of a hundred weights is one mark in a picture.
        kinds = [key[-1] for key, count in counts.items() if count > known.get(key, 0)]
        return tuple(dict.fromkeys(kinds))

    def with_row(self, row: Row, asked_for: Callable[[str], bool]) -> Ledger:
        """With one more row.

        Args:
            row: the row.
            asked_for: whether a key belongs in the history.
        """
        # A fork, and not the history itself: who holds that may be writing a checkpoint of it.
        history = self.history.fork()
        shown = {key: value for key, value in row.values.items() if asked_for(key)}
        _write(history, replace(row, values=shown))
        # Where everything was asked for, both are one object, which has the row by now.
        evidence = history
        if self.evidence is not self.history:
            evidence = self.evidence.fork()
            # Verdicts rest on curves alone: vectors kept twice would double the memory.
            _write(evidence, replace(row, events=(), vectors={}))
        return replace(self, history=history, evidence=evidence, last_step=row.step)

    def ending_with(self, row: Row, before: Ledger) -> Ledger:
        """With the newest row as one that only the end of the fit asks for, and ``before`` as what
        lasts if the run goes on."""
        # Without what is under way: `lasting` puts back whatever is under way by then.
        return replace(self, ending=Ending(replace(before, results=(), sent=()), row))

    def going_on_at(self, step: int) -> Ledger:
        """What is true if the next row is one of ``step`` or later: rows of the end of a fit, and
        later ones, are forgotten."""
        lasting = self.lasting
        # Mostly no row lies ahead, and thousands of them need not be copied.
        if lasting.last_step < step and all(x < step for x in lasting.measured.values()):
            return lasting
        # The row of `step` itself goes, too: that step is still to come, and is measured again.
        history = lasting.history.fork()
        history.truncate_after(step - 1)
        evidence = history
        if lasting.evidence is not lasting.history:
            evidence = lasting.evidence.fork()
            evidence.truncate_after(step - 1)
        # An optimizer whose row was forgotten is due again.
        measured = {index: x for index, x in lasting.measured.items() if x < step}
        newest = evidence.newest_step
        return replace(
            lasting,
            history=history,
            evidence=evidence,
            measured=measured,
            last_step=-1 if newest is None else newest,
        )

    # -- in checkpoints
    # ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings."""
        lasting = self.lasting
        state: dict[str, Any] = {
            "history": lasting.history.state_dict(),
            "last_step": lasting.last_step,
            **_state_of_courses(lasting.courses),
            "norms": {
                name: [n.first, list(n.steps), list(n.norms)] for name, n in lasting.norms.items()
            },
            "rates": {name: list(rates) for name, rates in lasting.rates.items()},
            "measured": dict(lasting.measured),
            "counted": dict(lasting.counted),
            "events": list(lasting.events),
            "promised": dict(lasting.promised),
        }
        if lasting.evidence is not lasting.history:
            state["evidence"] = lasting.evidence.state_dict()
        if self.ending is not None:
            row = self.ending.row
            state["ending"] = {
                "step": row.step,
                "optimizer_step": row.optimizer_step,
                "keys": list(row.values),
                # One tensor: a large network has thousands of numbers. The device is named because
                # a person may have set another default.
                "values": torch.tensor(
                    list(row.values.values()),
                    dtype=torch.float64,
                    device="cpu",
                ),
                "events": list(row.events),
                # Copies: torch shares the memory of numpy, and a checkpoint may be written later.
                "vectors": {
                    name: torch.from_numpy(array.copy()) for name, array in row.vectors.items()
                },
                "amends": row.amends,
                "promised": dict(self.promised),
                **_state_of_courses(self.courses),
            }
        return state

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        *,
        separate: bool,
        asked_for: Callable[[str], bool],
    ) -> Ledger:
        """What `state` gave.

        Args:
            state: from a checkpoint; one of an earlier version of this package knows less, and what
                it does not know is empty.
            separate: whether less is asked for than verdicts rest on.
            asked_for: whether a key belongs in the history.

        Raises:
            NormDynError: where the state is damaged; nothing of it should be believed then.
        """
        try:
            return cls._from_state(state, separate, asked_for)
        # It says already what is wrong, and as a ValueError it would be caught below.
        except NormDynError:
            raise
        except DAMAGE as error:
            raise NormDynError(f"it is damaged ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_state(
        cls,
        state: Mapping[str, Any],
        separate: bool,
        asked_for: Callable[[str], bool],
    ) -> Ledger:
        history = _history(state["history"])
        evidence = history
        # A run that had asked for everything has no evidence of its own: its history is all of it.
        if separate:
            evidence = _history(state.get("evidence", state["history"]))
        norms = {}
        for name, (first, steps, newest) in state.get("norms", {}).items():
            norms[str(name)] = Norms(float(first), _floats(steps), _floats(newest))
        rates = {}
        for name, newest in state.get("rates", {}).items():
            # A drop is judged by two rates, however many a checkpoint claims.
            rates[str(name)] = _floats(newest)[-2:]
        ledger = cls(
            history=history,
            evidence=evidence,
            last_step=whole_number(state["last_step"]),
            courses=_courses(state),
            norms=norms,
            rates=rates,
            measured=_whole_numbers(state.get("measured", {})),
            counted=_whole_numbers(state.get("counted", {})),
            events=tuple(map(str, state.get("events", []))),
            promised=_numbers(state.get("promised", {})),
        )
        ending = state.get("ending")
        if ending is None:
            return ledger
        # Strict: with one value too few, every later key would get its neighbour's.
        values = dict(zip(map(str, ending["keys"]), ending["values"].tolist(), strict=True))
        vectors = {str(name): tensor.numpy() for name, tensor in ending["vectors"].items()}
        events = tuple(map(str, ending["events"]))
        row = Row(
            whole_number(ending["step"]),
            whole_number(ending["optimizer_step"]),
            values,
            events,
            vectors,
            bool(ending["amends"]),
        )
        promised = _numbers(ending["promised"])
        # The history was saved without this row: written again, it can still be taken back.
        ended = ledger.with_row(row, asked_for).ending_with(row, ledger)
        return replace(ended, courses=_courses(ending), promised=promised)


def _all_but(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    # A copy: a ledger, and what it holds, never changes.
    return {other: entry for other, entry in table.items() if other != name}


def _write(history: History, row: Row) -> None:
    """Into a history of one's own. Nothing that records may end a fit: what stands in the way of a
    row is forgotten, not refused."""
    if row.amends and len(history):
        history.amend(row.values)
        return
    newest = history.newest_step
    # A loop that was set back counts from an earlier step.
    if newest is not None and newest > row.step:
        history.truncate_after(row.step - 1)
    history.append(row.step, row.values, optimizer_step=row.optimizer_step)
    for event in row.events:
        history.mark(row.step, event)
    for name, values in row.vectors.items():
        if history.vector_count(name) not in (None, len(values)):
            # The weight was in no loss yet, and only now it is known what it consists of.
            history.forget_vectors(name)
    if row.vectors:
        history.append_vectors(row.step, row.vectors)


def _state_of_courses(courses: Mapping[str, Course]) -> dict[str, Any]:
    elapsed = {}
    predictions = {}
    pulls = {}
    for name, course in courses.items():
        elapsed[name] = [course.step, course.elapsed]
        # Where no theory applies, a course goes on without a prediction.
        if course.latest is not None:
            predictions[name] = list(astuple(course.latest))
        changes = torch.tensor(course.pulls, dtype=torch.float64, device="cpu")
        # reshape: without any change torch does not know the second dimension.
        pulls[name] = changes.reshape(-1, 2)
    return {"elapsed": elapsed, "predictions": predictions, "pulls": pulls}


def _courses(state: Mapping[str, Any]) -> dict[str, Course]:
    courses: dict[str, Course] = {}
    # An earlier version kept less; the fit goes on with what there is.
    predictions = state.get("predictions", {})
    pulls = state.get("pulls", {})
    for name, (step, elapsed) in state.get("elapsed", {}).items():
        latest = _prediction(*predictions[name]) if name in predictions else None
        known: list[list[float]] = pulls[name].tolist() if name in pulls else []
        courses[str(name)] = Course(
            latest,
            whole_number(step),
            float(elapsed),
            [(int(at), float(pull)) for at, pull in known],
        )
    return courses


def _prediction(
    angular_update: float,
    relaxation: float | None,
    power: float,
    pull: float,
    rough: bool,
) -> Prediction:
    return Prediction(
        float(angular_update),
        None if relaxation is None else float(relaxation),
        float(power),
        float(pull),
        bool(rough),
    )


def _history(state: Mapping[str, Any]) -> History:
    history = History()
    history.load_state_dict(state)
    return history


def _numbers(table: Mapping[Any, Any]) -> dict[str, float]:
    return {str(key): float(value) for key, value in table.items()}


def _whole_numbers(table: Mapping[Any, Any]) -> dict[int, int]:
    return {whole_number(key): whole_number(value) for key, value in table.items()}


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))


def whole_number(value: Any) -> int:
    """A number of a checkpoint that counts something, checked.

    Raises:
        NormDynError: for anything else.
    """
    # bool is an int to Python, and a checkpoint may hold both.
    if not isinstance(value, int) or isinstance(value, bool) or not -_MOST < value < _MOST:
        raise NormDynError(f"{reprlib.repr(value)} is no whole number that a run can reach")
    return int(value)


__all__ = ["Ending", "Ledger", "Norms", "Row", "whole_number"]
