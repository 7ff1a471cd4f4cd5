"""What a monitor has recorded so far, in one object that is never changed but replaced by the next
one.

A signal handler of the cluster may save a checkpoint between any two lines of Python. Everything
that a new row changes (the history, the courses of the predictions, what waits for the next row) is
therefore prepared aside, and one assignment puts it in place: whoever looks finds either all of it
or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray

from lightning_normdyn.engine.value_checks import (
    DAMAGE,
    flag,
    many,
    number,
    record,
    table,
    text,
    whole,
)
from lightning_normdyn.errors import NormDynError

from . import expectations, measured_balance
from .expectations import Expectation
from .history import History
from .measured_balance import Balance
from .norm_table import Norms
from .predictions import Prediction
from .verdicts import Course

_PROMISED = table(text(), number(finite=False))
# What is damaged here would be found much later, in the middle of a fit.
_OF_WEIGHTS = {"expectations": expectations.STATE, "balances": measured_balance.STATE}
# A row of the end of a fit, and a whole ledger, as they lie in a checkpoint. Histories, predictions
# and norms are checked by making them.
_ENDING = record(
    {
        "step": whole(),
        "optimizer_step": whole(),
        "keys": many(text()),
        "events": many(text()),
        "amends": flag,
        "promised": _PROMISED,
        **_OF_WEIGHTS,
    }
)
_check = record(
    {
        "last_step": whole(-1),
        "measured": table(whole(), whole()),
        "counted": table(whole(), whole()),
        "jumped": many(whole()),
        "events": many(text()),
        "promised": _PROMISED,
        **_OF_WEIGHTS,
    },
    {"ending": _ENDING},
)


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


@contextmanager
def _refusing_damage() -> Iterator[None]:
    """What reading a damaged state raises, as a NormDynError."""
    try:
        yield
    # It says already what is wrong, and as a ValueError it would be caught below.
    except NormDynError:
        raise
    except DAMAGE as error:
        raise NormDynError(f"it is damaged ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Ledger:
    """All that a new row changes, at one moment.

    Args:
        history: the rows, with all that verdicts rest on.
        last_step: x of the newest row; -1 without any.
        courses: by weight, what happened to its prediction.
        expectations: by weight, where its expected norm stands.
        balances: by weight, the window of its balance.
        norms: by weight, its first and its last norms.
        rates: by weight, its last two learning rates.
        measured: by optimizer, x of its newest row that was due.
        counted: by optimizer, its own count of steps at its newest row.
        events: what happened since the newest row; the next one marks it.
        marked: how often each event had happened when the newest row was measured.
        jumped: optimizers some of whose weights were set to another length since their own newest
            row, so far as it is known; `new_jumps` adds what came later.
        promised: the newest values of the keys that other callbacks may rely on.
        results: what was measured in this batch.
        sent: what is on its way to the host.
        ending: the newest row, if only the end of a fit asked for it: a run that goes on has no
            such row.
        before: the ledger without that row.
    """

    history: History = field(default_factory=History)
    last_step: int = -1
    courses: Mapping[str, Course] = field(default_factory=dict)
    expectations: Mapping[str, Expectation] = field(default_factory=dict)
    balances: Mapping[str, Balance] = field(default_factory=dict)
    norms: Mapping[str, Norms] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    measured: Mapping[int, int] = field(default_factory=dict)
    counted: Mapping[int, int] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    marked: Mapping[Any, int] = field(default_factory=dict)
    jumped: frozenset[int] = frozenset()
    promised: Mapping[str, float] = field(default_factory=dict)
    results: tuple[Any, ...] = ()
    sent: Any = None
    ending: Row | None = None
    before: Ledger | None = None

    def replaced(self, **fields: Any) -> Ledger:
        """As `dataclasses.replace`, which asks every field for its kind first: a row replaces
        several."""
        return Ledger(**{**vars(self), **fields})

    def without(self, name: str) -> Ledger:
        """Another weight has taken the place of the one that was called ``name``: its rows stay,
        what they led to expect does not."""
        return replace(
            self,
            courses=_all_but(self.courses, name),
            expectations=_all_but(self.expectations, name),
            balances=_all_but(self.balances, name),
            norms=_all_but(self.norms, name),
            rates=_all_but(self.rates, name),
        )

    @property
    def lasting(self) -> Ledger:
        """Without a row that only the end of a fit asked for."""
        if self.before is None:
            return self
        # What is on its way was measured after that row, so a run that goes on still needs it.
        return replace(self.before, results=self.results, sent=self.sent)

    def new_events(self, counts: Mapping[Any, int]) -> tuple[str, ...]:
        """Kinds of what happened since the newest results that were sent.

        Args:
            counts: how often each event has happened by now, by callback, optimizer and kind.
        """
        # Each kind once: a rescale of a hundred weights is one mark in a picture.
        kinds = [kind for _, _, kind in _new((self.sent or self).marked, counts)]
        return tuple(dict.fromkeys(kinds))

    def new_jumps(self, counts: Mapping[Any, int]) -> frozenset[int]:
        """`jumped`, with what happened since the newest row.

        Args:
            counts: as for `new_events`.
        """
        return self.jumped.union(index for _, index, _ in _new(self.marked, counts))

    def with_row(self, row: Row) -> Ledger:
        """With one more row."""
        # A fork to write in: who holds the one that is here may be writing a checkpoint of it.
        history = self.history.fork()
        _write(history, row)
        return self.replaced(history=history, last_step=row.step)

    def ending_with(self, row: Row, before: Ledger) -> Ledger:
        """With the newest row as one that only the end of the fit asks for, and ``before`` as what
        lasts if the run goes on."""
        # Without what is under way: `lasting` puts back whatever is under way by then.
        return replace(self, ending=row, before=replace(before, results=(), sent=None))

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
        # An optimizer whose row was forgotten is due again.
        measured = {index: x for index, x in lasting.measured.items() if x < step}
        newest = history.newest_step
        return replace(
            lasting,
            history=history,
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
            **lasting._state_of_weights(),
            "norms": {
                name: [n.first, list(n.steps), list(n.norms)] for name, n in lasting.norms.items()
            },
            "rates": {name: list(rates) for name, rates in lasting.rates.items()},
            "measured": dict(lasting.measured),
            "counted": dict(lasting.counted),
            "jumped": sorted(lasting.jumped),
            "events": list(lasting.events),
            "promised": dict(lasting.promised),
        }
        row = self.ending
        if row is not None:
            state["ending"] = {
                "step": row.step,
                "optimizer_step": row.optimizer_step,
                "keys": list(row.values),
                # One tensor: a large network has thousands of numbers. The device is named because
                # a person may have set another default.
                "values": torch.tensor(
                    list(row.values.values()), dtype=torch.float64, device="cpu"
                ),
                "events": list(row.events),
                # Copies: torch shares the memory of numpy, and a checkpoint may be written later.
                "vectors": {
                    name: torch.from_numpy(array.copy()) for name, array in row.vectors.items()
                },
                "amends": row.amends,
                "promised": dict(self.promised),
                **self._state_of_weights(),
            }
        return state

    def _state_of_weights(self) -> dict[str, Any]:
        """What a row says of each weight for the rows after it."""
        return {
            **_state_of_courses(self.courses),
            "expectations": expectations.state_of(self.expectations),
            "balances": measured_balance.state_of(self.balances),
        }

    @classmethod
    @_refusing_damage()
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """What `state` gave.

        Args:
            state: from a checkpoint.

        Raises:
            NormDynError: where the state is damaged; nothing of it should be believed then.
        """
        _check(state, "it")
        norms = {}
        for name, (first, steps, newest) in state["norms"].items():
            norms[name] = Norms(float(first), _floats(steps), _floats(newest))
        ledger = cls(
            history=_history(state["history"]),
            last_step=state["last_step"],
            **_of_weights(state),
            norms=norms,
            rates={name: _floats(rates) for name, rates in state["rates"].items()},
            measured=state["measured"],
            counted=state["counted"],
            jumped=frozenset(state["jumped"]),
            events=tuple(state["events"]),
            promised=state["promised"],
        )
        ending = state.get("ending")
        if ending is None:
            return ledger
        row = Row(
            ending["step"],
            ending["optimizer_step"],
            # Strict: with one value too few, every later key would get its neighbour's.
            dict(zip(ending["keys"], ending["values"].tolist(), strict=True)),
            tuple(ending["events"]),
            {name: tensor.numpy() for name, tensor in ending["vectors"].items()},
            ending["amends"],
        )
        # The history was saved without this row: written again, it can still be taken back.
        ended = ledger.with_row(row).ending_with(row, ledger)
        return replace(ended, **_of_weights(ending), promised=ending["promised"])


def _new(known: Mapping[Any, int], counts: Mapping[Any, int]) -> list[Any]:
    """The events that have happened since they had happened so often."""
    return [key for key, count in counts.items() if count > known.get(key, 0)]


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
    courses = {}
    for name, (step, elapsed) in state["elapsed"].items():
        latest = None
        if name in state["predictions"]:
            angle, relaxation, power, pull, rough = state["predictions"][name]
            settles = None if relaxation is None else float(relaxation)
            latest = Prediction(float(angle), settles, float(power), float(pull), bool(rough))
        pulls = [(int(at), float(pull)) for at, pull in state["pulls"][name].tolist()]
        courses[name] = Course(latest, int(step), float(elapsed), pulls)
    return courses


def _of_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "courses": _courses(state),
        "expectations": expectations.expectations_from(state["expectations"]),
        "balances": measured_balance.balances_from(state["balances"]),
    }


def _history(state: Mapping[str, Any]) -> History:
    history = History()
    history.load_state_dict(state)
    return history


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))
