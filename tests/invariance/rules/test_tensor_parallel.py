"""Between a DTensor and the part of it on one rank."""

from __future__ import annotations

import ranks
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance.search import ScaleInvarianceSearch


def test_each_rank_follows_its_part_and_claims_nothing_before_the_ranks_agree():
    def on_rank():
        from torch.distributed.tensor import (
            DTensor,
            Replicate,
            Shard,
            distribute_tensor,
            init_device_mesh,
        )

        ranks.init_process_group()
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        x = zoo.vectors()

        def by_filter(m):
            y = F.linear(x, m.a.to_local())
            return (y / y.norm(dim=0)).sum()

        def gathered(m):
            y = DTensor.from_local(F.linear(x, m.a.to_local()), mesh, [Shard(1)])
            y = y.redistribute(placements=[Replicate()]).to_local()
            return (y / y.norm(dim=0)).sum()

        found = []
        for loss in (by_filter, gathered):
            net = nn.Module()
            net.a = nn.Parameter(distribute_tensor(torch.randn(4, 6).double(), mesh, [Shard(0)]))
            with ScaleInvarianceSearch(net) as search:
                search.analyze(loss(net))
            before = search.verdicts["a"].kind
            search.agree()
            found.append((before, search.verdicts["a"].kind))
        return found

    for by_filter, gathered in ranks.run_ranks(on_rank).values():
        assert by_filter == ("unknown", "filter")
        # The filters of the other ranks have come beside them: all are one from there on.
        assert gathered == ("unknown", "layer")
