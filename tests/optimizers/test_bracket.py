"""The bracket around an optimizer step: when it fires, in which order, what it hides, and that
nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import reference
import torch
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision
from models import backward, convnet, distance, images, same, weight_and_sgd, weights_of
from torch import nn

from lightning_normdyn import (
    DecayOwner,
    NotSupportedError,
    Partition,
    Phase,
    StepBracket,
    WeightVectors,
)
from lightning_normdyn.functional import shrink_factor
from lightning_normdyn.optimizers.step import Step

# ---- When, and in which order ----


def test_ready_sees_the_old_weight_and_stepped_the_new_one():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    bracket.add(
        Phase.MEASURE, lambda step: seen.append(("ready", step.number, float(weight[0, 0])))
    )
    bracket.add(
        Phase.MEASURE_STEP,
        lambda step: seen.append(("stepped", step.number, round(float(weight[0, 0]), 6))),
    )
    for _ in range(2):
        backward(weight)
        optimizer.step()
    assert seen == [
        ("ready", 1, 1.0),
        ("stepped", 1, 0.9),
        ("ready", 2, pytest.approx(0.9)),
        ("stepped", 2, 0.8),
    ]
    assert bracket.steps == 2


@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_is_run_before_ready(positional):
    weight, optimizer = weight_and_sgd()
    seen = []
    StepBracket.of(optimizer).add(Phase.MEASURE, lambda step: seen.append("ready"))

    def closure():
        seen.append("closure")
        backward(weight)
        return torch.tensor(3.0)

    loss = optimizer.step(closure) if positional else optimizer.step(closure=closure)
    assert seen == ["closure", "ready"]
    assert float(loss) == 3.0
    assert float(weight.detach()[0, 0]) == pytest.approx(0.9)


def test_a_handler_added_while_resolving_acts_in_that_step():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []

    def resolve(step: Step) -> None:
        if step.number == 1:
            bracket.add(Phase.SHRINK, lambda step: seen.append(step.number))

    bracket.add(Phase.RESOLVE, resolve)
    for _ in range(2):
        backward(weight)
        optimizer.step()
    assert seen == [1, 2]


def test_gradients_are_not_needed_and_nothing_records_a_graph():
    weight, optimizer = weight_and_sgd()
    modes = []
    StepBracket.of(optimizer).add(Phase.MEASURE, lambda step: modes.append(torch.is_grad_enabled()))
    StepBracket.of(optimizer).add(Phase.RESCALE, lambda step: modes.append(torch.is_grad_enabled()))
    optimizer.step(lambda: weight.sum().backward())
    assert modes == [False, False]


def test_hooks_of_others_run_outside_the_bracket():
    # The last word before the update and the first after it, whoever registered when: an earlier
    # hook may still change gradients.
    weight, optimizer = weight_and_sgd()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("their pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("their post"))
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: seen.append("ready"))
    bracket.add(Phase.RESCALE, lambda step: seen.append("stepped"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("their later pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("their later post"))
    for _ in range(2):
        backward(weight)
        optimizer.step()
    assert seen[-6:] == [
        "their pre",
        "their later pre",
        "ready",
        "stepped",
        "their post",
        "their later post",
    ]


# ---- Which optimizers ----


def test_an_optimizer_that_turns_out_to_call_its_closure_twice_is_refused_before_it_steps():
    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            closure()
            return super().step()

    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Twice([weight], lr=0.1, weight_decay=0.5)
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.SHRINK, lambda step: None)
    bracket.claim_decay("me", DecayOwner.SHRINK, {weight})
    groups = optimizer.param_groups
    with pytest.raises(NotSupportedError, match="Twice evaluates its closure more than once"):
        optimizer.step(lambda: backward(weight))
    assert torch.equal(weight.detach(), torch.ones(2, 2))
    assert optimizer.param_groups is groups


class Clamps(torch.optim.SGD):
    """An optimizer as people write them: something before, the step of its base class, something
    after."""

    fails = ""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        if self.fails == "before":
            raise RuntimeError("before")
        super().step()
        if self.fails == "after":
            raise RuntimeError("after")
        for group in self.param_groups:
            for p in group["params"]:
                p.data.clamp_(max=2.0)
        return loss


@pytest.mark.parametrize("fails", ["", "before", "after"])
@pytest.mark.parametrize("with_closure", [True, False])
def test_a_subclass_that_calls_its_base_class_steps_once(with_closure, fails):
    weight = weight_and_sgd()[
        0
    ]  # SGD was used before: torch now calls hooks for the step of both classes
    optimizer, seen = Clamps([weight], lr=0.5), []
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.SHRINK, lambda step: seen.append(("ready", step.number, float(weight.max()))))
    bracket.add(
        Phase.RESCALE, lambda step: seen.append(("stepped", step.number, float(weight.max())))
    )

    def step():
        if with_closure:
            optimizer.step(lambda: backward(weight))
        else:
            backward(weight)
            optimizer.step()

    if fails:
        optimizer.fails = fails
        with pytest.raises(RuntimeError, match=fails):
            step()
        optimizer.fails = ""
        assert [event[:2] for event in seen] == [("ready", 1)]
        seen.clear()
        step()
        assert [event[:2] for event in seen] == [("ready", 1), ("stepped", 1)]
        assert bracket.steps == 1
    else:
        step()
        step()
        assert seen == [
            ("ready", 1, 6.0),
            ("stepped", 1, 2.0),
            ("ready", 2, 2.0),
            ("stepped", 2, 1.5),
        ]


def test_one_bracket_per_optimizer():
    (_, first), (_, second) = weight_and_sgd(), weight_and_sgd()
    assert StepBracket.of(first) is StepBracket.of(first)
    assert StepBracket.of(first) is not StepBracket.of(second)


# ---- Leaving ----


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_the_last_handler_to_go_takes_the_hooks_along():
    weight, optimizer = weight_and_sgd()
    assert hooks(optimizer) == 0
    bracket, seen = StepBracket.of(optimizer), []
    remove_first = bracket.add(Phase.MEASURE, lambda step: seen.append(1))
    remove_second = bracket.add(Phase.MEASURE, lambda step: seen.append(2))
    assert hooks(optimizer) == 2
    remove_first()
    remove_first()
    assert hooks(optimizer) == 2
    remove_second()
    assert hooks(optimizer) == 0
    backward(weight)
    optimizer.step()
    assert seen == []


def test_a_bracket_can_be_used_again_and_is_still_the_only_one():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    bracket.add(Phase.MEASURE, seen.append)()
    bracket.add(Phase.MEASURE, seen.append)
    assert StepBracket.of(optimizer) is bracket
    backward(weight)
    optimizer.step()
    assert len(seen) == 1


def test_neither_optimizer_nor_bracket_outlives_the_other():
    _weight, optimizer = weight_and_sgd()
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    gone = weakref.ref(optimizer), weakref.ref(bracket)
    del optimizer, bracket
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None


# ---- Snapshots ----


# ---- Decay take-over ----


# ---- Counting ----


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, weight: nn.Parameter, bad: bool
) -> None:
    optimizer.zero_grad()
    scaler.scale(weight.sum() * (float("inf") if bad else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_counted(fused):
    weight, optimizer = weight_and_sgd(fused=fused)
    bracket, numbers, factors = StepBracket.of(optimizer), [], []

    def look(step: Step) -> None:
        numbers.append(step.number)
        factors.append(step.unless_skipped(torch.tensor([0.5]), 1.0).item())

    bracket.add(Phase.SHRINK, look)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (True, False, True, True, False):
        scaled_step(scaler, optimizer, weight, bad)
    bracket.settle()
    assert bracket.steps == 2
    # Without a fused kernel a skipped step never gets here; with one it comes masked, under the
    # number of the next real one.
    assert numbers == ([1, 1, 2, 2, 2] if fused else [1, 2])
    assert factors == ([1.0, 0.5, 1.0, 1.0, 0.5] if fused else [0.5, 0.5])


def test_a_step_taken_before_the_bracket_does_not_count():
    weight, optimizer = weight_and_sgd()
    backward(weight)
    optimizer.step()
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    backward(weight)
    optimizer.step()
    assert bracket.steps == 1


# ---- Loops without a Trainer ----


def shrink_with(bracket: StepBracket, module: nn.Module, alpha: float) -> None:
    """AWS as the README shows it, with the learning rate of the step."""
    weights = [p for p in module.parameters() if p.ndim > 1]
    vectors = WeightVectors(weights, [Partition.filters(tuple(w.shape)) for w in weights])
    bracket.add(
        Phase.SHRINK,
        lambda step: vectors.scale_(
            shrink_factor(vectors.norms(), step.optimizer.param_groups[0]["lr"], alpha)
        ),
    )
    bracket.claim_decay("me", DecayOwner.SHRINK, set(weights))


def naive(
    net: nn.Module, optimizer: Any, loss: Any, lr: float, steps: int
) -> dict[str, torch.Tensor]:
    def at(weights: dict[str, torch.Tensor], t: int) -> torch.Tensor:
        return loss(lambda x: torch.func.functional_call(net, weights, (x,)), t)

    return reference.train(
        weights_of(net),
        reference.gradients_of(at),
        optimizer,
        lr=lr,
        steps=steps,
        shrink=reference.Shrink(0.5),
    )[-1]


def loss_at(forward: Any, t: int) -> torch.Tensor:
    x, y = (tensor[8 * (t % 4) : 8 * (t % 4) + 8] for tensor in images().tensors)
    return nn.functional.cross_entropy(forward(x), y)


@pytest.mark.parametrize("with_closure", [True, False])
def test_a_plain_loop(with_closure):
    torch.manual_seed(1)
    net = convnet().double()
    expected = naive(net, reference.AdamW(weight_decay=0.2), loss_at, lr=0.02, steps=8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.2)
    shrink_with(StepBracket.of(optimizer), net, 0.5)
    for t in range(8):

        def closure(t: int = t) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_at(net, t)
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert distance(weights_of(net), expected) < 1e-12


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_fabric_loop(wrapped):
    torch.manual_seed(1)
    net = convnet().double()
    expected = naive(net, reference.SGD(momentum=0.9, weight_decay=0.2), loss_at, lr=0.1, steps=8)
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    model, optimizer = fabric.setup(net, plain)
    bracket = StepBracket.of(
        optimizer if wrapped else plain
    )  # either: what Fabric gives back is only a wrapper
    shrink_with(bracket, net, 0.5)
    for t in range(8):
        optimizer.zero_grad()
        fabric.backward(loss_at(model, t))
        optimizer.step()
    assert bracket.steps == 8
    assert distance(weights_of(net), expected) < 1e-12


def test_fabric_with_a_gradient_scaler_skips_as_if_the_batch_had_not_been():
    def go(batches: list[int | None]) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4, bias=False), nn.LayerNorm(4))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        fabric = Fabric(
            accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
        )
        model, optimizer = fabric.setup(
            net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.2)
        )
        bracket = StepBracket.of(optimizer)
        shrink_with(bracket, net, 0.5)
        for t in batches:
            optimizer.zero_grad()
            loss = loss_at(lambda x: model(x.float()), t or 0)
            fabric.backward(loss * (float("inf") if t is None else 1.0))
            optimizer.step()
        return weights_of(net), bracket.steps

    skipping, steps = go([None, 0, 1, None, 2])
    straight, _ = go([0, 1, 2])
    assert steps == 3
    assert same(skipping, straight)


def test_who_reads_the_weights_may_take_the_snapshot_early():
    weights = first, second = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    bracket, seen = StepBracket.of(optimizer), []

    def look(step):
        assert not bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
        (memory,) = bracket.early_snapshot([first], [first.data])
        memory.copy_(first)
        bracket.request_snapshot(
            {first: torch.zeros_like(first), second: second.data}
        )  # the first is not copied again
        (again,) = bracket.early_snapshot([first], [first.data])
        assert again is memory
        if step.number == 2:
            raise RuntimeError("a handler fails")

    bracket.add(Phase.MEASURE, look)
    bracket.add(
        Phase.MEASURE_STEP, lambda step: seen.append([bracket.snapshot(w).clone() for w in weights])
    )
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        backward(weight)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))
    with pytest.raises(RuntimeError, match="a handler fails"):
        optimizer.step()
    bracket.add(Phase.SHRINK, lambda step: None)
    assert bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
    assert not bracket.acts_between(Phase.SNAPSHOT, Phase.MEASURE_STEP)
    bracket.add(Phase.PROJECT, lambda step: None, rank=1)
    assert bracket.acts_between(Phase.SNAPSHOT, Phase.PROJECT, before_rank=2)
    assert not bracket.acts_between(Phase.SNAPSHOT, Phase.PROJECT, before_rank=1)
    assert not bracket.acts_between(Phase.SNAPSHOT, Phase.PROJECT)


def test_a_snapshot_is_of_the_shrunk_weight_and_of_this_step_only():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    bracket.add(
        Phase.MEASURE,
        lambda step: bracket.request_snapshot({weight: weight.data}) if step.number == 1 else None,
    )
    bracket.add(Phase.SHRINK, lambda step: weight.mul_(0.5))
    bracket.add(
        Phase.MEASURE_STEP,
        lambda step: seen.append(bracket.snapshot(weight).clone()) if step.number == 1 else None,
    )
    before = weight.detach().clone()
    backward(weight)
    optimizer.step()
    assert torch.equal(seen[0], 0.5 * before)
    with pytest.raises(KeyError):
        bracket.snapshot(weight)
