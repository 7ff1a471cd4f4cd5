"""The part of InputSpanMonitor in a fit: refused strategies, hooks, what tables say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from models import fit, loader, make
from torch import nn

from lightning_normdyn import InputSpanMonitor, NoTargetsError, NotSupportedError
from lightning_normdyn.input_span.part import refuse_strategy


@pytest.mark.parametrize(
    ("strategy", "replicas", "says"),
    [
        (FSDPStrategy.__new__(FSDPStrategy), 2, "which FSDPStrategy does not keep"),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), 2, "which DeepSpeedStrategy does not keep"),
        (
            ModelParallelStrategy(),
            1,
            "which ModelParallelStrategy with tensor parallelism does not keep",
        ),
    ],
)
def test_strategies_that_cut_inputs_or_weights_are_refused(strategy, replicas, says):
    fake: Any = SimpleNamespace(
        strategy=strategy, world_size=2, distributed_sampler_kwargs={"num_replicas": replicas}
    )
    with pytest.raises(NotSupportedError, match=says):
        refuse_strategy(fake)


def test_one_device_is_not_refused():
    fake: Any = SimpleNamespace(strategy=None, world_size=1, distributed_sampler_kwargs=None)
    refuse_strategy(fake)


def test_hooks_are_there_during_chosen_epochs_only():
    hooks = []

    class Counts(InputSpanMonitor):
        def on_train_batch_end(self, trainer, pl_module, *args):
            hooks.append(len(pl_module.net[0]._forward_pre_hooks))
            super().on_train_batch_end(trainer, pl_module, *args)

    module = make()
    fit(module, [Counts(2)], max_epochs=4)
    watching = hooks[0]  # the search for scale-invariant weights has one in the first batch
    assert hooks == [watching, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert not module.net[0]._forward_pre_hooks


def test_measuring_is_no_treatment():
    monitor = InputSpanMonitor(granularity="layer", params="net.3.weight")
    fit(make(), [monitor], max_epochs=1)
    assert monitor.member.treatments(0) == [""]


def test_a_weight_without_layers_that_can_be_measured_is_refused_before_training():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(6, 6, 2)

        def forward(self, x):
            row = x.flatten(1)[:, :6]
            return self.layer(row, row)

    with pytest.raises(NoTargetsError, match="in `Net` that it can measure"):
        fit(make(net=Bilinear()), [InputSpanMonitor()], loader())
