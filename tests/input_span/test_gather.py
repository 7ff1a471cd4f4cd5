"""Which weights have input rows, and why others have none. Rows of what layers are given while a
model runs: all of them, spread over batches, none twice, none of other passes; and their sums, in
pieces and on several ranks, against one look at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_normdyn.input_span import gather
from lightning_normdyn.input_span.gather import Covariance, InputGatherer, ReadableLayers
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
    monkeypatch.setattr(gather, "BLOCK_BYTES", 8 * (16 + 9))
    weights = [layer.weight for layer in net]
    assert [list(block) for block in found.blocks(weights)] == [weights[:2], weights[2:]]
    monkeypatch.setattr(gather, "BLOCK_BYTES", 8 * 10)
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
    trial = InputGatherer(found.readers, torch.device("cpu"), most=0, seed=0)
    trial.begin_batch(1)
    net[0](torch.ones(1, 2))
    trial.end_batch()
    trial.close()
    found.trial = trial
    assert found.obstacle(net[0].weight) is None
    assert found.obstacle(net[1].weight) == "`forward` does not call the layer that it belongs to"


def gatherer_of(layer: nn.Linear, most: int = 1000, seed: int = 0) -> InputGatherer:
    return InputGatherer({layer.weight: [layer]}, torch.device("cpu"), most=most, seed=seed)


def run(gatherer: InputGatherer, batches: list[Tensor], forward: Any) -> None:
    for number, batch in enumerate(batches):
        gatherer.begin_batch(len(batches) - number)
        forward(batch)
        gatherer.end_batch()
    gatherer.close()


def test_all_rows_are_taken_if_there_are_not_too_many():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    gatherer = gatherer_of(layer)
    run(gatherer, list(x), layer)
    stream = gatherer.streams[layer.weight]
    torch.testing.assert_close(stream.mean[0], x.flatten(0, 1).double().mean(0))
    assert (stream.count, gatherer.batches, gatherer.seen[layer.weight]) == (20, 4, 4)
    assert not gatherer.thinned


def test_rows_are_spread_over_batches_of_any_size():
    layer = nn.Linear(1, 2)
    # Rows are numbered, so that the mean tells from which batches they come.
    sizes = (50, 50, 2, 50, 50)
    x = torch.arange(sum(sizes), dtype=torch.float64)[:, None]
    counts = []
    gatherer = gatherer_of(layer.double(), most=52)
    run(
        gatherer,
        list(x.split(sizes)),
        lambda batch: (layer(batch), counts.append(gatherer.streams[layer.weight].count)),
    )
    assert counts == [10, 20, 22, 37, 52]
    assert gatherer.thinned == {layer.weight}


def test_where_the_length_is_unknown_the_first_rows_are_taken():
    layer = nn.Linear(1, 2)
    gatherer = gatherer_of(layer, most=12)
    for size in (10, 10, 10):
        gatherer.begin_batch(1)
        layer(torch.randn(size, 1))
        gatherer.end_batch()
    assert gatherer.streams[layer.weight].count == 12


def test_calls_of_one_batch_share_its_rows():
    layer = nn.Linear(3, 3)
    counts = []
    gatherer = gatherer_of(layer, most=80)

    def twice(x: Tensor) -> None:
        layer(layer(x))
        counts.append(gatherer.streams[layer.weight].count)

    run(gatherer, list(torch.randn(8, 40, 3)), twice)
    # The first batch does not know of the second call yet.
    assert counts == [18, 26, 34, 42, 50, 59, 68, 77]


def test_another_seed_chooses_other_rows():
    def mean(seed: int) -> float:
        layer = nn.Linear(1, 1)
        gatherer = gatherer_of(layer, most=5, seed=seed)
        run(gatherer, [torch.arange(100.0)[:, None]], layer)
        return float(gatherer.streams[layer.weight].mean)

    assert mean(0) == mean(0)
    assert mean(0) != mean(1)


def test_the_random_numbers_of_the_training_are_left_alone():
    layer, state = nn.Linear(3, 2), torch.get_rng_state()
    run(gatherer_of(layer, most=4), [torch.ones(9, 3)], layer)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_gathered_between_batches_and_after_the_end():
    layer, gatherer = nn.Linear(3, 2), None
    gatherer = gatherer_of(layer)
    layer(torch.ones(2, 3))
    run(gatherer, [torch.ones(3, 3)], layer)
    layer(torch.ones(4, 3))
    assert gatherer.streams[layer.weight].count == 3
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_counts_once(reentrant):
    layer, head = nn.Linear(3, 3), nn.Linear(3, 1)
    gatherer = gatherer_of(layer)

    def step(x: Tensor) -> None:
        hidden = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
        head(hidden).sum().backward()

    run(gatherer, [torch.randn(5, 3), torch.randn(5, 3)], step)
    assert layer.weight.grad is not None
    assert gatherer.streams[layer.weight].count == 10


def test_inputs_that_are_no_rows_are_an_obstacle_and_no_error():
    layer = nn.Linear(3, 2)
    gatherer = gatherer_of(layer)
    run(gatherer, [torch.eye(3).to_sparse()], layer)
    assert gatherer.streams[layer.weight].count == 0
    assert "its Linear is given a Tensor of torch.float32" in gatherer.obstacles[layer.weight]


def test_inside_torch_func_nothing_is_taken():
    layer = nn.Linear(3, 1)
    gatherer = gatherer_of(layer)
    run(gatherer, [torch.ones(3)], torch.func.grad(lambda x: layer(x).sum()))
    assert gatherer.streams[layer.weight].count == 0
    assert layer.weight in gatherer.obstacles


def test_an_input_may_be_given_by_name():
    layer = nn.Linear(3, 2)
    gatherer = gatherer_of(layer)
    run(gatherer, [torch.ones(4, 3)], lambda x: layer(input=x))
    assert gatherer.streams[layer.weight].count == 4


def test_compiled_code_stays_one_graph_and_gives_nothing():
    layer = nn.Linear(3, 2)
    gatherer = gatherer_of(layer)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x) + 1, backend="eager", fullgraph=True)
    run(gatherer, [torch.ones(4, 3)], compiled)
    assert gatherer.streams[layer.weight].count == 0


# ---- The sums ----


def pieces(rows: torch.Tensor, *sizes: int) -> Covariance:
    stream = Covariance(*rows.shape[1:], rows.device)
    for part in rows.split(sizes):
        stream.add(part)
    return stream


def test_the_stream_equals_one_look_at_all_rows_also_far_from_zero():
    rows = torch.randn(50, 2, 6, dtype=torch.float64) + 1e6
    stream = pieces(rows, 1, 20, 0, 29)
    covariance = stream.covariance()
    for g in range(2):
        torch.testing.assert_close(
            covariance[g], torch.cov(rows[:, g].T, correction=0), rtol=1e-8, atol=1e-10
        )
    torch.testing.assert_close(stream.mean, rows.mean(0), rtol=1e-14, atol=0)


def test_ranks_complete_each_other():
    rows = torch.randn(40, 1, 5, dtype=torch.float64) + 100
    shares, whole = (
        [pieces(rows[:10], 10), pieces(rows[10:], 15, 15), pieces(rows[:0], 0)],
        pieces(rows, 40),
    )
    first = sum(
        torch.cat([s.mean.flatten() * s.count, torch.tensor([float(s.count)], dtype=torch.float64)])
        for s in shares
    )
    scatters = []

    def all_reduce(tensor):
        """What a process group would do: the first messages have a known sum, the second ones are
        summed below."""
        if tensor.dim() == 1:
            tensor.copy_(first)
        else:
            scatters.append(tensor.clone())

    for share in shares:
        share.merge(all_reduce)
        torch.testing.assert_close(share.mean, whole.mean, rtol=1e-14, atol=0)
        assert share.count == 40
    torch.testing.assert_close(sum(scatters) / 40, whole.covariance(), rtol=1e-12, atol=1e-12)
