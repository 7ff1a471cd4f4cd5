"""What is learnt about the rows of one weight: which must be scaled together, and which must not be scaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Link:
    """A normalization with running statistics that was fed by scaled rows."""

    module: str
    rows: Tensor  # (channels,)
    degree: float
    offset: bool
    bias: str | None

    def same_as(self, other: Link, parent: Tensor) -> bool:
        """Whether both say the same (a module that is called twice), where ``parent`` is the class
        of each row."""
        facts = [(link.module, link.degree, link.offset, link.bias) for link in (self, other)]
        return facts[0] == facts[1] and torch.equal(parent[self.rows], parent[other.rows])


class Rows:
    """The rows of one weight: which have to be scaled together, and what was learnt on the way
    (union-find; class 0 must not be scaled)."""

    def __init__(self, n: int) -> None:
        self.parent = torch.arange(n + 1, dtype=torch.long, device="cpu")
        self.reasons: dict[str, None] = {}  # insertion-ordered sets
        self.norms: dict[str, None] = {}
        self.links: list[Link] = []
        self.stale: dict[str, None] = {}
        self.assumed = False  # an epsilon, a padding value or a condition was taken as harmless
        # Rows that reached an operation of degree 0. One of them may stand for its class: see
        # `reached`.
        self.met = torch.zeros(n + 1, dtype=torch.bool, device="cpu")
        # some loss read only a part of the rows: which part it is may depend on the batch
        self.varies = False
        self.picked = torch.empty(
            0, dtype=torch.long, device="cpu"
        )  # rows picked by an index tensor: the data say which rows meet
        self.veiled: dict[
            str, None
        ] = {}  # places where rows were picked by indices that cannot be looked at
        self.cut_elsewhere = (
            False  # entries were left out along a dimension that these rows are not cut along
        )
        self.sharded = torch.empty(
            0, dtype=torch.long, device="cpu"
        )  # rows of which each rank follows only its part (tensor parallelism)
        self.elsewhere = False  # and other ranks have not been asked yet

    def unite(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Make entrywise partners scale together; ``reason`` is kept if this costs a row its
        freedom."""
        if a is b or (a.numel() == 1 and b.numel() == 1 and int(a) == int(b)):
            return
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        left, right = self.parent[a].flatten(), self.parent[b].flatten()
        differ = left != right
        if not differ.any():
            return
        size = len(self.parent)
        pairs = distinct(left[differ] * size + right[differ])
        left, right = pairs // size, pairs % size
        if bool(((left == 0) | (right == 0)).any()):
            self.reasons.setdefault(reason)
        while True:  # hook the larger root below the smaller, then flatten, until no pair is apart
            left, right = self.parent[left], self.parent[right]
            apart = left != right
            if not apart.any():
                return
            left, right = left[apart], right[apart]
            self.parent.scatter_reduce_(
                0, torch.maximum(left, right), torch.minimum(left, right), "amin"
            )
            while not torch.equal(flat := self.parent[self.parent], self.parent):
                self.parent = flat

    def forbid(self, rows: Tensor, reason: str) -> None:
        """These rows must not be scaled."""
        self.unite(rows, torch.zeros(1, dtype=torch.long, device="cpu"), reason)

    def link(self, link: Link) -> None:
        """Remember a normalization with running statistics, once."""
        if not any(link.same_as(known, self.parent) for known in self.links):
            self.links.append(link)

    def meet(self, rows: Tensor) -> None:
        """These rows reached an operation of degree 0."""
        self.met[rows] = True

    def pick(self, rows: Tensor) -> None:
        """These rows were picked by an index tensor."""
        self.picked = distinct(torch.cat([rows.flatten(), self.picked]))

    def reached(self) -> Tensor:
        """``(n + 1,)`` bool: rows that met a normalization, or that something forbids to scale. Of
        the others nothing is known."""
        # A rule may go on with one row for all that it has united, so one row speaks for its class.
        classes = torch.zeros_like(self.met)
        classes[self.parent[self.met]] = True
        classes[0] = True
        return classes[self.parent]

    def merge(self, other: Rows) -> None:
        """Take over what another rank learnt about the same weight: what must not be scaled
        separately there must not be here."""
        self.reasons |= other.reasons
        self.unite(
            torch.arange(len(self.parent), dtype=torch.long, device="cpu"),
            other.parent,
            next(iter(other.reasons), "another rank"),
        )
        self.norms |= other.norms
        self.stale |= other.stale
        for link in other.links:
            self.link(link)
        self.assumed |= other.assumed
        self.met |= other.met
        self.varies |= other.varies
        self.veiled |= other.veiled
        self.cut_elsewhere |= other.cut_elsewhere
        self.pick(other.picked)
        self.sharded = distinct(torch.cat([self.sharded, other.sharded]))


def distinct(values: Tensor) -> Tensor:
    """The distinct values of an int64 tensor, ascending."""
    return values.unique()  # type: ignore[no-untyped-call,no-any-return]
