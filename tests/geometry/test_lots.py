"""Small weights taken together: the same numbers as one by one, and as many calls for 200 as for
20."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, randn, same_layout
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry import lot_choice, lots
from lightning_normdyn.geometry.lots import Alone, Stack

LAYERS = ["layer", "conv", *["linear"] * 3, "groups", "packed qkv", "linear", "columns", "linear"]


def several(monkeypatch, *, together: bool) -> tuple[WeightVectors, list[torch.Tensor | None]]:
    """Weights of many kinds, and others laid out like them; one of the latter is missing."""
    monkeypatch.setattr(lot_choice, "SMALL_ENTRIES", 2**14 if together else 0)
    weights, others = [], []
    for kind in LAYERS:
        weight = KINDS[kind][0]
        weights.append(nn.Parameter(weight + 0.1 * same_layout(weight)))
        others.append(weight.clone())
    # Of two that are alike, one has another dtype.
    weights[-1].data = weights[-1].data.float()
    others[-1] = others[-1].float()
    others[3] = None
    vectors = WeightVectors(weights, [KINDS[kind][1] for kind in LAYERS])
    return vectors, others


def test_equal_rows_lie_together_whoever_stands_between(monkeypatch):
    vectors, _ = several(monkeypatch, together=True)
    stacks = [lot for lot in vectors._kernels._lots if isinstance(lot, Stack)]
    assert [2, 3, 4, 7] in [stack.weights for stack in stacks]
    assert [9] in [stack.weights for stack in stacks]
    vectors, _ = several(monkeypatch, together=False)
    assert all(isinstance(lot, Alone) for lot in vectors._kernels._lots)


OPERATIONS = {
    "norms": lambda v, o: v.norms(),
    "moments": lambda v, o: torch.stack(v.moments(o)),
    "inner": lambda v, o: v.inner((v.values(), o), (o, None), (o, o)),
    "inner, not exact": lambda v, o: v.inner((v.values(), o), exact=False),
    "displacement": lambda v, o: v.displacement(o),
    "displacement, exact": lambda v, o: v.displacement(o, exact=True),
    "scale": lambda v, o: v.scale_(2 + factor_of(v)),
    "scale others": lambda v, o: v.scale_(2 + factor_of(v), o),
    "add": lambda v, o: v.add_scaled_(factor_of(v), o),
    "stretch": lambda v, o: v.stretch_(o, 2 + factor_of(v), 1 + factor_of(v)),
    "decay": lambda v, o: v.decay_shortened_(factor_of(v), o),
    "decay of known": lambda v, o: v.decay_shortened_(factor_of(v), o, v.shortened(o)),
    "remove radial": lambda v, o: v.remove_radial_(o, factor_of(v)),
    "remove known": lambda v, o: torch.stack(
        v.remove_radial_of_(o, 1 + factor_of(v), factor_of(v))
    ),
}


def factor_of(vectors: WeightVectors) -> torch.Tensor:
    return torch.linspace(0.1, 0.9, vectors.n, dtype=torch.float64)


@pytest.mark.parametrize("copied", [0, 2**12])
@pytest.mark.parametrize("name", OPERATIONS)
def test_small_weights_give_and_become_what_they_do_one_by_one(name, copied, monkeypatch):
    monkeypatch.setattr(lots, "COPIED_ENTRIES", copied)
    found = []
    for together in (True, False):
        vectors, others = several(monkeypatch, together=together)
        with torch.no_grad():
            result = OPERATIONS[name](vectors, others)
        found.append((result, [w.detach() for w in vectors.weights], others))
    (result, weights, others), (result_alone, weights_alone, others_alone) = found
    if result is not None:
        # The last weight is the one in float32.
        first = vectors.slices[-1].start
        exact, rounded = (slice(None, first), 1e-12), (slice(first, None), 1e-6)
        for where, error in (exact, rounded):
            here, alone = result[..., where], result_alone[..., where]
            torch.testing.assert_close(here, alone, rtol=error, atol=error)
    for a, b in zip(weights + others, weights_alone + others_alone, strict=True):
        if a is not None:
            error = 1e-6 if a.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(a, b, rtol=error, atol=error)


class Calls(TorchDispatchMode):
    """Counts all calls of torch, those of a list of tensors as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def layers(count: int) -> tuple[WeightVectors, list[torch.Tensor]]:
    """Some 8x8 and some 4x8 and 6x6 that are one vector each, in turns."""
    weights, partitions = [], []
    for i in range(count):
        shape = [(8, 8), (4, 8), (6, 6)][i % 3]
        weights.append(nn.Parameter(randn(*shape)))
        partitions.append((Partition.layer if i % 3 == 2 else Partition.filters)(shape))
    return WeightVectors(weights, partitions), [weight.detach() * 1.1 for weight in weights]


@pytest.mark.parametrize("name", OPERATIONS)
def test_as_many_calls_of_torch_for_many_small_weights_as_for_few(name):
    counts = []
    for count in (9, 90):
        vectors, others = layers(count)
        with torch.no_grad():
            given = vectors.shortened(others) if "known" in name and "decay" in name else None
            # Twice: the first time, memory is taken that is kept.
            for _ in range(2):
                with Calls() as calls:
                    if given is not None:
                        vectors.decay_shortened_(factor_of(vectors), others, given)
                    else:
                        OPERATIONS[name](vectors, others)
        counts.append(calls.count)
    assert counts[0] == counts[1]


def rows_of(lengths: list[int]) -> WeightVectors:
    """Weights of 30 rows each, of these lengths: the same numbers for the same length."""
    weights, partitions = [], []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        weights.append(nn.Parameter(torch.randn(30, length, generator=generator)))
        partitions.append(Partition.filters((30, length)))
    return WeightVectors(weights, partitions)


BESIDE = [[44], [9, 44], [44, 216], [500, 44, 64, 12], [44] * 20, [44, *[64] * 20]]


@pytest.mark.parametrize("name", ["norms", "moments", "inner, not exact", "displacement"])
def test_a_sum_is_the_same_to_the_bit_whoever_lies_beside_it(name):
    found = []
    for lengths in BESIDE:
        vectors = rows_of(lengths)
        others = [weight.detach() * 1.1 + 0.01 for weight in vectors.weights]
        with torch.no_grad():
            result = OPERATIONS[name](vectors, others)
        found.append(result[..., vectors.slices[lengths.index(44)]])
    for result in found[1:]:
        assert torch.equal(result, found[0])


def test_what_is_not_finite_behind_a_row_is_gone_in_the_next_pass():
    vectors = rows_of([12, 40])
    before = [weight.detach().clone() for weight in vectors.weights]
    norms = vectors.norms()
    with torch.no_grad():
        vectors.stretch_(before, torch.full((60,), torch.inf), torch.ones(60))
        assert not vectors.norms().isfinite().any()
        for weight, old in zip(vectors.weights, before, strict=True):
            weight.copy_(old)
    assert torch.equal(vectors.norms(), norms)


def test_a_snapshot_on_the_way_is_one_call():
    counts = []
    for count in (9, 90):
        vectors, _ = layers(count)
        copies = [torch.empty_like(weight) for weight in vectors.weights]
        with torch.no_grad():
            weights = vectors.values()
            # The first time, memory is taken that is kept.
            vectors.inner((weights, weights))
            with Calls() as calls:
                vectors.inner((weights, weights), copy=(weights, copies))
        assert all(map(torch.equal, copies, vectors.weights))
        counts.append(calls.count)
    assert counts[0] == counts[1]


def stack_of(count: int) -> Stack:
    return Stack(range(count), range(count), [torch.Size([2, 3])] * count, 3)


def test_what_a_stack_puts_back_was_copied_into_memory_that_is_cut_already():
    stack = stack_of(3)
    tensors = [randn(2, 3) for _ in range(3)]
    first, other = stack.views([tensors, tensors], changed=0)
    assert torch.equal(first, other)
    parts = stack._parts(first, 0)
    assert stack._parts(stack.views([tensors], changed=0)[0], 0) is parts
    assert stack._parts(other, 0) is not parts
    before = [tensor.clone() for tensor in tensors]
    first.mul_(2)
    # Where one of the operands has no weight, nothing is changed.
    stack.put_back(first, [tensors, [tensors[0], None, tensors[2]]], 0)
    changed = [torch.equal(a, 2 * b) for a, b in zip(tensors, before, strict=True)]
    assert changed == [True, False, True]
    assert torch.equal(tensors[1], before[1])


def test_no_dtype_is_converted_on_the_way_to_memory_that_is_kept():
    narrow, wide = randn(2, 3).float(), randn(2, 3).double()
    (view,) = stack_of(2).views([[narrow, wide]], changed=0)
    assert torch.equal(view[2:], wide)
