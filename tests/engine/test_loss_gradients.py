"""The gradients of the loss itself, under every strategy and whatever somebody does to them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks
from strategies import STRATEGIES, sgd
from strategies import fit as fit_with
from torch import nn

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.engine.loss_gradients import (
    LossGradients,
    at_the_end_of_backward,
    changed_between_ranks,
)
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors


def layer():
    torch.manual_seed(1)
    return nn.Linear(3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def test_the_call_comes_when_gradients_are_complete():
    net, x = layer()
    seen = []
    loss = net(x).sum() + net(2 * x).sum()
    at_the_end_of_backward(loss, lambda: seen.append(net.weight.grad.clone()))
    assert not seen
    loss.backward()
    assert torch.equal(seen[0], net.weight.grad)


@pytest.mark.parametrize("known", [False, True], ids=["copies", "sums"])
def test_what_is_taken_is_the_gradient_of_then(known):
    net, x = layer()
    vectors = WeightVectors([net.weight], [Partition.filters((2, 3))])
    gradients = LossGradients([net.weight], vectors if known else None)
    loss = net(x).square().sum()
    gradients.watch(loss)
    loss.backward()
    expected = (net.weight * net.weight.grad).sum(1).detach()
    net.weight.grad.mul_(torch.tensor([[1.0], [-3.0]]))
    sums = gradients.take(vectors)
    assert torch.allclose(sums[1], expected)


def test_nothing_is_known_of_a_backward_pass_that_nobody_saw():
    net, x = layer()
    vectors = WeightVectors([net.weight], [Partition.filters((2, 3))])
    gradients = LossGradients([net.weight], vectors)
    net(x).sum().backward()
    assert gradients.take(vectors) is None


def test_a_backward_pass_that_raises_leaves_no_hook():
    net, x = layer()
    net.weight.register_hook(lambda g: g)
    gradients = LossGradients([net.weight], None)
    loss = net(x).sum()
    gradients.watch(loss)
    net.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    gradients.forget()
    assert len(net.weight._backward_hooks) == 2
    loss = net(x).sum()
    assert gradients.take(WeightVectors([net.weight], [Partition.filters((2, 3))])) is None


def test_gradients_cleared_in_place_between_two_batches_are_not_changed_ones():
    net, x = layer()
    vectors = WeightVectors([net.weight], [Partition.filters((2, 3))])
    gradients = LossGradients([net.weight], vectors)
    for _ in range(2):
        loss = net(x).square().sum()
        gradients.watch(loss)
        loss.backward()
        taken = gradients.take(vectors)
        net.weight.grad.zero_()
    assert bool(torch.isfinite(taken).all())


def turned(state, bucket):
    """A hook that hands back something else than the average."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(bucket.buffer().sign())
    return future


def known_under(
    strategy: str, hook: Any = None, log_every_n_steps: int = 1, *, disturbed: bool = False
) -> Any:
    """In a rank: how each claim is known after a fit, and whether gradients were disturbed after
    the backward pass."""
    from lightning.pytorch import Callback

    class Disturbs(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if hook is not None:
                trainer.model.register_comm_hook(None, hook)

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            for weight in pl_module.parameters() if disturbed else ():
                if weight.grad is not None and weight.ndim > 1:
                    weight.grad.add_(weight.detach(), alpha=0.1)

    callback = AdaptiveWeightShrink(0.01)
    fit_with(
        STRATEGIES[strategy],
        lambda: [Disturbs(), callback],
        optimizer=sgd,
        steps=12,
        log_every_n_steps=log_every_n_steps,
    )
    verdicts = callback.member.session.search.verdicts
    return {v.known for v in verdicts.values() if v.partition is not None}


def test_a_communication_hook_that_compresses_leaves_no_evidence():
    for found in run_ranks(known_under, 2, ("ddp", turned)).values():
        assert found == {"graph"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
@pytest.mark.parametrize("strategy", ["ddp", "FSDP2", "FSDP1 FULL_SHARD", "TP"])
def test_claims_are_held_against_the_loss_s_own_gradient_under_every_strategy(
    strategy, log_every_n_steps
):
    for found in run_ranks(
        partial(known_under, disturbed=True), 2, (strategy, None, log_every_n_steps)
    ).values():
        assert found == {"graph and gradients"}


def test_hooks_that_average_are_known():
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    class Wrapped:
        def __init__(self, hook):
            self._comm_hooks = [(hook, None)]

    assert not changed_between_ranks(nn.Linear(2, 2))
    assert not changed_between_ranks(Wrapped(default_hooks.fp16_compress_hook))
    assert changed_between_ranks(Wrapped(powerSGD_hook.powerSGD_hook))
    assert changed_between_ranks(
        Wrapped(default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook))
    )
