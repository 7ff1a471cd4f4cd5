"""Every callback in every mode of training: it does what its paper says, and nothing else.

`replay` takes the gradients that the optimizers of a run received and follows the paper naively;
both must end at the same weights.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ALL_CASES,
    CASES,
    MODES,
    STEERING,
    ByStep,
    Case,
    KeepsRows,
    Remembers,
    adamw,
    check,
    compiled,
    everything,
    goes_with,
    identical,
    optimizer_state,
    run,
    sgd,
)
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from models import (
    BEFORE_2_6,
    TARGETS,
    Net,
    SavesAt,
    distance,
    fit,
    images,
    loader,
    make,
    same,
    trainer,
    weights_of,
)
from ranks import run_ranks
from reference import Shrink
from replay import Recorder, replay
from torch import nn
from torch.utils.data import DataLoader

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    WeightRescaling,
)
from lightning_normdyn.functional import gradient_cosine, weight_norm
from lightning_normdyn.parametrizations import (
    bounded_weight_normalization,
    centered_weight_normalization,
    weight_normalization,
    weight_standardization,
)

# Options whose every mode differs little from that of their class: in `make test` with two
# optimizers only.
VARIANTS = ("aws-std", "aws-keep", "wrs-keep", "decay-corrected", "decay-cautious")
# They change single entries by less than a weight of 16 bits can hold, and are refused there.
NEEDS_32_BITS = ("decay-cautious", *STEERING)
LEAVES_DECAY = ("aws-keep", "wrs-keep", "lr-drop", "rotation-smooth", "brake")
QUICK_STEERING = {("rotation", "finetuning"), ("rotation-floor", "adamw"), ("brake", "sgd plain")}


def every_case_and_mode():
    for case, mode in itertools.product(CASES, MODES):
        if not goes_with(case, mode):
            continue
        slow = case in VARIANTS and mode not in ("sgd", "adamw")
        slow = slow or (case in STEERING and (case, mode) not in QUICK_STEERING)
        yield pytest.param(case, mode, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.sampled(45)
@pytest.mark.parametrize(("case", "mode"), list(every_case_and_mode()))
def test_follows_its_paper(case, mode):
    overrides = (
        {} if CASES[case].make_scheduler is None else {"make_scheduler": CASES[case].make_scheduler}
    )
    module, recorder = run(CASES[case].callbacks(), MODES[mode], **overrides)
    assert sum(map(len, recorder.steps)) >= 4
    check(module, recorder, CASES[case], 1e-12 if MODES[mode].get("dtype") is None else 1e-6)


# ---- Another default dtype or device ----


class Batches:
    """Batches in memory: a DataLoader's own bookkeeping does not work on every default device."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@contextlib.contextmanager
def another_default(name: str):
    """bfloat16 has 8 bits, so a number of ours that is made in the default dtype is seen. On "meta"
    a tensor holds no numbers at all."""
    if name == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    else:
        torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def every_case_under_another_default():
    for case, mode, default in itertools.product(CASES, MODES, ("bfloat16", "meta")):
        if not goes_with(case, mode):
            continue
        if mode == "tensor lr" and default == "meta":
            continue  # LambdaLR itself makes a rate there
        quick = (case, mode) in {("all", "sgd"), ("lr-drop", "adamw"), ("aws", "bf16-mixed")}
        yield pytest.param(case, mode, default, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.sampled(3)
@pytest.mark.pairwise
@pytest.mark.parametrize(("case", "mode", "default"), list(every_case_under_another_default()))
def test_follows_its_paper_under_another_default(case, mode, default):
    settings = dict(MODES[mode])
    dtype = settings.pop("dtype", torch.float64)
    # The user's own tensors are made before: what is made during the fit is Lightning's, torch's
    # and ours.
    data = Batches(list(loader(dtype=dtype)))
    if CASES[case].make_scheduler is not None:
        settings["make_scheduler"] = CASES[case].make_scheduler
    model = settings.pop("model", Net)
    chosen = {
        key: settings.pop(key) for key in ("make_optimizer", "make_scheduler") if key in settings
    }
    if "net" in settings:
        torch.manual_seed(1)
        chosen["net"] = settings.pop("net")()
    extra = [make_callback() for make_callback in settings.pop("extra", [])]
    module, recorder = make(model, dtype=dtype, **chosen), Recorder()
    callbacks = [*extra, recorder, *CASES[case].callbacks()]
    with another_default(default):
        fit(module, callbacks, data, **settings)
    check(module, recorder, CASES[case], 1e-12 if dtype is torch.float64 else 1e-6)


def test_bfloat16_weights_shrink_under_a_bfloat16_default():
    """A factor of 0.9995 is lost in bfloat16: what is owed must be kept in float32, whatever the
    default is."""
    lengths = {}
    for default in ("float32", "bfloat16"):
        with another_default(default) if default == "bfloat16" else contextlib.nullcontext():
            module = make(
                dtype=torch.bfloat16, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.01)
            )
            data = Batches(list(loader(dtype=torch.bfloat16)))
            fit(module, [AdaptiveWeightShrink(0.05)], data, max_epochs=50)
        lengths[default] = {
            name: float(module.get_parameter(name).detach().double().norm()) for name in TARGETS
        }
    untreated = make(dtype=torch.bfloat16, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    fit(untreated, [], Batches(list(loader(dtype=torch.bfloat16))), max_epochs=50)
    for name in TARGETS:
        free = float(untreated.get_parameter(name).detach().double().norm())
        assert lengths["bfloat16"][name] == lengths["float32"][name] < 0.97 * free


# ---- Precision ----


class Overflows(Net):
    """Float16 with a loss that overflows in the given batches."""

    bad: tuple[int, ...] = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.bad else loss


class SteadyScaler(torch.amp.GradScaler):
    """Keeps its scale after a skip: at another scale, float16 rounds the next gradients
    differently, callbacks or not."""

    def update(self, new_scale=None):
        super().update(self._init_scale if new_scale is None else new_scale)


def scaled(
    callbacks: list[Any],
    batches: list[int],
    bad: tuple[int, ...],
    make_optimizer: Any,
    make_scheduler: Any = None,
    **arguments: Any,
) -> tuple[Net, Any]:
    """Train in "16-mixed" with a real gradient scaler on the given batches, of which those at the
    positions ``bad`` overflow."""
    module = make(
        Overflows, make_optimizer=make_optimizer, make_scheduler=make_scheduler, dtype=torch.float32
    )
    module.bad = bad
    data = DataLoader(
        images(dtype=torch.float32), batch_sampler=[list(range(8 * b, 8 * b + 8)) for b in batches]
    )
    scaler = SteadyScaler("cpu", init_scale=2.0**8)
    return module, fit(
        module,
        callbacks,
        data,
        max_epochs=1,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        **arguments,
    )


@pytest.mark.sampled(7)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", ALL_CASES)
def test_a_skipped_step_changes_nothing_and_counts_nothing(case, fused):
    def make_optimizer(p):
        return adamw(p, fused=fused)

    callbacks, control = CASES[case].callbacks(), CASES[case].callbacks()
    # Skipped: the very first step, the third real step (a WRS step), and the last.
    module, trainer = scaled(callbacks, [3, 0, 1, 3, 2, 3, 0, 1, 3], (0, 3, 5, 8), make_optimizer)
    expected, control_trainer = scaled(control, [0, 1, 2, 0, 1], (), make_optimizer)
    assert same(weights_of(module), weights_of(expected))
    assert identical(optimizer_state(trainer), optimizer_state(control_trainer))
    assert [c.steps_of(0) for c in callbacks] == [5] * len(callbacks)
    assert identical(
        [c.state_dict()["per_vector"] for c in callbacks],
        [c.state_dict()["per_vector"] for c in control],
    )


@pytest.mark.sampled(8)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("case", ALL_CASES)
def test_follows_its_paper_under_a_gradient_scaler(case, clip):
    recorder = Recorder()
    batches = [0, 1, 2, 3, 2, 1, 0]
    module, _ = scaled(
        [recorder, *CASES[case].callbacks()],
        batches,
        (2,),
        sgd,
        CASES[case].make_scheduler,
        gradient_clip_val=clip,
    )
    assert len(recorder.steps[0]) == 6
    check(module, recorder, CASES[case], 1e-6)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", [case for case in CASES if case not in NEEDS_32_BITS])
def test_trains_bf16_weights(case):
    module, recorder = run(
        CASES[case].callbacks(), MODES["sgd"], dtype=torch.float32, precision="bf16-true"
    )
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    recorder.start = {name: w.double() for name, w in recorder.start.items()}
    recorder.steps = [
        [
            {
                n: (None if g is None else g.double(), settings)
                for n, (g, settings) in received.items()
            }
            for received in steps
        ]
        for steps in recorder.steps
    ]
    expected = replay(recorder, CASES[case].targets, **CASES[case].rules)
    assert (
        distance({n: w.double() for n, w in weights_of(module).items()}, expected) < 0.03
    )  # 8 steps of bf16, eps 2^-8


# ---- Callbacks together ----


@pytest.mark.parametrize("mode", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_order_of_the_list_changes_no_bit(mode):
    weights = [
        weights_of(run([CASES["all"].callbacks()[i] for i in order], MODES[mode])[0])
        for order in itertools.permutations(range(4))
    ]
    assert all(same(w, weights[0]) for w in weights)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["sgd", "manual", "schedule", "finetuning"])
def test_the_monitor_changes_no_bit(mode):
    plain = weights_of(run([], MODES[mode])[0])
    assert same(weights_of(run([NormDynamicsMonitor(1, tables=False)], MODES[mode])[0]), plain)
    aws = weights_of(run([AdaptiveWeightShrink(0.5)], MODES[mode])[0])
    assert same(
        weights_of(
            run([NormDynamicsMonitor(1, tables=False), AdaptiveWeightShrink(0.5)], MODES[mode])[0]
        ),
        aws,
    )


def test_two_of_a_kind_with_different_targets():
    first, second = (
        AdaptiveWeightShrink(0.5, params="net.0.*"),
        AdaptiveWeightShrink(0.1, params="net.3.weight"),
    )
    module, recorder = run([second, first], MODES["sgd"])
    got = weights_of(module)
    halves = [
        replay(recorder, ["net.0.weight"], shrink=Shrink(0.5))["net.0.weight"],
        replay(recorder, ["net.3.weight"], shrink=Shrink(0.1))["net.3.weight"],
    ]
    assert distance({n: got[n] for n in TARGETS}, dict(zip(TARGETS, halves, strict=True))) < 1e-12


def test_a_compiled_submodule():
    module, recorder = run(CASES["all"].callbacks(), {"make_optimizer": sgd, "net": compiled})
    names = ["net.0._orig_mod.0.weight", "net.0._orig_mod.3.weight"]
    check(module, recorder, Case(list, CASES["all"].rules, names))


def plain_convnet() -> nn.Sequential:
    """Two convolutions without a normalization behind them."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def torch_weight_norm(net: nn.Module, names: list[str]) -> nn.Module:
    for name in names:
        nn.utils.parametrizations.weight_norm(net.get_submodule(name.removesuffix(".weight")))
    return net


FAMILY = [
    weight_normalization,
    weight_standardization,
    pytest.param(centered_weight_normalization, marks=pytest.mark.slow),
    pytest.param(bounded_weight_normalization, marks=pytest.mark.slow),
    pytest.param(torch_weight_norm, marks=pytest.mark.slow),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("normalize", FAMILY)
@pytest.mark.parametrize(
    "case", ["aws", "wrs", "projection", "projection-cosine", "monitor", "all"]
)
def test_normalized_weights_train_under_each_callback(case, normalize):
    """The direction is what is treated, never the gain, and its gradient stays orthogonal to it in
    float32."""
    split = normalize not in (weight_standardization, bounded_weight_normalization)
    targets = [f"net.{k}.parametrizations.weight.original{'1' if split else ''}" for k in (0, 2)]
    callbacks = CASES[case].callbacks()

    def net() -> nn.Module:
        return normalize(plain_convnet(), ["0.weight", "2.weight"])

    module, recorder = run(
        callbacks,
        {"make_optimizer": lambda p: sgd(p, weight_decay=0.02), "net": net},
        dtype=torch.float32,
        max_epochs=4,
    )
    for callback in callbacks:
        if case != "projection-cosine" and not isinstance(callback, NormDynamicsMonitor):
            assert [t.name for plan in callback.plans.values() for t in plan.targets] == targets
    rules = dict(CASES[case].rules)
    if normalize is weight_standardization and "shrink" in rules:
        rules["shrink"] = Shrink(0.5, statistic="std")
    if case != "projection-cosine":  # which also looks at gains
        check(module, recorder, Case(list, rules, targets), 1e-5)
    module.zero_grad()
    module.training_step(next(iter(loader(dtype=torch.float32)))).backward()
    for name in targets:
        w = module.get_parameter(name)
        assert weight_norm(w.detach()).min() >= 0.1
        assert w.grad.abs().max() > 0
        assert gradient_cosine(w.detach(), w.grad).abs().max() <= 1e-5


class Packed(nn.Module):
    """Attention over image rows with one weight for queries, keys and values, of which only the
    first two are normalized, per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18, bias=False), nn.Linear(6, 2)
        self.nq, self.nk = nn.LayerNorm(3, eps=1e-12), nn.LayerNorm(3, eps=1e-12)

    def forward(self, x):
        q, k, v = self.qkv(x[:, 0]).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(self.nq(q), self.nk(k), v)
        return self.head(y.transpose(1, 2).flatten(2).tanh().mean(1))


def by_vector(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four normalized vectors of `Packed.qkv`, each as a weight of one filter, and the value
    rows."""
    return {
        **{f"vector {i}": part.reshape(1, -1) for i, part in enumerate(weight[:12].split(3))},
        "values": weight[12:],
    }


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("case", "make_optimizer"),
    [
        *itertools.product(["aws", "wrs", "projection", "all"], [sgd, adamw]),
        *itertools.product(["aws", "wrs"], [lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.5)]),
        ("aws", lambda p: sgd(p, maximize=True)), ("wrs", lambda p: adamw(p, fused=True)),
    ],
)  # fmt: skip
def test_a_packed_projection_is_treated_in_its_normalized_rows(case, make_optimizer):
    """Like weights apart: the value rows neither lose their decay nor are touched."""
    module, recorder = run(
        CASES[case].callbacks(), {"make_optimizer": make_optimizer, "net": Packed, "max_epochs": 3}
    )
    got = weights_of(module)

    def apart(table: dict[str, Any], split: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {
            n: v
            for name, value in table.items()
            for n, v in (split(value) if name == "net.qkv.weight" else {name: value}).items()
        }

    recorder.start = apart(recorder.start, by_vector)
    recorder.steps = [
        [
            apart(
                received, lambda value: {n: (g, value[1]) for n, g in by_vector(value[0]).items()}
            )
            for received in steps
        ]
        for steps in recorder.steps
    ]
    vectors = [f"vector {i}" for i in range(4)]
    expected = replay(recorder, vectors, **CASES[case].rules)
    assert distance(apart(got, by_vector), expected) <= 1e-12
    assert (
        distance(
            {"": expected["values"]},
            {"": replay(recorder, [*vectors, "values"], **CASES[case].rules)["values"]},
        )
        > 1e-3
    )


# ---- Fits, interrupted and repeated ----


RESUMABLE = {
    **{name: case.callbacks for name, case in CASES.items()},
    "aws-match": lambda: [AdaptiveWeightShrink("match")],
    "wrs-window": lambda: [WeightRescaling(2, start_epoch=1, stop_epoch=2)],
}


@pytest.mark.sampled
@pytest.mark.parametrize("step", [5, 4])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c in STEERING else []) for c in RESUMABLE],
)
def test_resume_equals_the_uninterrupted_run(case, step, tmp_path):
    def go(callbacks, extra=(), **arguments):
        module = make(
            ByStep,
            make_optimizer=adamw,
            make_scheduler=CASES[case].make_scheduler if case in CASES else None,
        )
        trainer = fit(module, [*callbacks, *extra], max_epochs=3, **arguments)
        assert trainer.global_step == 12
        return everything(module, trainer, callbacks)

    path = tmp_path / "middle.ckpt"
    whole, resumed = RESUMABLE[case](), RESUMABLE[case]()
    expected = go(whole, [SavesAt(step, path)])
    assert identical(go(resumed, ckpt_path=path), expected)
    torch.load(path, weights_only=True)
    for a, b in zip(whole, resumed, strict=True):
        if isinstance(a, NormDynamicsMonitor):
            assert list(a.history) == list(b.history)
            assert len(a.history) == 12


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("monitor", "all", *STEERING)])
def test_resume_with_the_monitor_added_or_removed(case, tmp_path):
    def go(callbacks, extra=(), **arguments):
        module = make(ByStep, make_optimizer=adamw, make_scheduler=CASES[case].make_scheduler)
        return everything(
            module, fit(module, [*extra, *callbacks], max_epochs=3, **arguments), callbacks
        )

    def monitor():
        return NormDynamicsMonitor(1, tables=False)

    with_, without = tmp_path / "with.ckpt", tmp_path / "without.ckpt"
    expected = go(CASES[case].callbacks(), [SavesAt(5, without)])
    go(CASES[case].callbacks(), [monitor(), SavesAt(5, with_)])
    assert identical(go(CASES[case].callbacks(), [monitor()], ckpt_path=without), expected)
    assert identical(go(CASES[case].callbacks(), ckpt_path=with_), expected)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ALL_CASES)
def test_a_second_fit_starts_afresh(case):
    used, fresh = CASES[case].callbacks(), CASES[case].callbacks()
    run(used, MODES["sgd"], max_steps=5)
    again, _ = run(used, MODES["sgd"])
    once, _ = run(fresh, MODES["sgd"])
    assert same(weights_of(again), weights_of(once))
    assert [c.steps_of(0) for c in used] == [8] * len(used)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ALL_CASES)
def test_a_second_fit_of_one_trainer_with_evaluation_in_between(case):
    module, recorder, data = (
        make(make_optimizer=sgd, make_scheduler=CASES[case].make_scheduler),
        Recorder(),
        loader(),
    )
    trainer = fit(module, [recorder, *CASES[case].callbacks()], max_steps=5)
    before = weights_of(module)
    trainer.validate(module, data, verbose=False)
    trainer.predict(module, data)
    assert same(weights_of(module), before)
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = 13, 5
    trainer.fit(module, data)
    assert len(recorder.steps[0]) == 8  # the second fit alone: steps are counted from its start
    check(module, recorder, CASES[case])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ALL_CASES)
def test_validation_within_a_fit_changes_no_bit(case):
    weights = []
    for data in (None, loader()):
        module = make(make_optimizer=sgd, make_scheduler=CASES[case].make_scheduler)
        fit(module, CASES[case].callbacks(), val_data=data, val_check_interval=2)
        weights.append(weights_of(module))
    assert same(*weights)


class Tunable(Net):
    """What Lightning's tuner needs to find."""

    lr, batch_size = 0.1, 4

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader()


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name == "all" else [pytest.mark.slow]) for name in CASES],
)
def test_the_tuner_leaves_no_trace(case):
    def go(tune):
        module, callbacks = make(Tunable, make_optimizer=sgd), CASES[case].callbacks()
        runner = trainer(callbacks)
        tune(runner, module)
        runner.fit(module)
        return module.batch_size, everything(module, runner, callbacks)

    def find_lr(runner, module):
        Tuner(runner).lr_find(module, num_training=12, update_attr=False)

    def scale_batch_size(runner, module):
        Tuner(runner).scale_batch_size(module, max_trials=3, steps_per_trial=2)

    def set_batch_size(size):
        return lambda runner, module: setattr(module, "batch_size", size)

    assert identical(go(find_lr), go(set_batch_size(4)))
    found = go(scale_batch_size)
    assert found[0] > 4
    assert identical(found, go(set_batch_size(found[0])))


@pytest.mark.skipif(BEFORE_2_6, reason="its tuner changes the fit that follows, without us as well")
@pytest.mark.sampled(1)
@pytest.mark.parametrize("first", [True, False])
def test_the_tuner_as_a_callback_of_a_second_fit(first):
    def go(finder):
        callbacks = CASES["all"].callbacks()
        fit(
            make(make_optimizer=sgd), callbacks, max_steps=5
        )  # what it counted must not come back with the tuner's checkpoint
        module = make(Tunable, make_optimizer=sgd)
        fit(module, [*finder, *callbacks] if first else [*callbacks, *finder])
        return weights_of(module)

    assert same(go([LearningRateFinder(num_training_steps=12, update_attr=False)]), go([]))


class FailingSGD(torch.optim.SGD):
    """Fails inside its third step, where it sees split param groups; its ``step`` is that of SGD,
    whose decay can be taken over."""

    calls = 0

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.trained = {id(p) for group in self.param_groups for p in group["params"]}

    def _init_group(self, group, *lists):
        first = group is self.param_groups[0]
        is_a_trial = not any(
            id(p) in self.trained for p in group["params"]
        )  # on scratch weights, before the fit
        if first and len(self.param_groups) > 1 and not is_a_trial:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the optimizer fails")
        return super()._init_group(group, *lists)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ALL_CASES)
def test_leaves_nothing_behind(case):
    module = make(Remembers, make_optimizer=sgd)
    fit(module, CASES[case].callbacks())
    assert module.as_made()


@pytest.mark.sampled
@pytest.mark.parametrize("fails_at", [0, 5])
@pytest.mark.parametrize("case", ALL_CASES)
def test_an_exception_leaves_nothing_behind(case, fails_at):
    module, callbacks = make(Remembers, make_optimizer=sgd), CASES[case].callbacks()
    module.fails_at = fails_at
    with pytest.raises(RuntimeError, match="the training step fails"):
        fit(module, callbacks)
    assert module.as_made()
    run(callbacks, MODES["sgd"])  # and can be used again


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c].rules and c not in LEAVES_DECAY])
def test_an_exception_within_the_optimizer_restores_its_param_groups(case):
    module = make(Remembers, make_optimizer=lambda p: FailingSGD(p, lr=0.1, weight_decay=0.1))
    with pytest.raises(RuntimeError, match="the optimizer fails"):
        fit(module, CASES[case].callbacks())
    assert module.as_made()


# ---- Several ranks ----


def _fit_under_ddp(case: str) -> tuple[dict[str, Any], float, int, int, str]:
    logger, recorder, printed = KeepsRows(), Recorder(), io.StringIO()
    monitor = NormDynamicsMonitor(1, tables=False)
    callbacks = [
        *(c for c in CASES[case].callbacks() if not isinstance(c, NormDynamicsMonitor)),
        monitor,
    ]
    module = make(make_optimizer=sgd, make_scheduler=CASES[case].make_scheduler)
    with contextlib.redirect_stdout(printed):
        fit(
            module,
            [recorder, *callbacks],
            strategy="ddp",
            devices=2,
            logger=logger,
            log_every_n_steps=1,
        )
    logged = sum("normdyn/weight_norm" in row for row in logger.rows)
    weights = weights_of(module)
    return (
        weights,
        distance(weights, replay(recorder, CASES[case].targets, **CASES[case].rules)),
        len(monitor.history),
        logged,
        printed.getvalue(),
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", ALL_CASES)
def test_ddp_keeps_the_ranks_equal_and_logs_from_rank_zero(case):
    first, second = run_ranks(_fit_under_ddp, args=(case,)).values()
    assert same(first[0], second[0])
    assert max(first[1], second[1]) < 1e-12
    assert first[2:4] == (4, 4)  # 2 epochs of 4 batches, half of them on each rank
    assert second[2:4] == (0, 0)
    assert ("scale-invariant" in first[4]) == (case != "monitor")
    assert "scale-invariant" not in second[4]


# ---- Other ways in ----


class CliNet(Net):
    """A module that a command line can build."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lambda p: sgd(p, lr=lr))

    def train_dataloader(self):
        return loader()


CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_normdyn.AdaptiveWeightShrink
      init_args: {alpha: 0.5, statistic: norm, params: [net.*, "!net.8.*"]}
    - class_path: lightning_normdyn.RadialProjection
      init_args: {weight_decay: replace, params: "net.[03].weight"}
    - class_path: lightning_normdyn.callbacks.WeightRescaling
      init_args: {every_n_steps: 3, target_norm: 1.0, stop_epoch: null}
    - class_path: lightning_normdyn.NormDynamicsMonitor
      init_args: {every_n_steps: 1, quantities: [weight_norm], tables: false}
"""


def test_lightning_cli_builds_the_callbacks_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    recorder = Recorder()
    cli = LightningCLI(
        CliNet,
        args=["fit", "--config", "config.yaml"],
        save_config_callback=None,
        trainer_defaults={"callbacks": [recorder]},
    )
    check(cli.model, recorder, CASES["all"])
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, NormDynamicsMonitor))
    assert len(monitor.history) == 8
    rescaling = next(c for c in cli.trainer.callbacks if isinstance(c, WeightRescaling))
    assert (rescaling.every_n_steps, rescaling.stop_epoch) == (3, None)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("statistic: norm", ["statistic: median", "'auto'", "'norm'", "'std'"]),
        ("alpha: 0.5", ["alpha: -1", "must be > 0 or 'match', got -1"]),
    ],
)
def test_lightning_cli_shows_what_is_wrong(wrong, says, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG.replace(wrong, says[0]))
    with pytest.raises((SystemExit, ValueError)) as raised:
        LightningCLI(CliNet, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    shown = capsys.readouterr().err + str(raised.value)
    assert all(word in shown for word in says[1:])
