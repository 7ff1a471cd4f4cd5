"""The GPU programs of `lightning_normdyn.geometry.triton_kernels`, in Triton's language.

A *row* is a run of entries of one weight that belong to one vector. A *program* takes a few rows,
or part of a long one; its *record* (`lightning_normdyn.geometry.triton_tables.FIELDS`) says where
they lie, relative to where the weight begins. What a program sums goes to *slots* of its own, and
each vector's slots are added up in a fixed order. So nothing depends on which program is done first
(no atomics): the same bits every time.

This file and the one that it imports know nothing else of the package and are imported only where
Triton will run: to import Triton takes half a second, and not everybody has it. Where it is missing
they can still be read (by a test runner, for instance), but nothing in them can be called.

Letters: n vectors, W weights, S slots, K sums; a, b operands of sums; y a weight that is written,
x what is added to it; c the coefficient of x, and a copy.
"""

# What is known when a program is compiled and what is not are two conditions: joined by `and`, both
# would be worked out on the GPU.
# ruff: noqa: SIM102

from __future__ import annotations

import linecache
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import triton_functions
from .triton_functions import program as _program

with suppress(ImportError):  # macOS, Windows
    import triton.language as tl


# ---- Where the entries of a program lie ----


@_program
def _read_record(record, V: tl.constexpr):
    """Offset of the first entry; from row to row; rows; entries in a run; from entry to entry; from
    run to run. Within a program offsets fit 32 bits.

    With V > 1 entries are neighbours, and every row and run begins and ends at a multiple of V.
    """
    base, step, rows = tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    run, inner, outer = tl.load(record + 4), tl.load(record + 5), tl.load(record + 7)
    inner, step = inner.to(tl.int32), step.to(tl.int32)
    rows, run = rows.to(tl.int32), run.to(tl.int32)
    if V > 1:
        # Told, and not worked out: only so does the compiler load 16 bytes at once.
        base, step = tl.multiple_of(base, V), tl.multiple_of(step, V)
        run, outer = tl.multiple_of(run, V), tl.multiple_of(outer, V)
        inner = 1
    return base, step, rows, run, inner, outer


@_program
def _pointer(
    address,
    base,
    T: tl.constexpr,
    V: tl.constexpr,
):
    pointer = address.to(tl.pointer_type(T))
    if V > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + base


# ---- Sums ----


@_program
def _put(
    record,
    sums,
    rows,
    out,
    S,
    places,
    message,
    M,
    NUMBER: tl.constexpr,
    R: tl.constexpr,
):
    """The sum of each row to a slot of its own, or all to one slot if the rows are of one vector;
    where a message is sent, also to its place there. ``NUMBER``: of the K kinds of sums."""
    sums = sums.to(tl.float64)
    slot, merged = tl.load(record + 9), tl.load(record + 11) != 0
    i = tl.arange(0, R)
    value = tl.where(merged, tl.sum(sums, 0), sums)
    mine = i < tl.where(merged, 1, rows)
    tl.store(out + NUMBER * S.to(tl.int64) + slot + i, value, mask=mine)
    if message is not None:
        place = tl.load(places + slot + i, mask=mine, other=-1)
        tl.store(message + NUMBER * M.to(tl.int64) + place, value, mask=place >= 0)


@_program
def _sum_tile(
    record, a, b, c, out, S, places, message, M,
    A: tl.constexpr, B: tl.constexpr, MOVED: tl.constexpr, ONES: tl.constexpr, COPY: tl.constexpr,
    SUM: tl.constexpr, R: tl.constexpr, E: tl.constexpr, TALL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, R)[None, :] if TALL else tl.arange(0, R)[:, None]
    e = tl.arange(0, E)[:, None] if TALL else tl.arange(0, E)[None, :]
    base, step, rows, run, inner, outer = _read_record(record, V)
    # What is not there counts as zeros: none of its entries are within bounds.
    pa = _pointer(a, base, A, V)
    in_a = tl.multiple_of(tl.where(a != 0, run, 0), V)
    if B is not None:
        pb = _pointer(b, base, B, V)
        in_b = tl.multiple_of(tl.where(b != 0, run, 0), V)
    if COPY:
        pc = _pointer(c, base, A, V)
        in_c = tl.multiple_of(tl.where(c != 0, in_a, 0), V)
    aa = tl.zeros([E, R], dtype=SUM) if TALL else tl.zeros([R, E], dtype=SUM)
    ab, bb, a1 = aa, aa, aa
    turns = tl.load(record + 6)
    for _ in range(0, turns):
        for at in range(0, run, E):
            off = r * step + (at + e) * inner
            stored = tl.load(pa + off, mask=(r < rows) & (at + e < in_a), other=0.0)
            if COPY:
                tl.store(pc + off, stored, mask=(r < rows) & (at + e < in_c))
            x = stored.to(SUM)
            aa += x * x
            if ONES:
                a1 += x
            if B is not None:
                y = tl.load(pb + off, mask=(r < rows) & (at + e < in_b), other=0.0).to(SUM)
                if MOVED:
                    # The difference first: of the difference of two sums nothing would be left.
                    y -= x
                ab += x * y
                bb += y * y
        pa += outer
        if B is not None:
            pb += outer
        if COPY:
            pc += outer
    AXIS: tl.constexpr = 0 if TALL else 1
    _put(record, tl.sum(aa, AXIS), rows, out, S, places, message, M, 0, R)
    if B is not None:
        _put(record, tl.sum(ab, AXIS), rows, out, S, places, message, M, 1, R)
        _put(record, tl.sum(bb, AXIS), rows, out, S, places, message, M, 2, R)
    if ONES:
        LAST: tl.constexpr = 1 if B is None else 3
        _put(record, tl.sum(a1, AXIS), rows, out, S, places, message, M, LAST, R)


@_program(do_not_specialize=["W", "S", "M"])
def sums(
    records, addresses, W, out, S, places, message, M,
    A: tl.constexpr, B: tl.constexpr, MOVED: tl.constexpr, ONES: tl.constexpr, COPY: tl.constexpr,
    SUM: tl.constexpr, FIELDS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """K sums of every row: <a, a>; with b <a, b> and <b, b> (b - a in place of b if ``MOVED``);
    with ``ONES`` <1, a>; with ``COPY`` a is copied to c on the way.

    With ``message`` those of the slots that ``places`` names are written there as well, so that
    ranks can send it as it is.
    """
    record = records + tl.program_id(0) * FIELDS
    weight, kind = tl.load(record), tl.load(record + 10)
    a = tl.load(addresses + weight)
    b, c = a, a
    if B is not None:
        b = tl.load(addresses + W + weight)
        if MOVED:  # a weight of which there is no copy has not moved
            a, b = tl.where(b != 0, a, 0), tl.where(a != 0, b, 0)
    if COPY:
        c = tl.load(addresses + (1 if B is None else 2) * W + weight)
    # A storage may begin anywhere: then its rows are not aligned, whatever their strides.
    kind = tl.where((kind == 3) & (((a | b | c) & 15) != 0), 1, kind)
    if KINDS & 1:
        if kind == 0:
            _sum_tile(
                record, a, b, c, out, S, places, message, M,
                A, B, MOVED, ONES, COPY, SUM, 32, 32, False, 1,
            )  # fmt: skip
    if KINDS & 10:
        if kind == 1:
            _sum_tile(
                record, a, b, c, out, S, places, message, M,
                A, B, MOVED, ONES, COPY, SUM, 4, 256, False, 1,
            )  # fmt: skip
    if KINDS & 4:
        if kind == 2:
            _sum_tile(
                record, a, b, c, out, S, places, message, M,
                A, B, MOVED, ONES, COPY, SUM, 32, 32, True, 1,
            )  # fmt: skip
    if KINDS & 8:
        if kind == 3:
            WIDE: tl.constexpr = 128 // A.primitive_bitwidth
            _sum_tile(
                record, a, b, c, out, S, places, message, M,
                A, B, MOVED, ONES, COPY, SUM, 4, 256, False, WIDE,
            )  # fmt: skip


@_program
def _total(
    slots,
    order,
    low,
    high,
    V: tl.constexpr,
    B: tl.constexpr,
):
    """What the slots ``order[low .. high - 1]`` hold, added up in that order."""
    total = tl.zeros([V, B], dtype=tl.float64)
    for at in range(0, tl.max(high - low, 0), B):
        i = low[:, None] + at + tl.arange(0, B)[None, :]
        there = i < high[:, None]
        slot = tl.load(order + i, mask=there, other=0)
        total += tl.load(slots + slot, mask=there, other=0.0)
    return tl.sum(total, 1)


@_program(do_not_specialize=["S", "n"])
def combine(
    slots,
    S,
    first,
    order,
    n,
    out,
    ROOT: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
):
    """The sums of every vector, ``(K, n)``, or their square roots."""
    v = tl.program_id(0) * V + tl.arange(0, V)
    k = tl.program_id(1).to(tl.int64)
    low = tl.load(first + v, mask=v < n, other=0)
    high = tl.load(first + v + 1, mask=v < n, other=0)
    total = _total(slots + k * S, order, low, high, V, B)
    if ROOT:
        total = tl.sqrt(total)
    tl.store(out + k * n + v, total, mask=v < n)


# ---- Writes ----


@_program
def _new_values(
    old, x, rest, near, c, stretch, SCALES: tl.constexpr, X: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    if MODE == 2:
        # What has not moved away from 0 since x.
        return old - tl.where((old - x) * x <= 0.0, c * x, 0.0)
    if MODE == 1:
        # The difference first: a large stretch would multiply the rounding of two products.
        step = old - x
        old = tl.where(tl.abs(stretch) < 0.5, x + stretch * step, old - (1.0 - stretch) * step)
    new = old
    if SCALES:
        new = tl.where(near, old + rest * old, rest * old)
    if X is not None:
        new += c * x
    return new


@_program
def _write_tile(
    record, y, x, z, vectors, factor, coefficient, stretch,
    Y: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, MODE: tl.constexpr, NUM: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, TALL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, R)
    r = i[None, :] if TALL else i[:, None]
    e = tl.arange(0, E)[:, None] if TALL else tl.arange(0, E)[None, :]
    base, step, rows, run, inner, outer = _read_record(record, V)
    vector = tl.load(vectors + tl.load(record + 8) + i, mask=i < rows, other=-1)
    f = tl.full([R], 1.0, tl.float64)
    c, s = f - 1.0, f
    if factor is not None:
        f = tl.load(factor + vector, mask=vector >= 0, other=1.0).to(tl.float64)
    if coefficient is not None:
        c = tl.load(coefficient + vector, mask=vector >= 0, other=0.0).to(tl.float64)
    if MODE == 1:
        s = tl.load(stretch + vector, mask=vector >= 0, other=1.0).to(tl.float64)
    # A factor near 1 is applied as y + (f - 1) y: rounded to the weight's own precision, f would be
    # off by more than its distance to 1.
    near = (f >= 0.5) & (f <= 2.0)
    acts = (f != 1.0) | (c != 0.0) | (s != 1.0)
    rest = tl.where(near, f - 1.0, f).to(NUM)
    c, s = c.to(NUM), s.to(NUM)
    if TALL:
        near, rest, acts = near[None, :], rest[None, :], acts[None, :]
        c, s = c[None, :], s[None, :]
    else:
        near, rest, acts = near[:, None], rest[:, None], acts[:, None]
        c, s = c[:, None], s[:, None]
    py, there = _pointer(y, base, Y, V), tl.where(y != 0, run, 0)
    if X is not None:
        px, there = _pointer(x, base, X, V), tl.where(x != 0, there, 0)
    if Z:
        pz = _pointer(z, base, Y, V)
    there, turns = tl.multiple_of(there, V), tl.load(record + 6)
    for _ in range(0, turns):
        for at in range(0, run, E):
            off = r * step + (at + e) * inner
            mine = (r < rows) & (at + e < there)
            old = tl.load(py + off, mask=mine if Z else mine & acts, other=0.0).to(NUM)
            added = old
            if X is not None:
                added = tl.load(px + off, mask=mine & acts, other=0.0).to(NUM)
            new = _new_values(
                old, added, rest, near, c, s, factor is not None, X, MODE
            )  # fmt: skip
            tl.store(py + off, new.to(Y), mask=mine & acts)
            if Z:  # also what is left alone is copied
                tl.store(pz + off, tl.where(acts, new, old).to(Y), mask=mine)
        py += outer
        if X is not None:
            px += outer
        if Z:
            pz += outer


@_program(do_not_specialize=["W"])
def write(
    records, addresses, W, vectors, factor, coefficient, stretch,
    Y: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, MODE: tl.constexpr, NUM: tl.constexpr,
    FIELDS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """``MODE`` 0: y <- factor y + c x. 1: y <- factor (x + stretch (y - x)) + c x. 2: y <- y - c x
    at entries that have not moved away from 0 since x. With ``Z`` a copy of what came of it.

    Rows that this leaves as they are are not touched.
    """
    record = records + tl.program_id(0) * FIELDS
    weight, kind = tl.load(record), tl.load(record + 10)
    y = tl.load(addresses + weight)
    x, z = y, y
    if X is not None:
        x = tl.load(addresses + W + weight)
    if Z:
        z = tl.load(addresses + (1 if X is None else 2) * W + weight)
    kind = tl.where((kind == 3) & (((y | x | z) & 15) != 0), 1, kind)
    if KINDS & 1:
        if kind == 0:
            _write_tile(
                record, y, x, z, vectors, factor, coefficient, stretch,
                Y, X, Z, MODE, NUM, 32, 32, False, 1,
            )  # fmt: skip
    if KINDS & 10:
        if kind == 1:
            _write_tile(
                record, y, x, z, vectors, factor, coefficient, stretch,
                Y, X, Z, MODE, NUM, 4, 256, False, 1,
            )  # fmt: skip
    if KINDS & 4:
        if kind == 2:
            _write_tile(
                record, y, x, z, vectors, factor, coefficient, stretch,
                Y, X, Z, MODE, NUM, 32, 32, True, 1,
            )  # fmt: skip
    if KINDS & 8:
        if kind == 3:
            WIDE: tl.constexpr = 128 // Y.primitive_bitwidth
            _write_tile(
                record, y, x, z, vectors, factor, coefficient, stretch,
                Y, X, Z, MODE, NUM, 4, 256, False, WIDE,
            )  # fmt: skip


# ---- Formulas ----


def program_of(text: str, name: str, numbers: Sequence[str] = ()) -> Any:
    """The program ``rule`` that is written in ``text``
    (`lightning_normdyn.geometry.fusion.write_source`).

    Args:
        text: its source.
        name: under which the source can be looked up, as if it were a file.
        numbers: arguments whose values say nothing: without that, 1 and multiples of 16 would be
            compiled anew.
    """
    # Triton reads the source of a function where Python finds it for a traceback.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"tl": tl, "_total": _total, "__name__": __name__}
    for function in ("atan2", "atan", "sin", "tan", "log1p", "whole_power"):
        namespace[function] = getattr(triton_functions, function)
    exec(compile(text, name, "exec"), namespace)
    return _program(do_not_specialize=["S", "n", *numbers])(namespace["rule"])
