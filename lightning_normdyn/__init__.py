"""See and steer the effective learning rate of any PyTorch Lightning model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_normdyn.callbacks import (
        AdaptiveWeightShrink,
        EffectiveLRReplay,
        InputSpanMonitor,
        LRDropRescaling,
        NormDynamicsMonitor,
        NormDynWarning,
        RadialProjection,
        WeightRescaling,
    )
    from lightning_normdyn.decay import DecayOwner
    from lightning_normdyn.errors import NormDynError, NoTargetsError, NotSupportedError
    from lightning_normdyn.history import History, load_history
    from lightning_normdyn.steps import Phase, Step, StepBracket
    from lightning_normdyn.vectors import Partition, WeightVectors

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWeightShrink",
    "DecayOwner",
    "EffectiveLRReplay",
    "History",
    "InputSpanMonitor",
    "LRDropRescaling",
    "NoTargetsError",
    "NormDynError",
    "NormDynWarning",
    "NormDynamicsMonitor",
    "NotSupportedError",
    "Partition",
    "Phase",
    "RadialProjection",
    "Step",
    "StepBracket",
    "WeightRescaling",
    "WeightVectors",
    "load_history",
]

_ROOMS = {
    "callbacks": (
        "AdaptiveWeightShrink",
        "EffectiveLRReplay",
        "InputSpanMonitor",
        "LRDropRescaling",
        "NormDynWarning",
        "NormDynamicsMonitor",
        "RadialProjection",
        "WeightRescaling",
    ),
    "decay": ("DecayOwner",),
    "errors": ("NoTargetsError", "NormDynError", "NotSupportedError"),
    "history": ("History", "load_history"),
    "steps": ("Phase", "Step", "StepBracket"),
    "vectors": ("Partition", "WeightVectors"),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the formulas and StepBracket serve people without Lightning, whose import
    # takes seconds and brings pyplot along.
    for room, names in _ROOMS.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{room}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
