"""Histograms over the vectors of each weight, binned where the weights are: only counts travel to
the host and between ranks.

Legend: ``n`` vectors, ``w`` weights, ``q`` quantities, ``b`` bins.
"""

from collections.abc import Sequence
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normdyn.geometry.vectors import WeightVectors

BINS = 32
PACKED = BINS + 2
"""Numbers per histogram as `bin_vectors` packs them."""
REACH = 4.0
# Equal values have no deviation, and the bins need a width all the same.
LEAST_REACH = 0.01
MOST = 700.0  # exp overflows beyond 709


class Histogram(NamedTuple):
    """Counts of values between edges that are evenly spaced on a logarithmic scale."""

    edges: list[float]
    """``(b + 1,)``, ascending."""
    counts: list[int]
    """``(b,)``; the two outermost bins also hold what lies beyond the edges."""


def bin_vectors(vectors: WeightVectors, values: Tensor) -> Tensor:
    r"""Bin the values of each weight's vectors on a logarithmic scale, on the device, without
    waiting for it.

    The edges reach 4 standard deviations of log(value) to either side of its mean, and at least 1
    %. Mean and deviation are sums, which ranks can complete together; a smallest and a largest
    value are not. Of up to 17 values none can lie further out; of more, what does is counted in the
    outermost bins. Values that are zero, negative or not finite are left out.

    Args:
        vectors: where each vector belongs.
        values: ``(q, n)``, of the vectors held here.

    Returns:
        ``(q, w, PACKED)``: mean of log(value), reach, and the counts, over all ranks. Two
        collectives, or none where every rank holds all vectors. Every rank must call it.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]])
        >>> from lightning_normdyn.geometry.partition import Partition
        >>> vectors = WeightVectors([weight], [Partition.filters((3, 2))])
        >>> [[histogram]] = unpack(bin_vectors(vectors, vectors.norms()[None]).tolist())
        >>> sum(histogram.counts), histogram.edges[0] < 5.0 < 10.0 < histogram.edges[-1]
        (2, True)
    """
    logs = values.log()
    valid = torch.isfinite(logs)
    logs = torch.where(valid, logs, torch.zeros_like(logs))
    moments = torch.stack([valid.to(logs.dtype), logs, logs.square()])
    number, total, square = vectors.totals(moments)
    number = number.clamp(min=1)
    mean = total / number
    # Rounding may leave a variance a little below 0.
    variance = (square / number - mean.square()).clamp(min=0)
    reach = (REACH * variance.sqrt()).clamp(min=LEAST_REACH)
    position = (logs - vectors.spread(mean)) / vectors.spread(reach)
    bins = ((position + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    # A bin of -1 is counted nowhere.
    counts = vectors.counts(torch.where(valid, bins, -1), BINS)
    packed = [
        mean[..., None],
        reach[..., None],
        counts,
    ]
    return torch.cat(packed, -1)


def unpack(packed: Sequence[Sequence[Sequence[float]]]) -> list[list[Histogram | None]]:
    """From what `bin_vectors` gave, as nested lists, to histograms by quantity and weight; None for
    a weight without values."""
    return [[_unpack_one(numbers) for numbers in quantity] for quantity in packed]


def _unpack_one(numbers: Sequence[float]) -> Histogram | None:
    mean, reach, *counts = numbers
    if not any(counts):
        return None
    edges = []
    for i in range(BINS + 1):
        edge = exp(min(mean + reach * (2 * i / BINS - 1), MOST))
        # Loggers write edges as text: six digits, where sixteen would triple a run's file.
        edges.append(float(f"{edge:.6g}"))
    return Histogram(edges, [round(count) for count in counts])
