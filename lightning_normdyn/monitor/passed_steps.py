"""With which hyperparameters an optimizer took the steps since its newest row.

Between two logging steps nothing is measured, but the learning rate, the decay and the momentum may
change at every step. They are noted here, as plain numbers of the host: a constant schedule is one
entry, a cosine one per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from lightning_normdyn.engine.value_checks import (
    many,
    number,
    optional,
    record,
    require,
    table,
    text,
    whole,
)
from lightning_normdyn.optimizers.group_numbers import as_number

MOST_CHANGES = 4096
"""Changes that are kept; beyond them, every second is left out. Who logs that rarely sees no
difference."""

Settings = Mapping[str, Any]
"""The numbers of a param group by key: floats, and tuples of floats. None stands for a number that
lives on an accelerator, where reading it would wait for the device."""


class Stretch(NamedTuple):
    """Consecutive steps with the same hyperparameters.

    Args:
        first: number of the first of these optimizer steps.
        last: number of the last.
        settings: of each param group.
    """

    first: int
    last: int
    settings: Sequence[Settings]


class PassedSteps:
    """Notes the settings of param groups at every step.

    Example:
        >>> passed = PassedSteps()
        >>> group = {"params": [], "lr": 0.1, "betas": (0.9, 0.99)}
        >>> for number, lr in enumerate((0.1, 0.1, 0.05), 1):
        ...     passed.note(number, [{**group, "lr": lr}])
        >>> [(s.first, s.last, s.settings[0]["lr"]) for s in passed.since(1)]
        [(2, 2, 0.1), (3, 3, 0.05)]
    """

    def __init__(self) -> None:
        self._newest = 0
        # From which step on, and with which settings of each group.
        self._changes: list[tuple[int, list[Settings]]] = []
        self._readers: list[_GroupReader] = []
        self._was_loaded = False

    @property
    def oldest(self) -> int:
        """Number of the first step that is known; one more than the newest if there is none."""
        return self._changes[0][0] if self._changes else self._newest + 1

    def note(self, number: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note step ``number``, which is about to happen.

        The same number twice is the same step again: its update was skipped, or it raised.
        """
        if len(self._readers) != len(groups):
            self._readers = [_GroupReader() for _ in groups]
        settings = list(map(_GroupReader.read, self._readers, groups))
        # A step that is taken again may be taken with other numbers, and a loop may be set back.
        while self._changes and self._changes[-1][0] >= number:
            self._changes.pop()
        # A step that nobody saw leaves a gap, and what lies before it leads nowhere.
        if number > self._newest + 1:
            self._changes.clear()
        # What comes from a checkpoint may be about the groups of another optimizer.
        if self._was_loaded and not all(_alike(known, settings) for _, known in self._changes):
            self._changes.clear()
        self._was_loaded = False
        self._newest = number
        # Told fast: a reader gives the same object while nothing changes.
        if self._changes and self._changes[-1][1] == settings:
            return
        self._changes.append((number, settings))
        if len(self._changes) > MOST_CHANGES:
            del self._changes[1:-1:2]

    def copy(self) -> PassedSteps:
        """What is known now; it does not go on."""
        copied = PassedSteps()
        copied._newest = self._newest
        copied._changes = list(self._changes)
        return copied

    def since(self, number: int) -> list[Stretch]:
        """The steps after step ``number``, up to the newest; empty if they are not all known."""
        stretches: list[Stretch] = []
        if self.oldest > number + 1:
            return stretches
        ends = [first - 1 for first, _ in self._changes[1:]] + [self._newest]
        for (first, settings), last in zip(self._changes, ends, strict=True):
            if last > number:
                stretches.append(Stretch(max(first, number + 1), last, settings))
        return stretches

    def forget(self, number: int) -> None:
        """Nobody will ask for the steps up to ``number`` any more."""
        # The newest of them may still be in force, so that change stays.
        while len(self._changes) > 1 and self._changes[1][0] <= number + 1:
            self._changes.pop(0)

    # -- in checkpoints

    def state(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        settings = []
        for _, of_groups in self._changes:
            settings.append([_as_lists(of_group) for of_group in of_groups])
        return {
            "newest": self._newest,
            "numbers": [first for first, _ in self._changes],
            "settings": settings,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        changes: list[tuple[int, list[Settings]]] = []
        for first, of_groups in zip(state["numbers"], state["settings"], strict=True):
            changes.append((first, [_as_tuples(of_group) for of_group in of_groups]))
        self._newest = state["newest"]
        self._changes = changes
        self._was_loaded = True


class _GroupReader:
    """Reads the numbers of one param group at every step."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._written: list[Any] = []
        # Types of what was written that can be compared.
        self._compared: set[type] = set()
        self._settings: dict[str, Any] = {}

    def read(self, group: Mapping[str, Any]) -> Settings:
        """The present numbers; the same object as before where nothing has changed."""
        # A schedule changes numbers and adds no keys, so the keys are looked for once.
        if not self._settings:
            # The weights themselves are no setting, whatever they look like: some ranks hold none
            # of a weight's entries, and a weight may be a single number.
            keys = [key for key in group if key != "params"]
            self._keys = [key for key in keys if _setting(group[key]) is not _NO_NUMBER]
        written = list(map(group.get, self._keys))
        # Mostly nothing has changed, which one comparison of the lists tells. Not of tensors: they
        # are changed in place, and to compare them would wait for the device.
        kinds = set(map(type, written))
        if kinds <= self._compared and written == self._written:
            return self._settings
        settings = {}
        for key, value in zip(self._keys, written, strict=True):
            setting = _setting(value)
            settings[key] = None if setting is _NO_NUMBER else setting
        self._written = written
        self._compared = {kind for kind in kinds if not issubclass(kind, Tensor)}
        if settings != self._settings:
            self._settings = settings
        return self._settings


_NO_NUMBER = object()


def _setting(value: Any) -> Any:
    """A number or a tuple of numbers as floats, None for what lives on an accelerator."""
    if isinstance(value, (tuple, list)):
        entries = tuple(_setting(entry) for entry in value)
        # An empty tuple holds no number, and a list of names neither.
        is_numeric = entries and all(isinstance(entry, float) for entry in entries)
        return entries if is_numeric else _NO_NUMBER
    plain = as_number(value)
    if isinstance(plain, Tensor):
        return None
    return _NO_NUMBER if plain is None else plain


def _alike(some: Sequence[Settings], others: Sequence[Settings]) -> bool:
    """Whether groups have the same keys, with values of the same kinds; further groups may have
    joined."""
    pairs = list(zip(some, others, strict=False))
    if any(a.keys() != b.keys() for a, b in pairs):
        return False
    return all(_kind(a[key]) == _kind(b[key]) for a, b in pairs for key in a)


def _kind(setting: Any) -> int:
    """0 for a number, wherever it lives; else how many numbers there are."""
    return len(setting) if isinstance(setting, tuple) else 0


def _as_lists(settings: Settings) -> dict[str, Any]:
    lists: dict[str, Any] = {}
    for key, value in settings.items():
        lists[key] = list(value) if isinstance(value, tuple) else value
    return lists


def _as_tuples(settings: Settings) -> dict[str, Any]:
    tuples: dict[str, Any] = {}
    for key, value in settings.items():
        tuples[key] = tuple(value) if isinstance(value, list) else value
    return tuples


def _one_or_several(value: Any, where: str) -> None:
    # A person may set anything, infinity among it.
    each = number(finite=False)
    several = isinstance(value, (list, tuple))
    (many(each) if several else optional(each))(value, where)


_RECORD = record(
    {
        "newest": whole(),
        "numbers": many(whole()),
        "settings": many(many(table(text(), _one_or_several))),
    },
    closed=True,
)


def STATE(value: Any, where: str) -> None:
    """What `PassedSteps.state` may look like in a checkpoint."""
    _RECORD(value, where)
    numbers = value["numbers"]
    require(len(numbers) == len(value["settings"]), f"{where} has steps without settings")
    rises = all(a < b for a, b in pairwise([*numbers, value["newest"] + 1]))
    require(rises, f"{where} has steps in another order")


__all__ = ["PassedSteps", "Settings", "Stretch"]
