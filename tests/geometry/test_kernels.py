"""Every kernel against the formula that it stands for, on every kind of weight and however it is
cut into chunks."""

from __future__ import annotations

import math

import pytest
import torch
from kinds import KINDS, by_vector, labels_of, made, randn, same_layout
from torch import Tensor, nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn import functional as F
from lightning_normdyn.functional import angle_from_sums, std_from_sums
from lightning_normdyn.geometry import kernels as kernels_file
from lightning_normdyn.geometry import lot_choice, passes
from lightning_normdyn.geometry.kernels import Kernels, RowIndex
from lightning_normdyn.geometry.pieces import rows_of
from lightning_normdyn.geometry.placement import place

ALL = [*KINDS, "long rows"]


def weight_of(kind: str) -> tuple[Tensor, Partition]:
    return KINDS.get(kind, (randn(3, 9000), Partition.filters((3, 9000))))


@pytest.fixture(params=["at once", "in small chunks", "by itself"])
def chunked(request, monkeypatch):
    """Chunks that cut every kind of weight, or none; small weights as copies, or as large ones."""
    if request.param == "in small chunks":
        monkeypatch.setattr(kernels_file, "CACHED_ENTRIES", 5)
    if request.param == "by itself":
        monkeypatch.setattr(lot_choice, "SMALL_ENTRIES", 0)


def as_rows(weight: Tensor, partition: Partition) -> list[Tensor]:
    """Every vector as a weight of its own, ``(1, d)``: what a formula takes."""
    return [x[None] for x in by_vector(weight, partition, weight)]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_what_functional_states(kind, chunked):
    weight, partition = KINDS[kind]
    before, now = weight.clone(), nn.Parameter(weight + same_layout(weight) / 10)
    vectors = WeightVectors([now], [partition])
    kernels = vectors._kernels
    old, new = as_rows(before, partition), as_rows(now.detach(), partition)

    displaced = [F.displacement_sums(a, b) for a, b in zip(old, new, strict=True)]
    displaced = torch.tensor(displaced, dtype=torch.float64).T
    moments = torch.tensor([F.moment_sums(b) for b in new], dtype=torch.float64).T
    expected = [[float((a * b).sum()), float(a.sum())] for a, b in zip(old, new, strict=True)]
    products = torch.tensor(expected, dtype=torch.float64).T
    after = vectors.values()
    for measured, formula in (
        (kernels.sums(passes.displacement(None), [[before], after]), displaced),
        (kernels.sums(passes.displacement(torch.float64), [[before], after]), displaced),
        (kernels.sums(passes.RADIAL, [[before], after]), displaced[:2]),
        (kernels.sums(passes.MOMENTS, [after]), moments),
        (kernels.sums(passes.SQUARES, [after]), moments[:1]),
        (kernels.products([([before], after), ([before], None)], exact=True), products),
    ):
        torch.testing.assert_close(measured, formula, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_removal_is_what_functional_states(kind, fused, chunked, monkeypatch):
    if not fused:
        monkeypatch.setattr(WeightVectors, "_one_pass", False)
    weight, partition = KINDS[kind]
    start, now = weight.clone(), nn.Parameter(weight + same_layout(weight) / 10)
    vectors = WeightVectors([now], [partition])
    share = randn(vectors.n).abs() / 100
    old, new = as_rows(start, partition), as_rows(now.detach().clone(), partition)
    expected = [F.remove_radial(a, b, s) for a, b, s in zip(old, new, share, strict=True)]
    with torch.no_grad():
        vectors.remove_radial_([start], share)
    for changed, formula in zip(as_rows(now.detach(), partition), expected, strict=True):
        torch.testing.assert_close(changed, formula, rtol=1e-12, atol=1e-12)


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


@pytest.mark.sampled
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("kind", [*MOVED, "long rows"])
def test_angles_and_radial_parts_of_stored_numbers_hold_however_the_norm_changes(
    kind, small_chunks, known, monkeypatch
):
    if small_chunks:
        monkeypatch.setattr(kernels_file, "CACHED_ENTRIES", 1000 if kind == "long rows" else 5)
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


@pytest.mark.sampled(48)
@pytest.mark.parametrize("told", ["by a copy", "by the step"])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("taken", ["one", "one, in small chunks", "two"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [*KINDS, "long rows"])
def test_the_radial_part_of_a_step_is_removed(kind, dtype, taken, some, told, monkeypatch):
    if taken == "two":  # as on a GPU
        monkeypatch.setattr(WeightVectors, "_one_pass", False)
    if taken == "one, in small chunks":
        monkeypatch.setattr(kernels_file, "CACHED_ENTRIES", 1000 if kind == "long rows" else 5)
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


@pytest.mark.parametrize("taken", ["one", "two"])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e6])
def test_a_known_step_is_removed_as_well_as_the_sum_of_both_allows(ratio, taken, monkeypatch):
    if taken == "two":
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
        monkeypatch.setattr(kernels_file, "CACHED_ENTRIES", 5)
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


WEIGHTS = {
    "contiguous": torch.arange(6 * 4 * 5).reshape(6, 4, 5),
    "channels last": torch.arange(6 * 5 * 4).reshape(6, 5, 4).movedim(-1, 1),
    "transposed": torch.arange(4 * 6 * 5).reshape(4, 6, 5).transpose(0, 1),
    "one long row": torch.arange(120).reshape(1, 120, 1),
}


def chunks_of(weight: Tensor, entries: int, **settings: bool) -> tuple[list[Tensor], Tensor]:
    """The chunks that a kernel got, and sums over rows that it added up."""
    seen: list[Tensor] = []

    def kernel(dims, outs, views):
        seen.append(views[0])
        outs[0].add_(views[0].sum(dims, keepdim=True))
        assert views[1] is None

    sums = torch.zeros(len(weight), 1, 1, dtype=torch.int64)
    kernels_file.in_chunks(kernel, [sums], [weight, None], [1, 2], entries, **settings)
    return seen, sums


@pytest.mark.parametrize("entries", [1, 3, 7, 20, 50, 119, 120, 1000])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_entry_is_taken_once(name, entries):
    weight = WEIGHTS[name]
    seen, sums = chunks_of(weight, entries)
    assert sorted(torch.cat([x.flatten() for x in seen]).tolist()) == list(range(120))
    assert max(x.numel() for x in seen) <= entries
    assert torch.equal(sums, weight.sum((1, 2), keepdim=True))
    cut = any(x.shape[1:] != weight.shape[1:] for x in seen)
    assert kernels_file.cuts_rows(weight, [1, 2], entries) == cut


@pytest.mark.parametrize("entries", [1, 20, 50])
@pytest.mark.parametrize("name", WEIGHTS)
def test_whole_rows_are_never_cut(name, entries):
    weight = WEIGHTS[name]
    seen, sums = chunks_of(weight, entries, whole_rows=True)
    assert all(x.shape[1:] == weight.shape[1:] for x in seen)
    assert torch.equal(sums, weight.sum((1, 2), keepdim=True))


CPU = torch.device("cpu")


def index_of(*kinds: str) -> RowIndex:
    return RowIndex([place(*KINDS[kind]) for kind in kinds], CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_entries_of_one_vector(kind):
    weight, partition = KINDS[kind]
    (piece,) = place(weight, partition).pieces
    rows = rows_of(piece)
    view = rows.view(labels_of(weight, partition).clone())
    expected = rows.labels.view(rows.form(view)).expand_as(view)
    assert torch.equal(view, expected)
    assert view[0].numel() or not rows.dims(view)


def test_neighbouring_filters_of_one_vector_are_one_row():
    assert index_of("layer").counts == [1]
    assert index_of("groups").counts == [2]
    assert index_of("conv").counts == [6]
    assert index_of("pixel shuffle").counts == [4]  # no neighbours


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_rows_become_sums_of_vectors_and_back(kind):
    weight, partition = KINDS[kind]
    index = index_of("conv", kind, "linear")
    assert index.n == 6 + partition.n + 5
    assert index.slices[1] == slice(6, 6 + partition.n)
    sums = []
    for which, rows in index.pieces:
        view = rows.view(KINDS[["conv", kind, "linear"][which]][0])
        dims = rows.dims(view)
        sums.append((view.sum(dims) if dims else view).flatten())
    by_index = index.to_vectors(torch.cat(sums)[None])[0]
    expected = torch.stack([x.sum() for x in by_vector(weight, partition, weight)])
    torch.testing.assert_close(by_index[index.slices[1]], expected)

    numbers = index.to_rows(torch.arange(float(index.n)), dummy=-1.0).split(index.counts)
    of_kind = torch.where(index.pieces[1][1].labels < 0, -7, index.pieces[1][1].labels)
    assert torch.equal(numbers[1], (of_kind + 6).float())


def test_whole_filters_need_no_index():
    assert index_of("conv", "linear", "layer").in_order
    assert not index_of("conv", "packed qkv").in_order
    assert not index_of("pixel shuffle").in_order


def test_a_rank_that_holds_no_vector_does_nothing():
    device = torch.device("cpu")
    kernels = Kernels(RowIndex([], device), [], [], device)
    none = torch.ones(0, dtype=torch.float64, device=device)
    # FSDP1 may put all of a unit's weights on another rank.
    kernels.scale_([], none)
    kernels.add_scaled_([], none, [])
    kernels.scale_and_add_([], none, none, [])
    kernels.stretch_([], [], none, none, none)
    kernels.decay_shortened_([], none, [], [])
    assert kernels.sums(passes.SQUARES, [[]]).shape == (1, 0)
    removal = passes.removing(passes.RADIAL, 2)
    assert kernels.sums(removal, [[], []], [none]).shape[1] == 0
