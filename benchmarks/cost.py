"""What every callback costs: time, operations, host synchronizations, collectives and memory,
beside floors and peers.

    python benchmarks/cost.py                    # everything, writes benchmarks/cost.md
    python benchmarks/cost.py --only resnet50    # one section, the others stay as they are
    python benchmarks/cost.py --quick            # small shapes, a minute, writes nothing

Milliseconds belong to one machine and one hour; ratios taken in one process, turn by turn, do not.
So every case of a table runs once per round, in changing order, and a table shows medians over
rounds with the middle half of the rounds as spread.

A *floor* is the least that the same bytes can cost: the fastest torch primitive that reads or
writes them, on the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import socket
import statistics
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynCallback,
    RadialProjection,
    StepBracket,
    WeightRescaling,
)

Shapes = list[tuple[int, ...]]
NEVER = 10**9

# Batches of a fit before anything is measured: in the first ones, claims of scale invariance are
# held against every gradient, which is no part of an ordinary step.
FIRST_BATCHES = 8


# ------------------------------------------------------------------------------------------- shapes


def resnet50() -> Shapes:
    """All parameters of a ResNet-50 for ImageNet: 161 tensors, 25.6 million entries."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit(dim: int = 768, depth: int = 12) -> Shapes:
    """All parameters of a ViT (ViT-B: 86 million entries)."""
    shapes: Shapes = [(dim, 3, 16, 16), (dim,), (197, dim)]
    for _ in range(depth):
        shapes += [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
        shapes += [(dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [*shapes, (dim,), (dim,), (1000, dim), (1000,)]


def transformer(blocks: int, dim: int = 2048) -> Shapes:
    """Blocks of a 1B-class language model: width 2048, gated feed-forward of 5632, no biases (51
    million entries per block)."""
    hidden = 11 * dim // 4
    block: Shapes = [
        (dim,),
        (dim, dim),
        (dim, dim),
        (dim, dim),
        (dim, dim),
        (dim,),
        (hidden, dim),
        (hidden, dim),
        (dim, hidden),
    ]
    return block * blocks


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, each convolution followed by BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual_net(channels: int, width: int, blocks: Sequence[tuple[int, int]]) -> nn.Module:
    """A stem, blocks of (width, stride), and a linear head of 10 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for outputs, stride in blocks:
        layers.append(Block(width, outputs, stride))
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def resnet18(width: int = 64) -> nn.Module:
    """The ResNet-18 that papers train on CIFAR: 11.2 million parameters, 0.56 GFLOP per image."""
    return residual_net(
        3, width, [(width * 2**i, stride) for i in range(4) for stride in (1 if i == 0 else 2, 1)]
    )


def digits_net(width: int = 12) -> nn.Module:
    """The network of examples/digits_resnet.py, on images of 8 x 8."""
    return residual_net(1, width, [(width, 1), (2 * width, 2), (4 * width, 2)])


# ------------------------------------------------------------------------------ a fit, batch by batch


class Weights(nn.Module):
    """Parameters of given shapes, each row of a matrix scale-invariant: the loss sees the direction
    of each row only.

    Its gradients are so small that a thousand steps leave rows and gradients orthogonal: what is
    measured with the same gradients in every step stays a fit of scale-invariant weights.
    """

    def __init__(self, shapes: Shapes, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(0.05)

        self.layers = nn.ParameterList([nn.Parameter(normal(shape)) for shape in shapes])

    def forward(self, _: Any = None) -> Tensor:
        losses = []
        for weight in self.layers:
            if weight.ndim < 2:
                losses.append(weight.sum())
                continue
            rows = weight.flatten(1)
            # A direction for all rows, of any length: broadcast, it takes no memory.
            target = torch.linspace(-1.0, 1.0, rows.shape[1], device=rows.device)
            losses.append((rows @ target / rows.norm(dim=1)).sum())
        return 1e-5 * torch.stack(losses).sum()


def loss_of_weights(net: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = net(batch)
    return loss


def loss_of_images(net: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y)


Parallelize = Callable[[nn.Module, Any], None]
"""Splits a network over the ranks of the mesh that a strategy has made."""


def fully_sharded(net: nn.Module, mesh: Any) -> None:
    """As FSDP2 does it."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh["data_parallel"])


def as_ranks(rank: int, port: int) -> None:
    """Let this process be one of two, as a launcher sets them: then a strategy starts none."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
    )


class Fitted(L.LightningModule):
    """A network and its optimizer in a Trainer.

    Args:
        net: the network.
        optimizer: makes the optimizer of its parameters.
        loss: of the network on a batch.
        fit: what measures.
        parallelize: splits its parameters over the ranks.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        loss: Callable[[nn.Module, Any], Tensor],
        watch: Stopwatch,
        parallelize: Parallelize | None,
    ) -> None:
        super().__init__()
        # The step can then be timed apart from the backward pass.
        self.automatic_optimization = False
        self.net, self.optimizer, self.loss = net, optimizer, loss
        self.watch, self.parallelize = watch, parallelize
        self.goes_backward = True

    def configure_model(self) -> None:
        if self.parallelize is not None:
            self.parallelize(self.net, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.net.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        start = time.perf_counter()
        if self.goes_backward:
            optimizer.zero_grad()
            self.manual_backward(self.loss(self.net, batch))
        with self.watch.around():
            optimizer.step()
            wait(self.device.type)
        self.watch.whole += time.perf_counter() - start


class Stopwatch:
    """Times one batch.

    Attributes:
        whole: seconds of the training step and of the callbacks' hooks outside of it.
        ours: of it, seconds in callbacks.
        around: a context that is entered around the optimizer's step and around the hooks before
            and after it.
    """

    def __init__(self) -> None:
        self.around: Callable[[], Any] = contextlib.nullcontext
        self.whole = self.ours = 0.0

    def begin(self) -> None:
        self.whole = 0.0
        # Until the batch ends: what brackets spend from here on.
        self.ours = -Fit.seconds_inside

    def end(self) -> None:
        self.ours += Fit.seconds_inside


class Ahead(L.Callback):
    """Stands before the measured callbacks, and `Behind` after them: Lightning calls hooks in the
    order of its list."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.started = 0.0
        self.contexts = contextlib.ExitStack()

    def start(self, *, inside: bool) -> None:
        if not inside:
            self.contexts.enter_context(self.watch.around())
        self.started = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        self.start(inside=False)

    def on_before_backward(self, *args: Any) -> None:
        self.start(inside=True)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.start(inside=True)

    def on_train_batch_end(self, *args: Any) -> None:
        self.start(inside=False)


class Behind(L.Callback):
    def __init__(self, ahead: Ahead) -> None:
        self.ahead = ahead

    def stop(self, *, inside: bool) -> None:
        watch, seconds = self.ahead.watch, time.perf_counter() - self.ahead.started
        watch.ours += seconds
        if not inside:
            watch.whole += seconds
            self.ahead.contexts.close()

    def on_train_batch_start(self, *args: Any) -> None:
        self.stop(inside=False)

    def on_before_backward(self, *args: Any) -> None:
        self.stop(inside=True)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.stop(inside=True)

    def on_train_batch_end(self, *args: Any) -> None:
        self.stop(inside=False)


class Paused(Exception):
    """Raised in place of the first batch."""


class PausedTrainer(L.Trainer):
    """A Trainer that stops in front of every batch, so that many fits can take turns.

    Everything else is Lightning's own: what callbacks read of it is what they read in a real fit.
    """

    def start(self, module: L.LightningModule, batch: Any) -> None:
        """All that `fit` does before the first batch."""
        loop: Any = self.fit_loop.epoch_loop

        def pause(_: Any) -> None:
            raise Paused

        loop.advance = pause
        self.state.fn, self.state.status, self.training = (
            TrainerFn.FITTING,
            TrainerStatus.RUNNING,
            True,
        )
        with contextlib.suppress(Paused):
            self._fit_impl(module, train_dataloaders=itertools.repeat(batch))
        del loop.advance

    def run_batch(self) -> None:
        """One batch, from its first hook to its last."""
        loop, fetcher = self.fit_loop.epoch_loop, self.fit_loop._data_fetcher
        loop.advance(fetcher)
        loop.on_advance_end(fetcher)


class Fit:
    """Callbacks in a Trainer that trains a network, one batch at a time.

    Args:
        net: the network.
        optimizer: makes the optimizer of its parameters.
        callbacks: of the suite.
        loss: of the network on a batch.
        batch: what every batch is.
        parallelize: splits its parameters over the ranks.
        options: of the Trainer.
    """

    seconds_inside = 0.0
    """What all brackets have spent around optimizer steps so far, apart from the steps
    themselves."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        callbacks: Sequence[L.Callback] = (),
        loss: Callable[[nn.Module, Any], Tensor] = loss_of_weights,
        batch: Any = 0,
        parallelize: Parallelize | None = None,
        **options: Any,
    ) -> None:
        self.callbacks, self.watch = list(callbacks), Stopwatch()
        self.module = Fitted(net, optimizer, loss, self.watch, parallelize)
        ahead = Ahead(self.watch)
        on_cpu = next(net.parameters()).device.type == "cpu"
        self.trainer = PausedTrainer(
            accelerator="cpu" if on_cpu else "gpu",
            callbacks=[ahead, *self.callbacks, Behind(ahead)],
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"devices": 1, **options},
        )
        # Tables of targets are not of interest here.
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.start(self.module, batch)
            # The first batch resolves targets, and the monitor always logs it.
            self.run_batch()

    def run_batch(self) -> None:
        """One batch; what it took stands in `watch`."""
        self.watch.begin()
        self.trainer.run_batch()
        self.watch.end()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Batches without the callbacks, in the same fit: another one would have its objects
        elsewhere in memory, which alone makes a step of many layers some percent faster or
        slower."""
        trainer: Any = self.trainer
        (optimizer,) = trainer.optimizers
        callbacks = trainer.callbacks
        hooks = {
            name: getattr(optimizer, name)
            for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        }
        trainer.callbacks = [callbacks[0], callbacks[-1]]
        for name in hooks:
            setattr(optimizer, name, OrderedDict())
        try:
            yield
        finally:
            trainer.callbacks = callbacks
            for name, registered in hooks.items():
                setattr(optimizer, name, registered)

    def settle(self) -> None:
        """Leave behind what only the first batches of a fit cost."""
        for _ in range(FIRST_BATCHES - 1):
            self.run_batch()

    def keep_gradients(self, gradients: Sequence[Tensor | None] | None = None) -> None:
        """From now on a batch is an optimizer step, without a forward and backward pass.

        Args:
            gradients: of all parameters; None: those of the last batch.
        """
        self.module.goes_backward = False
        if gradients is not None:
            for weight, gradient in zip(self.module.net.parameters(), gradients, strict=True):
                weight.grad = gradient


def time_brackets(device: str) -> None:
    """Have brackets add up what they spend, from now on."""

    def timed(original: Any) -> Any:
        def call(*args: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            try:
                return original(*args)
            finally:
                wait(device)
                Fit.seconds_inside += time.perf_counter() - start

        return call

    StepBracket._ready = timed(StepBracket._ready)  # type: ignore[method-assign]
    StepBracket._post = timed(StepBracket._post)  # type: ignore[method-assign]


def sgd(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, **options)


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    # Its steps do not shrink with the gradient, and must not turn weights away from it.
    return torch.optim.AdamW(parameters, lr=1e-7, weight_decay=1e-2, **options)


def sgd_fused(parameters: Any) -> torch.optim.Optimizer:
    return sgd(parameters, fused=True)


def sgd_scaled(parameters: Any) -> torch.optim.Optimizer:
    """As a GradScaler leaves it: the kernel divides by the scale, and decides by itself whether it
    skips the step."""
    optimizer = sgd(parameters, fused=True)
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.grad_scale, optimizer.found_inf = (
        torch.ones((), device=device),
        torch.zeros((), device=device),
    )  # type: ignore[attr-defined]
    return optimizer


def adamw_fused(parameters: Any) -> torch.optim.Optimizer:
    return adamw(parameters, fused=True)


def monitor(every: int) -> NormDynamicsMonitor:
    return NormDynamicsMonitor(every, tables=False)


def suite(log_every: int) -> list[NormDynCallback]:
    """What acts together in an ordinary step: shrink, projection, a rescale that is not due, the
    monitor."""
    return [
        AdaptiveWeightShrink(1e-3),
        RadialProjection(),
        WeightRescaling(NEVER),
        monitor(log_every),
    ]


# ---------------------------------------------------------------------------------------- measuring


class Counter(TorchDispatchMode):
    """Counts what the dispatcher sees: operations (views and bare allocations left out) and waits
    for the device."""

    FREE = frozenset(
        [
            "detach",
            "alias",
            "view",
            "_unsafe_view",
            "reshape",
            "expand",
            "slice",
            "select",
            "split",
            "split_with_sizes",
            "unsafe_split",
            "as_strided",
            "permute",
            "transpose",
            "t",
            "unsqueeze",
            "squeeze",
            "unfold",
            "unbind",
            "lift_fresh",
            "narrow",
            "unflatten",
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
            "_reshape_alias",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            self.waits += 1
        elif name not in self.FREE:
            self.operations += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count, also the transfers that leave no trace in the dispatcher on a CPU but would wait for a
    GPU."""
    with Counter() as counter, contextlib.ExitStack() as undo:
        for name in ("tolist", "numpy"):
            original = getattr(Tensor, name)

            def call(tensor: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                counter.waits += 1
                return original(tensor, *args, **kwargs)

            setattr(Tensor, name, call)
            undo.callback(setattr, Tensor, name, original)
        yield counter


def peak_memory(make: Callable[[], Callable[[], Any]], device: str) -> int:
    """Most bytes of tensors that were alive at once while something ran three times, with what was
    left of building it."""
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        call = make()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            call()
        return torch.cuda.max_memory_allocated() - before
    mark = "built"
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call = make()
        with torch.profiler.record_function(mark):
            for _ in range(3):
                call()
    alive = peak = 0
    is_built = False
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        is_built = is_built or event.name() == mark
        if event.name() == "[memory]":
            alive += event.nbytes()
            if is_built:
                peak = max(peak, alive)
    assert is_built, "the profiler has lost the mark"
    return peak


@dataclass
class Case:
    """Something that is timed, turn by turn with others.

    Args:
        name: in the table.
        call: one step, or one call of a primitive.
        fit: whose step it is, if callbacks are at work.
    """

    name: str
    call: Callable[[], Any]
    fit: Fit | None = None
    times: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    operations: int = 0
    waits: int = 0


def measure(cases: Sequence[Case], rounds: int, device: str, warmup: int = 2) -> dict[str, Case]:
    """Run all cases once per round, in changing order; then count what one call does."""
    order, shuffle = list(cases), random.Random(0).shuffle
    for turn in range(rounds + warmup):
        shuffle(order)
        for case in order:
            wait(device)
            start = time.perf_counter()
            case.call()
            wait(device)
            seconds = time.perf_counter() - start
            if turn >= warmup:
                case.times.append(case.fit.watch.whole if case.fit else seconds)
                case.ours.append(case.fit.watch.ours if case.fit else seconds)
    for case in cases:
        with counting() as counter:
            case.call()
        case.operations, case.waits = counter.operations, counter.waits
    return {case.name: case for case in cases}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def milliseconds(times: Sequence[float]) -> str:
    """Median and the middle half of the rounds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 2 else [min(times), 0, max(times)]
    return (
        f"{1e3 * statistics.median(times):.3g} ({1e3 * quartiles[0]:.3g}-{1e3 * quartiles[2]:.3g})"
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"### {title}", ""] if title else []
    lines += ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


@dataclass
class Bar:
    """A figure and what it must not exceed."""

    text: str
    limit: float
    found: float
    reason: str = ""

    def row(self) -> list[str]:
        held = self.found <= self.limit
        return [
            self.text,
            f"{self.limit:g}",
            f"{self.found:.3g}",
            "held" if held else f"missed{': ' + self.reason if self.reason else ''}",
        ]


# ------------------------------------------------------------------------ one step, on given shapes


class Steps:
    """All callbacks, floors and peers on the same shapes.

    Args:
        shapes: of all parameters.
        device: where.
        everything: peers and the less frequent cases too.
    """

    def __init__(self, shapes: Shapes, device: str, everything: bool = True) -> None:
        self.shapes, self.device, self.everything = shapes, device, everything
        some = Weights(shapes, device)
        some().backward()
        # All cases start at the same weights, so they can share what takes as much memory.
        self.gradients = [w.grad for w in some.layers]
        self.matrices = [w.detach() for w in some.layers if w.ndim > 1]
        self.targeted = sum(w.numel() * w.element_size() for w in self.matrices)
        self.cases: list[Case] = []
        self.builders: dict[str, Callable[[], Any]] = {}

    def weights(self) -> Weights:
        """For what no Trainer trains."""
        weights = Weights(self.shapes, self.device)
        for weight, gradient in zip(weights.layers, self.gradients, strict=True):
            weight.grad = gradient
        return weights

    def add(
        self,
        name: str,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        callbacks: Callable[[], Sequence[NormDynCallback]] = tuple,
    ) -> None:
        """An optimizer step with callbacks around it."""

        def build() -> Fit:
            fit = Fit(Weights(self.shapes, self.device), optimizer, callbacks())
            for callback in fit.callbacks:
                targets = sum(len(plan.targets) for plan in callback.plans.values())
                assert targets == len(self.matrices), f"{name} acts on {targets} weights"
            fit.keep_gradients(self.gradients)
            fit.settle()
            return fit

        fit = build()
        self.cases.append(Case(name, fit.run_batch, fit))
        self.builders[name] = lambda: build().run_batch

    def add_floors(self) -> None:
        """The fastest primitives over the same bytes."""
        w, copies = self.matrices, [m.clone() for m in self.matrices]
        for name, call in {
            "floor: norm": lambda: torch._foreach_norm(w),
            "floor: mul": lambda: torch._foreach_mul_(w, 1.0),
            "floor: copy": lambda: torch._foreach_copy_(copies, w),
            "floor: norm, mul": lambda: (torch._foreach_norm(w), torch._foreach_mul_(w, 1.0)),
            "floor: norms of both": lambda: (torch._foreach_norm(w), torch._foreach_norm(copies)),
        }.items():
            self.cases.append(Case(name, call))

    def add_suite(self) -> None:
        """The callbacks."""
        self.add("SGD fused", sgd_fused)
        self.add("SGD foreach", lambda p: sgd(p, foreach=True))
        self.add("AdamW fused", adamw_fused)
        self.add("AWS (norm)", sgd_fused, lambda: [AdaptiveWeightShrink(1e-3, statistic="norm")])
        self.add("AWS (std)", sgd_fused, lambda: [AdaptiveWeightShrink(1e-3, statistic="std")])
        self.add("RadialProjection on SGD", sgd_fused, lambda: [RadialProjection()])
        self.add("RadialProjection on AdamW", adamw_fused, lambda: [RadialProjection()])
        self.add("monitor, idle", sgd_fused, lambda: [monitor(NEVER)])
        self.add("monitor, logging", sgd_fused, lambda: [monitor(1)])
        self.add("WRS, idle", sgd_fused, lambda: [WeightRescaling(NEVER)])
        self.add("suite, idle", sgd_fused, lambda: suite(NEVER))
        if self.everything:
            self.add("SGD fused, scaled", sgd_scaled)
            self.add("monitor, idle, scaled", sgd_scaled, lambda: [monitor(NEVER)])
            self.add("WRS, idle, scaled", sgd_scaled, lambda: [WeightRescaling(NEVER)])
            self.add("AdamW foreach", lambda p: adamw(p, foreach=True))
            self.add(
                "RadialProjection, cosine gate",
                sgd_fused,
                lambda: [RadialProjection(gate="cosine")],
            )
            self.add("WRS, rescaling", sgd_fused, lambda: [WeightRescaling(1)])
            self.add(
                "LRDropRescaling, no drop", sgd_fused, lambda: [LRDropRescaling(exponent=0.25)]
            )
            self.add("suite, logging", sgd_fused, lambda: suite(1))

    def add_optimizers(self) -> None:
        """Optimizers of other packages that project."""
        for package, names in (
            ("adamp", ("SGDP", "AdamP")),
            ("pytorch_optimizer", ("SGDP", "AdamP")),
        ):
            try:
                module = __import__(package)
            except ImportError:
                continue
            for name in names:
                options: dict[str, Any] = (
                    {"lr": 1e-3, "momentum": 0.9} if name == "SGDP" else {"lr": 1e-5}
                )

                def make(
                    parameters: Any,
                    module: Any = module,
                    name: str = name,
                    options: dict[str, Any] = options,
                ) -> torch.optim.Optimizer:
                    optimizer: torch.optim.Optimizer = getattr(module, name)(
                        parameters, weight_decay=1e-4, **options
                    )
                    return optimizer

                self.add(f"{package}.{name}", make)

    def add_peers(self) -> None:
        """Other packages on the same weights."""
        self.add_optimizers()
        from lightning.pytorch.utilities.grads import grad_norm

        mine = self.weights()
        self.cases.append(
            Case(
                "Lightning grad_norm", lambda: {k: float(v) for k, v in grad_norm(mine, 2).items()}
            )
        )
        with contextlib.suppress(ImportError):
            self.add_watch()

    def add_watch(self) -> None:
        """wandb.watch: a forward and backward pass, in which every parameter and gradient becomes a
        histogram."""
        import wandb

        run = wandb.init(
            mode="offline",
            project="cost",
            dir=tempfile.mkdtemp(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        module = self.weights()
        wandb.watch(module, log="all", log_freq=1)

        def call() -> None:
            sum((w * 1.0).sum() for w in module.layers).backward()  # type: ignore[union-attr]
            module(None)
            run.log({})

        plain = self.weights()
        self.cases.append(Case("wandb.watch", call))
        self.cases.append(
            Case(
                "the same passes without it",
                lambda: (sum((w * 1.0).sum() for w in plain.layers).backward(), plain(None)),
            )
        )  # type: ignore[union-attr]

    def run(self, rounds: int) -> None:
        """Measure all cases."""
        self.found = measure(self.cases, rounds, self.device)

    def case(self, name: str) -> Case:
        return self.found[name]

    def added(self, name: str, *floors: str) -> float:
        """What callbacks add to a step, over floors taken together."""
        total = [sum(parts) for parts in zip(*(self.found[f].times for f in floors), strict=True)]
        return median_ratio(self.found[name].ours, total)

    def ratio(self, name: str, other: str) -> float:
        """Whole step over whole step; NaN where the other is not there."""
        if other not in self.found or name not in self.found:
            return math.nan
        return median_ratio(self.found[name].times, self.found[other].times)

    def memory(self, name: str, bare: str) -> float:
        """Peak of memory beyond the bare optimizer's, over the targeted weights."""
        return (
            peak_memory(self.builders[name], self.device)
            - peak_memory(self.builders[bare], self.device)
        ) / self.targeted

    def rows(self) -> list[list[str]]:
        """One row per case."""
        rows = []
        for case in self.cases:
            added = (
                ""
                if case.fit is None or not case.fit.callbacks
                else f"{1e3 * statistics.median(case.ours):.3g}"
            )
            over = "" if not added else f"{self.added(case.name, 'floor: norm', 'floor: mul'):.2f}"
            of_base = (
                f"{self.ratio(case.name, 'SGD fused'):.2f}" if "floor" not in case.name else ""
            )
            rows.append(
                [
                    case.name,
                    milliseconds(case.times),
                    added,
                    over,
                    of_base,
                    str(case.operations),
                    str(case.waits),
                ]
            )
        return rows


HEAD = [
    "case",
    "ms (middle half)",
    "added ms",
    "added / (norm + mul)",
    "/ SGD fused",
    "operations",
    "host syncs",
]


def on_shapes(
    shapes: Shapes, rounds: int, device: str, peers: bool, everything: bool, bars_apply: bool = True
) -> str:
    """Section: one optimizer step of given shapes, with every callback."""
    steps = Steps(shapes, device, everything)
    steps.add_floors()
    steps.add_suite()
    if peers:
        steps.add_peers()
    steps.run(rounds)
    size = sum(math.prod(s) for s in shapes) / 1e6
    text = f"{len(shapes)} tensors, {size:.1f} million entries, {len(steps.matrices)} targeted weights; {rounds} rounds.\n\n"
    text += table("", HEAD, steps.rows())
    idle = max(
        steps.case(c).operations - steps.case("SGD fused").operations
        for c in ("monitor, idle", "WRS, idle")
    )
    waits = max(
        steps.case(c).waits - steps.case("SGD fused").waits for c in ("monitor, idle", "WRS, idle")
    )
    if not bars_apply:
        return text
    memory = max(
        steps.memory(f"RadialProjection on {name}", f"{name} fused") for name in ("SGD", "AdamW")
    )
    bars = [
        Bar("operations that an idle monitor or WRS adds", 0, idle, SPLIT),
        Bar("host synchronizations that they add", 0, waits),
        Bar(
            "AWS (norm) / (foreach norm + foreach mul)",
            1.5,
            steps.added("AWS (norm)", "floor: norm", "floor: mul"),
        ),
        Bar(
            "AWS (std) / (foreach norm + foreach mul)",
            2,
            steps.added("AWS (std)", "floor: norm", "floor: mul"),
        ),
        *projection_bars(steps),
        Bar("peak extra memory of a projection / targeted weights", 1.10, memory),
        Bar(
            "logging step / norms of both tensors",
            3,
            steps.added("monitor, logging", "floor: norms of both"),
            LOGGING,
        ),
        Bar(
            "host synchronizations of a logging step",
            1,
            steps.case("monitor, logging").waits - steps.case("SGD fused").waits,
        ),
    ]
    if everything:
        scaled = [
            steps.case(f"{c}, idle, scaled").operations - steps.case("SGD fused, scaled").operations
            for c in ("monitor", "WRS")
        ]
        bars.insert(
            1, Bar("the same with a fused optimizer and a GradScaler", 2, max(scaled), SPLIT)
        )
    absent = [
        name
        for name, module in (("adamp", "adamp"), ("pytorch_optimizer", "pytorch_optimizer"))
        if not find_spec(module)
    ]
    if peers and absent:
        text += f"\nNot installed here, so not measured: {', '.join(absent)} (`pip install 'lightning-normdyn[bench]'`).\n"
    return text + "\n" + bar_table(bars)


SPLIT = (
    "not an operation of a callback: while WRS owns the decay of its targets, the optimizer steps "
    "them as a group of their own, so its "
    "fused kernel is called once more"
)
LOGGING = (
    "weight and gradient are read, the weight is copied, copy and weight are read: two and a half "
    "times what the floor reads, and a write; "
    "each operation on a piece costs its call"
)


def projection_bars(steps: Steps) -> list[Bar]:
    """Projected steps beside those of the peer, and what of it is out of reach."""
    bars = []
    for name, peer in (("SGD", "SGDP"), ("AdamW", "AdamP")):
        bare, reading = (
            steps.ratio(case, f"adamp.{peer}") for case in (f"{name} fused", "floor: norms of both")
        )
        reason = (
            f"of this the bare {name} is {bare:.2f}, and to read two tensors of the weights' size "
            f"as fast as a norm can {reading:.2f}; the "
            "pass that projects takes as long as the kernel that torch.compile makes for it. What "
            "the peer takes depends on where its "
            "temporary tensors come from: here and alone in a process"
        )
        bars.append(
            Bar(
                f"projected fused {name} / adamp {peer}",
                0.25,
                steps.ratio(f"RadialProjection on {name}", f"adamp.{peer}"),
                reason,
            )
        )
    return bars


def alone(shapes: Shapes, rounds: int) -> str:
    """Section: nothing but the projections and their peers, in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, shapes, rounds, torch.get_num_threads()).result()


def _alone(shapes: Shapes, rounds: int, threads: int) -> str:
    be_quiet()
    torch.set_num_threads(threads)
    time_brackets("cpu")
    steps = Steps(shapes, "cpu")
    steps.add_floors()
    steps.add("SGD fused", sgd_fused)
    steps.add("AdamW fused", adamw_fused)
    steps.add("RadialProjection on SGD", sgd_fused, lambda: [RadialProjection()])
    steps.add("RadialProjection on AdamW", adamw_fused, lambda: [RadialProjection()])
    steps.add_optimizers()
    steps.run(rounds)
    rows = [
        [case.name, milliseconds(case.times), str(case.operations), str(case.waits)]
        for case in steps.cases
    ]
    text = (
        "The peers make temporary tensors as large as the weights. Where larger ones were freed "
        "before, as in the section above, the C "
        "library keeps that memory for them; in a new process it comes from the system page by "
        "page.\n\n"
    )
    return (
        text
        + table("", ["case", "ms (middle half)", "operations", "host syncs"], rows)
        + "\n"
        + bar_table(projection_bars(steps))
    )


def bar_table(bars: Sequence[Bar]) -> str:
    return table(
        "",
        ["bar", "at most", "found", ""],
        [bar.row() for bar in bars if not math.isnan(bar.found)],
    )


# ------------------------------------------------------------------------------------------- growth


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log(time) over log(size), by least squares."""
    xs, ys = [math.log(s) for s in sizes], [math.log(t) for t in times]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def growth(rounds: int, device: str, scale: int) -> str:
    """Section: how what is added grows with parameters, layers and filters."""
    unit = 512 // scale
    axes: dict[str, list[Shapes]] = {
        "parameters (longer filters)": [[(unit, unit * k)] * 8 for k in (2, 4, 8)],
        "layers (of 16 filters of 64 entries)": [[(16, 64)] * (40 // scale * k) for k in (1, 2, 4)],
        "layers (parameters kept)": [[(unit, 4 * unit * 16 // k)] * k for k in (4, 8, 16)],
        "filters (parameters kept)": [[(unit * k, 4 * unit // k)] * 8 for k in (1, 2, 4)],
    }
    cases = {
        "AWS (norm)": lambda: [AdaptiveWeightShrink(1e-3, statistic="norm")],
        "RadialProjection": lambda: [RadialProjection()],
        "monitor, logging": lambda: [monitor(1)],
    }
    rows, bars = [], []
    for axis, models in axes.items():
        sizes = (
            [math.prod(s[0]) * len(s) for s in models]
            if "param" in axis.split("(")[0]
            else [len(s) for s in models]
        )
        if axis.startswith("filters"):
            sizes = [sum(shape[0] for shape in s) for s in models]
        found: dict[str, list[float]] = {name: [] for name in cases}
        chosen = []
        for i, shapes in enumerate(models):
            steps = Steps(shapes, device, everything=False)
            for name, callbacks in cases.items():
                steps.add(f"{name} {i}", sgd_fused, callbacks)
            chosen += steps.cases
        measured = measure(chosen, rounds, device)
        for name in cases:
            found[name] = [
                statistics.median(measured[f"{name} {i}"].ours) for i in range(len(models))
            ]
            slope = exponent(sizes, found[name])
            counts = [measured[f"{name} {i}"].operations for i in range(len(models))]
            per_layer = (
                (counts[-1] - counts[0]) / (len(models[-1]) - len(models[0]))
                if len(models[-1]) > len(models[0])
                else math.nan
            )
            rows.append(
                [
                    f"{name}, {axis}",
                    ", ".join(map(str, sizes)),
                    ", ".join(f"{1e3 * t:.3g}" for t in found[name]),
                    f"{slope:.2f}",
                    "" if math.isnan(per_layer) else f"{per_layer:.1f}",
                ]
            )
            if "kept" not in axis:
                bars.append(Bar(f"exponent of {name} over {axis}", 1.15, slope))
    text = table("", ["what is added", "sizes", "ms", "exponent", "operations per layer"], rows)
    return text + "\n" + bar_table(bars)


# ----------------------------------------------------------------------------------- training steps


def training(rounds: int, device: str, quick: bool) -> str:
    """Section: what the whole suite adds to training steps of two models."""
    rows, bars = [], []
    models: dict[str, tuple[nn.Module, tuple[int, ...], float]] = {
        "digits example": (digits_net(), (64, 1, 8, 8), 0.01)
    }
    models["ResNet-18, CIFAR"] = (
        resnet18(16 if quick else 64),
        (8 if quick else 128, 3, 32, 32),
        0.005,
    )
    for name, (module, shape, most) in models.items():
        module.to(device)
        x, y = torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)

        def make(
            callbacks: Sequence[NormDynCallback],
            module: nn.Module = module,
            x: Tensor = x,
            y: Tensor = y,
        ) -> Case:
            fit = Fit(copy.deepcopy(module), sgd_fused, callbacks, loss_of_images, (x, y))
            fit.settle()
            return Case("", fit.run_batch, fit)

        every = {
            "bare": make([]),
            "suite, idle": make(suite(NEVER)),
            "suite, logging": make(suite(1)),
            "monitor, logging": make([monitor(1)]),
        }
        for label, case in every.items():
            case.name = label
        turns = max(3, rounds // 3) if "ResNet" in name else 4 * rounds
        measured = measure([*every.values()], turns, device)
        # What callbacks add is timed inside the step, so that the noise of the rest does not enter.
        share = {
            label: statistics.median(c.ours)
            / statistics.median([t - o for t, o in zip(c.times, c.ours, strict=True)])
            for label, c in measured.items()
            if label != "bare"
        }
        step = milliseconds(measured["bare"].times)
        extra = max(0.0, share["suite, logging"] - share["suite, idle"])
        whole = share["suite, idle"] + extra / 50
        rows += [
            [
                name,
                step,
                label,
                f"{1e3 * statistics.median(measured[label].ours):.3g}",
                f"{100 * part:.3g} %",
            ]
            for label, part in share.items()
        ]
        rows.append([name, step, "suite, logging every 50 steps", "", f"{100 * whole:.3g} %"])
        bars.append(
            Bar(
                f"{name}: logging every 50 steps, share of a step",
                most,
                share["monitor, logging"] / 50,
            )
        )
        if "ResNet" in name:
            bars.append(Bar(f"{name}: whole suite, share of a step", 0.02, whole))
        else:
            bars.append(Bar(f"{name}: suite over the bare step", 1.06, 1 + whole))
    text = table("", ["model", "step ms", "callbacks", "added ms", "share of a step"], rows)
    return text if quick else text + "\n" + bar_table(bars)


# ------------------------------------------------------------------------------- many small layers


def many_layers(layers: int, width: int = 8) -> nn.Module:
    """Small layers in a row, each in front of a LayerNorm."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width, bias=False), nn.LayerNorm(width)]
    return nn.Sequential(*parts, nn.Linear(width, 2))


def loss_of_squares(net: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = net(batch).square().mean()
    return loss


PAIRS = 8
"""Pairs of steps of one fit in a row, before the next one takes its turn; the first is not timed:
other fits have pushed this one's objects out of the caches."""


@dataclass
class Pairs:
    """Two steps of one fit, one right after the other, with its callbacks and without them: who
    else uses the machine disturbs both alike.

    Args:
        fit: whose steps they are.
    """

    fit: Fit
    times: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    def take(self, chance: random.Random) -> None:
        """One turn."""
        for place in range(PAIRS):
            for is_alone in chance.sample((False, True), 2):
                with self.fit.alone() if is_alone else contextlib.nullcontext():
                    self.fit.run_batch()
                if place == 0:
                    continue
                watch = self.fit.watch
                (self.alone if is_alone else self.times).append(watch.whole)
                if not is_alone:
                    self.ours.append(watch.ours)

    def quiet(self) -> Pairs:
        """The third of the pairs that took the shortest time: a busy neighbour of a shared machine
        makes all that a step does slower, by up to two times and for seconds."""
        order = sorted(range(len(self.times)), key=lambda i: self.times[i] + self.alone[i])
        third = order[: max(1, len(order) // 3)]
        kept = [[of_pairs[i] for i in third] for of_pairs in (self.times, self.alone, self.ours)]
        return Pairs(self.fit, *kept)

    @property
    def beyond(self) -> float:
        """Seconds that the callbacks have added, in the middle one of the pairs."""
        return statistics.median(t - a for t, a in zip(self.times, self.alone, strict=True))


class Idle(L.Callback):
    """Hooks that do nothing: what Lightning and torch take to call a callback at all."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def on_train_batch_start(self, *args: Any) -> None: ...

    def on_before_backward(self, *args: Any) -> None: ...

    def on_before_optimizer_step(self, *args: Any) -> None: ...

    def on_train_batch_end(self, *args: Any) -> None: ...

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None: ...

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None: ...


class Asks(Idle):
    """Asks each parameter whether it is trained: the cheapest question that can be asked of it."""

    def on_train_batch_start(self, *args: Any) -> None:
        _, pl_module, *_ = args
        self.parameters = getattr(self, "parameters", None) or list(pl_module.parameters())
        self.are_trained = [parameter.requires_grad for parameter in self.parameters]


class ShrinksByHand(Idle):
    """AWS in six calls of torch, of weights of 8 x 8 that always have a gradient: what nobody who
    uses torch can do without."""

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        (group,) = optimizer.param_groups
        if not hasattr(self, "weights"):
            self.weights = [p.detach() for p in group["params"] if p.shape == (8, 8)]
            self.factors = torch.empty(len(self.weights), 8, 1, dtype=torch.float32, device="cpu")
            self.of_weights = list(self.factors.unbind())
        norms = torch.linalg.vector_norm(torch.cat(self.weights), dim=1)
        factors = (1 - group["lr"] * 1e-3 * norms).clamp(min=0.5)
        self.factors.copy_(factors.view(-1, 8, 1))
        torch._foreach_mul_(self.weights, self.of_weights)


def sgdp(parameters: Any) -> torch.optim.Optimizer:
    """The peer whose step projects."""
    from adamp import SGDP

    optimizer: torch.optim.Optimizer = SGDP(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    return optimizer


def many(rounds: int, device: str, quick: bool) -> str:
    """Section: what callbacks cost where the arithmetic of a layer costs nothing."""
    few, layers = (10, 20) if quick else (20, 200)
    chosen: dict[str, tuple[Callable[[], Sequence[L.Callback]], float]] = {
        "floor: hooks that do nothing": (lambda: [Idle()], math.nan),
        "floor: whether each is trained": (lambda: [Asks()], math.nan),
        "floor: AWS by hand": (lambda: [ShrinksByHand()], math.nan),
        "AWS": (lambda: [AdaptiveWeightShrink(1e-3)], 8),
        "RadialProjection": (lambda: [RadialProjection()], 20),
        "WRS, rescaling": (lambda: [WeightRescaling(1)], 15),
        "WRS, idle": (lambda: [WeightRescaling(NEVER)], math.nan),
        "monitor, idle": (lambda: [monitor(NEVER)], 0.2),
        "monitor, logging": (lambda: [monitor(1)], 25),
        "suite, idle": (lambda: suite(NEVER), math.nan),
    }
    x = torch.randn(8, 8, device=device)

    def make(
        count: int,
        callbacks: Sequence[L.Callback],
        optimizer: Callable[[Any], torch.optim.Optimizer] = sgd_fused,
    ) -> Fit:
        torch.manual_seed(0)
        net = many_layers(count).to(device)
        # A logging step of the Trainer's would look for the steps that were taken alone.
        fit = Fit(net, optimizer, callbacks, loss_of_squares, x, log_every_n_steps=10**9)
        # The first steps are looked at closely, and twice as many are evidence.
        for _ in range(2 * FIRST_BATCHES):
            fit.run_batch()
        return fit

    def added_operations(fit: Fit) -> int:
        counts = []
        for context in (contextlib.nullcontext(), fit.alone()):
            with context:
                case = Case("", fit.run_batch, fit)
                counts.append(measure([case], 1, device, warmup=0)[""].operations)
        return counts[0] - counts[1]

    pairs = {name: Pairs(make(layers, made())) for name, (made, _) in chosen.items()}
    chance = random.Random(0)
    for _ in range(rounds):
        for name in chance.sample(list(pairs), len(pairs)):
            pairs[name].take(chance)

    rows, bars = [], []
    for name, (made, most) in chosen.items():
        taken, quiet = pairs[name], pairs[name].quiet()
        each = 1e6 * quiet.beyond / layers
        ratio = median_ratio(quiet.times, quiet.alone)
        grown = added_operations(taken.fit) - added_operations(make(few, made()))
        cells = [
            milliseconds(quiet.alone),
            f"{each:.2f}",
            f"{1e6 * taken.beyond / layers:.2f}",
            f"{1e6 * statistics.median(quiet.ours) / layers:.2f}",
            f"{ratio:.3f}",
            f"{grown / (layers - few):.2f}",
        ]
        rows.append([name, *cells])
        if name == "AWS":
            bars.append(Bar("AWS, step over the plain step", 1.05, ratio))
        if not math.isnan(most):
            bars.append(Bar(f"{name}, microseconds per layer beyond plain", most, each, PYTHON))
    if find_spec("adamp") is not None:
        peers = []
        for optimizer in (sgd_fused, sgdp):
            fit = make(layers, [], optimizer)
            peers.append(Case(optimizer.__name__, fit.run_batch, fit))
        found = measure(peers, 3 if quick else 60, device)
        theirs, plainest = found["sgdp"], found["sgd_fused"]
        beyond = [t - p for t, p in zip(theirs.times, plainest.times, strict=True)]
        cells = [
            milliseconds(plainest.times),
            "",
            f"{1e6 * statistics.median(beyond) / layers:.2f}",
            "",
            f"{median_ratio(theirs.times, plainest.times):.3f}",
            f"{(theirs.operations - plainest.operations) / layers:.2f}",
        ]
        rows.append(["peer: adamp.SGDP in place of SGD", *cells])
    head = [
        "case",
        "ms without it (middle half)",
        "us per layer beyond plain",
        "of all pairs",
        "us per layer in hooks",
        "/ plain",
        "operations per layer",
    ]
    text = (
        f"{layers} layers of 8 x 8, each in front of a LayerNorm; {rounds} rounds of {PAIRS - 1} "
        "pairs of steps, one of the pair without the callbacks. Figures are medians over the third of "
        "the pairs that took the shortest time, since who else uses the machine slows the others "
        "down; beside them the same over all pairs. They vary by 1 to 2 us per layer from run to run. "
        "Floors are what a callback cannot do without: to be called; to ask each parameter one "
        "question; for AWS, torch's own calls.\n\n"
    )
    text += table("", head, rows)
    return text if quick else text + "\n" + bar_table(bars)


PYTHON = (
    "what is left is Python's own: some 130 functions in every step whatever the number of weights, "
    "each of which comes from a cold cache, about 3 us; and, in a step that logs, its row"
)


# ----------------------------------------------------------------------------- a fit's start and end


def short_fit(layers: int, callbacks: Sequence[NormDynCallback]) -> float:
    """Seconds of CPU of a whole fit of two steps, tables included."""
    torch.manual_seed(0)
    module = Trained(many_layers(layers), torch.randn(16, 8, device="cpu"))
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module)
    return time.process_time() - began


class Trained(L.LightningModule):
    """A network of many layers, and its data."""

    def __init__(self, net: nn.Module, data: Tensor) -> None:
        super().__init__()
        self.net, self.data = net, data

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of_squares(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, batch_size=8)  # type: ignore[arg-type]


def start_and_end(quick: bool) -> str:
    """Section: what a fit of two steps costs whole, by its number of layers."""
    counts, rounds = ([10, 20], 1) if quick else ([100, 400, 1000], 5)
    # CPU seconds count what a second thread spends waiting, too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    short_fit(10, [AdaptiveWeightShrink(1e-2), monitor(1)])  # what happens once per process
    rows, beyond = [], {}
    for layers in counts:
        plain, ours = [], []
        for _ in range(rounds):
            plain.append(short_fit(layers, []))
            ours.append(short_fit(layers, [AdaptiveWeightShrink(1e-2), monitor(1)]))
        differences = [o - p for o, p in zip(ours, plain, strict=True)]
        beyond[layers] = statistics.median(differences)
        shown = f"{beyond[layers]:.2f} ({min(differences):.2f}-{max(differences):.2f})"
        each = 1e3 * beyond[layers] / layers
        rows.append([str(layers), f"{statistics.median(plain):.2f}", shown, f"{each:.2f}"])
    torch.set_num_threads(threads)
    head = ["layers", "plain, s of CPU", "AWS and monitor beyond it, s of CPU", "ms per layer"]
    text = f"Whole fits of two steps on layers as above, AdamW; one thread, {rounds} rounds.\n\n"
    text += table("", head, rows)
    bars = [
        Bar(f"{counts[-1]} layers, seconds beyond plain", 2.0, beyond[counts[-1]]),
        Bar("exponent over layers", 1.15, exponent(counts, list(beyond.values()))),
    ]
    return text if quick else text + "\n" + bar_table(bars)


# -------------------------------------------------------------------------------------- collectives


class Wire(TorchDispatchMode):
    """Counts collectives and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def on(self) -> Wire:
        """For `Stopwatch.around`: it is entered again and again."""
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name:
            self.calls += 1
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)
            )
        return func(*args, **(kwargs or {}))


def _rank(rank: int, folder: str, shapes: Shapes, sharded: bool, port: int) -> None:
    """One of two ranks: count what a step with each callback sends."""
    as_ranks(rank, port)
    be_quiet()
    torch.set_num_threads(1)
    found: dict[str, tuple[int, int]] = {}
    for name, callbacks in {
        "AWS (norm)": lambda: [AdaptiveWeightShrink(1e-3, statistic="norm")],
        "RadialProjection": lambda: [RadialProjection()],
        "WRS, idle": lambda: [WeightRescaling(NEVER)],
        "WRS, rescaling": lambda: [WeightRescaling(1)],
        "monitor, idle": lambda: [monitor(NEVER)],
        "monitor, logging": lambda: [monitor(1)],
    }.items():
        strategy = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy()
        )
        parallelize = fully_sharded if sharded else None
        options: dict[str, Any] = {"strategy": strategy, "devices": 2}
        fit = Fit(Weights(shapes), sgd, callbacks(), parallelize=parallelize, **options)
        fit.keep_gradients()
        fit.settle()
        wire = Wire()
        fit.watch.around = wire.on
        fit.run_batch()
        found[name] = (wire.calls, wire.bytes)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def collectives(shapes: Shapes) -> str:
    """Section: what goes over the wire in one step, two ranks, gloo."""
    import torch.multiprocessing as mp

    rows, bars = [], []
    for layout, sharded in (
        ("DDP (whole weights on every rank)", False),
        ("FSDP2 (rows sharded)", True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            # Forked: each spawned rank would import torch and Lightning anew, for seconds.
            arguments = (folder, shapes, sharded, free_port())
            mp.start_processes(_rank, arguments, nprocs=2, start_method="fork")
            found = json.loads(Path(folder, "found.json").read_text())
        rows += [[name, layout, str(calls), str(size)] for name, (calls, size) in found.items()]
        idle = max(found[name][0] for name in ("WRS, idle", "monitor, idle"))
        bars.append(Bar(f"collectives of idle callbacks, {layout}", 0, idle))
    return (
        table("", ["callback", "weights", "collectives per step", "bytes per rank"], rows)
        + "\n"
        + bar_table(bars)
    )


# ------------------------------------------------------------------------ logging through a Trainer


def logged(steps: int, layers: int) -> str:
    """Section: the same numbers through `log_metrics` in one call, through `self.log_dict`, and by
    wandb.watch, in a Trainer."""
    try:
        import logging_cost
    except ImportError as error:
        return f"not run: {error}\n"
    names = (
        "no logging (floor)",
        "NormDynamicsMonitor, no logger",
        "NormDynamicsMonitor, CSV",
        "self.log_dict of as many numbers, CSV",
        "wandb.watch(log='all', log_freq=1)",
    )
    times = {
        name: logging_cost.measure(make(), logger, steps, layers)
        for name, (make, logger) in logging_cost.VARIANTS.items()
        if name in names
    }
    floor = times[names[0]]
    rows = [[name, f"{ms:.1f}", f"{ms - floor:.1f}"] for name, ms in times.items()]
    numbers = len(logging_cost.numbers_of(layers))
    text = f"{numbers} numbers of {layers} small layers at every step, from batch to batch.\n\n"
    return text + table("", ["what", "ms per step", "added ms"], rows)


# --------------------------------------------------------------------------------------------- CUDA


@contextlib.contextmanager
def kernels(found: list[int]) -> Iterator[None]:
    """Append how many CUDA kernels and copies were launched meanwhile."""
    from torch.autograd import DeviceType

    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        yield
        torch.cuda.synchronize()
    found.append(sum(1 for event in profile.events() if event.device_type == DeviceType.CUDA))


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """A wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cuda(rounds: int, quick: bool) -> str:
    """Section: the same on a GPU, with kernel counts, synchronizations as errors, and the
    precisions that people train in."""
    if not torch.cuda.is_available():
        return "not run: no CUDA device on this machine.\n"
    shapes = transformer(1, 256) if quick else resnet50()
    text = on_shapes(shapes, rounds, "cuda", peers=True, everything=True, bars_apply=not quick)
    rows = []
    for name, (memory_format, precision) in {
        "float32, channels_last": (torch.channels_last, "32-true"),
        "bf16-mixed, channels_last": (torch.channels_last, "bf16-mixed"),
        "16-mixed, fused, skipped steps": (torch.contiguous_format, "16-mixed"),
    }.items():
        for label, callbacks in {
            "bare": list,
            "suite, idle": lambda: suite(NEVER),
            "suite, logging": lambda: suite(1),
        }.items():
            net = resnet18().cuda().to(memory_format=memory_format)  # type: ignore[call-overload]
            x = torch.randn(128, 3, 32, 32, device="cuda").to(memory_format=memory_format)
            y = torch.randint(0, 10, (128,), device="cuda")
            options: dict[str, Any] = {"precision": precision}
            if precision == "16-mixed":
                # A scale that overflows float16 at first: the first steps are skipped inside the
                # kernel.
                scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
                options = {"plugins": [MixedPrecision("16-mixed", "cuda", scaler)]}
            fit = Fit(net, sgd_fused, callbacks(), loss_of_images, (x, y), **options)
            fit.settle()
            count = 0
            for _ in range(3):
                found: list[int] = []
                fit.watch.around = partial(kernels, found)
                fit.run_batch()
                count = sum(found)
            quiet = "not asked for"
            if label != "suite, logging":
                fit.watch.around = waits_are_errors
                try:
                    fit.run_batch()
                    quiet = "none"
                except RuntimeError as error:
                    quiet = str(error).splitlines()[0]
            brackets = [callback.steps_of(0) for callback in fit.callbacks[:1]]
            rows.append([name, label, str(count), quiet, str(brackets[0]) if brackets else ""])
    return (
        text
        + "\n"
        + table(
            "",
            [
                "precision",
                "callbacks",
                "kernels of the step",
                "synchronizations",
                f"real steps counted of {FIRST_BATCHES + 4}",
            ],
            rows,
        )
    )


# ---------------------------------------------------------------------------------------- all of it


def sections(quick: bool) -> dict[str, tuple[str, Callable[[], str]]]:
    """Title and maker of each section."""
    rounds = 3 if quick else 15
    if quick:
        small = transformer(1, 256)
        return {
            "small": (
                "Small shapes",
                lambda: on_shapes(small, rounds, "cpu", True, True, bars_apply=False),
            ),
            "alone": ("Alone in a process", lambda: alone(small, rounds)),
            "growth": ("Growth", lambda: growth(rounds, "cpu", 4)),
            "training": ("Training steps", lambda: training(rounds, "cpu", quick=True)),
            "many": ("Many small layers", lambda: many(rounds, "cpu", quick=True)),
            "start": ("Start and end of a fit", lambda: start_and_end(quick=True)),
            "collectives": ("Two ranks", lambda: collectives(small)),
            "logged": ("In a Trainer", lambda: logged(12, 4)),
            "cuda": ("CUDA", lambda: on_cuda(rounds, quick=True)),
        }
    return {
        "resnet50": (
            "ResNet-50",
            lambda: on_shapes(resnet50(), rounds, "cpu", peers=True, everything=True),
        ),
        "alone": (
            "Projections beside their peers, alone in a process",
            lambda: alone(resnet50(), rounds),
        ),
        "vit": ("ViT-B", lambda: on_shapes(vit(), 7, "cpu", peers=False, everything=False)),
        "transformer": (
            "One block of a 1B-class transformer",
            lambda: on_shapes(transformer(1), 7, "cpu", peers=False, everything=False),
        ),
        "growth": ("Growth", lambda: growth(rounds, "cpu", 1)),
        "training": ("Training steps", lambda: training(rounds, "cpu", quick=False)),
        # Single steps vary by a millisecond, which is 5 us per layer.
        "many": ("Many small layers", lambda: many(3 * rounds, "cpu", quick=False)),
        "start": ("Start and end of a fit", lambda: start_and_end(quick=False)),
        "collectives": ("Two ranks", lambda: collectives(resnet50())),
        "logged": ("In a Trainer, beside self.log_dict and wandb.watch", lambda: logged(20, 54)),
        "cuda": ("CUDA", lambda: on_cuda(rounds, quick=False)),
    }


INTRODUCTION = """# What the callbacks cost

Written by `make bench` (`python benchmarks/cost.py`); each section names its machine, day and command. Ratios are medians over rounds of
ratios within a round; milliseconds are for orientation. "Operations" are what the dispatcher sees of one step, views and bare allocations
left out; "added" is what happens in the brackets around the optimizer's step and in the hooks before and after it. Every fit is driven by a
Trainer of Lightning's, batch by batch; what the Trainer itself takes is not counted.
"""


def machine() -> str:
    """Who measured."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
        )
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    nice = f", niceness {os.nice(0)}" if hasattr(os, "nice") and os.nice(0) else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}{load}{nice}"


def be_quiet() -> None:
    """What Lightning and torch say of dozens of small fits would hide the tables."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, a minute; writes nothing"
    )
    parser.add_argument(
        "--only", nargs="*", help="sections to measure; the others are kept as they are in the file"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    be_quiet()
    os.environ.setdefault("WANDB_MODE", "offline")
    torch.set_num_threads(args.threads)
    time_brackets("cuda" if torch.cuda.is_available() else "cpu")
    known: dict[str, str] = {}
    if args.out.exists() and not args.quick:
        parts = args.out.read_text().split("\n## ")[1:]
        known = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}
    for key, (title, make) in sections(args.quick).items():
        if args.only and key not in args.only:
            continue
        command = (
            "python benchmarks/cost.py"
            + (" --quick" if args.quick else "")
            + (f" --only {key}" if args.only else "")
        )
        head = f"{machine()}; {time.strftime('%Y-%m-%d')}; `{command}`"
        start = time.perf_counter()
        known[title] = f"{head}\n\n{make().strip()}"
        print(
            f"## {title}\n\n{known[title]}\n\n({time.perf_counter() - start:.0f} s)\n", flush=True
        )
        gc.collect()
        if not args.quick:  # after every section: what is measured is kept, whatever comes next
            titles = [title for title, _ in sections(False).values()]
            text = "\n".join(
                f"## {title}\n\n{known[title]}\n" for title in titles if title in known
            )
            args.out.write_text(f"{INTRODUCTION}\n{text}")


if __name__ == "__main__":
    main()
