"""A tensor on its way to the host, which nobody waits for."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host: from a GPU it arrives while the next steps run.

    Args:
        tensor: what to copy, as it is at this point of the device's work.

    Example:
        >>> HostCopy(torch.ones(2)).get()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        # Pinned: a non-blocking copy to the host is asynchronous only if its memory is.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def arrives_later(self) -> bool:
        """Whether `get` might have to wait if it is called at once; the same on every rank."""
        return self._event is not None

    def get(self) -> Tensor:
        """The copy; waits until the device has come to the point where it was asked for."""
        if self._event is not None:
            self._event.synchronize()
        # An accelerator other than CUDA has been copied on its own device only.
        return self._host.cpu()
