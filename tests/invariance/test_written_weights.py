"""Weights that the forward pass itself writes have no length to steer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from models import Net, fit, loader, make
from torch import nn

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.invariance.search import ScaleInvarianceSearch


class Rescaling(nn.Module):
    """A lookup, or a linear map, that sets the length of its weight's rows in every forward
    pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(7, 8)), how

    def forward(self, ids):
        if self.how == "functional embedding":
            return F.embedding(ids, self.weight, max_norm=1.0)
        if self.how == "functional bag":
            return F.embedding_bag(ids, self.weight, max_norm=1.0)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))
        return F.one_hot(ids, 7).to(self.weight) @ self.weight


@pytest.mark.parametrize(
    ("lookup", "reason"),
    [
        (lambda: nn.Embedding(7, 8, max_norm=1.0), "max_norm of e rescales the rows"),
        (lambda: nn.EmbeddingBag(7, 8, max_norm=1.0), "max_norm of e rescales the rows"),
        (
            lambda: Rescaling("functional embedding"),
            "the forward pass of Rescaling writes it in place",
        ),
        (lambda: Rescaling("functional bag"), "the forward pass of Rescaling writes it in place"),
        (lambda: Rescaling("by hand"), "the forward pass of Rescaling writes it in place"),
    ],
)
def test_weights_that_the_forward_pass_rescales_are_not_claimed(lookup, reason):
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=lookup(), n=nn.LayerNorm(8))
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(zoo.tokens()).square().sum())
    verdict = search.verdicts["e.weight"]
    assert (verdict.kind, verdict.partition, verdict.unread) == ("no", None, None)
    assert reason in verdict.reason


class Table(Net):
    """A training step that looks up a table in front of a LayerNorm, without any module's
    forward."""

    def __init__(self, max_norm: float | None = None, bag: bool = False, **arguments):
        super().__init__(**arguments)
        self.table, self.child = (
            nn.Parameter(torch.randn(7, 8).double()),
            nn.Embedding(7, 8).double(),
        )
        self.max_norm, self.look_up = max_norm, F.embedding_bag if bag else F.embedding

    def training_step(self, batch, batch_idx=0):
        ids = torch.arange(7)[:, None]
        loss = super().training_step(batch)
        for table in (self.table, self.child.weight):
            read = F.layer_norm(self.look_up(ids, table, max_norm=self.max_norm), [8])
            weights = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
            loss = loss + (read @ weights).square().mean()
        return loss


def kinds(net: Table, losses: int = 1) -> dict[str, str]:
    search = ScaleInvarianceSearch(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batch = next(iter(loader()))
    with search:
        for _ in range(losses):
            loss = net.training_step(batch)
            search.analyze(loss)
            loss.backward()
            optimizer.step()
    return {name: search.verdicts[name].kind for name in ("table", "child.weight")}


@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
def test_a_table_that_a_training_step_rescales_is_not_claimed(bag):
    claimed = "layer" if bag else "filter"
    assert kinds(make(Table, bag=bag)) == {"table": claimed, "child.weight": claimed}
    assert kinds(make(Table, bag=bag, max_norm=0.5)) == {"table": "no", "child.weight": "no"}


def test_the_step_of_an_optimizer_between_two_losses_is_no_write_of_the_forward_pass():
    assert kinds(make(Table), losses=3) == kinds(make(Table))


def test_a_write_before_the_batch_is_none_of_the_forward_pass():
    net = make(Table)
    with torch.no_grad():
        net.table.mul_(2)
    assert kinds(net)["table"] == kinds(make(Table))["table"]


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_fit_leaves_such_a_table_alone(max_norm, capsys):
    fit(make(Table, max_norm=max_norm), [AdaptiveWeightShrink(0.01)], max_epochs=1)
    table_of_targets = capsys.readouterr().out
    assert "net.0.weight" in table_of_targets
    assert ("child.weight" in table_of_targets) is (max_norm is None)
