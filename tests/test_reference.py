"""The reference against things that are known without it: torch's optimizers, and facts that the
papers prove."""

from __future__ import annotations

import pytest
import reference
import torch
from reference import Project, Rescale, Shrink, gradients_of, train


def problem(invariant=True):
    """A filter-wise scale-invariant (or plain) loss on two weights, one of them 1-D, in float64."""
    rng = torch.Generator().manual_seed(0)
    weights = {
        "conv": torch.randn(3, 2, 2, 2, generator=rng, dtype=torch.float64),
        "bias": torch.randn(3, generator=rng, dtype=torch.float64),
    }
    inputs = torch.randn(60, 16, 8, generator=rng, dtype=torch.float64)

    def loss(weights, step):
        w = weights["conv"].flatten(1)
        if invariant:
            w = w / w.norm(dim=1, keepdim=True)
        return (torch.tanh(inputs[step] @ w.T) + weights["bias"]).square().mean()

    return weights, gradients_of(loss)


def torch_run(weights, gradients, optimizer_class, steps, **options):
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    optimizer = optimizer_class(parameters.values(), **options)
    for step in range(steps):
        for name, g in gradients(parameters, step).items():
            parameters[name].grad = g
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (reference.SGD, torch.optim.SGD, {"weight_decay": 0.1}),
        (reference.SGD, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3}),
        (reference.SGD, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
        (reference.Adam, torch.optim.Adam, {"weight_decay": 0.1}),
        (reference.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_optimizers_equal_those_of_torch(ours, theirs, options):
    weights, gradients = problem(invariant=False)
    expected = torch_run(weights, gradients, theirs, steps=20, lr=0.05, **options)
    last = train(weights, gradients, ours(**options), lr=0.05, steps=20)[-1]
    for name in weights:
        torch.testing.assert_close(last[name], expected[name], rtol=0, atol=1e-13)


def conv_only(problem):
    """The same problem with the bias fixed: SGDP decays it decoupled, torch's SGD coupled."""
    weights, gradients = problem
    return weights, lambda weights, step: {"conv": gradients(weights, step)["conv"]}


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_sgd_with_a_gated_projection_is_sgdp(invariant, options):
    weights, gradients = conv_only(problem(invariant))
    expected = reference.sgdp(
        weights, gradients, lr=0.1, steps=30, momentum=0.9, weight_decay=0.05, **options
    )
    run = train(
        weights,
        gradients,
        reference.SGD(momentum=0.9, weight_decay=0.05, **options),
        lr=0.1,
        steps=30,
        project=Project("cosine"),
    )
    torch.testing.assert_close(run[-1]["conv"], expected[-1]["conv"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("invariant", [True, False])
def test_adamw_with_a_gated_projection_is_adamp(invariant):
    weights, gradients = problem(invariant)
    expected = reference.adamp(weights, gradients, lr=0.01, steps=30, weight_decay=0.05)
    run = train(
        weights,
        gradients,
        reference.AdamW(weight_decay=0.05),
        lr=0.01,
        steps=30,
        project=Project("cosine"),
    )
    torch.testing.assert_close(run[-1]["conv"], expected[-1]["conv"], rtol=0, atol=1e-13)


def test_the_gate_opens_for_filters_then_for_the_layer_then_not():
    w = torch.eye(2, dtype=torch.float64)
    across, along = (
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(),
        torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double(),
    )
    assert reference.open_gate(w, across, 0.1) == "filter"
    assert (
        reference.open_gate(w, along, 0.1) == "layer"
    )  # each filter is along its weight, but they cancel
    assert (
        reference.open_gate(w, -w, 0.1) is None
    )  # the printed rule, w.g < delta, would project here
    assert (
        reference.open_gate(w, across + torch.diag(torch.tensor([1.0, 0.0])), 0.1) is None
    )  # one filter closes it for all


def test_aws_is_weight_decay_of_alpha_times_the_norm():
    weights, gradients = problem()
    norms = weights["conv"].flatten(1).norm(dim=1)
    run = train(
        weights,
        gradients,
        reference.SGD(weight_decay=9.0),
        lr=0.1,
        steps=1,
        shrink=Shrink(0.05),
        targets=["conv"],
    )
    expected = (
        weights["conv"] * (1 - 0.1 * 0.05 * norms).view(3, 1, 1, 1)
        - 0.1 * gradients(weights, 0)["conv"]
    )
    torch.testing.assert_close(run[1]["conv"], expected, rtol=0, atol=1e-15)


def test_wrs_counts_steps_from_one_and_carries_state():
    weights, gradients = problem()
    state = {}
    run = train(
        weights,
        gradients,
        reference.SGD(momentum=0.9),
        lr=0.1,
        steps=4,
        rescale=Rescale(4, target=2.0),
        state=state,
    )
    norms = [step["conv"].flatten(1).norm(dim=1) for step in run]
    assert (norms[3] - 2).abs().min() > 1e-3
    torch.testing.assert_close(norms[4], torch.full_like(norms[4], 2.0), rtol=1e-14, atol=0)
    # The direction of the buffer against the weight is what it was: an undisturbed run at the new
    # scale would hold it.
    plain = {}
    before = train(weights, gradients, reference.SGD(momentum=0.9), lr=0.1, steps=4, state=plain)[
        -1
    ]["conv"]
    product = (state["conv"]["momentum_buffer"] * run[4]["conv"]).flatten(1).sum(1)
    torch.testing.assert_close(
        product,
        (plain["conv"]["momentum_buffer"] * before).flatten(1).sum(1),
        rtol=1e-12,
        atol=1e-14,
    )


def test_a_weight_without_a_gradient_is_left_alone():
    weights, gradients = problem()

    def only_bias(weights, step):
        return {"conv": None, "bias": gradients(weights, step)["bias"]}

    run = train(
        weights,
        only_bias,
        reference.SGD(weight_decay=0.1),
        lr=0.1,
        steps=3,
        shrink=Shrink(0.1),
        rescale=Rescale(1),
    )
    assert torch.equal(run[-1]["conv"], weights["conv"])
    assert not torch.equal(run[-1]["bias"], weights["bias"])
