"""What decides the graph of a network and may change: between two batches, or between a checkpoint
and the run that resumes from it.

Which weights are scale-invariant is read from one graph. It stays true while the modules, their
kind and settings, their mode and the set
of trained weights are what they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import nn

from lightning_normdyn.invariance.names import clean_name

EPSILONS = ("eps", "variance_epsilon", "epsilon")
"""What normalizations call the constant beside their statistic."""

# What a person changes in a module that is already there. `extra_repr` says more, but takes too
# long for every batch.
_SETTINGS = (
    *EPSILONS,
    "num_groups",
    "normalized_shape",
    "num_features",
    "track_running_stats",
    "affine",
    "elementwise_affine",
)


# Sizes are tuples of integers.
_PLAIN = frozenset([type(None), bool, int, float, str, tuple])

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
        self._places: list[tuple[nn.Module, str, list[str]]] = []
        for owner in module.modules():
            for key, child in owner._modules.items():
                if child is not None and is_normalization(child):
                    self._places.append(
                        (owner, key, [setting for setting in _SETTINGS if setting in vars(child)])
                    )

    def state(self) -> tuple[Any, ...]:
        """Mode and settings of each; equal as long as nothing changes."""
        found = []
        for owner, key, settings in self._places:
            module = owner._modules.get(key)
            # id: a normalization that was put in the place of another is another one.
            found.append(id(module))
            if module is not None:
                attributes = vars(module)
                found.append(module.training)
                found.extend([_plain(attributes.get(setting)) for setting in settings])
        return tuple(found)


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
        parameters = {
            clean_name(name): parameter.requires_grad
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        facts = [*sorted(described.items()), *sorted(parameters)]
        return cls(
            network=sha256(repr(facts).encode()).hexdigest(),
            frozen=tuple(sorted(name for name, trained in parameters.items() if not trained)),
            normalizations={
                name: text for name, text in described.items() if is_normalization(modules[name])
            },
        )

    def state(self) -> dict[str, Any]:
        """As plain strings."""
        return {
            "network": self.network,
            "frozen": list(self.frozen),
            "normalizations": dict(self.normalizations),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GraphState:
        """The inverse of `state`."""
        return cls(state["network"], tuple(state["frozen"]), dict(state["normalizations"]))


def describe(module: nn.Module) -> str:
    """Class, settings and mode of a module, in words."""
    # FSDP2 gives a module a class of its own, derived from the module's.
    kinds = [
        kind
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.distributed.fsdp")
    ]
    kind = next((k for k in kinds if not k.__name__.startswith("FSDP")), type(module))
    try:
        settings = module.extra_repr()
    except Exception:  # a lazy module, or a person's own that cannot describe itself yet
        settings = "?"
    settings = _DEVICE.sub(r"\1", settings)  # some modules name theirs, and every rank has another
    return f"{kind.__name__}({settings}), {'training' if module.training else 'evaluation'}"


def _plain(value: Any) -> Any:
    """A setting that can be compared; of anything else only whether it is the same object."""
    if type(value) in _PLAIN:
        return value
    return tuple(value) if isinstance(value, list) else id(value)


__all__ = ["EPSILONS", "GraphState", "Normalizations", "describe", "is_normalization"]
