"""The numbers that are logged of one layer: its weights beside the span of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_normdyn.functional import generalized_gaussian_shape
from lightning_normdyn.input_span.covariance import Covariance
from lightning_normdyn.input_span.span import input_span, vector_shares

BINS = 61

# Histograms of weights span so many root mean squares to either side.
REACH = 6.0


@dataclass(frozen=True)
class SpanSummary:
    """What was found of one layer.

    Args:
        rows: how many input rows it rests on, of all ranks.
        numbers: share of the energy inside the span, directions in the span, shapes in the
            eigenbasis and as the weights are, then the histograms of both.

    Example:
        >>> SpanSummary(9, [0.75, 2.0, 1.9, 2.1, *[0.0] * 2 * BINS]).values()["input_span_noise"]
        0.25
    """

    rows: int
    numbers: Sequence[float]

    WIDTH: ClassVar[int] = 4 + 2 * BINS

    @property
    def broken(self) -> bool:
        """Whether inputs or weights were not finite."""
        return not isfinite(self.numbers[1])

    def values(self) -> dict[str, float]:
        """By quantity; NaN for what is undefined, such as the shape where inputs are constant."""
        energy, rank, shape_input, shape_parameter = self.numbers[:4]
        return {
            "input_span_energy": energy,
            "input_span_noise": 1 - energy,
            "input_span_rank": rank,
            "ggd_shape_input": shape_input,
            "ggd_shape_parameter": shape_parameter,
        }

    def histograms(self) -> dict[str, Sequence[float]]:
        """Counts of weights by size, for those that have any; none of what is not finite."""
        if self.broken:
            return {}
        counts = {
            "histogram_input": self.numbers[4 : 4 + BINS],
            "histogram_parameter": self.numbers[4 + BINS :],
        }
        return {kind: values for kind, values in counts.items() if sum(values)}


def summary_numbers(
    filters: Tensor,
    stream: Covariance,
    labels: Tensor,
    energy: float,
    method: Literal["moments", "mle"],
) -> Tensor:
    """The ``numbers`` of a `SpanSummary`, all NaN where inputs or weights are not finite.

    Args:
        filters: ``(g, m, d)``.
        stream: of the layer's input rows; its memory is used up.
        labels: ``(g, m)``: which weight vector each filter belongs to.
        energy: share of the inputs' variance that makes the span.
        method: how the shape is fitted, ``"moments"`` or ``"mle"``.

    Returns:
        float64 ``(SpanSummary.WIDTH,)``, on the host.
    """
    covariance = stream.covariance()
    is_finite = torch.isfinite(covariance).all() & torch.isfinite(filters).all()
    if not bool(is_finite):
        return torch.full((SpanSummary.WIDTH,), nan, dtype=torch.float64, device="cpu")
    span = input_span(filters, covariance, stream.mean, energy)
    shares = vector_shares(span, labels)
    # Where only the leading directions are known, there are no coordinates in the whole basis.
    rotated = filters[:0] if span.rotated is None else span.rotated
    # The same for both, since a rotation keeps it: the histograms can be laid over each other.
    root_mean_square = filters.square().mean().sqrt()
    shapes = []
    histograms = []
    for entries in (rotated, filters):
        shapes.append(generalized_gaussian_shape(entries, method=method))
        sizes = torch.nan_to_num(entries / root_mean_square).clamp(-REACH, REACH)
        # On the host: histc is not deterministic on a GPU, which a Trainer may have been told to
        # be.
        counts = torch.histc(sizes.float().cpu(), BINS, -REACH, REACH)
        histograms.append(counts.double())
    # nanmean: a vector of zeros has no share, and must not make the mean of the others NaN.
    share = float(shares.nanmean())
    rank = float(span.rank.double().mean())
    numbers = [share, rank, *map(float, shapes)]
    first = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return torch.cat([first, *histograms])
