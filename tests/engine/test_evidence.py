"""What real gradients say about claims of the graph: when they confirm, when they withdraw, and
what they must not be disturbed by."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from models import (
    BEFORE_2_5,
    TARGETS,
    Net,
    Penalized,
    SavesAt,
    convnet,
    fit,
    loader,
    make,
    same,
    sgd,
    weights_of,
)
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    NoTargetsError,
    WeightRescaling,
)
from lightning_normdyn.engine.claim_record import CLOSE_LOOKS


def known(callback):
    """How each claim is known."""
    return {
        name: v.known
        for name, v in callback.member.session.search.verdicts.items()
        if v.partition is not None
    }


def targets_of(callback):
    return [t.name for _, plan in sorted(callback.plans.items()) for t in plan.targets]


class WithdrawnAt(L.Callback):
    """The first batch after which a callback no longer acts on net.3.weight."""

    def __init__(self, callback):
        self.callback, self.batch = callback, None

    def on_train_batch_end(self, trainer, *_):
        if self.batch is None and "net.3.weight" not in targets_of(self.callback):
            self.batch = trainer.fit_loop.epoch_loop._batches_that_stepped


# ---- Confirmed only by gradients ----


class Silent(Net):
    """The second convolution lies behind a frozen zero, and gets a gradient of zeros."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net[4].weight.data.zero_()
        self.net[4].weight.requires_grad_(False)


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_a_gradient_of_zeros_confirms_nothing(log_every_n_steps):
    callback, module = AdaptiveWeightShrink(0.5), make(Silent)
    module.net[8].bias.data.fill_(0.5)
    fit(module, [callback], max_epochs=6, log_every_n_steps=log_every_n_steps)
    assert known(callback)["net.3.weight"] == "graph"


def test_a_gradient_of_zeros_does_not_keep_others_from_being_confirmed():
    class Beside(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.silent = nn.Sequential(
                nn.Flatten(), nn.Linear(36, 4, bias=False), nn.BatchNorm1d(4)
            ).to(self.net[0].weight.dtype)
            self.silent[2].weight.data.zero_()
            self.silent[2].weight.requires_grad_(False)

        def training_step(self, batch, batch_idx=0):
            return super().training_step(batch) + self.silent(batch[0]).sum()

    callback = AdaptiveWeightShrink(0.5)
    fit(make(Beside), [callback])
    assert known(callback) == {
        **dict.fromkeys(TARGETS, "graph and gradients"),
        "silent.1.weight": "graph",
    }


def test_a_weight_whose_gradient_comes_late_is_confirmed_late():
    class Late(Silent):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 20:
                self.net[4].weight.data.fill_(1.0)

    callback = AdaptiveWeightShrink(0.5)
    fit(make(Late), [callback], max_epochs=8, log_every_n_steps=1)
    assert known(callback)["net.3.weight"] == "graph and gradients"


def test_rounding_beside_gradients_does_not_count():
    """Filters whose gradient is 4e-11 beside 1e-2, in any direction, withdraw nothing."""

    class Noisy(Net):
        def training_step(self, batch, batch_idx=0):
            weight = self.net[3].weight
            noise = torch.zeros_like(weight)
            noise[:4] = 4e-11 * weight.detach()[:4] / weight.detach()[:4].norm()
            self.net[4].weight.data[:4] = 0  # what is left of the gradient of these filters
            return (
                super().training_step(batch)
                + (noise * (weight - weight.detach())).sum().detach()
                + Along.apply(weight, noise)
            )

    class Along(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, gradient):
            ctx.save_for_backward(gradient)
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    from lightning_normdyn.invariance.rules import register_rule
    from lightning_normdyn.invariance.rules.operation import RULES

    register_rule("AlongBackward", lambda operation, flows: None)
    callback = AdaptiveWeightShrink(0.5)
    try:
        fit(make(Noisy, dtype=torch.float32), [callback], max_epochs=6)
    finally:
        del RULES["AlongBackward"]
    assert known(callback) == dict.fromkeys(TARGETS, "graph and gradients")


# ---- What comes late ----


@pytest.mark.sampled
@pytest.mark.parametrize("with_monitor", [False, True])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)], ids=["filters", "layer"]
)
def test_a_term_that_enters_late_is_noticed_at_the_logging_steps(norm, with_monitor, capsys):
    module, callback = make(Penalized, net=convnet(norm=norm), since=60), AdaptiveWeightShrink(0.01)
    at = WithdrawnAt(callback)
    monitor = [NormDynamicsMonitor()] if with_monitor else []
    with pytest.warns(
        NormDynWarning,
        match=r"`net\.3\.weight` is no longer taken for scale-invariant: net\.4 says",
    ) as caught:
        fit(module, [callback, at, *monitor], max_epochs=25, log_every_n_steps=4)
    assert 61 <= at.batch <= 76
    assert targets_of(callback) == ["net.0.weight"]
    assert sum("no longer" in str(w.message) for w in caught) == 1
    if with_monitor:
        table = capsys.readouterr().out.rsplit("lightning-normdyn: after", 1)[1]
        assert "net.3.weight: since step" in " ".join(table.split())


def test_a_late_withdrawal_of_the_last_target_ends_no_fit():
    module = make(Penalized, since=30)
    callback = WeightRescaling(1, params="!net.0.*")
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken"):
        runner = fit(module, [callback], max_epochs=15, log_every_n_steps=1)
    assert runner.global_step == 60
    assert targets_of(callback) == []


def test_without_logging_steps_nothing_is_looked_at_after_the_first_steps():
    callback = AdaptiveWeightShrink(0.01)
    fit(make(Penalized, since=30), [callback], max_epochs=15, log_every_n_steps=0)
    assert targets_of(callback) == TARGETS


@pytest.mark.sampled(1)
@pytest.mark.parametrize("every", [1, 4])
def test_an_optimizer_that_never_steps_at_a_logging_step_is_looked_at_all_the_same(every):
    class Turns(Penalized):
        """The second half steps in odd batches only; logging steps are even ones."""

        automatic_optimization = False

        def training_step(self, batch, batch_idx=0):
            first, second = self.optimizers()
            loss = super().training_step(batch)
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            if batch_idx % 2 == 1 or batch_idx % every:
                second.step()

        def configure_optimizers(self):
            return [sgd(self.net[:3].parameters()), sgd(self.net[3:].parameters())]

    module, callback = make(Turns, since=60), AdaptiveWeightShrink(0.01)
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken"):
        fit(module, [callback], max_epochs=30, log_every_n_steps=4)


# ---- The loss's own gradient ----


def adaptive_clipping(module):
    """Brock et al.: gradients are limited in proportion to the weight; here so that the direction
    turns."""
    for p in module.parameters():
        if p.grad is not None:
            p.grad.copy_(p.grad.clamp(-0.01, 0.001))


def towards_the_weight(module):
    """The worst that can be done to the test."""
    for p in module.parameters():
        if p.grad is not None:
            p.grad.data += turned(p, p.grad)


def turned(p, gradient):
    """As much along the weight as half of the gradient, seen in no version counter."""
    return 0.5 * p.data * (gradient.norm() / p.data.norm().clamp(min=1e-9))


class Hooked(Net):
    """Something in this module changes gradients before the optimizer gets them."""

    def __init__(self, moment="none", **arguments):
        super().__init__(**arguments)
        self.moment = moment
        if moment == "tensor":
            for p in self.parameters():
                p.register_hook(lambda g, p=p: g + turned(p, g))
        if moment == "tensor in place":
            for p in self.parameters():
                p.register_hook(lambda g, p=p: g.add_(turned(p, g)))
        if moment == "accumulated":
            for p in self.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p: (p.grad.data.add_(turned(p, p.grad)), None)[1]
                )

    def on_after_backward(self):
        if self.moment == "after backward":
            towards_the_weight(self)

    def on_before_optimizer_step(self, optimizer):
        if self.moment == "before step":
            towards_the_weight(self)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        if self.moment == "clipping":
            adaptive_clipping(self)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.moment == "optimizer":
            optimizer.register_step_pre_hook(lambda *_: None)  # whoever comes first
            optimizer.register_step_pre_hook(
                lambda *_: towards_the_weight(self) if self.net[0].weight.grad is not None else None
            )
        return optimizer


class First(L.Callback):
    """Before ours in the list of callbacks."""

    def __init__(self, moment):
        self.moment = moment

    def on_after_backward(self, trainer, pl_module):
        if self.moment == "callback after backward":
            towards_the_weight(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.moment == "callback before step":
            towards_the_weight(pl_module)


SEEN_BEFORE = [
    "after backward",
    "before step",
    "clipping",
    "optimizer",
    "callback after backward",
    "callback before step",
]


@pytest.mark.sampled
@pytest.mark.parametrize("moment", SEEN_BEFORE)
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_claims_are_held_against_the_loss_s_own_gradient(moment, log_every_n_steps):
    callback = AdaptiveWeightShrink(0.01)
    fit(
        make(Hooked, moment=moment),
        [First(moment), callback],
        max_epochs=6,
        log_every_n_steps=log_every_n_steps,
    )
    assert known(callback) == dict.fromkeys(TARGETS, "graph and gradients")


@pytest.mark.parametrize("moment", SEEN_BEFORE)
def test_a_false_claim_is_withdrawn_whatever_happens_to_the_gradient_afterwards(moment):
    class Both(Penalized, Hooked):
        pass

    callback = AdaptiveWeightShrink(0.01)
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken"):
        fit(make(Both, moment=moment), [First(moment), callback])
    assert targets_of(callback) == ["net.0.weight"]


@pytest.mark.sampled
@pytest.mark.parametrize("moment", ["tensor", "tensor in place", "accumulated"])
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_what_hooks_of_a_weight_have_changed_is_no_evidence(moment, log_every_n_steps):
    callback, module = AdaptiveWeightShrink(0.01), make(Hooked, moment=moment)
    hooks = [
        (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()))
        for p in module.parameters()
    ]
    fit(module, [callback], max_epochs=6, log_every_n_steps=log_every_n_steps)
    assert known(callback) == dict.fromkeys(TARGETS, "graph")
    assert [
        (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()))
        for p in module.parameters()
    ] == hooks


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_only_look_disturb_nothing(register):
    callback, module, seen = AdaptiveWeightShrink(0.01), make(), []
    for p in module.parameters():
        getattr(p, register)(lambda g: seen.append(1))  # hands nothing back
    fit(module, [callback])
    assert known(callback) == dict.fromkeys(TARGETS, "graph and gradients")
    assert len(seen) == 8 * len(list(module.parameters()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", ["none", "after backward", "callback after backward"])
def test_gradients_that_are_changed_between_accumulated_batches(moment):
    callback = AdaptiveWeightShrink(0.01)
    fit(
        make(Hooked, moment=moment),
        [First(moment), callback],
        max_epochs=12,
        accumulate_grad_batches=2,
    )
    assert known(callback) == dict.fromkeys(
        TARGETS, "graph and gradients" if moment == "none" else "graph"
    )


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_by_the_trainer_disturbs_nothing(algorithm):
    callback = AdaptiveWeightShrink(0.01)
    fit(make(), [callback], gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    assert known(callback) == dict.fromkeys(TARGETS, "graph and gradients")


# ---- Over a resume ----


def one_batch():
    """Lightning does not go back to the batch at which a checkpoint was saved, so all are the
    same."""
    return loader(count=8)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)], ids=["filters", "layer"]
)
@pytest.mark.parametrize("since", [0, 20])
def test_a_withdrawal_comes_at_the_same_step_as_without_an_interruption(norm, since, tmp_path):
    def go(**arguments):
        module, callback = (
            make(Penalized, net=convnet(norm=norm), since=since),
            AdaptiveWeightShrink(0.05),
        )
        at = WithdrawnAt(callback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NormDynWarning)
            fit(
                module,
                [callback, at, *arguments.pop("more", [])],
                one_batch(),
                max_epochs=40,
                log_every_n_steps=3,
                **arguments,
            )
        return at.batch, weights_of(module), callback.state_dict()

    steps = (1, 3, 7, 21, 24, 25, 30)
    saved = {step: tmp_path / f"{step}.ckpt" for step in steps}
    batch, weights, state = go(more=[SavesAt(step, path) for step, path in saved.items()])
    assert batch > since
    for step, path in saved.items():
        batch_again, weights_again, state_again = go(ckpt_path=path)
        assert same(weights_again, weights)
        assert batch_again == max(batch, step)
        assert repr(state_again["evidence"]) == repr(state["evidence"])


@pytest.mark.skipif(BEFORE_2_5, reason="a resumed run trains a batch twice, without us as well")
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_end"],
)
def test_looks_come_at_the_same_steps_in_whatever_hook_a_checkpoint_was_saved(hook, tmp_path):
    def saves(step, path):
        def save(trainer, *_):
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

        return LambdaCallback(**{hook: save})

    def go(*others, **arguments):
        callback = AdaptiveWeightShrink(0.05)
        fit(
            make(),
            [callback, *others],
            one_batch(),
            one_batch(),
            max_epochs=34,
            log_every_n_steps=3,
            **arguments,
        )
        return callback.state_dict()["evidence"]

    steps = (18, 19, 20)
    expected = go(*(saves(step, tmp_path / f"{step}.ckpt") for step in steps))
    for step in steps:
        assert repr(go(ckpt_path=tmp_path / f"{step}.ckpt")) == repr(expected)


def test_a_checkpoint_between_two_losses_of_the_first_batch_is_no_reason_to_believe_one_of_them(
    tmp_path,
):
    """The second loss sees the length of a weight that the first does not see."""

    class TwoLosses(Net):
        def __init__(self, path=None, **arguments):
            super().__init__(**arguments)
            self.automatic_optimization, self.path = False, path

        def training_step(self, batch, batch_idx=0):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            if self.path is not None and not self.path.exists():
                self.trainer.save_checkpoint(self.path)
            self.manual_backward(1e-12 * self.net[3].weight.square().sum())
            optimizer.step()

    path, callback = tmp_path / "between.ckpt", AdaptiveWeightShrink(0.5)
    fit(make(TwoLosses, path=path), [AdaptiveWeightShrink(0.5)], max_steps=2)
    fit(make(TwoLosses), [callback], ckpt_path=path, max_steps=2)
    assert targets_of(callback) == ["net.0.weight"]


class SavesInside(torch.optim.SGD):
    """A handler of the cluster saves while an optimizer steps, before it has written."""

    def __init__(self, parameters, trainer=None, paths=None):
        super().__init__(parameters, lr=0.05)
        self.trainer, self.paths = trainer, paths or {}

    def step(self, closure=None):
        loss = closure()
        path = self.paths.get(self.trainer.global_step) if self.trainer else None
        if path is not None and not path.exists():
            self.trainer.save_checkpoint(path)
        super().step()
        return loss


@pytest.mark.sampled(1)
@pytest.mark.parametrize("inside", ["step", "backward"])
def test_what_a_step_says_is_not_counted_twice_where_a_checkpoint_was_saved_in_it(inside, tmp_path):
    paths = {step: tmp_path / f"{step}.ckpt" for step in (2, 5, 17, 18, 21)}

    class Saved(Net):
        def configure_optimizers(self):
            return SavesInside(self.parameters(), self.trainer, paths if inside == "step" else {})

        def on_after_backward(self):
            path = paths.get(self.trainer.global_step) if inside == "backward" else None
            if path is not None and not path.exists():
                self.trainer.save_checkpoint(path)

    def go(**arguments):
        monitor = NormDynamicsMonitor(3, tables=False)
        fit(
            make(Saved, net=convnet(norm=lambda n: nn.GroupNorm(1, n))),
            [monitor],
            one_batch(),
            max_epochs=26,
            log_every_n_steps=3,
            **arguments,
        )
        return monitor.state_dict()["evidence"]

    expected = go()
    for path in paths.values():
        assert repr(go(ckpt_path=path)) == repr(expected)


@pytest.mark.parametrize("params", ["!net.0.*", "auto"])
def test_what_was_withdrawn_stays_withdrawn_and_ends_no_resumed_fit(params, tmp_path):
    path, net = tmp_path / "later.ckpt", convnet(norm=lambda n: nn.GroupNorm(1, n))
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken") as first:
        fit(
            make(Penalized, net=net),
            [WeightRescaling(2, params=params), SavesAt(20, path)],
            one_batch(),
            max_epochs=20,
        )
    callback, module = (
        WeightRescaling(2, params=params),
        make(Penalized, net=convnet(norm=lambda n: nn.GroupNorm(1, n))),
    )
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken") as again:
        runner = fit(module, [callback], one_batch(), max_epochs=30, ckpt_path=path)
    assert runner.global_step == 30
    assert targets_of(callback) == ([] if params != "auto" else ["net.0.weight"])
    ours = [
        [str(w.message) for w in caught if w.category is NormDynWarning]
        for caught in (first, again)
    ]
    assert ours[0] == ours[1]


def frozen(module):
    """BatchNorm goes to evaluation, as in finetuning."""

    class Freezes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for m in pl_module.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()

    return module, [Freezes()]


def replaced(module):
    """Another normalization, which makes other vectors of the weights in front of it; its
    parameters have the same names."""
    module.net[1] = nn.GroupNorm(1, 4).double()
    module.net[4] = nn.GroupNorm(1, 6).double()
    return module, []


def removed(module):
    """Normalizations that only scale and shift."""

    class Affine(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.ones(n).double()),
                nn.Parameter(torch.zeros(n).double()),
            )

        def forward(self, x):
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    module.net[1], module.net[4] = Affine(4), Affine(6)
    return module, []


@pytest.mark.parametrize("change", [frozen, removed])
def test_a_network_that_changed_is_judged_as_in_a_fresh_fit(change, tmp_path):
    path = tmp_path / "before.ckpt"
    fit(make(), [AdaptiveWeightShrink(0.5), SavesAt(6, path)])
    states = torch.load(path, weights_only=True)
    states["state_dict"] = {
        k: v
        for k, v in states["state_dict"].items()
        if change is frozen or ("running" not in k and "num_" not in k)
    }
    torch.save(states, path)
    module, others = change(make())
    with pytest.raises(NoTargetsError, match="found no scale-invariant weight"):
        fit(module, [*others, AdaptiveWeightShrink(0.5)], ckpt_path=path, max_epochs=4)


def grouped(groups):
    return lambda n: nn.GroupNorm(groups, n)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("before", "after"),
    [(grouped(1), grouped(2)), (grouped(2), grouped(1)), (nn.BatchNorm2d, grouped(2))],
    ids=["finer", "coarser", "another kind"],
)
def test_vectors_follow_a_normalization_that_was_set_otherwise_between_the_runs(
    before, after, tmp_path
):
    path = tmp_path / "before.ckpt"
    fit(make(net=convnet(norm=before)), [AdaptiveWeightShrink(0.5), SavesAt(6, path)])
    states = torch.load(path, weights_only=True)
    states["state_dict"] = {
        k: v for k, v in states["state_dict"].items() if "running" not in k and "num_" not in k
    }
    torch.save(states, path)
    fresh, resumed = AdaptiveWeightShrink(0.5), AdaptiveWeightShrink(0.5)
    fit(make(net=convnet(norm=after)), [fresh])
    fit(make(net=convnet(norm=after)), [resumed], ckpt_path=path, max_epochs=4)
    sizes = [[t.partition.n for t in callback.plans[0].targets] for callback in (fresh, resumed)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("setting", ["eps", "training"])
def test_a_setting_that_changes_during_a_fit_calls_for_another_look(setting):
    class Changes(L.Callback):
        looks = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                norm = pl_module.net[4]
                norm.eps = 2e-5 if setting == "eps" else norm.eps
                norm.training = setting == "eps"

    callback = AdaptiveWeightShrink(0.5)
    if setting == "eps":
        fit(make(), [Changes(), callback])
        assert targets_of(callback) == TARGETS
        return
    with pytest.warns(
        NormDynWarning, match=r"`net\.3\.weight` is no longer taken for scale-invariant: "
    ):
        fit(make(), [Changes(), callback])
    assert targets_of(callback) == ["net.0.weight"]


def test_a_weight_that_is_trained_from_the_resumed_step_on_is_treated_in_it(tmp_path):
    path = tmp_path / "frozen.ckpt"
    module = make()
    module.net[3].weight.requires_grad_(False)
    fit(module, [AdaptiveWeightShrink(0.5), SavesAt(4, path)], one_batch(), max_epochs=4)
    callback, module = AdaptiveWeightShrink(0.5), make()
    seen = []

    class First(L.Callback):
        def on_train_batch_end(self, *_):
            seen.append(targets_of(callback))

    fit(module, [callback, First()], one_batch(), ckpt_path=path, max_epochs=6)
    assert seen == [TARGETS] * 2


def test_a_checkpoint_in_the_middle_of_a_validation_holds_the_modes_of_training(tmp_path):
    """All modules are in evaluation then; the resumed fit must not take that for another
    network."""

    class Saves(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "validating.ckpt")

    fit(make(), [AdaptiveWeightShrink(0.5), Saves()], val_data=loader(), max_epochs=3)
    callback = AdaptiveWeightShrink(0.5)
    fit(make(), [callback], val_data=loader(), max_epochs=4, ckpt_path=tmp_path / "validating.ckpt")
    assert callback.member.session.claims.resumed


# ---- The reason ----


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n, eps: nn.GroupNorm(2, n, eps=eps)], ids=["batch", "group"]
)
def test_the_reason_names_the_epsilon_where_it_explains_the_contradiction(norm):
    callback = AdaptiveWeightShrink(0.01)
    module = make(net=convnet(norm=lambda n: norm(n, eps=0.5 if n == 6 else 1e-5)))
    says = r"because eps = 0\.5 of net\.4 is not small beside the variance that it is added to \(median 0\.\d+, smallest"
    with pytest.warns(NormDynWarning, match=says):
        fit(module, [callback])
    assert targets_of(callback) == ["net.0.weight"]


def test_the_reason_names_no_epsilon_where_it_explains_nothing():
    with pytest.warns(NormDynWarning) as caught:
        fit(make(Penalized), [AdaptiveWeightShrink(0.01)])
    (text,) = [str(w.message) for w in caught if w.category is NormDynWarning]
    assert "eps" not in text


def test_an_epsilon_that_comes_to_matter_late_is_named_with_the_variance_of_then():
    """AWS shrinks a weight until the variance behind it is no longer large beside the epsilon."""
    callback = AdaptiveWeightShrink(5.0, params="net.3.weight", weight_decay="replace")
    module = make(net=convnet(norm=lambda n: nn.BatchNorm2d(n, eps=1e-4)))
    module.net[3].weight.data *= 30
    with pytest.warns(
        NormDynWarning, match=r"because eps = 0\.0001 of net\.4 is not small beside the variance"
    ):
        fit(module, [callback], max_epochs=40, log_every_n_steps=5)


def test_rows_that_join_a_claim_do_not_make_every_step_wait_again():
    class Table(Net):
        """Batch k reads the first 3 + k rows of a table in front of a LayerNorm."""

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.table = nn.Embedding(40, 6).double()

        def training_step(self, batch, batch_idx=0):
            rows = torch.arange(min(40, 3 + self.trainer.global_step // 10))
            weights = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)
            read = nn.functional.layer_norm(self.table(rows), [6]) @ weights
            return super().training_step(batch) + read.square().mean()

    callback, close = AdaptiveWeightShrink(0.01), []

    class Counts(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            close.append(callback.member.session.claims.evidence.of(0).close)

    fit(make(Table), [callback, Counts()], max_epochs=40, log_every_n_steps=5)
    (target,) = [t for t in callback.plans[0].targets if t.name == "table.weight"]
    assert target.partition.n >= 15
    assert sum(close) <= CLOSE_LOOKS


@pytest.mark.slow
def test_close_looks_compile_nothing_again():
    """What is compiled is compiled anew for every hook that a module has more or less."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    callback = AdaptiveWeightShrink(0.01)
    module = torch.compile(make(Penalized, dtype=torch.float32, since=30), backend=backend)
    with pytest.warns(NormDynWarning, match=r"`net\.3\.weight` is no longer taken"):
        fit(module, [callback], loader(dtype=torch.float32), max_epochs=12, log_every_n_steps=2)
    graphs = len(compiled)
    compiled.clear()
    torch.compiler.reset()
    plain = torch.compile(make(Penalized, dtype=torch.float32, since=30), backend=backend)
    fit(plain, [], loader(dtype=torch.float32), max_epochs=12, log_every_n_steps=2)
    assert 0 < graphs <= len(compiled)
