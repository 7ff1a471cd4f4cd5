"""Rows of inputs against the layers' own outputs, and filters against vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn import NotSupportedError, Partition
from lightning_normdyn.input_span.rows import (
    LAYERS,
    InputRows,
    covariance_bytes,
    filter_labels,
    filters_of,
    row_shape,
    spread_rows,
    weight_shape,
)

LAYER_CASES = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv2d": lambda: nn.Conv2d(
        4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2
    ),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4),
    "same, odd sum": lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(3, 4, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(2, 4, 2, stride=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
    "transposed 2d": lambda: nn.ConvTranspose2d(
        4,
        6,
        (3, 2),
        stride=(2, 3),
        padding=(3, 0),
        output_padding=(1, 2),
        dilation=(2, 1),
        groups=2,
    ),
    "transposed 3d": lambda: nn.ConvTranspose3d(2, 2, 2),
}


def input_for(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(7, 2, 5, dtype=torch.float64)
    return torch.randn(2, layer.in_channels, *[7] * len(layer.kernel_size), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYER_CASES)
def test_filters_times_rows_is_what_the_layer_computes(name):
    layer = LAYER_CASES[name]().double()
    layer.bias = None
    x = input_for(layer)
    rows = InputRows(layer, x)
    index = torch.randperm(rows.count)
    taken, filters = rows.take(index), filters_of(layer, layer.weight)
    y = layer(x)
    expected = (
        y.flatten(0, -2)
        if isinstance(layer, nn.Linear)
        else y.movedim(1, -1).reshape(rows.count, -1)
    )
    torch.testing.assert_close(
        torch.einsum("rgd,gmd->rgm", taken, filters).flatten(1),
        expected[index],
        rtol=1e-12,
        atol=1e-13,
    )
    assert weight_shape(layer) == tuple(layer.weight.shape)
    assert taken.shape[1:] == row_shape(layer)
    assert covariance_bytes(layer) == 8 * row_shape(layer)[0] * row_shape(layer)[1] ** 2
    assert isinstance(layer, LAYERS)


def test_an_image_without_a_batch_dimension_is_a_batch_of_one():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5)
    one, batch = InputRows(layer, x), InputRows(layer, x[None])
    assert torch.equal(one.take(torch.arange(9)), batch.take(torch.arange(9)))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (None, "a NoneType"),
        (torch.zeros(2, 5, dtype=torch.long), "int64"),
        (torch.zeros(2, 5).to_sparse(), "not a dense tensor"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(x, says):
    with pytest.raises(NotSupportedError, match=says):
        InputRows(nn.Linear(5, 3), x)


def test_labels_of_filters():
    conv, transposed = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert filter_labels(conv, Partition.filters((6, 2, 3, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert filter_labels(conv, Partition.layer((6, 2, 3, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert filter_labels(
        transposed, Partition.filters((4, 3, 3, 3), transposed_groups=2)
    ).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(NotSupportedError, match="not made of whole filters of Linear"):
        filter_labels(nn.Linear(3, 2), Partition.filters((2, 3), axis=1))


def test_rows_are_spread_evenly_and_never_taken_twice():
    quantiles = torch.rand(30, dtype=torch.float64)
    taken = spread_rows(1000, quantiles)
    assert taken.unique().numel() == 30
    assert ((taken.double() / (1000 / 30)).floor() == torch.arange(30)).all()
    assert spread_rows(1000, torch.ones(30, dtype=torch.float64) - 1e-16).max() == 999
    assert spread_rows(7, quantiles).tolist() == list(range(7))
