"""Reshapes and offsets of a flow equal those of the whole tensor."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.invariance.flow import Flow, Offset, compact, new_offset, reshaped


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
    flow = reshaped(Flow(1, rows), old, new)
    assert flow.rows.ndim == len(new)
    assert torch.equal(flow.rows.expand(new), rows.expand(old).reshape(new))


def test_reshapes_of_nothing():
    assert reshaped(Flow(1, torch.ones(1, 3, dtype=torch.long)), (0, 3), (3, 0)).rows.shape == (
        1,
        1,
    )


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
    result = reshaped(
        Flow(1, torch.ones([1] * len(old), dtype=torch.long), offset), old, new
    ).offset
    assert result.varies == after
    assert result.parameter == parameter


def test_compact():
    assert compact(torch.tensor([[1, 1], [2, 2]])).tolist() == [[1], [2]]
    assert compact(torch.tensor([[1, 2], [1, 2]])).tolist() == [[1, 2]]


def test_new_offsets_differ():
    assert new_offset([True]).token != new_offset([True]).token
