"""What it costs to log 8 quantities of 54 layers at every step, beside `self.log_dict` and beside
`wandb.watch`.

    python benchmarks/logging_cost.py [--steps 40] [--rounds 2] [--layers 54] [--out logging_cost.md]

Prints a Markdown table. The floor is the same training without any logging, measured in the same
run; W&B is offline throughout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import NormDynamicsMonitor
from lightning_normdyn.monitor.loggers import publish_row
from lightning_normdyn.monitor.quantities import monitored

QUANTITIES = [
    quantity.name
    for quantity in monitored()
    if quantity.measured == "always" and not quantity.drawn_with
]


def numbers_of(layers: int) -> dict[str, float]:
    """Ready-made, under the keys that the monitor logs."""
    return {f"{quantity}/layer{i}.weight": 0.1 for quantity in QUANTITIES for i in range(layers)}


class Deep(L.LightningModule):
    """Small convolutions, each in front of BatchNorm."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
            )
            for _ in range(layers)
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def lower_quartile(seconds: list[float]) -> float:
    """In milliseconds; a busy machine disturbs it less than the mean or the median."""
    return 1e3 * statistics.quantiles(seconds, n=4)[0]


class Stopwatch(L.Callback):
    """Seconds from one batch start to the next."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.at.append(time.perf_counter())

    @property
    def milliseconds(self) -> float:
        return lower_quartile([b - a for a, b in pairwise(self.at)][8:])


class LogDict(L.Callback):
    """As many ready-made numbers through Lightning's own `log_dict`, which is what a callback
    without `log_metrics` does."""

    def on_fit_start(self, trainer: Any, module: L.LightningModule) -> None:
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        self.numbers = numbers_of(len(convolutions))

    def on_train_batch_end(self, trainer: Any, module: L.LightningModule, *args: Any) -> None:
        module.log_dict(self.numbers, on_step=True, on_epoch=False)


class Watch(L.Callback):
    """`wandb.watch` with every histogram at every step."""

    def on_fit_start(self, trainer: Any, module: L.LightningModule) -> None:
        trainer.logger.watch(module, log="all", log_freq=1, log_graph=False)


def wandb_logger(folder: Path) -> Logger:
    settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
    return WandbLogger(project="cost", offline=True, save_dir=str(folder), settings=settings)


def csv_logger(folder: Path) -> Logger:
    return CSVLogger(folder)


def tensorboard_logger(folder: Path) -> Logger:
    return TensorBoardLogger(folder)


def monitor(**arguments: Any) -> NormDynamicsMonitor:
    return NormDynamicsMonitor(1, quantities=QUANTITIES, tables=False, **arguments)


VARIANTS: dict[str, tuple[Callable[[], list[L.Callback]], Callable[[Path], Logger] | None]] = {
    "no logging (floor)": (list, None),
    "NormDynamicsMonitor, no logger": (lambda: [monitor()], None),
    "NormDynamicsMonitor, W&B": (lambda: [monitor()], wandb_logger),
    "NormDynamicsMonitor, W&B, histograms": (lambda: [monitor(histograms=True)], wandb_logger),
    "NormDynamicsMonitor, CSV": (lambda: [monitor()], csv_logger),
    "NormDynamicsMonitor, TensorBoard": (lambda: [monitor()], tensorboard_logger),
    "self.log_dict of as many numbers, W&B": (lambda: [LogDict()], wandb_logger),
    "self.log_dict of as many numbers, CSV": (lambda: [LogDict()], csv_logger),
    "wandb.watch(log='all', log_freq=1)": (lambda: [Watch()], wandb_logger),
}

LOGGERS = {"W&B": wandb_logger, "CSV": csv_logger, "TensorBoard": tensorboard_logger}


def measure(
    callbacks: list[L.Callback],
    make_logger: Callable[[Path], Logger] | None,
    steps: int,
    layers: int,
) -> float:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 16, 8, 8), torch.randint(0, 16, (64,)))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        logger = make_logger(Path(folder)) if make_logger else False
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            log_every_n_steps=1,
            logger=logger,
            callbacks=[*callbacks, watch],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Deep(layers), DataLoader(data, batch_size=16))
        wandb.finish()
    return watch.milliseconds


def inside(
    make_logger: Callable[[Path], Logger], numbers: dict[str, float], calls: int = 40
) -> float:
    """The publishing call alone, with ready-made numbers."""
    seconds = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        logger = make_logger(Path(folder))
        for step in range(calls):
            start = time.perf_counter()
            publish_row([logger], numbers, {}, step)
            seconds.append(time.perf_counter() - start)
        logger.finalize("success")
        wandb.finish()
    return lower_quartile(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps per variant and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often to measure all variants")
    parser.add_argument("--layers", type=int, default=54, help="convolutions of the network")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    os.environ.setdefault(
        "WANDB_MODE", "offline"
    )  # wandb asks for a key even where the logger says offline
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Rounds, not one variant after the other: what else the machine does then disturbs all of them
    # alike.
    rounds = []
    for _ in range(args.rounds):
        measured = {}
        for name, (make, logger) in VARIANTS.items():
            measured[name] = measure(make(), logger, args.steps, args.layers)
        rounds.append(measured)
    numbers = numbers_of(args.layers)
    times = {name: min(each[name] for each in rounds) for name in VARIANTS}
    floor = times["no logging (floor)"]
    lines = [
        "# What logging costs",
        "",
        "`python benchmarks/logging_cost.py --out benchmarks/logging_cost.md`",
        "",
        f"{len(QUANTITIES)} quantities of {args.layers} layers at every step: {len(numbers)} numbers, "
        f"one transfer, one call per logger.",
        f"Lower quartile of {args.steps} steps, best of {args.rounds} rounds; one CPU thread, "
        f"torch {torch.__version__}, "
        f"lightning {L.__version__}, wandb {wandb.__version__}.",
        "",
        "| what | ms per step | above the floor (ms) | times the floor |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {ms:.1f} | {ms - floor:.1f} | {ms / floor:.2f} |"
            for name, ms in times.items()
        ),
        "",
        "| the call to the logger alone | ms |",
        "| --- | --- |",
        *(f"| {name} | {inside(logger, numbers):.2f} |" for name, logger in LOGGERS.items()),
    ]
    table = "\n".join(lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
