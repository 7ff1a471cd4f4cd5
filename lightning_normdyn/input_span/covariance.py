"""Mean and covariance of input rows that come in pieces, batch after batch and rank beside rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normdyn.input_span.rows import row_shape


def covariance_bytes(layer: nn.Module) -> int:
    """What the covariance of a layer's rows takes in float64.

    Example:
        >>> covariance_bytes(nn.Conv2d(512, 512, 3)) / 2**20
        162.0
    """
    groups, entries = row_shape(layer)
    return 8 * groups * entries**2


class Covariance:
    """Adds up mean and covariance of rows.

    Sums are of deviations from the mean so far (Chan, Golub and LeVeque 1983): a plain sum of
    squares would lose its digits where the mean is large.

    Args:
        groups: ``g``.
        entries: ``d``.
        device: where to add up.

    Attributes:
        count: rows so far.
        mean: ``(g, d)``.

    Example:
        >>> stream = Covariance(1, 2, torch.device("cpu"))
        >>> stream.add(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
        >>> stream.count, stream.mean.tolist(), stream.covariance().tolist()
        (2, [[2.0, 0.0]], [[[1.0, 0.0], [0.0, 0.0]]])
    """

    def __init__(self, groups: int, entries: int, device: torch.device) -> None:
        # Apple GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.count = 0
        self.mean = torch.zeros(groups, entries, dtype=dtype, device=device)
        # The sum of (x - mean)(x - mean)^T.
        self._scatter = torch.zeros(groups, entries, entries, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Take ``(r, g, d)`` rows in."""
        count = len(rows)
        # The mean of no rows would be NaN, and everything after it.
        if not count:
            return
        by_group = rows.to(self.mean).transpose(0, 1)
        mean = by_group.mean(1)
        total = self.count + count
        change = mean - self.mean
        deviations = by_group - mean[:, None]
        shift = change * sqrt(self.count * count / total)
        # The shift of the mean enters as one more row, so that the scatter, which may have hundreds
        # of MiB, is read and written once.
        self._add_products(torch.cat([deviations, shift[:, None]], dim=1))
        self.mean += change * (count / total)
        self.count = total

    def merge(self, all_reduce: Callable[[Tensor], Any]) -> None:
        """Complete over ranks.

        Args:
            all_reduce: sums a tensor over the ranks in place; every rank must call this.
        """
        own_mean = self.mean.clone()
        own_count = self.count
        # Mean and count in one message; the scatter only where any rank has rows.
        sum_of_rows = own_mean.flatten() * own_count
        own_rows = own_mean.new_tensor([float(own_count)])
        sums = torch.cat([sum_of_rows, own_rows])
        all_reduce(sums)
        self.count = int(sums[-1])
        if self.count:
            self.mean = (sums[:-1] / sums[-1]).view_as(own_mean)
            # Deviations from the common mean instead of this rank's own.
            deviation = own_mean - self.mean
            self._add_products((deviation * sqrt(own_count))[:, None])
            all_reduce(self._scatter)

    @property
    def nbytes(self) -> int:
        """What its state takes in a checkpoint."""
        return self.mean.nbytes + self._scatter.nbytes

    def state(self) -> dict[str, Any]:
        """What was gathered so far, on the host."""
        mean = self.mean.cpu().clone()
        scatter = self._scatter.cpu().clone()
        return {"count": self.count, "mean": mean, "scatter": scatter}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: if it is of rows of another form.
        """
        mean = state["mean"]
        scatter = state["scatter"]
        if mean.shape != self.mean.shape or scatter.shape != self._scatter.shape:
            raise ValueError("the sums in the checkpoint belong to a layer of another form")
        if state["count"] < 0:
            raise ValueError("the sums in the checkpoint are of less than no row")
        self.mean.copy_(mean)
        self._scatter.copy_(scatter)
        self.count = int(state["count"])

    def covariance(self) -> Tensor:
        """``(g, d, d)``, divided by the number of rows; hands its own memory over."""
        # In place: for a second matrix of this size there may be no memory.
        return self._scatter.div_(max(1, self.count))

    def _add_products(self, rows: Tensor) -> None:
        self._scatter.baddbmm_(rows.mT, rows)
