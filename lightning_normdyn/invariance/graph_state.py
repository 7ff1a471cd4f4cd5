"""What decides the graph of a network and may change: between two batches, or between a checkpoint
and the run that resumes from it.

Which weights are scale-invariant is read from one graph. It stays true while the modules, their
kind and settings, their mode and the set of trained weights are what they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import nn

from .names import clean_name

# What normalizations call the constant beside their statistic.
EPSILONS = ("eps", "variance_epsilon", "epsilon")

# What a person changes in a normalization that is already there. `extra_repr` says more, but takes
# too long for every batch.
_SETTINGS = (
    *EPSILONS,
    "num_groups",
    "normalized_shape",
    "num_features",
    "track_running_stats",
    "affine",
    "elementwise_affine",
)

# Settings of these types are compared by value. A tuple is one of integers: a size.
_PLAIN = frozenset([type(None), bool, int, float, str, tuple])

# Some modules name their device in words, and every rank has another.
_DEVICE = re.compile(r"\b(cuda|xpu|hpu|mps|npu|xla):\d+")


def is_normalization(module: nn.Module) -> bool:
    """Whether a module normalizes, as far as one can tell from outside.

    Example:
        >>> is_normalization(nn.BatchNorm2d(4)), is_normalization(nn.Linear(4, 4))
        (True, False)
    """
    attributes = vars(module)
    return (
        "running_mean" in module._buffers
        or "norm" in type(module).__name__.lower()
        or any(e in attributes for e in EPSILONS)
    )


class Normalizations:
    """The normalizations of a network, to be compared between two batches without a walk through
    all modules.

    Args:
        module: the network.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
        >>> normalizations = Normalizations(net)
        >>> before = normalizations.state()
        >>> net[1].num_groups = 4
        >>> normalizations.state() == before
        False
        >>> net[1] = nn.LayerNorm(4)
        >>> normalizations.state() == before
        False
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, tuple[str, ...]]] = []
        for owner in module.modules():
            for key, child in owner._modules.items():
                if child is not None and is_normalization(child):
                    settings = tuple(s for s in _SETTINGS if s in vars(child))
                    self._places.append((owner, key, settings))
        # What was found last, and of which objects: asked for in every batch, it is the same ones
        # in nearly all of them, and that is told faster.
        self._children = [owner._modules for owner, _, _ in self._places]
        self._keys = [key for _, key, _ in self._places]
        self._modules: list[Any] = []
        self._alike: list[_Alike] | None = None
        self._state: tuple[Any, ...] = ()

    def state(self) -> tuple[Any, ...]:
        """Mode and settings of each; equal as long as nothing changes."""
        modules = list(map(dict.get, self._children, self._keys))
        is_known = self._alike is not None and all(map(is_, modules, self._modules))
        if not is_known or not all(map(_Alike.are_same, self._alike or [])):
            self._state = self._found()
            self._modules = modules
            self._alike = _alike(modules, [settings for *_, settings in self._places])
        return self._state

    def _found(self) -> tuple[Any, ...]:
        state: list[Any] = []
        for owner, key, settings in self._places:
            module = owner._modules.get(key)
            # By identity: a normalization that took the place of an equal one is another one.
            state.append(id(module))
            if module is not None:
                attributes = vars(module)
                state.append(module.training)
                state.extend([_plain(attributes.get(setting)) for setting in settings])
        return tuple(state)


Reader = Callable[[Mapping[str, Any]], tuple[Any, ...]]
"""Reads mode and settings of a normalization from its attributes."""


class _Alike:
    """Normalizations that have the same settings.

    Args:
        names: of the settings.
        attributes: of each module, its own dictionary.
    """

    def __init__(self, names: tuple[str, ...], attributes: Sequence[dict[str, Any]]) -> None:
        # Twice where there is no setting: of one name alone, no tuple would be read.
        self._read: Reader = itemgetter("training", *(names or ["training"]))
        self._attributes = attributes
        self._values = list(map(self._read, attributes))
        kinds = set(map(type, chain.from_iterable(self._values)))
        # A list may change and stay the same object.
        self.can_be_told = not any(issubclass(kind, list) for kind in kinds)
        # What is equal is told faster than what is the same; but to compare tensors would wait for
        # their device.
        self._are_plain = _PLAIN.issuperset(kinds)

    def are_same(self) -> bool:
        """Whether mode and settings of all are what they were."""
        values = map(self._read, self._attributes)
        try:
            if self._are_plain:
                return list(values) == self._values
            known = chain.from_iterable(self._values)
            return all(map(is_, chain.from_iterable(values), known))
        # A setting was taken away, or a tensor of several numbers has taken the place of one.
        except (KeyError, RuntimeError):
            return False


def _alike(modules: Sequence[Any], settings: Sequence[tuple[str, ...]]) -> list[_Alike] | None:
    """These modules by the settings that they have; None where they cannot be told by identity: one
    is gone or is of another kind, or a setting is a list."""
    by_settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for module, names in zip(modules, settings, strict=True):
        if module is None or not all(name in vars(module) for name in names):
            return None
        by_settings.setdefault(names, []).append(vars(module))
    # A Python frame for each kind of normalization, not for each of them.
    alike = [_Alike(names, attributes) for names, attributes in by_settings.items()]
    return alike if all(kind.can_be_told for kind in alike) else None


@dataclass(frozen=True)
class GraphState:
    """A network as verdicts about its weights depend on it.

    Args:
        network: a digest of all modules: name, class, settings, mode, and their parameters' shapes.
        frozen: names of the parameters that are not trained.
        normalizations: of each normalization by name: its class, settings and mode, in words.
    """

    network: str
    frozen: tuple[str, ...]
    normalizations: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> GraphState:
        """Describe a network, whatever a strategy has wrapped around its modules.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            >>> GraphState.of(net).normalizations["1"]
            'BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, bias=True,
            track_running_stats=True), training'
        """
        # A wrapper has the same clean name as what it wraps, which comes after it.
        modules = {clean_name(name): child for name, child in module.named_modules()}
        described = {name: describe(child) for name, child in modules.items() if name}
        is_trained = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            is_trained[clean_name(name)] = parameter.requires_grad
        facts = [*sorted(described.items()), *sorted(is_trained)]
        normalizations = {}
        for name, text in described.items():
            if is_normalization(modules[name]):
                normalizations[name] = text
        return cls(
            network=sha256(repr(facts).encode()).hexdigest(),
            frozen=tuple(sorted(name for name, trained in is_trained.items() if not trained)),
            normalizations=normalizations,
        )

    def state(self) -> dict[str, Any]:
        """As plain strings."""
        return {**vars(self), "frozen": list(self.frozen)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GraphState:
        """The inverse of `state`."""
        return cls(state["network"], tuple(state["frozen"]), dict(state["normalizations"]))


def describe(module: nn.Module) -> str:
    """Class, settings and mode of a module, in words."""
    try:
        settings = _DEVICE.sub(r"\1", module.extra_repr())
    except Exception:
        # A lazy module, or a person's own that cannot describe itself yet.
        settings = "?"
    mode = "training" if module.training else "evaluation"
    return f"{_kind_of(module).__name__}({settings}), {mode}"


def _kind_of(module: nn.Module) -> type:
    """The class that a person chose: FSDP2 gives a module one of its own, derived from that."""
    for kind in type(module).__mro__:
        of_fsdp = kind.__module__.startswith("torch.distributed.fsdp")
        if not of_fsdp and not kind.__name__.startswith("FSDP"):
            return kind
    return type(module)


def _plain(value: Any) -> Any:
    """A setting that can be compared; of anything else only whether it is the same object."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return tuple(value)
    return id(value)
