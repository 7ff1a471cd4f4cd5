"""Which vectors a rank holds, and where the numbers that the optimizer updates lie."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normdyn.geometry.pieces import Piece, Placement, Sharing, itself
from lightning_normdyn.geometry.wrapped import Master


def placement(
    labels: list[int], n: int, *, shared: bool, master: Master | None = None
) -> Placement:
    piece = Piece(itself, (0,), torch.tensor(labels))
    none = torch.zeros(n, dtype=torch.bool)
    sharing = Sharing(none, none, none, True, False, None) if shared else None
    return Placement((len(labels), 2), n, itself, (piece,), sharing, master)


def test_a_rank_holds_what_its_pieces_name():
    assert placement([3, 3, -1, 1], 5, shared=True).held.tolist() == [1, 3]
    assert placement([-1, -1], 5, shared=True).held.tolist() == []


def test_without_shards_it_holds_all():
    assert placement([0, 2, -1], 3, shared=False).held.tolist() == [0, 1, 2]


def test_values_and_gradients_have_no_history():
    weight = nn.Parameter(torch.ones(2, 2))
    place = placement([0, 1], 2, shared=False)
    assert place.gradient(weight) is None
    weight.grad = 2 * weight  # as a backward pass that keeps its graph leaves it
    assert not place.gradient(weight).requires_grad
    place.value(weight).mul_(3)
    assert weight.tolist() == [[3.0, 3.0]] * 2


def test_what_is_updated_instead_comes_first():
    flat = torch.arange(10.0)
    place = placement([0, 1], 2, shared=False, master=Master(flat, 3, 4))
    assert place.value(nn.Parameter(torch.zeros(2, 2))).tolist() == [3.0, 4.0, 5.0, 6.0]
