"""The pictures of docs/reading_the_curves.md: one short run for each verdict, in which it is right.

``python docs/draw_verdicts.py`` writes docs/pictures/*.png; it takes a minute or two on one core.
Every run is refused if the verdict in the end table is another one than its picture is for.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import History, NormDynamicsMonitor, WeightRescaling
from lightning_normdyn.monitor.plots.axes import plain_log_ticks

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "pictures"
WIDTH = 64
BATCH = 32
# Of the second layer: the first one sees the data as they are.
WEIGHT = "net.2.weight"
STANDS_STILL = 1e-6
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"

Loss = Callable[[Tensor, Tensor, nn.Module, int], Tensor]


def noise(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """Gradients that forget each other from step to step: what expectations are derived for."""
    return 10 * (outputs * torch.randn_like(outputs)).mean()


def steady(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """The same labels and inputs in every step: gradients that all point the same way."""
    return nn.functional.cross_entropy(outputs, (inputs[:, 0] > 0).long())


def alternating(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """The labels are swapped in every other step: each step undoes the one before."""
    labels = (inputs[:, 0] > 0).long()
    return nn.functional.cross_entropy(outputs, labels if step % 2 else 1 - labels)


def with_penalty(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """The loss itself pulls the weights inwards, much more strongly than the optimizer's decay."""
    penalty = sum(weight.square().sum() for weight in net.parameters() if weight.requires_grad)
    return noise(outputs, inputs, net, step) + 0.04 * penalty


def without_second_layer(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """No gradient reaches the second layer: its outputs count nothing."""
    return 0 * noise(outputs, inputs, net, step)


def diverging(outputs: Tensor, inputs: Tensor, net: nn.Module, step: int) -> Tensor:
    """A loss that is NaN from one step on."""
    return noise(outputs, inputs, net, step) * (float("nan") if step >= 150 else 1.0)


@dataclass
class Run:
    """One run and the verdict that is right for it.

    Args:
        verdict: how the words in the end table must begin.
        contains: what they must say besides.
        normalized: whether BatchNorm follows every weight; without it, no weight is
            scale-invariant.
        make_optimizer: of the parameters.
        loss: of a step.
        steps: of the run.
        drop: step at which the learning rate drops to a tenth.
        scale: factor on the initial weights.
        fixed: whether every step sees the same batch.
        rules: callbacks beside the monitor.
    """

    verdict: str
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    contains: str = ""
    normalized: bool = True
    loss: Loss = noise
    steps: int = 400
    drop: int | None = None
    scale: float = 1.0
    fixed: bool = False
    rules: Callable[[], list[L.Callback]] = list


def sgd(lr: float = 0.1, weight_decay: float = 5e-3) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, weight_decay=weight_decay
    )


def adamw(lr: float = 1e-2, weight_decay: float = 0.5) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


RUNS = {
    "as_expected_settled": Run("as expected now", sgd(), "settled"),
    "as_expected_shrinking": Run(
        "as expected now", sgd(weight_decay=1e-3), "its norm still shrinks", scale=6.0
    ),
    "as_expected_after_a_drop": Run(
        "as expected now", sgd(), "norms are still those of before the drop", drop=300
    ),
    "as_expected_not_acted": Run(
        "as expected now", sgd(weight_decay=5e-5), "decay has not acted yet", steps=300
    ),
    "as_expected_held": Run(
        "as expected now",
        sgd(),
        "held by WeightRescaling",
        rules=lambda: [WeightRescaling(20, target_norm="initial")],
    ),
    "too_fast": Run("turns too fast", sgd(lr=1e-3), loss=steady, fixed=True, steps=150),
    "too_slow": Run(
        "turns too slow", sgd(lr=1e-2, weight_decay=1e-4), loss=alternating, fixed=True, steps=200
    ),
    "balance_settled": Run("settled", adamw(), normalized=False, steps=800),
    "balance_growing": Run(
        "still growing", adamw(weight_decay=0.1), normalized=False, scale=0.1, steps=550
    ),
    "balance_shrinking": Run(
        "still shrinking", adamw(weight_decay=0.3), normalized=False, scale=4.0, steps=250
    ),
    "balance_held_by_loss": Run("held by the loss", adamw(), normalized=False, loss=with_penalty),
    "balance_not_acted": Run("decay has not acted yet", adamw(weight_decay=1e-2), normalized=False),
    "no_gradient": Run("no gradient", adamw(), normalized=False, loss=without_second_layer),
    "frozen": Run("frozen", adamw(lr=0.0), normalized=False),
    "not_finite": Run("not finite since step", sgd(), loss=diverging, steps=200),
    "no_balance": Run("no balance", adamw(weight_decay=0.0), normalized=False),
}


class Net(L.LightningModule):
    """Three linear layers, with BatchNorm or nothing between them; the second one learns."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        torch.manual_seed(0)
        norm = partial(nn.BatchNorm1d, WIDTH, affine=False) if run.normalized else nn.Identity
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            norm(),
            nn.Linear(WIDTH, WIDTH),
            norm(),
            nn.Linear(WIDTH, WIDTH),
        )
        # Only the second layer learns: what the others do would show in its curves.
        self.net.requires_grad_(False)
        self.net[2].weight.requires_grad_(True)
        with torch.no_grad():
            self.net[2].weight.mul_(run.scale)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        return self.run.loss(self.net(inputs), inputs, self.net, self.global_step)

    def configure_optimizers(self) -> Any:
        optimizer = self.run.make_optimizer(self.parameters())
        if self.run.drop is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.run.drop], 0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(run: Run) -> tuple[History, str]:
    """The history of a run, and the verdict on its second weight."""
    generator = torch.Generator().manual_seed(1)
    count = BATCH if run.fixed else BATCH * run.steps
    inputs = torch.randn(count, WIDTH, generator=generator)
    if run.fixed:
        inputs = inputs.repeat(run.steps, 1)
    monitor = NormDynamicsMonitor(2, params=WEIGHT)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*run.rules(), monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(run), DataLoader(TensorDataset(inputs), batch_size=BATCH))
    return monitor.history, monitor.history.meta["targets"][WEIGHT]["verdict"]


def draw(history: History, words: str, path: Path) -> None:
    """Angle and norm, each beside what is expected of it."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.3), dpi=80, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(words, 88)), fontsize=8)
    panels = {
        "angle per step (rad)": {
            "angular_update": ("measured", BLUE, "-"),
            "expected_angular_update": ("expected now", ORANGE, "--"),
            "equilibrium_angular_update": ("where it will settle", GREY, ":"),
            "balanced_angular_update": ("would hold the norm", ORANGE, "--"),
        },
        "norm": {
            "weight_norm": ("measured", BLUE, "-"),
            "expected_weight_norm": ("expected", ORANGE, "--"),
        },
    }
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        largest = 0.0
        for quantity, (label, colour, line) in curves.items():
            steps, values = history.curve(f"{quantity}/{WEIGHT}")
            if len(steps):
                ax.plot(steps, values, line, color=colour, label=label, linewidth=1.2)
                largest = max(largest, float(np.nanmax(values)))
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("step", fontsize=8)
        # What is left of rounding would fill a log axis.
        if largest < STANDS_STILL:
            ax.set_ylim(-2e-5, 1e-3)
        else:
            ax.set_yscale("log")
            plain_log_ticks(ax.yaxis, *ax.get_ylim())
        ax.tick_params(which="both", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    # A palette: a third of the size, and nobody sees the difference.
    Image.open(buffer).quantize(64).save(path, optimize=True)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="pictures to draw; all unless given")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or RUNS:
        run = RUNS[name]
        history, words = train(run)
        print(f"{name}: {words}")
        if not words.startswith(run.verdict) or run.contains not in words:
            raise SystemExit(f"{name} is for {run.verdict!r} with {run.contains!r}.")
        draw(history, words, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
