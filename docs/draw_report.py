"""The picture of docs/getting_started.md: the first screen of a report, of a run with three faults.

``python docs/draw_report.py`` writes docs/report.png, in less than a minute on one core. It needs
Chromium, and plotly for the report; without Chromium it says so and leaves the picture as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import History, NormDynamicsMonitor
from lightning_normdyn.report import write_report

PICTURE = Path(__file__).parent / "report.png"
# As much as a reader sees of the page before the charts.
WIDTH, HEIGHT = 1280, 385
COLOURS = 64


def chromium() -> str | None:
    """The path of a Chromium; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class ThreeFaults(L.LightningModule):
    """Normalized residual layers, of which one began 20 times too long, one has ten times the
    learning rate, and one gets no gradient."""

    long, fast, dead = 1, 3, 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(8))
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.layers[self.long].weight.mul_(20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            # Multiplied by 0 on its way, as behind a switch that is never on.
            x = x + (0.0 if i == self.dead else 1.0) * torch.relu(norm(layer(x)))
        return nn.functional.cross_entropy(self.head(x), torch.randint(4, (len(x),)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fast = [self.layers[self.fast].weight]
        rest = [weight for weight in self.parameters() if weight is not fast[0]]
        groups = [{"params": rest}, {"params": fast, "lr": 1e-2}]
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=1.0)


def train() -> History:
    """The history of the run."""
    L.seed_everything(0)
    monitor = NormDynamicsMonitor(every_n_steps=2, tables=False)
    trainer = L.Trainer(
        max_steps=300,
        max_epochs=-1,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ThreeFaults(), DataLoader(TensorDataset(torch.randn(256, 16)), batch_size=32))
    return monitor.history


def photograph(browser: str, page: Path, picture: Path) -> None:
    """What a browser shows of a page, in light colours, before anybody scrolls."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            # Until it has drawn: the page unpacks itself.
            "--virtual-time-budget=30000",
            f"--window-size={WIDTH},{HEIGHT}",
            "--blink-settings=preferredColorScheme=1",
            f"--user-data-dir={folder}/profile",
            f"--screenshot={shot}",
        ]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        # A palette: a third of the size, and nobody sees the difference.
        Image.open(shot).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    browser = chromium()
    if browser is None:
        print(f"No Chromium was found: {options.out} is left as it is.")
        return
    with tempfile.TemporaryDirectory() as folder:
        page = write_report({"three faults": train()}, Path(folder) / "report.html")
        photograph(browser, page, options.out)


if __name__ == "__main__":
    main()
