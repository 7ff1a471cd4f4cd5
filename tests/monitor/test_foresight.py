"""What a fit says of its own future: when, to whom, and that nothing of it ends the fit."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from models import TARGETS, ManualNet, Net, distance, fit, loader, make, weights_of
from monitoring import Turns
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor, WeightRescaling
from lightning_normdyn.errors import NormDynWarning
from lightning_normdyn.monitor import foresight
from lightning_normdyn.monitor.forecasts import Forecasts


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 8)


def forecasts_of(watch: NormDynamicsMonitor) -> dict[str, str]:
    return watch.history.meta.get("forecast", {})


def row_of(text: str, name: str) -> list[str]:
    """The cells of a param group."""
    (row,) = [line.split() for line in text.splitlines() if line.startswith(f"{name}  ")]
    return row[len(name.split()) :]


def test_it_is_printed_once_after_the_start_table(capsys) -> None:
    watch = NormDynamicsMonitor(1)
    fit(make(make_optimizer=adamw, make_scheduler=cosine), [watch])
    text = capsys.readouterr().out
    assert text.count("forecast for 8 optimizer steps") == 1
    tables = ["targets", "forecast for", "after 8 optimizer steps"]
    assert [text.index(f"lightning-normdyn: {table}") for table in tables] == sorted(
        text.index(f"lightning-normdyn: {table}") for table in tables
    )
    start = forecasts_of(watch)["start"]
    assert start in text
    # Weights, peak, decay, memory 1/(lr λ), times the 8 steps, epochs of 4 steps, angle √(2 lr λ
    # (1-β)/(1+β)), relaxation.
    assert row_of(start, "AdamW") == [
        "3", "0.01", "0.1", "1,000", "125x", "250", "0.01", "500",
    ]  # fmt: skip
    assert "decay hardly acts in 8 steps" in start


def test_without_tables_nothing_is_printed_and_a_report_can_still_tell(capsys) -> None:
    watch = NormDynamicsMonitor(1, tables=False)
    fit(make(make_optimizer=adamw), [watch])
    assert "forecast" not in capsys.readouterr().out
    assert "AdamW" in forecasts_of(watch)["start"]


def test_a_fit_of_one_batch_is_forecast_too() -> None:
    watch = NormDynamicsMonitor(1, tables=False)
    fit(make(make_optimizer=adamw), [watch], max_steps=1)
    assert "forecast for 1 optimizer steps" in forecasts_of(watch)["start"]


def test_a_fit_with_a_forecast_is_the_fit_without() -> None:
    def trained(*callbacks: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        module = make(make_optimizer=adamw, make_scheduler=cosine)
        fit(module, list(callbacks), DataLoader(loader().dataset, batch_size=8, shuffle=True))
        return weights_of(module)

    assert distance(trained(), trained(NormDynamicsMonitor(1, tables=False))) == 0


def test_each_optimizer_is_forecast_by_its_name() -> None:
    watch = NormDynamicsMonitor(1, tables=False)
    fit(make(ManualNet), [watch])
    start = forecasts_of(watch)["start"]
    for name in ("SGD-0", "SGD-1"):
        assert row_of(start, name)[1:3] == ["0.1", "0.01"]


def test_weights_that_a_callback_treats_are_left_out() -> None:
    watch = NormDynamicsMonitor(1, tables=False)
    fit(make(make_optimizer=adamw), [AdaptiveWeightShrink(1e-2), watch])
    start = forecasts_of(watch)["start"]
    assert "callbacks act on 2 of its weights, which are not forecast" in " ".join(start.split())
    # Without them there is no scale-invariant weight, and nothing settles where noise says.
    assert row_of(start, "AdamW")[-2:] == ["-", "-"]
    of_treated = NormDynamicsMonitor(1, tables=False, params=TARGETS)
    fit(make(make_optimizer=adamw), [WeightRescaling(1), of_treated])
    assert forecasts_of(of_treated) == {}


class Unreadable(lr_scheduler.LambdaLR):
    """Cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError


def test_a_scheduler_that_cannot_be_stepped_ahead_is_said() -> None:
    watch = NormDynamicsMonitor(1, tables=False)

    def make_scheduler(optimizer):
        return Unreadable(optimizer, lambda step: 0.5**step)

    fit(make(make_optimizer=adamw, make_scheduler=make_scheduler), [watch])
    start = " ".join(forecasts_of(watch)["start"].split())
    assert "its scheduler cannot be stepped ahead" in start


@pytest.mark.parametrize("method", ["__init__", "at_start", "at_end"])
def test_what_goes_wrong_is_a_warning_and_the_fit_goes_on(monkeypatch, method: str) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Forecasts, method, fails)
    watch = NormDynamicsMonitor(1, tables=False)
    with pytest.warns(
        NormDynWarning, match=r"no forecast of this fit \(RuntimeError: no such luck"
    ):
        fit(make(make_optimizer=adamw), [watch])
    assert len(watch.history) == 8


def test_a_rate_on_the_device_is_left_unread(monkeypatch) -> None:
    monkeypatch.setattr(foresight.Forecasts, "at_end", lambda *_: "")
    watch = NormDynamicsMonitor(1, tables=False)

    def lr_of_nobody(parameters):
        optimizer = adamw(parameters)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)
        return optimizer

    fit(make(make_optimizer=lr_of_nobody), [watch])
    assert len(watch.history) == 8


# --- at the end


class Noise(Net):
    """Five layers without normalization whose gradients are noise."""

    def __init__(self, **arguments: Any) -> None:
        layers = [nn.Linear(24, 24, bias=False) for _ in range(5)]
        super().__init__(net=nn.Sequential(*layers), dtype=torch.float32, **arguments)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        (x,) = batch
        loss = 0 * self.net(x).sum()
        for layer in self.net:
            loss = loss + (layer.weight * torch.randn_like(layer.weight)).sum()
        return loss


def two_decays(parameters):
    """The first layer has a hundredth of the decay."""
    first, *others = parameters
    groups = [{"params": [first], "weight_decay": 0.02}, {"params": others, "weight_decay": 2.0}]
    return torch.optim.SGD(groups, lr=1e-2)


def test_the_end_has_the_measured_coherence_and_names_the_weight_unlike_the_others() -> None:
    torch.manual_seed(0)
    watch = NormDynamicsMonitor(10, tables=False)
    data = DataLoader(TensorDataset(torch.randn(320, 24)), batch_size=1)
    fit(make(Noise, make_optimizer=two_decays), [watch], data, max_epochs=1)
    end = forecasts_of(watch)["end"]
    # Steps of plain SGD forget each other.
    for name in ("SGD 0", "SGD 1"):
        assert float(row_of(end, name)[0]) == pytest.approx(1, abs=0.2)
    assert float(row_of(end, "SGD 1")[-2]) == pytest.approx(math.sqrt(2 * 2.0 * 1e-2), rel=0.1)
    found = re.search(r"net\.0\.weight: turns (\S+)x as fast as the median", " ".join(end.split()))
    assert found is not None
    _, angles = watch.history.column("matrix_angle/net.0.weight")
    _, others = watch.history.column("matrix_angle/net.1.weight")
    root_mean_squares = [float(np.sqrt(np.mean(np.square(each)))) for each in (angles, others)]
    assert float(found[1]) == pytest.approx(root_mean_squares[0] / root_mean_squares[1], rel=0.1)


def test_a_run_that_showed_nothing_has_no_second_forecast(capsys) -> None:
    watch = NormDynamicsMonitor(1)
    fit(make(make_optimizer=adamw), [watch])
    assert set(forecasts_of(watch)) == {"start"}
    assert "the same run" not in capsys.readouterr().out


def test_the_rest_of_a_run_is_forecast_when_it_goes_on(tmp_path, capsys) -> None:
    module = make(make_optimizer=adamw, make_scheduler=cosine)
    first = fit(module, [NormDynamicsMonitor(1)], max_epochs=1)
    assert "forecast for 4 optimizer steps" in capsys.readouterr().out
    path = tmp_path / "one.ckpt"
    first.save_checkpoint(path)
    watch = NormDynamicsMonitor(1)
    again = make(make_optimizer=adamw, make_scheduler=cosine)
    fit(again, [watch], max_epochs=3, ckpt_path=path)
    text = capsys.readouterr().out
    assert "forecast for 8 optimizer steps" in text
    assert "forecast for 4" not in text
    # The history goes on, and so does what it began with.
    assert "forecast for 4 optimizer steps" in forecasts_of(watch)["start"]


def test_an_optimizer_that_steps_later_is_told_of_later(capsys) -> None:
    watch = NormDynamicsMonitor(1)
    module = make(Turns)
    module.offset = 2
    fit(module, [watch])
    text = capsys.readouterr().out
    assert text.count("lightning-normdyn: forecast for") == 2
    start = forecasts_of(watch)["start"]
    assert start.index("SGD-0") < start.index("SGD-1")
