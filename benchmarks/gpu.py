"""What the callbacks do on a GPU: right or not, how many launches, how much time and memory.

    python benchmarks/gpu.py                  # all sections, at most 8 minutes; writes benchmarks/gpu.md
    python benchmarks/gpu.py --only time      # one section
    python benchmarks/gpu.py --again          # also sections that are in the file already
    python benchmarks/gpu.py --dry-run        # on the CPU, tiny: does the script itself work?

Each section is written as soon as it is done, so a run that is cut off goes on where it stopped.
Where there is no GPU, ``--dry-run`` is taken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cost
import torch
import torch.multiprocessing as mp
from cost import Fit, Shapes, Weights, adamw_fused, be_quiet, sgd_fused, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn import (
    AdaptiveWeightShrink,
    NormDynamicsMonitor,
    Partition,
    RadialBrake,
    RadialProjection,
    RotationControl,
    WeightDecay,
    WeightRescaling,
    WeightVectors,
)
from lightning_normdyn.functional import angle_from_sums
from lightning_normdyn.geometry.kernel_choice import SETTING
from lightning_normdyn.geometry.triton_kernels import TritonKernels

ROOT = Path(__file__).parents[1]
PATHS = ("torch", "triton")
PHASES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "AWS (norm)": (lambda: AdaptiveWeightShrink(1e-3, statistic="norm"), sgd_fused),
    "AWS (std)": (lambda: AdaptiveWeightShrink(1e-3, statistic="std"), sgd_fused),
    "projection, SGD": (RadialProjection, sgd_fused),
    "projection, AdamW": (RadialProjection, adamw_fused),
    "projection, cosine gate": (lambda: RadialProjection(gate="cosine"), adamw_fused),
    "WRS with momentum": (lambda: WeightRescaling(1), sgd_fused),
    "WeightDecay": (WeightDecay, adamw_fused),
    "cautious decay": (lambda: WeightDecay(cautious=True), adamw_fused),
    "RadialBrake": (lambda: RadialBrake(0.5), adamw_fused),
    "RotationControl": (lambda: RotationControl(1e-3, target_norm=1.0), adamw_fused),
    "monitor, idle": (lambda: NormDynamicsMonitor(cost.NEVER, tables=False), sgd_fused),
    "monitor, logging": (lambda: NormDynamicsMonitor(1, tables=False), sgd_fused),
}


class Bench:
    """How large everything is, and where.

    Args:
        dry: on the CPU, tiny.
    """

    def __init__(self, dry: bool) -> None:
        self.device = "cpu" if dry else "cuda"
        self.dry = dry
        # Without a GPU only one of them can run at speed.
        self.paths = ("torch",) if dry else PATHS
        self.rounds = 2 if dry else 30
        self.shapes: dict[str, Shapes] = {"tiny": cost.transformer(1, 64)}
        if not dry:
            self.shapes = {
                "ResNet-50": cost.resnet50(),
                "two blocks of a 1B transformer": cost.transformer(2),
                "560 layers of 64x64": [(64, 64)] * 560,
            }

    def vectors(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> WeightVectors:
        generator = torch.Generator(self.device).manual_seed(0)
        weights = []
        for shape in shapes:
            if len(shape) > 1:
                numbers = torch.randn(shape, generator=generator, device=self.device)
                weights.append(nn.Parameter(numbers.to(dtype)))
        return WeightVectors(weights, [Partition.filters(tuple(w.shape)) for w in weights])

    def fit(self, shapes: Shapes, phase: str) -> Fit:
        """A fit whose batches are optimizer steps alone, past its first ones."""
        callback, optimizer = PHASES[phase]
        fit = Fit(Weights(shapes, self.device), optimizer, [callback()])
        fit.keep_gradients()
        for _ in range(3 if self.dry else 20):
            fit.run_batch()
        return fit

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of several calls, by the device's own clock, with caches emptied before each."""
        for _ in range(3):
            call()
        if self.dry:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # Larger than any cache: what is timed must come from memory.
        flush = torch.empty(2**26, dtype=torch.float32, device=self.device)
        times = []
        for _ in range(self.rounds):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


@contextlib.contextmanager
def path(name: str) -> Iterator[None]:
    """Kernels that are made meanwhile are of this kind."""
    before = os.environ.get(SETTING)
    os.environ[SETTING] = name
    try:
        yield
    finally:
        os.environ.pop(SETTING)
        if before is not None:
            os.environ[SETTING] = before


# -------------------------------------------------------------------------------------- sections


def tests(bench: Bench) -> str:
    """The tests of the programs, on the device."""
    if find_spec("pytest") is None:
        return "not run: pytest is not installed."
    env = os.environ | {SETTING: "triton", "NORMDYN_TEST_DEVICE": bench.device}
    file = "tests/geometry/on_triton.py"
    if bench.dry:
        file, env = "tests/geometry/test_kernel_choice.py", dict(os.environ)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        file,
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "passed" in line or "failed" in line]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*lines[-1:], *(f"- {line}" for line in failed[:20])]) or done.stderr[-1000:]


def launches(bench: Bench) -> str:
    """Kernels and copies of one step of each callback, as the profiler sees them, without those of
    the optimizer."""
    rows = []
    count = cost.kernels if not bench.dry else operations
    for name, shapes in bench.shapes.items():
        for phase in PHASES:
            row = [f"{name}: {phase}"]
            for kind in bench.paths:
                with path(kind):
                    fit = bench.fit(shapes, phase)
                    bare = Fit(Weights(shapes, bench.device), PHASES[phase][1])
                    bare.keep_gradients()
                    bare.run_batch()
                    found = []
                    for each in (fit, bare):
                        counts: list[int] = []
                        each.watch.around = partial(count, counts)
                        each.run_batch()
                        found.append(sum(counts))
                row.append(str(found[0] - found[1]))
            rows.append(row)
    return table("", ["weights and callback", *bench.paths], rows)


@contextlib.contextmanager
def operations(found: list[int]) -> Iterator[None]:
    """Where there is no device: what torch's dispatcher sees."""
    with cost.counting() as counter:
        yield
    found.append(counter.operations)


def times(bench: Bench) -> str:
    """Milliseconds that a primitive takes on the device, beside a copy of the same bytes."""
    rows = []
    for name, shapes in bench.shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            for kind in bench.paths:
                with path(kind):
                    vectors = bench.vectors(shapes, dtype)
                values = vectors.values()
                before = [value.clone() for value in values]
                one = torch.ones(vectors.n, dtype=torch.float64, device=bench.device)
                small, share = one * 1e-6, one * 0
                copy = bench.seconds(lambda v=values, b=before: torch._foreach_copy_(b, v))
                row = [f"{name}, {dtype}, {kind}", f"{1e3 * copy:.3g}"]
                for call in (
                    vectors.norms,
                    lambda v=vectors: v.moments(v.values()),
                    lambda v=vectors, o=one, s=small: v.scale_(o - s),
                    lambda v=vectors, b=before: v.displacement(b),
                    lambda v=vectors, b=before, s=share: v.remove_radial_(b, s),
                ):
                    row.append(f"{1e3 * bench.seconds(call):.3g}")
                rows.append(row)
    head = ["ms", "copy", "norms", "moments", "scale", "displacement", "projection"]
    return table("", head, rows)


def steps(bench: Bench) -> str:
    """Milliseconds of an optimizer step with each callback, beside torch's fused optimizers and
    timm's SGDP and AdamP."""
    rows = []
    for name, shapes in bench.shapes.items():
        bare = {}
        for optimizer in (sgd_fused, adamw_fused):
            fit = Fit(Weights(shapes, bench.device), optimizer)
            fit.keep_gradients()
            bare[optimizer] = bench.seconds(fit.run_batch)
            rows.append([f"{name}: {optimizer.__name__}", f"{1e3 * bare[optimizer]:.3g}", "", ""])
        for peer, optimizer in peers().items():
            weights = Weights(shapes, bench.device)
            weights().backward()
            step = optimizer(list(weights.parameters())).step
            base = bare[sgd_fused if "SGD" in peer else adamw_fused]
            taken = bench.seconds(step)
            rows.append(
                [f"{name}: {peer}", f"{1e3 * taken:.3g}", f"{1e3 * (taken - base):.3g}", ""]
            )
        for phase, (_, optimizer) in PHASES.items():
            row = [f"{name}: {phase}", f"{1e3 * bare[optimizer]:.3g}"]
            for kind in bench.paths:
                with path(kind):
                    fit = bench.fit(shapes, phase)
                    row.append(f"+{1e3 * (bench.seconds(fit.run_batch) - bare[optimizer]):.3g}")
            rows.append(row + [""] * (4 - len(row)))
    return table("", ["ms", "the step", "added", "added by Triton"], rows)


def peers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    if find_spec("timm") is None:
        return {}
    from timm.optim import SGDP, AdamP  # type: ignore[import-not-found]

    return {
        "timm SGDP": partial(SGDP, lr=1e-3, momentum=0.9, weight_decay=1e-4),
        "timm AdamP": partial(AdamP, lr=1e-7, weight_decay=1e-2),
    }


def waits(bench: Bench) -> str:
    """A step of each callback in which every wait for the device is an error."""
    rows = []
    around = contextlib.nullcontext if bench.dry else cost.waits_are_errors
    (_, shapes), *_ = bench.shapes.items()
    for phase in PHASES:
        row = [phase]
        for kind in bench.paths:
            with path(kind):
                fit = bench.fit(shapes, phase)
                fit.watch.around = around
                said = "none"
                try:
                    fit.run_batch()
                except RuntimeError as error:
                    said = str(error).splitlines()[0]
                row.append(said)
        rows.append(row)
    return table("", ["waits", *bench.paths], rows)


def exactness(bench: Bench) -> str:
    """Errors against float64 on the CPU, and whether a second run gives the same bits."""
    rows = []
    for name, shapes in bench.shapes.items():
        for kind in bench.paths:
            with path(kind):
                vectors = bench.vectors(shapes)
            before = [value.clone() for value in vectors.values()]
            for value in vectors.values():
                value.mul_(1.001).add_(torch.randn_like(value), alpha=1e-4)
            found = vectors.displacement(before)
            same = torch.equal(found, vectors.displacement(before))
            norms = vectors.norms()
            same &= torch.equal(norms, vectors.norms())
            truth = WeightVectors(
                [value.double().cpu() for value in vectors.values()], vectors.partitions
            )
            exact = truth.displacement([old.double().cpu() for old in before])
            angle = angle_from_sums(*found.cpu()) / angle_from_sums(*exact) - 1
            norm = norms.cpu() / truth.norms() - 1
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{float(norm.abs().max()):.1e}",
                    f"{float(angle.abs().max()):.1e}",
                    "yes" if same else "NO",
                ]
            )
    return table("", ["", "norms off by", "angles off by", "same bits twice"], rows)


def graphs(bench: Bench) -> str:
    """Capture in a CUDA graph: replayed, it must do what a call does."""
    if bench.dry:
        return "not run: there is no CUDA graph without a GPU."
    lines = []
    for kind in bench.paths:
        with path(kind):
            vectors = bench.vectors(cost.resnet50())
        factor = torch.full((vectors.n,), 0.5, dtype=torch.float64, device="cuda")
        try:
            vectors.scale_(factor)
            start = vectors.norms()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                vectors.scale_(factor)
            graph.replay()
            torch.testing.assert_close(vectors.norms(), start / 2, rtol=1e-6, atol=0)
            lines.append(f"- {kind}: captured and replayed")
        except Exception as error:  # whatever it is belongs into the table
            lines.append(f"- {kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    return "\n".join(lines)


def resources(bench: Bench) -> str:
    """Peak memory of a step, compile seconds, and microseconds of the host per call."""
    rows = []
    for name, shapes in bench.shapes.items():
        for kind in bench.paths:
            with path(kind):
                fit = bench.fit(shapes, "projection, SGD")
                vectors = bench.vectors(shapes)
            peak = "-"
            if not bench.dry:
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                fit.run_batch()
                peak = f"{(torch.cuda.max_memory_allocated() - held) / 2**20:.0f} MiB"
            vectors.norms()
            start = time.perf_counter()
            for _ in range(20):
                vectors.norms()
            host = (time.perf_counter() - start) / 20
            rows.append([f"{name}, {kind}", peak, f"{1e6 * host:.0f}"])
    compiled = sum(TritonKernels.seconds.values())
    head = ["", "peak of a step", "host µs per norms()"]
    return (
        table("", head, rows)
        + f"\n{len(TritonKernels.seconds)} programs compiled in {compiled:.0f} s.\n"
    )


class GPT2(nn.Module):
    """GPT-2 small, as far as a step's cost goes."""

    def __init__(self, layers: int = 12, width: int = 768, words: int = 50257) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        block = nn.TransformerEncoderLayer(
            width,
            width // 64,
            4 * width,
            0.0,
            F.gelu,
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.norm(self.blocks(self.words(x), mask, is_causal=True)) @ self.words.weight.T


def loss_of_words(net: nn.Module, batch: Tensor) -> Tensor:
    logits = net(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def training(bench: Bench) -> str:
    """Milliseconds of whole training steps in bfloat16 autocast."""
    rows = []
    for name, (make, loss, batch, params) in networks(bench).items():
        for label, callbacks in suites(params).items():
            row = [f"{name}: {label}"]
            for kind in bench.paths:
                with path(kind):
                    torch.manual_seed(0)
                    fit = Fit(
                        make(), sgd_fused, callbacks(), loss, batch, precision="bf16-mixed"
                    )  # fmt: skip
                    for _ in range(2 if bench.dry else 20):
                        fit.run_batch()
                    taken = []
                    for _ in range(bench.rounds):
                        fit.run_batch()
                        taken.append(fit.watch.whole)
                    row.append(f"{1e3 * statistics.median(taken):.2f}")
            rows.append(row)
    return table("", ["ms", *bench.paths], rows)


def suites(params: str) -> dict[str, Callable[[], list[Any]]]:
    """Callbacks by what the table calls them."""
    shrink = partial(AdaptiveWeightShrink, 1e-3, params=params)
    project = partial(RadialProjection, params=params)
    return {
        "bare": list,
        "monitor every 50": lambda: [cost.monitor(50)],
        "AWS": lambda: [shrink()],
        "projection": lambda: [project()],
        "all three": lambda: [shrink(), project(), cost.monitor(50)],
    }


# The last is which weights the rules act on: nothing normalizes those of a plain GPT-2.
Network = tuple[Callable[[], nn.Module], Any, Any, str]
MATRICES = "*linear*.weight"


def networks(bench: Bench) -> dict[str, Network]:
    if bench.dry:
        images = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
        words = torch.randint(0, 50, (2, 9))
        return {
            "residual net": (lambda: cost.resnet18(8), cost.loss_of_images, images, "auto"),
            "tiny GPT": (lambda: GPT2(1, 64, 50), loss_of_words, words, MATRICES),
        }
    pixels = torch.randn(64, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    images = pixels, torch.randint(0, 1000, (64,), device="cuda")
    found: dict[str, Network] = {
        "GPT-2 small": (
            lambda: GPT2().cuda(),
            loss_of_words,
            torch.randint(0, 50257, (8, 513), device="cuda"),
            MATRICES,
        )
    }
    if find_spec("timm") is not None:
        import timm  # type: ignore[import-not-found]

        def resnet() -> nn.Module:
            return timm.create_model("resnet50").cuda().to(memory_format=torch.channels_last)

        found["ResNet-50"] = resnet, cost.loss_of_images, images, "auto"
    return found


class Halves(nn.Module):
    """Two matrices, which tensor parallelism splits by columns and by rows; a LayerNorm behind
    them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(x))))


def tensor_parallel(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in net.children():
        halves = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tensor_parallel"], halves)


def model_parallel(data: int, tensors: int) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensors)


LAYOUTS: dict[str, tuple[Callable[[], Any], cost.Parallelize | None]] = {
    "DDP": (lambda: "ddp", None),
    "FSDP2": (partial(model_parallel, 2, 1), cost.fully_sharded),
    "TP": (partial(model_parallel, 1, 2), tensor_parallel),
}
ON_RANKS: dict[str, Callable[[], list[Any]]] = {
    "bare": list,
    "AWS": lambda: [AdaptiveWeightShrink(1e-3)],
    "projection": lambda: [RadialProjection()],
    "projection, cosine gate": lambda: [RadialProjection(gate="cosine")],
    "monitor, logging": lambda: [NormDynamicsMonitor(1, tables=False)],
}
LONGEST = 120.0
"""Seconds after which two ranks are taken to wait for each other."""


def several(bench: Bench) -> str:
    """Milliseconds of an optimizer step on two GPUs (NCCL), and how often its ranks communicate in
    it; without gradients, which strategies send before."""
    number = 2 if bench.dry else torch.cuda.device_count()
    if number < 2:
        return f"not run: it takes two GPUs, and there {'is one' if number else 'is none'}."
    rows = []
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_ranks(bench, (folder, layout, bench.dry, cost.free_port()))
                found = json.loads(Path(folder, "found.json").read_text())
            except Exception as error:  # the next layout may still tell something
                said = str(error).strip().splitlines() or [type(error).__name__]
                found = {"failed": [said[-1]]}
        for label, cells in found.items():
            rows.append([f"{layout}: {label}", *cells, *[""] * (len(bench.paths) + 1 - len(cells))])
    return table("", ["ms", *bench.paths, "collectives"], rows)


def run_ranks(bench: Bench, arguments: tuple[Any, ...]) -> None:
    """`on_rank` in two processes."""
    # A forked process cannot use a GPU that this one has used; a new one imports all anew.
    method = "fork" if bench.dry else "spawn"
    ranks = mp.start_processes(on_rank, arguments, nprocs=2, join=False, start_method=method)
    end = time.monotonic() + LONGEST
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"no answer after {LONGEST:.0f} s")
    finally:
        for process in ranks.processes:
            process.kill()


def on_rank(rank: int, folder: str, layout: str, dry: bool, port: int) -> None:
    """One of two ranks: time steps with each callback."""
    cost.as_ranks(rank, port)
    be_quiet()
    if dry:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    bench = Bench(dry)
    strategy, parallelize = LAYOUTS[layout]
    width, blocks = (8, 1) if dry else (1024, 8)
    found = {}
    for label, callbacks in ON_RANKS.items():
        cells = []
        for kind in bench.paths:
            torch.manual_seed(0)
            net = nn.Sequential(*[Halves(width) for _ in range(blocks)]).to(bench.device)
            batch = torch.randn(16, width, device=bench.device)
            with path(kind):
                fit = Fit(
                    net,
                    cost.sgd,
                    callbacks(),
                    cost.loss_of_squares,
                    batch,
                    parallelize=parallelize,
                    strategy=strategy(),
                    devices=2,
                )
                fit.keep_gradients()
                for _ in range(2 if dry else 20):
                    fit.run_batch()
                taken = []
                for _ in range(bench.rounds):
                    fit.run_batch()
                    taken.append(fit.watch.whole)
                wire = cost.Wire()
                fit.watch.around = wire.on
                fit.run_batch()
            cells.append(f"{1e3 * statistics.median(taken):.2f}")
        found[label] = [*cells, str(wire.calls)]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


SECTIONS: dict[str, tuple[str, Callable[[Bench], str]]] = {
    "tests": ("Tests on the device", tests),
    "exact": ("Against float64", exactness),
    "waits": ("Waits for the device", waits),
    "launches": ("Launches of a step", launches),
    "time": ("Primitives beside a copy of the same bytes", times),
    "steps": ("Optimizer steps", steps),
    "graphs": ("CUDA graphs", graphs),
    "resources": ("Memory, compilation, host", resources),
    "training": ("Training steps", training),
    "several": ("Two GPUs", several),
}

INTRODUCTION = """# On a GPU

Written by `make gpu` (`python benchmarks/gpu.py`), section by section. "torch" and "triton" are the
two kinds of kernels, as `NORMDYN_KERNELS` names them.
"""


def card(bench: Bench) -> str:
    where = "CPU, a dry run" if bench.dry else torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def parts_of(file: Path) -> dict[str, str]:
    """The sections that a file has, by title."""
    if not file.exists():
        return {}
    parts = file.read_text().split("\n## ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections")
    parser.add_argument("--again", action="store_true", help="also what the file has already")
    parser.add_argument("--out", type=Path, help="the file; of a dry run there is none otherwise")
    args = parser.parse_args()
    bench = Bench(args.dry_run or not torch.cuda.is_available())
    out: Path | None = args.out
    if out is None and not bench.dry:
        out = Path(__file__).with_suffix(".md")
    be_quiet()
    cost.time_brackets(bench.device)
    known = {} if out is None else parts_of(out)
    for key, (title, section) in SECTIONS.items():
        said = card(bench)
        is_there = known.get(title, "").startswith(said)
        if (args.only and key not in args.only) or (is_there and not (args.again or args.only)):
            continue
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                text = section(bench)
        except Exception:  # the next section may still tell something
            text = "failed:\n\n```\n" + traceback.format_exc()[-2000:] + "```"
        seconds = time.perf_counter() - start
        known[title] = f"{said}; {time.strftime('%Y-%m-%d')}; {seconds:.0f} s\n\n{text.strip()}"
        print(f"## {title}\n\n{known[title]}\n", flush=True)
        if out is not None:
            titles = [title for title, _ in SECTIONS.values() if title in known]
            sections = "\n".join(f"## {title}\n\n{known[title]}\n" for title in titles)
            out.write_text(f"{INTRODUCTION}\n{sections}")


if __name__ == "__main__":
    main()
