"""A callback's part in a fit: weights that join, weights of zeros, and what was counted."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from cases import EVERYBODY, WRITERS, targets_of
from lightning.pytorch.callbacks import BaseFinetuning
from models import (
    TARGETS,
    ManualNet,
    Net,
    distance,
    fit,
    make,
    sgd,
    weights_of,
)
from reference import Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynWarning,
    NoTargetsError,
)


class Backbone(BaseFinetuning):
    """Both convolutions frozen until epoch ``at``."""

    def __init__(self, at: int = 1):
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[:6], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.net[:6], optimizer, lr=0.05)


def trainable(parameters):
    return sgd([p for p in parameters if p.requires_grad])


@pytest.mark.parametrize("params", ["auto", "net.[03].weight", TARGETS, "!net.8.*"], ids=str)
@pytest.mark.parametrize(
    "make_optimizer",
    [trainable, lambda p: sgd([q for q in p if q.ndim == 2])],
    ids=["frozen", "unowned"],
)
def test_a_backbone_that_joins_later_is_picked_up_then(params, make_optimizer, capsys):
    class Joins(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group(
                    {"params": list(pl_module.net[:6].parameters()), "lr": 0.05}
                )

    if make_optimizer is not trainable and params == TARGETS:
        return  # an exact name of a trainable weight that nobody owns is refused
    module, recorder, callback = (
        make(make_optimizer=make_optimizer),
        Recorder(),
        AdaptiveWeightShrink(0.5, params=params),
    )
    fit(module, [Backbone() if make_optimizer is trainable else Joins(), recorder, callback])
    assert targets_of(callback) == TARGETS
    assert distance(weights_of(module), replay(recorder, TARGETS, shrink=Shrink(0.5))) < 1e-12
    tables = capsys.readouterr().out.split("lightning-normdyn: targets")[1:]
    assert len(tables) == 1  # nothing to show before
    assert "net.3.weight" in tables[0]


@pytest.mark.parametrize("name", [n for n in EVERYBODY if n != "monitor"])
def test_a_backbone_that_never_joins_is_said_at_the_end(name):
    callback = WRITERS[name](params="net.[03].weight")
    with pytest.warns(
        NormDynWarning,
        match=r"did nothing in this fit: `net\.0\.weight`, `net\.3\.weight` stayed frozen",
    ):
        fit(make(make_optimizer=trainable), [Backbone(at=9), callback])


class Positions(Net):
    """No target, and a frozen positional encoding."""

    def __init__(self, **arguments):
        super().__init__(
            net=nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 2)),
            **arguments,
        )
        self.positions = nn.Parameter(torch.randn(1, 36, dtype=torch.float64), requires_grad=False)

    def training_step(self, batch, batch_idx=0):
        return super().training_step((batch[0] + self.positions.reshape(1, 1, 6, 6), batch[1]))


@pytest.mark.parametrize("name", WRITERS)
def test_a_frozen_tensor_does_not_hide_that_there_is_no_target(name):
    """Said after the first step, and not at the end of the fit."""

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            self.first = [str(w.message) for w in caught if w.category is NormDynWarning]
            trainer.should_stop = True

    looks = Looks()
    with pytest.warns(NormDynWarning) as caught:
        fit(make(Positions), [WRITERS[name](), looks], min_epochs=0)
    (said,) = looks.first
    assert "found no scale-invariant weight among the weights that are trained" in said
    assert "that are frozen, or that no optimizer holds, is trained: `positions`" in said


def test_weights_that_a_finetuning_callback_will_bring_are_announced_without_a_warning(capsys):
    fit(
        make(make_optimizer=trainable), [Backbone(), AdaptiveWeightShrink(0.5)]
    )  # a warning of ours would be an error
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "It does nothing until one of those that are frozen, or that no optimizer holds, is "
        "trained: `net.0.weight`, `net.3.weight`" in printed
    )


def test_weights_that_join_are_shown_in_a_table_of_their_own(capsys):
    class First(Backbone):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)

    fit(make(make_optimizer=trainable), [First(), AdaptiveWeightShrink(0.5)], max_epochs=3)
    tables = capsys.readouterr().out.split("lightning-normdyn: targets")[1:]
    assert ["net.0.weight" in table for table in tables] == [False, True]


def test_manual_optimization_that_hides_its_loss_is_told_how():
    class Hides(ManualNet):
        def training_step(self, batch, batch_idx=0):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                Net.training_step(self, batch).backward()
                optimizer.step()

    with pytest.raises(
        NoTargetsError, match=r"call self\.manual_backward\(loss\)|not part of any training loss"
    ):
        fit(make(Hides), [AdaptiveWeightShrink(0.5)])
