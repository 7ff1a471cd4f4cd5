"""Every pass over a plain ``(n, d)`` weight against the formula that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_normdyn import functional as F
from lightning_normdyn.geometry import passes
from lightning_normdyn.geometry.passes import Pass, Room


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    before, step = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(2))
    return before.to(dtype), (before + step / 30).to(dtype)


def take(how: Pass, *views: Tensor) -> Tensor:
    dtype = how.dtype or passes.own_precision(*views)
    written = torch.full((how.written, len(views[0]), 1), torch.nan, dtype=dtype)
    how.kernel([1], written.unbind(), views)
    return how.finish(written.double()).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_pass_is_its_formula(dtype):
    before, after = pair(dtype)
    near = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    )
    moments = torch.stack(F.moment_sums(after))
    displaced = torch.stack(F.displacement_sums(before, after))
    torch.testing.assert_close(take(passes.SQUARES, after)[0], moments[0], **near)
    torch.testing.assert_close(take(passes.MOMENTS, after), moments, **near)
    torch.testing.assert_close(take(passes.RADIAL, before, after), displaced[:2], **near)
    for exact in (None, torch.float64):
        torch.testing.assert_close(
            take(passes.displacement(exact), before, after), displaced, **near
        )


def test_a_radial_part_told_by_the_step_is_that_told_by_a_copy():
    before, after = pair(torch.float64)
    length = torch.full((6, 1), -0.25, dtype=torch.float64)
    direction = (after - before) / length
    told = take(passes.RADIAL_OF_STEP, direction, after, length)
    torch.testing.assert_close(told[:2], take(passes.RADIAL, before, after))
    torch.testing.assert_close(told[2], direction.square().sum(1))


def test_removing_takes_the_same_sums():
    before, after = pair(torch.float64)
    changed, share = after.clone(), torch.full((6, 1), 0.01, dtype=torch.float64)
    sums = take(passes.removing(passes.RADIAL, operands=2), before, changed, share)
    torch.testing.assert_close(sums, take(passes.RADIAL, before, after))
    torch.testing.assert_close(changed, F.remove_radial(before, after, 0.01))


def test_what_is_removed_is_the_radial_coefficient_and_the_share():
    before, after = pair(torch.float64)
    before[0], after[1, 3] = 0.0, torch.inf
    ww, wd, _ = F.displacement_sums(before, after)
    share = torch.full((6,), 0.01, dtype=torch.float64)
    removed = passes.removed_part(ww.clone(), wd, share)
    expected = F.radial_coefficient(ww, wd) + share
    torch.testing.assert_close(removed[2:], expected[2:])
    assert removed[0] == share[0]  # of a vector of length zero nothing but the share of nothing
    assert not removed[1].isfinite()  # so that it can be counted
    assert passes.applied_part(removed)[1] == 0  # and is left alone
    active = torch.arange(6) != 4
    assert passes.applied_part(removed, active)[4] == 0


def test_products_read_each_operand_once():
    before, after = ([x] for x in pair(torch.float64))
    again = list(before)  # another list of the same tensors
    pairs = [(before, after), (again, again), (after, None)]
    how, operands = passes.products(pairs, None, None)
    assert [id(x[0]) for x in operands] == [id(before[0]), id(after[0])]
    sums = take(how, before[0], after[0])
    expected = [(before[0] * after[0]).sum(1), before[0].square().sum(1), after[0].sum(1)]
    torch.testing.assert_close(sums, torch.stack(expected))


def test_a_copy_is_made_on_the_way():
    before, after = pair(torch.float64)
    destination = torch.empty_like(before)
    how, _ = passes.products([([before], [after])], ([before], [destination]), None)
    sums = take(how, before, after, destination)
    assert torch.equal(destination, before)
    torch.testing.assert_close(sums[0], (before * after).sum(1))


def test_numbers_of_rows_are_written_to_memory_that_is_cut_already():
    room = Room(2, [3, 1], torch.float32, torch.device("cpu"))
    assert room.written.shape == (2, 4)
    assert room.columns == [slice(0, 3), slice(3, 4)]
    norms, sums = room.outs(0, [3, 1])
    assert room.outs(0, [3, 1])[0] is norms
    norms.fill_(1)
    sums.fill_(2)
    room.outs(1, [1])[0].fill_(3)
    assert room.written[0].tolist() == [1, 1, 1, 3]
    assert room.written[1, :3].tolist() == [2, 2, 2]
    assert room.outs(0, [1, 3])[0].shape == (1, 3)
