"""Pictures of a run, drawn from its history.

A short path to `lightning_normdyn.monitor.plots`; nothing inside the package imports it.
"""

from lightning_normdyn.monitor.plots import (
    draw_metric,
    plot_angular_update,
    plot_compare,
    plot_effective_lr,
    plot_heatmap,
    plot_input_span,
    plot_norm_ridge,
    plot_overview,
    plot_weight_histogram,
    plot_weight_shape,
    shared_limits,
)

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
