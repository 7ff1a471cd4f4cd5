"""Checkpoints from the middle of a step, and steps that are tried again: what Trainers do with
them, for every callback."""

from __future__ import annotations

import functools
import sys
from typing import Any

import lightning as L
import pytest
import torch
from cases import CASES as CASES_WITH_A_REFERENCE
from cases import Case, sgd
from models import Net, distance, fit, images, make, same, weights_of
from torch.utils.data import DataLoader

from lightning_normdyn import InputSpanMonitor

CASES = {
    **CASES_WITH_A_REFERENCE,
    "input-span": Case(lambda: [InputSpanMonitor(1, max_samples=64)]),
}

STEPS, SAVED_IN = 6, 3
ALWAYS_EXACT = ["wrs", "projection", "monitor", "input-span"]


def batches(count: int = STEPS) -> DataLoader[Any]:
    """The same batch again and again: Lightning does not fast-forward an ordinary loader."""
    data = images(8)
    return DataLoader(data, batch_sampler=[list(range(8))] * count)


def one_drop(optimizer: torch.optim.Optimizer) -> Any:
    """Falls right before the step that is saved in."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < SAVED_IN - 1 else 0.1
    )


def module_of(case: str, kind: Any = Net, make_optimizer: Any = sgd) -> Net:
    return make(
        kind, make_optimizer=make_optimizer, make_scheduler=one_drop if "drop" in case else None
    )


@functools.cache
def undisturbed(case: str) -> dict[str, torch.Tensor]:
    """The weights at the end of a fit in which nobody saves anything."""
    module = module_of(case)
    fit(module, CASES[case].callbacks(), batches(), max_steps=STEPS, max_epochs=1)
    return weights_of(module)


class SavesWithinStep(L.Callback):
    """Saves at a number of lines of our code and of torch's optimizer, evenly spread over one call
    of ``step``.

    Args:
        path: with ``{}`` for the number of the moment.
        moments: how many; 0: only count the lines.
        lines: how many there are.
    """

    def __init__(self, path: Any, moments: int = 0, lines: int = 0) -> None:
        self.path, self.lines = path, 0
        self.at = {lines * (i + 1) // (moments + 1): i for i in range(moments)}
        self.wrote: dict[int, bool] = {}
        self.updating = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.trainer = trainer
        optimizer.register_step_pre_hook(lambda *_: self.begin())
        optimizer.register_step_post_hook(lambda *_: sys.settrace(None))

    def begin(self) -> None:
        if self.trainer.global_step == SAVED_IN - 1:
            sys.settrace(self.trace)

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if (
            not ("lightning_normdyn" in name or "torch/optim" in name)
            or "site-packages/lightning/" in name
        ):
            return None
        if event == "line":
            self.updating |= "torch/optim" in name and frame.f_code.co_name in (
                "_single_tensor_sgd",
                "_multi_tensor_sgd",
                "_fused_sgd",
            )
            moment = self.at.get(self.lines)
            self.lines += 1
            if moment is not None:
                sys.settrace(None)
                self.wrote[moment] = self.updating
                self.trainer.save_checkpoint(str(self.path).format(moment))
                sys.settrace(self.trace)
        return self.trace


def check_moments(case: str, tmp_path: Any, moments: int) -> None:
    counting = SavesWithinStep("")
    straight = module_of(case)
    fit(straight, [counting, *CASES[case].callbacks()], batches(), max_steps=STEPS, max_epochs=1)
    expected = weights_of(straight)
    saver = SavesWithinStep(tmp_path / "{}.ckpt", moments, counting.lines)
    module = module_of(case)
    fit(module, [saver, *CASES[case].callbacks()], batches(), max_steps=STEPS, max_epochs=1)
    assert same(weights_of(module), expected)  # saving disturbs nobody
    assert len(saver.wrote) == moments
    for moment, wrote in saver.wrote.items():
        path = str(tmp_path / f"{moment}.ckpt")
        saved = torch.load(path, weights_only=False)["optimizer_states"][0]["param_groups"]
        assert [(len(g["params"]), g["weight_decay"]) for g in saved] == [
            (len(list(module.parameters())), 0.1)
        ]
        resumed = module_of(case)
        trainer = fit(
            resumed,
            CASES[case].callbacks(),
            batches(),
            max_steps=STEPS,
            max_epochs=1,
            ckpt_path=path,
        )
        assert trainer.global_step == STEPS
        assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1
        if wrote:
            # Some weights took a step more, as without us; a rule that acted twice for one step
            # would change lengths by far more.
            for name in CASES[case].targets:
                ratio = weights_of(resumed)[name].norm() / expected[name].norm()
                assert 0.8 < float(ratio) < 1.25, (moment, name)
        elif case in ALWAYS_EXACT:
            assert same(weights_of(resumed), expected), moment
        else:
            assert distance(weights_of(resumed), expected) < 1e-13, moment


@pytest.mark.parametrize("case", ["aws", "lr-drop"])
def test_a_checkpoint_from_within_a_step(case, tmp_path):
    check_moments(case, tmp_path, 5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_forty_checkpoints_from_within_a_step(case, tmp_path):
    check_moments(case, tmp_path, 40)


HOOKS = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]


class SavesInHook(L.Callback):
    def __init__(self, hook: str, path: Any) -> None:
        self.path = path

        def save(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == SAVED_IN - 1:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


@pytest.mark.parametrize(
    ("case", "hook"),
    [
        pytest.param(
            c, h, marks=[] if (c, h) == ("all", "on_before_optimizer_step") else pytest.mark.slow
        )
        for c in CASES
        for h in HOOKS
    ],
)
def test_a_checkpoint_from_within_a_hook(case, hook, tmp_path):
    module, resumed = module_of(case), module_of(case)
    path = tmp_path / "saved.ckpt"
    fit(
        module,
        [SavesInHook(hook, path), *CASES[case].callbacks()],
        batches(),
        max_steps=STEPS,
        max_epochs=1,
    )
    fit(resumed, CASES[case].callbacks(), batches(), max_steps=STEPS, max_epochs=1, ckpt_path=path)
    assert same(weights_of(resumed), undisturbed(case))


HOOKS_OF_LOOPS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
]
# Where a run resumed by plain Lightning ends with other weights than one that was not interrupted.
PLAIN_DIFFERS = {"on_train_epoch_start", "on_train_epoch_end"}
IN_LOOPS = {**CASES, "plain": Case(list), "plain, with a drop": Case(list)}


class SavesOnceInHook(L.Callback):
    """Saves the first time that a hook is called after a number of steps."""

    def __init__(self, hook: str, path: Any, after: int) -> None:
        def save(trainer: L.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step >= after and not path.exists() and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def loops(module: Net, callbacks: list[Any], ckpt_path: Any = None) -> dict[str, torch.Tensor]:
    """Three epochs of three batches, with a validation after the second batch of each."""
    fit(
        module,
        callbacks,
        batches(3),
        batches(1),
        max_steps=9,
        max_epochs=3,
        val_check_interval=2,
        num_sanity_val_steps=0,
        ckpt_path=ckpt_path,
    )
    return {**weights_of(module), "steps": torch.tensor(module.trainer.global_step)}


@functools.cache
def undisturbed_loops(case: str) -> dict[str, torch.Tensor]:
    """The end of `loops` in which nobody saves anything."""
    return loops(module_of(case), IN_LOOPS[case].callbacks())


@pytest.mark.parametrize(
    ("case", "hook"),
    [
        pytest.param(c, h, marks=[] if (c, h) == ("all", "on_validation_end") else pytest.mark.slow)
        for c in IN_LOOPS
        for h in HOOKS_OF_LOOPS
    ],
)
def test_a_checkpoint_from_within_a_hook_of_a_loop(case, hook, tmp_path):
    """The run goes on as the uninterrupted one wherever it does so without our callbacks."""
    after = {"on_train_start": 0, "on_train_end": 9}.get(hook, SAVED_IN - 1)
    path = tmp_path / "saved.ckpt"
    straight, callbacks = undisturbed_loops(case), IN_LOOPS[case].callbacks
    assert straight["steps"] == 9
    saved = loops(module_of(case), [SavesOnceInHook(hook, path, after), *callbacks()])
    assert same(saved, straight)  # saving disturbs nobody
    groups = torch.load(path, weights_only=False)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1]
    resumed = loops(module_of(case), callbacks(), path)
    assert same(resumed, straight) == (hook not in PLAIN_DIFFERS)


# ---- Steps that raise ----


def failing(parameters: Any) -> torch.optim.Optimizer:
    """torch's own SGD, which runs out of memory in its third step, before it writes anything."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    init_group, calls = optimizer._init_group, []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))

    def out_of_memory(*args: Any) -> Any:
        if len(calls) == SAVED_IN:
            calls.append(1)
            raise RuntimeError("out of memory")
        return init_group(*args)

    optimizer._init_group = out_of_memory
    return optimizer


class TriesAgain(Net):
    """Takes the step again with the same gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.failures = 0

    def training_step(self, batch: Any, batch_idx: int = 0) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        try:
            optimizer.step()
        except RuntimeError:
            self.failures += 1
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


class TriesBatchAgain(Net):
    """Takes the step again with its closure, so with gradients that are taken anew."""

    failures = 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except RuntimeError:
            self.failures += 1
            super().optimizer_step(*args, **kwargs)


def states(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    found = trainer.optimizers[0].state_dict()["state"]
    return {
        f"{i}.{key}": value
        for i, state in found.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [TriesAgain, TriesBatchAgain])
def test_a_step_tried_again_equals_an_untroubled_one(kind, case):
    ends = []
    for optimizer, failures in ((failing, 1), (sgd, 0)):
        module = module_of(case, kind, optimizer)
        trainer = fit(module, CASES[case].callbacks(), batches(), max_steps=STEPS, max_epochs=1)
        assert module.failures == failures
        ends.append((weights_of(module), states(trainer)))
    if kind is TriesAgain:
        assert same(ends[0][0], ends[1][0])
        assert same(ends[0][1], ends[1][1])
    else:  # one rounding where weights had to be put back
        assert distance(ends[0][0], ends[1][0]) < 1e-13


class SavesOnException(L.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("case", ["aws", "lr-drop", "all"])
def test_a_resume_after_a_step_that_failed(case, first, tmp_path):
    module, resumed = module_of(case, make_optimizer=failing), module_of(case)
    saver, callbacks = SavesOnException(tmp_path / "failed.ckpt"), CASES[case].callbacks()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(
            module,
            [saver, *callbacks] if first else [*callbacks, saver],
            batches(),
            max_steps=STEPS,
            max_epochs=1,
        )
    fit(
        resumed,
        CASES[case].callbacks(),
        batches(),
        max_steps=STEPS,
        max_epochs=1,
        ckpt_path=saver.path,
    )
    assert distance(weights_of(resumed), undisturbed(case)) < 1e-13
