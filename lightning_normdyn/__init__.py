"""See and steer the effective learning rate of any PyTorch Lightning model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_normdyn.callbacks.adaptive_weight_shrink import AdaptiveWeightShrink
    from lightning_normdyn.callbacks.effective_lr_replay import EffectiveLRReplay
    from lightning_normdyn.callbacks.input_span_monitor import InputSpanMonitor
    from lightning_normdyn.callbacks.lr_drop_rescaling import LRDropRescaling
    from lightning_normdyn.callbacks.norm_dynamics_monitor import NormDynamicsMonitor
    from lightning_normdyn.callbacks.radial_brake import RadialBrake
    from lightning_normdyn.callbacks.radial_projection import RadialProjection
    from lightning_normdyn.callbacks.rotation_control import RotationControl
    from lightning_normdyn.callbacks.weight_decay import WeightDecay
    from lightning_normdyn.callbacks.weight_rescaling import WeightRescaling
    from lightning_normdyn.engine.callback import NormDynCallback
    from lightning_normdyn.errors import (
        NormDynError,
        NormDynWarning,
        NoTargetsError,
        NotSupportedError,
    )
    from lightning_normdyn.geometry.partition import Partition
    from lightning_normdyn.geometry.vectors import WeightVectors
    from lightning_normdyn.invariance.checks import inspect_module
    from lightning_normdyn.invariance.rules import register_rule
    from lightning_normdyn.monitor.history import History, load_history
    from lightning_normdyn.optimizers.bracket import StepBracket
    from lightning_normdyn.optimizers.decay import DecayOwner
    from lightning_normdyn.optimizers.step import Phase, Step
    from lightning_normdyn.optimizers.views import survey, torch_optimizers

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWeightShrink",
    "DecayOwner",
    "EffectiveLRReplay",
    "History",
    "InputSpanMonitor",
    "LRDropRescaling",
    "NoTargetsError",
    "NormDynCallback",
    "NormDynError",
    "NormDynWarning",
    "NormDynamicsMonitor",
    "NotSupportedError",
    "Partition",
    "Phase",
    "RadialBrake",
    "RadialProjection",
    "RotationControl",
    "Step",
    "StepBracket",
    "WeightDecay",
    "WeightRescaling",
    "WeightVectors",
    "inspect_module",
    "load_history",
    "register_rule",
    "survey",
    "torch_optimizers",
]

# Where each public name lives.
_HOMES = {
    "callbacks.adaptive_weight_shrink": "AdaptiveWeightShrink",
    "callbacks.effective_lr_replay": "EffectiveLRReplay",
    "callbacks.input_span_monitor": "InputSpanMonitor",
    "callbacks.lr_drop_rescaling": "LRDropRescaling",
    "callbacks.norm_dynamics_monitor": "NormDynamicsMonitor",
    "callbacks.radial_brake": "RadialBrake",
    "callbacks.radial_projection": "RadialProjection",
    "callbacks.rotation_control": "RotationControl",
    "callbacks.weight_decay": "WeightDecay",
    "callbacks.weight_rescaling": "WeightRescaling",
    "engine.callback": "NormDynCallback",
    "errors": "NoTargetsError NormDynError NormDynWarning NotSupportedError",
    "geometry.partition": "Partition",
    "geometry.vectors": "WeightVectors",
    "invariance.checks": "inspect_module",
    "invariance.rules": "register_rule",
    "monitor.history": "History load_history",
    "optimizers.bracket": "StepBracket",
    "optimizers.decay": "DecayOwner",
    "optimizers.step": "Phase Step",
    "optimizers.views": "survey torch_optimizers",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the formulas and StepBracket serve people without Lightning, whose import
    # takes seconds and brings pyplot along.
    for home, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    # Not at the top: whoever misspells nothing need not wait for it.
    errors = import_module(f"{__name__}.errors")
    hint = errors.did_you_mean(name, __all__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
