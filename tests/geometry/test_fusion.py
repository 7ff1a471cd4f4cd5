"""The programs that are written of formulas, as text; `on_triton` runs them."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.geometry.fusion import Way, signature, write_source
from lightning_normdyn.geometry.triton_tables import Unfit

VALUES = torch.ones(3, dtype=torch.float64)
FLAGS = torch.ones(3, dtype=torch.bool)


def lines(formula, *arguments, sums: int = 1, from_slots: bool = False) -> list[str]:
    text = write_source(formula, sums, arguments, Way(from_slots)).text
    return [line.strip() for line in text.splitlines()]


def test_sums_come_from_slots_or_from_vectors():
    formula = lambda ww, w1: (ww + w1,)  # noqa: E731
    assert "s1 = _total(slots + 1 * S.to(tl.int64), order, low, high, V, B)" in lines(
        formula, sums=2, from_slots=True
    )
    assert "s1 = tl.load(slots + 1 * S.to(tl.int64) + v, mask=there, other=0.0)" in lines(
        formula, sums=2
    )


def test_numbers_have_all_their_digits():
    """By itself a number in a program would be a float32."""
    written = lines(lambda ww: (ww * 0.1,))
    assert "v0 = (s0 * tl.full([V], 0.1, tl.float64)).to(tl.float64)" in written


def test_flags_and_numbers_for_all_are_read_as_blocks():
    skipped = torch.zeros(())
    written = lines(lambda ww, flags, skip: (ww * flags * (skip > 0),), FLAGS, skipped)
    assert "a1 = tl.load(i0 + v, mask=there, other=0) != 0" in written
    assert "a2 = tl.load(i1 + v * 0, mask=there, other=0)" in written


def test_what_is_no_tensor_is_part_of_the_program():
    formula = lambda ww, flags, strength: (ww if flags is None else ww * strength,)  # noqa: E731
    assert signature([None, 0.5]) != signature([FLAGS, 0.5]) != signature([FLAGS, 0.25])
    assert not any("0.5" in line for line in lines(formula, None, 0.5))
    assert any("0.5" in line for line in lines(formula, FLAGS, 0.5))


def test_what_is_only_looked_up_is_not_read_vector_by_vector():
    """It may be shorter."""
    places = torch.zeros(3, dtype=torch.int64)
    written = lines(lambda ww, table, where: (ww * table[where],), VALUES, places)
    assert not any(line.startswith("a1 =") for line in written)
    assert "v0 = (tl.load(i0 + a2, mask=there, other=0)).to(tl.float64)" in written


def test_totals_go_through_the_vectors_of_a_weight():
    formula = lambda ww: (ww, ww > 0)  # noqa: E731
    source = write_source(formula, 1, [], Way(from_slots=True, totals=True))
    assert "for begin in range(tl.load(starts + weight), stop, V):" in source.text
    assert "t1 += tl.where(there, v0.to(tl.float64), 0.0)" in source.text
    with pytest.raises(Unfit, match="largest"):
        write_source(lambda ww: (ww.amax(),), 1, [], Way(from_slots=True, totals=True))


def test_the_largest_of_all_vectors_is_one_number_for_each_program():
    source = write_source(lambda ww: (ww, ww.amax()), 1, [], Way(from_slots=False))
    assert source.largest == (False, True)
    assert "tl.store(o1 + tl.program_id(0), tl.max(v0, 0))" in source.text


def test_results_have_their_dtypes():
    formula = lambda ww, flags: (ww > 0, ww.float(), flags | (ww > 1))  # noqa: E731
    source = write_source(formula, 1, [FLAGS], Way(from_slots=False))
    assert source.dtypes == (torch.bool, torch.float32, torch.bool)


@pytest.mark.parametrize(
    ("formula", "what"),
    [
        (lambda ww: (ww.cumsum(0),), "cumsum"),
        (lambda ww: (ww.erfinv(),), "erfinv"),
        (lambda ww: (ww.pow(0.3),), "power 0.3"),
        (lambda ww: ((-2.0) ** ww,), "power of other numbers"),
        (lambda ww: (ww * torch.tensor([1.0, 2.0]),), "constant of its own"),
        (lambda ww: ((ww + 1)[torch.zeros_like(ww, dtype=torch.int64)],), "worked out"),
        (lambda ww: (ww * VALUES[:2],), "traced"),
        (lambda ww: (ww.half(),), "float16"),
    ],
)
def test_what_is_not_known_is_refused(formula, what):
    with pytest.raises(Unfit, match=what):
        write_source(formula, 1, [], Way(from_slots=False))
