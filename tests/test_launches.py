"""How many kernels a step launches on a GPU, for any number of weights.

Counted without one: torch's operations at the dispatcher, and the launches of GPU programs that do
nothing here.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models import Net, fit_batches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    RadialBrake,
    RadialProjection,
    RotationControl,
    StepBracket,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.geometry import formulas, kernel_choice, triton_kernels
from lightning_normdyn.geometry.kernel_choice import KernelPath
from lightning_normdyn.geometry.kernels import Kernels
from lightning_normdyn.geometry.reduction import Reduction
from lightning_normdyn.geometry.triton_kernels import TritonKernels
from lightning_normdyn.optimizers.step import HostCopy, Step

# They make a view, or memory without numbers: nothing runs on the device.
NO_KERNEL = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach",
    "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty", "permute",
    "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what would run on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.paused = False

    def count(self, name: str) -> None:
        if not self.paused and name not in NO_KERNEL:
            self.names[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Counted:
    """All launches of a fit by phase and step. Stands in the place of the module of programs, which
    only count their launches; torch does the work, uncounted."""

    def __init__(self) -> None:
        self.by_phase: dict[str, list[Counter[str]]] = {}
        self.launches = Launches()

    def record(self, phase: str, action) -> None:
        with Launches() as self.launches:
            action()
        self.by_phase.setdefault(phase, []).append(self.launches.names)

    def uncounted(self, action, *arguments, **options):
        was, self.launches.paused = self.launches.paused, True
        result = action(*arguments, **options)
        self.launches.paused = was
        return result

    class tl:
        float16 = bfloat16 = float32 = float64 = None

    def __getattr__(self, name: str):
        return Program(self, name)

    def program_of(self, text: str, name: str):
        return Program(self, "rule")


class Program:
    def __init__(self, counted: Counted, name: str) -> None:
        self.counted, self.name = counted, name

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.counted.launches.count(f"program {self.name}")


METHODS = (
    "sums", "products", "scale_", "add_scaled_", "scale_and_add_", "stretch_", "decay_shortened_",
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(kernel_choice, "choose", lambda *_: KernelPath("triton", "counted"))
    monkeypatch.setattr(triton_kernels, "programs", lambda: counted)
    monkeypatch.setattr(TritonKernels, "formulas", {})

    def with_numbers_of_torch(name):
        program, work = getattr(TritonKernels, name), getattr(Kernels, name)

        def method(self, *arguments, **options):
            program(self, *arguments, **options)
            return counted.uncounted(work, self, *arguments, **options)

        return method

    for name in METHODS:
        monkeypatch.setattr(TritonKernels, name, with_numbers_of_torch(name))
    fused = formulas._from_slots

    def from_slots(kernels, formula, sums, arguments, into):
        fused(kernels, formula, sums, arguments, into)
        rows = ()
        if sums is not None:
            rows = counted.uncounted(sums.take, kernels).unbind()
        results = counted.uncounted(formula, *rows, *arguments)
        for destination, result in zip(into, results, strict=False):
            if destination is not None:
                counted.uncounted(destination.copy_, result)
        return results

    monkeypatch.setattr(formulas, "_from_slots", from_slots)
    # As on a GPU, where a loop over weights would be a kernel for each.
    monkeypatch.setattr(
        Reduction, "per_weight", lambda self, values: self._spoken(values, slice(None))
    )
    # The host's copies go by themselves, beside the kernels.
    copied = HostCopy.__init__
    monkeypatch.setattr(
        HostCopy, "__init__", lambda self, tensor: counted.uncounted(copied, self, tensor)
    )
    add, updated = StepBracket.add, Step.mark_updated

    def counting_add(self, phase, handler, order="", rank=0):
        def counting(step):
            counted.record(phase.name, lambda: handler(step))

        return add(self, phase, counting, order, rank)

    monkeypatch.setattr(StepBracket, "add", counting_add)
    monkeypatch.setattr(
        Step, "mark_updated", lambda self: counted.record("UPDATED", lambda: updated(self))
    )
    return counted


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def layers(number: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for _ in range(number):
        found += [nn.Linear(8, 8, bias=False), nn.LayerNorm(8)]
    return nn.Sequential(*found, nn.Linear(8, 2))


def launches(counted: Counted, callback, optimizer, number: int, dtype=torch.float32) -> int:
    """Of the 19th step, when no more evidence for claims is gathered; without the snapshot, which is
    one call of torch for all weights."""
    torch.manual_seed(0)
    module = Net(optimizer, layers(number), dtype=dtype)
    batch = torch.randn(4, 8, dtype=dtype), torch.tensor([0, 1, 0, 1])
    fit_batches(module, [callback], [batch] * 20)
    return sum(sum(steps[18].values()) for steps in counted.by_phase.values())


# Sums, a formula, a write.
BUDGETS = {
    "aws": (lambda: AdaptiveWeightShrink(0.01), sgd, 3),
    "aws-std": (lambda: AdaptiveWeightShrink(0.01, statistic="std"), sgd, 3),
    "projection, told by a copy": (lambda: RadialProjection(), adamw, 3),
    "projection, told by the buffer": (lambda: RadialProjection(), sgd, 3),
    "wrs": (lambda: WeightRescaling(1), sgd, 5),
    "decay": (lambda: WeightDecay(), adamw, 1),
    "decay-cautious": (lambda: WeightDecay(cautious=True), adamw, 1),
    "brake": (lambda: RadialBrake(0.5), adamw, 3),
    "rotation": (lambda: RotationControl(0.01, target_norm=1.0), adamw, 3),
    "rotation, smoothed": (lambda: RotationControl("lr", smoothing=0.9), adamw, 3),
    "rotation, free": (lambda: RotationControl(0.01, norm="free"), adamw, 4),
    "idle monitor": (lambda: NormDynamicsMonitor(50), sgd, 0),
    # Their arithmetic on numbers per vector is not fused yet.
    "projection-cosine": (lambda: RadialProjection(gate="cosine"), adamw, 6),
    "monitor": (lambda: NormDynamicsMonitor(1), sgd, 100),
}


QUICK = ("aws", "projection, told by the buffer", "brake")


def cases():
    for case in BUDGETS:
        for number in (4, 50, 560):
            is_quick = case in QUICK and number == 4
            yield pytest.param(case, number, marks=[] if is_quick else [pytest.mark.slow])


@pytest.mark.parametrize(("case", "number"), list(cases()))
def test_launches_do_not_depend_on_the_number_of_weights(counted, case, number):
    callback, optimizer, budget = BUDGETS[case]
    assert launches(counted, callback(), optimizer, number) <= budget, counted.by_phase


@pytest.mark.slow
def test_weights_of_16_bits_shrink_in_as_many_launches_whatever_their_number(counted):
    assert launches(counted, AdaptiveWeightShrink(0.01), sgd, 4, torch.bfloat16) <= 10
