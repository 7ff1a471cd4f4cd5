"""Completes sums over the ranks that share vectors, one collective at a time.

A vector is *cut* if several ranks hold parts of it: then each rank's sum is a part, and the parts
must be added up. Totals over a weight's vectors need every vector once, so one rank *speaks* for
each.

Letters: n vectors held on this rank, K sums.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .partition import indices
from .pieces import Placement, Runs, Sharing


def world_size() -> int:
    """How many processes train together."""
    # Without a process group every question about ranks has the answer of one process.
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` as every rank has it, in the order of ranks. Every rank must call it.

    An object is pickled on its way, which is slow: for the start of a fit.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


_IS_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """What is added up over ranks meanwhile stays what this rank has, and nobody waits for
    another: for numbers that do not matter."""
    token = _IS_ALONE.set(True)
    try:
        yield
    finally:
        _IS_ALONE.reset(token)


def all_reduce(
    values: Tensor,
    group: Any,
) -> Tensor:
    """Add up ``values`` over ``group`` (None: all ranks), in place."""
    if _IS_ALONE.get():
        return values
    # NCCL cannot send from the memory of the CPU, where offloaded weights have their sums.
    if values.device.type == "cpu" and dist.get_backend(group) == "nccl":
        on_device = values.cuda()
        dist.all_reduce(on_device, group=group)
        return values.copy_(on_device)
    dist.all_reduce(values, group=group)
    return values


def held_everywhere(n: int) -> Sharing:
    """The sharing of a weight that every rank holds; rank zero speaks."""
    none = torch.zeros(n, dtype=torch.bool, device="cpu")
    # Each vector must be counted once; who counts it does not matter.
    speaks = world_size() == 1 or dist.get_rank() == 0
    return Sharing(none, none, torch.full_like(none, speaks), speaks, everywhere=True, group=None)


def groups_of(sharings: Iterable[Sharing]) -> dict[tuple[int, ...] | None, Any]:
    """The different groups of ranks over which cut vectors are completed; None stands for one that
    no process group is."""
    # By their ranks: equal groups may be different objects.
    groups: dict[tuple[int, ...] | None, Any] = {}
    for sharing in sharings:
        if sharing.cut.any():
            group = sharing.group
            ranks = None if group is None else tuple(dist.get_process_group_ranks(group))
            groups[ranks] = group
    return groups


Summarize = Callable[[Tensor, Tensor], Tensor]
"""From sums ``(K, m)`` and the lengths ``(m,)`` of any m vectors to ``(J, m)`` values."""


@dataclass(frozen=True)
class Chosen:
    """Some of the vectors held here: to be added up, and as flags, bool ``(n,)``."""

    runs: Runs
    flags: Tensor


@dataclass(frozen=True)
class Message:
    """The cut vectors that are completed together, over ranks.

    Args:
        group: over which ranks; None: all.
        size: number of vectors in the buffer, the same on all these ranks.
        cut: local vectors that it holds, ``(c,)``, and ``slot``: where.
        place: int64 ``(n,)``: where every local vector is, -1 where it is not.
        parts: what this rank adds: its piece of each vector, unless a copy of it does so on another
            rank. The buffer's vectors stand in the place of weights.
        weight_of: the weight of every vector of the buffer, ``(size,)``.
        length: its number of entries, ``(size,)``.
        others: local vectors that are not cut and that this rank speaks for.
        added: these, and the pieces of cut vectors that it adds.
    """

    group: Any
    size: int
    cut: Tensor
    slot: Tensor
    place: Tensor
    parts: Runs
    weight_of: Tensor
    length: Tensor
    others: Chosen
    added: Chosen

    @cached_property
    def starts(self) -> Tensor:
        """int32 ``(weights + 1,)``: where the buffer's vectors of each weight begin."""
        return Runs(slice(None), self.weight_of, self.others.runs.weights).first


class Reduction:
    """Completes sums over the ranks that share vectors, with one collective at most. One process
    holds everything: nothing to do.

    Every rank calls every method, also a rank that holds nothing. If all cut vectors are shared
    within one process group (or one of equal groups side by side), only that group communicates,
    and only about those vectors; else all ranks do, each piece counted once.

    Args:
        placements: of the weights, in the order of the index space.
        lengths: for each weight the number of entries of all its vectors.
        device: where sums are kept.

    Attributes:
        length: number of entries of every vector held here.
        weight_of: its weight.
        everywhere: whether every rank holds a piece of every vector.
        cut: whether some vector lies on several ranks in pieces; the same on every rank that shares
            these weights.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        lengths: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._lengths = list(lengths)
        self._held = [p.held for p in placements]
        self._sizes = [p.n for p in placements]
        # One for all weights of so many vectors: a network has thousands of small weights.
        whole = {n: held_everywhere(n) for n in {p.n for p in placements if p.sharing is None}}
        self._sharings = [p.sharing or whole[p.n] for p in placements]
        self.device = device
        # A rank that has all vectors can total them alone: no collective, as under DDP.
        self.everywhere = all(s.everywhere for s in self._sharings)
        self.cut = any(s.cut.any() for s in set(self._sharings))
        self._counts = [len(held) for held in self._held]
        # Neighbouring weights of equally many vectors: how many vectors each has, and how many
        # weights these are.
        self._alike = [(count, len(list(run))) for count, run in groupby(self._counts)]
        self.length = self._held_of(self._lengths).to(device)
        self.weight_of = self._weights_repeated(self._counts)
        # As indices, and not as a mask, which would make the host wait for its length.
        speaks = self._held_of([s.counted for s in self._sharings]).nonzero().flatten()
        self._speaks = speaks.to(device)
        # What this rank speaks for; a slice where no vector may be left out, which costs nothing.
        self._chosen = slice(None) if self.everywhere else self._speaks

    @property
    def starts(self) -> Tensor:
        """int32 ``(weights + 1,)``: where the vectors of each weight begin."""
        return self._all_runs.first

    @cached_property
    def _all_runs(self) -> Runs:
        return Runs(slice(None), self.weight_of, len(self._sizes))

    @cached_property
    def _spoken_runs(self) -> Runs:
        """Of the vectors that this rank speaks for."""
        return Runs(self._speaks, self.weight_of[self._speaks], len(self._sizes))

    @cached_property
    def spoken(self) -> Tensor | None:
        """bool ``(n,)``: the vectors that this rank speaks for; None: it may total them alone."""
        if self.everywhere:
            return None
        spoken = self._held_of([s.counted for s in self._sharings])
        return spoken.to(self.device)

    def _held_of(
        self,
        per_weight: Sequence[Tensor],
    ) -> Tensor:
        """From all vectors of each weight to those held here, weight after weight."""
        # torch cannot concatenate nothing, which is what an optimizer without targets has.
        parts = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        for values, held in zip(per_weight, self._held, strict=True):
            # All of them, without a shard: an index would only copy them, for every weight.
            is_whole = len(held) == values.shape[-1]
            parts.append(values if is_whole else values[..., held.to(values.device)])
        return torch.cat(parts[1:] or parts, -1)

    def _weights_repeated(
        self,
        counts: Sequence[int],
    ) -> Tensor:
        weights = indices(len(self._sizes))
        repeats = torch.tensor(counts, dtype=torch.long, device="cpu")
        return weights.repeat_interleave(repeats).to(self.device)

    @cached_property
    def _near(self) -> Message:
        """The buffer of the only group that shares cut vectors; `_far` if there is no such one."""
        groups = groups_of(self._sharings)
        if len(groups) != 1 or None in groups:
            return self._far
        (group,) = groups.values()
        # Within the group each entry lies once, so every rank adds what it holds.
        return self._buffer(
            [s.present for s in self._sharings], group, adds=[True] * len(self._sizes)
        )

    @cached_property
    def _far(self) -> Message:
        """The buffer of all ranks, which all cut vectors fit into."""
        # All ranks together hold replicas as well, of which only the first adds.
        adds = [s.first_copy for s in self._sharings]
        return self._buffer([s.cut for s in self._sharings], None, adds)

    def _buffer(
        self,
        chosen: list[Tensor],
        group: Any,
        adds: list[bool],
    ) -> Message:
        # Slots are numbered over all vectors of all ranks, so that every rank means the same one.
        slots, size = [], 0
        for mask in chosen:
            slots.append(torch.where(mask, mask.cumsum(0) - 1 + size, -1))
            size += int(mask.sum())
        slot = self._held_of(slots)
        cut = (slot >= 0).nonzero().flatten()
        adds_of_held = torch.tensor(adds, dtype=torch.bool, device="cpu")[self.weight_of.cpu()]
        added = cut[adds_of_held[cut]]
        lengths = [length[mask] for length, mask in zip(self._lengths, chosen, strict=True)]
        speaks = self._speaks.cpu()
        others = speaks[slot[speaks] < 0]
        return Message(
            group=group,
            size=size,
            cut=cut.to(self.device),
            slot=slot[cut].to(self.device),
            place=slot.to(self.device),
            parts=Runs(added.to(self.device), slot[added].to(self.device), size),
            weight_of=self._weights_repeated([int(mask.sum()) for mask in chosen]),
            length=torch.cat(lengths).to(self.device),
            others=self._choice(others),
            added=self._choice(torch.cat([others, added]).sort().values),
        )

    def _choice(self, vectors: Tensor) -> Chosen:
        """These of the local vectors, which are given in their order."""
        flags = torch.zeros(len(self.weight_of), dtype=torch.bool, device="cpu")
        flags[vectors] = True
        vectors = vectors.to(self.device)
        runs = Runs(vectors, self.weight_of[vectors], len(self._sizes))
        return Chosen(runs, flags.to(self.device))

    def sum_(
        self,
        packed: Tensor,
    ) -> Tensor:
        """Complete ``(..., n)`` sums of the vectors held here, in place."""
        if self.cut:
            buffer = self._near
            completed = all_reduce(self._add_up(packed, buffer.parts), buffer.group)
            self.put_back(packed, completed, buffer)
        return packed

    @property
    def message(self) -> Message:
        """What `sum_` sends."""
        return self._near

    @property
    def message_with_totals(self) -> Message:
        """What `complete_with_totals` sends, behind totals of the vectors that are not cut."""
        return self._far

    def put_back(self, packed: Tensor, completed: Tensor, buffer: Message) -> None:
        """Write completed sums, ``(..., size)``, to their vectors."""
        packed[..., buffer.cut] = completed[..., buffer.slot]

    def complete_with_totals(
        self, packed: Tensor, summarize: Summarize, *, linear: bool = False
    ) -> Tensor:
        """Complete this rank's ``(K, n)`` sums in place and return `totals` of what ``summarize``
        makes of them, in one collective.

        Args:
            packed: the sums.
            summarize: of sums and lengths.
            linear: whether the summaries of the pieces of a vector add up to that of the vector.

        Returns:
            ``(J, weights)``.
        """
        if self.everywhere or not self.cut:
            return self.totals(summarize(self.sum_(packed), self.length))
        # Whole vectors are summarized before the collective. The sums of all cut vectors go with
        # them, and every rank summarizes those, unless their pieces can be summarized before, too.
        buffer = self._far
        parts = self._add_up(packed, buffer.parts)
        summarized = buffer.added if linear else buffer.others
        totals = self._add_up(summarize(packed, self.length), summarized.runs)
        # Side by side in one message: a second collective would cost its latency again.
        both = all_reduce(torch.cat([totals.flatten(), parts.flatten()]), None)
        sums = both[totals.numel() :].view_as(parts)
        totals = both[: totals.numel()].view_as(totals)
        self.put_back(packed, sums, buffer)
        if linear:
            return totals
        return totals.index_add_(-1, buffer.weight_of, summarize(sums, buffer.length))

    def per_weight(
        self,
        values: Tensor,
    ) -> Tensor:
        """Sum ``(..., n)`` values over the vectors of each weight that this rank holds: ``(...,
        weights)``."""
        # Twice as fast on a CPU; elsewhere it would be a kernel for every weight.
        if values.device.type == "cpu" and self._sizes:
            runs = values.split_with_sizes([math.prod(alike) for alike in self._alike], -1)
            totals = []
            for run, (count, weights) in zip(runs, self._alike, strict=True):
                totals.append(run.reshape(*run.shape[:-1], weights, count).sum(-1))
            return torch.cat(totals, -1)
        return self._add_up(values, self._all_runs)

    def _add_up(self, values: Tensor, runs: Runs) -> Tensor:
        """Sum ``(..., n)`` values over the chosen vectors of each weight: ``(..., weights)``."""
        return runs.add_up(values)

    def totals(
        self,
        values: Tensor,
    ) -> Tensor:
        """`per_weight` of complete values over all ranks, every vector counted once: ``(...,
        weights)``.

        One collective, or none where every rank holds all vectors. Every rank must call it.
        """
        if self.everywhere:
            return self.per_weight(values)
        return self.over_ranks(self._add_up(values, self._spoken_runs))

    def over_ranks(
        self,
        totals: Tensor,
    ) -> Tensor:
        """`totals` from those of the vectors that this rank speaks for; in place."""
        return totals if self.everywhere else all_reduce(totals, None)

    def mean_over_copies(
        self,
        totals: Tensor,
    ) -> Tensor:
        """Make ``(..., weights)`` totals equal on all ranks where each rank worked them out for
        itself.

        Where every rank holds all vectors, `totals` communicates nothing, and ranks would come to
        different conclusions if somebody's code changed the numbers on one of them.
        """
        # Where some rank lacks a vector, totals came out of a collective and are equal already.
        if not self.everywhere or world_size() == 1:
            return totals
        return all_reduce(totals.contiguous(), None) / world_size()

    def counts(
        self,
        bins: Tensor,
        size: int,
    ) -> Tensor:
        """How many vectors of each weight lie in each bin, over all ranks, every vector counted
        once: ``(..., weights, size)``.

        Communicates as `totals` does.

        Args:
            bins: ``(..., n)`` int64: the bin of each vector, ``0..size-1``, or -1 for none.
            size: number of bins.
        """
        # One more bin at the end takes the vectors that are in none.
        weight_of = self.weight_of[self._chosen]
        weights = len(self._sizes)
        no_bin = weights * size
        lines = bins[..., self._chosen].flatten(0, -2)
        out = self.length.new_zeros(len(lines), no_bin + 1)
        for counted, line in zip(out, lines, strict=True):
            # Every weight has a range of bins of its own in one long line.
            index = torch.where(line >= 0, weight_of * size + line, no_bin)
            ones = torch.ones_like(index, dtype=out.dtype)
            counted.index_add_(0, index, ones)
        out = out[:, :no_bin].reshape(*bins.shape[:-1], weights, size)
        return out if self.everywhere else all_reduce(out, None)

    @cached_property
    def _gathered_place(self) -> Tensor:
        """int64 ``(n,)``: where `gather` puts the value of each vector held here."""
        places, total = [], 0
        for held, size in zip(self._held, self._sizes, strict=True):
            places.append(held + total)
            total += size
        return torch.cat(places).to(self.device) if places else self._speaks

    def gather(
        self,
        values: Tensor,
    ) -> list[Tensor]:
        """From ``(..., n)`` values of the vectors held here to those of all vectors, for each
        weight ``(..., vectors of the weight)``, e.g. for checkpoints. Communicates as `totals`."""
        place = self._gathered_place.to(values.device)
        total = sum(self._sizes)
        # Each rank writes what it speaks for into zeros; adding up over the ranks gathers.
        # Integers and flags are sent as floating-point numbers, which hold them exactly.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        out = values.new_zeros(*values.shape[:-1], total, dtype=dtype)
        out[..., place[self._chosen]] = values[..., self._chosen].to(dtype)
        if not self.everywhere:
            all_reduce(out, None)
        return list(torch.split(out.to(values.dtype), self._sizes, -1))

    def scatter(
        self,
        values: Sequence[Tensor],
    ) -> Tensor:
        """The inverse of `gather`, on any number of ranks, without communication."""
        here = [of_weight.to(self.device) for of_weight in values]
        return self._held_of(here).to(self.device)
