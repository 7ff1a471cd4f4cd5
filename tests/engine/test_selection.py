"""Which weights a callback means: patterns, kinds of layers, what is refused by name, and when it
is said."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import EVERYBODY, WRITERS, refused, targets_of
from models import (
    TARGETS,
    Net,
    Penalized,
    convnet,
    distance,
    fit,
    loader,
    make,
    sgd,
    weights_of,
)
from reference import Rescale, Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    NoTargetsError,
    NotSupportedError,
    RadialProjection,
)

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
