"""Which vectors a rank holds, and where the numbers that the optimizer updates lie."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_normdyn import NotSupportedError
from lightning_normdyn.geometry import flat
from lightning_normdyn.geometry.flat import FlatSlice, forget, remember
from lightning_normdyn.geometry.pieces import (
    TESTED,
    Master,
    Piece,
    Placement,
    Sharing,
    itself,
    private,
)
from lightning_normdyn.geometry.placement import gradient_of, has_gradient, is_plain, version_of


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


def test_value_and_gradient_are_windows_on_the_flat_tensor():
    master = Master(torch.arange(10.0), 2, 3)
    assert master.gradient() is None
    master.flat.grad = torch.arange(10.0) * 10
    assert master.of(master.flat).tolist() == [2.0, 3.0, 4.0]
    assert master.gradient().tolist() == [20.0, 30.0, 40.0]
    master.of(master.flat).zero_()
    assert master.flat[:6].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 5.0]


def test_questions_about_a_weight_are_asked_of_its_master():
    weight, master = nn.Parameter(torch.ones(1, 3)), Master(torch.zeros(10), 2, 3)
    assert is_plain(weight)
    assert not has_gradient(weight)
    remember({weight: FlatSlice((1, 3), (0, 1), 0, 3, 0, None, master)})
    try:
        assert not is_plain(weight)
        assert has_gradient(weight)  # it comes within the step
        assert gradient_of(weight) is None
        before = version_of(weight)
        master.flat.add_(1)
        assert version_of(weight) == before + 1
    finally:
        forget([weight])
    assert is_plain(weight)
    assert weight not in flat._SLICES


def test_private_attributes_in_order():
    assert private(SimpleNamespace(_a=1, _b=2), "_b", "_a") == [2, 1]


def test_a_missing_one_is_named_with_both_versions():
    with pytest.raises(NotSupportedError, match="SimpleNamespace has no `_b`") as error:
        private(SimpleNamespace(_a=1), "_a", "_b")
    assert TESTED in str(error.value)
    assert torch.__version__ in str(error.value)
