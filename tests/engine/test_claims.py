"""What is believed of the weights of a fit: gains and numbers that are no vectors."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from models import fit_batches as fit
from ranks import init_process_group, run_ranks
from torch import nn

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor, WeightRescaling
from lightning_normdyn.engine.claims import agree, everywhere
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.verdict import Verdict


class WithGains(L.LightningModule):
    """A depthwise 1x1 convolution in front of a BatchNorm, gains of several shapes, and the
    embedding of a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.depthwise, self.norm = nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.layer_scale, self.gain = (
            nn.Parameter(torch.ones(8, 1, 1)),
            nn.Parameter(torch.ones(1, 8, 1, 1)),
        )
        self.number = nn.Sequential(nn.Linear(1, 6, bias=False), nn.LayerNorm(6, eps=1e-12))
        self.head = nn.Linear(14, 1)

    def training_step(self, batch, batch_idx=0):
        x = self.body(batch)
        x = (x + self.layer_scale * self.gain * self.norm(self.depthwise(x))).mean((2, 3))
        return (
            self.head(torch.cat([x, self.number(batch.std((1, 2, 3))[:, None])], 1)).square().mean()
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 4, 1, 6, 6, generator=generator))


GAINS = ["depthwise.weight", "layer_scale", "gain"]


def test_gains_are_left_out_of_numbers_and_tables(capsys):
    monitor = NormDynamicsMonitor(1)
    fit(WithGains(), [monitor, AdaptiveWeightShrink(0.1)], pictures())
    names = {
        key.partition("/")[2]
        for row in monitor.history
        for key in row
        if not key.startswith("normdyn/")
    } - {""}
    assert {"body.0.weight", "number.0.weight", "head.weight"} <= names
    assert not names & set(GAINS)
    printed = capsys.readouterr().out
    assert "body.0.weight" in printed
    # As a word of its own: "against" has one of the names in it.
    assert not [name for name in GAINS if re.search(rf"(?<![\w.]){re.escape(name)}\b", printed)]


@pytest.mark.parametrize("name", GAINS)
def test_a_gain_that_a_person_names_is_refused(name):
    with pytest.raises(
        ValueError, match=f"`{name}` was asked to be a target, but its rows are single numbers"
    ):
        fit(WithGains(), [AdaptiveWeightShrink(0.1, params=["body*", name])], pictures())


class Embedded(L.LightningModule):
    """The embedding of a number; a loss of its own sees its length in batches above zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.number, self.norm, self.head = (
            nn.Linear(1, 6, bias=False),
            nn.LayerNorm(6, eps=1e-12),
            nn.Linear(6, 1),
        )

    def training_step(self, batch, batch_idx=0):
        embedded = self.number(batch[:, None])
        loss = self.head(self.norm(embedded)).square().mean()
        return loss + embedded.square().mean() if batch.min() > 0 else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_numbers_that_turn_out_to_be_no_vector_do_not_end_a_fit():
    below, above = torch.linspace(-2, -1, 8), torch.linspace(1, 2, 8)
    rule = WeightRescaling(1, params="number.weight")
    with (
        pytest.warns(
            NormDynWarning, match=r"`number.weight` is no longer taken for scale-invariant"
        ),
        pytest.warns(
            NormDynWarning,
            match=r"leaves `number.weight` alone from now on\. .* its rows are single numbers",
        ),
    ):
        fit(Embedded(), [rule], [below] * 4 + [above] * 40, log_every_n_steps=1)
    assert not rule.plans


def test_gains_that_a_pattern_brings_along_are_left_alone():
    rule = WeightRescaling(1, params=["body*", "depth*", "number*", "*gain"])
    fit(WithGains(), [rule], pictures())
    assert [t.name for t in rule.plans[0].targets] == ["body.0.weight", "number.0.weight"]


def claim(name: str, granularity: str = "filter", reason: str = "") -> Verdict:
    partition = Partition.filters((3, 4)) if granularity == "filter" else Partition.layer((3, 4))
    return Verdict(name, (3, 4), partition, granularity, ("norm",), reason=reason)


def test_one_process_agrees_with_itself():
    verdicts = {"w": claim("w")}
    agree(verdicts)
    assert verdicts["w"].partition is not None
    assert everywhere(True)
    assert not everywhere(False)


def agreed() -> Any:
    """In a rank: what becomes of verdicts that differ, and of those that only one rank has."""
    init_process_group()
    rank = dist.get_rank()
    verdicts = {
        "same": claim("same", reason=f"seen {rank} times"),
        "other": claim("other", "filter" if rank else "layer"),
    }
    if rank:
        verdicts["alone"] = claim("alone")
    agree(verdicts)
    kinds = {name: (verdict.kind, verdict.reason) for name, verdict in verdicts.items()}
    return kinds, everywhere(rank == 0), everywhere(rank < 2)


def test_a_weight_on_which_the_ranks_differ_is_unknown_on_all_of_them():
    for rank, (kinds, only_on_one, on_all) in run_ranks(agreed, 2).items():
        assert kinds.pop("same") == ("filter", f"seen {rank} times")
        assert kinds == dict.fromkeys(
            ("other", "alone"), ("unknown", "the ranks see different graphs")
        )
        assert not only_on_one
        assert on_all
