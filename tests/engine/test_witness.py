"""The life of a fit: optimizers that are replaced, steps that nobody sees, refusals that come late,
and what the end table says of them."""

from __future__ import annotations

import contextlib

import lightning as L
import pytest
import torch
from models import TARGETS, ManualNet, Net, fit, make, same, sgd, weights_of
from reference import Shrink
from replay import Recorder, replay
from torch import nn
from torch.optim import optimizer as torch_optimizer
from wrapping import UnhookedWithHookLists

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)


def end_table(capsys):
    return capsys.readouterr().out


class Calls(L.Callback):
    """Does something at the start of a batch, before or after the callbacks of the suite."""

    def __init__(self, at, action):
        self.at, self.action = at, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.action(trainer, pl_module)


# ---- Another optimizer in the place of the first ----


def replace(trainer, module):
    trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.05)]


def replace_in_place(trainer, module):
    trainer.strategy.optimizers[0] = torch.optim.AdamW(module.parameters(), lr=0.01)


def set_up_again(trainer, module):
    module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.05)
    trainer.strategy.setup_optimizers(trainer)


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


# ---- Steps that nobody sees ----


class Aside(Net):
    """Steps its weights by an optimizer that it keeps to itself."""

    def __init__(self, hidden):
        super().__init__()
        self.automatic_optimization = False
        self.hidden, self.own = hidden, None

    def training_step(self, batch, batch_idx=0):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if self.own is None:
            self.own = self.hidden(list(self.parameters()))
        self.own.step()


class ByHand:
    """No torch optimizer at all."""

    def __init__(self, parameters):
        self.parameters = parameters

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "callback", [lambda: AdaptiveWeightShrink(0.5), lambda: NormDynamicsMonitor(1, tables=False)]
)
def test_a_step_of_an_optimizer_that_the_trainer_does_not_hold_is_told(callback):
    module = make(Aside, hidden=lambda p: torch.optim.SGD(p, 0.1))
    with pytest.warns(
        NormDynWarning,
        match=r"`net.0.weight`.* stepped by an optimizer that the Trainer does not hold \(SGD\)",
    ) as caught:
        fit(module, [callback()], log_every_n_steps=1)
    assert len([w for w in caught if "does not hold" in str(w.message)]) == 1


@pytest.mark.parametrize("every", [1, 50])
def test_weights_that_move_by_hand_are_told_by_name(every):
    module = make(Aside, hidden=ByHand)
    with pytest.warns(
        NormDynWarning,
        match=r"`net.0.weight`, `net.3.weight`.* moved although no step of their optimizer \(SGD\)",
    ) as caught:
        fit(module, [AdaptiveWeightShrink(0.5)], log_every_n_steps=every)
    assert len([w for w in caught if "moved although" in str(w.message)]) == 1


def test_an_optimizer_that_rests_is_no_reason_for_a_word():
    class Turns(ManualNet):
        def training_step(self, batch, batch_idx=0):
            first, second = self.optimizers()
            optimizer = first if batch_idx < 2 else second
            loss = Net.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    fit(
        make(Turns),
        [NormDynamicsMonitor(1, tables=False), AdaptiveWeightShrink(0.5)],
        log_every_n_steps=1,
        max_epochs=1,
    )


def test_no_norm_is_taken_at_logging_steps_while_optimizers_step(monkeypatch):
    from lightning_normdyn.engine import witness

    taken, numbers = [], witness._numbers
    monkeypatch.setattr(witness, "_numbers", lambda pieces: taken.append(1) or numbers(pieces))
    fit(make(), [AdaptiveWeightShrink(0.5)], log_every_n_steps=1)
    assert len(taken) == 1  # at the start


@pytest.mark.parametrize("fails", [False, True])
def test_no_global_hook_is_left_behind(fails):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch_optimizer._global_optimizer_pre_hooks
            if fails:
                raise RuntimeError("enough")

    with contextlib.suppress(RuntimeError):
        fit(make(), [AdaptiveWeightShrink(0.5), Fails()])
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks


# ---- What the end table says of callbacks that did not always act ----


def test_the_end_table_says_in_how_many_steps_a_callback_acted(capsys):
    class Half(Net):
        def on_before_optimizer_step(self, optimizer):
            if (
                self.trainer.global_step % 2
            ):  # the head goes on: a step without any gradient is none
                self.net[:6].zero_grad()

    with pytest.warns(NormDynWarning, match="WeightRescaling acted in 0 of 8 steps"):
        fit(make(Half), [AdaptiveWeightShrink(0.5), WeightRescaling(4), NormDynamicsMonitor(1)])
    said = end_table(capsys)
    assert "AdaptiveWeightShrink acted in 4 of 8 steps" in said
    assert "WeightRescaling acted in 0 of 8 steps: no weight" in said


def test_a_callback_that_never_acts_warns():
    class Never(Net):
        def on_before_optimizer_step(self, optimizer):
            self.net[:6].zero_grad()

    with pytest.warns(
        NormDynWarning,
        match="AdaptiveWeightShrink acted in 0 of 8 steps: no weight that it acts on had a gradient",
    ):
        fit(make(Never), [AdaptiveWeightShrink(0.5)])


def test_a_callback_that_was_never_to_act_says_so_without_a_warning(capsys):
    fit(make(), [LRDropRescaling(exponent=0.25), NormDynamicsMonitor(1)])
    assert "LRDropRescaling acted in 0 of 8 steps; it was to act in 0." in end_table(capsys)


def test_nothing_is_said_of_a_callback_that_always_acts(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), RadialProjection(), NormDynamicsMonitor(1)])
    assert "acted in" not in end_table(capsys)


# ---- Refusals ----


class RefusesLater(AdaptiveWeightShrink):
    """Refuses its weights in a step: a stand-in for whatever may come up during a fit."""

    def __init__(self, at, phase="ready"):
        super().__init__(0.5)
        self.refuses_at = at

    def _shrink(self, step, plan):
        if step.number == self.refuses_at:
            raise NotSupportedError("this is not understood. Leave it out.")
        super()._shrink(step, plan)


def test_a_refusal_in_the_first_step_is_an_error():
    with pytest.raises(NotSupportedError, match="this is not understood"):
        fit(make(), [RefusesLater(1)])


def test_a_later_refusal_stops_the_callback_by_name_and_not_the_fit(capsys):
    module = make()
    with pytest.warns(
        NormDynWarning,
        match=r"RefusesLater does not act on `net.0.weight`, `net.3.weight` \(SGD\) after step 4: this",
    ) as caught:
        fit(module, [RefusesLater(5), NormDynamicsMonitor(1)])
    assert len([w for w in caught if w.category is NormDynWarning]) == 1
    said = end_table(capsys)
    assert "RefusesLater does not act on `net.0.weight`, `net.3.weight` (SGD) after step 4" in said
    assert "RefusesLater acted in 4 of 8 steps" in said


def test_the_optimizer_has_its_decay_back_after_a_refusal():
    owned = []

    class Watches(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            owned.append(len(StepBracket.of(trainer.optimizers[0]).decay_owners()))

    with pytest.warns(NormDynWarning, match="does not act"):
        fit(make(), [RefusesLater(3), NormDynamicsMonitor(1, tables=False), Watches()], max_steps=4)
    assert owned == [2, 2, 0, 0]


def test_a_weight_that_is_refused_later_is_left_alone_and_the_others_go_on(monkeypatch):
    module, aws = make(), AdaptiveWeightShrink(0.5, params=TARGETS)
    check = AdaptiveWeightShrink._check_weight

    def refuse(self, weight, name):
        check(self, weight, name)
        if (
            name == "net.3.weight"
            and self._session.attachment.brackets
            and self._session.attachment.brackets[0].steps
        ):
            raise NotSupportedError("`net.3.weight` gets sparse gradients. Leave it out.")

    monkeypatch.setattr(AdaptiveWeightShrink, "_check_weight", refuse)

    class Adds(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.optimizers[0].add_param_group(
                    {"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]}
                )

    with pytest.warns(
        NormDynWarning,
        match=r"does not act on `net.3.weight` after step \d: `net.3.weight` gets sparse",
    ):
        fit(module, [aws, Adds()])
    assert [t.name for t in aws.plans[0].targets] == ["net.0.weight"]
    assert aws.steps_of(0) == 8


def test_shrinking_a_replay_is_as_ever():
    module, recorder = make(), Recorder()
    fit(module, [AdaptiveWeightShrink(0.5), recorder])
    expected = replay(recorder, TARGETS, shrink=Shrink(0.5))
    assert all(
        torch.allclose(weights_of(module)[name], expected[name], rtol=1e-12) for name in TARGETS
    )


# ---- Weights that are replaced or added ----


def swap_layer(trainer, module):
    """A layer exchanged in the network and in the param group."""
    old = module.net[3].weight
    module.net[3] = nn.Conv2d(4, 6, 3, bias=False).double()
    for group in trainer.optimizers[0].param_groups:
        group["params"] = [module.net[3].weight if p is old else p for p in group["params"]]


def swap_parameter(trainer, module):
    """Only the parameter is another, of another length."""
    old = module.net[3].weight
    module.net[3].weight = nn.Parameter(old.detach() * 3)
    for group in trainer.optimizers[0].param_groups:
        group["params"] = [module.net[3].weight if p is old else p for p in group["params"]]


def grow(trainer, module):
    """Two more layers in front of the head, and their weights in a group of their own."""
    conv, norm = nn.Conv2d(6, 6, 1, bias=False).double(), nn.BatchNorm2d(6).double()
    module.net[5] = nn.Sequential(nn.ReLU(), conv, norm)
    trainer.optimizers[0].add_param_group({"params": [*conv.parameters(), *norm.parameters()]})


NEW = {swap_layer: "net.3.weight", swap_parameter: "net.3.weight", grow: "net.5.1.weight"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("action", NEW)
def test_weights_that_come_during_the_fit_are_measured_and_treated(action, first):
    module = make()
    aws, monitor, calls = (
        AdaptiveWeightShrink(0.5),
        NormDynamicsMonitor(1, tables=False),
        Calls(3, action),
    )
    fit(module, [calls, aws, monitor] if first else [aws, monitor, calls])
    name = NEW[action]
    assert [t.name for t in aws.plans[0].targets] == [*TARGETS, name][: 3 if action is grow else 2]
    assert aws.plans[0].targets[-1].weight is dict(module.named_parameters())[name]
    rows = list(monitor.history)
    assert len(rows) == 8
    # Before the callbacks look at the batch: from its first step on. After they did: a step later,
    # as with a finetuning group.
    assert all(f"equivalent_weight_decay/{name}" in row for row in rows[5:])
    assert isinstance(rows[-1][f"angular_update/{name}"], float)
    last = float(module.get_parameter(name).detach().flatten(1).norm(dim=1).mean())
    assert rows[-1][f"weight_norm/{name}"] == pytest.approx(last, rel=0.2)


@pytest.mark.parametrize("action", [swap_layer, swap_parameter])
def test_a_weight_in_the_place_of_another_has_an_initial_norm_of_its_own(action):
    module, lengths = make(), []

    class Norms(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            lengths.append(pl_module.net[3].weight.detach().flatten(1).norm(dim=1))

    fit(module, [Calls(3, action), Norms(), WeightRescaling(1, target_norm="initial")])
    at_swap, after = lengths[3], module.net[3].weight.detach().flatten(1).norm(dim=1)
    assert not torch.allclose(lengths[2], at_swap)
    assert torch.allclose(after, at_swap, rtol=0.05)


def test_nothing_is_treated_that_lost_its_normalization_when_it_was_replaced():
    def lose(trainer, module):
        swap_layer(trainer, module)
        module.net[4] = nn.Identity()

    module, aws = make(), AdaptiveWeightShrink(0.5)
    fit(module, [Calls(3, lose), aws])
    assert [t.name for t in aws.plans[0].targets] == ["net.0.weight"]


def test_a_pattern_takes_in_new_layers_and_may_lose_those_that_it_named():
    def exchange(trainer, module):
        head = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
        module.net[8] = head
        trainer.optimizers[0].param_groups[0]["params"] = list(module.parameters())

    module, aws = make(), AdaptiveWeightShrink(0.5, params=["net.8.weight", "net.8.*", "net.0.*"])
    fit(module, [Calls(3, exchange), aws])
    assert [t.name for t in aws.plans[0].targets] == [
        "net.0.weight",
        "net.8.0.weight",
        "net.8.2.weight",
    ]


def test_a_weight_that_is_replaced_in_the_network_alone_is_told(capsys):
    def forget_the_optimizer(trainer, module):
        module.net[3] = nn.Conv2d(4, 6, 3, bias=False).double()

    with pytest.warns(
        NormDynWarning,
        match=r"`net.3.weight` was replaced in the network by a parameter that no optimizer holds",
    ) as caught:
        fit(
            make(),
            [Calls(3, forget_the_optimizer), AdaptiveWeightShrink(0.5), NormDynamicsMonitor(1)],
            log_every_n_steps=1,
        )
    assert len([w for w in caught if w.category is NormDynWarning]) == 1
    assert "was replaced in the network" in end_table(capsys)


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
