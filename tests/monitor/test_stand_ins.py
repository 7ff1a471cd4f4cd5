"""Which weights loggers get the drift of the norm of, decided once for a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_normdyn.monitor import stand_ins
from lightning_normdyn.monitor.history import History

DRIFT, PULL, RATIO, RATE = "norm_drift/w", "pull/w", "balance_ratio/w", "effective_lr/w"
MOVES = {DRIFT: 1e-3, RATE: 0.1}
DECAYED = {**MOVES, PULL: 1e-4}


class Run:
    """Rows one after another, each with whether the weight had a stand-in by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int | None) -> None:
        self.steps, self.now = steps, 0
        monkeypatch.setattr(stand_ins, "horizon_of", self._horizon)
        self.history = History()
        self.resume()

    def _horizon(self, trainer: object, optimizers: int) -> SimpleNamespace:
        to_come = None if self.steps is None else self.steps - self.now
        return SimpleNamespace(steps=to_come)

    def resume(self) -> None:
        self.choice = stand_ins.StandIns(SimpleNamespace(optimizers=[None]))

    def row(self, values: dict[str, float]) -> bool:
        step = self.now
        self.now += 1
        self.history.append(step, values, optimizer_step=self.now)
        return "w" in self.choice.after(step, values, self.history)


def test_a_weight_that_nothing_decays_has_one_from_its_second_row_on(monkeypatch):
    run = Run(monkeypatch, steps=10)
    assert [run.row({RATE: 0.1}), *(run.row({**MOVES, PULL: 0.0}) for _ in range(9))] == [
        False,
        *[True] * 9,
    ]


def test_where_nobody_can_tell_the_pull_it_is_the_same(monkeypatch):
    assert Run(monkeypatch, steps=10).row(MOVES)


def test_a_balance_has_half_of_the_run_to_become_known(monkeypatch):
    run = Run(monkeypatch, steps=10)
    assert [run.row(DECAYED) for _ in range(10)] == [False] * 5 + [True] * 5


@pytest.mark.parametrize(("known_from", "has_stand_in"), [(4, False), (5, True), (8, True)])
def test_the_choice_stays_and_is_the_same_after_a_resume(monkeypatch, known_from, has_stand_in):
    for resumes_at in (0, 3, 6, 9):
        run = Run(monkeypatch, steps=10)
        for step in range(10):
            if step == resumes_at:
                run.resume()
            # From time to time the error of a balance is too large again.
            is_known = step >= known_from and step != 6
            chosen = run.row({**DECAYED, RATIO: 1.0} if is_known else DECAYED)
        assert chosen is has_stand_in


def test_where_nobody_knows_how_far_a_fit_goes_a_balance_is_waited_for(monkeypatch):
    run = Run(monkeypatch, steps=None)
    assert not any(run.row(DECAYED) for _ in range(50))


def test_rows_at_a_rate_of_zero_decide_nothing(monkeypatch):
    run = Run(monkeypatch, steps=10)
    assert not run.row({DRIFT: 0.0, RATE: 0.0, PULL: 0.0})
    assert not run.row(DECAYED)


def test_a_weight_of_which_something_is_expected_has_none(monkeypatch):
    run = Run(monkeypatch, steps=10)
    run.row({"expected_ratio/w": 1.0, RATE: 0.1})
    assert not any(run.row(MOVES) for _ in range(9))
