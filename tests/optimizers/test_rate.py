"""The rate of the next step, where a rule alone does not tell it."""

from __future__ import annotations

import doubles
import torch
from torch import nn

from lightning_normdyn.optimizers.rate import (
    applied_rate,
    has_plain_rate,
    rate_differs_within,
)


def test_a_rate_on_a_device_is_not_waited_for():
    weight = nn.Parameter(torch.ones(3, 4, device="meta"))  # reading it would raise
    optimizer = doubles.Prodigy([weight], lr=torch.tensor(1.0, device="meta"))
    rate = applied_rate(optimizer, optimizer.param_groups[0], weight)
    assert isinstance(rate, torch.Tensor)
    assert rate.device.type == "meta"


def test_a_warmup_that_is_not_of_the_rate_is_told_by_the_decay():
    weight = nn.Parameter(torch.ones(3, 4))
    options = {"lr": 0.1, "weight_decay": 1e-9}
    other = doubles.WarmsUpSomethingElse([weight], **options)
    assert applied_rate(other, other.param_groups[0], weight) == 0.1
    its_own = doubles.OwnWarmup([weight], **options)
    assert applied_rate(its_own, its_own.param_groups[0], weight) is None


def test_a_rate_is_plain_or_differs_between_weights_where_the_table_says_so():
    weight = nn.Parameter(torch.ones(3, 4))
    sgd, asgd = torch.optim.SGD([weight]), torch.optim.ASGD([weight])
    relative, unknown = doubles.RelativeStep([weight]), doubles.Plain([weight])
    optimizers = (sgd, asgd, relative, unknown)
    assert list(map(has_plain_rate, optimizers)) == [True, False, False, False]
    differs = [rate_differs_within(o, o.param_groups[0]) for o in optimizers]
    assert differs == [False, True, True, False]
