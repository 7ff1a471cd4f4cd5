"""What a callback remembers of each vector, kept by weight name so that it outlives plans: plans
are made anew when weights join or leave, and a checkpoint is loaded by another number of ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors

# Not worth a checkpoint: a fit that goes on finds such vectors again, and names them again.
UNSAVED = frozenset({"bad"})

Table = dict[str, dict[str, Tensor]]
"""``{key: {weight name: (vectors of the weight,)}}``, as a checkpoint has it."""


@dataclass(frozen=True)
class _Entry:
    """The state of one weight's vectors, as part of the tensor that a plan works on.

    Args:
        vectors: all vectors of that plan.
        position: of the weight among them.
        values: ``(vectors.n,)``, of this rank.
    """

    vectors: WeightVectors
    position: int
    values: Tensor

    @property
    def partition(self) -> Partition:
        """How the weight splits into vectors."""
        return self.vectors.partitions[self.position]

    @property
    def local(self) -> Tensor:
        """The part of this weight on this rank."""
        return self.values[self.vectors.slices[self.position]]


class VectorState:
    """State of each vector by key and weight name.

    `take` hands out one tensor per plan, which is changed in place; so what is stored is always
    what the plan works on, and nobody has to store it again.
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, _Entry]] = {}
        # Of all ranks, from a checkpoint; taken by the first plan that has the weight.
        self._restored: Table = {}

    def restore(self, tables: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what `gather` gave for a checkpoint."""
        self._restored = {key: dict(table) for key, table in tables.items()}

    def take(
        self,
        key: str,
        vectors: WeightVectors,
        make: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """The state of ``vectors`` as one tensor ``(n,)``, to be changed in place.

        Every rank must call it.

        Args:
            key: names the state.
            vectors: whose state it is.
            make: gives ``(n,)`` for vectors that nothing is known of; may be a collective.
            dtype: of the result.
        """
        entries, restored = self._entries.setdefault(key, {}), self._restored.get(key, {})
        fresh: Tensor | None = None
        parts = []
        for i, (name, partition) in enumerate(zip(vectors.names, vectors.partitions, strict=True)):
            # Popped: the next plan must go on from this one and not from the checkpoint again.
            saved, known = restored.pop(name, None), entries.get(name)
            # With another granularity, the saved numbers are about other vectors.
            if saved is not None and saved.numel() == partition.n:
                part = vectors.scatter_one(i, saved)
            elif known is not None and known.partition.equal(partition):
                part = known.local
            else:
                # Decided by partitions, which are the same on every rank, and not by what this rank
                # holds: `make` and `_carry` may be collectives.
                fresh = make() if fresh is None else fresh
                part = fresh[vectors.slices[i]]
                if known is not None:
                    part = _carry(known, vectors, i, part)
            parts.append(part.to(vectors.device, dtype))
        # A copy: the earlier plan may still be in a step that raises.
        values = torch.cat(parts)
        for i, name in enumerate(vectors.names):
            entries[name] = _Entry(vectors, i, values)
        return values

    def gather(self) -> Table:
        """The state of all vectors of all ranks, for a checkpoint. A collective."""
        tables = {key: dict(table) for key, table in self._restored.items()}
        for key, entries in self._entries.items():
            if key in UNSAVED:
                continue
            table = tables.setdefault(key, {})
            # Weights of one plan share a tensor, which is gathered once.
            gathered: dict[int, list[Tensor]] = {}
            for name, entry in entries.items():
                if id(entry.values) not in gathered:
                    gathered[id(entry.values)] = entry.vectors.gather(entry.values)
                # A clone: `cpu()` does not copy what is there already, and training changes it.
                table[name] = gathered[id(entry.values)][entry.position].cpu().clone()
        return tables

    def forget(self, name: str) -> None:
        """Another weight has taken the place of the one that was called ``name``."""
        for entries in self._entries.values():
            entries.pop(name, None)
        for table in self._restored.values():
            table.pop(name, None)


def _carry(
    known: _Entry,
    vectors: WeightVectors,
    position: int,
    fresh: Tensor,
) -> Tensor:
    """State of a weight that splits otherwise than before: as it was for vectors that stayed the
    same (rows that no loss had read have joined), ``fresh`` for the others. A collective."""
    same = vectors.partitions[position].found_in(known.partition)
    # Partitions are whole on every rank, so all ranks leave here, or none does.
    if not bool((same >= 0).any()):
        return fresh
    before = known.vectors.gather(known.values)[known.position]
    # Vectors that are not found (-1) read entry 0 here; `where` below drops it.
    matched = before[same.clamp(min=0).to(before.device)]
    is_known = vectors.scatter_one(position, same >= 0)
    carried = vectors.scatter_one(position, matched)
    return torch.where(is_known, carried.to(fresh), fresh)
