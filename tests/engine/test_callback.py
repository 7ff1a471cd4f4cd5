"""What every callback does around a fit: when nothing happens, beside others, copies and state, and
what it costs."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import sys
import weakref

import lightning as L
import pytest
import torch
from cases import EVERYBODY, targets_of
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from models import (
    BATCH,
    TARGETS,
    Net,
    SavesAt,
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
    NormDynamicsMonitor,
    RadialProjection,
    StepBracket,
    WeightRescaling,
    WeightVectors,
)

# ---- What is refused ----


def test_two_with_the_same_arguments_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([AdaptiveWeightShrink(0.5), AdaptiveWeightShrink(0.1)])


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


@pytest.mark.parametrize("name", EVERYBODY)
def test_state_is_plain(name, tmp_path):
    callback = EVERYBODY[name]()
    fit(make(make_optimizer=sgd), [callback])
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["steps"] == {0: 8}
    assert set(TARGETS) <= set(state["targets"])


@pytest.mark.sampled(4)
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
        assert "log" in vars(original)
        assert all("log" not in vars(c) and "log_dict" not in vars(c) for c in copies)
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
            # A tensor that is on the host already is there at once.
            if counted.open and not (name == "cpu" and tensor.device.type == "cpu"):
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


@pytest.mark.sampled(1)
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
    # Once each for the start table, the run's description, the last norms and the end table. A step
    # takes its own sums.
    assert taken_of_few == taken_of_many == 4


# ---- What a step costs in which nothing acts ----


class CountsCalls(L.Callback):
    """Counts the Python functions of this package that one batch calls, from the first callback's
    first hook to the same hook of the next batch."""

    # After the steps at which claims are looked at, and before any at which the Trainer logs.
    COUNTED = 18

    def __init__(self):
        self.count = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sys.setprofile(self.see if batch_idx == self.COUNTED else None)

    def see(self, frame, event, argument):
        is_ours = "lightning_normdyn" in frame.f_code.co_filename
        self.count += event == "call" and is_ours


def calls_of_an_idle_batch(layers, callbacks):
    counts, batches = CountsCalls(), CountsCalls.COUNTED + 2
    module = make(net=deep(layers))
    try:
        fit(module, [counts, *callbacks], loader(batches * BATCH), max_epochs=1)
    finally:
        sys.setprofile(None)
    return counts.count


@pytest.mark.parametrize(
    ("make_callback", "most"),
    [
        (lambda: NormDynamicsMonitor(10**9, tables=False), 135),
        (lambda: WeightRescaling(10**9), 150),
    ],
    ids=["monitor", "rescaling"],
)
def test_a_step_in_which_nothing_acts_calls_as_few_functions_for_many_layers_as_for_few(
    make_callback, most, capsys
):
    few, many = (calls_of_an_idle_batch(layers, [make_callback()]) for layers in (2, 12))
    assert few == many
    # A step of a small network takes longer for every function that it calls.
    assert few <= most
