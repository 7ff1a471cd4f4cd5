"""Input rows: what a filter of a linear layer or a convolution is multiplied with.

A filter's output is the inner product of its entries with one row: the input vector of a linear
layer, an image patch of a convolution. This file says how weights divide into filters, and cuts
inputs into rows in the same order of entries.

Letters: ``r`` rows, ``g`` groups of a convolution (1 for other layers), ``d`` entries of a row,
``m`` filters of a group.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.partition import Partition

Shape = tuple[int, ...]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# Rows are copied in portions of so many entries: 32 MiB in float64.
_MOST_ENTRIES = 2**22

# ------------------------------------------------------------------------------ weights and filters


def weight_shape(layer: nn.Module) -> Shape:
    """Shape of the weight of a linear layer or a convolution.

    It is read off the layer's settings, so it is the full shape also where the weight is sharded.

    Example:
        >>> weight_shape(nn.Conv2d(4, 6, 3, groups=2)), weight_shape(nn.ConvTranspose1d(4, 6, 5))
        ((6, 2, 3, 3), (4, 6, 5))
        >>> weight_shape(nn.Linear(3, 2))
        (2, 3)
    """
    settings: Any = layer
    if isinstance(layer, nn.Linear):
        return (settings.out_features, settings.in_features)
    groups = settings.groups
    kernel = settings.kernel_size
    if isinstance(layer, TRANSPOSED):
        return (settings.in_channels, settings.out_channels // groups, *kernel)
    return (settings.out_channels, settings.in_channels // groups, *kernel)


def row_shape(layer: nn.Module) -> tuple[int, int]:
    """``(g, d)`` of the rows that a filter of ``layer`` sees.

    Example:
        >>> row_shape(nn.Conv2d(4, 6, 3, groups=2)), row_shape(nn.Linear(3, 2))
        ((2, 18), (1, 3))
    """
    settings: Any = layer
    if isinstance(layer, nn.Linear):
        return 1, int(settings.in_features)
    channels = settings.in_channels // settings.groups
    return int(settings.groups), channels * math.prod(settings.kernel_size)


def covariance_bytes(layer: nn.Module) -> int:
    """What the covariance of a layer's rows takes in float64.

    Example:
        >>> covariance_bytes(nn.Conv2d(512, 512, 3)) / 2**20
        162.0
    """
    groups, entries = row_shape(layer)
    return 8 * groups * entries**2


def filters_of(
    layer: nn.Module,
    weight: Tensor,
) -> Tensor:
    """The weight, or anything of its shape, filter by filter.

    Entries are in the order of `InputRows`.

    Returns:
        ``(g, m, d)``.

    Example:
        >>> filters_of(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3)).shape
        torch.Size([2, 3, 18])
    """
    groups, entries = row_shape(layer)
    if isinstance(layer, TRANSPOSED):
        # The weight is (inputs, outputs of a group, kernel), laid out from the input: swap the two
        # within each group, and turn the kernel round.
        kernel = tuple(range(2, weight.dim()))
        turned = weight.flip(kernel)
        by_group = turned.reshape(groups, -1, *weight.shape[1:])
        weight = by_group.transpose(1, 2)
    return weight.reshape(groups, -1, entries)


def share_filters(layers: Sequence[nn.Module]) -> bool:
    """Whether layers that share a weight divide it into the same filters.

    Example:
        >>> layer = nn.Conv2d(4, 4, 3)
        >>> share_filters([layer, nn.Conv2d(4, 4, 3, stride=2)])
        True
        >>> share_filters([layer, nn.ConvTranspose2d(4, 4, 3)])
        False
    """
    divisions = {(isinstance(layer, TRANSPOSED), row_shape(layer)) for layer in layers}
    return len(divisions) == 1


def filter_labels(
    layer: nn.Module,
    partition: Partition,
) -> Tensor:
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
    of_every_entry = partition.broadcastable(len(shape)).expand(shape)
    labels = filters_of(layer, of_every_entry)
    # What the inputs see is known of whole filters, so no vector may be a part of one.
    if not bool((labels == labels[..., :1]).all()):
        raise NotSupportedError(
            f"its vectors ({partition.granularity}, along dims {partition.keep}) are not made of "
            f"whole filters of {type(layer).__name__}"
        )
    return labels[..., 0]


# ------------------------------------------------------------------------------- inputs and rows


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
        NotSupportedError: for an input that is no dense tensor of floating-point numbers.

    Example:
        >>> rows = InputRows(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
        >>> rows.count, rows.take(torch.tensor([0, 1])).tolist()
        (2, [[[1.0, 2.0]], [[2.0, 3.0]]])
    """

    def __init__(
        self,
        layer: nn.Module,
        x: Any,
    ) -> None:
        if not _is_dense(x):
            kind = type(x).__name__
            if isinstance(x, Tensor):
                kind = f"{kind} of {x.dtype}"
            raise NotSupportedError(
                f"its {type(layer).__name__} is given a {kind}, not a dense tensor of "
                f"floating-point numbers"
            )
        self._shape = row_shape(layer)
        x = x.detach()
        # Views: only rows that are taken are copied.
        if isinstance(layer, nn.Linear):
            self._windows = x.reshape(-1, self._shape[1])
            self._places: Shape = (len(self._windows),)
        else:
            spatial = len(layer.kernel_size)  # type: ignore[arg-type]
            # Convolutions take a single image, too.
            batch = x if x.dim() == spatial + 2 else x[None]
            cut = _transposed_windows if isinstance(layer, TRANSPOSED) else _windows
            self._windows = cut(layer, batch)
            self._places = (len(batch), *self._windows.shape[2 : 2 + spatial])
        self.count = math.prod(self._places)
        self.at_once = max(1, _MOST_ENTRIES // math.prod(self._shape))

    def take(self, index: Tensor) -> Tensor:
        """Some of the rows, ``(r, g, d)``, for their numbers ``(r,)``."""
        index = index.to(self._windows.device)
        # Not torch.unravel_index: it copies the shape to the device, for which the host waits.
        where: list[Any] = []
        for size in reversed(self._places):
            where.append(index % size)
            index = index // size
        first, *rest = reversed(where)
        place: Any = (first, slice(None), *rest)
        rows: Tensor = self._windows[place]
        return rows.reshape(len(rows), *self._shape)


def _is_dense(x: Any) -> bool:
    """Whether ``x`` is an ordinary tensor: no subclass, not sparse, not inside torch.func."""
    return (
        isinstance(x, Tensor)
        and type(x.data) is Tensor
        and x.layout == torch.strided
        and x.is_floating_point()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _windows(
    layer: Any,
    x: Tensor,
) -> Tensor:
    """``(batch, channels, places..., kernel...)``: a view of the padded input."""
    dims = range(len(layer.kernel_size))
    if layer.padding == "same":
        # An odd total has its larger half behind, as torch has it.
        sides = []
        for i in dims:
            total = layer.dilation[i] * (layer.kernel_size[i] - 1)
            front = total // 2
            sides.append((front, total - front))
    elif layer.padding == "valid":
        sides = [(0, 0) for _ in dims]
    else:
        sides = [(layer.padding[i], layer.padding[i]) for i in dims]
    # Padding by nothing would still copy the input.
    if any(max(side) for side in sides):
        last_dimension_first = [amount for side in reversed(sides) for amount in side]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, last_dimension_first, mode=mode)
    return _slide(x, layer.kernel_size, layer.stride, layer.dilation)


def _transposed_windows(
    layer: Any,
    x: Tensor,
) -> Tensor:
    """As for a convolution over the input with zeros between its entries.

    That is what a transposed convolution amounts to.
    """
    dims = range(len(layer.kernel_size))
    sizes = [(x.shape[2 + i] - 1) * layer.stride[i] + 1 for i in dims]
    places: Any = (..., *[slice(None, None, layer.stride[i]) for i in dims])
    with_zeros = x.new_zeros(*x.shape[:2], *sizes)
    with_zeros[places] = x
    last_dimension_first = []
    for i in reversed(dims):
        # The padding of a transposed convolution shortens its output. A border below 0 cuts off.
        border = layer.dilation[i] * (layer.kernel_size[i] - 1) - layer.padding[i]
        last_dimension_first += [border, border + layer.output_padding[i]]
    padded = F.pad(with_zeros, last_dimension_first)
    return _slide(padded, layer.kernel_size, (1,) * len(dims), layer.dilation)


def _slide(
    x: Tensor,
    kernel: Shape,
    stride: Shape,
    dilation: Shape,
) -> Tensor:
    # unfold puts the places of the kernel behind all other dimensions, in their order.
    for i in range(len(kernel)):
        reach = dilation[i] * (kernel[i] - 1) + 1
        windows = x.unfold(2 + i, reach, stride[i])
        x = windows[..., :: dilation[i]]
    return x


def spread_rows(
    count: int,
    quantiles: Tensor,
) -> Tensor:
    """Which of ``count`` rows to look at: one at random in each of ``k`` equal stretches.

    If there are no more than ``k`` rows, all of them.

    Args:
        count: rows there are.
        quantiles: ``(k,)``, in [0, 1): where in its stretch.

    Returns:
        int64, ascending, without repetition, on the device of ``quantiles``.

    Example:
        >>> spread_rows(10, torch.tensor([0.0, 0.9])).tolist()
        [0, 9]
        >>> spread_rows(2, torch.zeros(5)).tolist()
        [0, 1]
    """
    k = len(quantiles)
    stretches = torch.arange(min(k, count), dtype=torch.long, device=quantiles.device)
    if count <= k:
        return stretches
    places = (stretches + quantiles) * (count / k)
    # A quantile next to 1 may round up into the row behind the last.
    return places.long().clamp(max=count - 1)
