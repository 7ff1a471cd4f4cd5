"""Rows of inputs against the layers' own outputs, and spans against the directions that inputs were
made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn import NotSupportedError, Partition
from lightning_normdyn.input_span import span as input_span
from lightning_normdyn.input_span.span import (
    LAYERS,
    Covariance,
    InputRows,
    InputSpan,
    covariance_bytes,
    filter_labels,
    filters_of,
    row_shape,
    spread_rows,
    vector_shares,
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


# ---- Which filter belongs to which vector ----


def test_labels_of_filters():
    conv, transposed = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert filter_labels(conv, Partition.filters((6, 2, 3, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert filter_labels(conv, Partition.layer((6, 2, 3, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert filter_labels(
        transposed, Partition.filters((4, 3, 3, 3), transposed_groups=2)
    ).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(NotSupportedError, match="not made of whole filters of Linear"):
        filter_labels(nn.Linear(3, 2), Partition.filters((2, 3), axis=1))


def test_shares_of_vectors_leave_out_filters_of_none():
    span = InputSpan(
        torch.tensor([1]), torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, 4.0, 5.0]]), None
    )
    assert vector_shares(span, torch.tensor([[0, 0, -1]])).tolist() == [0.375]


# ---- The stream ----


def pieces(rows: torch.Tensor, *sizes: int) -> Covariance:
    stream = Covariance(*rows.shape[1:], rows.device)
    for part in rows.split(sizes):
        stream.add(part)
    return stream


def test_the_stream_equals_one_look_at_all_rows_also_far_from_zero(monkeypatch):
    monkeypatch.setattr(input_span, "_MOST_ENTRIES", 60)
    rows = torch.randn(50, 2, 6, dtype=torch.float64) + 1e6
    stream = pieces(rows, 1, 20, 0, 29)
    covariance = stream.covariance()
    for g in range(2):
        torch.testing.assert_close(
            covariance[g], torch.cov(rows[:, g].T, correction=0), rtol=1e-8, atol=1e-10
        )
    torch.testing.assert_close(stream.mean, rows.mean(0), rtol=1e-14, atol=0)


def test_ranks_complete_each_other():
    rows = torch.randn(40, 1, 5, dtype=torch.float64) + 100
    shares, whole = (
        [pieces(rows[:10], 10), pieces(rows[10:], 15, 15), pieces(rows[:0], 0)],
        pieces(rows, 40),
    )
    first = sum(
        torch.cat([s.mean.flatten() * s.count, torch.tensor([float(s.count)], dtype=torch.float64)])
        for s in shares
    )
    scatters = []

    def all_reduce(tensor):
        """What a process group would do: the first messages have a known sum, the second ones are
        summed below."""
        if tensor.dim() == 1:
            tensor.copy_(first)
        else:
            scatters.append(tensor.clone())

    for share in shares:
        share.merge(all_reduce)
        torch.testing.assert_close(share.mean, whole.mean, rtol=1e-14, atol=0)
        assert share.count == 40
    torch.testing.assert_close(sum(scatters) / 40, whole.covariance(), rtol=1e-12, atol=1e-12)


# ---- The span ----


def known(
    groups: int = 2, rank: int = 3, entries: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that vary in ``rank`` directions of each group around a mean, and an orthonormal basis
    of those directions."""
    basis = torch.linalg.qr(torch.randn(groups, entries, rank, dtype=torch.float64))[0]
    rows = (
        torch.einsum("rgk,gdk->rgd", torch.randn(200, groups, rank, dtype=torch.float64), basis) + 5
    )
    stream = pieces(rows, 100, 100)
    return stream.covariance(), stream.mean, basis


@pytest.mark.parametrize("randomized", [False, True])
def test_the_share_inside_a_known_span(randomized, monkeypatch):
    if randomized:
        monkeypatch.setattr(input_span, "LARGEST_EXACT", 4)
    covariance, mean, basis = known()
    filters = torch.randn(2, 4, 8, dtype=torch.float64)
    filters[0, 1] = 0
    found = input_span.input_span(filters, covariance, mean, energy=1.0)
    assert found.rank.tolist() == [3, 3]
    expected = torch.einsum("gmd,gdk->gmk", filters, basis).square().sum(-1)
    torch.testing.assert_close(found.seen, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.energy, filters.square().sum(-1))
    assert vector_shares(found, torch.arange(8).view(2, 4)).isnan().tolist() == [
        i == 1 for i in range(8)
    ]
    if randomized:
        assert found.rotated is None  # only the truncated quantities can be known
    else:
        torch.testing.assert_close(
            found.rotated.norm(dim=-1), filters.norm(dim=-1), rtol=1e-12, atol=0
        )
        assert (found.seen < found.energy - 1e-3).any()  # the truncated ones are shorter


def test_the_randomized_method_takes_as_many_directions_as_the_energy_needs(monkeypatch):
    spectrum = 0.97 ** torch.arange(200, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    covariance = ((basis * spectrum) @ basis.T)[None]
    filters, mean = (
        torch.randn(1, 5, 200, dtype=torch.float64),
        torch.zeros(1, 200, dtype=torch.float64),
    )
    exact = input_span.input_span(filters, covariance, mean, energy=0.99)
    monkeypatch.setattr(input_span, "LARGEST_EXACT", 100)
    found = input_span.input_span(filters, covariance, mean, energy=0.99)
    assert exact.rank.tolist() == [145]  # more than the 64 that are tried first
    assert 0 <= int(found.rank) - 145 <= 3
    torch.testing.assert_close(found.seen, exact.seen, rtol=0.03, atol=0)


def test_rounding_does_not_choose_the_basis_where_inputs_do_not_vary():
    rows = torch.randn(30, 1, 40, dtype=torch.float64)  # 11 directions are left over
    rows[:, :, 5:8] = 0
    filters, covariance, mean = (
        torch.randn(1, 6, 40, dtype=torch.float64),
        pieces(rows, 30).covariance(),
        rows.mean(0),
    )
    noise = 1e-15 * torch.randn(1, 40, 40, dtype=torch.float64)
    first, second = (
        input_span.input_span(filters, c, mean, energy=1.0)
        for c in (covariance, covariance + noise + noise.mT)
    )
    torch.testing.assert_close(first.rotated.abs(), second.rotated.abs(), rtol=0, atol=1e-9)
    assert first.rank.tolist() == [29]
    # Entries that are always 0 stay what they are.
    for entry in (5, 6, 7):
        assert (first.rotated[0].abs().T - filters[0, :, entry].abs()).abs().sum(1).min() < 1e-9


def test_constant_inputs_see_nothing():
    covariance, mean, _ = known()
    covariance[0] = 1e-16
    found = input_span.input_span(
        torch.ones(2, 3, 8, dtype=torch.float64), covariance, mean, energy=0.99
    )
    assert found.rank.tolist() == [0, 3]
    assert found.seen[0].tolist() == [0, 0, 0]
    assert found.rotated.shape == (1, 3, 8)
    covariance[1] = 0
    assert input_span.input_span(
        torch.ones(2, 3, 8), covariance, mean, energy=0.99
    ).rotated.shape == (0, 3, 8)


def test_rows_are_spread_evenly_and_never_taken_twice():
    quantiles = torch.rand(30, dtype=torch.float64)
    taken = spread_rows(1000, quantiles)
    assert taken.unique().numel() == 30
    assert ((taken.double() / (1000 / 30)).floor() == torch.arange(30)).all()
    assert spread_rows(1000, torch.ones(30, dtype=torch.float64) - 1e-16).max() == 999
    assert spread_rows(7, quantiles).tolist() == list(range(7))
