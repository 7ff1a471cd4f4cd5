r"""Which part of a layer's weights its inputs can see (WRS paper, input space projection; Figures 4
to 6).

A filter's output is an inner product with an input row: for a linear layer the input vector, for a
convolution an image patch. Directions
in which the rows do not vary get no gradient behind a normalization; whatever a weight has there is
noise that training cannot remove.

Legend: ``r`` rows, ``g`` groups of a convolution (1 for other layers), ``d`` entries of a row,
``m`` filters of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.functional import input_space_basis, spectral_rank
from lightning_normdyn.geometry.partition import Partition

Shape = tuple[int, ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)

LARGEST_EXACT = 5120
"""Up to this many entries of a row the whole eigenbasis is computed; beyond, only the leading
directions, by a randomized method."""
CONSTANT = 1e-12
"""Inputs whose variance is below this share of their mean square count as constant: they differ by
rounding only."""
IDLE = 1e-10
"""Directions with less than this share of the largest variance are noise of float32 inputs."""
_MOST_ENTRIES = 2**22  # of rows that are copied at once: 32 MiB in float64


# ------------------------------------------------------------------------------------- the geometry


def weight_shape(layer: nn.Module) -> Shape:
    """Shape of the weight of a linear layer or a convolution, read off its settings, so also where
    the weight itself is sharded.

    Example:
        >>> weight_shape(nn.Conv2d(4, 6, 3, groups=2)), weight_shape(nn.ConvTranspose1d(4, 6, 5)), weight_shape(nn.Linear(3, 2))
        ((6, 2, 3, 3), (4, 6, 5), (2, 3))
    """
    of: Any = layer
    if isinstance(layer, nn.Linear):
        return (of.out_features, of.in_features)
    first, second = (
        (of.in_channels, of.out_channels)
        if isinstance(layer, TRANSPOSED)
        else (of.out_channels, of.in_channels)
    )
    return (first, second // of.groups, *of.kernel_size)


def row_shape(layer: nn.Module) -> tuple[int, int]:
    """``(g, d)`` of the rows that a filter of ``layer`` sees.

    Example:
        >>> row_shape(nn.Conv2d(4, 6, 3, groups=2)), row_shape(nn.Linear(3, 2))
        ((2, 18), (1, 3))
    """
    of: Any = layer
    if isinstance(layer, nn.Linear):
        return 1, int(of.in_features)
    return int(of.groups), of.in_channels // of.groups * math.prod(of.kernel_size)


def filters_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight, or anything of its shape, filter by filter, with entries in the order of
    :class:`InputRows`.

    Returns:
        ``(g, m, d)``.

    Example:
        >>> filters_of(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
        torch.Size([2, 3, 18])
    """
    groups, entries = row_shape(layer)
    if isinstance(layer, TRANSPOSED):
        # (inputs, outputs of a group, kernel): swap within each group, and turn the kernel round,
        # since it is laid out from the input.
        kernel = tuple(range(2, weight.dim()))
        weight = weight.flip(kernel).reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return weight.reshape(groups, -1, entries)


def share_filters(layers: Sequence[nn.Module]) -> bool:
    """Whether layers that share a weight divide it into the same filters.

    Example:
        >>> layer = nn.Conv2d(4, 4, 3)
        >>> share_filters([layer, nn.Conv2d(4, 4, 3, stride=2)]), share_filters([layer, nn.ConvTranspose2d(4, 4, 3)])
        (True, False)
    """
    return len({(isinstance(layer, TRANSPOSED), row_shape(layer)) for layer in layers}) == 1


def filter_labels(layer: nn.Module, partition: Partition) -> Tensor:
    """The weight vector that each filter belongs to.

    Returns:
        int64 ``(g, m)``, -1 for a filter that belongs to none.

    Raises:
        NotSupportedError: if a filter is cut into several vectors.

    Example:
        >>> layer = nn.Conv2d(1, 4, 3)
        >>> filter_labels(layer, Partition.groups((4, 1, 3, 3), 2)).tolist()
        [[0, 0, 1, 1]]
    """
    shape = weight_shape(layer)
    kept = [size if dim in partition.keep else 1 for dim, size in enumerate(shape)]
    labels = filters_of(layer, partition.labels.reshape(kept).expand(shape))
    if not bool((labels == labels[..., :1]).all()):
        raise NotSupportedError(
            f"its vectors ({partition.granularity}, along dims {partition.keep}) are not made of "
            f"whole filters of {type(layer).__name__}"
        )
    return labels[..., 0]


class InputRows:
    """The rows that the filters of a layer see in one input; none is copied before it is asked for.

    Args:
        layer: a linear layer or a convolution, transposed or not, of any number of dimensions,
            groups, stride, padding, dilation.
        x: its input.

    Attributes:
        count: how many rows there are: all leading dimensions of a linear layer's input, all places
            of a convolution's output.
        at_once: how many to take at once, so that the copies stay small.

    Raises:
        NotSupportedError: for an input that is no dense tensor of floating-point numbers of the
            right width.

    Example:
        >>> rows = InputRows(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
        >>> rows.count, rows.take(torch.tensor([0, 1])).tolist()
        (2, [[[1.0, 2.0]], [[2.0, 3.0]]])
    """

    def __init__(self, layer: nn.Module, x: Any) -> None:
        if (
            not isinstance(x, Tensor)
            or type(x.data) is not Tensor
            or x.layout != torch.strided
            or not x.is_floating_point()
        ):
            kind = f"{type(x).__name__} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise NotSupportedError(
                f"its {type(layer).__name__} is given a {kind}, not a dense tensor of "
                f"floating-point numbers"
            )
        self._shape = row_shape(layer)
        x = x.detach()
        if isinstance(layer, nn.Linear):
            self._windows = x.reshape(-1, self._shape[1])
            self._places: Shape = (len(self._windows),)
        else:
            spatial = len(layer.kernel_size)  # type: ignore[arg-type]
            x = x if x.dim() == spatial + 2 else x[None]
            self._windows = (
                _transposed_windows(layer, x)
                if isinstance(layer, TRANSPOSED)
                else _windows(layer, x)
            )
            self._places = (len(x), *self._windows.shape[2 : 2 + spatial])
        self.count = math.prod(self._places)
        self.at_once = rows_at_once(*self._shape)

    def take(self, index: Tensor) -> Tensor:
        """Some of the rows, ``(r, g, d)``, for their numbers ``(r,)``."""
        first, *rest = torch.unravel_index(index.to(self._windows.device), self._places)
        where: Any = (first, slice(None), *rest)
        found: Tensor = self._windows[where]
        return found.reshape(len(index), *self._shape)


def _windows(layer: Any, x: Tensor) -> Tensor:
    """``(batch, channels, places..., kernel...)``: a view of the padded input."""
    dims = range(len(layer.kernel_size))
    if layer.padding == "same":
        total = [layer.dilation[i] * (layer.kernel_size[i] - 1) for i in dims]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [
            (0, 0) if layer.padding == "valid" else (layer.padding[i], layer.padding[i])
            for i in dims
        ]
    if any(max(side) for side in sides):
        flat = [p for side in reversed(sides) for p in side]  # the last dimension comes first
        x = F.pad(x, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    return _slide(x, layer.kernel_size, layer.stride, layer.dilation)


def _transposed_windows(layer: Any, x: Tensor) -> Tensor:
    """As for a convolution over the input with zeros between its entries, which is what a
    transposed one amounts to."""
    dims = range(len(layer.kernel_size))
    spread = x.new_zeros(*x.shape[:2], *[(x.shape[2 + i] - 1) * layer.stride[i] + 1 for i in dims])
    where: Any = (..., *[slice(None, None, layer.stride[i]) for i in dims])
    spread[where] = x
    border = [layer.dilation[i] * (layer.kernel_size[i] - 1) - layer.padding[i] for i in dims]
    flat = [p for i in reversed(dims) for p in (border[i], border[i] + layer.output_padding[i])]
    return _slide(F.pad(spread, flat), layer.kernel_size, (1,) * len(dims), layer.dilation)


def _slide(x: Tensor, kernel: Shape, stride: Shape, dilation: Shape) -> Tensor:
    for i in range(len(kernel)):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    return x


# --------------------------------------------------------------------------------------- the stream


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def rows_at_once(groups: int, entries: int) -> int:
    """How many rows of ``(g, d)`` entries are copied at once."""
    return max(1, _MOST_ENTRIES // (groups * entries))


def covariance_bytes(layer: nn.Module) -> int:
    """What the covariance of a layer's rows takes in float64.

    Example:
        >>> covariance_bytes(nn.Conv2d(512, 512, 3)) / 2**20
        162.0
    """
    groups, entries = row_shape(layer)
    return 8 * groups * entries**2


class Covariance:
    """Mean and covariance of rows that come in pieces, without the loss of digits that a sum of
    squares has where the mean is large.

    Args:
        groups: ``g``.
        entries: ``d``.
        device: where to add up.

    Example:
        >>> stream = Covariance(1, 2, torch.device("cpu"))
        >>> stream.add(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
        >>> stream.count, stream.mean.tolist(), stream.covariance().tolist()
        (2, [[2.0, 0.0]], [[[1.0, 0.0], [0.0, 0.0]]])
    """

    def __init__(self, groups: int, entries: int, device: torch.device) -> None:
        dtype = sum_dtype(device)
        self.count = 0
        self.mean = torch.zeros(groups, entries, dtype=dtype, device=device)
        self._scatter = torch.zeros(
            groups, entries, entries, dtype=dtype, device=device
        )  # sum of (x - mean)(x - mean)^T

    def add(self, rows: Tensor) -> None:
        """Take ``(r, g, d)`` rows in."""
        for part in rows.split(rows_at_once(*self.mean.shape)) if len(rows) else ():  # type: ignore[no-untyped-call]
            centred = part.to(self.mean.device, self.mean.dtype).transpose(0, 1)  # (g, r, d)
            mean, count = centred.mean(1), len(part)
            centred = centred - mean[:, None]
            self._scatter.baddbmm_(centred.mT, centred)
            self._shift(mean - self.mean, self.count * count / (self.count + count))
            self.count += count
            self.mean += (mean - self.mean) * (count / self.count)

    def merge(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Complete over ranks; ``all_reduce`` sums a tensor over them in place, and every rank must
        call this."""
        mine, count = self.mean.clone(), self.count
        packed = torch.cat([self.mean.flatten() * count, self.mean.new_tensor([float(count)])])
        all_reduce(packed)
        self.count = int(packed[-1])
        if self.count:
            self.mean = (packed[:-1] / packed[-1]).view_as(mine)
            self._shift(mine - self.mean, count)
            all_reduce(self._scatter)

    def covariance(self) -> Tensor:
        """``(g, d, d)``, divided by the number of rows; hands its own memory over."""
        return self._scatter.div_(max(1, self.count))

    def _shift(self, difference: Tensor, weight: float) -> None:
        self._scatter.baddbmm_(difference[:, :, None] * weight, difference[:, None, :])


# ----------------------------------------------------------------------------------------- the span


class InputSpan(NamedTuple):
    """What the inputs of a layer see of its filters."""

    rank: Tensor
    """int64 ``(g,)``: directions that hold the asked share of the inputs' variance; 0 for constant
    inputs."""
    seen: Tensor
    """``(g, m)``: squared length of each filter within those directions (truncated)."""
    energy: Tensor
    """``(g, m)``: squared length of each filter."""
    rotated: Tensor | None
    """``(g', m, d)``: the filters in the whole eigenbasis (norms kept), without groups whose inputs
    are constant; None where only the
    leading directions were computed."""


def input_span(filters: Tensor, covariance: Tensor, mean: Tensor, energy: float) -> InputSpan:
    r"""Decompose filters along the directions in which their inputs vary.

    The leading directions together hold the share ``energy`` of the inputs' variance. Up to
    ``LARGEST_EXACT`` entries they come from
    ``torch.linalg.eigh``: about :math:`10 d^3` operations and memory for three covariances. Beyond,
    ``torch.svd_lowrank`` looks for as
    many as are needed, at about :math:`20 k d^2` operations for :math:`k` of them; it draws random
    numbers.

    Args:
        filters: ``(g, m, d)``.
        covariance: ``(g, d, d)`` of the rows.
        mean: ``(g, d)`` of the rows.
        energy: share of the variance, in (0, 1].

    Example:
        >>> filters = torch.tensor([[[3.0, 4.0]]])
        >>> found = input_span(filters, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2), energy=0.99)
        >>> found.rank.tolist(), (found.seen / found.energy).tolist()
        ([1], [[0.36000001430511475]])
    """
    filters = filters.to(covariance.device, covariance.dtype)
    ranks, seen, rotated, exact = [], [], [], True
    for rows, spread, middle in zip(filters, covariance, mean, strict=True):
        variance = float(spread.trace())
        if variance <= CONSTANT * (variance + float(middle.square().sum())):
            ranks.append(0)
            seen.append(torch.zeros_like(rows[:, 0]))
            continue
        if len(spread) <= LARGEST_EXACT:
            eigenvalues, basis = _eigenbasis(spread)
            rank = spectral_rank(eigenvalues, energy)
            turned = rows @ basis
            rotated.append(turned)
        else:
            exact, basis = False, _leading_directions(spread, energy * variance)
            rank, turned = basis.shape[1], rows @ basis
        ranks.append(rank)
        seen.append(turned[:, :rank].square().sum(1))
    whole = torch.stack(rotated) if exact and rotated else filters[:0] if exact else None
    return InputSpan(
        torch.tensor(ranks, dtype=torch.long, device="cpu"),
        torch.stack(seen),
        filters.square().sum(-1),
        whole,
    )


def _eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """As `input_space_basis`, with one answer also where the inputs do not vary: there any basis
    would do, and rounding would choose it."""
    eigenvalues, basis = (x.to(covariance.dtype) for x in input_space_basis(covariance))
    idle = int((eigenvalues <= IDLE * eigenvalues[0]).sum())
    if idle:
        varied, rest = basis[:, :-idle], basis[:, -idle:]
        # The basis in which the place of an entry within the row is diagonal: for entries that are
        # always 0, those entries themselves.
        place = torch.linspace(0, 1, len(covariance), dtype=rest.dtype, device=rest.device)
        basis = torch.cat(
            [varied, rest @ torch.linalg.eigh(rest.T @ (place[:, None] * rest))[1]], dim=1
        )
    return eigenvalues, basis


def _leading_directions(covariance: Tensor, variance: float) -> Tensor:
    """As many eigenvectors as hold ``variance``, ``(d, k)``."""
    most = len(covariance)
    k = min(most, 64)
    while True:
        vectors, values, _ = torch.svd_lowrank(covariance, q=k, niter=4)
        held = values.cumsum(0)
        # A randomized method finds a little less than is there, so an energy of 1 could ask for
        # more than it can ever find.
        enough = int((held < variance - 1e-12 * float(held[-1])).sum()) + 1
        if enough <= k or k == most:
            return vectors[:, : min(enough, k)]
        k = min(most, 2 * k)


def vector_shares(span: InputSpan, labels: Tensor) -> Tensor:
    """Share of each weight vector that the inputs see; NaN for a vector of zeros.

    Args:
        span: of the layer.
        labels: ``(g, m)``, from :func:`filter_labels`.

    Returns:
        ``(n,)``, in [0, 1].

    Example:
        >>> span = InputSpan(torch.tensor([1]), torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 0.0]]), None)
        >>> vector_shares(span, torch.tensor([[0, 1]])).tolist()
        [0.25, nan]
    """
    labels = labels.flatten().to(span.seen.device)
    belongs = labels >= 0
    n = int(labels.max()) + 1 if len(labels) else 0
    seen, energy = (
        torch.zeros(n, dtype=x.dtype, device=x.device).index_add_(
            0, labels[belongs], x.flatten()[belongs]
        )
        for x in span[1:3]
    )
    return (seen / energy).clamp(max=1)


def spread_rows(count: int, quantiles: Tensor) -> Tensor:
    """Which of ``count`` rows to look at: one at random in each of ``len(quantiles)`` equal
    stretches, or all if there are no more.

    Args:
        count: rows there are.
        quantiles: ``(k,)``, in [0, 1): where in its stretch.

    Returns:
        int64, ascending, without repetition.

    Example:
        >>> spread_rows(10, torch.tensor([0.0, 0.9])).tolist(), spread_rows(2, torch.zeros(5)).tolist()
        ([0, 9], [0, 1])
    """
    k = len(quantiles)
    if count <= k:
        return torch.arange(count, dtype=torch.long, device="cpu")
    return (
        ((torch.arange(k, dtype=torch.long, device="cpu") + quantiles) * (count / k))
        .long()
        .clamp(max=count - 1)
    )
