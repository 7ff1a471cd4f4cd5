"""The callbacks, one per file; the only package that imports Lightning."""

from lightning_normdyn.callbacks.adaptive_weight_shrink import AdaptiveWeightShrink
from lightning_normdyn.callbacks.effective_lr_replay import EffectiveLRReplay
from lightning_normdyn.callbacks.input_span_monitor import InputSpanMonitor
from lightning_normdyn.callbacks.lr_drop_rescaling import LRDropRescaling
from lightning_normdyn.callbacks.norm_dynamics_monitor import NormDynamicsMonitor
from lightning_normdyn.callbacks.radial_projection import RadialProjection
from lightning_normdyn.callbacks.weight_rescaling import WeightRescaling
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.errors import NormDynWarning

__all__ = [
    "AdaptiveWeightShrink",
    "EffectiveLRReplay",
    "InputSpanMonitor",
    "LRDropRescaling",
    "NormDynCallback",
    "NormDynWarning",
    "NormDynamicsMonitor",
    "RadialProjection",
    "WeightRescaling",
]
