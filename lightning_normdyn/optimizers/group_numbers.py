"""The numbers of a param group, however they are written.

A schedule over a numpy array leaves a ``numpy.float32`` in ``group["lr"]``, a capturable optimizer
keeps a tensor there, a person writes an ``int`` or a ``Fraction``. Everything that computes with a
number of a group reads it through `as_number`, so that no other place has to know which types there
are.
"""

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor

Group: TypeAlias = Mapping[str, Any]
"""A param group, as in ``optimizer.param_groups``, that is only read."""

HELD = itemgetter("params")
"""The weights of a param group."""


def as_number(value: object) -> Number | None:
    """``value`` as a Python float, or as a tensor if it lives on an accelerator, where looking at
    it would wait for the device.

    Args:
        value: a Python, numpy or ``Fraction`` number, or a tensor or numpy array that holds a
            single number.

    Returns:
        A float; a tensor without dimensions for a number on an accelerator; ``None`` for what is no
        number (a bool is none).

    Example:
        >>> import numpy as np, torch
        >>> as_number(np.float32(0.5)), as_number(torch.tensor([0.5]))
        (0.5, 0.5)
        >>> as_number("0.5"), as_number(True)
        (None, None)
    """
    # First what nearly every option of a group is: the checks of abstract classes below take
    # longer than all else that is asked about a weight.
    if type(value) is float:
        return value
    # Python counts a bool among the integers, but an option is no number.
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, (Real, Decimal)):
        return float(value)
    # A numpy array that holds one number; asked for by what it can do, so that numpy is not
    # imported here.
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):
        return as_number(value.item())
    return None


def _of_tensor(value: Tensor) -> Number | None:
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        return None
    # Reading a number of an accelerator would wait for all its work.
    if value.device.type == "cpu":
        return float(value)
    return value.detach().reshape(())


def group_number(group: Group, key: str, default: float = 0.0) -> Number:
    """``group[key]`` as a number; ``default`` where it is missing, ``None`` or no number.

    Example:
        >>> group_number({"weight_decay": None}, "weight_decay"), group_number({"lr": 1}, "lr")
        (0.0, 1.0)
    """
    number = as_number(group.get(key))
    return default if number is None else number


def with_plain_numbers(group: Group) -> dict[str, Any]:
    """A copy of ``group`` in which each number, and each number of a tuple or list (``betas``), is
    a float or a device tensor.

    What is no single number stays as it is: flags, strings, the list of parameters.

    Example:
        >>> import numpy as np
        >>> group = {"lr": np.float32(0.5), "betas": (np.float64(0.9), 1), "nesterov": False}
        >>> with_plain_numbers(group)
        {'lr': 0.5, 'betas': (0.9, 1.0), 'nesterov': False}
    """
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            plain[key] = value
        elif isinstance(value, (tuple, list)):
            plain[key] = tuple(_number_or_same(entry) for entry in value)
        else:
            plain[key] = _number_or_same(value)
    return plain


def without_params(group: Group) -> dict[str, Any]:
    """A copy of ``group`` without its parameters: its numbers and flags as they are.

    Example:
        >>> without_params({"params": [], "lr": 0.1})
        {'lr': 0.1}
    """
    return {key: value for key, value in group.items() if key != "params"}


def _number_or_same(value: Any) -> Any:
    number = as_number(value)
    return value if number is None else number


def is_zero(x: Number) -> bool:
    """Whether ``x`` is the number 0. A tensor is never looked into: that would wait for the
    device."""
    return not isinstance(x, Tensor) and x == 0


def largest_number(*numbers: Number) -> Number:
    """The largest of them, 0 of none; on the device if one of them lives there.

    Example:
        >>> largest_number(0.1, 0.3), largest_number(0.1, torch.tensor(0.3))
        (0.3, tensor(0.3000))
    """
    on_host = [number for number in numbers if not isinstance(number, Tensor)]
    largest: Number = max(on_host, default=0.0)
    for number in numbers:
        if isinstance(number, Tensor):
            known = torch.as_tensor(largest, dtype=number.dtype, device=number.device)
            largest = torch.maximum(known, number)
    return largest
