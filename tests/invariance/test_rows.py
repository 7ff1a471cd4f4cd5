"""Rows that must be scaled together: union-find against a naive one."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.invariance.rows import Rows


def naive_classes(n: int, pairs) -> list[int]:
    label = list(range(n))
    for a, b in pairs:
        a, b = label[a], label[b]
        label = [min(a, b) if x in (a, b) else x for x in label]
    return label


@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_a_naive_union_find(seed):
    torch.manual_seed(seed)
    rows, n = Rows(40), 41
    pairs = []
    for _ in range(4):
        a, b = torch.randint(n, (2, 6)).unbind()
        rows.unite(a, b, "because")
        pairs += list(zip(a.tolist(), b.tolist(), strict=True))
    assert rows.parent.tolist() == naive_classes(n, pairs)


def test_rows_broadcast_and_give_the_reason_only_when_freedom_is_lost():
    rows = Rows(6)
    rows.unite(torch.tensor([[1], [2]]), torch.tensor([[3, 4]]), "meeting")
    assert rows.parent.tolist() == [0, 1, 1, 1, 1, 5, 6]
    assert not rows.reasons
    rows.forbid(torch.tensor([4]), "stopped")
    assert rows.parent.tolist() == [0, 0, 0, 0, 0, 5, 6]
    assert list(rows.reasons) == ["stopped"]
