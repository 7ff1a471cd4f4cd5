"""Formulas on sums, worked out by torch; `on_triton` has them as programs."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn import Partition, WeightVectors
from lightning_normdyn.geometry import formulas
from lightning_normdyn.geometry.formulas import fuses_formulas, work_out


@pytest.fixture
def vectors() -> WeightVectors:
    weight = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    return WeightVectors([weight], [Partition.filters((2, 2))])


def test_each_kind_of_sums(vectors):
    before = [torch.tensor([[3.0, 0.0], [6.0, 0.0]])]
    step = [torch.tensor([[0.0, 4.0], [0.0, 8.0]])]
    one = torch.ones(2, dtype=torch.float64)
    for sums, expected in (
        (formulas.squares(vectors), [25, 100]),
        (formulas.squares(vectors, exact=True), [25, 100]),
        (formulas.moments(vectors), [25, 100, 7, 14]),
        (formulas.displacement(vectors, before), [9, 36, 0, 0, 16, 64]),
        (formulas.radial(vectors, before), [9, 36, 0, 0]),
        (formulas.radial_part_of_step(vectors, step, -one), [9, 36, 0, 0, 16, 64]),
    ):
        results = work_out(vectors, lambda *rows: rows, sums)
        assert torch.cat(results).tolist() == pytest.approx(expected, abs=1e-5)


def test_results_go_where_they_are_wanted(vectors):
    seen = torch.zeros(2, dtype=torch.bool)
    formula = lambda ww, limit, seen: (ww / 2, seen | (ww > limit))  # noqa: E731
    halves, _ = work_out(vectors, formula, formulas.squares(vectors), (50.0, seen), (None, seen))
    assert halves.tolist() == [12.5, 50]
    assert seen.tolist() == [False, True]


def test_a_formula_without_sums(vectors):
    (doubled,) = work_out(vectors, lambda x: (2 * x,), None, (torch.ones(2),))
    assert doubled.tolist() == [2, 2]


def test_torch_gains_nothing_by_long_formulas(vectors):
    assert not fuses_formulas(vectors)
