"""What a value in a checkpoint may be, told by small checks that are put together like the value
itself: a record of numbers, a table of tensors, a list of texts.

Each check raises one `NormDynError` that names the place, and copies and computes nothing large
before it knows that it may.
"""

from collections.abc import Callable, Mapping
from math import inf, isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_normdyn.errors import NormDynError, shown

MOST = 2**53
"""No run counts as far."""

DEEPEST = 32
"""Levels of lists and dictionaries within each other; ours have eight."""

Check = Callable[[Any, str], None]
"""Raises `NormDynError` where a value is none of its kind; the text says where the value stands."""


# What reading a damaged value may raise. Named one by one: a full memory or Ctrl-C says nothing
# about a checkpoint.
DAMAGE = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RuntimeError,
    RecursionError,
)


def require(sound: bool, otherwise: str) -> None:
    """Refuse what is not ``sound``, with these words."""
    if not sound:
        raise NormDynError(otherwise)


def plain(
    value: Any,
    where: str,
    depth: int = 0,
) -> None:
    """Anything that a state may consist of: numbers, texts, tensors that lie in memory as they are,
    and lists and dictionaries of these."""
    # A list that contains itself would else end in a RecursionError, which nobody catches.
    require(depth <= DEEPEST, f"{where} goes on in itself, or is far too deep")
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return
    if isinstance(value, Tensor):
        # By `.data`: that of a Parameter is a Tensor, and that of a DTensor is still a DTensor.
        # Sparse and meta tensors have no plain bytes that could be hashed.
        kind = type(value.data)
        require(
            kind is Tensor and value.layout == torch.strided and value.device.type != "meta",
            f"{where} is a tensor of a strange kind",
        )
        # Complex numbers have no order, so none of the checks of a range would mean anything.
        require(
            not value.is_quantized and not value.is_complex(),
            f"{where} is a tensor of {value.dtype}",
        )
        # A tensor may claim any size over a few bytes (strides of 0); to copy it would take all the
        # memory there is.
        require(
            value.nbytes <= value.untyped_storage().nbytes(),
            f"{where} claims more numbers than it has",
        )
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            plain(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            require(type(key) in (str, int), f"a key of {where} is a {type(key).__name__}")
            plain(item, f"{where}[{shown(key)}]", depth + 1)
    else:
        raise NormDynError(f"{where} is a {type(value).__name__}")


def whole(least: int = 0, most: int = MOST) -> Check:
    """An integer within a range."""

    def check(value: Any, where: str) -> None:
        # By the exact type: True is an int, and would be a count of 1.
        require(
            type(value) is int and least <= value < most,
            f"{where} is {shown(value)}, where an integer from {least} belongs",
        )

    return check


def number(least: float = -inf, *, finite: bool = True) -> Check:
    """A number from ``least`` on; ``finite`` refuses NaN and infinity."""

    def check(value: Any, where: str) -> None:
        # By the exact type: True is an int, and a numpy float may be of any precision.
        fits = type(value) in (int, float) and (value >= least or (not finite and isnan(value)))
        fits = fits and not (finite and abs(value) == inf)
        # An int may be longer than any float.
        fits = fits and not (type(value) is int and abs(value) >= MOST)
        require(
            fits,
            f"{where} is {shown(value)}, where a {'finite ' if finite else ''}number from "
            f"{least:g} belongs",
        )

    return check


def text(*among: str) -> Check:
    """A text, or one of some."""

    def check(value: Any, where: str) -> None:
        require(
            isinstance(value, str) and (not among or value in among), f"{where} is {shown(value)}"
        )

    return check


def flag(value: Any, where: str) -> None:
    """True or False."""
    require(isinstance(value, bool), f"{where} is {shown(value)}, where True or False belongs")


def optional(check: Check) -> Check:
    """None, or what ``check`` takes."""

    def either(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return either


def many(check: Check) -> Check:
    """A list or tuple of such values."""

    def each(value: Any, where: str) -> None:
        require(
            isinstance(value, (list, tuple)),
            f"{where} is a {type(value).__name__}, where a list belongs",
        )
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return each


def dictionary(value: Any, where: str) -> None:
    """A dictionary of anything."""
    require(
        isinstance(value, dict), f"{where} is a {type(value).__name__}, where a dictionary belongs"
    )


def table(key: Check, value: Check) -> Check:
    """A dictionary whose keys and values are of one kind each."""

    def every(found: Any, where: str) -> None:
        dictionary(found, where)
        for name, item in found.items():
            key(name, f"a key of {where}")
            value(item, f"{where}[{shown(name)}]")

    return every


def record(
    needed: Mapping[str, Check], others: Mapping[str, Check] | None = None, *, closed: bool = False
) -> Check:
    """A dictionary with these keys.

    Args:
        needed: keys that must be there.
        others: keys that may be there.
        closed: whether any further key is refused.
    """

    checks = {**needed, **(others or {})}

    def check(found: Any, where: str) -> None:
        dictionary(found, where)
        missing = [key for key in needed if key not in found]
        require(not missing, f"{where} lacks {missing}")
        # Named where nobody may add anything: a misspelt key would silently be a default.
        foreign = [key for key in found if key not in checks]
        require(not (closed and foreign), f"{where} has {shown(foreign)}, which nobody knows")
        for key, each in checks.items():
            if key in found:
                each(found[key], f"{where}.{key}")

    return check


def vector(value: Any, where: str) -> None:
    """A tensor ``(n,)``."""
    require(isinstance(value, Tensor) and value.ndim == 1, f"{where} is no tensor of one dimension")


def numbers(least: float = -inf) -> Check:
    """A tensor ``(n,)`` of finite numbers from ``least`` on."""

    def check(value: Any, where: str) -> None:
        vector(value, where)
        sound = torch.isfinite(value).all() and (value >= least).all()
        require(bool(sound), f"{where} holds numbers that are not finite or below {least:g}")

    return check
