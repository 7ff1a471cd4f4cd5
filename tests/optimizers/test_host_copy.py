"""A copy on the host holds what the tensor was when it was asked for."""

from __future__ import annotations

import pytest
import torch

from lightning_normdyn.optimizers.host_copy import HostCopy


def test_a_copy_does_not_follow_the_tensor():
    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy(tensor)
    tensor.mul_(10)
    assert copy.get().tolist() == [1.0, 2.0]
    assert not copy.arrives_later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_from_a_gpu_arrives_later_and_does_not_follow_the_tensor():
    tensor = torch.ones(1000, device="cuda")
    copy = HostCopy(tensor)
    tensor.mul_(10)
    assert copy.arrives_later
    assert copy.get().device.type == "cpu"
    assert float(copy.get().sum()) == 1000
