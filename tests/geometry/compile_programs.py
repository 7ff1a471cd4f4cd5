"""Compile every GPU program for two generations of GPUs, without one: fails where registers are
spilled, and where aligned rows are not read 16 bytes at once.

    python tests/geometry/compile_programs.py            # all dtypes
    python tests/geometry/compile_programs.py float32    # one, and the formulas of rules
    python tests/geometry/compile_programs.py rules      # these alone
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.callbacks.adaptive_weight_shrink import shrink_by_norm, shrink_by_std
from lightning_normdyn.callbacks.lr_drop_rescaling import dropped
from lightning_normdyn.callbacks.radial_brake import braked
from lightning_normdyn.callbacks.radial_projection import (
    gate_sums,
    shortened,
    shortened_by_buffer,
    shortened_by_totals,
)
from lightning_normdyn.callbacks.rotation_control import turned
from lightning_normdyn.callbacks.weight_decay import pulled
from lightning_normdyn.callbacks.weight_rescaling import rescaled
from lightning_normdyn.engine.effect import Rotation
from lightning_normdyn.geometry import kernel_choice, passes
from lightning_normdyn.geometry import triton_programs as programs
from lightning_normdyn.geometry.formulas import squares, take_with_totals, work_out
from lightning_normdyn.geometry.fusion import Number, Way, write_source
from lightning_normdyn.geometry.kernel_choice import KernelPath
from lightning_normdyn.geometry.pieces import Runs
from lightning_normdyn.geometry.triton_kernels import (
    SCALE_AND_ADD,
    SHORTENED,
    STRETCH,
    WARPS,
    TritonKernels,
)
from lightning_normdyn.geometry.triton_tables import ALIGNED, FIELDS
from lightning_normdyn.monitor.quantities import QUANTITIES
from lightning_normdyn.monitor.vector_numbers import collapsed, numbers_of_vectors

CAPABILITIES = (80, 90)
# A few stores to the stack are how the compiler keeps an address; a loop that spills has many.
MOST_SPILLS = 4
ALIGNED_LOAD = re.compile(r"ld\.global[\w.:]*\.v(4\.b32|2\.b64|8\.b16)")
BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
POINTERS = {
    "records": "*i64", "addresses": "*i64", "W": "i32", "out": "*fp64", "S": "i32",
    "slots": "*fp64", "starts": "*i32", "first": "*i32", "order": "*i32", "n": "i32", "vectors": "*i32",
    "factor": "*fp64", "places": "*i32", "message": "*fp64", "M": "i32", "coefficient": "*fp64", "stretch": "*fp64",
}  # fmt: skip
DTYPES = {
    "float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16, "float64": tl.float64,
}  # fmt: skip
SIGNS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bool: "*i1", torch.int64: "*i64"}

Case = tuple[str, Any, dict[str, str], dict[str, Any]]


def sums_and_writes(name: str) -> Iterator[Case]:
    dtype = DTYPES[name]
    wide = [tl.float64] if name == "float64" else [tl.float32, tl.float64]
    # All kinds of tiles in one program take ten times as long to compile: the longest is enough.
    for kinds in [1 << ALIGNED, 15] if name == "float32" else [1 << ALIGNED]:
        common = {"FIELDS": FIELDS, "KINDS": kinds}
        for accumulated in wide:
            for b, moved, ones, copy, sent in (
                (None, False, False, False, False),
                (None, False, True, False, False),
                (dtype, False, False, False, False),
                (dtype, False, True, False, False),
                (dtype, False, False, True, False),
                (dtype, True, False, False, False),
                (dtype, True, False, False, True),
            ):
                constants = {
                    "A": dtype, "B": b, "MOVED": moved, "ONES": ones, "COPY": copy,
                    "SUM": accumulated, **common,
                }  # fmt: skip
                if not sent:
                    constants |= {"places": None, "message": None}
                text = f"sums {name} in {accumulated}, tiles {kinds}, {b is not None, moved, ones, sent}"
                if kinds == 1 << ALIGNED or moved:
                    yield text, programs.sums, POINTERS, constants
        number = tl.float64 if name == "float64" else tl.float32
        for mode, given in (
            (SCALE_AND_ADD, ("factor",)),
            (SCALE_AND_ADD, ("coefficient",)),
            (SCALE_AND_ADD, ("factor", "coefficient")),
            (STRETCH, ("factor", "stretch")),
            (STRETCH, ("factor", "coefficient", "stretch")),
            (SHORTENED, ("coefficient",)),
        ):
            numbers = {n: None for n in ("factor", "coefficient", "stretch") if n not in given}
            x = None if given == ("factor",) else dtype
            constants = {
                "Y": dtype, "X": x, "Z": False, "MODE": mode, "NUM": number, **common, **numbers,
            }  # fmt: skip
            if kinds == 1 << ALIGNED or mode == STRETCH:
                text = f"write {name}, tiles {kinds}, {given}"
                yield text, programs.write, POINTERS, constants


def rules() -> Iterator[Case]:
    for vectors, slots in ((64, 16), (8, 128), (1, 1024)):
        constants = {"ROOT": False, "V": vectors, "B": slots}
        yield f"combine {vectors} x {slots}", programs.combine, POINTERS, constants
    n = torch.ones(2, dtype=torch.float64)
    flags, skipped = torch.ones(2, dtype=torch.bool), torch.zeros(())
    weight_of = torch.zeros(2, dtype=torch.int64)
    guards = flags, flags, skipped
    held = Rotation(0.01, "exact", "hold", "initial", "sqrt_lr", 0.0, True)
    smooth = Rotation("lr", "at_most", "free", "initial", "lr", 0.9, True)
    fields = n, n, n, n, n, n, n, n, n, flags, n, flags, n, n, n
    names = tuple(name for name, quantity in QUANTITIES.items() if quantity.formula is not None)
    for formula, sums, arguments, *adding in (
        (shrink_by_norm, 1, (n, 0.1, n, *guards)),
        (shrink_by_std, 2, (flags, n, n, 0.1, n, *guards)),
        (shortened, 2, (n, n, 1.0, flags, *guards)),
        (shortened_by_buffer, 3, (n, n, 1.0, flags, *guards)),
        (shortened_by_totals, 2, (weight_of, 0.1, *[n] * 7, n, n, 1.0, flags, *guards)),
        (gate_sums, 3, (n, 0.1)),
        (gate_sums, 3, (n, 0.1), "adds"),
        (rescaled, 1, (n, *guards)),
        (dropped, 0, (n, weight_of, *guards)),
        (braked, 3, (0.5, 1.0, "norm", n, n, *guards)),
        (braked, 3, (0.5, 1.0, "radial", n, n, *guards)),
        (pulled, 0, (n, n, flags, n, *guards)),
        (turned, 3, (held, n, n, None, None, n, *guards, HELD, n, n, n)),
        (turned, 3, (smooth, n, None, n, flags, n, *guards, SMOOTHED, n, n)),
        (numbers_of_vectors, 0, (names, Number(3), n, n, flags, *fields)),
        (collapsed, 0, (n, n, weight_of, 1e-3, flags)),
    ):
        totals, adds = formula is gate_sums, bool(adding)
        way = Way(sums > 0 and not adds, totals, adds)
        source = write_source(formula, sums, arguments, way)
        name = f"<{formula.__name__} {len(arguments)}>"
        program = programs.program_of(source.text, name, source.numbers)
        given = [argument for argument in arguments if isinstance(argument, (torch.Tensor, Number))]
        types = {}
        for i, argument in enumerate(given):
            types[f"i{i}"] = "i64" if isinstance(argument, Number) else SIGNS[argument.dtype]
        for i, dtype in enumerate(source.dtypes):
            types[f"o{i}"] = "*fp64" if totals else SIGNS[dtype]
        sizes = {"V": 1024, "B": 1} if totals else {"V": 64, "B": 16}
        yield formula.__name__, program, POINTERS | types, sizes


HELD = ("initial_norm", "log_scale", "lr_max")
SMOOTHED = ("mean_square_tangent", "averaged_steps")


def compiled(program: Any, types: dict[str, str], constants: dict[str, Any], capability: int):
    names = program.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=program, signature=signature, constexprs=values)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS}
    )


def spills(kernel: Any) -> int:
    """Stores to the stack: what ``cuobjdump`` calls local memory does not show them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [BINARIES / "nvdisasm", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text
    return len(re.findall(r"\bSTL", text))


class NoGPU:
    """Stands for a driver, as far as a program is compiled and not run."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITIES[-1], 32)


def squares_and_lengths(ww: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ww, length


def as_they_are_launched() -> None:
    """The same way to the compiler that a launch takes, with its own arguments."""
    triton.runtime.driver.set_active(NoGPU())
    kernel_choice.choose = lambda *_: KernelPath("triton", "compiled only")
    names = []

    def launch(self, program, launches):
        for grid, arguments, constants in launches:
            kernel = program.warmup(*arguments, *constants, num_warps=WARPS, grid=grid)
            assert "cubin" in kernel.asm
            names.append(program.__name__)

    TritonKernels._launch = launch
    weights = [torch.ones(8, 256), torch.ones(8, 64, dtype=torch.bfloat16)]
    vectors = WeightVectors(weights, [Partition.filters((8, 256)), Partition.filters((8, 64))])
    n = torch.ones(vectors.n, dtype=torch.float64)
    flags = torch.zeros(vectors.n, dtype=torch.bool)
    before = [weight.clone() for weight in weights]
    vectors.norms()
    vectors.displacement(before)
    vectors.remove_radial_(before, n)
    vectors.scale_(n.float())
    vectors.stretch_(before, n, n)
    vectors.decay_shortened_(n, before)
    numbers = n, Number(0.1), n, flags, None, torch.zeros(())
    work_out(vectors, shrink_by_norm, squares(vectors), numbers, into=(None, flags))
    take_with_totals(vectors, squares(vectors), squares_and_lengths)
    vectors.totals(n)
    # What ranks send each other, written with the sums; and totals onto what has come.
    sent = Runs(torch.tensor([0, 9]), torch.tensor([1, 2]), 40)
    vectors._kernels.slots_to_send(passes.SQUARES, [weights], sent)
    vectors._kernels.totals(
        squares_and_lengths, n[None], [n], vectors.starts,
        from_slots=False, into=torch.ones(2, 2, dtype=torch.float64), adds=True,
    )  # fmt: skip
    print("as they are launched:", names)
    assert {"sums", "combine", "write", "rule"} == set(names)


def main(dtypes: list[str]) -> None:
    print(f"triton {triton.__version__}")
    for capability in CAPABILITIES:
        cases = [case for name in dtypes if name in DTYPES for case in sums_and_writes(name)]
        # Rules know no dtype of weights.
        if "float32" in dtypes or dtypes == ["rules"]:
            cases += rules()
        for text, program, types, constants in cases:
            start = time.perf_counter()
            kernel = compiled(program, types, constants, capability)
            seconds = time.perf_counter() - start
            stores = spills(kernel)
            print(f"sm_{capability} {seconds:5.1f} s  {stores} spills  {text}", flush=True)
            assert stores <= MOST_SPILLS, f"{text} spills"
            is_aligned = constants.get("KINDS", 0) & (1 << ALIGNED)
            has_wide_loads = bool(ALIGNED_LOAD.search(kernel.asm["ptx"]))
            assert has_wide_loads or not is_aligned, f"{text} loads entry by entry"
    # It has weights of two dtypes of its own.
    if "float32" in dtypes:
        as_they_are_launched()


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    main(sys.argv[1:] or list(DTYPES))
