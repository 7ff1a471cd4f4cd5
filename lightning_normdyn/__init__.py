"""See and steer the effective learning rate of any PyTorch Lightning model."""

from lightning_normdyn.callbacks import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.errors import NormDynError, NoTargetsError, NotSupportedError
from lightning_normdyn.history import History, load_history
from lightning_normdyn.steps import DecayOwner, Phase, Step, StepBracket
from lightning_normdyn.vectors import Partition, WeightVectors

__version__ = "0.1.0"

__all__ = [
    "AdaptiveWeightShrink",
    "DecayOwner",
    "History",
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
