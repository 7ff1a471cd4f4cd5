"""The harness itself: a test of several ranks is worth what its harness reports."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, init_process_group, run_ranks


def test_every_rank_answers_and_collectives_work():
    def total():
        init_process_group()
        value = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(value)
        return os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], value

    results = run_ranks(total, world=3)
    assert list(results) == [0, 1, 2]
    assert [(rank, world) for rank, world, _ in results.values()] == [
        ("0", "3"),
        ("1", "3"),
        ("2", "3"),
    ]
    assert all(value.item() == 6.0 for *_, value in results.values())


def test_arguments_and_large_values():
    results = run_ranks(
        lambda n: torch.arange(n), args=(300_000,)
    )  # a pipe holds 64 KB until somebody reads
    assert torch.equal(results[1], torch.arange(300_000))


def test_a_rank_that_raises_is_named_and_ends_the_others():
    def raise_on_one():
        init_process_group()
        if dist.get_rank() == 1:
            raise ValueError("the reason")
        time.sleep(3600)

    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*ValueError: the reason"):
        run_ranks(raise_on_one)


def test_a_rank_that_hangs_is_killed_and_named():
    def hang_on_zero():
        if os.environ["RANK"] == "0":
            time.sleep(3600)

    with pytest.raises(RankError, match=r"no answer within 0\.5 s from rank 0$"):
        run_ranks(hang_on_zero, timeout=0.5)


def test_a_rank_that_dies_is_named_with_its_exit_code():
    def die():
        if os.environ["RANK"] == "1":
            os._exit(7)
        time.sleep(3600)

    with pytest.raises(RankError, match="rank 1 died without an answer, exit code 7"):
        run_ranks(die)


def test_a_value_that_cannot_travel_is_an_error():
    with pytest.raises(RankError, match=r"(?s)raised.*pickle"):
        run_ranks(lambda: lambda: None, world=1)


def test_nothing_of_the_ranks_stays_in_this_process():
    before = dict(os.environ)
    run_ranks(init_process_group)
    assert dict(os.environ) == before
    assert not dist.is_initialized()
