"""Vectors against brute force: for every kind of weight, entry by entry, with loops."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, by_vector, labels_of, made, randn, same_layout
from torch import nn

from lightning_normdyn import Partition, Phase, StepBracket, WeightVectors
from lightning_normdyn.geometry import pieces
from lightning_normdyn.optimizers.step import Step

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_stretching_a_step(kind, dtype):
    vectors, (weight,) = made(kind, dtype=dtype)
    partition, after = KINDS[kind][1], weight.detach().clone()
    before, layout = same_layout(after), weight.stride()
    stretch, scale = randn(vectors.n).abs() + 0.5, randn(vectors.n, 1).flatten() + 2
    extended = [torch.cat([values, values.new_ones(1)]) for values in (stretch, scale)]
    labels = labels_of(after, partition)
    with torch.no_grad():
        vectors.stretch_([before], stretch, scale)
    f, c = (values[labels] for values in extended)
    expected = c * (before.double() + f * (after.double() - before.double()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.detach().double(), expected, rtol=4 * eps, atol=40 * eps)
    assert torch.equal(weight.detach()[labels < 0], after[labels < 0])
    assert weight.stride() == layout
    ones = torch.ones_like(stretch)
    as_it_is = weight.detach().clone()
    with torch.no_grad():
        vectors.stretch_([before], ones, ones)
        vectors.stretch_([None], stretch, scale)
    assert torch.equal(weight.detach(), as_it_is)
    vectors.stretch_([before], ones, ones, scale)
    added = torch.where(labels >= 0, c * before.double(), 0.0)
    torch.testing.assert_close(
        weight.detach().double(), as_it_is.double() + added, rtol=4 * eps, atol=40 * eps
    )


@pytest.mark.parametrize("known_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cautious_decay_spares_what_a_step_lengthens(kind, dtype, known_before):
    vectors, (weight,) = made(kind, dtype=dtype)
    partition, before = KINDS[kind][1], weight.detach().clone()
    layout, share = weight.stride(), randn(vectors.n).abs()
    with torch.no_grad():
        # Some entries lengthen and some shorten, whatever their signs.
        step = torch.tensor([0.3, -0.2]).repeat(before.numel())[: before.numel()]
        weight += step.reshape(before.shape).to(dtype)
    after, labels = weight.detach().clone(), labels_of(before, partition)
    of_entry = torch.cat([share, share.new_zeros(1)])[labels]
    shortened = (after.double() - before.double()) * before.double() <= 0
    expected = after.double() - of_entry * before.double() * shortened
    told = vectors.shortened([before]) if known_before else None
    with torch.no_grad():
        vectors.decay_shortened_(share, [before], told)
        vectors.decay_shortened_(share, [None])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.detach().double(), expected, rtol=4 * eps, atol=4 * eps)
    assert 0 < int(shortened.sum()) < before.numel()
    assert weight.stride() == layout


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
    step = Step(StepBracket.of(torch.optim.SGD(weights, lr=0.1)), 1, stepped=[weights[1]])
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


def test_who_has_a_gradient_is_asked_of_each_step_anew():
    vectors, weights = made("conv", "linear")
    bracket = StepBracket.of(torch.optim.SGD(weights, lr=0.1))
    for stepped, answer in (
        (weights, (True, True)),
        (weights[1:], (False, True)),
        (weights[1:], (False, True)),
        (weights[:1], (True, False)),
        (list(weights), (True, True)),
    ):
        assert vectors.has_gradient(Step(bracket, 1, stepped=stepped)) == answer


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


def test_full_precision_is_not_low():
    assert not made("conv", "linear", dtype=torch.float32)[0].low_precision


def test_who_asks_for_the_same_weights_gets_the_same_index_space():
    weights = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))]
    filters, layer = Partition.filters((4, 3)), Partition.layer((4, 3))
    names = ["a", "b"]
    first = WeightVectors.of(weights, [filters, filters], names, [None, None])
    assert WeightVectors.of(weights, [filters, filters], names, [None, None]) is first
    for others in (
        WeightVectors.of(weights, [filters, layer], names, [None, None]),
        WeightVectors.of(weights[::-1], [filters, filters], names, [None, None]),
        WeightVectors.of(weights, [filters, filters], ["a", "c"], [None, None]),
        WeightVectors.of(weights, [filters, filters], names, [None, torch.ones(4, 3) > 0]),
    ):
        assert others is not first
    # As a person may do between two fits.
    weights[0].data = weights[0].data.double()
    assert WeightVectors.of(weights, [filters, filters], names, [None, None]) is not first


def test_where_vectors_lie_is_worked_out_once_for_weights_that_are_alike(monkeypatch):
    calls = []
    merge = pieces._merge_rows
    monkeypatch.setattr(pieces, "_merge_rows", lambda *a: calls.append(a) or merge(*a))
    weights = [nn.Parameter(torch.randn(5, 7)) for _ in range(6)]
    partitions = [Partition((0,), torch.tensor([0, 0, 1, 1, 2]), "group") for _ in weights]
    WeightVectors(weights, [partition.shared() for partition in partitions])
    assert len(calls) == 1
