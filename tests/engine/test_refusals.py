"""Weights of zeros, on which a rule would have no effect."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from models import (
    Net,
    fit,
    make,
    same,
    weights_of,
)
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    WeightRescaling,
)


def zeroed(**arguments: Any) -> Net:
    module = make(**arguments)
    with torch.no_grad():
        module.net[3].weight.zero_()
    return module


class NeedsLength(AdaptiveWeightShrink):
    """A rule that a weight of zeros would never notice."""

    needs_length = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(0.1, **arguments)


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, target_norm="initial", **k), NeedsLength],
    ids=["wrs", "a rule of somebody else"],
)
@pytest.mark.parametrize("params", ["auto", "net.3.weight"])
def test_a_weight_of_zeros_is_refused_by_name_and_the_way_out_works(callback, params):
    module = zeroed()
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError, match=r"`net\.3\.weight`, but all entries are zero.*'!net\.3\.weight'"
    ):
        fit(module, [callback(params=params)])
    assert same(weights_of(module), before), "refused before the first step"
    assert not any(
        group["weight_decay"] == 0 for group in module.trainer.optimizers[0].param_groups
    )
    fit(zeroed(), [callback(params=["net.0.weight", "net.3.weight", "!net.3.weight"])], max_steps=2)


def test_who_only_looks_and_a_gate_let_a_weight_of_zeros_be():
    fit(
        zeroed(),
        [NormDynamicsMonitor(1, tables=False), RadialProjection(gate="cosine")],
        max_steps=2,
    )


@pytest.mark.parametrize(
    "callback",
    [
        AdaptiveWeightShrink(1.0),
        RadialProjection(),
        LRDropRescaling(exponent=0.25),
        WeightRescaling(1),
    ],
    ids=["aws", "projection", "lr drop", "wrs"],
)
def test_a_weight_of_zeros_is_treated_as_soon_as_it_has_grown(callback):
    module = zeroed(make_scheduler=dropping)
    untreated = zeroed(make_scheduler=dropping)
    for net in (module.net, untreated.net):
        nn.init.ones_(net[4].bias)  # or the ReLU behind it would let no gradient through
    with warnings.catch_warnings():
        # In the first step there is nothing to treat, which is said at the end.
        warnings.filterwarnings(
            "ignore", "\\w+ left vectors alone whose norm is zero", NormDynWarning
        )
        fit(module, [callback], max_epochs=2)
    fit(untreated, [], max_epochs=2)
    assert not torch.equal(module.net[3].weight, untreated.net[3].weight)
    if isinstance(callback, WeightRescaling):
        lengths = module.net[3].weight.detach().flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths))


def dropping(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.1)


def test_a_weight_of_zeros_that_is_unfrozen_later_is_left_to_its_optimizer():
    class Unfreezes(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].weight.requires_grad_(trainer.current_epoch > 0)

    module, callback = zeroed(), NeedsLength()
    module.net[3].weight.requires_grad_(False)
    with pytest.warns(
        NormDynWarning, match=r"`net\.3\.weight`, but all entries are zero.*left to its optimizer"
    ):
        fit(module, [Unfreezes(), callback], max_epochs=2)
    assert [t.name for t in callback.plans[0].targets] == ["net.0.weight"]
