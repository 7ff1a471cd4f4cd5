"""A kernel sees every entry once, in chunks of the size that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_normdyn.geometry.chunks import cuts_rows, in_chunks

WEIGHTS = {
    "contiguous": torch.arange(6 * 4 * 5).reshape(6, 4, 5),
    "channels last": torch.arange(6 * 5 * 4).reshape(6, 5, 4).movedim(-1, 1),
    "transposed": torch.arange(4 * 6 * 5).reshape(4, 6, 5).transpose(0, 1),
    "one long row": torch.arange(120).reshape(1, 120, 1),
}


def taken(weight: Tensor, entries: int, **settings: bool) -> tuple[list[Tensor], Tensor]:
    """The chunks that a kernel got, and sums over rows that it added up."""
    seen: list[Tensor] = []

    def kernel(dims, outs, views):
        seen.append(views[0])
        outs[0].add_(views[0].sum(dims, keepdim=True))
        assert views[1] is None

    sums = torch.zeros(len(weight), 1, 1, dtype=torch.int64)
    in_chunks(kernel, [sums], [weight, None], [1, 2], entries, **settings)
    return seen, sums


@pytest.mark.parametrize("entries", [1, 3, 7, 20, 50, 119, 120, 1000])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_entry_is_taken_once(name, entries):
    weight = WEIGHTS[name]
    seen, sums = taken(weight, entries)
    assert sorted(torch.cat([x.flatten() for x in seen]).tolist()) == list(range(120))
    assert max(x.numel() for x in seen) <= entries
    assert torch.equal(sums, weight.sum((1, 2), keepdim=True))
    cut = any(x.shape[1:] != weight.shape[1:] for x in seen)
    assert cuts_rows(weight, [1, 2], entries) == cut


@pytest.mark.parametrize("entries", [1, 20, 50])
@pytest.mark.parametrize("name", WEIGHTS)
def test_whole_rows_are_never_cut(name, entries):
    weight = WEIGHTS[name]
    seen, sums = taken(weight, entries, whole_rows=True)
    assert all(x.shape[1:] == weight.shape[1:] for x in seen)
    assert torch.equal(sums, weight.sum((1, 2), keepdim=True))
