"""Optimizers around optimizers: which of the two is bracketed, what is measured there, and who is refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from models import TARGETS, fit, make, same, weights_of
from torch import nn
from wrapping import (
    CopiesDict,
    Damps,
    PullsBack,
    PullsBackFromLists,
    Unhooked,
    UnhookedWithHookLists,
    Wrapper,
)

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NotSupportedError,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)
from lightning_normdyn.functional import angular_update
from lightning_normdyn.sharding import torch_optimizers
from lightning_normdyn.wrappers import copies_of_weights, fires_step_hooks, inner_optimizers

WRITERS = {
    "aws": lambda: AdaptiveWeightShrink(0.5),
    "wrs": lambda: WeightRescaling(1, optimizer_state="keep"),
    "projection": lambda: RadialProjection(),
}


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, **options)


class Follows(L.Callback):
    """What each batch really did to the weights: their RMS angles, by name."""

    def __init__(self):
        self.angles = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = weights_of(pl_module)
        filters = {name: (self.before[name].flatten(1), now[name].flatten(1)) for name in TARGETS}
        self.angles.append({name: float(angular_update(*pair).square().mean().sqrt()) for name, pair in filters.items()})


def logged_angles(monitor):
    return [{name: row[f"angular_update/{name}"] for name in TARGETS} for row in monitor.history]


@pytest.mark.parametrize("kind", [Wrapper, PullsBack, PullsBackFromLists, Damps])
def test_the_angle_is_that_of_the_outer_step(kind):
    monitor, follows = NormDynamicsMonitor(1, tables=False), Follows()
    fit(make(make_optimizer=lambda p: kind(sgd(p))), [follows, monitor])
    assert len(monitor.history) == len(follows.angles) == 8
    for logged, true in zip(logged_angles(monitor), follows.angles, strict=True):
        assert logged == pytest.approx(true, rel=1e-5)


def test_only_a_frameworks_wrapper_is_taken_off():
    inner = sgd([nn.Parameter(torch.ones(2, 3))])
    outer = PullsBack(inner)
    assert torch_optimizers(outer) == [outer]
    assert StepBracket.of(outer).optimizer is outer
    fabric = L.Fabric(accelerator="cpu", devices=1)
    _, wrapped = fabric.setup(nn.Linear(2, 2), inner)
    assert torch_optimizers(wrapped) == [inner]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", [PullsBack, PullsBackFromLists])
def test_writers_are_refused_where_the_outer_step_would_undo_them(kind, writer):
    module = make(make_optimizer=lambda p: kind(sgd(p)))
    with pytest.raises(NotSupportedError, match=f"{kind.__name__} keeps a second copy of the weights .*would undo what"):
        fit(module, [WRITERS[writer]()])


def test_copies_that_are_there_from_the_start_are_refused_before_any_weight_is_touched():
    module = make(make_optimizer=lambda p: PullsBack(sgd(p)))
    before = weights_of(module)
    with pytest.raises(NotSupportedError, match="slow_params"):
        fit(module, [AdaptiveWeightShrink(0.5)])
    assert same(weights_of(module), before)


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_act_on_a_wrapper_that_undoes_nothing(writer):
    callback, plain = WRITERS[writer](), make(make_optimizer=lambda p: Damps(sgd(p)))
    fit(plain)
    module = make(make_optimizer=lambda p: Damps(sgd(p)))
    fit(module, [callback])
    assert not same(weights_of(module), weights_of(plain))
    if writer == "wrs":
        assert torch.allclose(module.net[0].weight.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_a_decay_inside_a_wrapper_cannot_be_taken_over():
    module = make(make_optimizer=lambda p: Damps(sgd(p, weight_decay=0.1)))
    with pytest.raises(NotSupportedError, match=r"weight decay 0\.1 of Damps .*steps through the optimizer inside it"):
        fit(module, [AdaptiveWeightShrink(0.5)])


@pytest.mark.parametrize("callback", [lambda: AdaptiveWeightShrink(0.5), lambda: NormDynamicsMonitor(1)])
@pytest.mark.parametrize("kind", [Unhooked, UnhookedWithHookLists, CopiesDict])
def test_a_step_that_nobody_is_told_about_is_refused_by_name_at_fit_start(kind, callback):
    fit(make(make_optimizer=lambda p: kind(sgd(p))), max_steps=1)  # Lightning alone trains
    module = make(make_optimizer=lambda p: kind(sgd(p)))
    before = weights_of(module)
    with pytest.raises(NotSupportedError, match=rf"torch calls no hooks around the step of {kind.__name__}.*super\(\)\.__init__"):
        fit(module, [callback()])
    assert same(weights_of(module), before)


def test_hooks_fire_where_torch_patched_the_class():
    inner = sgd([nn.Parameter(torch.ones(2, 3))])
    assert fires_step_hooks(inner)
    assert fires_step_hooks(Wrapper(inner))
    assert not fires_step_hooks(Unhooked(inner))
    assert not fires_step_hooks(object())


def test_inner_optimizers_are_found_in_attributes_and_containers():
    first, second = sgd([nn.Parameter(torch.ones(2))]), sgd([nn.Parameter(torch.ones(2))])
    outer = Wrapper(first)
    outer.others = {"second": second, "again": first}
    assert inner_optimizers(outer) == [first, second]
    assert inner_optimizers(first) == []


def test_a_point_that_distances_are_measured_from_is_no_copy_to_be_set_back_to():
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = sgd([weight])
    optimizer.state[weight].update(p0=weight.detach().clone(), momentum_buffer=torch.randn(3, 4))
    assert copies_of_weights(optimizer, [weight]) == []
    assert copies_of_weights(Wrapper(optimizer), [weight]) == ["p0"]


def test_a_wrappers_momentum_is_no_copy():
    weight = nn.Parameter(torch.randn(3, 4))
    outer = Wrapper(sgd([weight]))
    outer.optimizer.state[weight]["momentum_buffer"] = torch.randn(3, 4)
    outer.same_tensor = [weight]
    assert copies_of_weights(outer, [weight]) == []
