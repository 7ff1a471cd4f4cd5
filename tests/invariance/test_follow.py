"""A walk from the weights to the loss."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.invariance import follow as walk
from lightning_normdyn.invariance.flow import Blocked, Flow
from lightning_normdyn.invariance.follow import follow
from lightning_normdyn.invariance.graph import trace
from lightning_normdyn.invariance.rows import Rows


def rows_of(loss: torch.Tensor, w: torch.Tensor) -> Rows:
    """What a walk finds about the rows of a matrix."""
    edge = torch.autograd.graph.get_gradient_edge(w)
    graph = trace(loss, {(edge.node, edge.output_nr): "w"}, lambda node: ("", None))
    n = len(w)
    rows = Rows(n)
    follow(graph, {"w": torch.arange(1, n + 1)[:, None]}, {"w": rows})
    return rows


def matrix(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, requires_grad=True)


def test_rows_that_are_normalized_one_by_one_are_free():
    w = matrix()
    rows = rows_of((w / w.norm(dim=1, keepdim=True)).sum(), w)
    assert rows.parent.tolist() == [0, 1, 2, 3]
    assert rows.met[1:].all()
    assert list(rows.norms) == ["DivBackward0"]
    assert not rows.reasons
    assert not rows.varies


def test_rows_that_are_normalized_together_are_one():
    w = matrix()
    assert rows_of((w / w.norm()).sum(), w).parent.tolist() == [0, 1, 1, 1]


def test_what_reaches_the_loss_must_not_be_scaled():
    w = matrix()
    rows = rows_of(w.sum(), w)
    assert rows.parent.tolist() == [0, 0, 0, 0]
    assert any("mixes entries" in reason or "loss" in reason for reason in rows.reasons)


def test_an_operation_without_a_rule_costs_only_its_rows():
    w = matrix()
    normalized = w / w.norm(dim=1, keepdim=True)
    rows = rows_of(normalized.sum() + w[:1].tanh().sum(), w)
    assert rows.parent.tolist() == [0, 0, 2, 3]
    assert list(rows.reasons) == ["TanhBackward0 does not commute with a change of scale"]


def test_rows_that_no_entry_is_read_of_are_not_known():
    w = matrix()
    read = w[:2] / w[:2].norm(dim=1, keepdim=True)
    rows = rows_of(read.sum() + w[2:2].tanh().sum(), w)
    assert rows.reached().tolist() == [True, True, True, False]
    assert rows.varies


def test_thirds_add_up():
    w = matrix()
    size = w.abs().pow(3).sum(1, keepdim=True).pow(1 / 3)
    assert rows_of((w / size).sum(), w).parent.tolist() == [0, 1, 2, 3]


def test_a_later_walk_adds_to_what_was_met():
    w = matrix()
    edge = torch.autograd.graph.get_gradient_edge(w)
    names, rows = {(edge.node, edge.output_nr): "w"}, Rows(3)
    for part in (w[:1], w[1:]):
        graph = trace((part / part.norm(dim=1, keepdim=True)).sum(), names, lambda _: ("", None))
        follow(graph, {"w": torch.arange(1, 4)[:, None]}, {"w": rows})
    assert rows.reached().all()
    assert rows.varies


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (Blocked("not this way"), "not this way"),
        (KeyError("x"), "the rule for ReluBackward0 failed (KeyError: 'x')"),
    ],
)
def test_a_rule_that_raises_costs_a_target_and_no_run(monkeypatch, raised, reason):
    def rule(operation, flows):
        raise raised

    monkeypatch.setitem(walk.RULES, "ReluBackward0", rule)
    w = matrix()
    rows = rows_of(w.relu().norm(), w)
    assert list(rows.reasons) == [reason]
    assert rows.parent.tolist() == [0, 0, 0, 0]


def test_degrees_pass_one_by_one_where_one_tensor_has_several(monkeypatch):
    """Entries that scale by different degrees: a rule sees one of them at a time."""
    seen = []

    def two_degrees(operation, flows):
        (flow,) = flows
        other = Flow(2, torch.where(flow.rows == 1, flow.rows, 0))
        return Flow(1, torch.where(flow.rows == 1, 0, flow.rows), other=other)

    def remember(operation, flows):
        seen.append(flows[0].degree)
        return flows[0]

    monkeypatch.setitem(walk.RULES, "ReluBackward0", two_degrees)
    monkeypatch.setitem(walk.RULES, "AbsBackward0", remember)
    w = matrix()
    rows = rows_of(w.relu().abs(), w)
    assert seen == [1, 2]
    assert list(rows.reasons) == ["its scale reaches the loss"]

    w = matrix()
    rows = rows_of(w.relu() * w, w)
    assert list(rows.reasons) == ["MulBackward0 combines entries that scale differently"]
