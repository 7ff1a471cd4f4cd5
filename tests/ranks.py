"""Run a function on several ranks, each in a forked process of this test, and get every rank's
return value.

Forking costs a fraction of a second where a launcher costs several. ``LOCAL_RANK`` in the
environment tells Lightning that somebody else has started the processes, so any strategy runs in
place and its results come back as Python values.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    # Strategies import these when they start. Imported here, once, every forked rank has them.
    # torch.distributed.optim alone takes half a second, and warns of torch's own deprecations.
    warnings.simplefilter("ignore")
    import torch.distributed.algorithms.ddp_comm_hooks
    import torch.distributed.fsdp.sharded_grad_scaler
    import torch.distributed.optim
    import torch.distributed.tensor.debug


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time; the message names it."""


def run_ranks(
    function: Callable[..., Any], world: int = 2, args: tuple[Any, ...] = (), timeout: float = 600
) -> dict[int, Any]:
    """Call ``function(*args)`` in ``world`` processes at once and return ``{rank: value}``.

    The first rank that raises ends the others at once: they would only wait for it in a collective.
    Values travel pickled, so a tensor comes back as a copy. Use ``init_process_group`` inside
    ``function`` where no Lightning strategy does it.

    Args:
        function: runs in each rank; may be a local function (the processes are forked).
        world: number of ranks.
        args: passed to ``function``.
        timeout: seconds until ranks that have not answered are killed.

    Raises:
        RankError: a rank raised, died, or was killed after ``timeout``.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes, rank_of = [], {}
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world, port, function, args, theirs), daemon=True
            )
            process.start()
            theirs.close()  # or the end of a rank that died would never be seen
            processes.append(process)
            rank_of[ours] = rank
        return _collect(rank_of, processes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            # SIGKILL: a rank that hangs in a collective does not listen to anything else
            process.kill()
        for process in processes:
            process.join()
        for connection in rank_of:
            connection.close()


def init_process_group(timeout: float = 200) -> None:
    """Without Lightning: join the ranks of :func:`run_ranks` in a gloo group whose collectives give
    up after ``timeout`` seconds."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def _collect(
    rank_of: dict[Connection, int], processes: list[Any], deadline: float, timeout: float
) -> dict[int, Any]:
    values: dict[int, Any] = {}
    waiting = dict(rank_of)
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankError(
                f"no answer within {timeout:g} s from rank "
                f"{', '.join(map(str, sorted(waiting.values())))}"
            )
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            try:
                succeeded, payload = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(timeout=5)
                raise RankError(
                    f"rank {rank} died without an answer, exit code {processes[rank].exitcode}"
                ) from None
            if not succeeded:
                raise RankError(f"rank {rank} raised:\n{payload}")
            values[rank] = payload
    return dict(sorted(values.items()))


def _rank_main(
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    answer: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        message = pickle.dumps((True, function(*args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    answer.send_bytes(message)
    # Rank 0 serves the others' rendezvous, so nobody leaves on his own: run_ranks ends all of them,
    # or its end does.
    wait([multiprocessing.parent_process().sentinel])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
