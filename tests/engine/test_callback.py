"""What all callbacks share: which weights they mean, what they refuse and in which words, and when
they do nothing at all."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import sys
import warnings
import weakref
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from models import (
    TARGETS,
    ManualNet,
    Net,
    Penalized,
    SavesAt,
    convnet,
    distance,
    fit,
    loader,
    make,
    same,
    sgd,
    trainer,
    weights_of,
)
from reference import Rescale, Shrink
from replay import Recorder, replay
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import (
    AdaptiveWeightShrink,
    InputSpanMonitor,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NoTargetsError,
    NotSupportedError,
    RadialProjection,
    StepBracket,
    WeightRescaling,
    WeightVectors,
)

WRITERS = {
    "aws": lambda **common: AdaptiveWeightShrink(0.5, **common),
    "wrs": lambda **common: WeightRescaling(2, **common),
    "projection": lambda **common: RadialProjection(**common),
}
EVERYBODY = {**WRITERS, "monitor": lambda **common: NormDynamicsMonitor(1, tables=False, **common)}


def targets_of(callback):
    return [t.name for _, plan in sorted(callback.plans.items()) for t in plan.targets]


def refused(module, callbacks, error, says, **arguments):
    """The fit raises this, and no weight has been touched."""
    before = weights_of(module)
    with pytest.raises(error, match=says):
        fit(module, callbacks, **arguments)
    assert same(weights_of(module), before)


# ---- Which weights ----


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("auto", TARGETS),
        ("net.0.weight", ["net.0.weight"]),
        ("*", [*TARGETS, "net.8.weight"]),
        ("net.*.weight", [*TARGETS, "net.8.weight"]),
        (["net.8*", "net.0*"], ["net.0.weight", "net.8.weight"]),
        (["*", "!net.8.*"], TARGETS),
        (["!net.8.*"], TARGETS),
        (["!net.0.*"], ["net.3.weight"]),
        ("net.[03].weight", TARGETS),
    ],
)
def test_params_are_globs_over_names(params, expected):
    callback = AdaptiveWeightShrink(0.5, params=params)
    fit(make(), [callback], max_steps=1)
    assert targets_of(callback) == expected


def test_a_tied_weight_is_one_target_under_any_of_its_names():
    class Tied(Net):
        def __init__(self):
            super().__init__(
                net=nn.Sequential(
                    nn.Flatten(),
                    nn.Linear(36, 36, bias=False),
                    nn.LayerNorm(36),
                    nn.Linear(36, 36, bias=False),
                )
            )
            self.net[3].weight = self.net[1].weight
            self.head = nn.Linear(36, 2).double()

        def forward(self, x):
            return self.head(self.net(x))

    for name in ("net.1.weight", "net.3.weight"):
        callback, recorder, module = AdaptiveWeightShrink(0.5, params=name), Recorder(), make(Tied)
        fit(module, [callback, recorder])
        assert targets_of(callback) == ["net.1.weight"]
        assert (
            distance(weights_of(module), replay(recorder, ["net.1.weight"], shrink=Shrink(0.5)))
            < 1e-12
        )


class Bag(Net):
    """Layers of every kind, none of them in front of a normalization."""

    def __init__(self):
        super().__init__(net=nn.Identity())
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.embedding = nn.Embedding(5, 9)
        self.lstm = nn.LSTM(9, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        x = self.up(self.grouped(torch.tanh(self.conv(x)))).flatten(2)
        x = x + self.embedding(torch.arange(len(x)) % 5).unsqueeze(1)
        x, _ = self.lstm(x)
        return self.linear(self.attention(x, x, x)[0].mean(1))


KINDS = [
    "conv.weight", "grouped.weight", "up.weight", "embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight",
    "attention.out_proj.weight", "linear.weight",
]  # fmt: skip


def as_filters(name, w):
    """A transposed convolution keeps its output channels in dim 1 of each group: bring them to the
    front."""
    return (
        w.reshape(2, 2, 3, 2, 2).transpose(1, 2).reshape(6, 2, 2, 2) if name == "up.weight" else w
    )


@pytest.mark.parametrize("rule", ["aws", "wrs"])
def test_every_kind_of_layer_by_name(rule):
    module, recorder, callback = make(Bag), Recorder(), WRITERS[rule](params=KINDS)
    changes = (
        pytest.warns(NormDynWarning, match="changes the network's function")
        if rule == "wrs"
        else contextlib.nullcontext()
    )
    with changes:
        fit(module, [callback, recorder])
    assert sorted(targets_of(callback)) == sorted(KINDS)
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    got = {name: as_filters(name, w) for name, w in weights_of(module).items()}
    recorder.start = {name: as_filters(name, w) for name, w in recorder.start.items()}
    recorder.steps = [
        [{n: (as_filters(n, g), s) for n, (g, s) in received.items()} for received in steps]
        for steps in recorder.steps
    ]
    rules = {"aws": {"shrink": Shrink(0.5)}, "wrs": {"rescale": Rescale(2)}}[rule]
    assert distance(got, replay(recorder, KINDS, **rules)) < 1e-12


def test_a_weight_that_the_first_batches_do_not_use_is_found_later():
    class Later(Net):
        def forward(self, x):
            x = self.net[:3](x)
            x = self.net[3:6](x) if self.trainer.global_step % 3 == 2 else x[:, [0, 1, 2, 3, 0, 1]]
            return self.net[6:](x)

    callback, module, recorder = AdaptiveWeightShrink(0.5), make(Later), Recorder()
    fit(module, [callback, recorder])
    assert targets_of(callback) == TARGETS
    # Batch 2 was the first that used it; its gradient told that something had been missed, so batch
    # 5 was watched.
    late = [{n: v for n, v in r.items() if n == "net.3.weight"} for r in recorder.steps[0]]
    assert [r["net.3.weight"][0] is not None for r in late] == [i % 3 == 2 for i in range(8)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss_at_the_start_are_no_reason_to_give_up(accumulate):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return (
                None
                if self.trainer.current_epoch == 0 and batch_idx < 2
                else super().training_step(batch, batch_idx)
            )

    callback, module, recorder = AdaptiveWeightShrink(0.5), make(Skips), Recorder()
    fit(module, [callback, recorder], accumulate_grad_batches=accumulate)
    assert recorder.steps[0][0]["net.0.weight"][0] is None
    assert distance(weights_of(module), replay(recorder, TARGETS, shrink=Shrink(0.5))) < 1e-12


def test_a_weight_is_found_whenever_it_appears_and_whoever_clears_its_gradient():
    """After more batches than the search looks at one after the other, in a loop that clears
    gradients right after each step."""

    class Rare(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx=0):
            optimizer, used = self.optimizers(), batch_idx % 7 in (3, 5)
            x = self.net[:3](batch[0])
            x = self.net[3:6](x) if used else x[:, [0, 1, 2, 3, 0, 1]]
            self.manual_backward(nn.functional.cross_entropy(self.net[6:](x), batch[1]))
            optimizer.step()
            optimizer.zero_grad()

    callback = AdaptiveWeightShrink(0.5)
    module = make(Rare)
    fit(module, [callback], loader(count=8 * 16), max_epochs=1)
    assert targets_of(callback) == TARGETS
    looks = callback.member.session.looks
    assert looks._next > looks._batches or not looks._missed


def test_counts_survive_targets_that_join():
    class Joins(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.optimizers[0].add_param_group({"params": [pl_module.net[0].weight]})

    def without_first(parameters):
        return torch.optim.SGD([p for p in parameters if tuple(p.shape) != (4, 1, 3, 3)], lr=0.1)

    callback = AdaptiveWeightShrink(1e6)
    fit(make(make_optimizer=without_first), [callback, Joins()])
    assert targets_of(callback) == ["net.3.weight", "net.0.weight"]
    assert callback.plans[0].counters["clamped"].tolist() == [8.0] * 6 + [3.0] * 4


def test_a_claim_that_the_gradients_contradict_is_withdrawn():
    module, callback = make(Penalized), AdaptiveWeightShrink(0.5)
    with pytest.warns(NormDynWarning) as caught:
        fit(module, [callback])
    ours = [str(w.message) for w in caught if w.category is NormDynWarning]
    assert len(ours) == 1
    assert ours[0].startswith(
        "`net.3.weight` is no longer taken for scale-invariant: net.4 says filter, but the "
        "gradient is not orthogonal"
    )
    assert targets_of(callback) == ["net.0.weight"]


@pytest.mark.parametrize("granularity", ["auto", "group"])
def test_a_weight_that_was_named_keeps_its_vectors_when_its_claim_is_withdrawn(granularity):
    """In the middle of a fit nothing is refused, and no other vectors are scaled from then on."""
    module = make(Penalized, net=convnet(norm=lambda n: nn.GroupNorm(2, n)))
    callback = AdaptiveWeightShrink(0.5, params="net.3.weight", granularity=granularity)
    monitor = NormDynamicsMonitor(1, tables=False, per_vector=True)
    with pytest.warns(
        NormDynWarning,
        match=r"`net\.3\.weight` is no longer taken for scale-invariant: net\.4 says group",
    ):
        fit(module, [callback, monitor])
    (target,) = callback.plans[0].targets
    assert target.by_request
    assert target.partition.n == 2
    assert monitor.history.vectors("weight_norm/net.3.weight")[1].shape == (8, 2)


def test_a_history_starts_anew_with_the_vectors_of_a_weight_that_are_known_later():
    """A weight that no loss has shown yet is measured by filters; the monitor goes on when it turns
    out to be one layer."""

    class Late(Net):
        def __init__(self):
            super().__init__()
            self.late = nn.Sequential(
                nn.Flatten(), nn.Linear(36, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 2)
            ).double()

        def training_step(self, batch, batch_idx=0):
            loss = super().training_step(batch)
            return (
                loss + self.late(batch[0]).square().sum() if self.trainer.global_step > 2 else loss
            )

    monitor = NormDynamicsMonitor(1, tables=False, per_vector=True)
    fit(make(Late), [monitor])
    steps, norms = monitor.history.vectors("weight_norm/late.1.weight")
    assert norms.shape == (len(steps), 1)
    assert steps[-1] == 7
    assert 2 < steps[0] < 7
    assert monitor.history.vectors("weight_norm/net.0.weight")[1].shape == (8, 4)


# ---- Finetuning: weights that nobody trains yet ----


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


# ---- What is refused ----


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_pattern_that_matches_nothing_names_the_nearest(name):
    says = r"'net\.0\.wieght', which matches none of the 3 weights .*: net\.0\.weight, net\.3\..*\. The nearest: net\.0\.weight"
    refused(make(), [EVERYBODY[name](params="net.0.wieght")], NoTargetsError, says)


@pytest.mark.parametrize("name", EVERYBODY)
def test_an_exclude_that_matches_nothing_is_refused_as_well(name):
    refused(
        make(),
        [EVERYBODY[name](params=["*", "!body.*"])],
        NoTargetsError,
        r"'body\.\*', which matches none",
    )


@pytest.mark.parametrize("name", EVERYBODY)
@pytest.mark.parametrize("params", [["net.0*", "!net.*"], "!*"], ids=str)
def test_excluding_all_that_is_included_is_refused(name, params):
    refused(
        make(),
        [EVERYBODY[name](params=params)],
        NoTargetsError,
        r"`params=.*` excludes all that it includes\. Leave a",
    )


@pytest.mark.parametrize("name", EVERYBODY)
def test_parameters_of_one_dimension_are_never_targets(name):
    refused(
        make(),
        [EVERYBODY[name](params="net.*.bias")],
        NoTargetsError,
        "matches none of the 3 weights of two or more dimensions",
    )


@pytest.mark.parametrize("name", WRITERS)
def test_auto_without_a_scale_invariant_weight_says_why(name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(
        NoTargetsError,
        match=r"(?s)found no scale-invariant weight to act on:.*net\.1\.weight: .*Name weights with params=",
    ):
        fit(make(net=net), [WRITERS[name]()])


def test_a_gated_projection_without_any_matrix_is_refused():
    class Flat(Net):
        def __init__(self):
            super().__init__(net=nn.BatchNorm2d(1))

        def training_step(self, batch, batch_idx=0):
            return self.net(batch[0]).square().mean() + self.net.weight.sum()

    with pytest.raises(
        NoTargetsError,
        match=r"RadialProjection\(params='auto'\) found no weight of two or more dimensions to act on",
    ):
        fit(make(Flat), [RadialProjection(gate="cosine")])


@pytest.mark.parametrize("name", EVERYBODY)
def test_lbfgs_is_refused_before_training(name):
    module = make(make_optimizer=lambda p: torch.optim.LBFGS(p, max_iter=3))
    refused(
        module,
        [EVERYBODY[name]()],
        NotSupportedError,
        r"LBFGS evaluates its closure more than once .*such as SGD or AdamW",
    )


class Sparse(Net):
    def __init__(self):
        super().__init__(lambda p: torch.optim.SparseAdam(p, lr=0.1), net=nn.Identity())
        self.table = nn.Embedding(5, 4, sparse=True).double()

    def training_step(self, batch, batch_idx=0):
        return nn.functional.layer_norm(self.table(torch.tensor([0, 2])), [4])[:, 0].sum()


@pytest.mark.parametrize("name", EVERYBODY)
def test_sparse_gradients_are_refused_by_name(name):
    says = r"`table\.weight` gets sparse gradients .*sparse=False, or leave it out with"
    refused(make(Sparse), [EVERYBODY[name](params="table.weight")], NotSupportedError, says)


def test_the_monitor_leaves_sparse_gradients_out():
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(make(Sparse), [monitor])
    assert targets_of(monitor) == []


@pytest.mark.parametrize("name", EVERYBODY)
def test_complex_weights_are_refused_by_name_and_left_out_otherwise(name):
    class Complex(Net):
        def __init__(self):
            super().__init__()
            self.rotation = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128))

        def training_step(self, batch, batch_idx=0):
            return super().training_step(batch, batch_idx) + self.rotation.abs().square().sum()

    refused(
        make(Complex),
        [EVERYBODY[name](params="rotation")],
        NotSupportedError,
        r"`rotation` .* is complex; leave it out",
        data=loader(),
    )
    callback = EVERYBODY[name]()
    fit(make(Complex), [callback], loader(), max_steps=1)
    assert "rotation" not in targets_of(callback)


class Lazy(Net):
    """Its first convolution learns its shape from the first batch."""

    def __init__(self, make_optimizer=sgd):
        super().__init__(make_optimizer)
        self.net[0] = nn.LazyConv2d(4, 3, bias=False).double()


@pytest.mark.parametrize("name", EVERYBODY)
@pytest.mark.parametrize("params", ["net.0.weight", "net.*"])
def test_lazy_weights_are_refused_by_name(name, params):
    with pytest.raises(
        NotSupportedError,
        match=r"`net\.0\.weight` was asked .* a lazy parameter without a shape yet; run one forward pass",
    ):
        fit(make(Lazy), [EVERYBODY[name](params=params)], loader())


@pytest.mark.parametrize("name", WRITERS)
def test_lazy_weights_are_left_alone_under_auto_and_said(name):
    callback = WRITERS[name]()
    with pytest.warns(
        NormDynWarning,
        match=r"leaves lazy parameters alone \(`net\.0\.weight`\)\. Run one forward pass before the fit",
    ):
        fit(make(Lazy), [callback], loader())
    assert targets_of(callback) == ["net.3.weight"]


def test_auto_with_nothing_but_lazy_weights_says_so():
    module = make(Lazy)
    module.net = nn.Sequential(
        module.net[0], nn.BatchNorm2d(4).double(), nn.Flatten(), nn.LazyLinear(2).double()
    )
    with (
        pytest.warns(NormDynWarning),
        pytest.raises(
            NoTargetsError, match=r"  net\.0\.weight: a lazy parameter; run one forward pass"
        ),
    ):
        fit(module, [AdaptiveWeightShrink(0.5)], loader())


@pytest.mark.parametrize("name", WRITERS)
def test_an_exact_name_that_no_optimizer_holds_is_refused(name):
    module = make(make_optimizer=lambda p: sgd([q for q in p if q.ndim != 2]))
    refused(
        module,
        [WRITERS[name](params="net.8.weight")],
        NoTargetsError,
        r"`net\.8\.weight` was asked .* no optimizer holds it",
    )


@pytest.mark.parametrize("name", WRITERS)
def test_two_of_a_kind_on_one_weight_are_refused_before_training(name):
    first, second = WRITERS[name](params="net.*"), WRITERS[name](params="net.3.weight")
    says = (
        r"Two \w+ callbacks target `net\.3\.weight`\. Give them different `params`, or remove one\."
    )
    refused(make(), [first, second], NotSupportedError, says)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("order", [1, -1])
def test_two_of_a_kind_on_one_weight_are_refused_under_auto_as_well(name, order):
    callbacks = [WRITERS[name](), WRITERS[name](params="net.3.weight")][::order]
    refused(make(), callbacks, NotSupportedError, r"Two \w+ callbacks target `net\.3\.weight`")


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_subclass_is_of_the_same_kind(name):
    base = type(EVERYBODY[name]())
    second = EVERYBODY[name](params="net.3.weight")
    second.__class__ = type("Mine", (base,), {})
    refused(
        make(),
        [EVERYBODY[name](), second],
        NotSupportedError,
        rf"Two {base.__name__} callbacks target `net\.3\.weight`",
    )


def test_two_with_the_same_arguments_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([AdaptiveWeightShrink(0.5), AdaptiveWeightShrink(0.1)])


@pytest.mark.parametrize("name", EVERYBODY)
def test_the_trainer_of_the_other_package_is_refused(name):
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = convnet()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self.parameters())

    other = pl.Trainer(
        accelerator="cpu", callbacks=[EVERYBODY[name]()], max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(
        NotSupportedError,
        match=r"Trainer of `pytorch_lightning`; it belongs to `lightning`\. Use `from lightning import Trainer`",
    ):
        other.fit(Other(), loader(dtype=torch.float32))


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


# ---- When nothing happens ----


@pytest.mark.parametrize("name", EVERYBODY)
@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0}],
    ids=lambda a: next(iter(a)),
)
def test_a_fit_without_a_step_changes_nothing(name, arguments, tmp_path):
    module, callback = make(), EVERYBODY[name]()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    runner = fit(module, [callback], **arguments)
    assert same(dict(module.state_dict()), before)
    runner.save_checkpoint(tmp_path / "nothing.ckpt")
    torch.load(tmp_path / "nothing.ckpt", weights_only=True)


@pytest.mark.parametrize("name", EVERYBODY)
def test_an_empty_dataloader(name):
    module = make()
    before = weights_of(module)
    with pytest.warns(UserWarning, match="Total length of `DataLoader` across ranks is zero"):
        fit(
            module,
            [EVERYBODY[name]()],
            DataLoader(TensorDataset(torch.empty(0, 1, 6, 6), torch.empty(0))),
        )
    assert same(weights_of(module), before)


@pytest.mark.parametrize("name", EVERYBODY)
def test_evaluation_alone(name):
    module, callback = make(), EVERYBODY[name]()
    before = weights_of(module)
    runner = trainer([callback])
    runner.validate(module, loader(), verbose=False)
    runner.predict(module, loader())
    assert same(weights_of(module), before)
    assert callback.plans == {}


@pytest.mark.parametrize("name", EVERYBODY)
def test_barebones_and_fast_dev_run(name):
    for arguments in ({"barebones": True, "max_steps": 2}, {"fast_dev_run": 2}):
        settings = {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        }
        callback, recorder, module = EVERYBODY[name](), Recorder(), make()
        L.Trainer(callbacks=[callback, recorder], **settings).fit(module, loader())
        rules = {"aws": {"shrink": Shrink(0.5)}, "wrs": {"rescale": Rescale(2)}}.get(name)
        if rules:
            assert distance(weights_of(module), replay(recorder, TARGETS, **rules)) < 1e-12
        if name == "monitor":
            assert len(callback.history) == (0 if "barebones" in arguments else 2)


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_fit_that_ends_early(name):
    class Worse(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.trainer.global_step))

    module, callback = make(Worse), EVERYBODY[name]()
    runner = fit(
        module, [EarlyStopping("val_loss", patience=1), callback], val_data=loader(), max_epochs=10
    )
    assert runner.current_epoch < 5
    assert len(runner.optimizers[0]._optimizer_step_post_hooks) == 0


# ---- Beside others ----


def test_with_a_scaler_other_hooks_never_see_split_groups():
    class Looks(L.Callback):
        def on_train_start(self, trainer, pl_module):  # after ours
            optimizer, self.seen = trainer.optimizers[0], []
            optimizer.register_step_pre_hook(
                lambda *_: self.seen.append(len(optimizer.param_groups))
            )
            optimizer.register_step_post_hook(
                lambda *_: self.seen.append(len(optimizer.param_groups))
            )

        def on_train_batch_end(self, trainer, *_):
            self.seen.append(len(trainer.optimizers[0].param_groups))

    looks = Looks()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))
    fit(make(dtype=torch.float32), [AdaptiveWeightShrink(0.5), looks], plugins=[precision])
    assert looks.seen == [1] * 24


def test_a_bracket_of_the_users_own_stays():
    class Mine(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.numbers, self.bracket = [], StepBracket.of(trainer.optimizers[0])
            self.bracket.add(30, lambda step: self.numbers.append(step.number))

    mine = Mine()
    runner = fit(make(), [mine, AdaptiveWeightShrink(0.5)])
    assert mine.numbers == list(range(1, 9))
    assert len(runner.optimizers[0]._optimizer_step_pre_hooks) == 1


def test_the_table_is_printed_once_and_can_be_had_without(capsys):
    fit(make(), [AdaptiveWeightShrink(0.5), WeightRescaling(2)])
    printed = capsys.readouterr().out
    assert printed.count("lightning-normdyn: targets") == 1
    assert "WRS to norm 1 every 2 steps" in printed
    fit(make(), [NormDynamicsMonitor(1, tables=False)])
    assert "lightning-normdyn" not in capsys.readouterr().out


# ---- State ----


def test_state_key_names_class_params_and_granularity_only():
    assert (
        AdaptiveWeightShrink(0.5).state_key == AdaptiveWeightShrink(0.1, statistic="std").state_key
    )
    assert (
        AdaptiveWeightShrink(0.5).state_key != AdaptiveWeightShrink(0.5, params="net.*").state_key
    )
    assert (
        AdaptiveWeightShrink(0.5).state_key
        != AdaptiveWeightShrink(0.5, granularity="layer").state_key
    )
    assert AdaptiveWeightShrink(0.5).state_key != WeightRescaling(5).state_key


@pytest.mark.parametrize("name", EVERYBODY)
def test_state_is_plain(name, tmp_path):
    callback = EVERYBODY[name]()
    fit(make(make_optimizer=sgd), [callback])
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["steps"] == {0: 8}
    assert set(TARGETS) <= set(state["targets"])


@pytest.mark.parametrize("name", EVERYBODY)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a fit"])
def test_a_callback_can_be_copied_and_pickled(name, used):
    """Launchers that spawn processes pickle the Trainer with everything in it; a copy is ready for
    a fit of its own."""
    original = EVERYBODY[name]()
    if used:
        fit(make(seed=5), [original], max_steps=3)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    if used:  # nothing was taken from the original, and nothing of its fit went into the copies
        assert original.steps_of(0) == 3
        assert TARGETS[0] in targets_of(original)
        assert all(not c.plans and c._member is None for c in copies)
        assert len(pickle.dumps(original)) < 20_000
    weights = []
    for callback in (EVERYBODY[name](), *copies):
        module = make()
        fit(module, [callback])
        weights.append(weights_of(module))
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_resume_of_an_unchanged_run_says_nothing(tmp_path):
    path = tmp_path / "three.ckpt"
    fit(make(), [AdaptiveWeightShrink(0.5), SavesAt(3, path)])
    fit(make(), [AdaptiveWeightShrink(0.5)], ckpt_path=path)  # a warning of ours would be an error


def test_resume_takes_the_targets_from_the_checkpoint(tmp_path, monkeypatch):
    path, callback = tmp_path / "three.ckpt", AdaptiveWeightShrink(0.5)
    fit(make(), [AdaptiveWeightShrink(0.5), SavesAt(3, path)])
    monkeypatch.setattr(
        "lightning_normdyn.invariance.search.ScaleInvarianceSearch.analyze",
        lambda *_: pytest.fail("traced again"),
    )
    fit(make(), [callback], ckpt_path=path)
    assert targets_of(callback) == TARGETS


def test_an_evaluation_that_loads_a_checkpoint_is_no_resume(tmp_path):
    path, callback = tmp_path / "three.ckpt", WeightRescaling(3)
    fit(make(), [WeightRescaling(3), SavesAt(2, path)])
    module, recorder = make(), Recorder()
    runner = trainer([callback, recorder])
    runner.validate(module, loader(), ckpt_path=path, verbose=False)
    runner.fit(module, loader())
    assert distance(weights_of(module), replay(recorder, TARGETS, rescale=Rescale(3))) < 1e-12


# ---- What it costs to do nothing ----


class Operations(TorchDispatchMode, L.Callback):
    """Everything that is dispatched in one batch, from the first callback's start to the last one's
    end: kernels, waits, collectives."""

    def __init__(self, step):
        super().__init__()
        self.step, self.names, self.last, self.open = step, [], Closing(self), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.open = True
            self.__enter__()


class Closing(L.Callback):
    def __init__(self, operations):
        self.operations = operations

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.operations.step + 1:
            self.operations.open = False
            self.operations.__exit__(None, None, None)


def dispatched(callbacks, monkeypatch, decay):
    """In the 20th step: the claims about weights have been tested by then."""
    counted = Operations(19)
    for name in ("tolist", "numpy", "item", "cpu"):
        original = getattr(torch.Tensor, name)

        def call(tensor, *args, original=original, name=name, **kwargs):
            if counted.open:
                counted.names.append(name)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, call)

    def fused(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=decay, fused=True)

    fit(
        make(make_optimizer=fused, dtype=torch.float32),
        [counted, *callbacks, counted.last],
        max_epochs=-1,
        max_steps=30,
    )
    assert len(counted.names) > 50
    monkeypatch.undo()
    return counted.names


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_step_that_neither_logs_nor_rescales_adds_no_operation(decay, monkeypatch):
    bare = dispatched([], monkeypatch, decay)
    assert dispatched([NormDynamicsMonitor(7, tables=False)], monkeypatch, decay) == bare
    both = dispatched(
        [NormDynamicsMonitor(7, tables=False), WeightRescaling(7)], monkeypatch, decay
    )
    # While WRS owns the decay of its targets, the optimizer steps them as a group of their own.
    assert both == bare if not decay else set(both) == set(bare)
    assert len(both) <= len(bare) + 4 * bool(decay)


def test_a_step_that_logs_waits_once(monkeypatch):
    bare = dispatched([], monkeypatch, 0.0)
    names = dispatched([NormDynamicsMonitor(20, tables=False)], monkeypatch, 0.0)
    waits = ("tolist", "numpy", "item", "cpu", "aten._local_scalar_dense.default")
    assert sum(names.count(name) - bare.count(name) for name in waits) == 1


class Fails(L.Callback):
    """An error in the second batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("something else went wrong")


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_that_is_over_keeps_nothing_alive(fails):
    def run():
        module = make()
        callbacks = [
            AdaptiveWeightShrink(0.1),
            RadialProjection(),
            NormDynamicsMonitor(1, tables=False),
            *([Fails()] if fails else []),
        ]
        runner = trainer(callbacks)
        with (
            pytest.raises(RuntimeError, match="something else")
            if fails
            else contextlib.nullcontext()
        ):
            runner.fit(module, loader())
        return weakref.ref(module), weakref.ref(runner), weakref.ref(runner.optimizers[0])

    left = run()
    gc.collect()
    assert [ref() for ref in left] == [None, None, None]


# ---- What a fit's start and end cost ----


def deep(layers):
    """Small layers, each in front of a normalization, and a head."""
    blocks = [
        layer for _ in range(layers) for layer in (nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
    ]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4, bias=False), nn.LayerNorm(4), *blocks, nn.Linear(4, 2)
    )


TOO_LARGE = {
    "alpha": lambda n: AdaptiveWeightShrink(n),
    "target_norm": lambda n: WeightRescaling(10, target_norm=n),
    "delta": lambda n: RadialProjection(delta=n),
    "weight_decay": lambda n: RadialProjection(weight_decay=n),
    "weight_decay_ratio": lambda n: RadialProjection(weight_decay_ratio=n),
    "exponent": lambda n: LRDropRescaling(exponent=n),
    "min_drop": lambda n: LRDropRescaling(min_drop=n),
    "energy": lambda n: InputSpanMonitor(energy=n),
    "seed": lambda n: InputSpanMonitor(seed=n),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_number_too_large_for_a_float_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        TOO_LARGE[name](10**400)


def python_calls(layers, monkeypatch):
    """How many Python functions a fit of two steps calls, and how often norms are taken of all
    weights together."""
    callbacks, module = [AdaptiveWeightShrink(0.01), NormDynamicsMonitor(1)], make(net=deep(layers))
    calls, taken = 0, 0
    norms = WeightVectors.norms

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    def counting(vectors):
        nonlocal taken
        taken += 1
        return norms(vectors)

    monkeypatch.setattr(WeightVectors, "norms", counting)
    sys.setprofile(count)
    try:
        fit(module, callbacks, max_steps=2)
    finally:
        sys.setprofile(None)
        monkeypatch.undo()
    return calls, taken


def test_the_cost_of_a_fits_start_and_end_grows_with_the_number_of_layers_and_not_with_its_square(
    monkeypatch, capsys
):
    python_calls(4, monkeypatch)  # what happens once per process
    (few, taken_of_few), (more, _), (many, taken_of_many) = (
        python_calls(n, monkeypatch) for n in (4, 12, 28)
    )
    per_layer, further = (more - few) / 8, (many - more) / 16
    assert further < 1.05 * per_layer
    # In each of two steps (AWS), and once each for the start table, the run's description, the last
    # norms and the end table.
    assert taken_of_few == taken_of_many == 6


# ---- Weights that are zero ----


def zeroed(**arguments: Any) -> Net:
    module = make(**arguments)
    with torch.no_grad():
        module.net[3].weight.zero_()
    return module


class NeedsLength(AdaptiveWeightShrink):
    """A rule that a weight of zeros would never notice."""

    needs_length = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(0.1, **arguments)


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, target_norm="initial", **k), NeedsLength],
    ids=["wrs", "a rule of somebody else"],
)
@pytest.mark.parametrize("params", ["auto", "net.3.weight"])
def test_a_weight_of_zeros_is_refused_by_name_and_the_way_out_works(callback, params):
    module = zeroed()
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError, match=r"`net\.3\.weight`, but all entries are zero.*'!net\.3\.weight'"
    ):
        fit(module, [callback(params=params)])
    assert same(weights_of(module), before), "refused before the first step"
    assert not any(
        group["weight_decay"] == 0 for group in module.trainer.optimizers[0].param_groups
    )
    fit(zeroed(), [callback(params=["net.0.weight", "net.3.weight", "!net.3.weight"])], max_steps=2)


def test_who_only_looks_and_a_gate_let_a_weight_of_zeros_be():
    fit(
        zeroed(),
        [NormDynamicsMonitor(1, tables=False), RadialProjection(gate="cosine")],
        max_steps=2,
    )


@pytest.mark.parametrize(
    "callback",
    [
        AdaptiveWeightShrink(1.0),
        RadialProjection(),
        LRDropRescaling(exponent=0.25),
        WeightRescaling(1),
    ],
    ids=["aws", "projection", "lr drop", "wrs"],
)
def test_a_weight_of_zeros_is_treated_as_soon_as_it_has_grown(callback):
    module = zeroed(make_scheduler=dropping)
    untreated = zeroed(make_scheduler=dropping)
    for net in (module.net, untreated.net):
        nn.init.ones_(net[4].bias)  # or the ReLU behind it would let no gradient through
    with warnings.catch_warnings():
        # In the first step there is nothing to treat, which is said at the end.
        warnings.filterwarnings(
            "ignore", "\\w+ left vectors alone whose norm is zero", NormDynWarning
        )
        fit(module, [callback], max_epochs=2)
    fit(untreated, [], max_epochs=2)
    assert not torch.equal(module.net[3].weight, untreated.net[3].weight)
    if isinstance(callback, WeightRescaling):
        lengths = module.net[3].weight.detach().flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths))


def dropping(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.1)


def test_a_weight_of_zeros_that_is_unfrozen_later_is_left_to_its_optimizer():
    class Unfreezes(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].weight.requires_grad_(trainer.current_epoch > 0)

    module, callback = zeroed(), NeedsLength()
    module.net[3].weight.requires_grad_(False)
    with pytest.warns(
        NormDynWarning, match=r"`net\.3\.weight`, but all entries are zero.*left to its optimizer"
    ):
        fit(module, [Unfreezes(), callback], max_epochs=2)
    assert [t.name for t in callback.plans[0].targets] == ["net.0.weight"]


# ---- Names with brackets ----


class Bracketed(nn.Module):
    """torch lets a module be registered under any name."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("q[0]", nn.Conv2d(1, 4, 3))
        self.add_module("q0", nn.Conv2d(1, 4, 3))
        self.norm, self.other, self.head = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(64, 2)

    def forward(self, x):
        return self.head((self.norm(getattr(self, "q[0]")(x)) + self.other(self.q0(x))).flatten(1))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("net.q[0].weight", ["net.q[0].weight"]),
        ("net.q0.weight", ["net.q0.weight"]),
        ("net.q[0-9].weight", ["net.q0.weight"]),  # no such name, so it is a glob
        ("!net.q[0].weight", ["net.q0.weight"]),
        ("net.q*.weight", ["net.q[0].weight", "net.q0.weight"]),
    ],
)
def test_an_exact_name_comes_before_a_glob(params, expected):
    callback = AdaptiveWeightShrink(0.1, params=params)
    fit(make(net=Bracketed()), [callback], max_steps=1)
    assert [t.name for t in callback.plans[0].targets] == expected


def test_numbers_of_numpy_are_numbers_everywhere():
    assert AdaptiveWeightShrink(np.float32(0.5)).alpha == 0.5
    assert RadialProjection(delta=np.float64(0.2), weight_decay=np.float32(0.5)).weight_decay == 0.5
    assert LRDropRescaling(exponent=np.float32(0.25), min_drop=np.int64(2)).settings() == {
        "exponent": 0.25,
        "min_drop": 2.0,
    }
    assert NormDynamicsMonitor(np.int64(10)).every_n_steps == 10
    assert (
        InputSpanMonitor(
            np.int64(2), max_samples=np.int32(50), energy=np.float32(0.5), seed=np.int64(3)
        ).max_samples
        == 50
    )
    for refused in (
        lambda: NormDynamicsMonitor(np.float64(10)),
        lambda: WeightRescaling(np.int64(0)),
        lambda: LRDropRescaling(exponent=True),
    ):
        with pytest.raises(ValueError, match="must be"):
            refused()


def test_the_only_step_of_a_fused_optimizer_counts_before_a_callback_says_what_it_did():
    """Whether it was skipped is still on its way when the fit ends."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module = make(
        make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.5, fused=True),
        dtype=torch.float32,
    )
    callback = AdaptiveWeightShrink(0.5)
    fit(module, [callback], max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.steps_of(0) == 1
