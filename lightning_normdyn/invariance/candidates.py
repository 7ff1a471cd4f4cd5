"""From rows to a verdict: one way to cut a weight into rows, and what follows from what the graph
says about them.

A weight may be read along either axis (``W x`` or ``x W``), and only the graph shows along which.
So several cuts of it are followed, each a `Candidate`, and `judge` takes the one that claims most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import MOST_SHARED, Partition, indices

from .flow import Shape
from .rows import Rows, distinct
from .verdict import SINGLE_NUMBERS, NormLink, Verdict, unread_in_words


@dataclass(frozen=True)
class Vectors:
    """Which rows of a cut are scaled together.

    Args:
        of_row: for each row the number of its vector, -1 where it belongs to none.
        sizes: how many rows each vector has.
    """

    of_row: Tensor
    sizes: Tensor

    @cached_property
    def are_single_rows(self) -> bool:
        """Whether no two rows have to be scaled together."""
        return bool((self.sizes == 1).all())

    @cached_property
    def share(self) -> float:
        """Which part of the weight belongs to vectors."""
        return float((self.of_row >= 0).double().mean())


@dataclass
class Candidate:
    """One way to cut a weight into rows, and what the graph says about these rows.

    Args:
        finest: the rows, each a vector of its own.
        rows: which of them must be scaled together, and which must not be scaled.
    """

    finest: Partition
    rows: Rows

    @classmethod
    def of_cut(
        cls,
        finest: Partition,
    ) -> Candidate:
        """A cut of which nothing is known yet."""
        return cls(finest.shared(), Rows(finest.n))

    @classmethod
    def of_verdict(
        cls,
        verdict: Verdict,
    ) -> Candidate | None:
        """What a verdict of an earlier fit says, so that later losses can add to it.

        None where it says nothing about rows.
        """
        known = verdict.partition or verdict.unread
        if known is None or verdict.kind == "unknown":
            return None
        count = known.labels.numel()
        every_row = indices(count).reshape(known.labels.shape)
        candidate = cls.of_cut(Partition(known.keep, every_row, "filter"))
        rows = candidate.rows
        vector = _labels(verdict.partition, count)
        unread = _labels(verdict.unread, count) >= 0
        # The first row of each vector stands for it. Label -1, of rows that belong to no vector,
        # picks the 0 at the end: such a row must not be scaled.
        own_class = rows.parent[1:]
        last = own_class.new_full((verdict.n + 1,), count)
        first_row = last.scatter_reduce(0, vector % len(last), own_class, "amin")
        first_row[-1] = 0
        rows.parent[1:] = torch.where(unread, own_class, first_row[vector])
        # Which met a normalization: without this they would count as unread.
        rows.met[1:] = vector >= 0
        rows.varies = verdict.unread is not None
        rows.assumed = verdict.eps
        # Read, and yet in no vector: the earlier fit had a reason not to scale these.
        forbidden = ~unread & (vector < 0)
        if bool(forbidden.any()):
            rows.reasons[verdict.reason] = None
        rows.norms.update(dict.fromkeys(verdict.norms))
        rows.stale.update(dict.fromkeys(verdict.stale_statistics))
        for link in verdict.batch_norms:
            fed_by = first_row[link.vector.cpu()]
            rows.link(replace(link, vector=fed_by))
        return candidate

    @property
    def is_finest(self) -> bool:
        """Whether no other cut can be finer: every row is free, and all were reached."""
        free = torch.equal(self.rows.parent, indices(self.finest.n + 1))
        return free and self.finest.n > 1 and bool(self.rows.reached().all())

    def unread(self, reached: Tensor) -> Partition | None:
        """The rows that no loss has read so far, as one vector; None if there are none."""
        # Where the data say which rows are picked, those that were speak for the others: if one of
        # them must not be scaled, nothing waits to be read.
        if self._forbids_a_picked_row() or bool(reached.all()):
            return None
        of_row = torch.where(reached, -1, 0)
        labels = of_row[self.finest.labels]
        return Partition(self.finest.keep, labels, "layer")

    def vectors(
        self,
        reached: Tensor,
        entries: int,
    ) -> Vectors:
        """The rows that are scaled together.

        Args:
            reached: bool, of every row: whether anything is known about it.
            entries: of the whole weight.
        """
        rows = self.rows
        root = torch.where(reached, rows.parent[1:], 0)
        picked = rows.picked[rows.picked > 0]
        if self._forbids_a_picked_row():
            root = torch.zeros_like(root)
        elif len(picked) or rows.varies:
            # Where the data say which rows meet, or are read at all, those that did speak for the
            # others: if some are one vector, all are.
            speaking = root[root > 0]
            if len(picked) and not rows.varies:
                speaking = root[picked - 1]
            if len(distinct(speaking)) < max(2, len(speaking)):
                forbidden = len(picked) > 0 and bool((rows.parent[1:] == 0).any())
                root = torch.zeros_like(root) if forbidden else (root > 0).long()
        if self.finest.n > 1 and int(root.min()) == int(root.max()) > 0:
            # One vector, as for most weights: a short way.
            size = root.new_full((1,), self.finest.n)
            return Vectors(torch.zeros_like(root), size)
        classes, class_of_row, sizes = torch.unique(root, return_inverse=True, return_counts=True)
        entries_of_a_row = entries // max(1, self.finest.n)
        # Class 0 must not be scaled, and a single number has no direction.
        kept = (classes > 0) & (sizes * entries_of_a_row > 1)
        number = torch.where(kept, kept.cumsum(0) - 1, -1)
        return Vectors(number[class_of_row], sizes[kept])

    def frees_single_numbers(
        self,
        reached: Tensor,
        entries: int,
    ) -> bool:
        """Whether its rows are single numbers that may be scaled each by its own factor.

        Then no other cut has vectors with a direction that means something.
        """
        if self.finest.n != entries:
            return False
        free = self.rows.parent[1:][reached]
        sizes = torch.bincount(free[free > 0])
        return bool((sizes == 1).any())

    def _forbids_a_picked_row(self) -> bool:
        picked = self.rows.picked
        if not picked.numel():
            return False
        classes = self.rows.parent[picked[picked > 0]]
        return bool((classes == 0).any())


def _labels(
    partition: Partition | None,
    count: int,
) -> Tensor:
    """The vector of each of ``count`` rows, -1 where it belongs to none."""
    if partition is None:
        return indices(count).fill_(-1)
    return partition.labels.flatten().cpu()


Known = dict[tuple[Any, ...], "Reading"]
"""By the content of candidates, how they are to be read: layers of a network are alike."""


class Reading(NamedTuple):
    """What the graph says of one weight.

    Args:
        cut: position of the candidate that claims most.
        vectors: its rows that are scaled together.
        unread: the rows that no loss has read, as one vector; None if there are none.
    """

    cut: int
    vectors: Vectors
    unread: Partition | None


def judge(
    name: str,
    shape: Shape,
    candidates: Sequence[Candidate],
    known: Known,
) -> Verdict:
    """The verdict of the cut that claims most.

    Args:
        name: of the weight.
        shape: its full shape.
        candidates: the cuts of it that were followed.
        known: what was found of weights before it; the candidates of all of them must still be
            there.
    """
    content = _content_of(shape, candidates)
    reading = None if content is None else known.get(content)
    if reading is None:
        reading = _read(shape, candidates)
        if content is not None:
            known[content] = reading
    return _verdict_of(name, shape, candidates[reading.cut], reading.vectors, reading.unread)


def _content_of(shape: Shape, candidates: Sequence[Candidate]) -> tuple[Any, ...] | None:
    """All that `_read` goes by; None where that is more than is compared fast."""
    content: list[Any] = [shape]
    for candidate in candidates:
        rows = candidate.rows
        if rows.picked.numel() or len(rows.met) > MOST_SHARED:
            return None
        numbers = rows.parent.numpy().tobytes(), rows.met.numpy().tobytes()
        # By identity: equal cuts of alike weights are one object.
        content += [id(candidate.finest), *numbers, rows.varies, bool(rows.reasons)]
    return tuple(content)


def _read(shape: Shape, candidates: Sequence[Candidate]) -> Reading:
    entries = math.prod(shape)
    readings = [(candidate, candidate.rows.reached()[1:]) for candidate in candidates]
    # A row that no loss has read is so in every cut, but only some show it.
    unread = None
    for candidate, reached in readings:
        unread = candidate.unread(reached)
        if unread is not None:
            break
    # Single numbers that are free have no direction, whatever longer vectors another cut shows.
    numbers = [(c, reached) for c, reached in readings if c.frees_single_numbers(reached, entries)]
    claims = []
    for candidate, reached in numbers or readings:
        vectors = candidate.vectors(reached, entries)
        claim = _claim_of(candidate, vectors, unread, entries)
        claims.append((claim, candidate, vectors))
    # Of equal claims the first, which is the cut into filters where it is among them.
    _, chosen, vectors = max(claims, key=itemgetter(0))
    (cut,) = [i for i, candidate in enumerate(candidates) if candidate is chosen]
    return Reading(cut, vectors, unread)


def _claim_of(
    candidate: Candidate,
    vectors: Vectors,
    unread: Partition | None,
    entries: int,
) -> tuple[float, int, bool]:
    """How much a cut claims, to be compared: the share of the weight, then the number of vectors,
    then whether it waits for rows."""
    if not len(vectors.sizes):
        # A cut into single numbers has nothing to wait for, since it could never claim them.
        waits = unread is not None and not candidate.rows.reasons
        return 0.0, 0, waits and candidate.finest.n != entries
    if _has_to_wait(candidate, vectors, unread):
        return 0.0, 0, True
    return vectors.share, len(vectors.sizes), False


def _has_to_wait(
    candidate: Candidate,
    vectors: Vectors,
    unread: Partition | None,
) -> bool:
    """Whether rows that no loss has read may turn out to belong to the same vector as others.

    A row that joins later would be mixed with rows that were scaled already. Only rows that were
    read and are free, more than one of them, show that rows do not join.
    """
    if unread is None:
        return False
    free = vectors.are_single_rows and len(vectors.sizes) > 1
    return not (free and unread.keep == candidate.finest.keep)


def _verdict_of(
    name: str,
    shape: Shape,
    candidate: Candidate,
    vectors: Vectors,
    unread: Partition | None,
) -> Verdict:
    rows = candidate.rows
    finest = candidate.finest
    # Two are enough: the reason has to fit into a cell of a table.
    reasons = list(rows.reasons)[:2]
    if unread is not None:
        reasons.append(unread_in_words(unread))
    reason = "; ".join(reasons)
    if not len(vectors.sizes):
        if math.prod(shape) == finest.n:
            return Verdict(name, shape, None, "no", reason=f"its rows are {SINGLE_NUMBERS}")
        # While rows are unread and nothing forbids the others, a later batch may still decide.
        kind = "unknown" if unread is not None and not rows.reasons else "no"
        why = reason or "its vectors are single numbers"
        return Verdict(name, shape, None, kind, reason=why, unread=unread)
    # Nothing may be scaled yet, but who waits wants to know for what.
    norms = tuple(rows.norms)
    if _has_to_wait(candidate, vectors, unread):
        waiting = f"the rows that were read are one vector ({', '.join(norms)}); {reason}"
        return Verdict(name, shape, None, "unknown", norms, waiting, unread=unread)
    everything = bool((vectors.of_row >= 0).all())
    if vectors.are_single_rows:
        granularity = "filter"
    elif len(vectors.sizes) == 1 and everything:
        granularity = "layer"
    else:
        granularity = "group"
    links, stale = _norm_links(rows, vectors)
    return Verdict(
        name,
        shape,
        Partition(finest.keep, vectors.of_row[finest.labels], granularity).shared(),
        granularity if everything else "partly",
        norms,
        "" if everything else reason or "some of its vectors are single numbers",
        rows.assumed,
        links,
        stale,
        unread=unread,
    )


def _norm_links(
    rows: Rows,
    vectors: Vectors,
) -> tuple[tuple[NormLink, ...], tuple[str, ...]]:
    """The running statistics behind a weight, and those of them that cannot be corrected."""
    links: list[NormLink] = []
    stale = dict(rows.stale)
    modules: set[str] = set()
    for link in rows.links:
        row = link.vector
        vector = torch.where(row > 0, vectors.of_row[row - 1], -1)
        # The module has one set of running statistics. Where its calls are fed by different rows,
        # no one factor is right for it.
        if link.module in modules:
            stale[f"{link.module} is fed in different ways"] = None
        # Only what scales of a running mean may be rescaled, so what was added must be known.
        if link.offset and link.bias is None:
            stale[f"{link.module}: what is added before it is not a plain bias"] = None
        modules.add(link.module)
        links.append(replace(link, vector=vector))
    return tuple(links), tuple(stale)
