"""The view that a step runs on: what the step sees of its optimizer, and what nobody else ever
sees."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import threading
from abc import ABCMeta
from typing import Any

import pytest
import torch
from torch import nn

from lightning_normdyn import DecayOwner, NotSupportedError, Phase, StepBracket
from lightning_normdyn.optimizers.step_view import (
    SplitGroup,
    show,
    split_groups,
    unsplit,
    view_class,
    view_of,
)


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]


def taken_over(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> StepBracket:
    """The bracket of an optimizer whose decay of ``weight`` is taken over."""
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    bracket.claim_decay("test", DecayOwner.SHRINK, {weight})
    return bracket


def step(optimizer: torch.optim.Optimizer, with_closure: bool = False) -> None:
    def backward() -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)

    if with_closure:
        optimizer.step(backward)
    else:
        backward()
        optimizer.step()


class Looks(torch.optim.SGD):
    """Calls ``look`` with itself in the middle of its step, where the param groups are split."""

    look: Any = staticmethod(lambda view: None)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.look(self)
        super().step()
        self.look(self)
        return loss


def looking(look: Any = None, kind: Any = Looks, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    weights = pair()
    optimizer = kind(weights, **{"lr": 0.1, "weight_decay": 0.5, **options})
    taken_over(optimizer, weights[0])
    if look is not None:
        optimizer.look = look  # only now: whose step is not torch's is tried before
    return optimizer, weights


# ---- Groups ----


def test_what_a_step_writes_into_a_split_group_reaches_the_users_group():
    group = {"params": [], "lr": 0.1, "weight_decay": 0.5, "k": 0, "gone": 1, "popped": 2}
    shown = SplitGroup(group, {"params": [1], "weight_decay": 0.0})
    shown["k"] += 1
    shown.update(lr=0.2, weight_decay=0.3)
    assert shown.setdefault("new", []) is group["new"]
    del shown["gone"]
    assert shown.pop("popped") == 2
    shown |= {"united": 1}
    assert group == {"params": [], "lr": 0.2, "weight_decay": 0.5, "k": 1, "new": [], "united": 1}
    assert (shown["weight_decay"], shown["params"]) == (
        0.3,
        [1],
    )  # what was replaced stays the view's own
    assert type(copy.deepcopy(shown)) is dict
    assert type(pickle.loads(pickle.dumps(shown))) is dict


def test_groups_without_decay_or_without_taken_weights_are_shown_as_they_are():
    first, second, third = (torch.ones(1) for _ in range(3))
    groups = [
        {"params": [first], "weight_decay": 0.0},
        {"params": [second, third], "weight_decay": 0.1},
        {"params": [third]},
    ]
    assert split_groups(groups, {first}) is None
    shown = split_groups(groups, {first, second})
    assert shown is not None
    assert shown[0] is groups[0]
    assert shown[3] is groups[2]
    assert [(len(g["params"]), g["weight_decay"]) for g in shown[1:3]] == [(1, 0.0), (1, 0.1)]
    whole = split_groups([{"params": [first], "weight_decay": 0.1}], {first})
    assert [g["weight_decay"] for g in whole or []] == [0.0]


@pytest.mark.parametrize("with_closure", [True, False])
def test_state_that_a_step_keeps_in_its_group_is_kept(with_closure):
    def look(view):
        for group in view.param_groups:
            group["calls"] = group.get("calls", 0) + 1

    optimizer, _ = looking(look)
    for _ in range(3):
        step(optimizer, with_closure)
    assert [group["calls"] for group in optimizer.param_groups] == [6]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


# ---- The view itself ----


def test_the_step_sees_split_groups_and_the_optimizer_keeps_its_own():
    seen = []

    def look(view):
        seen.append([(len(g["params"]), g["weight_decay"]) for g in view.param_groups])
        seen.append([(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups])

    optimizer, weights = looking(look)
    groups = optimizer.param_groups
    step(optimizer)
    assert seen == [[(1, 0.0), (1, 0.5)], [(2, 0.5)]] * 2
    assert optimizer.param_groups is groups
    assert weights[0][0, 0].item() == pytest.approx(0.9)
    assert weights[1][0].item() == pytest.approx(0.85)


def test_what_a_view_does_is_done_to_the_optimizer():
    late = nn.Parameter(torch.ones(1))
    seen: dict[str, Any] = {}

    def look(view):
        if seen:
            return
        view.counter = 7
        seen["known"] = (
            optimizer in {view: 1},
            view in {optimizer: 1},
            view == optimizer,
            isinstance(view, Looks),
        )
        seen["state_dict"] = (
            view.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        )
        seen["copies"] = [
            type(c)
            for c in (copy.copy(view), copy.deepcopy(view), pickle.loads(pickle.dumps(view)))
        ]
        seen["repr"] = repr(view) == repr(optimizer)
        view.add_param_group({"params": [late]})
        seen["shown"] = [(len(g["params"]), g["weight_decay"]) for g in view.param_groups]
        view.load_state_dict(optimizer.state_dict())
        seen["reloaded"] = [(len(g["params"]), g["weight_decay"]) for g in view.param_groups]

    weights = pair()
    optimizer = Looks(weights, lr=0.1, weight_decay=0.5)
    optimizer.look = None
    taken_over(optimizer, weights[0])
    Looks.look = staticmethod(
        look
    )  # a class attribute: what stands on an instance is no part of a pickle
    del optimizer.look
    try:
        step(optimizer)
    finally:
        Looks.look = staticmethod(lambda view: None)
    assert seen["known"] == (True,) * 4
    assert seen["state_dict"]
    assert seen["copies"] == [Looks] * 3
    assert seen["repr"]
    assert seen["shown"] == seen["reloaded"] == [(1, 0.0), (1, 0.5), (1, 0.5)]
    assert optimizer.counter == 7
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]


class Slotted(torch.optim.SGD):
    __slots__ = ("__hidden", "kept")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept, self.__hidden = 0, [0]

    @property
    def hidden(self) -> int:
        return self.__hidden[0]

    def step(self, closure: Any = None) -> Any:
        self.kept += 1
        self.__hidden = [self.hidden + len(self.param_groups)]
        return super().step(closure)


class Abstract(Looks, metaclass=ABCMeta):
    """Of another metaclass, with the groups behind a property, as wrappers have them."""

    @property
    def param_groups(self) -> Any:
        return self._kept_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self._kept_groups = groups


def test_slots_metaclasses_and_properties():
    optimizer, _ = looking(kind=Slotted)
    step(optimizer)
    step(optimizer)
    assert (optimizer.kept, optimizer.hidden) == (2, 4)
    seen = []
    optimizer, weights = looking(lambda view: seen.append(len(view.param_groups)), kind=Abstract)
    step(optimizer)
    assert seen == [2, 2]
    assert len(optimizer.param_groups) == 1
    assert weights[0][0, 0].item() == pytest.approx(0.9)


def test_a_class_that_nothing_can_derive_from_is_refused_only_where_groups_must_be_split():
    class Final(torch.optim.SGD):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    assert view_class(Final) is None
    optimizer, _ = looking(kind=Final)
    with pytest.raises(
        NotSupportedError,
        match=r"decay of Final would have to be taken over.*cannot be derived from.*weight_decay=0",
    ):
        step(optimizer)
    optimizer, weights = looking(kind=Final, weight_decay=0.0)
    step(optimizer)
    assert weights[0][0, 0].item() == pytest.approx(0.9)


def test_a_scheduler_that_wraps_step_on_the_instance_and_writes_rates_during_it():
    optimizer, weights = looking()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    optimizer.look = lambda view: scheduler.step()
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        0.025
    )  # twice: before and after the super().step() of Looks
    assert weights[0][0, 0].item() == pytest.approx(
        0.9
    )  # this step goes on with the rate that it was called with


@pytest.mark.parametrize("with_closure", [True, False])
def test_a_rate_that_is_written_after_a_step_failed_is_not_lost(with_closure):
    def look(view):
        if len(seen) < 1:
            seen.append(view)
            raise RuntimeError("out of memory")

    seen: list[Any] = []
    optimizer, weights = looking(look)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(optimizer, with_closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    step(optimizer, with_closure)
    assert weights[0][0, 0].item() == pytest.approx(0.95)


def test_hooks_that_torch_calls_again_for_super_step_get_the_optimizer():
    torch.optim.SGD(
        [nn.Parameter(torch.ones(1))], lr=0.1
    )  # from now on torch hooks the step of SGD as well
    seen = []

    def pre(hooked, args, kwargs):
        seen.append(
            (
                hooked is optimizer,
                args[0] == optimizer,  # a view equals what it shows
                len(hooked.param_groups),
            )
        )
        return (args[0], *args[1:]), kwargs

    optimizer, _ = looking()
    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(
        lambda hooked, args, kwargs: seen.append(
            (hooked is optimizer, True, len(hooked.param_groups))
        )
    )
    step(optimizer)
    assert seen == [(True, True, 1)] * 4


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_signal_handlers_and_threads_see_the_users_groups():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(8)]
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3, foreach=False)
    taken_over(optimizer, weights[0])
    seen, saved, done = [], io.BytesIO(), threading.Event()

    def look(*_: Any) -> None:
        for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
            seen.append([(len(g["params"]), g["weight_decay"]) for g in groups])

    def watch() -> None:
        while not done.is_set():
            seen.append([(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups])

    before, thread = signal.signal(signal.SIGALRM, look), threading.Thread(target=watch)
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(40):
            step(optimizer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        done.set()
        thread.join()
    assert len(seen) > 10
    assert all(groups == [(8, 0.3)] for groups in seen)
    torch.save(optimizer.state_dict(), saved)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_under_a_gradient_scaler_with_a_fused_kernel(kind):
    weights = pair()
    optimizer = kind(weights, lr=0.1, weight_decay=0.5, fused=True)
    taken_over(optimizer, weights[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(w.sum() for w in weights)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weights[0][0, 0].item() == pytest.approx(0.9)
    assert weights[1][0].item() == pytest.approx(0.85)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_runs_on_the_view():
    weights = pair()
    optimizer = torch.optim.AdamW(
        weights, lr=torch.tensor(0.1), weight_decay=0.5, capturable=False, foreach=False
    )
    taken_over(optimizer, weights[0])
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        for w in weights:
            w.grad = torch.ones_like(w)
        compiled()
    apart = pair()
    plain = torch.optim.AdamW(
        [{"params": apart[:1], "weight_decay": 0.0}, {"params": apart[1:]}],
        lr=torch.tensor(0.1),
        weight_decay=0.5,
    )
    step(plain)
    step(plain)
    assert all(torch.allclose(a, b) for a, b in zip(weights, apart, strict=True))
    assert [len(g["params"]) for g in optimizer.param_groups] == [2]


def test_a_view_that_somebody_keeps_shows_the_users_groups_afterwards():
    kept = []
    optimizer, _ = looking(kept.append)
    step(optimizer)
    assert kept[0] is not optimizer
    assert kept[0] == optimizer
    assert kept[0].param_groups is optimizer.param_groups
    bare = view_of(optimizer, view_class(Looks) or object)
    assert bare.param_groups is optimizer.param_groups
    split = split_groups(optimizer.param_groups, set(optimizer.param_groups[0]["params"][:1]))
    show(bare, split_groups, optimizer.param_groups, split or [])
    assert bare.param_groups is split
    unsplit(bare)
    assert bare.param_groups is optimizer.param_groups
