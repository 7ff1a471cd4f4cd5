"""Vectors against brute force: for every kind of weight, entry by entry, with loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_normdyn import Partition, Phase, StepBracket, WeightVectors
from lightning_normdyn.functional import angle_from_sums, std_from_sums
from lightning_normdyn.geometry import chunks
from lightning_normdyn.optimizers.step import Step


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).to(dtype)


def heads_without_v() -> Partition:
    """A packed qkv weight of two heads of two rows: q and k per head, the rows of v belong to no
    vector."""
    return Partition((0,), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1, -1]), "group")


def lstm_rows() -> Tensor:
    return nn.LSTM(5, 4).weight_ih_l0.detach().double()


KINDS: dict[str, tuple[Tensor, Partition]] = {
    "conv": (randn(6, 4, 3, 3), Partition.filters((6, 4, 3, 3))),
    "conv channels_last": (
        randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        Partition.filters((6, 4, 3, 3)),
    ),
    "conv3d channels_last": (
        randn(3, 2, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        Partition.filters((3, 2, 2, 2, 2)),
    ),
    "grouped conv": (
        nn.Conv2d(4, 6, 3, groups=2).weight.detach().double(),
        Partition.filters((6, 2, 3, 3)),
    ),
    "depthwise conv": (randn(6, 1, 3), Partition.filters((6, 1, 3))),
    "transposed conv": (randn(4, 3, 2, 2), Partition.filters((4, 3, 2, 2), transposed_groups=1)),
    "grouped transposed conv": (
        nn.ConvTranspose2d(4, 6, 2, groups=2).weight.detach().double(),
        Partition.filters((4, 3, 2, 2), transposed_groups=2),
    ),
    "grouped transposed conv channels_last": (
        randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        Partition.filters((4, 3, 2, 2), transposed_groups=2),
    ),
    "linear": (randn(5, 7), Partition.filters((5, 7))),
    "linear seen transposed": (randn(7, 5).t(), Partition.filters((5, 7))),
    "columns": (randn(5, 7), Partition.filters((5, 7), axis=1)),
    "embedding": (randn(10, 4), Partition.filters((10, 4))),
    "lstm": (lstm_rows(), Partition.filters((16, 5))),
    "packed qkv": (randn(12, 4), heads_without_v()),
    "groups": (randn(6, 4, 3), Partition.groups((6, 4, 3), 2)),
    "layer": (randn(5, 7), Partition.layer((5, 7))),
    "pixel shuffle": (randn(4, 2, 3), Partition((0,), torch.tensor([0, 1, 0, 1]), "group")),
    "one row": (randn(1, 7), Partition.filters((1, 7))),
    "one entry each": (randn(7, 1), Partition.filters((7, 1))),
}


def labels_of(weight: Tensor, partition: Partition) -> Tensor:
    """For every entry of the weight its vector, or -1."""
    shape = [n if d in partition.keep else 1 for d, n in enumerate(weight.shape)]
    return partition.labels.reshape(shape).expand(weight.shape)


def by_vector(weight: Tensor, partition: Partition, tensor: Tensor) -> list[Tensor]:
    """The entries of ``tensor`` that belong to each vector of ``weight``, in float64."""
    labels = labels_of(weight, partition)
    return [tensor[labels == j].double() for j in range(partition.n)]


def made(
    *kinds: str, dtype: torch.dtype = torch.float64
) -> tuple[WeightVectors, list[nn.Parameter]]:
    # clone() keeps the memory format
    weights = [nn.Parameter(KINDS[k][0].clone().to(dtype)) for k in kinds]
    return WeightVectors(weights, [KINDS[k][1] for k in kinds], list(kinds)), weights


def same_layout(weight: Tensor) -> Tensor:
    return torch.empty_like(weight).copy_(randn(*weight.shape, 1).squeeze(-1) + 0.3)


ALL = list(KINDS)


# ---- One weight ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_inner_products(kind, dtype):
    vectors, (weight,) = made(kind, dtype=dtype)
    partition, other = KINDS[kind][1], same_layout(weight.detach())
    a, b = by_vector(weight, partition, weight.detach()), by_vector(weight, partition, other)
    got = vectors.inner(
        (vectors.values(), vectors.values()),
        (vectors.values(), [other]),
        ([other], [other]),
        (vectors.values(), None),
    )
    sums = (lambda x, y: x @ x, lambda x, y: x @ y, lambda x, y: y @ y, lambda x, y: x.sum())
    expected = [[float(f(x, y)) for x, y in zip(a, b, strict=True)] for f in sums]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(vectors.norms(), got[0].sqrt(), rtol=rounding, atol=0)
    assert vectors.n == partition.n
    assert vectors.length.tolist() == [len(x) for x in a]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_and_adding(kind, dtype):
    vectors, (weight,) = made(kind, dtype=dtype)
    partition, before = KINDS[kind][1], weight.detach().clone()
    other, layout = same_layout(before), weight.stride()
    factor, coefficient = randn(vectors.n) + 2, randn(vectors.n, 1).flatten()
    extended = [
        torch.cat([values, values.new_tensor([dummy])])
        for values, dummy in ((factor, 1.0), (coefficient, 0.0))
    ]
    labels = labels_of(before, partition)
    with torch.no_grad():
        vectors.scale_(factor)
    scaled = before.double() * extended[0][labels]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.detach().double(), scaled, rtol=2 * eps, atol=0)
    with torch.no_grad():
        vectors.add_scaled_(coefficient, [other])
    torch.testing.assert_close(
        weight.detach().double(),
        scaled + extended[1][labels] * other.double(),
        rtol=4 * eps,
        atol=4 * eps * 10,
    )
    assert torch.equal(weight.detach()[labels < 0], before[labels < 0])
    assert weight.stride() == layout
    momentum = other.clone()
    vectors.scale_(factor, [momentum])
    torch.testing.assert_close(
        momentum.double(), other.double() * extended[0][labels], rtol=2 * eps, atol=0
    )


MOVED = [
    "conv",
    "conv channels_last",
    "grouped transposed conv",
    "packed qkv",
    "layer",
    "columns",
    "one row",
]


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kind", MOVED)
def test_displacement_sums_are_those_of_the_stored_numbers(kind, turn):
    vectors, (weight,) = made(kind)
    partition, before = KINDS[kind][1], weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.7).add_(same_layout(before), alpha=turn)
    got = vectors.displacement([before])
    pairs = list(
        zip(
            by_vector(before, partition, before),
            by_vector(before, partition, weight.detach()),
            strict=True,
        )
    )
    expected = [
        [float(a @ a) for a, _ in pairs],
        [float(a @ (b - a)) for a, b in pairs],
        [float((b - a) @ (b - a)) for a, b in pairs],
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def turned(before: Tensor, labels: Tensor, n: int, angle: float, growth: float) -> Tensor:
    """Every vector of ``before`` turned by an angle and multiplied in length, in float64, then
    stored as ``before`` is."""
    start, across, chosen = (
        before.double(),
        same_layout(before.double()),
        [labels == j for j in range(n)],
    )
    after = start.clone()
    for where in chosen:
        w, v = start[where], across[where]
        v = v - w * (w @ v) / (w @ w)
        v = v - w * (w @ v) / (w @ w)
        after[where] = growth * (math.cos(angle) * w + math.sin(angle) * v * w.norm() / v.norm())
    return torch.empty_like(before).copy_(after)


def true_angle(a: Tensor, b: Tensor) -> Tensor:
    unit = a / a.norm()
    along, across = b @ unit, b - (b @ unit) * unit
    return torch.atan2((across - (across @ unit) * unit).norm(), along)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("kind", [*MOVED, "long rows"])
def test_angles_and_radial_parts_of_stored_numbers_hold_however_the_norm_changes(
    kind, small_chunks, known, monkeypatch
):
    if small_chunks:
        monkeypatch.setattr(chunks, "CACHED_ENTRIES", 1000 if kind == "long rows" else 5)
    weight, partition = KINDS.get(kind, (randn(3, 9000), Partition.filters((3, 9000))))
    before = weight.clone().float()
    for angle in (1e-6, 1e-5, 1e-3, 1.0, 2.5, 3.14159):
        for growth in (0.5, 0.999, 1.0, 1.001, 20.0):
            after = nn.Parameter(
                turned(before, labels_of(before, partition), partition.n, angle, growth)
            )
            vectors = WeightVectors([after], [partition])
            norms = vectors.inner(([before], [before]), exact=False)[0].sqrt() if known else None
            ww, wd, dd = vectors.displacement([before], norms=norms)
            pairs = list(
                zip(
                    by_vector(before, partition, before),
                    by_vector(before, partition, after.detach()),
                    strict=True,
                )
            )
            expected = torch.stack([true_angle(a, b) for a, b in pairs])
            torch.testing.assert_close(angle_from_sums(ww, wd, dd), expected, rtol=5e-4, atol=0)
            radial = torch.stack([a @ (b - a) / (a @ a) for a, b in pairs])
            moved = torch.stack([(b - a).norm() / a.norm() for a, b in pairs])
            torch.testing.assert_close(
                (wd / ww - radial) / moved, torch.zeros_like(radial), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("told", ["by a copy", "by the step"])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("passes", ["one", "one, in small chunks", "two"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [*KINDS, "long rows"])
def test_the_radial_part_of_a_step_is_removed(kind, dtype, passes, some, told, monkeypatch):
    if passes == "two":  # as on a GPU
        monkeypatch.setattr(WeightVectors, "_one_pass", False)
    if passes == "one, in small chunks":
        monkeypatch.setattr(chunks, "CACHED_ENTRIES", 1000 if kind == "long rows" else 5)
    weight, partition = KINDS.get(kind, (randn(3, 9000), Partition.filters((3, 9000))))
    start = weight.clone().to(dtype)
    parameter = nn.Parameter(start.clone())
    vectors, labels = WeightVectors([parameter], [partition]), labels_of(start, partition)
    share, active = randn(vectors.n).abs() / 100, torch.arange(vectors.n) % 2 == 0 if some else None
    length, direction = -randn(vectors.n).abs() - 0.1, same_layout(start) / 100
    moved = (
        torch.cat([length, length.new_zeros(1)])[labels] * direction.double()
    )  # rows of no vector stand still here
    now = start.double() + moved
    with torch.no_grad():
        parameter.copy_(now)
        if told == "by a copy":
            now = (
                parameter.detach().clone().double()
            )  # as it is stored: what rounding has added is part of the step
            moved = now - start.double()
            removed = vectors.remove_radial_([start], share, active)
        else:
            removed, _ = vectors.remove_radial_of_([direction], length, share, active)
    expected = now.clone()
    for j in range(vectors.n):
        where = labels == j
        s, d = start.double()[where], moved[where]
        part = s @ d / (s @ s) + share[j]
        error = (1e-13 if dtype == torch.float64 else 1e-6) * (
            float(d.norm() / s.norm()) + float(share[j])
        )
        assert float(removed[j]) == pytest.approx(float(part), rel=0, abs=error)
        if active is None or active[j]:
            expected[where] -= part * s
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        parameter.detach().double(), expected, rtol=0, atol=tolerance * float(start.abs().max())
    )


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e6])
def test_a_known_step_is_removed_as_well_as_the_sum_of_both_allows(ratio, passes, monkeypatch):
    if passes == "two":
        monkeypatch.setattr(WeightVectors, "_one_pass", False)
    start, direction = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(5))
    direction = direction / direction.norm(dim=1, keepdim=True) * start.norm(dim=1, keepdim=True)
    length = torch.full((4,), -ratio, dtype=torch.float64)
    weight = nn.Parameter(start + length[:, None].float() * direction)
    vectors = WeightVectors([weight], [Partition.filters((4, 32))])
    with torch.no_grad():
        _, seen = vectors.remove_radial_of_(
            [direction], length, torch.zeros(4, dtype=torch.float64)
        )
    s, step = start.double(), -ratio * direction.double()
    expected = s + step - (s * step).sum(1, keepdim=True) / s.square().sum(1, keepdim=True) * s
    wrong = (weight.detach().double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(wrong.max()) < 1e-7 * ratio
    assert seen == pytest.approx([ratio] * 4, rel=1e-7 * ratio + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_that_have_no_angle_and_vectors_that_did_not_move(dtype):
    before = randn(5, 40).to(dtype)
    before[0] = 0
    after = nn.Parameter(before.clone())
    with torch.no_grad():
        after[0] = 1
        after[1] = 0
        after[2, 3] = float("inf")
        after[3, 3] = float("nan")
    sums = WeightVectors([after], [Partition.filters((5, 40))]).displacement([before])
    angles = angle_from_sums(*sums)
    assert angles[:4].isnan().all()
    assert float(angles[4]) == 0
    assert float(sums[1, 4]) == float(sums[2, 4]) == 0


@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_give_standard_deviations_beside_a_large_mean(kind, small_chunks, monkeypatch):
    if small_chunks:
        monkeypatch.setattr(chunks, "CACHED_ENTRIES", 5)
    vectors, (weight,) = made(kind, dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(0.01).add_(3.0)
    ww, w1 = vectors.moments(vectors.values())
    pieces = by_vector(weight, KINDS[kind][1], weight.detach())
    torch.testing.assert_close(ww, torch.stack([x @ x for x in pieces]), rtol=1e-6, atol=0)
    torch.testing.assert_close(w1, torch.stack([x.sum() for x in pieces]), rtol=1e-6, atol=0)
    std = std_from_sums(ww, w1, vectors.length)
    torch.testing.assert_close(
        std, torch.stack([x.std(unbiased=False) for x in pieces]), rtol=1e-5, atol=1e-7
    )


# ---- Many weights in one index space ----


def test_every_vector_has_its_place():
    vectors, _ = made(*ALL)
    assert vectors.n == sum(KINDS[k][1].n for k in ALL)
    assert (
        [s.stop - s.start for s in vectors.slices]
        == [KINDS[k][1].n for k in ALL]
        == vectors.count.tolist()
    )
    assert vectors.slices[0].start == 0
    assert all(a.stop == b.start for a, b in zip(vectors.slices, vectors.slices[1:], strict=False))
    for i, where in enumerate(vectors.slices):
        assert (vectors.weight_of[where] == i).all()
    one_by_one = torch.cat([made(k)[0].norms() for k in ALL])
    assert torch.equal(vectors.norms(), one_by_one)


def test_values_of_weights_and_of_vectors():
    vectors, _ = made(*ALL)
    values = torch.arange(float(vectors.n), dtype=torch.float64)
    sums = torch.stack([values[s].sum() for s in vectors.slices])
    assert torch.equal(vectors.per_weight(values), sums)
    assert torch.equal(
        vectors.totals(torch.stack([values, 2 * values])), torch.stack([sums, 2 * sums])
    )
    assert torch.equal(
        vectors.spread(sums),
        torch.cat([sums[i].expand(s.stop - s.start) for i, s in enumerate(vectors.slices)]),
    )
    gathered = vectors.gather(values)
    assert all(torch.equal(g, values[s]) for g, s in zip(gathered, vectors.slices, strict=True))
    assert torch.equal(vectors.scatter(gathered), values)


def test_scaling_one_weight_scales_no_other():
    vectors, weights = made(*ALL)
    before = [w.detach().clone() for w in weights]
    factor = torch.ones(vectors.n, dtype=torch.float64)
    factor[vectors.slices[3]] = 3.0
    with torch.no_grad():
        vectors.scale_(factor)
    changed = [not torch.equal(a, w.detach()) for a, w in zip(before, weights, strict=True)]
    assert changed == [i == 3 for i in range(len(ALL))]


def test_a_missing_operand_contributes_zeros_and_is_passed_over():
    vectors, weights = made("conv", "linear")
    weights[1].grad = same_layout(weights[1].detach())
    step = Step(StepBracket.of(torch.optim.SGD(weights, lr=0.1)), 1, with_gradient={id(weights[1])})
    weights[1].grad = None  # an optimizer may free it within the step
    assert vectors.has_gradient(step) == (False, True)
    weights[1].grad = same_layout(weights[1].detach())
    wg, gg = vectors.inner(
        (vectors.values(), vectors.gradients()), (vectors.gradients(), vectors.gradients())
    )
    assert (wg[:6] == 0).all()
    assert (gg[:6] == 0).all()
    assert (gg[6:] > 0).all()
    before = weights[0].detach().clone()
    with torch.no_grad():
        vectors.add_scaled_(torch.ones(vectors.n, dtype=torch.float64), vectors.gradients())
        vectors.scale_(torch.full((vectors.n,), 2.0), vectors.gradients())
    assert torch.equal(weights[0].detach(), before)
    assert weights[0].grad is None


def test_inner_and_totals_is_both():
    vectors, _ = made("conv", "packed qkv")
    values = vectors.values()
    sums, totals = vectors.inner_and_totals(
        (values, values), summarize=lambda s, length: torch.stack([s[0], length])
    )
    assert torch.equal(sums, vectors.inner((values, values)))
    assert torch.equal(totals, vectors.totals(torch.stack([sums[0], vectors.length])))


def test_snapshots_through_a_bracket():
    vectors, weights = made("conv channels_last", "columns")
    optimizer = torch.optim.SGD(weights, lr=0.5)
    bracket, seen = StepBracket.of(optimizer), []
    bracket.add(
        Phase.MEASURE,
        lambda step: bracket.request_snapshot(dict(zip(weights, vectors.values(), strict=True))),
    )
    bracket.add(
        Phase.MEASURE_STEP,
        lambda step: seen.extend(vectors.displacement(vectors.snapshots(bracket))),
    )
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    torch.testing.assert_close(seen[2], 0.25 * vectors.length, rtol=1e-12, atol=0)


def test_no_weights_at_all():
    vectors = WeightVectors([], [])
    assert vectors.n == 0
    assert vectors.norms().shape == (0,)


# ---- Low precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_factors_are_not_lost_and_leave_no_bias(dtype):
    torch.manual_seed(0)
    low, full = nn.Parameter(torch.randn(5, 400).to(dtype)), nn.Parameter(torch.randn(2, 9))
    vectors = WeightVectors([low, full], [Partition.filters((5, 400)), Partition.filters((2, 9))])
    assert vectors.low_precision
    start = torch.stack([row.double().norm() for row in [*low.detach(), *full.detach()]])
    factor = torch.tensor(
        [1 - 1e-4, 1 - 3e-4, 1.0, 1 - 1e-6, 1 - 2e-3, 1 - 1e-4, 1 - 3e-4], dtype=torch.float64
    )
    naive, owed = low.detach().clone(), torch.ones(7)
    with torch.no_grad():
        for _ in range(1500):
            owed = vectors.scale_rounded_(factor, owed)
            naive.mul_(factor[:5, None].to(dtype))
    eps = torch.finfo(dtype).eps
    expected = start * factor**1500
    # Applied so far, and with what is still owed; the naive product never moves at 1e-4.
    torch.testing.assert_close(vectors.norms(), expected, rtol=1.5 * eps, atol=0)
    torch.testing.assert_close(vectors.norms() * owed, expected, rtol=2e-3, atol=0)
    assert float(naive[0].double().norm() / start[0]) > 0.99
    assert torch.equal(owed[5:], torch.ones(2))  # float32 keeps such factors by itself


def test_full_precision_is_not_low():
    assert not made("conv", "linear", dtype=torch.float32)[0].low_precision
