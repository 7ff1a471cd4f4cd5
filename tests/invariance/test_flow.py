"""Reshapes and offsets of a flow equal those of the whole tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_normdyn.invariance.flow import (
    NO_ROW,
    Flow,
    Offset,
    compact,
    joined,
    without_dims,
)
from lightning_normdyn.invariance.rows import Rows


@pytest.mark.parametrize(
    ("small", "old", "new"),
    [
        ((1, 6, 1), (4, 6, 5), (4, 2, 3, 5)),
        ((1, 6, 1), (4, 6, 5), (4, 30)),
        ((4, 1, 1), (4, 6, 5), (2, 2, 6, 5)),
        ((1, 1, 5), (4, 6, 5), (24, 5)),
        ((1, 6), (4, 6), (1, 4, 6)),
        ((1, 6), (4, 6), (24,)),
        ((1, 6, 1), (4, 6, 1), (4, 6)),
        ((6,), (6,), (1, 6, 1, 1)),
        ((1, 1), (4, 6), (3, 8)),
        ((1,), (1,), ()),
        ((), (), (1, 1)),
        ((4, 6), (4, 6), (2, 12)),
        ((1, 6), (1, 6), (6,)),
        ((2, 1, 6), (2, 3, 6), (6, 6)),
    ],
)
def test_reshapes_equal_expanding_first(small, old, new):
    rows = torch.arange(torch.Size(small).numel()).reshape(small)
    flow = Flow(1, rows).reshaped(old, new)
    assert flow.rows.ndim == len(new)
    assert torch.equal(flow.rows.expand(new), rows.expand(old).reshape(new))


def test_reshapes_of_nothing():
    flow = Flow(1, torch.ones(1, 3, dtype=torch.long))
    assert flow.reshaped((0, 3), (3, 0)).rows.shape == (1, 1)


@pytest.mark.parametrize(
    ("varies", "old", "new", "after", "parameter"),
    [
        ((False, True, False), (4, 6, 5), (4, 6, 5, 1), (False, True, False, False), "b"),
        ((False, True, False), (4, 6, 5), (4, 2, 3, 5), (False, True, True, False), None),
        (
            (False, True, False),
            (4, 6, 5),
            (1, 24, 5),
            (False, True, False),
            "b",
        ),  # InstanceNorm: the bias again from its start
        ((True, False, False), (4, 6, 5), (1, 24, 5), (False, True, False), None),
        ((False, True), (4, 6), (24,), (True,), "b"),
    ],
)
def test_reshapes_of_offsets(varies, old, new, after, parameter):
    offset = Offset(varies, 0, "b")
    flow = Flow(1, torch.ones([1] * len(old), dtype=torch.long), offset)
    result = flow.reshaped(old, new).offset
    assert result.varies == after
    assert result.parameter == parameter


def test_compact():
    assert compact(torch.tensor([[1, 1], [2, 2]])).tolist() == [[1], [2]]
    assert compact(torch.tensor([[1, 2], [1, 2]])).tolist() == [[1, 2]]


def test_new_offsets_differ():
    flow = Flow(1, torch.ones(1, dtype=torch.long))
    assert flow.shifted((True,)).offset.token != flow.shifted((True,)).offset.token


def test_an_offset_stays_itself_while_dimensions_come_and_go_in_front():
    """Broadcasting aligns at the right."""
    flow = Flow(1, torch.ones(1, 1, dtype=torch.long), Offset((False, True), "b", "b"))
    in_front, between = flow.unsqueezed(0).offset, flow.unsqueezed(2).offset
    assert (in_front.varies, in_front.token) == ((False, False, True), "b")
    assert between.varies == (False, True, False)
    assert between.token != "b"
    assert flow.unsqueezed(2).offset.token == between.token

    assert without_dims(flow.offset, [0]) == Offset((True,), "b", "b")
    gone = without_dims(flow.offset, [1])
    assert gone.varies == (False,)
    assert gone.parameter is None
    behind = without_dims(Offset((True, False), "b", "b"), [1])
    assert (behind.varies, behind.parameter) == ((True,), "b")
    assert behind.token != "b"


def test_a_bias_is_known_by_its_place_along_one_dimension():
    flow = Flow(1, torch.ones(1, 1, dtype=torch.long))
    once = flow.shifted((False, True), "bias").offset
    assert (once.parameter, once.what) == ("bias", "bias bias")
    assert flow.shifted((False, True), "bias").offset.token == once.token
    assert flow.shifted((True, True), "bias").offset.parameter is None
    twice = replace(flow, offset=once).shifted((True, False), "bias").offset
    assert twice.varies == (True, True)
    assert twice.parameter is None


def test_parts_of_several_degrees_are_told_apart():
    flows = [Flow(degree, torch.ones(1, dtype=torch.long)) for degree in (1, 2, 3)]
    assert [part.degree for part in joined(flows).parts] == [1, 2, 3]
    assert all(part.other is None for part in joined(flows).parts)
    assert joined(flows[:1]) is flows[0]


def test_the_shared_row_of_what_does_not_scale_stays_zero():
    rows = Rows(3)
    rows.forbid(torch.tensor([1, 2]), "because")
    assert NO_ROW.tolist() == [0]
    assert rows.parent.tolist() == [0, 0, 0, 3]
