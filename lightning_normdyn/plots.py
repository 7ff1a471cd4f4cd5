"""Pictures of a run, drawn from its history.

A short path to the files of `lightning_normdyn.monitor.plots`; nothing inside the package imports
it.
"""

from lightning_normdyn.monitor.plots.compare import plot_compare
from lightning_normdyn.monitor.plots.heatmap import plot_heatmap
from lightning_normdyn.monitor.plots.input_span import (
    plot_input_span,
    plot_weight_histogram,
    plot_weight_shape,
)
from lightning_normdyn.monitor.plots.layers import (
    plot_angular_update,
    plot_effective_lr,
    plot_overview,
    shared_limits,
)
from lightning_normdyn.monitor.plots.vectors import draw_metric, plot_norm_ridge

__all__ = [
    "draw_metric",
    "plot_angular_update",
    "plot_compare",
    "plot_effective_lr",
    "plot_heatmap",
    "plot_input_span",
    "plot_norm_ridge",
    "plot_overview",
    "plot_weight_histogram",
    "plot_weight_shape",
    "shared_limits",
]
