"""Rows of local tensors and the vectors that they belong to."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, by_vector, labels_of

from lightning_normdyn.geometry.index import RowIndex, Rows
from lightning_normdyn.geometry.placement import place

CPU = torch.device("cpu")


def index_of(*kinds: str) -> RowIndex:
    return RowIndex([place(*KINDS[kind]) for kind in kinds], CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_entries_of_one_vector(kind):
    weight, partition = KINDS[kind]
    (piece,) = place(weight, partition).pieces
    rows = Rows(piece)
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

    numbers = index.to_rows(torch.arange(float(index.n)), dummy=-1.0)
    of_kind = torch.where(index.pieces[1][1].labels < 0, -7, index.pieces[1][1].labels)
    assert torch.equal(numbers[1], (of_kind + 6).float())


def test_whole_filters_need_no_index():
    assert index_of("conv", "linear", "layer").in_order
    assert not index_of("conv", "packed qkv").in_order
    assert not index_of("pixel shuffle").in_order
