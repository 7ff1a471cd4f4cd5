"""README's picture: how far each step turns every layer around a drop of the learning rate, with
and without LRDropRescaling, beside the angle at which optimizer, rate and decay settle.

``python benchmarks/lr_drop_picture.py`` trains twice on scikit-learn's digits, which takes a minute
or two on one core, writes docs/lr_drop.png, and prints what the picture shows.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import History, LRDropRescaling, NormDynamicsMonitor
from lightning_normdyn.monitor.plots.axes import plain_log_ticks

mpl.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).parents[1] / "docs" / "lr_drop.png"
DROP, STEPS, FACTOR = 500, 900, 10
# Wrong labels keep gradients noisy to the end, as they are on a data set that is not learnt by heart.
WRONG_LABELS = 0.2
LAYERS, WIDTH = 6, 64


class Classifier(L.LightningModule):
    """Linear layers, each followed by BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        wrong = torch.rand(len(labels), device=labels.device) < WRONG_LABELS
        labels = torch.where(wrong, torch.randint_like(labels, 10), labels)
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [DROP], 1 / FACTOR)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(*rules: L.Callback) -> History:
    """The history of a run with these rules."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(
        TensorDataset(images, labels), 64, shuffle=True, drop_last=True, generator=generator
    )
    monitor = NormDynamicsMonitor(5, tables=False)
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[*rules, monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)
    return monitor.history


def angles(history: History) -> dict[str, tuple[Any, Any]]:
    """Of each layer in front of a BatchNorm: steps, and how far each step turned it."""
    prefix = "equilibrium_angular_update/"
    recorded = history.keys()
    names = [key.removeprefix(prefix) for key in recorded if key.startswith(prefix)]
    return {name: history.curve(f"angular_update/{name}") for name in names}


def after_drop(history: History) -> list[float]:
    """Of each layer: its angle over what is expected, in the first 100 steps after the drop."""
    ratios = []
    for name, (steps, values) in angles(history).items():
        expected = history.curve(f"equilibrium_angular_update/{name}")[1]
        newest = (steps >= DROP + 5) & (steps < DROP + 100)
        ratios.append(float(np.median(values[newest] / expected[newest])))
    return ratios


def draw(plain: History, rescaled: History, path: Path) -> None:
    """Both runs side by side, on one scale."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=110, sharey=True, layout="constrained")
    runs = {"the learning rate drops": plain, "the same, with LRDropRescaling": rescaled}
    for ax, (title, history) in zip(axes, runs.items(), strict=True):
        curves = angles(history)
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
        for colour, (steps, values) in zip(colours, curves.values(), strict=True):
            ax.plot(steps, values, color=colour, linewidth=1)
        steps, expected = history.curve(f"equilibrium_angular_update/{next(iter(curves))}")
        ax.fill_between(
            steps, 0.8 * expected, 1.25 * expected, color="#E69F00", alpha=0.4, step="post"
        )
        ax.axvline(DROP, color="black", linestyle=":", linewidth=1)
        ax.text(DROP + 12, 0.045, f"learning rate / {FACTOR}", fontsize=9, va="center")
        ratio = np.median(after_drop(history))
        words = f"weights turn at {ratio:.1f} of\nwhat is expected"
        # Above the lines where they lie low, below them where they are where they should be.
        height = 0.0037 if ratio < 0.5 else 0.0022
        ax.text(DROP + 200, height, words, fontsize=10, ha="center", va="center", color="#9C2A00")
        ax.set(title=title, xlabel="step", yscale="log", ylim=(1e-3, 0.08))
        plain_log_ticks(ax.yaxis, *ax.get_ylim())
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("angular update: radians per step")
    axes[0].text(
        40, 0.0037, "lines: one per layer\nband: what is expected", fontsize=10, va="center"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer)
    # A palette: a third of the size, and nobody sees the difference.
    Image.open(buffer).quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    plain, rescaled = train(), train(LRDropRescaling())
    for label, history in {"without": plain, "with LRDropRescaling": rescaled}.items():
        ratios = after_drop(history)
        print(
            f"{label}: in the first 100 steps after the drop, layers turn "
            f"{min(ratios):.2f} to {max(ratios):.2f} times what is expected"
        )
    draw(plain, rescaled, options.out)


if __name__ == "__main__":
    main()
