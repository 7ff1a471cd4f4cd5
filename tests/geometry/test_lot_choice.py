"""Which small weights lie together: as many as fit, by their own shapes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry.lots import Alone, Lot, Padded, Stack


def lots_of_rows(lengths: list[int], rows: int = 3) -> list[Lot]:
    """Of weights whose rows have these lengths."""
    weights = [nn.Parameter(torch.ones(rows, length)) for length in lengths]
    partitions = [Partition.filters((rows, length)) for length in lengths]
    return WeightVectors(weights, partitions)._kernels._lots


def test_a_stack_fits_the_cache(monkeypatch):
    monkeypatch.setattr("lightning_normdyn.geometry.kernels.CACHED_ENTRIES", 100)
    weights = [nn.Parameter(torch.ones(rows, 8)) for rows in (5, 5, 5, 20, 2)]
    partitions = [Partition.filters(tuple(weight.shape)) for weight in weights]
    stacks = WeightVectors(weights, partitions)._kernels._lots
    limit = 100 * torch.get_num_threads()
    sizes = [sum(weights[i].numel() for i in stack.weights) for stack in stacks]
    assert all(size <= limit or len(s.weights) == 1 for size, s in zip(sizes, stacks, strict=True))
    assert sum(sizes) == 37 * 8


def test_rows_of_several_lengths_lie_in_one_tensor_and_in_stacks_where_zeros_disturb():
    (lot,) = lots_of_rows([12, 216, 9, 108, 12])
    assert isinstance(lot, Padded)
    assert [stack.weights for stack in lot.without_zeros()] == [[2], [0, 4], [3], [1]]


def test_rows_that_fill_the_width_by_themselves_get_no_zeros():
    (lot,) = lots_of_rows([128] * 3)
    assert type(lot) is Stack
    # Many of them are no worse off beside others.
    kinds = {type(lot) for lot in lots_of_rows([*[64] * 16, 12])}
    assert kinds == {Stack, Padded}


def test_what_would_be_mostly_zeros_is_left_as_it_is():
    assert [type(lot) for lot in lots_of_rows([8, 12])] == [Stack, Padded]
    (lot,) = lots_of_rows([9], rows=2**10)
    assert type(lot) is Stack
    assert len(lots_of_rows([12, 1500], rows=40)) == 2


def test_a_large_weight_lies_alone():
    kinds = [type(lot) for lot in lots_of_rows([12, 2**13], rows=3)]
    assert kinds == [Padded, Alone]
