"""The GPU programs against brute force in float64 and against torch's kernels, on every layout.

Run by `test_triton_kernels.py` in a process of its own, in Triton's interpreter; on a GPU with
``NORMDYN_TEST_DEVICE=cuda`` (``make gpu``).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from kinds import by_vector, labels_of, randn
from layouts import LAYOUTS, TILES, in_memory
from torch import Tensor, nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.functional import angle_from_sums, std_from_sums
from lightning_normdyn.geometry import passes
from lightning_normdyn.geometry.formulas import (
    Taken,
    largest_of,
    radial_part_of_step,
    squares,
    take_with_totals,
    work_out,
)
from lightning_normdyn.geometry.fusion import Number
from lightning_normdyn.geometry.kernels import Kernels
from lightning_normdyn.geometry.pieces import Runs
from lightning_normdyn.geometry.triton_kernels import MOST_PROGRAMS, TritonKernels

# The interpreter computes with numpy: what overflows or is no number there is no news.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = os.environ.get("NORMDYN_TEST_DEVICE", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cases() -> list:
    """Every layout in every dtype; one layout per kind of tile, in two dtypes, is quick."""
    params = []
    for dtype in DTYPES:
        for name in LAYOUTS:
            is_quick = name in TILES and dtype in DTYPES[:2]
            marks = [] if is_quick else [pytest.mark.slow]
            params.append(pytest.param(name, dtype, marks=marks, id=f"{name}-{dtype}"))
    return params


everywhere = pytest.mark.parametrize(("name", "dtype"), cases())


def vectors_of(*weights: Tensor, names: list[str]) -> WeightVectors:
    vectors = WeightVectors(list(weights), [LAYOUTS[name][1] for name in names])
    assert vectors.kernel_path.name == "triton"
    return vectors


def torch_kernels(vectors: WeightVectors) -> Kernels:
    hidden = [None] * len(vectors.weights)
    return Kernels(vectors._index, vectors.values(), hidden, vectors.device)


def moved_to_device(weight: Tensor, dtype: torch.dtype) -> Tensor:
    here = in_memory(weight, dtype)
    return torch.empty_strided(here.shape, here.stride(), dtype=dtype, device=DEVICE).copy_(here)


def another(weight: Tensor, seed: int = 0) -> Tensor:
    """Other numbers, laid out alike."""
    numbers = randn(*weight.shape, 1 + seed)[..., 0] + 0.3
    other = torch.empty_strided(
        weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
    )
    return other.copy_(numbers)


def per_vector(function, partition: Partition, *tensors: Tensor) -> Tensor:
    """``function`` of the entries of each vector of all ``tensors``, in float64: ``(n,)``."""
    split = [by_vector(tensors[0].cpu(), partition, t.cpu()) for t in tensors]
    values = [float(function(*parts)) for parts in zip(*split, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def spread(values: Tensor, labels: Tensor, default: float) -> Tensor:
    """One number per vector for each of its entries."""
    extended = torch.cat([values.cpu(), values.new_full((1,), default).cpu()])
    return extended.double()[labels]


@everywhere
def test_sums(name, dtype):
    partition = LAYOUTS[name][1]
    a = moved_to_device(LAYOUTS[name][0], dtype)
    b = another(a)
    kernels = vectors_of(a, names=[name])._kernels

    aa = per_vector(lambda x, y: x @ x, partition, a, b)
    ab = per_vector(lambda x, y: x @ y, partition, a, b)
    bb = per_vector(lambda x, y: y @ y, partition, a, b)
    a1 = per_vector(lambda x, y: x.sum(), partition, a, b)
    pairs = [([a], [a]), ([a], [b]), ([b], [b]), ([a], None)]
    expected = torch.stack([aa, ab, bb, a1])
    longest = max([1, *partition.lengths(tuple(a.shape), None).tolist()])

    exact = kernels.products(pairs, exact=True).cpu()
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12 * longest)

    # In the operands' own precision: off by their rounding, of the product of the two lengths.
    small = 1e-12 if dtype == torch.float64 else 3e-7
    own = kernels.products(pairs[:3], exact=False).cpu()
    room = small * torch.stack([aa, (aa * bb).sqrt(), bb])
    assert ((own - expected[:3]).abs() <= room).all()
    assert torch.equal(own, kernels.products(pairs[:3], exact=False).cpu())

    # Asked for in another order, and fewer of them; with a copy on the way.
    copy = another(b, 1)
    some = kernels.products([pairs[2], pairs[0]], exact=False, copy=([b], [copy])).cpu()
    assert torch.equal(some, own[[2, 0]])
    assert torch.equal(copy, b)


@everywhere
def test_norms_and_moments(name, dtype):
    partition = LAYOUTS[name][1]
    weight = moved_to_device(LAYOUTS[name][0], dtype)
    vectors = vectors_of(weight, names=[name])
    norms = per_vector(torch.linalg.vector_norm, partition, weight)
    small = 1e-12 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(vectors.norms().cpu(), norms, rtol=small, atol=0)
    ww, w1 = vectors.moments([weight])
    std = std_from_sums(ww, w1, vectors.length).cpu()
    expected = per_vector(lambda x: x.std(unbiased=False), partition, weight)
    torch.testing.assert_close(std, expected, rtol=1e-9, atol=1e-9)


@everywhere
def test_writes(name, dtype):
    partition = LAYOUTS[name][1]
    weight = moved_to_device(LAYOUTS[name][0], dtype)
    stride = weight.stride()
    other = another(weight)
    vectors = vectors_of(weight, names=[name])
    labels = labels_of(weight.cpu(), partition)
    generator = torch.Generator().manual_seed(7)
    factor, coefficient, stretch = torch.rand(
        3, vectors.n, generator=generator, dtype=torch.float64
    ).mul(2)
    if vectors.n > 1:
        factor[0], coefficient[-1] = 1.0, 0.0
    f = spread(factor, labels, 1.0)
    c = spread(coefficient, labels, 0.0)
    s = spread(stretch, labels, 1.0)
    x = other.cpu().double()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal

    def check(write, formula, magnitude, ulps):
        """What ``write`` does is ``formula`` of the entries, rounded; others stay."""
        before = weight.detach().clone().cpu()
        version = weight._version
        write()
        # An optimizer's step is told by versions, so each write must count.
        assert weight._version > version
        after = weight.cpu().double()
        y = before.double()
        room = ulps * eps * magnitude(y) + tiny
        expected = formula(y)
        assert ((after - expected).abs() <= room)[labels >= 0].all()
        assert torch.equal(weight.cpu()[labels < 0], before[labels < 0])

    device = vectors.device
    to = lambda number: number.to(device)  # noqa: E731
    check(lambda: vectors.scale_(to(factor)), lambda y: f * y, lambda y: (f * y).abs(), 1)
    check(
        lambda: vectors.add_scaled_(to(coefficient), [other]),
        lambda y: y + c * x,
        lambda y: y.abs() + (c * x).abs(),
        1.5,
    )
    check(
        lambda: vectors.stretch_([other], to(stretch), to(factor)),
        lambda y: f * (x + s * (y - x)),
        lambda y: (f * (x.abs() + s * (y - x).abs())) + y.abs(),
        2,
    )
    check(
        lambda: vectors.stretch_([other], to(stretch), to(factor), to(coefficient)),
        lambda y: f * (x + s * (y - x)) + c * x,
        lambda y: (f * (x.abs() + s * (y - x).abs())) + y.abs() + (c * x).abs(),
        2,
    )
    shrinks = lambda y: (y - x) * x <= 0  # noqa: E731
    check(
        lambda: vectors.decay_shortened_(to(coefficient), [other]),
        lambda y: torch.where(shrinks(y), y - c * x, y),
        lambda y: y.abs() + (c * x).abs(),
        1.5,
    )
    assert weight.stride() == stride


@everywhere
def test_projections_are_those_of_torch(name, dtype):
    start = moved_to_device(LAYOUTS[name][0], dtype)
    step = another(start)
    weight = start.clone(memory_format=torch.preserve_format)
    weight.add_(step, alpha=-0.01)
    vectors = vectors_of(weight, names=[name])
    n = vectors.n
    share = torch.full((n,), 0.003, dtype=torch.float64, device=DEVICE)
    active = torch.arange(n, device=DEVICE) % 3 != 0
    length = torch.full((n,), -0.01, dtype=torch.float64, device=DEVICE)
    own = vectors._kernels
    moved = weight.clone(memory_format=torch.preserve_format)
    room = 4 * torch.finfo(dtype).eps * float(moved.abs().max())
    told = 1e-6 if dtype in (torch.float32, torch.float64) else 0.05
    # Which vectors take part is a matter of numbers per vector, and not of where they lie.
    for active_or_all in (active, None) if name in TILES else (active,):
        changed, removed = [], []
        for kernels in (own, torch_kernels(vectors)):
            vectors._kernels = kernels
            weight.copy_(moved)
            removed.append(vectors.remove_radial_([start], share, active_or_all).cpu())
            changed.append(weight.clone())
            weight.copy_(moved)
            by_step, ratio = vectors.remove_radial_of_([step], length, share, active_or_all)
            removed += [by_step.cpu(), ratio.cpu()]
            changed.append(weight.clone())
        torch.testing.assert_close(changed[0], changed[2], rtol=0, atol=room)
        torch.testing.assert_close(changed[1], changed[3], rtol=0, atol=room)
        for mine, theirs in zip(removed[:3], removed[3:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=told, atol=1e-6 if told < 0.01 else 1e-3)


def true_angle(a: Tensor, b: Tensor) -> Tensor:
    """Of what is left of b beside a, which loses no digits however small it is."""
    beside = b - a * (a @ b) / (a @ a)
    return torch.atan2(beside.norm() * a.norm(), a @ b)


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("growth", [0.5, 1.001, 20.0])
@pytest.mark.parametrize(
    "name",
    [
        "rows of 129",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ["conv channels_last", "columns", "rows of 8500", "layer of 9000"]
        ),
    ],
)
def test_angles_beside_a_change_of_the_norm(name, turn, growth):
    """Sums are right to 1e-12; an angle of 1e-6 rad is the difference of two that agree in 12
    digits."""
    before = moved_to_device(LAYOUTS[name][0], torch.float32)
    partition = LAYOUTS[name][1]
    weight = (before + turn * another(before)).mul_(growth)
    after = torch.empty_like(before).copy_(weight)
    ww, wd, dd = vectors_of(after, names=[name]).displacement([before])
    exact_ww = per_vector(lambda a, b: a @ a, partition, before, after)
    exact_wd = per_vector(lambda a, b: a @ (b - a), partition, before, after)
    exact_dd = per_vector(lambda a, b: (b - a) @ (b - a), partition, before, after)
    expected = per_vector(true_angle, partition, before, after)
    measured = angle_from_sums(ww, wd, dd).cpu()
    torch.testing.assert_close(measured, expected, rtol=5e-4 if turn < 1e-5 else 1e-6, atol=0)
    size = (exact_ww * exact_dd).sqrt()
    assert ((wd.cpu() - exact_wd).abs() <= 1e-12 * size).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_vectors_that_are_zero_or_not_finite(dtype):
    before = randn(6, 40).to(dtype).to(DEVICE)
    before[0] = 0
    after = before.clone()
    after[0] = 1
    after[1] = 0
    after[2, 3] = torch.inf
    after[3, 3] = torch.nan
    after[5] *= 1.5
    weight = nn.Parameter(after.clone())
    vectors = WeightVectors([weight], [Partition.filters((6, 40))])
    assert vectors.norms().isfinite().tolist() == [True, True, False, False, True, True]
    angles = angle_from_sums(*vectors.displacement([before]))
    assert angles[:4].isnan().all()
    assert float(angles[4]) == 0
    share = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        removed = vectors.remove_radial_([before], share)
    assert removed.isfinite().tolist() == [True, True, False, False, True, True]
    # Neither vector has become anything else: what is not finite is left alone.
    kept = weight.detach()[2:5].nan_to_num(7, 8, 9)
    assert torch.equal(kept, after[2:5].nan_to_num(7, 8, 9))


@pytest.mark.parametrize("offset", range(4))
def test_a_storage_may_begin_anywhere(offset):
    """Rows that would be aligned otherwise."""
    memory = torch.zeros(6 * 512 + 4, device=DEVICE)
    weight = memory[offset : offset + 6 * 512].view(6, 512)
    weight.copy_(randn(6, 512))
    vectors = WeightVectors([weight], [Partition.filters((6, 512))])
    expected = weight.double().norm(dim=1)
    torch.testing.assert_close(vectors.norms(), expected, rtol=3e-7, atol=0)
    halves = weight * 0.5
    vectors.scale_(torch.full((6,), 0.5, dtype=torch.float64, device=DEVICE))
    assert torch.equal(weight, halves)
    assert not memory[:offset].any()
    assert not memory[offset + 6 * 512 :].any()


def test_weights_of_all_kinds_and_dtypes_together():
    names = list(TILES) * 2
    weights = []
    for i, name in enumerate(names):
        weights.append(nn.Parameter(moved_to_device(LAYOUTS[name][0], DTYPES[i % 4])))
    vectors = vectors_of(*weights, names=names)
    assert len(vectors._kernels._tables.parts) == 4
    values = vectors.values()
    others = [None if i % 3 == 0 else another(w.detach()) for i, w in enumerate(weights)]
    pairs = [(values, others), (values, values), (others, others), (others, None), (values, None)]
    measured = vectors._kernels.products(pairs, exact=True)
    expected = torch_kernels(vectors).products(pairs, exact=True)
    torch.testing.assert_close(measured, expected, rtol=1e-11, atol=1e-9)
    moved = vectors.displacement(others)
    for i, where in enumerate(vectors.slices):
        assert bool(moved[:, where].any()) == (others[i] is not None)
    before = [w.detach().clone() for w in weights]
    half = torch.full((vectors.n,), 0.5, dtype=torch.float64, device=DEVICE)
    vectors.scale_(half, [None if i % 3 == 0 else w for i, w in enumerate(values)])
    for i, (weight, old) in enumerate(zip(weights, before, strict=True)):
        labels = labels_of(old.cpu(), LAYOUTS[names[i]][1])
        scaled = torch.where((labels >= 0).to(DEVICE), old * 0.5, old)
        assert torch.equal(weight.detach(), old if i % 3 == 0 else scaled)


def test_what_is_laid_out_otherwise_goes_to_torch():
    """Momentum in another dtype, gradients in another memory format."""
    name = "conv channels_last"
    weight = moved_to_device(LAYOUTS[name][0], torch.bfloat16)
    vectors = vectors_of(weight, names=[name])
    momentum = torch.ones(weight.shape, device=DEVICE)
    factor = torch.arange(6, dtype=torch.float64, device=DEVICE)
    vectors.scale_(factor, [momentum])
    expected = factor.float().view(-1, 1, 1, 1).expand(weight.shape)
    assert torch.equal(momentum, expected.contiguous())
    gradient = another(weight).contiguous()
    measured = vectors.inner(([weight], [gradient]))
    expected = (weight.double() * gradient.double()).sum((1, 2, 3))
    torch.testing.assert_close(measured[0], expected, rtol=1e-12, atol=1e-12)


def test_a_program_that_does_not_compile_leaves_everything_to_torch(monkeypatch):
    weight = moved_to_device(LAYOUTS["conv"][0], torch.float32)
    vectors = vectors_of(weight, names=["conv"])
    monkeypatch.setattr(TritonKernels, "failure", "no compiler here")
    norms = weight.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(vectors.norms(), norms, rtol=3e-7, atol=0)
    vectors.scale_(torch.full((6,), 0.5, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(vectors.norms(), norms / 2, rtol=3e-7, atol=0)


@pytest.mark.parametrize("combining", [(64, 16), (8, 128), (1, 1024)], ids=str)
def test_slots_are_added_up_alike_however_many_there_are(combining):
    name = "5 rows of 4400"
    weight = moved_to_device(LAYOUTS[name][0], torch.float32)
    kernels = vectors_of(weight, names=[name])._kernels
    tables = kernels._tables
    counts = torch.tensor([0, 1, 2, 15, 16, 17, 127, 129, 1023, 1025, 400])
    order = torch.randperm(3000)[: int(counts.sum())]
    tables.n, tables.slots, tables.combining = len(counts), 3000, combining
    first = torch.cat([torch.zeros(1), counts.cumsum(0)])
    tables.first = first.to(torch.int32).to(DEVICE)
    tables.order = order.to(torch.int32).to(DEVICE)
    slots = randn(2, 3000)
    expected = []
    for row in slots:
        expected.append([float(part.sum()) for part in row[order].split(counts.tolist())])
    combined = kernels.combined(slots.to(DEVICE)).cpu()
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(combined, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectors", [[0, 4, 5], [2, 5, 7]], ids=["slot by slot", "added up"])
def test_what_ranks_send_each_other_are_sums(vectors):
    names = ["conv", "rows of 8500"]
    weights = [moved_to_device(LAYOUTS[name][0], torch.float32) for name in names]
    kernels = vectors_of(*weights, names=names)._kernels
    places = torch.tensor([1, 2, 40], device=DEVICE)
    runs = Runs(torch.tensor(vectors, device=DEVICE), places, 70)
    before = [another(weight) for weight in weights]
    for how, operands in ((passes.SQUARES, [weights]), (passes.RADIAL, [before, weights])):
        slots, message = kernels.slots_to_send(how, operands, runs, room=3)
        sums = kernels.combined(slots)
        torch.testing.assert_close(sums, kernels.combined(kernels.slots(how, operands)))
        assert torch.equal(message[3:].view(-1, 70), runs.add_up(sums))
    assert (kernels._sent[id(runs)][1] is None) == (vectors[2] == 7)


# ---- Formulas ----


def all_operations(ww, a, flags, one):
    """Every operation that a program can have."""
    finite = torch.isfinite(a) & ~torch.isnan(ww)
    kept = torch.where(finite, a, 0.25)
    b = (kept.abs() + 1.0).sqrt().log().exp() - kept / 3.0
    c = torch.addcdiv(b, ww, ww.clamp(min=1e-3)) + (2 - b) * flags
    d = (a / (a - a)).nan_to_num(0.0, 7.0, -7.0) + torch.zeros_like(a) + torch.ones_like(a)
    e = torch.where(one > 0, c.clamp(-0.5, 1.5), d) ** 2
    compared = (a <= b) | (a >= 2 * b) | (a == kept) & (kept != b)
    turned = torch.atan2(a, b) + kept.atan() + kept.clamp(-1.5, 1.5).tan() + ww.log1p()
    chosen = torch.fmax(a, b) + torch.fmin(b, a), torch.maximum(a, b) - torch.minimum(a, c)
    powers = b.pow(-3) + kept**4 + 0.9**ww + b.new_full((), 0.1)
    return c, d, e, -e, compared, compared.float(), 1 - a, turned, *chosen, powers


def looked_up_and_largest(ww, of_weights, flags, weight_of):
    """What a formula takes of each vector's weight, and what it makes of all vectors."""
    by_weight = of_weights[weight_of]
    return ww * by_weight, by_weight.where(flags[weight_of], ww), largest_of(ww)


def three_totals(ww, length, factor):
    return ww, length, (ww > factor).double()


@pytest.mark.parametrize("from_slots", [True, False])
def test_formulas_are_what_torch_makes_of_them(from_slots):
    name = "rows of 129" if from_slots else "labels over two dims"
    weight = moved_to_device(LAYOUTS[name][0], torch.float32)
    vectors = vectors_of(weight, names=[name])
    n = vectors.n
    a = randn(n).to(DEVICE)
    a[0], a[1] = torch.inf, torch.nan
    arguments = a, torch.arange(n, device=DEVICE) % 2 == 0, torch.ones((), device=DEVICE)
    sums = squares(vectors, exact=True)
    if not from_slots:
        sums = Taken(sums.take(vectors._kernels), from_slots=False)
    found = work_out(vectors, all_operations, sums, arguments)
    rows = vectors.inner((vectors.values(), vectors.values()))
    expected = all_operations(*rows, *arguments)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14, equal_nan=True)
    assert any(key[0] is all_operations for key in TritonKernels.formulas)


def many_rows() -> WeightVectors:
    """Weights of many vectors, of one, and of some that a program takes at once."""
    weights = [randn(90, 2), randn(1, 70), randn(20, 5), randn(2, 600)]
    partitions = [Partition.filters(tuple(weight.shape)) for weight in weights]
    vectors = WeightVectors([weight.to(DEVICE) for weight in weights], partitions)
    # A program goes through a weight's vectors some at a time.
    assert vectors._kernels._tables.totalling == (1024, 1)
    vectors._kernels._tables.totalling = (32, 1)
    return vectors


def test_a_formula_may_look_up_numbers_of_weights():
    vectors = many_rows()
    of_weights = torch.tensor([2.0, 3, 5, 7], dtype=torch.float64, device=DEVICE)
    flags = torch.tensor([True, False, True, False], device=DEVICE)
    numbers = of_weights, flags, vectors.weight_of
    found = work_out(vectors, looked_up_and_largest, squares(vectors), numbers)
    ww = vectors.partial_squares()
    expected = looked_up_and_largest(ww, *numbers)
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)
    assert found[2].tolist() == [float(part.max()) for part in ww.split(64)]
    assert torch.equal(found[2].max(), expected[2])


def test_totals_over_the_vectors_of_each_weight():
    vectors = many_rows()
    taken, totals = take_with_totals(vectors, squares(vectors), three_totals, (4.0,))
    assert taken.from_slots
    rows = three_totals(vectors.partial_squares(), vectors.length, 4.0)
    expected = vectors.totals(torch.stack(rows))
    torch.testing.assert_close(totals, expected, rtol=1e-13, atol=0)
    again = take_with_totals(vectors, squares(vectors), three_totals, (4.0,))[1]
    assert torch.equal(totals, again)
    # The same sums serve a formula, and one that only torch can work out.
    (halves,) = work_out(vectors, lambda ww: (ww / 2,), taken)
    (sorted_sums,) = work_out(vectors, lambda ww: (ww.sort()[0],), taken)
    assert torch.equal(halves.sort()[0], sorted_sums / 2)


def test_a_rank_totals_only_what_it_speaks_for(monkeypatch):
    vectors = many_rows()
    spoken = torch.arange(vectors.n, device=DEVICE) % 3 != 0
    monkeypatch.setattr(type(vectors), "spoken", spoken)
    _, totals = take_with_totals(vectors, squares(vectors), three_totals, (4.0,))
    rows = torch.stack(three_totals(vectors.partial_squares(), vectors.length, 4.0)) * spoken
    torch.testing.assert_close(totals, vectors.totals(rows), rtol=1e-13, atol=0)


def test_numbers_that_are_told_at_the_launch_share_a_program():
    vectors = many_rows()
    formula = lambda ww, factor: (ww * factor,)  # noqa: E731
    ww = vectors.partial_squares()
    for factor in (0.1, 1.0, 0.0, -1 / 3, 1e300):
        (found,) = work_out(vectors, formula, squares(vectors), (Number(factor),))
        torch.testing.assert_close(found, ww * factor, rtol=1e-14, atol=0)
    assert sum(key[0] is formula for key in TritonKernels.formulas) == 1


def function_values(y, x):
    return (
        torch.atan2(y, x),
        torch.atan(y),
        torch.tan(y),
        torch.sin(y),
        torch.log1p(y),
        y**3,
        y**-64,
    )


def test_functions_that_triton_lacks_in_its_interpreter():
    """Over all magnitudes and quadrants, beside π/2, and for zeros of both signs, infinity and
    NaN."""
    generator = np.random.default_rng(0)
    signs = generator.choice([-1.0, 1.0], 1500)
    wide = signs * 10 ** generator.uniform(-290, 290, 1500)
    usual = signs * 10 ** generator.uniform(-12, 2, 1500)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, -2.0, np.pi / 2, 5e-324])
    steep = np.pi / 2 - 10 ** generator.uniform(-15, 0, 300)
    y = np.concatenate([wide, usual, np.repeat(special, len(special)), steep])
    x = np.concatenate(
        [generator.permutation(wide), usual[::-1], np.tile(special, len(special)), steep]
    )
    with np.errstate(all="ignore"):
        near = np.where(np.abs(y) < 1e6, y, np.nan)
        expected = [np.arctan2(y, x), np.arctan(y), np.tan(near), np.sin(near), np.log1p(y)]
        expected += [y**3, y**-64.0]
    vectors = WeightVectors(
        [torch.ones(len(y), 1, device=DEVICE)], [Partition.filters((len(y), 1))]
    )
    numbers = [torch.tensor(values, device=DEVICE) for values in (y, x)]
    found = work_out(vectors, function_values, None, numbers)
    assert not isinstance(next(reversed(TritonKernels.formulas.values())), Exception)
    for mine, theirs, room in zip(found, expected, [1e-15] * 6 + [1.5e-14], strict=True):
        # Of numbers below 1e-300 few digits are stored.
        expected_values = torch.tensor(theirs)
        torch.testing.assert_close(
            mine.cpu(), expected_values, rtol=room, atol=1e-300, equal_nan=True
        )
        zeros = expected_values == 0
        assert torch.equal(mine.cpu()[zeros].signbit(), expected_values[zeros].signbit())


def test_a_formula_of_a_step_that_a_buffer_tells():
    weight = moved_to_device(LAYOUTS["rows of 129"][0], torch.float32)
    vectors = vectors_of(weight, names=["rows of 129"])
    rate = torch.full((vectors.n,), 0.1, dtype=torch.float64, device=DEVICE)
    sums = radial_part_of_step(vectors, [another(weight)], rate)
    found = work_out(vectors, lambda *rows: rows, sums)
    expected = sums.take(vectors._kernels)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-13, atol=1e-13)


def test_a_formula_that_no_program_has_is_left_to_torch():
    weight = moved_to_device(LAYOUTS["conv"][0], torch.float32)
    vectors = vectors_of(weight, names=["conv"])
    calls = []

    def formula(ww):
        calls.append(ww)
        return (ww.cumsum(0),)

    for _ in range(3):
        (found,) = work_out(vectors, formula, squares(vectors))
    torch.testing.assert_close(found, (vectors.norms() ** 2).cumsum(0), rtol=1e-12, atol=0)
    # Once to find out that there is none, and three times to do it.
    assert len(calls) == 4


def test_a_formula_whose_numbers_keep_changing_is_left_to_torch():
    """As of a callback whose strength somebody schedules."""
    weight = moved_to_device(LAYOUTS["one row"][0], torch.float32)
    vectors = vectors_of(weight, names=["one row"])

    def scaled(ww, strength):
        return (ww * strength,)

    ww = vectors.norms() ** 2
    for step in range(MOST_PROGRAMS + 3):
        (found,) = work_out(vectors, scaled, squares(vectors), (0.1 * step,))
        torch.testing.assert_close(found, ww * (0.1 * step), rtol=1e-12, atol=0)
    assert sum(key[0] is scaled for key in TritonKernels.formulas) == MOST_PROGRAMS
