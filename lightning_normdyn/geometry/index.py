"""Which row of which local tensor is which vector: one index space over all targeted weights.

A *row* is a run of a weight's entries on this rank that belong to one vector: a filter, a group of
neighbouring filters, a whole matrix, or what a shard holds of one of these. Sums are taken row by
row and then given to vectors; factors of vectors are handed to rows.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from lightning_normdyn.geometry.partition import indices
from lightning_normdyn.geometry.pieces import Piece, Placement


class RowIndex:
    """The rows of all pieces of all weights, numbered through, and the vector that each belongs to.

    Args:
        placements: of the weights, in the order of the index space.
        device: where numbers per vector are kept.

    Attributes:
        n: number of vectors of which this rank holds an entry.
        slices: the range of each weight's vectors among them.
        pieces: every piece on this rank, with the position of its weight.
        counts: number of rows of each piece, in the order of ``pieces``.
        in_order: whether row i is vector i, all of them: the common case of whole filters, which
            needs no indexing.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        device: torch.device,
    ) -> None:
        self.slices: list[slice] = []
        self.pieces: list[tuple[int, Rows]] = []
        self.n = 0
        of_rows = [indices(0)]
        for weight, placement in enumerate(placements):
            for piece in placement.pieces:
                rows = Rows(piece)
                self.pieces.append((weight, rows))
                # Vectors that lie on other ranks alone have no number here.
                position = torch.searchsorted(placement.held, rows.labels) + self.n
                of_rows.append(torch.where(rows.labels < 0, -1, position))
            # A vector that several pieces hold parts of has one number all the same.
            self.slices.append(slice(self.n, self.n + len(placement.held)))
            self.n += len(placement.held)
        self.counts = [len(vectors) for vectors in of_rows[1:]]
        # Row by row through all pieces, as kernels write their results.
        of_row = torch.cat(of_rows)
        self.in_order = torch.equal(of_row, indices(self.n))
        # Rows that belong to no vector go to one more place behind the n vectors.
        # An index instead of a mask: its size is known, so that the host never waits for it.
        self._of_row = torch.where(of_row < 0, self.n, of_row).to(device)

    def to_rows(
        self,
        values: Tensor,
        dummy: float,
    ) -> Sequence[Tensor]:
        """From ``(n,)`` values of the vectors those of each piece's rows.

        Args:
            values: one per vector.
            dummy: the value of rows that belong to no vector.
        """
        if not self.in_order:
            with_dummy = torch.cat([values, values.new_full((1,), dummy)])
            values = with_dummy.to(self._of_row.device)[self._of_row]
        return values.split_with_sizes(self.counts)

    def to_vectors(self, sums: Tensor) -> Tensor:
        """Add up sums over rows, ``(K, rows)``, within each vector: ``(K, n)``."""
        if self.in_order:
            return sums  # no copy: the usual case
        by_vector = sums.new_zeros(len(sums), self.n + 1)
        return by_vector.index_add_(1, self._of_row, sums)[:, : self.n]


class Rows:
    """A piece of one weight as a tensor in which every row belongs to one vector.

    Attributes:
        labels: int64 ``(rows,)``: the vector within the weight that each row belongs to, or -1.
    """

    def __init__(self, piece: Piece) -> None:
        self._select = piece.select
        labels, kept, self._blocks = _merge_rows(piece.labels, piece.keep)
        self._kept = frozenset(kept)
        self.labels = labels.flatten()

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a local tensor; a row is what the kept dimensions tell apart."""
        view = self._select(tensor)
        for dim, block in self._blocks:
            # A view, whatever the strides: the dimension is split, not joined.
            view = view.unflatten(dim, (-1, block))  # type: ignore[no-untyped-call]
        return view

    def form(self, view: Tensor) -> list[int]:
        """The shape of one number per row that broadcasts over a view."""
        form = [1] * view.ndim
        for d in self._kept:
            form[d] = view.shape[d]
        return form

    def dims(self, view: Tensor) -> list[int]:
        """The dimensions of a view that lie within a row."""
        return [d for d in range(view.ndim) if d not in self._kept]


def _merge_rows(
    labels: Tensor, kept: Sequence[int]
) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """Join neighbouring entries that have the same label, so that groups, layers and transposed
    filters are single rows as well.

    Args:
        labels: of a piece.
        kept: the dimensions of the piece's view that they stand for.

    Returns:
        The labels of the joined rows; the dimensions that are kept; and which dimensions to
        unflatten first, ``(dim, size of the inner one)``, one after the other.
    """
    # Fewer and longer rows: fewer numbers per weight, and longer runs of memory for each sum.
    kept = list(kept)
    blocks: list[tuple[int, int]] = []
    if not labels.numel():
        return labels, kept, blocks
    # From the last axis on, so that the axes still to come keep their numbers.
    for axis in reversed(range(labels.ndim)):
        size = labels.shape[axis]
        lines = labels.movedim(axis, 0).reshape(size, -1)
        # The largest block such that no label changes within one.
        changes = (lines[1:] != lines[:-1]).any(1).nonzero().flatten() + 1
        block = gcd(size, *changes.tolist())
        starts = torch.arange(0, size, block, dtype=torch.long, device="cpu")
        labels = labels.index_select(axis, starts)
        if block == size:
            labels = labels.squeeze(axis)
            del kept[axis]
        elif block > 1:
            dim = kept[axis]
            blocks.append((dim, block))
            kept = [k + (k > dim) for k in kept]
    return labels, kept, blocks
