"""Where the rows of all weights lie in memory, as tables that the programs of
`lightning_normdyn.geometry.triton_programs` read.

A launch over thousands of weights cannot be told of each by its arguments, so it is told by tables
on the device: one of records, made once from shapes and strides, and one of addresses, sent
whenever a weight, gradient or buffer lies somewhere else than before.

Letters: n vectors, W weights, P programs, S slots.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels import RowIndex
from .passes import Operand
from .pieces import Runs

Array = np.ndarray[Any, Any]
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

FIELDS = 12
"""Numbers of a program's record: 0 weight; 1 offset of its first entry; 2 from row to row; 3 rows;
4 entries in a run; 5 from entry to entry; 6 runs; 7 from run to run; 8 its first row, among all
rows; 9 its first slot; 10 kind of tile; 11 whether all its rows are of one vector and share one
slot."""

SHORT, LONG, COLUMNS, ALIGNED = range(4)
"""Kinds of tiles: rows of few entries; long rows; rows that are neighbours in memory, entry by
entry; long rows that begin at multiples of 16 bytes. The programs know them by these numbers."""

TILES = {SHORT: (32, 32), LONG: (4, 256), COLUMNS: (32, 32), ALIGNED: (4, 256)}
"""How many rows, and how many entries of each, a program takes at a time."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What the programs can read and write."""
MOST_ENTRIES = 16 * 1024
"""Entries per program: few enough that no program runs much longer than others, and that a sum in
float32 adds few numbers one after the other."""
PART_OF_A_ROW = 4096
"""A long row that is alone is cut into rows of so many entries, which fill a tile together."""
SHORT_RUN = 128
"""A tile of long rows would be mostly empty on runs of fewer entries."""
KNOWN_ADDRESSES = 16
"""So many tables of addresses are kept: weights, buffers and gradients come back in turns."""


class Unfit(Exception):
    """The programs cannot take these tensors; torch's kernels can."""


def refusal(weights: Sequence[Tensor]) -> str | None:
    """Why the programs cannot take these weights; None if they can."""
    if len({weight.device for weight in weights}) > 1:
        return "weights lie on several devices"
    for weight in weights:
        if weight.dtype not in DTYPES:
            return f"there is no program for {weight.dtype}"
        is_plain = type(weight) in (Tensor, torch.nn.Parameter)
        if not is_plain or weight.layout != torch.strided or weight.is_neg() or weight.is_conj():
            return f"{type(weight).__name__} is no plain strided tensor"
        sizes_and_strides = zip(weight.shape, weight.stride(), strict=True)
        if any(stride == 0 and size > 1 for size, stride in sizes_and_strides):
            return "an expanded weight holds one entry in several places"
    return None


@dataclass(frozen=True)
class Part:
    """The programs of all weights of one dtype: one launch.

    Args:
        dtype: of the weights.
        records: int64 ``(P, FIELDS)``, on the device.
        programs: P.
        kinds: bit k says whether some program has tiles of kind k.
    """

    dtype: torch.dtype
    records: Tensor
    programs: int
    kinds: int


@dataclass(frozen=True)
class Sent:
    """How the launch that takes sums writes them where a message is sent from."""

    # As of `RowTables`, and programs that write zeros; their slots are counted in.
    parts: Sequence[Part]
    slots: int
    # int32 ``(S,)``: the place in the message of each slot; -1: in none.
    places: Tensor


class RowTables:
    """The rows of all weights, cut into programs.

    Args:
        index: which row is which vector.
        weights: each rank's plain tensors; only shapes, strides and dtypes matter.
        device: of the weights.

    Attributes:
        n: number of vectors.
        parts: one per dtype.
        slots: S, how many sums of each kind the programs find.
        order: int32, the slots of all vectors, vector after vector.
        first: int32 ``(n + 1,)``: where each vector's slots begin in ``order``.
        vectors: int32: the vector of each row; -1: none.
        combining: how many vectors a program of `triton_programs.combine` takes, and how many of
            their slots at a time.
        totalling: the same for a program that goes through all vectors of a weight.

    Raises:
        Unfit: for what `refusal` names, and for rows that lie too far apart.
    """

    def __init__(
        self,
        index: RowIndex,
        weights: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        reason = refusal(weights)
        if reason is not None:
            raise Unfit(reason)
        self.n = index.n
        self.device = device
        self.layouts: list[Layout] = [(w.shape, w.stride(), w.dtype) for w in weights]
        self.slots = 0
        records: dict[torch.dtype, list[Array]] = {}
        vectors, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        rows = 0
        for weight, view, labels in _views(index, weights):
            dtype = weights[weight].dtype
            for block in _blocks(view, labels):
                made, labels_of_slots = block.programs(
                    weight, rows, self.slots, 16 // dtype.itemsize
                )
                records.setdefault(dtype, []).append(made)
                rows += len(block.labels)
                self.slots += len(labels_of_slots)
                vectors.append(block.labels)
                owners.append(labels_of_slots)
        self.vectors = self._send(np.concatenate(vectors), torch.int32)
        self.order, self.first, self.combining = self._slots_of_vectors(np.concatenate(owners))
        self.parts = []
        for dtype, tables in records.items():
            table = np.concatenate(tables)
            kinds = int(np.bitwise_or.reduce(1 << table[:, 10]))
            self.parts.append(Part(dtype, self._send(table, torch.int64), len(table), kinds))

    def _slots_of_vectors(self, owner: Array) -> tuple[Tensor, Tensor, tuple[int, int]]:
        order = np.argsort(owner, kind="stable")
        # Rows of no vector (-1) are summed, but nobody asks for that.
        order = order[np.searchsorted(owner[order], 0) :]
        first = np.searchsorted(owner[order], np.arange(self.n + 1))
        longest = int(np.diff(first).max(initial=0))
        # A vector of many slots would keep a program busy that has others to do, so it gets one of
        # its own, which takes many slots at a time.
        combining = (1, 1024)
        if longest <= 16:
            combining = (64, 16)
        elif longest <= 512:
            combining = (8, 128)
        # Most vectors have one slot; then a program has room for more of them.
        self.totalling = (1024, 1) if longest <= 1 else combining
        return self._send(order, torch.int32), self._send(first, torch.int32), combining

    def slots_of(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """The slots of several vectors together, as `first` and `order` have those of each."""
        vectors = runs.order.cpu().numpy().astype(np.int64)
        begins = self.first.cpu().numpy().astype(np.int64)
        counts = begins[vectors + 1] - begins[vectors]
        ends = np.concatenate([[0], counts.cumsum()])
        # Where each vector's slots stand in `order`, one vector after the other.
        places = np.repeat(begins[vectors] - ends[:-1], counts) + np.arange(ends[-1])
        first = ends[runs.first.cpu().numpy()]
        return self._send(first, torch.int32), self.order[torch.from_numpy(places).to(self.device)]

    def sent(self, runs: Runs) -> Sent | None:
        """How the sums over ``runs`` are written to ``(K, weights)`` as they are taken; None where
        some have more slots than one, which a launch of its own adds up."""
        vectors, weight_of = runs.order.cpu().numpy(), runs.weight_of.cpu().numpy()
        begins, order = self.first.cpu().numpy(), self.order.cpu().numpy()
        counts = begins[vectors + 1] - begins[vectors]
        found = np.bincount(weight_of, counts, runs.weights)
        if not self.parts or found.max(initial=0) > 1:
            return None
        is_here = counts == 1
        places = np.full(self.slots, -1)
        places[order[begins[vectors[is_here]]]] = weight_of[is_here]
        # What this rank adds nothing to is still to be written: memory holds any numbers.
        empty = np.flatnonzero(found == 0)
        rows_at_once = TILES[SHORT][0]
        first_rows = np.arange(0, len(empty), rows_at_once)
        zeros = np.zeros((len(first_rows), FIELDS), np.int64)
        zeros[:, 3] = np.minimum(rows_at_once, len(empty) - first_rows)
        zeros[:, 9] = self.slots + first_rows
        zeros[:, 10] = SHORT
        first, *others = self.parts
        if len(empty):
            records = torch.cat([first.records, self._send(zeros, torch.int64)])
            first = Part(first.dtype, records, len(records), first.kinds | 1 << SHORT)
        with_zeros = self._send(np.concatenate([places, empty]), torch.int32)
        return Sent([first, *others], self.slots + len(empty), with_zeros)

    def _send(self, values: Array, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device="cpu").to(self.device)


class Addresses:
    """Where the tensors lie that the programs read and write.

    Args:
        tables: of the weights.
    """

    def __init__(self, tables: RowTables) -> None:
        self._layouts = tables.layouts
        self._device = tables.device
        self._sent: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        # A CUDA graph reads its tables whenever it is replayed, so they are kept for ever.
        self._captured: dict[tuple[int, ...], Tensor] = {}

    def of(
        self, operands: Sequence[Operand], *, written: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Addresses on the device, ``(operands, W)`` int64, 0 where there is nothing; sent only if
        they are new.

        Args:
            operands: one tensor per weight, laid out like the weights, or copied so.
            written: positions of the operands that are written to, which must not be copied.

        Returns:
            The table, and the copies that were made: to be held until the launch.

        Raises:
            Unfit: for an operand that is written to and laid out otherwise, or lies elsewhere.
            RuntimeError: for new addresses while a CUDA graph is captured.
        """
        copies: list[Tensor] = []
        found: list[int] = []
        for position, operand in enumerate(operands):
            for tensor, layout in zip(operand, self._layouts, strict=True):
                if tensor is None or not tensor.numel():
                    found.append(0)
                    continue
                # Another stride or dtype behind a raw address gives wrong numbers, silently.
                # Shapes and devices are looked at below, where an address is new.
                if tensor.stride() != layout[1] or tensor.dtype is not layout[2]:
                    tensor = _laid_out(tensor, layout, copies, written=position in written)
                found.append(tensor.data_ptr())
        addresses = tuple(found)
        if copies:
            # A copy's memory is somebody else's soon, so its address says nothing of its layout.
            self._check(operands)
            return self._send(addresses), copies
        return self._known(addresses, operands), copies

    def _known(self, addresses: tuple[int, ...], operands: Sequence[Operand]) -> Tensor:
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self._captured.get(addresses)
        if table is None:
            table = self._sent.pop(addresses, None)
        if table is None:
            self._check(operands)
            table = self._send(addresses)
            if len(self._sent) >= KNOWN_ADDRESSES:
                self._sent.popitem(last=False)
        if capturing:
            self._captured[addresses] = table
        else:
            self._sent[addresses] = table
        return table

    def _check(self, operands: Sequence[Operand]) -> None:
        for operand in operands:
            for tensor, (shape, _, _) in zip(operand, self._layouts, strict=True):
                if tensor is None:
                    continue
                if tensor.shape != shape or tensor.device != self._device:
                    raise Unfit(f"{tuple(tensor.shape)} on {tensor.device} is not like the weight")

    def _send(self, addresses: tuple[int, ...]) -> Tensor:
        on_gpu = self._device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "lightning-normdyn: these tensors have not been seen before the capture of a CUDA "
                "graph. Run the step once with the same tensors before capturing it, or set "
                "NORMDYN_KERNELS=torch."
            )
        # A fresh block each time: one that is written to again could be so before it is read.
        # torch does not give out a pinned block while a copy still reads it.
        host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        return host.to(self._device, non_blocking=True)


def _laid_out(
    tensor: Tensor,
    layout: Layout,
    copies: list[Tensor],
    *,
    written: bool,
) -> Tensor:
    """The tensor itself if it has this layout, else a copy that has."""
    shape, stride, dtype = layout
    if tensor.dtype is dtype and tensor.shape == shape and _same_steps(tensor, stride):
        return tensor
    if written or tensor.shape != shape:
        raise Unfit(f"{tuple(tensor.shape)} {tensor.dtype} is not laid out like the weight")
    copy = torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device)
    copies.append(copy.copy_(tensor))
    return copy


def _same_steps(tensor: Tensor, stride: Sequence[int]) -> bool:
    # Along a dimension of size 1 nobody steps.
    steps = zip(tensor.shape, tensor.stride(), stride, strict=True)
    return all(size <= 1 or mine == theirs for size, mine, theirs in steps)


# ---- From views to records ----


def _views(
    index: RowIndex, weights: Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor, list[int]], Array]]:
    """Every piece that holds something: its weight's position, its view with the dimensions that
    tell rows apart, and the vector of each row."""
    of_row = index.vector_of_row.split_with_sizes(index.counts)
    for (position, rows), labels in zip(index.pieces, of_row, strict=True):
        weight = weights[position]
        # Only where entries lie is asked for, so the view has no memory.
        blueprint = torch.empty_strided(
            weight.shape, weight.stride(), dtype=weight.dtype, device="meta"
        )
        view = rows.view(blueprint)
        if view.numel():
            yield position, (view, sorted(rows.kept)), labels.numpy()


Dim = tuple[int, int]
"""Size and stride."""


@dataclass(frozen=True)
class _Block:
    """Rows at equal distances.

    Args:
        start: offset of the first entry.
        step: from row to row.
        labels: the vector of each row, or -1.
        entries: within a row, at most two dimensions, the slower one first.
    """

    start: int
    step: int
    labels: Array
    entries: list[Dim]

    def programs(
        self,
        weight: int,
        row: int,
        slot: int,
        wide: int,
    ) -> tuple[Array, Array]:
        """Their records, and the vector that each of their slots belongs to.

        Args:
            weight: its position.
            row: number of the first row, among all rows.
            slot: number of the first slot, among all slots.
            wide: how many entries are 16 bytes.
        """
        run, inner = self.entries[-1] if self.entries else (1, 1)
        turns, outer = self.entries[0] if len(self.entries) == 2 else (1, 0)
        kind = self._kind(run, inner, outer, wide)
        rows_at_once, entries_at_once = TILES[kind]
        # Rows are cut into equal parts, so that no program has much more to do than others: between
        # runs, or within the only one.
        parts = -(-run * turns // (MOST_ENTRIES // rows_at_once))
        if turns > 1:
            total, stride, per_part = turns, outer, -(-turns // parts)
        else:
            total, stride = run, inner
            per_part = -(-run // (parts * entries_at_once)) * entries_at_once
        starts = np.arange(0, total, per_part)
        first_rows = np.arange(0, len(self.labels), rows_at_once)
        grid = np.meshgrid(starts, first_rows, indexing="ij")
        at, r = (axis.ravel() for axis in grid)
        count = np.minimum(per_part, total - at)
        # A vector of many rows takes one slot per program and not one per row.
        is_merged = len(self.labels) > 1 and bool((self.labels == self.labels[0]).all())

        table = np.zeros((len(at), FIELDS), np.int64)
        table[:, 0] = weight
        table[:, 1] = self.start + r * self.step + at * stride
        table[:, 2] = self.step
        table[:, 3] = np.minimum(rows_at_once, len(self.labels) - r)
        table[:, 4] = run if turns > 1 else count
        table[:, 5] = inner
        table[:, 6] = count if turns > 1 else 1
        table[:, 7] = outer
        table[:, 8] = row + r
        table[:, 10] = kind
        table[:, 11] = is_merged
        reach = table[:, 3] * abs(self.step) + table[:, 4] * abs(inner)
        if reach.max() >= 2**31:
            raise Unfit("rows lie so far apart that their distances do not fit 32 bits")
        if is_merged:
            table[:, 9] = slot + np.arange(len(at))
            return table, np.full(len(at), self.labels[0])
        table[:, 9] = slot + (at // per_part) * len(self.labels) + r
        return table, np.tile(self.labels, len(starts))

    def _kind(
        self,
        run: int,
        inner: int,
        outer: int,
        wide: int,
    ) -> int:
        if self.step == 1 and inner != 1:
            return COLUMNS
        if run < SHORT_RUN:
            return SHORT
        distances = (self.start, self.step, run, outer)
        if inner == 1 and not any(distance % wide for distance in distances):
            return ALIGNED
        return LONG


def _blocks(view_and_kept: tuple[Tensor, list[int]], labels: Array) -> Iterator[_Block]:
    """A piece as blocks of rows."""
    view, kept = view_and_kept
    within = [(view.shape[d], view.stride(d)) for d in range(view.ndim) if d not in kept]
    within.sort(key=lambda dim: -dim[1])
    entries = _collapsed(within)
    # A record has room for runs of runs. What is beyond becomes rows of their own, which end in the
    # same vectors.
    beyond, entries = entries[:-2], entries[-2:]
    rows = _collapsed([(view.shape[d], view.stride(d)) for d in kept]) or [(1, 0)]
    blocks = [(int(view.storage_offset()), labels)]
    for size, stride in rows[:-1]:
        split = []
        for start, of_block in blocks:
            for j, part in enumerate(np.split(of_block, size)):
                split.append((start + j * stride, part))
        blocks = split
    for size, stride in beyond:
        blocks = [(start + j * stride, part) for start, part in blocks for j in range(size)]
    step = rows[-1][1]
    for start, of_block in blocks:
        block = _Block(start, step, of_block, entries)
        yield from _cut(block) if _is_alone(block) else (block,)


def _is_alone(block: _Block) -> bool:
    """Whether these are long rows, too few to fill a tile."""
    is_one_run = len(block.entries) == 1
    few = len(block.labels) < TILES[LONG][0]
    return is_one_run and few and block.entries[0][0] > PART_OF_A_ROW


def _cut(block: _Block) -> Iterator[_Block]:
    """Each row as many rows of the same vector, and what is left of it."""
    length, stride = block.entries[0]
    count, left = divmod(length, PART_OF_A_ROW)
    for j, label in enumerate(block.labels):
        start = block.start + j * block.step
        labels = np.full(count, label)
        yield _Block(start, PART_OF_A_ROW * stride, labels, [(PART_OF_A_ROW, stride)])
        if left:
            end = start + count * PART_OF_A_ROW * stride
            yield _Block(end, 0, np.full(1, label), [(left, stride)])


def _collapsed(dims: Sequence[Dim]) -> list[Dim]:
    """Dimensions, slowest first, neighbours taken as one where one continues the other."""
    collapsed: list[Dim] = []
    for size, stride in dims:
        if size == 1:
            continue
        if collapsed and collapsed[-1][1] == size * stride:
            collapsed[-1] = (collapsed[-1][0] * size, stride)
        else:
            collapsed.append((size, stride))
    return collapsed
