"""How an optimizer behaves of which nobody has read the step: tried on scratch weights, before
training.

Three questions: does it step exactly as a class that is known (a subclass that only logs around
``super().step()``); does a take-over take
exactly its weight decay away, and of which kind is that decay; does it set weights back to
something that it remembers, so that what a
callback does to them is undone (schedule-free, Lookahead, dual averaging).

Each takes a few dozen steps of weights with a few numbers (`lightning_normdyn.optimizers.scratch`).
Exceptions of the optimizer mean "not
known" and never reach the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.optimizers.facts import DecayLaw
from lightning_normdyn.optimizers.group_numbers import Number, group_number
from lightning_normdyn.optimizers.scratch import (
    CannotTryError,
    ScratchOptimizer,
    Start,
    seed_generators,
)
from lightning_normdyn.optimizers.step_view import show, split_groups, view_class, view_of

RateOf: TypeAlias = Callable[[Optimizer, Mapping[str, Any], Tensor], "Number | None"]

_LR = 0.02
# Enough for momentum and bias corrections to matter, and for a slow copy that is visited every 5 or
# 6 steps.
_STEPS = 13
# By the first of these that changes a weight visibly: D-Adaptation starts with rates of 1e-6.
_DECAYS = (0.1, 1e2, 1e5, 1e8)
_VISIBLE = 1e-4
# What nobody would write: an optimizer that keeps a copy of its first decay must not happen to
# agree.
_ODD_DECAY = 0.1037
# A kind of decay must explain its effect up to this share.
_EXPLAINED = 1e-3
# A change from outside that shrinks below this share is being undone.
_KEPT = 0.8


@dataclass(frozen=True)
class DecayTrial:
    """What a trial says about an optimizer's weight decay.

    Args:
        refusal: why its decay cannot be taken over; None: the take-over is exact.
        law: how it decays; None if it is in none of the known ways.
    """

    refusal: str | None
    law: DecayLaw | None = None


def try_decay(optimizer: Optimizer, rate_of: RateOf) -> DecayTrial:
    """Whether a take-over takes exactly the weight decay of single weights away, and of which kind
    the decay is.

    Args:
        optimizer: of any class; it is left as it is.
        rate_of: the rate of the next step of a weight, for comparison.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
        >>> try_decay(adamw, lambda optimizer, group, weight: group["lr"])
        DecayTrial(refusal=None, law=DecayLaw(kind='decoupled', pace='rate'))
    """
    others = _other_decays(optimizer)
    if others:
        return DecayTrial(f"it has another weight decay ({', '.join(others)})")
    return _tried(
        lambda start: _try_decay(optimizer, rate_of, start), lambda reason: DecayTrial(reason)
    )


def _try_decay(optimizer: Optimizer, rate_of: RateOf, start: Start) -> DecayTrial:
    with ScratchOptimizer.untouched(optimizer):
        without = _run(ScratchOptimizer(optimizer, weight_decay=0.0, lr=_LR, start=start))
        for decay in _DECAYS:
            decayed = _run(ScratchOptimizer(optimizer, weight_decay=decay, lr=_LR, start=start))
            effect = max(_distance(decayed[-1], without[-1]), default=0.0)
            if effect > _VISIBLE:
                break
        else:
            return DecayTrial("a change of weight_decay in its param group changes nothing")

        scratch = ScratchOptimizer(optimizer, weight_decay=decay, lr=_LR, start=start)
        is_taken = [any(weight is taken for taken in scratch.taken) for weight in scratch.weights]
        taken = _run(scratch, take_over=True)
        for number, values in enumerate(taken):
            right = [
                _choose(*both)
                for both in zip(is_taken, without[number], decayed[number], strict=True)
            ]
            if not all(torch.equal(a, b) for a, b in zip(values, right, strict=True)):
                return DecayTrial(
                    "a trial on scratch weights shows that it does not take weight_decay from its "
                    "param group alone"
                )
        law = _law_of_decay(optimizer, rate_of, decay, start)
    return DecayTrial(None, law)


def _choose(is_taken: bool, without: Tensor, decayed: Tensor) -> Tensor:
    return without if is_taken else decayed


def _other_decays(optimizer: Optimizer) -> list[str]:
    """Keys of further weight decays, which a take-over would leave in place."""
    found: dict[str, None] = {}
    for group in optimizer.param_groups:
        for key in group:
            number = group_number(group, key)
            if key.startswith("weight_decay_") and not (isinstance(number, float) and number == 0):
                found[key] = None
    return list(found)


def _law_of_decay(
    optimizer: Optimizer, rate_of: RateOf, decay: float, start: Start
) -> DecayLaw | None:
    """Which of the known laws gives the same weights when it is applied by hand to an optimizer
    without decay."""
    # In low precision the kinds could not be told apart.
    dtype = torch.float32
    if all(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"]):
        dtype = torch.float64

    def scratch(weight_decay: float) -> ScratchOptimizer:
        return ScratchOptimizer(
            optimizer, weight_decay=weight_decay, lr=_LR, dtype=dtype, start=start
        )

    without, decayed = _run(scratch(0.0)), _run(scratch(decay))
    by_hand: dict[DecayLaw, Callable[[ScratchOptimizer], None]] = {
        DecayLaw("decoupled", "rate"): lambda s: _shrink(s, decay, rate_of),
        DecayLaw("decoupled", "lr"): lambda s: _shrink(s, decay, _written_lr),
        DecayLaw("decoupled", "step"): lambda s: _shrink(s, decay, _once),
        DecayLaw("coupled"): lambda s: _add_to_gradients(s, decay),
    }
    for law, apply in by_hand.items():
        try:
            tried = _run(scratch(0.0), apply)
        except _UnknownRateError:
            continue
        if _explains(tried, without, decayed):
            return law
    return None


def _written_lr(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number:
    return group_number(group, "lr")


def _once(optimizer: Optimizer, group: Mapping[str, Any], weight: Tensor) -> Number:
    return 1.0


class _UnknownRateError(Exception):
    """Nobody can tell the rate of a scratch weight."""


@torch.no_grad()
def _shrink(scratch: ScratchOptimizer, decay: float, rate_of: RateOf) -> None:
    for group in scratch.groups:
        for weight in group["params"]:
            rate = rate_of(scratch.optimizer, group, weight)
            if rate is None:
                raise _UnknownRateError
            weight.mul_(1 - rate * decay)


@torch.no_grad()
def _add_to_gradients(scratch: ScratchOptimizer, decay: float) -> None:
    for group in scratch.groups:
        sign = -1.0 if group.get("maximize") else 1.0
        for weight in group["params"]:
            assert weight.grad is not None
            weight.grad.add_(weight, alpha=sign * decay)


def _explains(
    tried: list[list[Tensor]], without: list[list[Tensor]], decayed: list[list[Tensor]]
) -> bool:
    """Whether a run by hand moves weights as the decay does, where that does anything; matrices
    count if there are any."""
    matrices = [i for i, weight in enumerate(without[0]) if weight.dim() >= 2] or list(
        range(len(without[0]))
    )
    visible = 0
    for a, b, c in zip(tried, without, decayed, strict=True):
        for i in matrices:
            effect, rest = (c[i] - b[i]).abs().max(), (a[i] - c[i]).abs().max()
            if effect <= _VISIBLE * b[i].abs().max():
                continue
            visible += 1
            if not rest <= _EXPLAINED * effect:
                return False
    return visible > 0


def steps_as(optimizer: Optimizer, known: type[Optimizer]) -> str | None:
    """Why the step of ``optimizer`` is not that of its base class ``known``; None if a trial shows
    that it is, state and all.

    Example:
        >>> class Logging(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> steps_as(Logging([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1), torch.optim.SGD) is None
        True
    """
    return _tried(lambda start: _compare_with(optimizer, known, start), lambda reason: reason)


def _compare_with(optimizer: Optimizer, known: type[Optimizer], start: Start) -> str | None:
    with ScratchOptimizer.untouched(optimizer):
        # With a decay, and with a rate that is not 0 as at the start of a warmup.
        has_decay = any(
            group_number(group, "weight_decay") != 0 for group in optimizer.param_groups
        )
        decay = _ODD_DECAY if has_decay else None
        own = ScratchOptimizer(optimizer, weight_decay=decay, lr=_LR, start=start)
        base = ScratchOptimizer(optimizer, kind=known, weight_decay=decay, lr=_LR, start=start)
        # Under a take-over, as it will have to step: one that decays by a number of its own is
        # found out by the weights that are taken.
        if not _equal(_run(own, take_over=has_decay), _run(base, take_over=has_decay)):
            return f"its step is its own, and differs from that of {known.__name__} in a trial on scratch weights"
        states = zip(
            (own.optimizer.state[w] for w in own.weights),
            (base.optimizer.state[w] for w in base.weights),
            strict=True,
        )
        if own.optimizer.state.keys() - set(own.weights) or not all(
            _same_state(a, b) for a, b in states
        ):
            return f"its step is its own, and keeps other state than that of {known.__name__} in a trial on scratch weights"
        gradients = zip(own.weights, base.weights, strict=True)
        if not all(_same_tensor(a.grad, b.grad) for a, b in gradients):
            return f"its step is its own, and leaves other gradients than that of {known.__name__} in a trial on scratch weights"
        for group, reference in zip(own.groups, base.groups, strict=True):
            if not _same_state({**group, "params": None}, {**reference, "params": None}):
                return f"its step is its own, and writes other things into its param groups than that of {known.__name__}"
    return None


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same_state(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _same_tensor(a, b)
    return bool(a == b)


def _same_tensor(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is None and b is None
    return a.dtype == b.dtype and torch.equal(a, b)


def remembers_weights(optimizer: Optimizer) -> float | None:
    """How much of a change made to the weights from outside is left a dozen steps later; None if
    that cannot be tried.

    1: the optimizer steps from wherever a weight is. Less: it sets weights back to something that
    it remembers (a slow copy, the starting
    point of a dual averaging), and what a callback does to a weight is undone.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, momentum=0.9)
        >>> round(remembers_weights(sgd), 3)
        1.0
    """
    return _tried(lambda start: _share_left(optimizer, start), lambda reason: None)


def undoes_changes(share_left: float | None) -> bool:
    """Whether so little of a change is left (`remembers_weights`) that writing to the weights makes
    no sense; not if nobody knows."""
    return share_left is not None and not _KEPT <= share_left <= 2 - _KEPT


def _share_left(optimizer: Optimizer, start: Start) -> float:
    with ScratchOptimizer.untouched(optimizer):
        # Small steps: a step that depends on the size of its weight must not look like a memory.
        undisturbed = _run(
            ScratchOptimizer(optimizer, weight_decay=0.0, lr=_LR / 20, start=start),
            steps=_STEPS + 3,
        )
        calls = 0

        def disturb(scratch: ScratchOptimizer) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                for weight in scratch.weights:
                    weight.data.mul_(1.5)

        disturbed = _run(
            ScratchOptimizer(optimizer, weight_decay=0.0, lr=_LR / 20, start=start),
            disturb,
            steps=_STEPS + 3,
        )
        shares = []
        for before, a, b in zip(undisturbed[2], undisturbed[-1], disturbed[-1], strict=True):
            change = 0.5 * before.double()
            left = (b.double() - a.double()).mul(change).sum() / change.square().sum()
            shares.append(float(left))
    # The weight that is furthest from keeping its change decides; NaN counts as far.
    return max(shares, key=lambda share: abs(share - 1) if share == share else float("inf"))


# ------------------------------------------------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------------------------------------------------


_T = TypeVar("_T")


def _tried(attempt: Callable[[Start], _T], failed: Callable[[str], _T]) -> _T:
    """``attempt`` with an optimizer as it is before its first step; if its step needs what only a
    real one has, with some of that."""
    reason = ""
    starts: tuple[Start, ...] = ("new", "with state", "as it is")
    for start in starts:
        try:
            return attempt(start)
        except CannotTryError as error:
            reason = reason or str(error)
    return failed(f"its step cannot be tried on scratch weights ({reason})")


def _run(
    scratch: ScratchOptimizer,
    before_step: Callable[[ScratchOptimizer], None] | None = None,
    *,
    take_over: bool = False,
    steps: int = _STEPS,
) -> list[list[Tensor]]:
    """The weights after each step.

    Args:
        scratch: a fresh one.
        before_step: called when the gradients are there.
        take_over: whether each step sees the first weight of each pair without decay, exactly as a
            take-over shows it.
        steps: how many.
    """
    seed_generators(scratch.weights[0].device)
    course = []
    for number in range(steps):
        scratch.set_gradients(number)
        if before_step is not None:
            before_step(scratch)
        scratch.step(_view(scratch) if take_over else None)
        course.append(scratch.values())
    if not all(bool(torch.isfinite(weight).all()) for weight in course[-1]):
        raise CannotTryError("its scratch weights are not finite")
    return course


def _view(scratch: ScratchOptimizer) -> Optimizer:
    made = view_class(scratch.kind)
    if made is None:
        raise CannotTryError("nothing can be derived from its class")
    view = view_of(scratch.optimizer, made)

    def split(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
        return split_groups(groups, set(scratch.taken))

    groups = scratch.optimizer.param_groups
    show(view, split, groups, split(groups) or groups)
    return view


def _equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(x, y)
        for now, then in zip(a, b, strict=True)
        for x, y in zip(now, then, strict=True)
    )


def _distance(a: list[Tensor], b: list[Tensor]) -> list[float]:
    """By how much each weight of ``a`` differs from that of ``b``, relative to its size."""
    return [
        float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True) if y.numel()
    ]
