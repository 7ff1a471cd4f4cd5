"""An accelerator on a machine that has none: tensors on torch's device "meta", which hold no
numbers, each with its numbers beside it on the CPU.

What runs there runs as on a GPU without programs: every branch for a device other than the CPU is
taken, and all numbers are real. Two faults that only a GPU shows are counted: operations on tensors
of two devices, and what makes the host wait for the device.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lightning_normdyn

DEVICE = torch.device("meta")
PACKAGE = f"{Path(lightning_normdyn.__file__).parent}{os.sep}"

# Their results are Python's.
TOLD = {"_local_scalar_dense", "equal", "is_nonzero"}
# Their results have a size that depends on numbers, so a GPU's host waits for them.
SIZED_BY_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}


class Pretended(Accelerator):
    """For the Trainer."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "pretended"


def on_accelerator() -> dict[str, Any]:
    """For the Trainer's arguments."""
    return {
        "accelerator": "auto",
        "strategy": SingleDeviceStrategy(DEVICE, accelerator=Pretended()),
    }


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE.type


class _FromPython(TorchFunctionMode):
    """Numbers of Python's go to the device by way of the CPU: torch's own way passes the dispatcher
    by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and is_there(args[0]):
            kwargs = {"device": DEVICE, "dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (Tensor.__getitem__, Tensor.__setitem__) and is_there(args[0]):
            args = args[0], _with_tensors(args[1]), *args[2:]
        device = kwargs.get("device")
        makes = func in (torch.tensor, torch.as_tensor) and device is not None
        if not makes or torch.device(device) != DEVICE:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)


def _with_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index, device="cpu").to(DEVICE) if isinstance(index, list) else index


class Device(TorchDispatchMode):
    """Keeps the numbers of all tensors of the device while it is entered.

    Attributes:
        waits: how often the host waited, by the place in the package that made it; places outside
            of it are left out.
        sent: how often numbers were sent to the device from the host's memory, likewise.
        mixed: operations on tensors of both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        # By storage, which views of a tensor have in common with it. Weak references keep an
        # address from being used again.
        self._numbers: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._from_python = _FromPython()

    def __enter__(self) -> Device:
        self._from_python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._from_python.__exit__(*error)

    def forget(self) -> None:
        """Count from here."""
        for counter in (self.waits, self.sent, self.mixed):
            counter.clear()

    def numbers(self, tensor: Tensor) -> Tensor:
        """What a tensor of the device holds: a view of memory on the CPU."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._numbers:
            memory = torch.UntypedStorage(storage.nbytes(), device="cpu")
            self._numbers[reference.cdata] = reference, memory
        _, memory = self._numbers[reference.cdata]
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = tree_leaves((args, kwargs))
        there = any(map(is_there, given)) or (
            kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        )
        if not there:
            return func(*args, **kwargs)
        self._drop_the_gone()
        self._note(name, args, kwargs, given)

        def on_host(value: Any) -> Any:
            if is_there(value):
                return self.numbers(value)
            return torch.device("cpu") if value == DEVICE else value

        real = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if self._waits_for_numbers(name, given):
            return tree_map(self._moved_there, real)
        if name == "_to_copy" and not self._goes_there(args, kwargs):
            return real.clone()
        if name == "copy_" and not all(map(is_there, args[:2])):
            return args[0]
        found = func(*args, **kwargs)
        for mine, theirs in zip(tree_leaves(found), tree_leaves(real), strict=True):
            if is_there(mine) and isinstance(theirs, Tensor) and mine.numel():
                numbers = self.numbers(mine)
                # A view, or what was changed in place, has them already.
                if numbers.data_ptr() != theirs.data_ptr():
                    numbers.copy_(theirs)
        return found

    def _moved_there(self, value: Any) -> Any:
        """A tensor on the device with the numbers of one of the CPU; what is none as it is."""
        if not isinstance(value, Tensor):
            return value
        moved = torch.empty_like(value, device=DEVICE)
        self.numbers(moved).copy_(value)
        return moved

    def _drop_the_gone(self) -> None:
        if len(self._numbers) > 5000:
            self._numbers = {k: v for k, v in self._numbers.items() if not v[0].expired()}

    @staticmethod
    def _waits_for_numbers(name: str, given: list[Any]) -> bool:
        """Whether the host must know numbers of the device to know the result, or its size."""
        if name == "index":
            # How many entries a mask chooses is a number of the device.
            return any(is_there(x) and x.dtype == torch.bool for x in given[1:])
        return name in TOLD or name in SIZED_BY_NUMBERS

    @staticmethod
    def _goes_there(args: Any, kwargs: Any) -> bool:
        device = kwargs.get("device")
        return is_there(args[0]) if device is None else torch.device(device) == DEVICE

    def _note(self, name: str, args: Any, kwargs: Any, given: list[Any]) -> None:
        counter = None
        if self._waits_for_numbers(name, given):
            counter = self.waits
        elif name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            goes = self._goes_there(args, kwargs) if name == "_to_copy" else is_there(args[0])
            if is_there(source) and not goes:
                counter = self.waits
            elif goes and not is_there(source):
                counter = self.sent
        elif any(isinstance(x, Tensor) and not is_there(x) and x.dim() for x in given):
            counter = self.mixed
        place = None if counter is None else _place()
        if counter is not None and place is not None:
            counter[f"{name} in {place}"] += 1


def _place() -> str | None:
    """Which function of the package has called."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return f"{path.removeprefix(PACKAGE)} {frame.f_code.co_name}"
        frame = frame.f_back
    return None
