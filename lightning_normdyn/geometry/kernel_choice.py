"""Which kernels run on a set of weights, and why: decided here and nowhere else."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_normdyn.errors import NotSupportedError

from .kernels import Kernels, RowIndex
from .triton_kernels import TritonKernels
from .triton_tables import refusal

SETTING = "NORMDYN_KERNELS"
"""The environment variable that forces one kind of kernels."""
KINDS = ("torch", "triton")
LEAST_CAPABILITY = (8, 0)
"""bfloat16 in hardware; older GPUs were not compiled for."""


@dataclass(frozen=True)
class KernelPath:
    """Which kernels run, and why.

    Args:
        name: ``"torch"`` or ``"triton"``.
        reason: in words.

    Example:
        >>> str(KernelPath("torch", "the weights are on the CPU"))
        'torch (the weights are on the CPU)'
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"

    def now(self) -> "KernelPath":
        """The same, or torch's where a program has turned out not to compile."""
        if self.name == "triton" and TritonKernels.failure is not None:
            return KernelPath("torch", TritonKernels.failure)
        return self


def paths_in_words(paths: Sequence[KernelPath]) -> str:
    """Which kernels run on several sets of weights, and how long it took to compile them.

    Example:
        >>> paths_in_words([KernelPath("torch", "the weights are on the CPU")] * 2)
        'torch (the weights are on the CPU)'
    """
    different = dict.fromkeys(str(path.now()) for path in paths)
    text = "; ".join(different)
    seconds = sum(TritonKernels.seconds.values())
    if seconds:
        text += f", compiled in {seconds:.1f} s"
    return text


def make_kernels(
    index: RowIndex,
    values: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    device: torch.device,
) -> tuple[Kernels, KernelPath]:
    """The kernels for these weights: Triton programs on a GPU that they were made for, torch's own
    everywhere else.

    Args:
        index: as `lightning_normdyn.geometry.kernels.Kernels` takes it.
        values: the same.
        hidden: the same.
        device: the same.

    Raises:
        NotSupportedError: where ``NORMDYN_KERNELS`` asks for what is not there.
    """
    path = choose(values, hidden, device)
    kind = TritonKernels if path.name == "triton" else Kernels
    return kind(index, values, hidden, device), path


def choose(
    values: Sequence[Tensor], hidden: Sequence[Tensor | None], device: torch.device
) -> KernelPath:
    """Which kernels these weights get; see `make_kernels`."""
    setting = os.environ.get(SETTING, "")
    if setting not in ("", *KINDS):
        raise NotSupportedError(
            f"{SETTING} is {setting!r}. Set it to 'torch' or to 'triton', or not at all."
        )
    if setting == "torch":
        return KernelPath("torch", f"{SETTING}=torch")
    missing = _missing(device)
    if setting == "triton" and missing is None and device.type == "cpu":
        missing = _interpreter_missing()
    elif setting == "" and device.type == "cpu":
        missing = "the weights are on the CPU"
    if setting == "triton" and missing is not None:
        raise NotSupportedError(f"{SETTING} is 'triton', but {missing}. Unset it.")
    reason = missing or _unfit(values, hidden)
    if reason is not None:
        return KernelPath("torch", reason)
    if device.type == "cpu":
        return KernelPath("triton", "its interpreter, on the CPU")
    return KernelPath("triton", torch.cuda.get_device_name(device))


@cache
def _missing(device: torch.device) -> str | None:
    """What Triton lacks on this device; None: nothing."""
    if device.type not in ("cpu", "cuda"):
        return f"Triton has no programs for {device.type}"
    if torch.version.hip is not None:
        return "the programs were not compiled for ROCm"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            major, minor = capability
            return f"the GPU has compute capability {major}.{minor}, less than 8.0"
    return None


def _interpreter_missing() -> str | None:
    # Triton reads it once, when it is imported.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        "on the CPU that is Triton's interpreter, which needs TRITON_INTERPRET=1 when Python starts"
    )


def _unfit(values: Sequence[Tensor], hidden: Sequence[Tensor | None]) -> str | None:
    """What of these weights the programs cannot take."""
    if not values:
        return "there are no weights"
    # Sums would need the mask of every entry; few networks have any.
    if any(mask is not None for mask in hidden):
        return "a mask hides entries of a weight from the loss"
    return refusal(values)
