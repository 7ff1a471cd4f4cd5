"""The Euler test separates true from false claims, and says so."""

from __future__ import annotations

import torch
from zoo import build

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.euler import (
    EULER_COUNT,
    EULER_LIMIT,
    contradiction_in_words,
    euler_sums,
    euler_values,
    rms_of,
    whole_values,
)
from lightning_normdyn.invariance.verdict import Verdict


def pooled(module, inputs, name, partition, steps=8):
    """Root mean square of z over some steps, and of how many values."""
    weight = dict(module.named_parameters())[name]
    labels = partition.broadcastable(weight.ndim).expand(weight.shape).reshape(-1)
    total = count = 0.0
    for _ in range(steps):
        module.zero_grad()
        out = module(*(x + 0.1 * torch.randn_like(x) for x in inputs))
        (out * torch.randn_like(out)).sum().backward()
        w, g = (t.detach().double().reshape(-1) for t in (weight, weight.grad))
        sums = [
            torch.zeros(partition.n, dtype=torch.float64).index_add(0, labels, v)
            for v in (w * w, w * g, g * g, torch.ones_like(w))
        ]
        mean, number = euler_values(euler_sums(*sums).sum(1, keepdim=True)).flatten().tolist()
        total, count = total + mean * number, count + number
    return rms_of(total, count), whole_values(count)


def test_euler_separates():
    module, inputs = build("group_norm_net")
    module, inputs = (
        module.float(),
        tuple(x.float() if x.is_floating_point() else x for x in inputs),
    )
    shape = tuple(module.a.weight.shape)
    rms, count = pooled(module, inputs, "a.weight", Partition.groups(shape, 2))
    assert rms < 0.01 < EULER_LIMIT
    assert count >= EULER_COUNT
    for name, wrong in (
        ("a.weight", Partition.filters(shape)),
        ("fc.weight", Partition.layer((3, 4))),
    ):
        rms, count = pooled(module, inputs, name, wrong)
        assert rms > EULER_LIMIT
        assert count >= EULER_COUNT


def test_euler_skips_what_says_nothing():
    one = torch.ones(3, dtype=torch.float64)
    sums = euler_sums(one, one, torch.tensor([1.0, 0.0, float("nan")]).double(), 4 * one)
    mean, number = euler_values(sums.sum(1, keepdim=True)).flatten().tolist()
    assert (mean, number) == (4.0, 1.0)
    assert (rms_of(mean * number, number), whole_values(number)) == (2.0, 1)
    assert whole_values(8 - 1e-9) == 8
    assert torch.tensor(rms_of(0.0, 0.0)).isnan()


def test_a_contradicted_claim_says_by_what():
    claim = Verdict("w", (4, 4), Partition.filters((4, 4)), "filter", norms=("bn",))
    withdrawn = claim.withdrawn(contradiction_in_words(2.0, 22), "gradients")
    assert withdrawn.partition is None
    assert "bn says filter" in withdrawn.reason
    assert "= 2 over 22 values" in withdrawn.reason
