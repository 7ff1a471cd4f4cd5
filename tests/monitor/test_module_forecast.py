"""A module is forecast without training: with its own optimizers and schedulers, on no data."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from models import Net, make
from torch import nn
from torch.optim import lr_scheduler

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.invariance.checks import inspect_module
from lightning_normdyn.monitor.module_forecast import forecast_module
from lightning_normdyn.theory.forecast_words import MOST_GROUPS


class Planned(Net):
    """Plans its schedule by the number of steps that the Trainer knows."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.2)
        steps = self.trainer.estimated_stepping_batches
        scheduler = lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def cells(text: str, name: str = "AdamW") -> list[str]:
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{name}  ")]
    return row[1:]


def test_the_schedule_is_that_of_a_run_of_so_many_steps() -> None:
    module = make(Planned, dtype=torch.float32)
    text = forecast_module(module, [], 2000)
    assert text.startswith("lightning-normdyn: forecast for 2,000 optimizer steps")
    # The peak of the one cycle, and 1/(lr λ) there.
    assert cells(text)[1:5] == ["0.02", "0.2", "250", "12"]
    # Without verdicts nobody knows which weights settle.
    assert cells(text)[-2:] == ["-", "-"]


def test_scale_invariant_weights_are_followed_from_their_norms() -> None:
    module = make(Planned, dtype=torch.float32)
    verdicts = inspect_module(module, torch.randn(4, 1, 6, 6))
    text = forecast_module(module, verdicts, 2000, steps_per_epoch=100)
    # At its peak, a one cycle has the smallest momentum.
    angle = math.sqrt(2 * 2e-2 * 0.2 * (1 - 0.85) / (1 + 0.85))
    assert cells(text)[-3:-1] == ["2.5", f"{angle:.2g}"]
    assert "in the cool-down norms shrink" in text
    # A head that starts at zero is no obstacle.
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    assert cells(forecast_module(module, verdicts, 2000))[-2:] == ["-", "-"]


def test_a_schedule_by_epochs_asks_for_their_length() -> None:
    class ByEpochs(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.2)
            return [optimizer], [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)]

    text = " ".join(forecast_module(make(ByEpochs), [], 50).split())
    assert "goes by epochs; give --steps-per-epoch" in text
    known = forecast_module(make(ByEpochs), [], 50, steps_per_epoch=10)
    assert "--steps-per-epoch" not in known
    assert cells(known)[1] == "0.01"


def test_of_many_groups_the_first_are_shown() -> None:
    class Grouped(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([{"params": [p]} for p in self.parameters() if p.dim() > 1])

    layers = [nn.Linear(3, 3) for _ in range(MOST_GROUPS + 3)]
    text = forecast_module(make(Grouped, net=nn.Sequential(*layers)), [], 50)
    assert f"AdamW {MOST_GROUPS - 1}" in text
    assert f"AdamW {MOST_GROUPS}" not in text
    assert "... and 3 more param groups" in text


class Aimless(L.LightningModule):
    """Has no optimizer."""

    def configure_optimizers(self) -> None:
        return None


class Flat(L.LightningModule):
    """Has no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(2, 2), "needs a LightningModule"),
        (Aimless(), "gives no optimizer"),
        (Flat(), "two or more dimensions"),
    ],
)
def test_what_cannot_be_forecast_is_refused(module: Any, said: str) -> None:
    with pytest.raises(NormDynError, match=said):
        forecast_module(module, [], 10)
