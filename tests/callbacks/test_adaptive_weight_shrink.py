"""AWS against its paper, with gradients of its own; and what happens at the edges."""

from __future__ import annotations

from inspect import signature

import lightning as L
import pytest
import reference
import torch
from cases import DECAYING_OPTIMIZERS, adamw
from models import (
    TARGETS,
    Net,
    against_paper,
    clip_by_norm,
    clip_by_value,
    convnet,
    distance,
    fit,
    loader,
    make,
    same,
    weights_of,
)
from reference import Shrink
from replay import Recorder, replay
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
)
from lightning_normdyn.parametrizations import weight_standardization

OPTIMIZERS = {
    **DECAYING_OPTIMIZERS,
    "no decay": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), reference.SGD(0.9), 0.1),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("weight_decay", ["replace", "keep"])
@pytest.mark.parametrize("statistic", ["norm", "std"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_paper_in_float64(name, statistic, weight_decay):
    make_optimizer, optimizer, lr = OPTIMIZERS[name]
    callback = AdaptiveWeightShrink(0.5, statistic=statistic, weight_decay=weight_decay)
    rules = {"shrink": Shrink(0.5, statistic, weight_decay)}
    assert (
        distance(*against_paper([callback], make_optimizer, optimizer, lr=lr, rules=rules)) <= 1e-12
    )


@pytest.mark.sampled(6)
@pytest.mark.parametrize("statistic", ["norm", "std"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_paper_in_float32(name, statistic):
    make_optimizer, optimizer, lr = OPTIMIZERS[name]
    callback, rules = (
        AdaptiveWeightShrink(0.5, statistic=statistic),
        {"shrink": Shrink(0.5, statistic)},
    )
    got, expected = against_paper(
        [callback], make_optimizer, optimizer, lr=lr, rules=rules, dtype=torch.float32, steps=4
    )
    assert all(w.dtype == torch.float32 for w in expected.values())
    assert distance(got, expected) <= 1e-6


MODES = {
    "accumulation": {"accumulate": 2},
    "norm clipping": {"gradient_clip_val": 0.1, "transform": clip_by_norm(0.1)},
    "value clipping": {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
        "transform": clip_by_value(0.01),
    },
    "schedule": {
        "make_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
        "factor": 0.7,
    },
    "everything": {
        "accumulate": 2,
        "gradient_clip_val": 0.1,
        "transform": clip_by_norm(0.1),
        "make_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
        "factor": 0.7,
    },
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_equals_the_paper_with_accumulation_clipping_and_schedules(name, mode):
    make_optimizer, optimizer, lr = OPTIMIZERS[name]
    arguments = dict(MODES[mode])
    factor = arguments.pop("factor", 1.0)
    rules = {"shrink": Shrink(0.5)}
    got, expected = against_paper(
        [AdaptiveWeightShrink(0.5)],
        make_optimizer,
        optimizer,
        lr=lr,
        rules=rules,
        reference_lr=lambda t: lr * factor**t,
        **arguments,
    )
    assert distance(got, expected) <= 1e-12


# ---- Which statistic ----


def standardized() -> nn.Sequential:
    """Convolutions whose filters are standardized before use; what is stored is the raw weight."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    weight_standardization(net[0])
    return net


def test_auto_takes_the_std_where_weights_are_standardized():
    torch.manual_seed(1)
    module, recorder = Net(OPTIMIZERS["momentum"][0], standardized()), Recorder()
    fit(module, [AdaptiveWeightShrink(0.5), recorder])
    raw, plain = "net.0.parametrizations.weight.original", "net.2.weight"
    expected = replay(recorder, [raw], shrink=Shrink(0.5, "std"))
    expected[plain] = replay(recorder, [plain], shrink=Shrink(0.5, "norm"))[plain]
    assert distance(weights_of(module), expected) < 1e-12


@pytest.mark.parametrize("statistic", ["norm", "std"])
def test_a_named_statistic_holds_for_all(statistic):
    torch.manual_seed(1)
    module, recorder = Net(OPTIMIZERS["momentum"][0], standardized()), Recorder()
    fit(module, [AdaptiveWeightShrink(0.5, statistic=statistic), recorder])
    expected = replay(
        recorder,
        ["net.0.parametrizations.weight.original", "net.2.weight"],
        shrink=Shrink(0.5, statistic),
    )
    assert distance(weights_of(module), expected) < 1e-12


# ---- Granularity ----


def test_filters_that_are_normalized_together_shrink_together():
    module, recorder = (
        make(make_optimizer=OPTIMIZERS["sgd"][0], net=convnet(norm=lambda c: nn.GroupNorm(2, c))),
        Recorder(),
    )
    fit(module, [AdaptiveWeightShrink(0.5), recorder], max_steps=1)
    for name in TARGETS:
        w, g = recorder.start[name], recorder.steps[0][0][name][0]
        half = len(w) // 2
        factor = torch.cat(
            [(1 - 0.1 * 0.5 * part.norm()).expand(half) for part in (w[:half], w[half:])]
        ).view(-1, 1, 1, 1)
        torch.testing.assert_close(
            weights_of(module)[name], factor * w - 0.1 * g, rtol=1e-13, atol=1e-15
        )


def test_a_layer_shrinks_as_one_on_request():
    module, recorder = make(make_optimizer=OPTIMIZERS["sgd"][0]), Recorder()
    fit(module, [AdaptiveWeightShrink(0.5, granularity="layer"), recorder], max_steps=1)
    for name in TARGETS:
        w, g = recorder.start[name], recorder.steps[0][0][name][0]
        torch.testing.assert_close(
            weights_of(module)[name], (1 - 0.05 * w.norm()) * w - 0.1 * g, rtol=1e-13, atol=1e-15
        )


def test_a_granularity_that_would_change_the_function_is_refused():
    module = make(net=convnet(norm=lambda c: nn.GroupNorm(1, c)))
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError,
        match=r"granularity='filter' was asked for `net\.0\.weight`, but net\.1 .*Use granularity='auto'",
    ):
        fit(module, [AdaptiveWeightShrink(0.5, granularity="filter")])
    assert same(weights_of(module), before)


# ---- Decay ----


def test_the_optimizers_decay_of_other_weights_stays():
    # BatchNorm's and the head's weights decay as before, bit for bit as in groups that a person
    # would make.
    def by_hand(parameters):
        parameters = list(parameters)
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim < 4]},
                {"params": [p for p in parameters if p.ndim == 4], "weight_decay": 0.0},
            ],
            0.02,
            weight_decay=0.3,
        )

    ours, theirs = (
        make(make_optimizer=lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3)),
        make(make_optimizer=by_hand),
    )
    fit(ours, [AdaptiveWeightShrink(0.5)])
    fit(theirs, [AdaptiveWeightShrink(0.5)])
    assert same(weights_of(ours), weights_of(theirs))


TORCH_OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and "weight_decay" in signature(kind).parameters
    and kind is not getattr(torch.optim, "Muon", None)
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", TORCH_OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_takes_the_decay_over_from_every_optimizer_of_torch(kind):
    def one_group(parameters):
        return kind(parameters, lr=0.05, weight_decay=0.3)

    def by_hand(parameters):
        parameters = list(parameters)
        targets = [p for p in parameters if p.ndim == 4]
        rest = [p for p in parameters if p.ndim != 4]
        return kind(
            [{"params": targets, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.3}],
            lr=0.05,
        )

    ours, theirs = (
        make(make_optimizer=one_group, dtype=torch.float32),
        make(make_optimizer=by_hand, dtype=torch.float32),
    )
    for module in (ours, theirs):
        fit(module, [AdaptiveWeightShrink(0.5)], max_steps=4)
    assert same(weights_of(ours), weights_of(theirs))


class Mine(torch.optim.SGD):
    """Decays all weights by the number that it was made with, whatever the param groups say."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["weight_decay"] = self.defaults["weight_decay"]
        return super().step(closure)


def test_a_decay_that_cannot_be_taken_over_is_refused_and_can_be_kept():
    def make_optimizer(p):
        return Mine(p, lr=0.1, weight_decay=0.1)

    module = make(make_optimizer=make_optimizer)
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError,
        match=r"The weight decay 0\.1 of Mine .*Set weight_decay=0 .*weight_decay='keep'",
    ):
        fit(module, [AdaptiveWeightShrink(0.5)])
    assert same(weights_of(module), before)
    rules = {"shrink": Shrink(0.5, weight_decay="keep")}
    keep = AdaptiveWeightShrink(0.5, weight_decay="keep")
    assert (
        distance(
            *against_paper(
                [keep], make_optimizer, reference.SGD(weight_decay=0.1), lr=0.1, rules=rules
            )
        )
        < 1e-12
    )


def test_a_decay_that_cannot_be_taken_over_of_named_weights_is_refused_at_fit_start():
    class Untouched(Net):
        def training_step(self, batch, batch_idx=0):
            raise AssertionError("a training step was run")

    module = make(Untouched, make_optimizer=lambda p: Mine(p, lr=0.1, weight_decay=0.1))
    with pytest.raises(NotSupportedError, match=r"The weight decay 0\.1 of Mine"):
        fit(module, [AdaptiveWeightShrink(0.5, params="net.0.*")])


def test_a_weight_without_a_gradient_is_neither_shrunk_nor_decayed():
    class HalfTrained(Net):
        def forward(self, x):
            return (
                self.net(x) + 0 * self.net(x).detach()
                if self.trainer.global_step == 0
                else self.tail(x)
            )

        def tail(self, x):
            with torch.no_grad():
                x = self.net[:3](x)
            return self.net[3:](x)

    module = make(
        HalfTrained, make_optimizer=lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3)
    )
    after_first = {}

    class Look(Recorder):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                after_first.update(weights_of(pl_module))

    fit(module, [AdaptiveWeightShrink(0.5), look := Look()])
    assert all(received["net.0.weight"][0] is None for received in look.steps[0][1:])
    assert torch.equal(module.net[0].weight, after_first["net.0.weight"])
    assert not torch.equal(module.net[3].weight, after_first["net.3.weight"])


# ---- Edges ----


def test_the_factor_is_clamped_at_one_half_and_counted():
    callback, module, recorder = (
        AdaptiveWeightShrink(1e6),
        make(make_optimizer=OPTIMIZERS["sgd"][0]),
        Recorder(),
    )
    fit(module, [callback, recorder], max_steps=3)
    assert distance(weights_of(module), replay(recorder, TARGETS, shrink=Shrink(1e6))) < 1e-12
    assert callback.plans[0].counters["clamped"].tolist() == [3.0] * 10


def test_clamped_vectors_are_named_in_the_end_table(capsys):
    module = make(make_optimizer=OPTIMIZERS["sgd"][0])
    with torch.no_grad():
        module.net[3].weight[:2] *= 1e6  # its first two filters stay too long for all three steps
    fit(module, [NormDynamicsMonitor(1), AdaptiveWeightShrink(0.5)], max_steps=3)
    assert (
        "clamped 6 times (net.3.weight: 6): lr * alpha * norm is too large there"
        in capsys.readouterr().out
    )


def test_a_zero_filter_is_left_alone_counted_and_named_once():
    module = make(make_optimizer=OPTIMIZERS["sgd"][0])
    with torch.no_grad():
        module.net[0].weight[1] = 0
        module.net[3].weight[4] = 0
    # A gradient would revive the zero filters, so their gradients are zero, too.
    module.net[0].weight.register_hook(lambda g: g * torch.tensor([1.0, 0, 1, 1]).view(4, 1, 1, 1))
    module.net[3].weight.register_hook(
        lambda g: g * torch.tensor([1.0, 1, 1, 1, 0, 1]).view(6, 1, 1, 1)
    )
    callback, recorder = AdaptiveWeightShrink(0.5), Recorder()
    with pytest.warns(NormDynWarning) as caught:
        fit(module, [callback, recorder])
    ours = [str(w.message) for w in caught if w.category is NormDynWarning]
    assert ours == [
        "AdaptiveWeightShrink left vectors alone whose norm is zero or not finite: 1 in "
        "net.0.weight, 1 in net.3.weight."
    ]
    assert distance(weights_of(module), replay(recorder, TARGETS, shrink=Shrink(0.5))) < 1e-12
    assert callback.plans[0].bad.nonzero().flatten().tolist() == [1, 8]


def test_a_gradient_that_is_not_finite_stays_where_it_came_from():
    # The optimizer writes NaN into the second convolution; AWS raises nothing, spreads nothing, and
    # says so once.
    module, plain = (
        make(make_optimizer=OPTIMIZERS["sgd"][0]),
        make(make_optimizer=OPTIMIZERS["sgd"][0]),
    )
    for m in (module, plain):
        m.net[3].weight.register_hook(
            lambda g: g.clone().index_fill_(0, torch.tensor([2]), float("nan"))
        )
    with pytest.warns(NormDynWarning, match=r"zero or not finite: 1 in net\.3\.weight"):
        fit(module, [AdaptiveWeightShrink(0.5)], max_steps=2)
    fit(plain, [], max_steps=2)
    assert {n: w.isnan().sum() for n, w in weights_of(module).items()} == {
        n: w.isnan().sum() for n, w in weights_of(plain).items()
    }


def test_bf16_weights_shrink_without_bias():
    """No gradient, so AWS alone acts: 1/norm grows by lr * alpha in each step, in steps far below
    what bf16 resolves."""

    class Idle(Net):
        def training_step(self, batch, batch_idx=0):
            return 0 * super().training_step(batch, batch_idx)

    module = make(
        Idle,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        dtype=torch.float32,
        net=convnet(),
    )
    with torch.no_grad():
        module.net[3].weight.mul_(2.0)
    start = torch.cat(
        [module.net[i].weight.detach().bfloat16().double().flatten(1).norm(dim=1) for i in (0, 3)]
    )
    callback = AdaptiveWeightShrink(0.1)
    fit(
        module,
        [callback],
        precision="bf16-true",
        max_epochs=-1,
        max_steps=400,
        data=loader(8, torch.float32),
    )
    norms = torch.cat(
        [module.net[i].weight.detach().double().flatten(1).norm(dim=1) for i in (0, 3)]
    )
    expected = 1 / (1 / start + 400 * 0.01 * 0.1)
    assert (
        (1 - expected / start) > 0.1
    ).all()  # each step is below 1e-3 * norm, bf16 resolves 8e-3
    owed = torch.cat([callback.state_dict()["per_vector"]["owed"][name] for name in TARGETS])
    torch.testing.assert_close(norms * owed, expected, rtol=5e-3, atol=0)
    assert float((norms * owed / expected).mean() - 1) == pytest.approx(0, abs=1.5e-3)


# ---- The alpha that matches a decay ----


def mean_norm(weights):
    return float(torch.cat([w.flatten(1).norm(dim=1) for w in weights]).mean())


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_matched_alpha_is_the_decay_that_acts_over_the_mean_norm(name, capsys):
    make_optimizer, optimizer, lr = OPTIMIZERS[name]
    at_start = [weights_of(make())[target] for target in TARGETS]
    decay = 0.1 / (1 - 0.9) if name == "momentum" else 0.1
    alpha = decay / mean_norm(at_start)
    got, expected = against_paper(
        [AdaptiveWeightShrink("match")],
        make_optimizer,
        optimizer,
        lr=lr,
        rules={"shrink": Shrink(alpha)},
    )
    assert distance(got, expected) <= 1e-12
    assert f"AWS with alpha {alpha:.3g}" in capsys.readouterr().out


def in_two_groups(parameters):
    first, second, *rest = (p for p in parameters if p.ndim > 1)
    return torch.optim.AdamW(
        [{"params": [first, *rest]}, {"params": [second], "weight_decay": 0.3}],
        lr=0.01,
        weight_decay=0.1,
    )


def test_each_group_is_matched_by_itself_and_who_joins_later_gets_its_groups_alpha():
    class Thaws(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[0].weight.requires_grad_(trainer.global_step >= 2)

    start = weights_of(make())
    apart = AdaptiveWeightShrink("match")
    fit(make(make_optimizer=in_two_groups), [apart], max_steps=2)
    alphas = apart.member.workers[0].alphas
    assert alphas["net.0.weight"] == pytest.approx(0.1 / mean_norm([start["net.0.weight"]]))
    assert alphas["net.3.weight"] == pytest.approx(0.3 / mean_norm([start["net.3.weight"]]))

    late, module = AdaptiveWeightShrink("match", params=TARGETS), make(make_optimizer=adamw)
    module.net[0].weight.requires_grad_(False)
    fit(module, [Thaws(), late], max_steps=4)
    of_both = late.member.workers[0].alphas
    assert set(of_both.values()) == {of_both["net.3.weight"]}


@pytest.mark.parametrize(
    ("make_optimizer", "says"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=0.0), "nothing to match.*decay of 0"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "cannot tell what the weight decay 0.1"),
    ],
)
def test_without_a_decay_that_has_a_number_nothing_is_matched(make_optimizer, says):
    module = make(make_optimizer=make_optimizer)
    with pytest.raises(NotSupportedError, match=says):
        fit(module, [AdaptiveWeightShrink("match")], max_steps=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"alpha": -1.0}, r"`alpha` must be > 0 or 'match', got -1\.0\."),
        ({"alpha": 0}, "`alpha` must be > 0 or 'match', got 0"),
        ({"alpha": float("nan")}, "`alpha` must be > 0 or 'match', got nan"),
        ({"alpha": float("inf")}, "`alpha` must be finite, got inf"),
        ({"alpha": "1e-3"}, "`alpha` must be > 0 or 'match', got '1e-3'"),
        (
            {"alpha": 1.0, "statistic": "median"},
            "`statistic` must be 'auto', 'norm' or 'std', got 'median'",
        ),
        (
            {"alpha": 1.0, "weight_decay": "drop"},
            "`weight_decay` must be 'replace' or 'keep', got 'drop'",
        ),
        ({"alpha": "match", "weight_decay": "keep"}, "both would act"),
        ({"alpha": 1.0, "granularity": "row"}, "`granularity` must be .*got 'row'"),
        ({"alpha": 1.0, "params": []}, "`params` is an empty list"),
        ({"alpha": 1.0, "params": ["auto", "x"]}, "mixes 'auto' with patterns"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        AdaptiveWeightShrink(**arguments)


def test_the_start_table_says_what_is_replaced(capsys):
    module = make(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.03))
    norm = float(module.net[0].weight.detach().flatten(1).norm(dim=1).mean())
    fit(module, [AdaptiveWeightShrink(0.5)])
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if "net.0.weight" in line)
    assert "AWS, decay now" in line
    assert "(replaces 0.03)" in line
    shown = float(line.split("decay now")[1].split()[0])
    assert shown == pytest.approx(0.5 * norm, rel=0.1)


@pytest.mark.parametrize(
    ("make_optimizer", "says"),
    [
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.005),
            "(replaces 0.005, acting like 0.05)",
        ),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.005), "(replaces 0.005)"),
        (
            lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.005),
            "(replaces 0.005 inside the gradient)",
        ),
    ],
    ids=["momentum", "decoupled", "coupled Adam"],
)
def test_the_start_table_says_what_the_replaced_decay_acted_like(make_optimizer, says):
    """A decoupled decay stands beside it, and what is written in a coupled one is another unit."""
    callback = AdaptiveWeightShrink(0.5)
    fit(make(make_optimizer=make_optimizer), [callback], max_steps=1)
    assert callback.member.treatments(0)[0].endswith(says)
