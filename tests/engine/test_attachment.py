"""Optimizers that come during a fit: those that take the place of others, those that join, and
those that nobody can handle. In two phases, their step is the inner one's only if weights come back
before it and stay after it (fits with them are in tests/optimizers/test_wrappers.py). Updates that a
gradient scaler skips are counted; what is merely under way is not."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from models import Calls, ManualNet, Net, fit, make, same, sgd, weights_of
from torch import nn
from wrapping import UnhookedWithHookLists

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    WeightRescaling,
)
from lightning_normdyn.engine.attachment import Attempts, ReturnCheck


def end_table(capsys):
    return capsys.readouterr().out


def replace(trainer, module):
    trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.05)]


def replace_in_place(trainer, module):
    trainer.strategy.optimizers[0] = torch.optim.AdamW(module.parameters(), lr=0.01)


def set_up_again(trainer, module):
    module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.05)
    trainer.strategy.setup_optimizers(trainer)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("action", [replace, replace_in_place, set_up_again])
def test_a_new_optimizer_is_gone_on_with(action, first, capsys):
    aws, monitor, calls = AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1), Calls(3, action)
    module = make()
    fit(module, [calls, aws, monitor] if first else [aws, monitor, calls])
    assert [row["normdyn/optimizer_step"] for row in monitor.history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert aws.steps_of(0) == monitor.steps_of(0) == 8
    said = end_table(capsys)
    # An entry that was exchanged in the strategy's list is not stepped by Lightning, which goes on
    # with the first optimizer.
    assert ("SGD was replaced by another SGD after 3 steps" in said) == (
        action is not replace_in_place
    )
    assert "acted in" not in said  # in all of them


def test_the_steps_of_a_new_optimizer_are_shrunk_as_those_of_the_first():
    plain, module = make(), make()
    fit(plain, [Calls(3, replace)])
    fit(module, [Calls(3, replace), AdaptiveWeightShrink(0.5)])
    assert not same(weights_of(module), weights_of(plain))
    late = make()
    fit(
        late, [AdaptiveWeightShrink(0.5), Calls(3, replace)]
    )  # after the callbacks of the suite have looked
    assert same(weights_of(module), weights_of(late))


def test_a_rescale_counts_on_over_a_replacement():
    module, seen = make(), []

    class Norms(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(round(float(pl_module.net[0].weight[0].norm()), 6) == 1.0)

    fit(module, [Calls(3, replace), WeightRescaling(4), Norms()])
    assert seen == [False, False, False, True, False, False, False, True]


def test_an_optimizer_that_comes_during_the_fit_and_cannot_be_handled_is_left_alone_with_a_word(
    capsys,
):
    def action(trainer, module):
        trainer.strategy.optimizers = [UnhookedWithHookLists(sgd(module.parameters()))]

    with pytest.warns(NormDynWarning) as caught:
        fit(make(), [Calls(3, action), AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)])
    assert any(
        "Nothing acts on the steps of UnhookedWithHookLists, which came during the fit"
        in str(w.message)
        for w in caught
    )
    assert "Nothing acts on the steps of UnhookedWithHookLists" in end_table(capsys)


def test_an_optimizer_that_joins_is_taken_up():
    class Half(Net):
        def configure_optimizers(self):
            return self.make_optimizer(self.net[:3].parameters())

    module, monitor = make(Half), NormDynamicsMonitor(1, tables=False)
    module.automatic_optimization = False

    def training_step(batch, batch_idx):
        loss = Net.training_step(module, batch, batch_idx)
        optimizers = module.optimizers()
        module.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()

    module.training_step = training_step

    def join(trainer, module):
        trainer.strategy.optimizers = [
            *trainer.strategy.optimizers,
            sgd(module.net[3:].parameters()),
        ]

    fit(module, [Calls(3, join), monitor])
    assert "angular_update/net.3.weight" not in monitor.history[2]
    assert "angular_update/net.3.weight" in monitor.history[3]
    assert monitor.steps_of(0) == 8
    assert monitor.steps_of(1) == 5


def test_a_new_layer_in_a_new_optimizer():
    def both(trainer, module):
        module.net[3] = nn.Conv2d(4, 6, 3, bias=False).double()
        trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.05)]

    module, aws, monitor = make(), AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1, tables=False)
    fit(module, [Calls(3, both), aws, monitor])
    assert [t.weight for t in aws.plans[0].targets] == [module.net[0].weight, module.net[3].weight]
    assert [row["normdyn/optimizer_step"] for row in monitor.history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "equivalent_weight_decay/net.3.weight" in monitor.history[-1]


def test_optimizers_that_are_replaced_together_or_again_keep_their_places():
    def both(trainer, module):
        trainer.optimizers = module.configure_optimizers()

    def swapped(trainer, module):
        both(trainer, module)
        first, second = trainer.optimizers
        first.param_groups, second.param_groups = second.param_groups, first.param_groups

    module, monitor = make(ManualNet), NormDynamicsMonitor(1, tables=False)
    fit(module, [Calls(4, both), Calls(8, both), monitor])
    assert [monitor.steps_of(i) for i in (0, 1)] == [8, 8]
    assert [[t.name for t in monitor.plans[i].targets] for i in (0, 1)] == [
        ["net.0.weight"],
        ["net.3.weight", "net.8.weight"],
    ]
    other, again = make(ManualNet), NormDynamicsMonitor(1, tables=False)
    fit(other, [Calls(4, swapped), again])
    assert [[t.name for t in again.plans[i].targets] for i in (0, 1)] == [
        ["net.3.weight", "net.8.weight"],
        ["net.0.weight"],
    ]


def check_of(weight: nn.Parameter) -> ReturnCheck:
    weights = SimpleNamespace(owned=lambda _: [weight], name=lambda _: "layer.weight")
    inner = torch.optim.SGD([weight], lr=0.1)
    return ReturnCheck(object(), inner, weights)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))


def test_a_way_there_and_back_is_forgiven_its_roundings(weight):
    check = check_of(weight)
    check.begin_batch()
    with torch.no_grad():
        weight.add_(0.1).sub_(0.1)
    assert check.refusal() is None


def test_a_step_that_starts_elsewhere_is_refused(weight):
    check = check_of(weight)
    check.begin_batch()
    with torch.no_grad():
        weight.add_(0.1)
    refusal = check.refusal()
    assert "SGD" in str(refusal)
    assert "`layer.weight`" in str(refusal)
    assert check.refusal() is None  # said once


def test_weights_that_are_moved_on_after_the_step_are_refused(weight):
    check = check_of(weight)
    check.begin_batch()
    assert check.refusal() is None
    with torch.no_grad():
        weight.sub_(0.1)
    check.stepped()
    assert check.has_stepped
    with torch.no_grad():
        weight.sub_(0.1)
    assert check.refusal() is not None


def test_later_steps_cost_nothing(weight):
    check = check_of(weight)
    check.stepped()
    assert check.refusal() is None
    check.begin_batch()
    check.stepped()
    with torch.no_grad():
        weight.add_(1.0)
    assert check.refusal() is None


class Fit:
    """What `Attempts` sees of a fit: a Trainer's progress, and the updates that brackets saw."""

    def __init__(self) -> None:
        self.net = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.seen, self.brackets, self.accumulating = 0, [], False
        self.entries = []
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
