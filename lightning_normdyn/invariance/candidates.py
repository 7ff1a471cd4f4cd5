"""One way to cut a weight into rows, and the verdict that follows from what the graph says about
these rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.invariance.flow import Shape
from lightning_normdyn.invariance.partitions import SINGLE_NUMBERS
from lightning_normdyn.invariance.rows import Link, Rows, distinct
from lightning_normdyn.invariance.verdict import NormLink, Verdict


def _numbers(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.long, device="cpu")


@dataclass
class Candidate:
    """One way to cut a weight into rows, and what the graph says about these rows."""

    finest: Partition
    rows: Rows

    @classmethod
    def of_verdict(cls, verdict: Verdict) -> Candidate | None:
        """What a verdict of an earlier fit says, so that later losses can add to it; None where it
        says nothing about rows."""
        known = verdict.partition or verdict.unread
        if known is None or verdict.kind == "unknown":
            return None
        finest = Partition(
            known.keep, _numbers(known.labels.numel()).reshape(known.labels.shape), "filter"
        )
        rows = Rows(finest.n)
        vector = (
            torch.full_like(finest.labels, -1).flatten()
            if verdict.partition is None
            else known.labels.flatten().cpu()
        )
        unread = torch.zeros_like(vector, dtype=torch.bool)
        if verdict.unread is not None:
            unread = verdict.unread.labels.flatten().cpu() >= 0
        # The first row of each vector stands for it: 1 + its number, by the vector's number. Vector
        # -1 is none.
        first = torch.zeros(max(0, verdict.n) + 1, dtype=torch.long, device="cpu")
        for row in reversed((vector >= 0).nonzero().flatten().tolist()):
            first[vector[row]] = row + 1
        rows.parent[1:] = torch.where(
            vector >= 0, first[vector], torch.where(unread, rows.parent[1:], 0)
        )
        rows.met[1:] = vector >= 0
        rows.varies = verdict.unread is not None
        rows.assumed = verdict.eps
        forbidden = ~unread & (vector < 0)
        rows.reasons = {verdict.reason: None} if bool(forbidden.any()) else {}
        rows.norms = dict.fromkeys(verdict.norms)
        rows.stale = dict.fromkeys(verdict.stale_statistics)
        for link in verdict.batch_norms:
            rows.link(
                Link(link.module, first[link.vector.cpu()], link.degree, link.offset, link.bias)
            )
        return cls(finest, rows)


def unread_part(candidate: Candidate) -> Partition | None:
    """The rows that no loss has read so far, as one vector; None if there are none."""
    rows, finest = candidate.rows, candidate.finest
    unread = ~rows.reached()[1:]
    if rows.picked.numel() and bool((rows.parent[rows.picked] == 0)[rows.picked > 0].any()):
        # the data say which rows are picked, and one of those that were must not be scaled: it
        # speaks for the others
        return None
    if not bool(unread.any()):
        return None
    return Partition(finest.keep, torch.where(unread, 0, -1)[finest.labels], "layer")


def _classes(candidate: Candidate, shape: Shape) -> tuple[Tensor, Tensor]:
    """For each row its class number, or -1 where it belongs to none, and the size of each class in
    rows."""
    rows, finest = candidate.rows, candidate.finest
    root = torch.where(rows.reached()[1:], rows.parent[1:], 0)
    # Where the data say which rows meet, or are read at all, those that did speak for the others.
    picked = rows.picked[rows.picked > 0]
    if len(picked) and bool((rows.parent[picked] == 0).any()):
        root = torch.zeros_like(root)
    elif len(picked) or rows.varies:
        speaking = root[picked - 1] if len(picked) and not rows.varies else root[root > 0]
        if len(distinct(speaking)) < max(2, len(speaking)):
            forbidden = bool((rows.parent[1:] == 0).any())
            root = torch.zeros_like(root) if len(picked) and forbidden else (root > 0).long()
    entries = math.prod(shape) // max(1, finest.n)
    present, index, sizes = torch.unique(root, return_inverse=True, return_counts=True)
    vectors = (present > 0) & (sizes * entries > 1)  # a single number has no direction
    number = torch.where(vectors, vectors.cumsum(0) - 1, -1)
    return number[index], sizes[vectors]


def frees_single_numbers(candidate: Candidate, shape: Shape) -> bool:
    """Whether single numbers may be scaled each by its own factor: then no other cut has vectors
    with a direction that means something."""
    if candidate.finest.n != math.prod(shape):
        return False
    rows = candidate.rows
    root = torch.where(rows.reached()[1:], rows.parent[1:], 0)
    sizes = torch.bincount(root, minlength=1)
    return bool((sizes[root[root > 0]] == 1).any())


def claimed(verdict: Verdict) -> tuple[float, int, bool]:
    """How much a verdict claims, to compare cuts of one weight: share of the entries, then
    vectors."""
    if verdict.partition is None:
        return 0.0, 0, verdict.waits
    labels = verdict.partition.labels
    return float((labels >= 0).float().mean()), verdict.partition.n, False


def verdict_of(name: str, shape: Shape, candidate: Candidate, unread: Partition | None) -> Verdict:
    """What one cut of a weight says, ``unread`` being the entries that no loss has read, as this or
    another cut shows them."""
    rows, finest = candidate.rows, candidate.finest
    of_row, sizes = _classes(candidate, shape)
    left = replace(Verdict.unknown(name, shape), unread=unread).unread_rows
    reason = "; ".join([*list(rows.reasons)[:2], *([left] if left else [])])
    if not len(sizes):
        if math.prod(shape) == finest.n:
            return Verdict(name, shape, None, "no", reason=f"its rows are {SINGLE_NUMBERS}")
        nothing_read = unread is not None and not rows.reasons
        kind = "unknown" if nothing_read else "no"
        return Verdict(
            name,
            shape,
            None,
            kind,
            reason=reason or "its vectors are single numbers",
            unread=unread,
        )
    everything = bool((of_row >= 0).all())
    single = bool((sizes == 1).all())
    if unread is not None and not (single and len(sizes) > 1 and unread.keep == finest.keep):
        # A row that joins later would be mixed with rows that were scaled already. One row alone
        # does not show whether rows join.
        norms = tuple(rows.norms)
        waiting = f"the rows that were read are one vector ({', '.join(norms)}); {reason}"
        return Verdict(name, shape, None, "unknown", norms, waiting, unread=unread)
    granularity = "filter" if single else "layer" if len(sizes) == 1 and everything else "group"
    partition = Partition(finest.keep, of_row[finest.labels], granularity)
    links: list[NormLink] = []
    stale = list(rows.stale)
    for link in rows.links:
        vector = torch.where(link.rows > 0, of_row[link.rows - 1], -1)
        if any(link.module == known.module for known in links):
            stale.append(f"{link.module} is fed in different ways")
        links.append(NormLink(link.module, vector, link.degree, link.offset, link.bias))
        if link.offset and link.bias is None:
            stale.append(f"{link.module}: what is added before it is not a plain bias")
    kind, why = (
        (granularity, "")
        if everything
        else ("partly", reason or "some of its vectors are single numbers")
    )
    stale = list(dict.fromkeys(stale))
    return Verdict(
        name,
        shape,
        partition,
        kind,
        tuple(rows.norms),
        why,
        rows.assumed,
        tuple(links),
        tuple(stale),
        unread=unread,
    )
