"""What all ranks must hold to be true: a rank that treats a weight while another leaves it alone
waits for ever in a collective."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor

from lightning_normdyn.geometry.reduction import of_all_ranks, world_size
from lightning_normdyn.invariance.verdict import Verdict


def everywhere(holds: bool) -> bool:
    """Whether something holds on every rank; every rank must call it."""
    return all(of_all_ranks(holds))


def agree(verdicts: dict[str, Verdict]) -> None:
    """Make all ranks hold the same verdicts: a weight on which they differ is not touched.

    Args:
        verdicts: by weight name; changed in place. Every rank must call it.
    """
    if world_size() == 1:
        return
    digests = {}
    for name, verdict in verdicts.items():
        # A reason may name numbers that one rank has seen, so it may differ.
        state = {**verdict.state(), "reason": ""}
        digests[name] = (verdict.shape, _digest(state))
    tables = of_all_ranks(digests)
    # In the same order on all ranks.
    for name in sorted(set().union(*tables)):
        entries = [table.get(name) for table in tables]
        if entries.count(entries[0]) < len(entries):
            shape, _ = next(filter(None, entries))
            verdicts[name] = Verdict.unknown(name, shape, "the ranks see different graphs")


def _digest(state: Any) -> str:
    """Short, and the same for equal states."""
    if isinstance(state, Tensor):
        # The labels of a large model's weights are megabytes, which no rank needs to see.
        return sha256(state.cpu().numpy().tobytes()).hexdigest()
    if isinstance(state, Mapping):
        state = sorted(state.items())
    if isinstance(state, (list, tuple)):
        return repr([_digest(value) for value in state])
    return repr(state)
