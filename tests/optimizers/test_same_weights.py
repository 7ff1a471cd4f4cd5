"""Whether lists of weights are told apart by identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.optimizers.same_weights import SameWeights

SHAPES = [(0,), (), (1,), (1, 1), (2,), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beside", SHAPES, ids=str)
def test_an_equal_weight_is_another_one(shape, beside):
    first, second, third = (nn.Parameter(torch.ones(s)) for s in (shape, shape, beside))
    known = SameWeights([[third, first]])
    assert known.are_in([[third, first]])
    assert not known.are_in([[third, second]])
    assert not known.are_in([[first, third]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("other", SHAPES, ids=str)
def test_a_weight_of_another_shape_is_another_one(shape, other):
    known = SameWeights([[nn.Parameter(torch.ones(shape))]])
    assert not known.are_in([[nn.Parameter(torch.ones(other))]])


@pytest.mark.parametrize(
    "other",
    [nn.UninitializedParameter(), torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3).to_sparse()],
    ids=["lazy", "integers", "sparse"],
)
def test_a_weight_of_another_kind_is_another_one(other):
    weight = nn.Parameter(torch.ones(2, 3))
    assert not SameWeights([[weight]]).are_in([[other]])
    assert not SameWeights([[other]]).are_in([[weight]])
    assert SameWeights([[other]]).are_in([[other]])


def test_lists_of_other_lengths_are_others():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    known = SameWeights([[first], [second]])
    assert known.are_in([[first], [second]])
    for others in ([[first]], [[first], [second], []], [[first, second]], [[], [first, second]]):
        assert not known.are_in(others)


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_a_group_holds_its_weights_in_does_not_matter(kind):
    weights = kind(nn.Parameter(torch.ones(2)) for _ in range(2))
    known = SameWeights([weights])
    assert known.are_in([weights])
    assert known.are_in([kind(weights)])


def test_a_list_that_is_changed_afterwards_is_another_one():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    weights = [first, second]
    known = SameWeights([weights])
    weights.reverse()
    assert not known.are_in([weights])
