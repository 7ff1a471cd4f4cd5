"""Rows in pieces and on several ranks against one look at all of them."""

from __future__ import annotations

import torch

from lightning_normdyn.input_span.covariance import Covariance


def pieces(rows: torch.Tensor, *sizes: int) -> Covariance:
    stream = Covariance(*rows.shape[1:], rows.device)
    for part in rows.split(sizes):
        stream.add(part)
    return stream


def test_the_stream_equals_one_look_at_all_rows_also_far_from_zero():
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
