"""What is done for a step that never happens: taken back, over checkpoints too, and never done
twice."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normdyn import Partition, Phase, StepBracket, WeightVectors
from lightning_normdyn.optimizers.scaling import RoundedScaling, Scaling, Statistics, put_back
from lightning_normdyn.optimizers.step import Step


class FailsOnce(torch.optim.SGD):
    """Raises in the middle of a step, before the weights with these numbers and all behind them are
    written."""

    fails_before: int | None = None

    def _init_group(self, group: Any, *lists: Any) -> Any:
        if self.fails_before is not None and self.param_groups[self.fails_before] is group:
            self.fails_before = None
            raise RuntimeError("out of memory")
        return super()._init_group(group, *lists)


def shrinking(
    optimizer: Any, weights: list[nn.Parameter], factor: float = 0.5
) -> tuple[StepBracket, list[int]]:
    """A bracket that halves all weights before every step, and the numbers of the steps in which it
    did."""
    vectors = WeightVectors(weights, [Partition.filters(tuple(w.shape)) for w in weights])
    bracket, shrunk = StepBracket.of(optimizer), []

    def shrink(step: Step) -> None:
        shrunk.append(step.number)
        step.scale(Scaling(vectors, torch.full((vectors.n,), factor, dtype=torch.float64)))

    bracket.add(Phase.SHRINK, shrink)
    return bracket, shrunk


def two(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype))
        for _ in range(2)
    ]


def made(**options: Any) -> tuple[FailsOnce, list[nn.Parameter], StepBracket, list[int]]:
    weights = two()
    optimizer = FailsOnce([{"params": [w]} for w in weights], lr=0.1, momentum=0.9, **options)
    return optimizer, weights, *shrinking(optimizer, weights)


def backward(weights: list[nn.Parameter], seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for w in weights:
        w.grad = scale * torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.dtype)


def untroubled(steps: int, **options: Any) -> list[torch.Tensor]:
    optimizer, weights, *_ = made(**options)
    for seed in range(steps):
        backward(weights, seed)
        optimizer.step()
    return [w.detach().clone() for w in weights]


def fail(optimizer: FailsOnce, before: int = 0, closure: Any = None) -> None:
    optimizer.fails_before = before
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step() if closure is None else optimizer.step(closure)


def test_a_step_that_is_tried_again_equals_an_untroubled_one_bit_by_bit():
    optimizer, weights, bracket, shrunk = made()
    backward(weights)
    fail(optimizer)
    fail(optimizer)
    optimizer.step()
    backward(weights, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, untroubled(2), strict=True))
    assert shrunk == [1, 2]
    assert bracket.steps == 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_with_new_gradients_the_weights_are_put_back_first(set_to_none):
    optimizer, weights, bracket, shrunk = made()
    backward(weights, 7)
    fail(optimizer)
    assert torch.allclose(weights[0].detach(), 0.5 * two()[0].detach())
    optimizer.zero_grad(set_to_none=set_to_none)
    # Taken at half the weight, the gradient of a scale-invariant loss is twice as long.
    for w, g in zip(weights, gradients_of_seed_0(), strict=True):
        w.grad = 2 * g if set_to_none else w.grad.add_(2 * g)
    optimizer.step()
    assert all(
        torch.allclose(a, b, rtol=1e-14, atol=1e-15)
        for a, b in zip(weights, untroubled(1), strict=True)
    )
    assert shrunk == [1, 1]
    assert bracket.steps == 1


def gradients_of_seed_0() -> list[torch.Tensor]:
    weights = two()
    backward(weights)
    return [w.grad for w in weights if w.grad is not None]


def test_a_closure_finds_the_weights_put_back():
    optimizer, weights, _, shrunk = made()
    seen = []

    def closure() -> None:
        seen.append(weights[0].detach().clone())
        backward(weights)

    fail(optimizer, closure=closure)
    optimizer.step(closure)
    assert torch.allclose(seen[1], seen[0], rtol=1e-15)
    assert all(
        torch.allclose(a, b, rtol=1e-14, atol=1e-15)
        for a, b in zip(weights, untroubled(1), strict=True)
    )
    assert shrunk == [1, 1]


def test_only_weights_that_were_not_stepped_are_put_back():
    optimizer, weights, *_ = made()
    backward(weights)
    fail(optimizer, before=1)  # the first weight has been stepped
    first, second = (w.detach().clone() for w in weights)
    StepBracket.of(optimizer).take_back()
    assert torch.equal(weights[0], first)
    assert torch.equal(weights[1], 2 * second)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_another_rate_is_no_repetition(key):
    optimizer, weights, _, shrunk = made()
    backward(weights)
    fail(optimizer)
    optimizer.param_groups[0][key] = 0.05
    optimizer.step()
    assert shrunk == [1, 1]


class LetsGo(FailsOnce):
    """A step that is done with a gradient lets go of it, to have its memory."""

    freed: tuple[bool, ...] = ()

    def step(self, closure: Any = None) -> None:
        if self.fails_before is not None:
            self.fails_before = None
            raise RuntimeError("out of memory")
        left = references(self.param_groups[0]["params"])
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(weight.grad, alpha=-group["lr"])
                weight.grad = None
        self.freed = gone(left)


def references(weights: list[nn.Parameter]) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(w.grad) for w in weights if w.grad is not None]


def gone(left: list[weakref.ref[torch.Tensor]]) -> tuple[bool, ...]:
    return tuple(reference() is None for reference in left)


@pytest.mark.parametrize("kind", [FailsOnce, LetsGo])
def test_gradients_are_not_kept_alive_by_a_failed_step(kind):
    weights = two()
    optimizer = kind([{"params": [w]} for w in weights], lr=0.1)
    bracket, _ = shrinking(optimizer, weights)
    backward(weights)
    left = references(weights)
    fail(optimizer)
    assert bracket.unfinished
    assert gone(left) == (False, False)
    optimizer.zero_grad()
    assert gone(left) == (True, True)


def test_gradients_are_not_kept_alive_by_a_step_that_lets_go_of_them():
    weights = two()
    optimizer = LetsGo([{"params": [w]} for w in weights], lr=0.1)
    shrinking(optimizer, weights)
    backward(weights)
    optimizer.step()
    assert optimizer.freed == (True,)


def test_gradients_are_not_kept_alive_by_who_keeps_what_was_scaled():
    optimizer, weights, bracket, _ = made()
    kept: list[Scaling] = []
    bracket.add(Phase.SNAPSHOT, lambda step: kept.extend(step.scalings))
    backward(weights)
    left = references(weights)
    optimizer.step()
    optimizer.zero_grad()
    assert len(kept) == 1
    assert gone(left) == (True, True)


def test_notes_and_undos_of_a_failed_step():
    weights = two()
    optimizer, events = FailsOnce([{"params": [w]} for w in weights], lr=0.1), []
    bracket = StepBracket.of(optimizer)

    def act(step: Step) -> None:
        step.undo_with(lambda: events.append("undone"))
        step.when_done(lambda: events.append("done"))

    bracket.add(Phase.SHRINK, act)
    backward(weights)
    fail(optimizer)
    assert events == []
    backward(weights)
    optimizer.step()
    assert events == ["undone", "done"]


def with_everything(
    factor: float,
) -> tuple[Scaling, list[nn.Parameter], nn.BatchNorm1d, dict[Any, Any]]:
    weights, norm = two(), nn.BatchNorm1d(3, dtype=torch.float64)
    norm.running_mean.normal_()
    state = {w: {"exp_avg": torch.ones_like(w), "exp_avg_sq": torch.ones_like(w)} for w in weights}
    vectors = WeightVectors(weights, [Partition.filters((3, 4))] * 2)
    statistics = Statistics(
        "norm",
        norm,
        1,
        torch.full((3,), factor, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
    )
    backward(weights)
    scaling = Scaling(
        vectors,
        torch.full((6,), factor, dtype=torch.float64),
        states=[state[weight] for weight in weights],
        exponents={"exp_avg": -1.0, "exp_avg_sq": -2.0, "not there": -1.0},
        gradients=True,
        statistics=[statistics],
    )
    return scaling, weights, norm, state


def everything(weights: Any, norm: nn.BatchNorm1d, state: Any) -> list[torch.Tensor]:
    buffers = [v for w in weights for v in state[w].values()]
    return [t.detach().clone() for t in (*weights, *buffers, norm.running_mean, norm.running_var)]


def test_state_statistics_and_gradients_follow_there_and_back():
    scaling, weights, norm, state = with_everything(0.25)
    before, gradients = everything(weights, norm, state), [w.grad.clone() for w in weights]
    scaling.apply()
    scaling.seal()
    assert torch.equal(weights[0].grad, 4 * gradients[0])
    assert torch.equal(
        state[weights[0]]["exp_avg_sq"], torch.full((3, 4), 16.0, dtype=torch.float64)
    )
    scaling.judge()
    scaling.take_back(gradients_count=True)
    assert all(
        torch.allclose(a, b, rtol=1e-14)
        for a, b in zip(everything(weights, norm, state), before, strict=True)
    )
    assert torch.equal(weights[0].grad, gradients[0])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", range(7))
def test_a_checkpoint_in_the_middle_of_a_scaling_says_what_has_been_done(after, monkeypatch):
    """At every moment between two writes: what is put back is what had been multiplied."""
    scaling, weights, norm, state = with_everything(0.25)
    before, writes = everything(weights, norm, state), []
    scale_ = WeightVectors.scale_

    def counted(self: Any, factor: Any, tensors: Any = None) -> None:
        for i, value in enumerate(self.values() if tensors is None else tensors):
            if len(writes) == after:
                raise Interrupted
            writes.append(i)
            value.mul_(factor[self.slices[i]][:, None])

    monkeypatch.setattr(WeightVectors, "scale_", counted)
    with contextlib.suppress(Interrupted):
        scaling.apply()
    monkeypatch.setattr(WeightVectors, "scale_", scale_)
    names = ["first", "second"]
    saved = scaling.state(names)
    assert saved == {} if after == 0 else set(saved["weights"]) == set(names[:after])
    module = nn.ModuleDict({"norm": norm})
    optimizer = torch.optim.SGD(weights, lr=0.1)
    optimizer.state.update(state)
    assert put_back(saved, dict(zip(names, weights, strict=True)), [optimizer], module) == []
    assert all(
        torch.allclose(a, b, rtol=1e-14)
        for a, b in zip(everything(weights, norm, state), before, strict=True)
    )


def test_what_does_not_fit_the_model_is_named_and_left_alone():
    scaling, weights, norm, _ = with_everything(0.25)
    scaling.apply()
    saved = scaling.state(["first", "second"])
    other, left = nn.Parameter(torch.ones(2, 2)), nn.ModuleDict({"norm": nn.BatchNorm1d(5)})
    assert put_back(saved, {"first": other}, [], left) == ["first", "second", "norm"]
    assert torch.equal(other, torch.ones(2, 2))
    saved["weights"]["first"]["factor"] = torch.zeros(3)
    assert put_back(
        saved, {"first": weights[0], "second": weights[1]}, [], nn.ModuleDict({"norm": norm})
    ) == ["first"]


def test_what_rounding_would_swallow_is_owed_back():
    weights = two(torch.bfloat16)
    vectors = WeightVectors(weights, [Partition.filters((3, 4))] * 2)
    factor, owed = torch.full((6,), 0.9999, dtype=torch.float64), torch.full((6,), 0.999)
    before = [w.detach().clone() for w in weights]
    scaling = RoundedScaling(vectors, factor, owed)
    scaling.apply()
    scaling.seal()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    saved = scaling.state(["first", "second"])
    assert put_back(saved, {"first": weights[0], "second": weights[1]}, [], nn.Module()) == []
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    scaling.take_back()
    assert torch.allclose(scaling.owed, owed, rtol=1e-6)


# ---- Steps that are none, and gradients that do not stay ----


def test_a_step_without_any_gradient_is_no_step():
    optimizer, weights, bracket, shrunk = made()
    optimizer.step()
    backward(weights[:1])
    weights[1].grad = None
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert bracket.steps == 1
    assert shrunk == [1]


class FreesGradients(torch.optim.SGD):
    """Hands every gradient back as soon as it is used."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        return loss


def test_which_weights_have_gradients_is_fixed_at_ready():
    weights = two()
    optimizer, seen = FreesGradients(weights, lr=0.1), []
    vectors = WeightVectors(weights, [Partition.filters((3, 4))] * 2)
    StepBracket.of(optimizer).add(
        Phase.RESCALE, lambda step: seen.append(vectors.has_gradient(step))
    )
    backward(weights[:1])
    optimizer.step()
    backward(weights)
    optimizer.step()
    assert seen == [(True, False), (True, True)]
