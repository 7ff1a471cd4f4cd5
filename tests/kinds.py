"""One weight of every kind (convolutions, memory formats, packed projections), and its vectors
entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_normdyn import Partition, WeightVectors


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    ).to(dtype)


def heads_without_v() -> Partition:
    """A packed qkv weight of two heads of two rows: q and k per head, the rows of v belong to no
    vector."""
    return Partition((0,), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1, -1, -1]), "group")


def lstm_rows() -> Tensor:
    return nn.LSTM(5, 4).weight_ih_l0.detach().double()


KINDS: dict[str, tuple[Tensor, Partition]] = {
    "conv": (randn(6, 4, 3, 3), Partition.filters((6, 4, 3, 3))),
    "conv channels_last": (
        randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        Partition.filters((6, 4, 3, 3)),
    ),
    "conv3d channels_last": (
        randn(3, 2, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        Partition.filters((3, 2, 2, 2, 2)),
    ),
    "grouped conv": (
        nn.Conv2d(4, 6, 3, groups=2).weight.detach().double(),
        Partition.filters((6, 2, 3, 3)),
    ),
    "depthwise conv": (randn(6, 1, 3), Partition.filters((6, 1, 3))),
    "transposed conv": (randn(4, 3, 2, 2), Partition.filters((4, 3, 2, 2), transposed_groups=1)),
    "grouped transposed conv": (
        nn.ConvTranspose2d(4, 6, 2, groups=2).weight.detach().double(),
        Partition.filters((4, 3, 2, 2), transposed_groups=2),
    ),
    "grouped transposed conv channels_last": (
        randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        Partition.filters((4, 3, 2, 2), transposed_groups=2),
    ),
    "linear": (randn(5, 7), Partition.filters((5, 7))),
    "linear seen transposed": (randn(7, 5).t(), Partition.filters((5, 7))),
    "columns": (randn(5, 7), Partition.filters((5, 7), axis=1)),
    "embedding": (randn(10, 4), Partition.filters((10, 4))),
    "lstm": (lstm_rows(), Partition.filters((16, 5))),
    "packed qkv": (randn(12, 4), heads_without_v()),
    "groups": (randn(6, 4, 3), Partition.groups((6, 4, 3), 2)),
    "layer": (randn(5, 7), Partition.layer((5, 7))),
    "pixel shuffle": (randn(4, 2, 3), Partition((0,), torch.tensor([0, 1, 0, 1]), "group")),
    "one row": (randn(1, 7), Partition.filters((1, 7))),
    "one entry each": (randn(7, 1), Partition.filters((7, 1))),
}


def labels_of(weight: Tensor, partition: Partition) -> Tensor:
    """For every entry of the weight its vector, or -1."""
    shape = [n if d in partition.keep else 1 for d, n in enumerate(weight.shape)]
    return partition.labels.reshape(shape).expand(weight.shape)


def by_vector(weight: Tensor, partition: Partition, tensor: Tensor) -> list[Tensor]:
    """The entries of ``tensor`` that belong to each vector of ``weight``, in float64."""
    labels = labels_of(weight, partition)
    return [tensor[labels == j].double() for j in range(partition.n)]


def made(
    *kinds: str, dtype: torch.dtype = torch.float64
) -> tuple[WeightVectors, list[nn.Parameter]]:
    # clone() keeps the memory format
    weights = [nn.Parameter(KINDS[k][0].clone().to(dtype)) for k in kinds]
    return WeightVectors(weights, [KINDS[k][1] for k in kinds], list(kinds)), weights


def same_layout(weight: Tensor) -> Tensor:
    return torch.empty_like(weight).copy_(randn(*weight.shape, 1).squeeze(-1) + 0.3)
