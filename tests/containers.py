"""Walks through nested dicts and lists, such as the state of a callback or the header of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Place = tuple[Any, ...]


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """The way to every part of a value: keys and indices from the outside in."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in items:
        yield (*above, key)
        yield from places(part, (*above, key))


def holder_of(value: Any, place: Place) -> Any:
    """The dict or list that holds the part at ``place`` under its last key."""
    for key in place[:-1]:
        value = value[key]
    return value
