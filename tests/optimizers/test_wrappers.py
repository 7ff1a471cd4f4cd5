"""Optimizers around optimizers: which of the two is bracketed, what is measured there, and who is
refused."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from models import TARGETS, Net, fit, make, same, weights_of
from torch import nn
from wrapping import (
    CopiesDict,
    Damps,
    HookedLate,
    PullsBack,
    PullsBackFromLists,
    TwiceEvaluated,
    TwoPhases,
    Unhooked,
    UnhookedWithHookLists,
    Wrapper,
)

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    Phase,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)
from lightning_normdyn.functional import angular_update
from lightning_normdyn.optimizers.views import torch_optimizers
from lightning_normdyn.optimizers.wrappers import (
    copies_of_weights,
    fires_step_hooks,
    inner_optimizers,
)

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
        self.angles.append(
            {
                name: float(angular_update(*pair).square().mean().sqrt())
                for name, pair in filters.items()
            }
        )


def logged_angles(monitor):
    return [{name: row[f"angular_update/{name}"] for name in TARGETS} for row in monitor.history]


@pytest.mark.parametrize("kind", [Wrapper, PullsBack, PullsBackFromLists, HookedLate, Damps])
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
@pytest.mark.parametrize("kind", [PullsBack, PullsBackFromLists, HookedLate])
def test_writers_are_refused_where_the_outer_step_would_undo_them(kind, writer):
    module = make(make_optimizer=lambda p: kind(sgd(p)))
    with pytest.raises(
        NotSupportedError,
        match=f"{kind.__name__} keeps a second copy of the weights .*would undo what",
    ):
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
        assert torch.allclose(
            module.net[0].weight.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64)
        )


def test_a_decay_inside_a_wrapper_cannot_be_taken_over():
    module = make(make_optimizer=lambda p: Damps(sgd(p, weight_decay=0.1)))
    with pytest.raises(
        NotSupportedError,
        match=r"weight decay 0\.1 of Damps .*steps through the optimizer inside it",
    ):
        fit(module, [AdaptiveWeightShrink(0.5)])


@pytest.mark.parametrize(
    "callback", [lambda: AdaptiveWeightShrink(0.5), lambda: NormDynamicsMonitor(1)]
)
@pytest.mark.parametrize("kind", [Unhooked, UnhookedWithHookLists, CopiesDict])
def test_a_step_that_nobody_is_told_about_is_refused_by_name_at_fit_start(kind, callback):
    fit(make(make_optimizer=lambda p: kind(sgd(p))), max_steps=1)  # Lightning alone trains
    module = make(make_optimizer=lambda p: kind(sgd(p)))
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError,
        match=rf"torch calls no hooks around the step of {kind.__name__}.*super\(\)\.__init__",
    ):
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


# ---- Two gradients in a step ----


class InTwoPhases(Net):
    """Calls the two phases itself, as public examples do."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx=0):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.first_step(zero_grad=True)
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.second_step(zero_grad=True)


def sam(parameters, **options):
    return TwoPhases(parameters, torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, **options})


def twice(parameters, **options):
    return TwiceEvaluated(parameters, lr=0.1, momentum=0.9, **options)


FORMS = {"phases": (InTwoPhases, sam), "closure": (Net, sam), "one class": (Net, twice)}


@pytest.mark.parametrize("form", FORMS)
def test_the_angle_under_sam_is_that_of_the_step(form):
    kind, optimizer = FORMS[form]
    monitor, follows = NormDynamicsMonitor(1, tables=False), Follows()
    fit(make(kind, make_optimizer=optimizer), [follows, monitor])
    assert len(monitor.history) == len(follows.angles) == 8
    for row, logged, true in zip(
        monitor.history, logged_angles(monitor), follows.angles, strict=True
    ):
        assert logged == pytest.approx(true, rel=1e-5)
        assert row["normdyn/skipped_steps"] == 0


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("form", ["phases", "closure"])
def test_writers_act_on_sam_around_an_optimizer(form, writer):
    kind, optimizer = FORMS[form]
    plain, module, callback = (
        make(kind, make_optimizer=optimizer),
        make(kind, make_optimizer=optimizer),
        WRITERS[writer](),
    )
    fit(plain, log_every_n_steps=1)
    fit(module, [callback], log_every_n_steps=1)
    assert callback.steps_of(0) == 8
    before, after = (float(m.net[0].weight.detach().norm()) for m in (plain, module))
    if writer == "wrs":
        assert torch.allclose(
            module.net[0].weight.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64)
        )
    else:
        assert after < 0.98 * before


@pytest.mark.parametrize("form", ["phases", "closure"])
def test_the_shrink_under_sam_is_that_of_the_paper(form):
    kind, optimizer = FORMS[form]
    module, recorder = make(kind, make_optimizer=lambda p: optimizer(p, weight_decay=0.3)), []

    class Records(L.Callback):
        """Before the base optimizer's step, and after it."""

        def on_train_start(self, trainer, pl_module):
            inner = trainer.optimizers[0].base_optimizer
            weight = pl_module.net[0].weight
            first, last = [], []
            StepBracket.of(inner).add(
                Phase.MEASURE, lambda step: first.append(weight.detach().clone())
            )
            StepBracket.of(inner).add(
                Phase.SNAPSHOT, lambda step: last.append(weight.detach() / first[-1])
            )
            recorder.extend([first, last])

    fit(module, [AdaptiveWeightShrink(0.5), Records()])
    before, ratios = recorder
    for w, ratio in zip(before, ratios, strict=True):
        factor = 1 - 0.1 * 0.5 * w.flatten(1).norm(dim=1)
        assert torch.allclose(ratio.flatten(1), factor[:, None].expand(4, 9), rtol=1e-9)


@pytest.mark.parametrize("writer", ["wrs", "projection"])
def test_what_acts_after_the_step_acts_on_sam_in_one_class(writer):
    module = make(make_optimizer=twice)
    fit(module, [WRITERS[writer]()])
    if writer == "wrs":
        assert torch.allclose(
            module.net[0].weight.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64)
        )


def test_what_acts_before_the_update_is_refused_on_sam_in_one_class():
    with pytest.raises(
        NotSupportedError, match="TwiceEvaluated evaluates its closure more than once per step"
    ):
        fit(make(make_optimizer=twice), [AdaptiveWeightShrink(0.5)])


def test_an_optimizer_that_begins_to_take_two_gradients_later_stops_the_shrink_and_not_the_fit():
    class Begins(TwiceEvaluated):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure) if self.count > 3 else torch.optim.SGD.step(self, closure)

    module, monitor = (
        make(make_optimizer=lambda p: Begins(p, lr=0.1)),
        NormDynamicsMonitor(1, tables=False),
    )
    with pytest.warns(
        NormDynWarning,
        match="AdaptiveWeightShrink does not act on .* after step 3: Begins evaluates its closure",
    ):
        fit(module, [AdaptiveWeightShrink(0.5), monitor])
    assert len(monitor.history) == 8


@pytest.mark.parametrize("form", ["phases", "closure"])
@pytest.mark.parametrize("fault", [{"comes_back": False}, {"moves_on": 0.01}])
def test_sam_whose_inner_step_is_not_all_that_moves_the_weights_is_refused_by_name(fault, form):
    kind, optimizer = FORMS[form]
    module = make(kind, make_optimizer=lambda p: optimizer(p, **fault))
    with pytest.raises(
        NotSupportedError,
        match="TwoPhases takes its gradient at other weights, and the step that SGD makes inside it "
        "is not",
    ):
        fit(module, [NormDynamicsMonitor(1, tables=False)])
    assert module.trainer.fit_loop.epoch_loop.batch_idx == 0


def test_two_phases_without_an_optimizer_inside_are_refused_by_name():
    class Alone(torch.optim.SGD):
        def first_step(self, zero_grad=False): ...

        def second_step(self, zero_grad=False): ...

    with pytest.raises(
        NotSupportedError,
        match=r"Alone steps in two phases .* and 0 torch optimizers of the same weights",
    ):
        fit(make(make_optimizer=lambda p: Alone(p, lr=0.1)), [NormDynamicsMonitor(1)])


@pytest.mark.parametrize("form", FORMS)
def test_claims_are_held_against_gradients_at_the_weights_that_they_were_taken_at(form):
    """SAM takes its gradient at weights that it has moved far, where it is orthogonal to those and
    not to the ones that step."""
    kind, optimizer = FORMS[form]

    def far(parameters):
        made = optimizer(parameters)
        for group in made.param_groups:
            group["rho"] = 2.0
        return made

    monitor = NormDynamicsMonitor(1, tables=False)
    fit(make(kind, make_optimizer=far), [monitor], max_epochs=5, log_every_n_steps=1)
    known = {
        v.known for v in monitor.member.session.search.verdicts.values() if v.partition is not None
    }
    assert known == {"graph and gradients"}
