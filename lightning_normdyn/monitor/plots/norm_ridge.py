"""How the norms of one weight's vectors spread over a run: a ridge of densities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.plots.axes import (
    EVENT_LINES,
    OTHER_EVENT,
    axes_or_new,
    depth_colours,
    event_label,
)
from lightning_normdyn.monitor.plots.curves import Doubles
from lightning_normdyn.monitor.plots.labels import short_name
from lightning_normdyn.monitor.records import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_norm_ridge(
    history: History, ax: Axes | None = None, name: str | None = None
) -> tuple[Figure, Axes]:
    """How the norms of one weight's vectors are spread, at a dozen steps from the first (top) to
    the last.

    Rescalings and LR drops stand at the right edge, at their step.

    Args:
        history: a history with per-vector arrays (``NormDynamicsMonitor(per_vector=True)``).
        ax: where to draw; a new figure if None.
        name: the parameter, e.g. ``"layer1.0.conv1.weight"``; the one with the most vectors if
            None.

    Raises:
        NormDynError: where the history has no per-vector norms, or none of this parameter.
    """
    recorded = [
        key.removeprefix("weight_norm/")
        for key in history.vector_names()
        if key.startswith("weight_norm/")
    ]
    if not recorded:
        raise NormDynError(
            "a ridge needs per-vector norms, and this history has none; record with "
            "`NormDynamicsMonitor(per_vector=True)`."
        )
    if name is None:
        name = max(recorded, key=lambda each: history.vectors(f"weight_norm/{each}")[1].shape[1])
    steps, norms = history.vectors(f"weight_norm/{name}")
    fig, ax = axes_or_new(ax, height=5.0)
    every = -(-len(steps) // 12)
    chosen = np.append(
        np.arange(0, len(steps) - every, every), len(steps) - 1
    )  # evenly spaced, and the last one always
    finite = norms[chosen][np.isfinite(norms[chosen]) & (norms[chosen] > 0)].astype(np.float64)
    if not finite.size:
        raise NormDynError(
            f"`{name}` has no vector with a finite norm above 0; there is nothing to draw."
        )

    span = max(float(steps[-1] - steps[0]), 1.0)
    height = 1.6 * span / max(len(chosen), 2)
    logarithmic = finite.max() > 20 * finite.min()
    scaled = np.log(finite) if logarithmic else finite
    margin = 0.05 * float(np.ptp(scaled)) or 0.05 * (abs(float(scaled[0])) or 1.0)
    widest = max(_bandwidth(_seen(norms[i], logarithmic)) for i in chosen)
    grid = np.linspace(
        scaled.min() - max(margin, 3 * widest), scaled.max() + max(margin, 3 * widest), 400
    )
    grid = grid if logarithmic else grid[grid >= 0]
    colours = depth_colours(len(chosen))
    for rank, (i, colour) in enumerate(zip(chosen, colours, strict=True)):
        density = _density(_seen(norms[i], logarithmic), grid)
        base = float(steps[i])
        hill = density > 0.003
        x, density = (np.exp(grid) if logarithmic else grid)[hill], density[hill]
        # Steps grow downwards, so a hill stands on its step and reaches up, towards smaller ones.
        ax.fill_between(
            x, base - height * density, base, color=colour, alpha=0.75, linewidth=0, zorder=2 + rank
        )
        ax.plot(x, base - height * density, color="white", linewidth=0.8, zorder=2 + rank)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_ylim(float(steps[-1]) + 0.03 * span, float(steps[0]) - 1.1 * height)
    ax.set_yticks([float(steps[i]) for i in chosen], [str(int(steps[i])) for i in chosen])
    ax.set_xlabel(rf"$\Vert w\Vert$ of {short_name(name)}  (weight units)")
    ax.set_ylabel("step")
    ax.set_title(f"Norms of {norms.shape[1]} vectors", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    _mark_events_at_right(ax, history, name)
    return fig, ax


def _seen(norms: Floats, logarithmic: bool) -> Doubles:
    """The norms that can be drawn, on the axis that they are drawn on."""
    values = norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)
    return np.log(values) if logarithmic else values


def _bandwidth(values: Doubles) -> float:
    return float(values.std()) * values.size**-0.2 if values.size else 0.0


def _density(values: Doubles, grid: Doubles) -> Doubles:
    """A Gaussian kernel density on ``grid``, scaled to a height of 1; never narrower than the
    picture can show."""
    if not values.size:
        return np.zeros_like(grid)
    bandwidth = max(_bandwidth(values), float(grid[-1] - grid[0]) / 120)
    centres, counts = np.unique(
        np.round(values / bandwidth * 8) / 8 * bandwidth, return_counts=True
    )  # a kernel cannot tell closer ones apart
    density = np.exp(-0.5 * ((grid[:, None] - centres[None, :]) / bandwidth) ** 2) @ counts
    return np.asarray(density / density.max() if density.max() > 0 else density)


def _mark_events_at_right(ax: Axes, history: History, name: str) -> None:
    handles: list[Any] = []
    for kind in dict.fromkeys(event.kind for event in history.events):
        steps = sorted(
            {
                event.step
                for event in history.events
                if event.kind == kind and event.name in ("", name)
            }
        )
        colour, _ = EVENT_LINES.get(kind, OTHER_EVENT)
        for step in steps:
            line = ax.axhline(
                step,
                *((0.96, 1.0) if kind != "lr_drop" else (0.0, 1.0)),
                color=colour,
                linewidth=1.2,
                zorder=1,
            )
        if steps:
            line.set_label(event_label(kind))
            handles.append(line)
    if handles:
        # Above the axes: inside, some hill would hide it.
        ax.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=8,
        )
