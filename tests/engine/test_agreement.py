"""What all ranks hold to be true."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from ranks import init_process_group, run_ranks

from lightning_normdyn.engine.agreement import agree, everywhere
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.verdict import Verdict


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
