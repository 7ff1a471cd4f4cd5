"""The tables that GPU programs read: every entry once, in the row of its vector, within a tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kinds import labels_of
from layouts import LAYOUTS, TILES, in_memory
from torch import nn

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry import triton_tables as tables_file
from lightning_normdyn.geometry.pieces import Runs
from lightning_normdyn.geometry.triton_tables import (
    ALIGNED,
    COLUMNS,
    LONG,
    SHORT,
    Addresses,
    RowTables,
    Unfit,
    refusal,
)

CPU = torch.device("cpu")


def tables_of(*names: str, dtype: torch.dtype = torch.float32) -> tuple[RowTables, list]:
    weights = [in_memory(LAYOUTS[name][0], dtype) for name in names]
    vectors = WeightVectors(weights, [LAYOUTS[name][1] for name in names])
    return RowTables(vectors._index, weights, CPU), weights


def entries_of(record: np.ndarray) -> np.ndarray:
    """Offsets of the entries of a program, ``(rows, entries of a row)``."""
    _, base, step, rows, run, inner, runs, outer, *_ = map(int, record)
    within = (np.arange(runs) * outer)[:, None] + (np.arange(run) * inner)[None, :]
    return base + (np.arange(rows) * step)[:, None] + within.reshape(1, -1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_entry_is_in_one_program_under_its_vector(name):
    tables, (weight,) = tables_of(name)
    labels = in_memory(weight, torch.int64).copy_(labels_of(weight, LAYOUTS[name][1]))
    # By offset from where the weight begins, as the programs count.
    after = labels.untyped_storage().nbytes() // labels.itemsize - labels.storage_offset()
    by_offset = labels.as_strided((after,), (1,))
    owner = np.full(tables.slots, -1)
    first, order = tables.first.numpy(), tables.order.numpy()
    for vector in range(tables.n):
        owner[order[first[vector] : first[vector + 1]]] = vector
    seen: list[int] = []
    slots: list[int] = []
    (part,) = tables.parts
    for record in part.records.numpy():
        offsets = entries_of(record)
        rows, row, slot, merged = int(record[3]), int(record[8]), int(record[9]), int(record[11])
        assert offsets.size <= tables_file.MOST_ENTRIES or record[10] == SHORT
        slots += [slot] if merged else range(slot, slot + rows)
        for r in range(rows):
            vector = int(tables.vectors[row + r])
            assert set(by_offset[torch.from_numpy(offsets[r])].tolist()) == {vector}
            assert owner[slot if merged else slot + r] == vector
        seen += offsets.flatten().tolist()
    assert len(seen) == len(set(seen)) == weight.numel()
    assert sorted(slots) == list(range(tables.slots))


def test_each_kind_of_tile_has_a_layout():
    kinds = [tables_of(name)[0].parts[0].kinds for name in TILES]
    assert kinds == [1 << kind for kind in (SHORT, LONG, COLUMNS, ALIGNED)]


def test_one_launch_per_dtype():
    weights = [torch.ones(4, 5), torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 2)]
    vectors = WeightVectors(weights, [Partition.filters(tuple(w.shape)) for w in weights])
    tables = RowTables(vectors._index, weights, CPU)
    assert [part.dtype for part in tables.parts] == [torch.float32, torch.float64]
    assert tables.n == 9


def test_a_layer_takes_one_slot_per_program():
    tables, _ = tables_of("layer of 9000")
    assert tables.slots == sum(part.programs for part in tables.parts)


def test_what_is_sent_to_other_ranks_is_written_with_the_sums():
    tables, _ = tables_of("conv", "rows of 8500")
    vectors, places = torch.tensor([1, 4, 0]), torch.tensor([2, 3, 70])
    sent = tables.sent(Runs(vectors, places, 100))
    ours, zeros = sent.places[: tables.slots], sent.places[tables.slots :]
    assert {
        int(tables.order[tables.first[v]]): p for v, p in zip(vectors, places, strict=True)
    } == {int(slot): ours[slot] for slot in (ours >= 0).nonzero()}
    # Every other place gets a zero of a program that reads nothing.
    assert sorted([*places.tolist(), *zeros.tolist()]) == list(range(100))
    first, added = sent.parts[0].records.split([tables.parts[0].programs, 4])
    assert torch.equal(first, tables.parts[0].records)
    assert not added[:, 4].any()
    ends = added[:, 9] + added[:, 3]
    assert added[:, 9].tolist() == [tables.slots, *ends[:-1].tolist()]
    assert int(ends[-1]) == sent.slots == len(sent.places)


def test_what_is_found_in_several_parts_is_added_up_before_it_is_sent():
    tables, _ = tables_of("conv", "rows of 8500")
    assert tables.sent(Runs(torch.tensor([6]), torch.tensor([0]), 1)) is None
    # Two vectors in one place, as well.
    assert tables.sent(Runs(torch.tensor([0, 1]), torch.tensor([0, 0]), 1)) is None


def test_addresses_are_sent_only_if_they_are_new():
    tables, weights = tables_of("conv channels_last")
    addresses = Addresses(tables)
    first, _ = addresses.of([weights])
    assert addresses.of([weights])[0] is first
    assert first.tolist() == [weights[0].data_ptr()]
    both, _ = addresses.of([weights, [None]])
    assert both.tolist() == [weights[0].data_ptr(), 0]
    for _ in range(tables_file.KNOWN_ADDRESSES):
        held = [torch.empty_like(weights[0])]
        addresses.of([held])
    assert len(addresses._sent) <= tables_file.KNOWN_ADDRESSES


def test_what_is_read_is_copied_and_what_is_written_is_refused():
    tables, (weight,) = tables_of("conv channels_last")
    addresses = Addresses(tables)
    for other in (weight.contiguous(), weight.to(torch.bfloat16)):
        table, (copy,) = addresses.of([[other]])
        assert table.tolist() == [copy.data_ptr()]
        assert copy.stride() == weight.stride()
        torch.testing.assert_close(copy, other.to(copy), rtol=0, atol=0)
        with pytest.raises(Unfit, match="laid out"):
            addresses.of([[other]], written=[0])
    with pytest.raises(Unfit):
        addresses.of([[weight[:2]]])


def test_what_the_programs_do_not_take():
    weight = torch.ones(4, 4)
    assert refusal([weight, nn.Parameter(weight)]) is None
    assert "several places" in refusal([weight[:1].expand(4, 4)])
    assert "no program" in refusal([weight.to(torch.float8_e4m3fn)])
    assert "devices" in refusal([weight, weight.to("meta")])
    assert "plain" in refusal([weight.to_sparse()])


def test_rows_too_far_apart_are_refused():
    far = torch.empty_strided((4, 3, 2), (2**31, 2**20, 1), device="meta")
    vectors = WeightVectors([torch.ones(4, 3, 2)], [Partition.filters((4, 3, 2))])
    with pytest.raises(Unfit, match="far apart"):
        RowTables(vectors._index, [far], torch.device("meta"))
