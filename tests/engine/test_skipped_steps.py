"""Updates that a gradient scaler skips are counted; what is merely under way is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_normdyn.engine.skipped_steps import Attempts


class Fit:
    """What `Attempts` sees of a fit: a Trainer's progress, and the updates that brackets saw."""

    def __init__(self) -> None:
        self.net = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.seen, self.brackets, self.accumulating = 0, [], False
        counts = {
            "total": SimpleNamespace(ready=0),
            "current": SimpleNamespace(started=0, processed=0),
        }
        self.progress = SimpleNamespace(**counts)
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=self.progress))
        engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: not self.accumulating)
        self.attempts = Attempts(
            SimpleNamespace(fit_loop=loop, strategy=SimpleNamespace(model=engine)), self
        )

    def updates(self) -> int:
        return self.seen

    def batch(self, *, skipped: bool = False, gradient: bool = True) -> int:
        """Train on one batch; how many skipped steps are counted in the middle of its step."""
        self.progress.total.ready += 1
        self.progress.current.started += 1
        for weight in self.net.parameters():
            weight.grad = torch.ones_like(weight) if gradient else None
        self.attempts.announce(self.optimizer)
        inside = self.attempts.skipped()
        self.seen += gradient and not skipped and not self.accumulating
        self.progress.current.processed += 1
        return inside


def test_skipped_updates_are_counted():
    fit = Fit()
    for skipped in (False, True, False, True):
        fit.batch(skipped=skipped)
    assert (fit.attempts.count, fit.attempts.skipped()) == (4, 2)


def test_a_step_under_way_is_not_skipped():
    fit = Fit()
    assert [fit.batch(), fit.batch(skipped=True), fit.batch()] == [0, 0, 1]


@pytest.mark.parametrize("reason", ["accumulates", "no gradient"])
def test_what_is_no_attempt_is_not_skipped(reason):
    fit = Fit()
    fit.accumulating = reason == "accumulates"
    fit.batch(gradient=reason != "no gradient")
    assert (fit.attempts.count, fit.attempts.skipped()) == (0, 0)
