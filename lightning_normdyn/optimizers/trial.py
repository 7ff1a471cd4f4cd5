"""How an optimizer behaves of which nobody has read the step: tried on scratch weights.

Three questions are asked before training. Does it step exactly as a class that is known (a subclass
that only logs around ``super().step()``)? Does a take-over take exactly its weight decay away, and
of which kind is that decay? Does it set weights back to something that it remembers, so that what a
callback does to them is undone (schedule-free, Lookahead, dual averaging)?

Each takes a few dozen steps of weights with a few numbers (`lightning_normdyn.optimizers.scratch`).
Exceptions of the optimizer mean "not known" and never reach the caller.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isnan
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import rate_rules
from .facts import DecayLaw
from .group_numbers import group_number, is_zero
from .rate_rules import RateRule
from .scratch import CannotTryError, ScratchOptimizer, Start, seed_generators
from .step_view import show, split_groups, view_class, view_of

_LR = 0.02
# Enough for momentum and bias corrections to matter, and for a slow copy that is visited every 5 or
# 6 steps.
_STEPS = 13
# The first of these that changes a weight visibly is tried: D-Adaptation starts with rates of 1e-6.
_DECAYS = (0.1, 1e2, 1e5, 1e8)
_VISIBLE = 1e-4
# What nobody would write: an optimizer that keeps a copy of its first decay must not happen to
# agree.
_ODD_DECAY = 0.1037
# A kind of decay must explain its effect up to this share.
_EXPLAINED = 1e-3
# A change from outside that shrinks below this share is being undone.
_KEPT = 0.8

Fresh = Callable[..., ScratchOptimizer]
"""Makes a scratch optimizer, given what is to be otherwise than in the real one."""

Course = list[list[Tensor]]
"""The weights after each step."""


# --------------------------------------------------------------------------------- weight decay


@dataclass(frozen=True)
class DecayTrial:
    """What a trial says about an optimizer's weight decay.

    Args:
        refusal: why its decay cannot be taken over; None: the take-over is exact.
        law: how it decays; None if it is in none of the known ways.
    """

    refusal: str | None
    law: DecayLaw | None = None


def try_decay(optimizer: Optimizer, rate_of: RateRule) -> DecayTrial:
    """Whether a take-over takes exactly the weight decay of single weights away, and how it decays.

    Args:
        optimizer: of any class; it is left as it is.
        rate_of: the rate of the next step of a weight, for comparison.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
        >>> try_decay(adamw, lambda optimizer, group, weight: group["lr"])
        DecayTrial(refusal=None, law=DecayLaw(kind='decoupled', pace='rate'))
    """
    # Those would go on acting on weights whose decay is said to be taken.
    others = _other_decays(optimizer)
    if others:
        return DecayTrial(f"it has another weight decay ({', '.join(others)})")
    return _with_some_start(optimizer, partial(_try_decay, optimizer, rate_of), DecayTrial)


def _try_decay(
    optimizer: Optimizer,
    rate_of: RateRule,
    fresh: Fresh,
) -> DecayTrial:
    without = _run(fresh(weight_decay=0.0))
    for decay in _DECAYS:
        decayed = _run(fresh(weight_decay=decay))
        if _difference(decayed[-1], without[-1]) > _VISIBLE:
            break
    else:
        return DecayTrial("a change of weight_decay in its param group changes nothing")

    scratch = fresh(weight_decay=decay)
    taken = {id(weight) for weight in scratch.taken}
    course = _run(scratch, take_over=True)
    # Exact: weights whose decay is taken step as without any, the others as with it.
    for got, bare, full in zip(course, without, decayed, strict=True):
        for i, weight in enumerate(scratch.weights):
            expected = bare if id(weight) in taken else full
            if not torch.equal(got[i], expected[i]):
                return DecayTrial(
                    "a trial on scratch weights shows that it does not take weight_decay from "
                    "its param group alone"
                )
    return DecayTrial(None, _law_of_decay(optimizer, rate_of, decay, fresh))


def _other_decays(optimizer: Optimizer) -> list[str]:
    """Keys of further weight decays, which a take-over would leave in place."""
    # A dictionary: several groups have the same keys, whose order is kept.
    others: dict[str, None] = {}
    for group in optimizer.param_groups:
        for key in group:
            if key.startswith("weight_decay_") and not is_zero(group_number(group, key)):
                others[key] = None
    return list(others)


def _law_of_decay(
    optimizer: Optimizer,
    rate_of: RateRule,
    decay: float,
    fresh: Fresh,
) -> DecayLaw | None:
    """Which of the known laws, applied by hand to an optimizer without decay, gives its weights."""
    # In low precision the laws could not be told apart.
    dtype = torch.float32
    if all(p.dtype == torch.float64 for group in optimizer.param_groups for p in group["params"]):
        dtype = torch.float64
    scratch = partial(fresh, dtype=dtype)
    without, decayed = _run(scratch(weight_decay=0.0)), _run(scratch(weight_decay=decay))
    by_hand: dict[DecayLaw, Callable[[ScratchOptimizer], None]] = {
        DecayLaw("decoupled", "rate"): partial(_shrink, decay, rate_of),
        DecayLaw("decoupled", "lr"): partial(_shrink, decay, rate_rules.plain),
        DecayLaw("decoupled", "step"): partial(_shrink, decay, lambda *_: 1.0),
        DecayLaw("coupled"): partial(_add_to_gradients, decay),
    }
    for law, apply in by_hand.items():
        try:
            course = _run(scratch(weight_decay=0.0), apply)
        except _UnknownRateError:
            continue
        if _explains(course, without, decayed):
            return law
    return None


class _UnknownRateError(Exception):
    """Nobody can tell the rate of a scratch weight."""


@torch.no_grad()
def _shrink(
    decay: float,
    rate_of: RateRule,
    scratch: ScratchOptimizer,
) -> None:
    for group in scratch.groups:
        for weight in group["params"]:
            rate = rate_of(scratch.optimizer, group, weight)
            if rate is None:
                raise _UnknownRateError
            weight.mul_(1 - rate * decay)


@torch.no_grad()
def _add_to_gradients(decay: float, scratch: ScratchOptimizer) -> None:
    for group in scratch.groups:
        sign = -1.0 if group.get("maximize") else 1.0
        for weight in group["params"]:
            weight.grad.add_(weight, alpha=sign * decay)


def _explains(
    course: Course,
    without: Course,
    decayed: Course,
) -> bool:
    """Whether a run by hand moves weights as the decay does, where that does anything."""
    # Matrices alone if there are any: optimizers treat vectors apart, without decay for example.
    everything = range(len(without[0]))
    matrices = [i for i in everything if without[0][i].dim() >= 2]
    visible = 0
    for by_hand, bare, full in zip(course, without, decayed, strict=True):
        for i in matrices or everything:
            effect = (full[i] - bare[i]).abs().max()
            unexplained = (by_hand[i] - full[i]).abs().max()
            if effect <= _VISIBLE * bare[i].abs().max():
                continue
            visible += 1
            # Written so that NaN explains nothing.
            if not unexplained <= _EXPLAINED * effect:
                return False
    return visible > 0


# ------------------------------------------------------------------------- the step of a base class


def steps_as(optimizer: Optimizer, known: type[Optimizer]) -> str | None:
    """Why the step of ``optimizer`` is not that of its base class ``known``.

    None if a trial shows that it is, state and all.

    Example:
        >>> class Logging(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> logging = Logging([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
        >>> steps_as(logging, torch.optim.SGD) is None
        True
    """
    attempt = partial(_compare_with, optimizer, known)
    return _with_some_start(optimizer, attempt, lambda reason: reason)


def _compare_with(
    optimizer: Optimizer,
    known: type[Optimizer],
    fresh: Fresh,
) -> str | None:
    # With a decay if it has one, and with a rate that is not 0 as at the start of a warmup.
    decays = [group_number(group, "weight_decay") for group in optimizer.param_groups]
    has_decay = any(decay != 0 for decay in decays)
    decay = _ODD_DECAY if has_decay else None
    traces = []
    for kind in (type(optimizer), known):
        scratch = fresh(kind=kind, weight_decay=decay)
        # Under a take-over, as it will have to step: one that decays by a number of its own is
        # found out by the weights that are taken.
        course = _run(scratch, take_over=has_decay)
        state, weights = scratch.optimizer.state, scratch.weights
        # Of what else is in the state, the keys.
        states = [*(state[weight] for weight in weights), state.keys() - set(weights)]
        gradients = [weight.grad for weight in weights]
        groups = [{**group, "params": None} for group in scratch.groups]
        traces.append((course, states, gradients, groups))
    of_base = f"that of {known.__name__}"
    on_scratch = "in a trial on scratch weights"
    differences = (
        f"differs from {of_base} {on_scratch}",
        f"keeps other state than {of_base} {on_scratch}",
        f"leaves other gradients than {of_base} {on_scratch}",
        f"writes other things into its param groups than {of_base}",
    )
    for difference, of_own, of_known in zip(differences, *traces, strict=True):
        if not _same(of_own, of_known):
            return f"its step is its own, and {difference}"
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return bool(a == b)
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.dtype == b.dtype and torch.equal(a, b)


# ------------------------------------------------------------------------------------ a memory


def remembers_weights(optimizer: Optimizer) -> float | None:
    """How much of a change made to the weights from outside is left a dozen steps later, where so
    little is left that writing to weights is futile.

    Such an optimizer sets weights back to something that it remembers (a slow copy, the starting
    point of a dual averaging). None if it steps from wherever a weight is, or cannot be tried.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, momentum=0.9)
        >>> remembers_weights(sgd) is None
        True
    """
    left: float | None = _with_some_start(optimizer, _share_left, lambda reason: None)
    stays = left is None or _KEPT <= left <= 2 - _KEPT
    return None if stays else left


def _share_left(fresh: Fresh) -> float:
    # Small steps: a step that depends on the size of its weight must not look like a memory.
    scratch = partial(fresh, weight_decay=0.0, lr=_LR / 20)
    calls = 0

    def disturb(scratch: ScratchOptimizer) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            for weight in scratch.weights:
                weight.data.mul_(1.5)

    undisturbed = _run(scratch(), steps=_STEPS + 3)
    disturbed = _run(scratch(), disturb, steps=_STEPS + 3)
    shares = []
    for before, a, b in zip(undisturbed[2], undisturbed[-1], disturbed[-1], strict=True):
        change = 0.5 * before.double()
        left = (b.double() - a.double()).mul(change).sum() / change.square().sum()
        shares.append(float(left))
    # The weight that is furthest from keeping its change decides.
    return max(shares, key=lambda share: inf if isnan(share) else abs(share - 1))


# ------------------------------------------------------------------------------------- running


_Answer = TypeVar("_Answer")


def _with_some_start(
    optimizer: Optimizer,
    attempt: Callable[[Fresh], _Answer],
    failed: Callable[[str], _Answer],
) -> _Answer:
    """``attempt`` with scratch optimizers as they are before their first step.

    If a step needs what only a real one has, with some of that.
    """
    reason = ""
    for start in get_args(Start):
        fresh = partial(ScratchOptimizer, optimizer, lr=_LR, start=start)
        try:
            with ScratchOptimizer.untouched(optimizer):
                return attempt(fresh)
        except CannotTryError as error:
            reason = reason or str(error)
    return failed(f"its step cannot be tried on scratch weights ({reason})")


def _run(
    scratch: ScratchOptimizer,
    before_step: Callable[[ScratchOptimizer], None] | None = None,
    *,
    take_over: bool = False,
    steps: int = _STEPS,
) -> Course:
    """The weights after each step.

    Args:
        scratch: a fresh one.
        before_step: called when the gradients are there.
        take_over: whether each step sees the first weight of each pair without decay, exactly as a
            take-over shows it.
        steps: how many.
    """
    # Optimizers that draw random numbers (SGLD) must draw the same in each run.
    seed_generators(scratch.weights[0].device)
    course = []
    for number in range(steps):
        scratch.set_gradients(number)
        if before_step is not None:
            before_step(scratch)
        # Made anew for each step, as the bracket does.
        scratch.step(_view(scratch) if take_over else None)
        course.append(scratch.values())
    # NaN equals nothing, so a comparison would blame the optimizer.
    if not all(torch.isfinite(weight).all() for weight in course[-1]):
        raise CannotTryError("its scratch weights are not finite")
    return course


def _view(scratch: ScratchOptimizer) -> Optimizer:
    made = view_class(scratch.kind)
    if made is None:
        raise CannotTryError("nothing can be derived from its class")
    view = view_of(scratch.optimizer, made)
    split = partial(split_groups, taken=set(scratch.taken))
    show(view, split, scratch.groups, split(scratch.groups) or scratch.groups)
    return view


def _difference(weights: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of two weights, relative to the size of the other."""
    return max(
        float((weight - other).abs().max() / other.abs().max())
        for weight, other in zip(weights, others, strict=True)
    )
