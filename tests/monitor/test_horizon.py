"""How far a fit goes, and what its learning rates will be: told as Lightning will do it, or not
told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from models import BATCH, ManualNet, Net, fit, loader, make, trainer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_normdyn.lr_schedules import WeightDecayEquivalentLR
from lightning_normdyn.monitor import horizon as horizons
from lightning_normdyn.monitor.horizon import Horizon, horizon_of, schedules_of


class Looks(Callback):
    """The horizon at the start of training and the rates that followed, by optimizer."""

    def __init__(self) -> None:
        self.horizon: Any = None
        self.foreseen: list[Any] = []
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer, pl_module):
        optimizers = trainer.optimizers
        self.horizon = horizon_of(trainer, len(optimizers))
        configs = trainer.lr_scheduler_configs
        for optimizer in optimizers:
            kind = type(optimizer)
            (schedule,) = schedules_of(optimizer, configs, self.horizon, trainer, kind)
            self.foreseen.append(schedule)
            self.rates.append([])
            optimizer.register_step_pre_hook(self._note(len(self.rates) - 1))

    def _note(self, index):
        def note(optimizer, *_):
            self.rates[index].append(optimizer.param_groups[0]["lr"])

        return note


class Scheduled(Net):
    """A scheduler with settings of Lightning's."""

    def __init__(self, settings, **arguments):
        super().__init__(**arguments)
        self.settings = settings

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.settings}}


def looked(module: Any, data: Any = None, **arguments: Any) -> Looks:
    looks = Looks()
    others = arguments.pop("callbacks", [])
    fit(module, [looks, *others], data, **arguments)
    return looks


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"interval": "step"}, {}),
        ({"interval": "step", "frequency": 2}, {}),
        ({"interval": "step", "frequency": 2}, {"accumulate_grad_batches": 2}),
        ({"interval": "step"}, {"max_epochs": -1, "max_steps": 7}),
        ({"interval": "epoch"}, {"max_epochs": 3}),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 5, "accumulate_grad_batches": 4}),
    ],
)
def test_rates_are_those_that_the_fit_will_have(
    settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    looks = looked(make(Scheduled, settings=settings), **arguments)
    (schedule,), (rates,) = looks.foreseen, looks.rates
    assert not schedule.is_assumed
    assert looks.horizon.steps == len(rates)
    assert schedule.rates == pytest.approx(rates, rel=1e-12)
    assert len(set(rates)) > 1
    assert looks.horizon.per_epoch == 4 / arguments.get("accumulate_grad_batches", 1)


def test_a_fit_that_goes_on_knows_what_is_left(tmp_path) -> None:
    settings = {"interval": "step"}
    first = fit(make(Scheduled, settings=settings), max_epochs=1)
    path = tmp_path / "one.ckpt"
    first.save_checkpoint(path)
    looks = looked(make(Scheduled, settings=settings), max_epochs=3, ckpt_path=path)
    assert looks.horizon == Horizon(8, 4, goes_on=True)
    assert looks.foreseen[0].rates == pytest.approx(looks.rates[0])


class Stream(IterableDataset[Any]):
    """Batches without a number."""

    def __iter__(self):
        yield from loader().dataset


class Manual(ManualNet):
    """Both optimizers have schedulers, which nobody steps."""

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return optimizers, [lr_scheduler.ExponentialLR(each, 0.9) for each in optimizers]


def test_without_a_number_of_batches_the_number_of_steps_is_told_or_nothing() -> None:
    stream = DataLoader(Stream(), batch_size=BATCH)
    known = looked(make(), stream, max_epochs=1, max_steps=3)
    assert (known.horizon.steps, known.horizon.per_epoch) == (3, None)
    unknown = looked(make(), stream, max_epochs=1)
    assert unknown.horizon.steps is None
    # One relaxation time of SGD: 1/(4 lr λ/(1 - β)).
    assert int(unknown.foreseen[0].counts.sum()) == 25


def test_by_epochs_of_unknown_length_the_rate_is_assumed() -> None:
    stream = DataLoader(Stream(), batch_size=BATCH)
    module = make(Scheduled, settings={"interval": "epoch"})
    assert looked(module, stream, max_epochs=1, max_steps=3).foreseen[0].is_assumed


def test_accumulation_that_changes_is_no_number() -> None:
    changing = GradientAccumulationScheduler(scheduling={0: 1, 1: 2})
    looks = looked(make(), callbacks=[changing])
    assert looks.horizon.steps in (None, 8)


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}])
def test_optimizers_that_a_module_steps_itself_are_assumed_to_keep_their_rates(
    limit: dict[str, int],
) -> None:
    looks = looked(make(Manual), **limit)
    assert looks.horizon.steps == 8
    assert all(schedule.is_assumed for schedule in looks.foreseen)
    assert [len(rates) for rates in looks.rates] == [8, 8]


class StepsItsOwnWay(Scheduled):
    """Steps its scheduler twice."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()
        scheduler.step()


def test_a_module_that_steps_its_scheduler_in_its_own_way_is_not_guessed() -> None:
    looks = looked(make(StepsItsOwnWay, settings={"interval": "step"}), max_epochs=1)
    assert looks.foreseen[0].is_assumed


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_scheduler_that_counts_the_optimizers_steps_is_not_guessed() -> None:
    def equivalent(optimizer):
        weights = [
            1e-3 if group["params"][0].dim() > 1 else 0.0 for group in optimizer.param_groups
        ]
        return WeightDecayEquivalentLR(optimizer, weights)

    def grouped(parameters):
        weights = [p for p in parameters if p.dim() > 1]
        return torch.optim.SGD(weights, lr=0.1)

    looks = looked(make(make_optimizer=grouped, make_scheduler=equivalent), max_epochs=1)
    assert looks.foreseen[0].is_assumed


def test_without_a_scheduler_nothing_is_assumed() -> None:
    looks = looked(make(make_optimizer=plain), max_epochs=1)
    assert not looks.foreseen[0].is_assumed
    assert looks.foreseen[0].rates == [0.1] * 4


def test_a_very_long_run_is_stepped_ahead_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horizons, "MOST_STEPS", 5)
    looks = looked(make(), max_epochs=2)
    assert looks.horizon.steps == 8
    assert int(looks.foreseen[0].counts.sum()) == 5


def test_data_are_not_loaded_for_it() -> None:
    runner = trainer(max_steps=9)
    runner.strategy.connect(make())
    horizon = horizon_of(runner)
    assert (horizon.steps, horizon.per_epoch) == (9, None)
    assert runner.train_dataloader is None
