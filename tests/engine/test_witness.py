"""Steps that nobody sees, and weights that move without one: both are told to the person by
name."""

from __future__ import annotations

import contextlib

import lightning as L
import pytest
import torch
from models import Calls, ManualNet, Net, fit, make
from torch import nn
from torch.optim import optimizer as torch_optimizer

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
)


def end_table(capsys):
    return capsys.readouterr().out


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


# ---- Refusals ----


# ---- Weights that are replaced or added ----


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
