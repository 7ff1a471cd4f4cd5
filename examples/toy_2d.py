"""Momentum inflates a scale-invariant weight: the 2-D toy of the AdamP slides ("2D Toy example"),
with its seven published norms.

A weight w in the plane is trained on 1 - cos(w, w*), from almost the opposite direction of w*.
Gradients are at right angles to w, so each step makes w longer, momentum makes it much longer, and
a longer weight turns less. Removing the radial part of the step ("ours" in the slides;
RadialProjection in this package) keeps the norm near 1 at every momentum.

    python examples/toy_2d.py --out runs/toy_2d

The slides give neither the start nor the learning rate; the ones below are inferred, and reproduce
all seven norms within 1 %. The published losses of momentum without projection (.0019, .0044,
.0155) belong to no setting that was found and are not compared.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

STEPS = 491
LR = 0.02
ANGLE = math.pi - 0.0019  # between w and w* at the start
GOAL = torch.tensor([0.0, 1.0], dtype=torch.float64)


@dataclass(frozen=True)
class Run:
    """One optimizer of the slides, with the norm they print after 491 iterations."""

    name: str
    momentum: float
    project: bool
    published_norm: float


GRADIENT_DESCENT = Run("gradient descent", 0.0, False, 1.02)
PANELS = {
    0.9: (Run("momentum", 0.9, False, 2.93), Run("momentum, projected", 0.9, True, 1.12)),
    0.95: (Run("momentum", 0.95, False, 5.67), Run("momentum, projected", 0.95, True, 1.14)),
    0.99: (Run("momentum", 0.99, False, 27.85), Run("momentum, projected", 0.99, True, 1.15)),
}


def loss(weight: Tensor) -> Tensor:
    return 1 - weight @ GOAL / weight.norm()


def train(run: Run, steps: int = STEPS) -> Tensor:
    """The weight before each step and after the last, (steps + 1, 2)."""
    weight = torch.nn.Parameter(
        torch.tensor([math.sin(ANGLE), math.cos(ANGLE)], dtype=torch.float64)
    )
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=run.momentum)
    path = [weight.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
        if run.project:
            with torch.no_grad():
                before = path[-1]
                step = weight - before
                weight.copy_(before + step - before * (step @ before) / (before @ before))
        path.append(weight.detach().clone())
    return torch.stack(path)


def table(paths: dict[Run, Tensor]) -> list[str]:
    text = ["                              loss        norm   published norm"]
    for run, path in paths.items():
        name = run.name if run is GRADIENT_DESCENT else f"{run.name} {run.momentum:g}"
        text.append(
            f"{name:25} {loss(path[-1]):9.4f} {path[-1].norm():11.3f} {run.published_norm:16.2f}"
        )
    return text


def draw(paths: dict[Run, Tensor], file: Path) -> None:
    """Above: the paths in the plane. Below: what is left to turn, and the norm.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        3, 3, figsize=(13, 11), layout="constrained", height_ratios=(1.8, 1, 1)
    )
    for column, (momentum, runs) in zip(axes.T, PANELS.items(), strict=True):
        plane, angle, norm = column
        for run, color in zip((GRADIENT_DESCENT, *runs), ("C7", "C3", "C0"), strict=True):
            path = paths[run]
            plane.plot(path[:, 0], path[:, 1], color=color, lw=2)
            plane.plot(path[-1, 0], path[-1, 1], "o", color=color)
            angle.plot(torch.rad2deg(torch.atan2(path[:, 0], path[:, 1])), color=color)
            norm.plot(
                path.norm(dim=1),
                color=color,
                label=f"{run.name}: {path[-1].norm():.2f} (slides {run.published_norm})",
            )
        plane.axline((0, 0), (0, 1), color="black", ls=":", lw=1)
        plane.plot(0, 0, "+", color="black", ms=10)
        plane.margins(0.1)
        plane.set_aspect("equal", adjustable="datalim")
        plane.annotate(
            "w*",
            (0, 1),
            (4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=12,
        )
        plane.set_title(f"momentum {momentum:g}: path of w over {STEPS} steps")
        angle.set_ylabel("angle to w*, degrees")
        norm.set_ylabel("norm of w")
        norm.set_yscale("log")
        norm.set_ylim(0.9, 60)
        norm.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        norm.set_xlabel("step")
        norm.legend(fontsize=8, loc="upper left" if momentum < 0.99 else "center right")
        for axis in column:
            axis.grid(alpha=0.25)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The 2-D toy of the AdamP slides: momentum, and momentum with projected steps."
    )
    parser.add_argument(
        "--preset",
        choices=("paper", "tiny"),
        default="paper",
        help="both take a second: there is only one size",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/toy_2d"), help="folder for the picture"
    )
    arguments = parser.parse_args()
    paths = {
        run: train(run)
        for run in (GRADIENT_DESCENT, *(run for pair in PANELS.values() for run in pair))
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "toy_2d.png"
    print("\n".join(table(paths)))
    try:
        draw(paths, file)
    except ModuleNotFoundError:
        print("matplotlib is not installed (pip install matplotlib): no picture.")
    else:
        print(f"picture: {file}")


if __name__ == "__main__":
    main()
