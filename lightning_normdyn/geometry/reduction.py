"""Completes sums over the ranks that share vectors, one collective at a time.

Letters: n vectors of a weight, W weights, K sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_normdyn.geometry.pieces import Placement, Sharing


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(values: Tensor, group: Any) -> Tensor:
    """Add up ``values`` over ``group`` (None: all ranks), in place, on a device that the group can
    send from."""
    if (
        values.device.type == "cpu" and dist.get_backend(group) == "nccl"
    ):  # weights offloaded to the CPU
        on_device = values.cuda()
        dist.all_reduce(on_device, group=group)
        return values.copy_(on_device)
    dist.all_reduce(values, group=group)
    return values


def held_everywhere(n: int) -> Sharing:
    """Every rank holds everything; rank zero speaks."""
    none, speaks = (
        torch.zeros(n, dtype=torch.bool, device="cpu"),
        world_size() == 1 or dist.get_rank() == 0,
    )
    return Sharing(
        none,
        none,
        torch.full((n,), speaks, dtype=torch.bool, device="cpu"),
        speaks,
        everywhere=True,
        group=None,
    )


def groups_of(sharings: Iterable[Sharing]) -> dict[tuple[int, ...] | None, Any]:
    """The different groups of ranks over which cut vectors are completed; None stands for one that
    no process group is."""
    return {
        None if s.group is None else tuple(dist.get_process_group_ranks(s.group)): s.group
        for s in sharings
        if bool(s.cut.any())
    }


@dataclass(frozen=True)
class _Buffer:
    """The cut vectors that are completed together.

    Args:
        group: over which ranks; None: all.
        size: number of vectors in the buffer, the same on all these ranks.
        cut: local vectors that it holds, ``(c,)``, and ``slot``: where.
        adds: whether this rank adds its piece (``(c,)`` bool), or a copy of it does so on another
            rank.
        weight_of: the weight of every vector of the buffer, ``(size,)``.
        length: its number of entries, ``(size,)``.
        others: local vectors that are not cut and that this rank speaks for.
    """

    group: Any
    size: int
    cut: Tensor
    slot: Tensor
    adds: Tensor
    weight_of: Tensor
    length: Tensor
    others: Tensor


class Reduction:
    """Completes sums over the ranks that share vectors, with one collective at most. One process
    holds everything: nothing to do.

    Every rank calls every method, also a rank that holds nothing. If all cut vectors are shared
    within one process group (or one of equal
    groups side by side), only that group communicates, and only about those vectors; else all ranks
    do, each piece counted once.

    Args:
        placements: of the weights, in the order of the index space.
        lengths: for each weight the number of entries of all its vectors.
        device: where sums are kept.

    Attributes:
        length: number of entries of every vector held here.
        weight_of: its weight.
        everywhere: whether every rank holds a piece of every vector.
        cuts: whether some vector lies on several ranks.
    """

    def __init__(
        self, placements: Sequence[Placement], lengths: Sequence[Tensor], device: torch.device
    ) -> None:
        self.weights = len(placements)
        self._lengths = list(lengths)
        self._held = [p.held for p in placements]
        self._sizes = [p.n for p in placements]
        self._sharings = [p.sharing or held_everywhere(p.n) for p in placements]
        self._device = device
        self.everywhere = all(s.everywhere for s in self._sharings)
        self.cuts = any(bool(s.cut.any()) for s in self._sharings)
        self.length = self._locally(self._lengths).to(device)
        self._counts = [len(h) for h in self._held]
        self.weight_of = _repeat(range(self.weights), self._counts).to(device)
        self._speaks = (
            self._locally([s.counted for s in self._sharings]).nonzero().flatten().to(device)
        )
        groups = groups_of(self._sharings)
        self._group = next(iter(groups.values())) if len(groups) == 1 else None
        self._near: _Buffer | None = None
        self._far: _Buffer | None = None

    def _locally(self, per_weight: Sequence[Tensor]) -> Tensor:
        """From all vectors of each weight to those held here, weight after weight."""
        return torch.cat(
            [values[held] for values, held in zip(per_weight, self._held, strict=True)]
            or [torch.zeros(0, dtype=torch.float32, device="cpu")]
        )

    def _buffer(self, near: bool) -> _Buffer:
        """The buffer of the group, or (not ``near``) the one that all cut vectors of all ranks fit
        into."""
        near = near and self._group is not None
        known = self._near if near else self._far
        if known is None:
            known = self._make_buffer(near)
            if near:
                self._near = known
            else:
                self._far = known
        return known

    def _make_buffer(self, near: bool) -> _Buffer:
        chosen = [s.present if near else s.cut for s in self._sharings]
        counts = torch.tensor([int(c.sum()) for c in chosen], dtype=torch.long, device="cpu")
        starts = counts.cumsum(0) - counts
        slot = self._locally(
            [
                torch.where(c, c.cumsum(0) - 1 + start, -1)
                for c, start in zip(chosen, starts, strict=True)
            ]
        )
        adds = self._locally(
            [
                torch.full((n,), near or s.first_copy, dtype=torch.bool, device="cpu")
                for n, s in zip(self._sizes, self._sharings, strict=True)
            ]
        )
        cut = (slot >= 0).nonzero().flatten()
        speaks = self._speaks.cpu()
        return _Buffer(
            group=self._group if near else None,
            size=int(counts.sum()),
            cut=cut.to(self._device),
            slot=slot[cut].to(self._device),
            adds=adds[cut].to(self._device),
            weight_of=_repeat(range(self.weights), counts.tolist()).to(self._device),
            length=torch.cat(
                [length[c] for length, c in zip(self._lengths, chosen, strict=True)]
            ).to(self._device),
            others=speaks[slot[speaks] < 0].to(self._device),
        )

    def _fill(self, buffer: _Buffer, packed: Tensor) -> Tensor:
        out = packed.new_zeros(*packed.shape[:-1], buffer.size)
        # A copy that does not add writes zeros: a product with 0 would let a NaN through.
        pieces = packed[..., buffer.cut]
        out[..., buffer.slot] = torch.where(buffer.adds, pieces, torch.zeros_like(pieces))
        return out

    def sum_(self, packed: Tensor) -> Tensor:
        """Complete ``(..., n)`` sums of the vectors held here, in place."""
        if self.cuts:
            buffer = self._buffer(near=True)
            packed[..., buffer.cut] = all_reduce(self._fill(buffer, packed), buffer.group)[
                ..., buffer.slot
            ]
        return packed

    def per_weight(self, values: Tensor) -> Tensor:
        """Sum ``(..., n)`` over the vectors held here of each weight: ``(..., weights)``."""
        if (
            values.device.type == "cpu" and self.weights
        ):  # twice as fast there; elsewhere it would be a kernel for every weight
            return torch.stack(
                [part.sum(-1) for part in values.split_with_sizes(self._counts, -1)], -1
            )
        return values.new_zeros(*values.shape[:-1], self.weights).index_add_(
            -1, self.weight_of, values
        )

    def totals(self, values: Tensor) -> Tensor:
        """Sum complete ``(..., n)`` values over all vectors of each weight on all ranks, each
        counted once: ``(..., weights)``."""
        if self.everywhere:
            return self.per_weight(values)
        return all_reduce(self._spoken(values, self._speaks), None)

    def mean_over_copies(self, totals: Tensor) -> Tensor:
        """The mean over all ranks of totals that were taken without communication; others are equal
        on all ranks already."""
        if not self.everywhere or world_size() == 1:
            return totals
        return all_reduce(totals.contiguous(), None) / world_size()

    def counts(self, bins: Tensor, size: int) -> Tensor:
        """How many vectors of each weight on all ranks lie in each bin, each counted once: ``(...,
        n)`` to ``(..., weights, size)``."""
        chosen = slice(None) if self.everywhere else self._speaks
        weight_of, none = self.weight_of[chosen], self.weights * size
        out = self.length.new_zeros(bins[..., 0].numel(), none + 1)
        for row, mine in zip(out, bins[..., chosen].flatten(0, -2), strict=True):
            index = torch.where(mine >= 0, weight_of * size + mine, none)
            row.index_add_(0, index, torch.ones_like(index, dtype=out.dtype))
        out = out[:, :none].reshape(*bins.shape[:-1], self.weights, size)
        return out if self.everywhere else all_reduce(out, None)

    def _spoken(self, values: Tensor, chosen: Tensor) -> Tensor:
        out = values.new_zeros(*values.shape[:-1], self.weights)
        return out.index_add_(-1, self.weight_of[chosen], values[..., chosen])

    def sum_with_totals_(
        self, packed: Tensor, summarize: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Complete ``(K, n)`` sums in place and return totals of what ``summarize`` makes of them,
        in one collective.

        Args:
            packed: this rank's sums.
            summarize: from sums ``(K, m)`` and lengths ``(m,)`` of any vectors to ``(J, m)``.

        Returns:
            ``(J, weights)``.
        """
        if self.everywhere or not self.cuts:
            return self.totals(summarize(self.sum_(packed), self.length))
        # Whole vectors are summarized before the collective; the sums of all cut vectors go with
        # them and every rank summarizes those.
        buffer = self._buffer(near=False)
        totals = self._spoken(summarize(packed, self.length), buffer.others)
        pieces = self._fill(buffer, packed)
        both = all_reduce(torch.cat([pieces.flatten(), totals.flatten()]), None)
        pieces, totals = (
            both[: pieces.numel()].view_as(pieces),
            both[pieces.numel() :].view_as(totals),
        )
        packed[..., buffer.cut] = pieces[..., buffer.slot]
        return totals.index_add_(-1, buffer.weight_of, summarize(pieces, buffer.length))

    def gather(self, values: Tensor) -> list[Tensor]:
        """From ``(..., n)`` values of the vectors held here to those of all vectors of each weight,
        on every rank."""
        starts = torch.tensor(
            [0, *self._sizes[:-1]] if self._sizes else [], dtype=torch.long, device="cpu"
        ).cumsum(0)
        place = torch.cat(
            [held + start for held, start in zip(self._held, starts, strict=True)] or [starts]
        ).to(values.device)
        out = values.new_zeros(
            *values.shape[:-1],
            sum(self._sizes),
            dtype=torch.float64 if values.device.type != "mps" else torch.float32,
        )
        chosen = slice(None) if self.everywhere else self._speaks
        out[..., place[chosen]] = values[..., chosen].to(out.dtype)
        if not self.everywhere:
            all_reduce(out, None)
        return list(torch.split(out.to(values.dtype), self._sizes, -1))

    def scatter(self, values: Sequence[Tensor]) -> Tensor:
        """From values of all vectors of each weight to those of the vectors held here: the inverse
        of `gather`, without communication."""
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.cat(
            [
                v.to(self._device)[..., h.to(self._device)]
                for v, h in zip(values, self._held, strict=True)
            ],
            -1,
        )


def _repeat(values: Iterable[int], counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(
        torch.tensor(list(values), dtype=torch.long, device="cpu"),
        torch.tensor(list(counts), dtype=torch.long, device="cpu"),
    )
