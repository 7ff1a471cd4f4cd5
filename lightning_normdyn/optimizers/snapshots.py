"""Copies of weights as they are right before an update, shared by all who compare with them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshots:
    """The copies of one optimizer's weights, of one step at a time; each weight is copied once.

    Example:
        >>> weight, copies = torch.ones(2), Snapshots()
        >>> copies.request({weight: weight})
        >>> copies.take()
        >>> weight.mul_(3)
        tensor([3., 3.])
        >>> copies.of(weight)
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        self._requests: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._buffers: dict[Tensor, Tensor] = {}

    def request(self, storages: Mapping[Tensor, Tensor]) -> None:
        """Ask for copies that `take` makes.

        Args:
            storages: weight -> this rank's plain storage of it.
        """
        self._requests.update(storages)

    def early(self, storages: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Memory for the copies of ``storages``, for one who writes them himself before `take`."""
        for weight, storage in storages.items():
            if weight not in self._copies:
                self._copies[weight] = self._buffer(weight, storage)
        return [self._copies[weight] for weight in storages]

    def take(self) -> None:
        """Copy what was asked for and is not there yet."""
        requests, self._requests = self._requests, {}
        missing = {
            weight: storage for weight, storage in requests.items() if weight not in self._copies
        }
        # One call for all of them: on a GPU that is a few launches instead of one per weight.
        if missing:
            torch._foreach_copy_(self.early(missing), list(missing.values()))

    def of(self, weight: Tensor) -> Tensor:
        """The copy of the storage of ``weight``."""
        return self._copies[weight]

    def forget(self) -> None:
        """The step is over, or never came."""
        self._copies.clear()

    def _buffer(self, weight: Tensor, storage: Tensor) -> Tensor:
        # A CPU fetches new memory page by page from the system, which takes three times as long as
        # the copy, so it is kept. An accelerator's allocator keeps what is freed, and there others
        # can use it between two steps.
        if storage.device.type != "cpu":
            return torch.empty_like(storage)
        buffer = self._buffers.get(weight)
        if buffer is None or buffer.shape != storage.shape or buffer.dtype != storage.dtype:
            buffer = self._buffers[weight] = torch.empty_like(storage)
        return buffer
