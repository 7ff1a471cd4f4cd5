"""What is learnt about the rows of one weight: which must be scaled together, and which must not be
scaled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import indices

from .flow import NO_ROW
from .verdict import NormLink


class Rows:
    """The rows of one weight, as classes that must be scaled together (union-find), and what was
    found on the way.

    Rows count from 1: class 0 must not be scaled. ``parent`` holds for every row the smallest row
    of its class.
    """

    def __init__(self, n: int) -> None:
        self.parent = indices(n + 1)

        # Sets that keep the order in which they were filled, so that all ranks tell the same story.
        self.reasons: dict[str, None] = {}
        self.norms: dict[str, None] = {}
        # Whose ``vector`` is here 1 + the row that feeds each channel.
        self.links: list[NormLink] = []
        self.stale: dict[str, None] = {}

        # An epsilon, a padding value or a condition was taken as harmless.
        self.assumed = False
        # Rows that reached an operation of degree 0. One of them may stand for its class: see
        # `reached`.
        self.met = torch.zeros(n + 1, dtype=torch.bool, device="cpu")
        # Some loss read only a part of the rows: which part it is may depend on the batch.
        self.varies = False
        # Rows that were picked by an index tensor: the data say which rows meet.
        self.picked = indices(0)
        # Places where rows were picked by indices that cannot be looked at.
        self.veiled: dict[str, None] = {}
        # Entries were left out along a dimension that these rows are not cut along.
        self.cut_elsewhere = False
        # Rows of which each rank follows only its part (tensor parallelism).
        self.sharded = indices(0)
        # Other ranks follow the rest of them, and have not been asked yet.
        self.elsewhere = False

    def unite(
        self,
        a: Tensor,
        b: Tensor,
        reason: str,
    ) -> None:
        """Make entrywise partners scale together; ``reason`` is kept if this costs a row its
        freedom."""
        if a is b:
            return
        is_one_with_others = a.numel() == 1 or b.numel() == 1
        if not is_one_with_others:
            a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        left = self.parent[a].flatten()
        right = self.parent[b].flatten()
        if is_one_with_others:
            self._unite_all(torch.cat([left, right]), reason)
            return
        differ = left != right
        if not differ.any():
            return

        # A pair as one number: activations repeat the same few pairs many times.
        size = len(self.parent)
        pairs = distinct(left[differ] * size + right[differ])
        left = pairs // size
        right = pairs % size
        if bool((torch.minimum(left, right) == 0).any()):
            self.reasons.setdefault(reason)

        # Hook the larger root below the smaller, then flatten, until no pair is apart.
        while True:
            left = self.parent[left]
            right = self.parent[right]
            apart = left != right
            if not apart.any():
                return
            left = left[apart]
            right = right[apart]
            smaller = torch.minimum(left, right)
            larger = torch.maximum(left, right)
            self.parent.scatter_reduce_(0, larger, smaller, "amin")
            while not torch.equal(flat := self.parent[self.parent], self.parent):
                self.parent = flat

    def _unite_all(
        self,
        classes: Tensor,
        reason: str,
    ) -> None:
        """Make one class of these, given by their smallest rows.

        A short way: nearly all that `unite` is asked for is one row against several.
        """
        first = int(classes.min())
        if first == int(classes.max()):
            return
        if first == 0:
            self.reasons.setdefault(reason)
        joins = torch.zeros_like(self.met)
        joins[classes] = True
        self.parent.masked_fill_(joins[self.parent], first)

    def forbid(
        self,
        rows: Tensor,
        reason: str,
    ) -> None:
        """These rows must not be scaled."""
        self.unite(rows, NO_ROW, reason)

    def link(self, link: NormLink) -> None:
        """Remember a normalization with running statistics, once: a module may be called twice."""
        fed_by = self.parent[link.vector]
        for known in self.links:
            same_rows = torch.equal(self.parent[known.vector], fed_by)
            if same_rows and vars(replace(known, vector=link.vector)) == vars(link):
                return
        self.links.append(link)

    def pick(self, rows: Tensor) -> None:
        """These rows were picked by an index tensor."""
        self.picked = distinct(rows, self.picked)

    def reached(self) -> Tensor:
        """``(n + 1,)`` bool: rows that met a normalization, or that something forbids to scale. Of
        the others nothing is known."""
        # A rule may go on with one row for all that it has united, so one row speaks for its class.
        classes = torch.zeros_like(self.met)
        classes[self.parent[self.met]] = True
        classes[0] = True
        return classes[self.parent]

    def merge(self, other: Rows) -> None:
        """Take over what another rank learnt about the same weight.

        What must not be scaled separately there must not be here.
        """
        self.reasons |= other.reasons
        reason = next(iter(other.reasons), "another rank")
        self.unite(indices(len(self.parent)), other.parent, reason)

        self.norms |= other.norms
        self.stale |= other.stale
        for link in other.links:
            self.link(link)

        self.assumed |= other.assumed
        self.met |= other.met
        self.varies |= other.varies
        self.pick(other.picked)
        self.veiled |= other.veiled
        self.cut_elsewhere |= other.cut_elsewhere
        self.sharded = distinct(self.sharded, other.sharded)


def distinct(*tensors: Tensor) -> Tensor:
    """The distinct values of int64 tensors, ascending."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    return values.unique()  # type: ignore[no-untyped-call,no-any-return]
