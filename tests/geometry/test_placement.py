"""What a parameter is on this rank, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_normdyn import NotSupportedError, Partition, WeightVectors
from lightning_normdyn.geometry.placement import check_weight, place


def test_a_shape_that_does_not_fit_is_named():
    with pytest.raises(NotSupportedError, match="survey"):
        place(torch.ones(5), Partition.filters((7, 12)), "net.weight")


def test_unknown_subclasses_are_refused():
    class Odd(Tensor):
        pass

    weight = nn.Parameter(torch.ones(2, 2).as_subclass(Odd))
    with pytest.raises(NotSupportedError, match=r"`w`.*Odd"):
        check_weight(weight, "w")


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: torch.randn(3, 2, dtype=torch.complex64), "complex"),
        (lambda: torch.randn(3, 2).to_sparse(), "torch.sparse_coo"),
        (lambda: nn.LazyLinear(3).weight, "lazy parameter without a shape"),
        (lambda: torch.ones(3, 2, dtype=torch.int64), "torch.int64"),
    ],
)
def test_what_is_no_dense_real_weight_is_refused_by_name(weight: Any, says):
    with pytest.raises(
        NotSupportedError,
        match=rf"`net\.weight` was asked to be a target, but it is .*{says}.*!net\.weight",
    ):
        WeightVectors([weight()], [Partition.filters((3, 2))], ["net.weight"])
