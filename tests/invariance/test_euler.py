"""The Euler test separates true from false claims, and waits for enough values."""

from __future__ import annotations

import torch
from zoo import build

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.euler import EulerTest
from lightning_normdyn.invariance.verdict import Verdict


def euler(module, inputs, name, partition, steps=8):
    test, weight = EulerTest(1), dict(module.named_parameters())[name]
    for _ in range(steps):
        module.zero_grad()
        out = module(*(x + 0.1 * torch.randn_like(x) for x in inputs))
        (out * torch.randn_like(out)).sum().backward()
        w, g = (t.detach().double().reshape(-1) for t in (weight, weight.grad))
        labels = (
            partition.labels.reshape(
                [n if d in partition.keep else 1 for d, n in enumerate(weight.shape)]
            )
            .expand(weight.shape)
            .reshape(-1)
        )
        sums = [
            torch.zeros(partition.n, dtype=torch.float64).index_add(0, labels, v)
            for v in (w * g, w * w, g * g, torch.ones_like(w))
        ]
        test.update(*sums, torch.zeros(partition.n, dtype=torch.long))
    return test


def test_euler_separates():
    module, inputs = build("group_norm_net")
    module, inputs = (
        module.float(),
        tuple(x.float() if x.is_floating_point() else x for x in inputs),
    )
    shape = tuple(module.a.weight.shape)
    right = euler(module, inputs, "a.weight", Partition.groups(shape, 2))
    assert right.rejected() == []
    assert right.result()[0][0] < 0.01
    assert euler(module, inputs, "a.weight", Partition.filters(shape)).rejected() == [0]
    assert euler(module, inputs, "fc.weight", Partition.layer((3, 4))).rejected() == [0]


def test_euler_skips_what_says_nothing_and_waits():
    test, index = EulerTest(2), torch.tensor([0, 0, 0, 1])
    one = torch.ones(4, dtype=torch.float64)
    test.update(one, one, torch.tensor([1.0, 0.0, float("nan"), 1.0]), 4 * one, index)
    assert test.result() == [(2.0, 1), (2.0, 1)]
    assert test.rejected() == []  # too few
    for _ in range(7):
        test.update(one, one, one, 4 * one, index)
    assert test.rejected() == [0, 1]
    withdrawn = Verdict("w", (4, 4), Partition.filters((4, 4)), "filter", norms=("bn",)).withdrawn(
        test.contradiction(*test.result()[0]), "gradients"
    )
    assert withdrawn.partition is None
    assert "bn says filter" in withdrawn.reason
    assert "= 2 over 22 values" in withdrawn.reason
