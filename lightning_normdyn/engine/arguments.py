"""Checks of the numbers and names that a person gives to a constructor; each message says what was
asked and what was given."""

from collections.abc import Callable, Sequence
from math import inf
from numbers import Integral, Real
from typing import Literal, SupportsFloat, TypeVar

from lightning_normdyn.errors import shown

Choice = TypeVar("Choice", bound=str)

Params = str | Sequence[str]
"""``"auto"``, one glob pattern, or several of them."""

Granularity = Literal["auto", "filter", "group", "layer", "column"]
"""What counts as one vector; ``"auto"`` follows the normalization behind the weight, ``"column"``
means the slices along dimension 1, which no normalization makes scale-invariant."""


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number, numpy's included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_float(value: SupportsFloat) -> float:
    """A number as a float, infinite where it is too large for one (``10**400``)."""
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf  # type: ignore[operator]


def check_number(
    name: str, value: object, bound: Literal["> 0", ">= 0", "> 1"], otherwise: str = ""
) -> float:
    """An argument as a float, if it is a finite number within ``bound``.

    Args:
        name: of the argument.
        value: what was given.
        bound: what it must be.
        otherwise: what else it may be, for the message.

    Raises:
        ValueError: "`alpha` must be > 0, got -1.0."
    """
    least = int(bound[-1])
    if not is_number(value) or not (value > least or (value == least and "=" in bound)):  # type: ignore[operator]
        raise ValueError(f"`{name}` must be {bound}{otherwise}, got {shown(value)}.")
    if as_float(value) == inf:  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be finite, got {shown(value)}.")
    return float(value)  # type: ignore[arg-type]


def check_within(
    name: str, value: object, within: Callable[[float], bool], range_: str, otherwise: str = ""
) -> float:
    """An argument as a float, if it is a number within a range that has two ends.

    Args:
        name: of the argument.
        value: what was given.
        within: whether a number is; False for NaN.
        range_: the range, for the message.
        otherwise: what else it may be, for the message.

    Raises:
        ValueError: "`outward` must be in [0, 1], got 1.5."
    """
    if not is_number(value) or not within(as_float(value)):  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be {range_}{otherwise}, got {shown(value)}.")
    return float(value)  # type: ignore[arg-type]


def check_count(
    name: str,
    value: object,
    least: int,
    otherwise: str = "",
) -> int:
    """An argument as an int, if it is a whole number >= ``least``; numpy's integers are.

    Args:
        name: of the argument.
        value: what was given.
        least: what it must be at least.
        otherwise: what else it may be, for the message.

    Raises:
        ValueError: "`every_n_steps` must be an integer >= 1, got 0."
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be {otherwise}an integer >= {least}, got {shown(value)}.")
    return int(value)


def check_choice(
    name: str,
    value: Choice,
    choices: Sequence[str],
) -> Choice:
    """An argument that must be one of some names.

    Args:
        name: of the argument.
        value: what was given.
        choices: two names or more.

    Raises:
        ValueError: "`gate` must be 'always' or 'cosine', got 'never'."
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` must be {', '.join(others)} or {last}, got {value!r}.")
    return value
