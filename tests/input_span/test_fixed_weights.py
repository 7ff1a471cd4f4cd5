"""A pass in mid-fit: no trace in module and random numbers, and ranks that run equally many
batches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from models import make
from torch.utils.data import DataLoader, IterableDataset

from lightning_normdyn.input_span.fixed_weights import (
    at_fixed_weights,
    rounds_of,
    share_of_batches,
)


def states() -> list[str]:
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return [str(python), str(numpy), str(torch_.tolist())]


@pytest.mark.parametrize("fails", [False, True])
def test_module_and_random_numbers_are_left_as_they_were(fails):
    module = make()
    module.net[1].eval()
    module.register_buffer("calls", torch.zeros(1))
    before = states(), module.net[1].training, dict(module._buffers)

    def go() -> None:
        with at_fixed_weights(module, seed=3):
            assert not module.training
            assert not torch.is_grad_enabled()
            module.log("loss", 1.0)  # to nobody
            module.calls += 1
            random.random()
            np.random.rand()
            torch.rand(1)
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            go()
    else:
        go()
    assert (states(), module.net[1].training, dict(module._buffers)) == before
    assert module.training
    assert float(module.calls) == 0
    assert "log" not in vars(module)


def test_a_log_of_the_modules_own_is_put_back():
    module = make()
    module.log = own = lambda *_, **__: None
    with at_fixed_weights(module, seed=0):
        assert module.log is not own
    assert module.log is own


def test_random_numbers_are_the_same_in_every_pass():
    module, drawn = make(), []
    for _ in range(2):
        torch.rand(7)
        with at_fixed_weights(module, seed=3):
            drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("count", [1, 4, 6, 7])
def test_ranks_run_equally_many_and_every_batch_counts_once(count):
    of_rank = [list(share_of_batches(range(count), rank, 3)) for rank in range(3)]
    assert {len(share) for share in of_rank} == {rounds_of(range(count), 3)}
    counted = [batch for share in of_rank for batch, counts in share if counts]
    assert sorted(counted) == list(range(count))


def test_a_length_that_is_not_known():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([torch.ones(2)] * 3)

    assert rounds_of(iter([1, 2]), 1) is None
    assert rounds_of(DataLoader(Stream(), batch_size=1), 1) is None
