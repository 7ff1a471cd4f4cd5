"""Which weights have input rows, and the reasons why others have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.input_span import layers
from lightning_normdyn.input_span.layers import ReadableLayers
from lightning_normdyn.parametrizations import weight_normalization


def readable(net: nn.Module, **options: bool) -> ReadableLayers:
    return ReadableLayers(net, {p: tuple(p.shape) for p in net.parameters()}, **options)


def test_readers_are_found_behind_parametrizations_and_ties():
    net = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "c": nn.Conv1d(2, 3, 5)})
    net["b"].weight = net["a"].weight
    weight_normalization(net["c"])
    found = readable(net).readers
    assert found[net["a"].weight] == [net["a"], net["b"]]
    assert found[net["c"].parametrizations.weight.original1] == [net["c"]]
    assert len(found) == 2


def test_compiled_layers_have_no_inputs_unless_they_run_eagerly():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].compile(backend="eager")
    assert readable(net).obstacle(net[0].weight) is None
    assert "compiled code (torch.compile)" in (readable(net).obstacle(net[1].weight) or "")
    assert readable(net, eagerly=True).obstacle(net[1].weight) is None


def test_blocks_hold_what_fits_together(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 2), nn.Linear(2, 2))
    found = readable(net)
    monkeypatch.setattr(layers, "BLOCK_BYTES", 8 * (16 + 9))
    weights = [layer.weight for layer in net]
    assert [list(block) for block in found.blocks(weights)] == [weights[:2], weights[2:]]
    monkeypatch.setattr(layers, "BLOCK_BYTES", 8 * 10)
    assert "at most" in (found.obstacle(net[0].weight) or "")
    assert found.obstacle(net[1].weight) is None


@pytest.mark.parametrize("reader", [nn.Embedding(3, 2), nn.Bilinear(2, 2, 3)])
def test_other_modules_have_no_input_rows(reader):
    obstacle = readable(reader).obstacle(reader.weight)
    assert obstacle == (
        "it is not the weight of a linear layer or a convolution, so it has no input rows"
    )


def test_what_a_trial_has_shown_counts():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found = readable(net)
    trial = layers.InputGatherer(found.readers, torch.device("cpu"), most=0, seed=0)
    trial.begin_batch(1)
    net[0](torch.ones(1, 2))
    trial.end_batch()
    trial.close()
    found.trial = trial
    assert found.obstacle(net[0].weight) is None
    assert found.obstacle(net[1].weight) == "`forward` does not call the layer that it belongs to"
