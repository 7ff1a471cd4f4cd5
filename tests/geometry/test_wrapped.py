"""A weight's part of DeepSpeed's flat tensors."""

from __future__ import annotations

import torch
from torch import nn

from lightning_normdyn.geometry import flat
from lightning_normdyn.geometry.flat import FlatSlice, forget, remember
from lightning_normdyn.geometry.placement import gradient_of, has_gradient, is_plain, version_of
from lightning_normdyn.geometry.wrapped import Master


def test_value_and_gradient_are_windows_on_the_flat_tensor():
    master = Master(torch.arange(10.0), 2, 3)
    assert master.gradient() is None
    master.flat.grad = torch.arange(10.0) * 10
    assert master.value().tolist() == [2.0, 3.0, 4.0]
    assert master.gradient().tolist() == [20.0, 30.0, 40.0]
    master.value().zero_()
    assert master.flat[:6].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 5.0]


def test_questions_about_a_weight_are_asked_of_its_master():
    weight, master = nn.Parameter(torch.ones(1, 3)), Master(torch.zeros(10), 2, 3)
    assert is_plain(weight)
    assert not has_gradient(weight)
    remember({weight: FlatSlice((1, 3), (0, 1), 0, 3, 0, None, master)})
    try:
        assert not is_plain(weight)
        assert has_gradient(weight)  # it comes within the step
        assert gradient_of(weight) is None
        before = version_of(weight)
        master.flat.add_(1)
        assert version_of(weight) == before + 1
    finally:
        forget([weight])
    assert is_plain(weight)
    assert weight not in flat._SLICES
