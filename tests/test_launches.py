"""How many kernels a step launches on a GPU, for any number of weights.

Counted without one: torch's operations at the dispatcher, and the launches of GPU programs that do
nothing here.
"""

from __future__ import annotations

from collections import Counter

import pytest
import strategies
import torch
from lightning.pytorch import Callback
from models import Net, fit_batches
from ranks import run_ranks
from strategies import STRATEGIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialBrake,
    RadialProjection,
    RotationControl,
    StepBracket,
    WeightDecay,
    WeightRescaling,
)
from lightning_normdyn.geometry import formulas, fusion, kernel_choice, triton_kernels
from lightning_normdyn.geometry.fusion import Number
from lightning_normdyn.geometry.kernel_choice import KernelPath
from lightning_normdyn.geometry.kernels import Kernels
from lightning_normdyn.geometry.pieces import Runs
from lightning_normdyn.geometry.reduction import Reduction
from lightning_normdyn.geometry.triton_kernels import TritonKernels
from lightning_normdyn.monitor.recording import Recording
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
        self.phase = ""
        self.compiled: dict[tuple, str] = {}
        """For each program and kind of arguments, the phase in which it is first asked for."""

    def late(self) -> set[tuple]:
        """What was compiled after the first step had begun to write."""
        return {(phase, *variant) for variant, phase in self.compiled.items() if phase != "RESOLVE"}

    def record(self, phase: str, action) -> None:
        self.phase = phase
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

    def program_of(self, text: str, name: str, numbers):
        return Program(self, "rule", name)


class Program:
    def __init__(self, counted: Counted, name: str, title: str = "") -> None:
        self.counted, self.name, self.title = counted, name, title

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.counted.launches.count(f"program {self.name}")


METHODS = (
    "sums", "products", "scale_", "add_scaled_", "scale_and_add_", "stretch_", "decay_shortened_",
    "add_up", "put_back",
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch) -> Counted:
    return counting(monkeypatch)


def counting(monkeypatch) -> Counted:
    """A fit in this process is counted from now on."""
    counted = Counted()
    monkeypatch.setattr(kernel_choice, "choose", lambda *_: KernelPath("triton", "counted"))
    monkeypatch.setattr(triton_kernels, "programs", lambda: counted)
    monkeypatch.setattr(TritonKernels, "formulas", {})

    def with_numbers_of_torch(name):
        program, work = getattr(TritonKernels, name), getattr(Kernels, name)

        def method(self, *arguments, **options):
            found = program(self, *arguments, **options)
            if TritonKernels.only_compiles:
                return found
            return counted.uncounted(work, self, *arguments, **options)

        return method

    compile_one = TritonKernels._compile

    def compiled(self, program, launch):
        _, arguments, constants = launch
        kinds = [getattr(argument, "dtype", None) for argument in arguments]
        variant = (program.name, program.title, *kinds, *map(str, constants))
        if not counted.launches.paused:
            counted.compiled.setdefault(variant, counted.phase)
        compile_one(self, program, launch)

    monkeypatch.setattr(TritonKernels, "_compile", compiled)
    for name in METHODS:
        monkeypatch.setattr(TritonKernels, name, with_numbers_of_torch(name))
    true_sums: dict[int, torch.Tensor] = {}
    slots_of, of_taken, totals = formulas._slots_of, formulas._of_taken, TritonKernels.totals

    def with_true_sums(kernels, sums):
        slots = slots_of(kernels, sums)
        true_sums[slots.data_ptr()] = counted.uncounted(sums.take, kernels)
        return slots

    to_send = TritonKernels.slots_to_send

    def with_true_message(self, how, operands, runs, room=0):
        slots, message = to_send(self, how, operands, runs, room)
        rows = counted.uncounted(Kernels.sums, self, how, operands)
        true_sums[slots.data_ptr()] = rows
        sent = counted.uncounted(runs.add_up, rows).flatten()
        counted.uncounted(message[room : room + len(sent)].copy_, sent)
        return slots, message

    def worked_out(formula, rows, arguments, into):
        plain = [each.value if isinstance(each, Number) else each for each in arguments]
        results = counted.uncounted(formula, *rows, *plain)
        for destination, result in zip(into, results, strict=False):
            if destination is not None:
                counted.uncounted(destination.copy_, result)
        return results

    def from_slots(kernels, formula, sums, arguments, into):
        slots = formulas._slots_of(kernels, sums)
        of_slots = formulas._of_step(formula) if sums.rates else formula
        kernels.rule(of_slots, slots, [*sums.rates, *arguments], [], from_slots=True)
        return worked_out(formula, true_sums[slots.data_ptr()].unbind(), arguments, into)

    def of_taken_sums(kernels, formula, taken, arguments, into):
        of_taken(kernels, formula, taken, arguments, [])
        rows = ()
        if taken is not None:
            rows = counted.uncounted(complete, taken).unbind()
        return worked_out(formula, rows, arguments, into)

    def complete(taken):
        rows = true_sums.get(taken.values.data_ptr(), taken.values)
        if taken.completed is None:
            return rows
        place = taken.message.place
        return torch.where(place >= 0, taken.completed[:, place.clamp(min=0)], rows)

    def true_totals(kernels, formula, sums, arguments, starts, **kind):
        found = totals(kernels, formula, sums, arguments, starts, **kind)
        slots_or_sums = true_sums.get(sums.data_ptr()) if kind.get("from_slots", True) else sums
        rows = worked_out(formula, slots_or_sums.unbind(), arguments, [])

        def add_up():
            weight_of = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
            runs = Runs(slice(None), weight_of, len(starts) - 1)
            of_weights = runs.add_up(torch.stack(rows).double())
            return found.copy_(found + of_weights if kind.get("adds") else of_weights)

        return counted.uncounted(add_up)

    monkeypatch.setattr(formulas, "_slots_of", with_true_sums)
    monkeypatch.setattr(formulas, "_from_slots", from_slots)
    monkeypatch.setattr(formulas, "_of_taken", of_taken_sums)
    monkeypatch.setattr(TritonKernels, "totals", true_totals)
    monkeypatch.setattr(TritonKernels, "slots_to_send", with_true_message)
    # As on a GPU, where a loop over weights would be a kernel for each.
    monkeypatch.setattr(
        Reduction, "per_weight", lambda self, values: self._add_up(values, self._all_runs)
    )
    # A formula's operations are noted once, on tensors without numbers.
    write = fusion.write_source
    monkeypatch.setattr(
        fusion, "write_source", lambda *given, **kind: counted.uncounted(write, *given, **kind)
    )
    # The host's copies go by themselves, beside the kernels.
    copied = HostCopy.__init__
    monkeypatch.setattr(
        HostCopy, "__init__", lambda self, tensor: counted.uncounted(copied, self, tensor)
    )
    # A logging step ends behind the update, where its sums are sent to the host.
    send = Recording._send

    def counting_send(self, results):
        sent = []
        counted.record("SEND", lambda: sent.append(send(self, results)))
        return sent[0]

    monkeypatch.setattr(Recording, "_send", counting_send)
    add, updated = StepBracket.add, Step.mark_updated

    def counting_add(self, phase, handler, *where, **how):
        def counting(step):
            counted.record(phase.name, lambda: handler(step))

        return add(self, phase, counting, *where, **how)

    monkeypatch.setattr(StepBracket, "add", counting_add)
    monkeypatch.setattr(
        Step, "mark_updated", lambda self: counted.record("UPDATED", lambda: updated(self))
    )
    return counted


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def layers(number: int) -> nn.Sequential:
    found: list[nn.Module] = []
    for _ in range(number):
        found += [nn.Linear(8, 8, bias=False), nn.LayerNorm(8)]
    return nn.Sequential(*found, nn.Linear(8, 2))


class Drop(Callback):
    """A learning rate that falls before the 19th step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == 18:
            trainer.optimizers[0].param_groups[0]["lr"] /= 10


class Lacks(Callback):
    """One weight without a gradient from the 10th step on."""

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step >= 9:
            next(module.parameters()).grad = None


def launches(
    counted: Counted, callback, optimizer, number: int, dtype=torch.float32, others=()
) -> int:
    """Of the 19th step, when no more evidence for claims is gathered; without the snapshot, which is
    one call of torch for all weights."""
    torch.manual_seed(0)
    module = Net(optimizer, layers(number), dtype=dtype)
    others = [*others, Drop()] if isinstance(callback, LRDropRescaling) else others
    batch = torch.randn(4, 8, dtype=dtype), torch.tensor([0, 1, 0, 1])
    fit_batches(module, [callback, *others], [batch] * 20)
    return of_step(counted)


def of_step(counted: Counted) -> int:
    """Launches of the 19th step, without collectives."""
    total: Counter[str] = Counter()
    for steps in counted.by_phase.values():
        # Where nothing was sent in some steps, the last one sent is of the end of the fit.
        total.update(steps[18] if len(steps) > 18 else {})
    return sum(total.values()) - total["allreduce_"]


# Sums, a formula, a write.
BUDGETS = {
    "aws": (lambda: AdaptiveWeightShrink(0.01), sgd, 3),
    "aws-std": (lambda: AdaptiveWeightShrink(0.01, statistic="std"), sgd, 3),
    "projection, told by a copy": (lambda: RadialProjection(), adamw, 3),
    "projection, told by the buffer": (lambda: RadialProjection(), sgd, 3),
    "wrs": (lambda: WeightRescaling(1), sgd, 5),
    "lr drop": (lambda: LRDropRescaling(), sgd, 6),
    "decay": (lambda: WeightDecay(), adamw, 1),
    "decay-cautious": (lambda: WeightDecay(cautious=True), adamw, 1),
    "brake": (lambda: RadialBrake(0.5), adamw, 3),
    "rotation": (lambda: RotationControl(0.01, target_norm=1.0), adamw, 3),
    "rotation, smoothed": (lambda: RotationControl("lr", smoothing=0.9), adamw, 3),
    "rotation, free": (lambda: RotationControl(0.01, norm="free"), adamw, 3),
    "idle monitor": (lambda: NormDynamicsMonitor(50), sgd, 0),
    "projection-cosine": (lambda: RadialProjection(gate="cosine"), adamw, 6),
    # Two sums of everything, each with its completion; one formula; sums per weight, twice.
    "monitor": (lambda: NormDynamicsMonitor(1), sgd, 12),
}


QUICK = ("aws", "projection, told by the buffer", "monitor")


MANY = ("aws", "projection, told by a copy", "decay", "monitor")


def cases():
    for case in BUDGETS:
        for number in (4, 50, 560):
            marks = [] if case in QUICK and number == 4 else [pytest.mark.slow]
            # A fit of so many layers takes seconds, and the kernels of other rules are those of
            # these.
            if number == 560 and case not in MANY:
                marks.append(pytest.mark.rare)
            yield pytest.param(case, number, marks=marks)


@pytest.mark.parametrize(("case", "number"), list(cases()))
def test_launches_do_not_depend_on_the_number_of_weights(counted, case, number):
    callback, optimizer, budget = BUDGETS[case]
    assert launches(counted, callback(), optimizer, number) <= budget, counted.by_phase


# A monitor that is idle now is the one that logs.
AHEAD = [case for case in BUDGETS if case != "idle monitor"]


@pytest.mark.parametrize(
    "case",
    [case if case == "aws" else pytest.param(case, marks=pytest.mark.slow) for case in AHEAD],
)
def test_programs_are_compiled_before_the_first_write(counted, case):
    """Also of what comes later in a fit: a drop, a step that a buffer tells."""
    callback, optimizer, _ = BUDGETS[case]
    launches(counted, callback(), optimizer, 4)
    assert counted.compiled
    assert not counted.late()


@pytest.mark.parametrize(
    "case",
    [
        "aws",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("decay", "rotation", "monitor")),
    ],
)
def test_a_gradient_that_is_missing_later_takes_no_other_program(counted, case):
    callback, optimizer, _ = BUDGETS[case]
    launches(counted, callback(), optimizer, 4, others=[Lacks()])
    assert not counted.late()


@pytest.mark.slow
def test_statistics_that_follow_weights_are_compiled_ahead(counted):
    layer = nn.Linear(8, 8), nn.BatchNorm1d(8)
    module = Net(sgd, nn.Sequential(*layer, nn.Linear(8, 2)), dtype=torch.float32)
    batch = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    fit_batches(module, [WeightRescaling(2)], [batch] * 4)
    assert any(variant[0] == "write" for variant in counted.compiled)
    assert not counted.late()


@pytest.mark.slow
def test_a_replay_is_compiled_ahead(counted, tmp_path):
    monitor = NormDynamicsMonitor(1, per_vector=True)
    launches(counted, monitor, plain_sgd, 4)
    monitor.history.save(tmp_path / "history.npz")
    assert not counted.late()
    counted.compiled.clear()
    launches(counted, EffectiveLRReplay(tmp_path / "history.npz"), plain_sgd, 4)
    assert counted.compiled
    assert not counted.late()


@pytest.mark.slow
def test_weights_of_16_bits_shrink_in_as_many_launches_whatever_their_number(counted):
    assert launches(counted, AdaptiveWeightShrink(0.01), sgd, 4, torch.bfloat16) <= 9


# What is added to `BUDGETS` where vectors lie on several ranks in pieces, beside collectives. What is
# sent is written by the launch that takes the sums; a sum that is taken by itself is added up for
# the message and read from it.
SHARDS = {
    "FSDP2": {"monitor": 4},
    # Some weights are cut and others lie on one rank: for the gates the latter are summarized before
    # the collective, the former after it.
    "TP": {"projection-cosine": 1, "monitor": 4},
    "FSDP1 FULL_SHARD, one unit": {"projection-cosine": 1, "monitor": 4},
}
SHARDED = (
    "aws",
    "wrs",
    "brake",
    "rotation",
    "projection, told by a copy",
    "projection-cosine",
    "monitor",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDS)
def test_launches_under_shards(name):
    """Two ranks; both launch the same, and compile it before the first of them writes."""

    def count_all() -> dict[str, tuple[int, set]]:
        found = {}
        with pytest.MonkeyPatch.context() as patches:
            counted = counting(patches)
            for case in SHARDED:
                callback, optimizer, _ = BUDGETS[case]
                counted.by_phase.clear()
                counted.compiled.clear()
                strategies.fit(
                    STRATEGIES[name],
                    lambda callback=callback: [callback()],
                    dtype=torch.float32,
                    optimizer=lambda module, make=optimizer: make(module.parameters()),
                    steps=20,
                )
                found[case] = of_step(counted), counted.late()
        return found

    by_rank = run_ranks(count_all)
    for found in by_rank.values():
        for case, (launched, late) in found.items():
            assert not late, (case, late)
            assert launched <= BUDGETS[case][2] + SHARDS[name].get(case, 0), (case, found)
