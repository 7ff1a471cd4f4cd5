"""The states of courses of single weights, kept together: `lightning_normdyn.theory.course` follows
many vectors at once, and a row keeps the state of each weight by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one course over all the vectors of several, which share all other numbers."""
    joined: dict[str, Any] = {}
    for key, value in states[0].items():
        joined[key] = value
        if isinstance(value, list):
            joined[key] = [state[key][0] for state in states]
    return joined


class OfOne(Mapping[str, Any]):
    """The state of one vector within that of a course over several: no copy of it.

    Args:
        whole: of all of them; not to be changed.
        shared: the numbers in it that all have in common.
        place: of the vector.
    """

    # One object for each weight of every row, where a dict of lists would be eight.
    __slots__ = ("_place", "_whole", "shared")

    def __init__(
        self,
        whole: Mapping[str, Any],
        shared: tuple[Any, ...],
        place: int,
    ) -> None:
        self._whole, self.shared, self._place = whole, shared, place

    def __getitem__(self, key: str) -> Any:
        value = self._whole[key]
        return [value[self._place]] if isinstance(value, list) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def shared_numbers(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """The numbers of a course that are not of single vectors."""
    if isinstance(state, OfOne):
        return state.shared
    return tuple(value for value in state.values() if not isinstance(value, list))


def split(state: Mapping[str, Any], count: int) -> list[OfOne]:
    """The reverse of `joined`: one state per vector."""
    shared = shared_numbers(state)
    return [OfOne(state, shared, place) for place in range(count)]


__all__ = ["joined", "shared_numbers", "split"]
