"""Every callback on a device other than the CPU: it ends where it ends on the CPU, no operation has
tensors of two devices, and the host waits for nothing in a step."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import lightning as L
import pytest
import torch
from accelerator import DEVICE, Device, on_accelerator
from cases import CASES, MODES, goes_with, run, sgd
from models import BATCH, distance, fit, loader, make, weights_of

from lightning_normdyn import InputSpanMonitor, NormDynamicsMonitor
from lightning_normdyn.engine.claim_record import CLOSE_LOOKS

# torch has no fused kernels for this device, and no autocast.
ON_CPU_ONLY = ("fused", "fused sgd", "bf16-mixed")

ARRIVES = "_to_copy in optimizers/step.py get"
"""What was sent to the host before is asked for; on CUDA it has arrived by then."""


def every_case_and_mode():
    for case, mode in itertools.product(CASES, MODES):
        if mode in ON_CPU_ONLY or not goes_with(case, mode):
            continue
        marks = [] if (case, mode) in QUICK else [pytest.mark.slow]
        if mode not in (WITH_ALL if case == "all" else ("sgd", "adamw")):
            marks.append(pytest.mark.rare)
        yield pytest.param(case, mode, marks=marks)


QUICK = {("aws", "sgd"), ("rotation", "adamw"), ("lr-drop", "sgd")}
WITH_ALL = (
    "sgd",
    "unused branch",
    "manual",
    "accumulation",
    "finetuning",
    "param groups",
    "32-true",
)


def options_of(case: str) -> dict[str, Any]:
    """What a case sets of the model."""
    make_scheduler = CASES[case].make_scheduler
    return {} if make_scheduler is None else {"make_scheduler": make_scheduler}


@pytest.mark.parametrize(("case", "mode"), list(every_case_and_mode()))
def test_ends_where_the_cpu_ends(case, mode):
    options = options_of(case)
    here, _ = run(CASES[case].callbacks(), MODES[mode], **options)
    with Device() as device:
        there, _ = run(CASES[case].callbacks(), MODES[mode], **options, **on_accelerator())
    in_float32 = MODES[mode].get("dtype") is torch.float32
    # Of many small weights together, and of each by itself, sums are rounded differently.
    assert distance(weights_of(there), weights_of(here)) <= (1e-6 if in_float32 else 1e-12)
    assert not device.mixed


def test_the_device_has_numbers_and_tells_faults():
    with Device():
        there, here = torch.arange(6.0, device=DEVICE).view(2, 3), torch.arange(3, device="cpu")
        there[1].mul_(2)
        assert there.sum().item() == 3 + 24
        assert torch.tensor([1.0, 2.0], device=DEVICE).tolist() == [1, 2]
        assert there[:, [0, 2]].cpu().tolist() == [[0, 2], [6, 10]]
        with pytest.raises(RuntimeError, match="expected device"):
            there + here
        with pytest.raises(RuntimeError, match="in the same device"):
            torch.zeros(6, device=DEVICE).index_add_(0, here, there[0])


class Counts(L.Callback):
    """Lets the device count from one batch to another."""

    def __init__(self, device: Device, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.first:
            self.device.forget()
        if trainer.global_step == self.last:
            # The end of an epoch waits: vectors that were left alone are told then.
            assert trainer.current_epoch == 0
            self.waits, self.sent = dict(self.device.waits), dict(self.device.sent)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", list(CASES))
def test_the_host_waits_for_nothing_in_a_step(case):
    # Before that it does: a claim is tried before it is acted on.
    first = CLOSE_LOOKS + 2
    with Device() as device:
        counts = Counts(device, first, first + 6)
        run(
            [counts, *CASES[case].callbacks()],
            {"make_optimizer": sgd},
            **options_of(case),
            data=loader((first + 7) * BATCH),
            max_epochs=1,
            log_every_n_steps=3,
            **on_accelerator(),
        )
    assert set(counts.waits) <= {ARRIVES}
    assert not counts.sent


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.rare) for case in CASES if case != "all"] + ["all"],
)
@pytest.mark.slow
def test_nothing_waits_for_a_scaler_that_may_skip(case, monkeypatch):
    """A fused optimizer's flag lies on the device. torch has no fused kernel for this one, so its
    plain step is given the arguments of a fused one, and passes them over."""
    # Its package has no attribute of this name.
    module = import_module("torch.optim.sgd")
    plain_step = module._single_tensor_sgd

    def step(*arguments: Any, **options: Any) -> None:
        plain_step(*arguments, **{**options, "grad_scale": None, "found_inf": None})

    monkeypatch.setattr(module, "_single_tensor_sgd", step)

    def with_flag(device: Any) -> Any:
        def make(parameters: Any) -> torch.optim.Optimizer:
            optimizer = sgd(parameters, foreach=False)
            optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=device)
            optimizer.grad_scale = torch.ones((), dtype=torch.float32, device=device)
            return optimizer

        return make

    first = CLOSE_LOOKS + 2
    options = {
        **options_of(case),
        "data": loader((first + 7) * BATCH),
        "max_epochs": 1,
        "log_every_n_steps": 3,
    }
    here, _ = run(CASES[case].callbacks(), {"make_optimizer": with_flag("cpu")}, **options)
    with Device() as device:
        counts = Counts(device, first, first + 6)
        chosen = [counts, *CASES[case].callbacks()]
        mode = {"make_optimizer": with_flag(DEVICE)}
        there, _ = run(chosen, mode, **options, **on_accelerator())
    assert distance(weights_of(there), weights_of(here)) <= 1e-12
    assert set(counts.waits) <= {ARRIVES}
    assert not counts.sent


@pytest.mark.parametrize("per_vector", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_row_of_the_monitor_is_one_transfer(per_vector):
    rows = 10
    with Device() as device:
        monitor = NormDynamicsMonitor(1, tables=False, per_vector=per_vector)
        counts = Counts(device, 8, 8 + rows)
        there = make(make_optimizer=sgd)
        # The evidence for verdicts travels at the Trainer's own logging steps.
        settings = {"data": loader(20 * BATCH), "max_epochs": 1, "log_every_n_steps": 1000}
        fit(there, [counts, monitor], **settings, **on_accelerator())
    assert counts.waits == {ARRIVES: rows}
    alone = NormDynamicsMonitor(1, tables=False, per_vector=per_vector)
    fit(make(make_optimizer=sgd), [alone], **settings)
    assert len(monitor.history) == len(alone.history) == 20
    for got, expected in zip(monitor.history, alone.history, strict=True):
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
    if per_vector:
        name = "weight_norm/net.0.weight"
        for got, expected in zip(
            monitor.history.vectors(name), alone.history.vectors(name), strict=True
        ):
            assert got == pytest.approx(expected, rel=1e-6)


def test_inputs_are_gathered_on_the_device(monkeypatch):
    """Rows of them are chosen there, by a generator of the device's own."""
    made = []
    generator = torch.Generator

    def pretended(device: Any = "cpu") -> torch.Generator:
        made.append(torch.device(device))
        return generator()

    monkeypatch.setattr(torch, "Generator", pretended)
    with Device() as device:
        there = InputSpanMonitor()
        fit(make(make_optimizer=sgd), [there], **on_accelerator())
    assert DEVICE in made
    assert not device.mixed
    assert len(there.history)
