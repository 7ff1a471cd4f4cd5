"""The bracket around an optimizer step: when it fires, in which order, what it hides, and that
nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import doubles
import pytest
import reference
import torch
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision
from models import convnet, distance, images, same, weights_of
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
from lightning_normdyn.optimizers.checks import check_decay_takeover
from lightning_normdyn.optimizers.step import Step


def weight_and_sgd(**options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
    return weight, torch.optim.SGD([weight], **{"lr": 0.1, **options})


def backward(*weights: nn.Parameter) -> None:
    for weight in weights:
        weight.grad = torch.ones_like(weight)


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


def test_phases_then_names_decide_the_order_not_the_registration():
    weight, optimizer = weight_and_sgd()
    bracket, seen = StepBracket.of(optimizer), []
    for phase in sorted(Phase, reverse=True):
        for name in "ba":
            bracket.add(phase, lambda step, event=(phase, name): seen.append(event), order=name)
    backward(weight)
    optimizer.step()
    assert seen == [(phase, name) for phase in sorted(Phase) for name in "ab"]


def test_the_phases_of_architecture():
    assert list(Phase) == sorted(Phase)
    names = [
        "RESOLVE",
        "MEASURE",
        "LR_DROP",
        "SHRINK",
        "SNAPSHOT",
        "LOOK_AGAIN",
        "PROJECT",
        "MEASURE_STEP",
        "RESCALE",
    ]
    assert [p.name for p in Phase] == names


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


def test_lbfgs_is_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        NotSupportedError,
        match=r"LBFGS evaluates its closure more than once per step.*Use an optimizer that",
    ):
        StepBracket.of(torch.optim.LBFGS([weight]))


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


def test_schedule_free_is_refused():
    optimizer = doubles.ScheduleFree([torch.nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(NotSupportedError, match="second copy of the weights"):
        StepBracket.of(optimizer)


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


def test_who_reads_the_weights_may_take_the_snapshot_early():
    weights = first, second = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    bracket, seen = StepBracket.of(optimizer), []

    def look(step):
        assert not bracket.acts_between(Phase.MEASURE, Phase.SNAPSHOT)
        (memory,) = bracket.early_snapshot({first: first.data})
        memory.copy_(first)
        bracket.request_snapshot(
            {first: torch.zeros_like(first), second: second.data}
        )  # the first is not copied again
        (again,) = bracket.early_snapshot({first: first.data})
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


# ---- Decay take-over ----


def both() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(3)
    values = [torch.randn(4, 3), torch.randn(4), torch.randn(3, 2, 2)]
    return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.clone()) for v in values]


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "SGD foreach": (torch.optim.SGD, {"nesterov": True, "momentum": 0.9, "foreach": True}),
    "SGD maximize": (torch.optim.SGD, {"maximize": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "fused": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW one by one": (torch.optim.AdamW, {"foreach": False}),
    "AdamW tensor lr": (torch.optim.AdamW, {"foreach": False, "lr": torch.tensor(0.05)}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_takeover_is_bit_exact(name, dtype):
    kind, options = OPTIMIZERS[name]
    options = {"lr": 0.05, **options}
    ours, theirs = ([nn.Parameter(p.detach().to(dtype)) for p in side] for side in both())
    optimizer = kind(ours, weight_decay=0.3, **options)
    by_user = kind(
        [
            {"params": [theirs[0], theirs[2]], "weight_decay": 0.0},
            {"params": [theirs[1]], "weight_decay": 0.3},
        ],
        **options,
    )
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    bracket.claim_decay("me", DecayOwner.SHRINK, {ours[0], ours[2]})
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t) for o in (optimizer, by_user)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.clone()
        optimizer.step()
        by_user.step()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # and the decay that was taken away would have made a difference, as it did for the weight whose
    # decay was left
    plain = [nn.Parameter(p.detach().to(dtype)) for p in both()[0]]
    assert not torch.equal(ours[0], plain[0])


ROWS = Partition((0,), torch.tensor([0, -1, 0, -1, 1, -1]), "group")
"""Rows 0 and 2 are one vector, 4 is another; 1, 3 and 5 belong to none."""


def packed_and_apart(
    kind: Any, options: dict[str, Any], dtype: torch.dtype, decay: Any = 0.3
) -> tuple[Any, ...]:
    """A weight whose vectors lose their decay, and the same rows as two weights in two param
    groups."""
    value = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    free = ROWS.labels >= 0
    packed, plain = nn.Parameter(value.clone()), nn.Parameter(value[:4].clone())
    vectors, rest, neighbour = (
        nn.Parameter(v.clone()) for v in (value[free], value[~free], value[:4])
    )
    ours = kind([packed, plain], weight_decay=decay, **options)
    theirs = kind(
        [
            {"params": [vectors], "weight_decay": 0.0},
            {"params": [rest, neighbour], "weight_decay": decay},
        ],
        **options,
    )
    bracket = StepBracket.of(ours)
    bracket.add(Phase.MEASURE, lambda step: None)
    bracket.claim_decay("me", DecayOwner.SHRINK, {packed: ROWS})
    return ours, theirs, (packed, plain), (vectors, rest, neighbour), free


def train_packed_and_apart(
    ours: Any, theirs: Any, mine: Any, apart: Any, free: Any, steps: int = 6
) -> float:
    """The largest difference afterwards, relative to the weights; gradients must come out of a step
    as they went in."""
    (packed, plain), (vectors, rest, neighbour) = mine, apart
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        packed.grad = torch.randn(packed.shape, generator=generator).to(packed.dtype)
        neighbour.grad, plain.grad = packed.grad[:4].clone(), packed.grad[:4].clone()
        vectors.grad, rest.grad = packed.grad[free].clone(), packed.grad[~free].clone()
        before = packed.grad.clone()
        ours.step()
        theirs.step()
        assert (
            torch.equal(packed.grad, before) or not ours.param_groups[0]["weight_decay"]
        )  # Nesterov on foreach itself writes to it
    pairs = (packed[free], vectors), (packed[~free], rest), (plain, neighbour)
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name != "Adafactor"]
)  # which looks at whole matrices
def test_rows_that_nobody_claims_keep_the_decay_of_the_optimizer(name, dtype):
    kind, options = OPTIMIZERS[name]
    run = packed_and_apart(kind, {"lr": 0.05, **options}, dtype)
    if dtype == torch.bfloat16 and options.get("fused"):
        with pytest.raises(
            NotSupportedError,
            match=r"fused kernel applies it in float32 within the update.*Use fused=False",
        ):
            check_decay_takeover(run[0], {run[2][0]: ROWS})
        return
    check_decay_takeover(run[0], {run[2][0]: ROWS})
    assert (
        train_packed_and_apart(*run)
        <= {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    )
    bare = packed_and_apart(kind, {"lr": 0.05, **options}, dtype, decay=0.0)
    train_packed_and_apart(*bare)
    if dtype != torch.bfloat16:
        assert (
            distance({"": run[3][1].detach()}, {"": bare[3][1].detach()}) > 1e-4
        )  # decay matters to these rows


def test_rows_that_nobody_claims_follow_schedules_and_a_highest_claim():
    run = packed_and_apart(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, torch.float64)
    bracket, (packed, _) = StepBracket.of(run[0]), run[2]
    bracket.claim_decay(
        "whole", DecayOwner.RESCALING, {packed}
    )  # below SHRINK: what that claims counts
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t) for o in run[:2]]
    for decay in (0.3, 0.1, 0.0, 0.5):
        run[0].param_groups[0]["weight_decay"] = run[1].param_groups[1]["weight_decay"] = decay
        assert train_packed_and_apart(*run, steps=1) <= 1e-14
        for schedule in schedules:
            schedule.step()
    packed.grad = None  # neither stepped nor decayed
    before = packed.detach().clone()
    run[0].step()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_rows_that_nobody_claims_under_a_gradient_scaler(kind):
    """A fused optimizer divides by the scale in its kernel, and skips there: the decay must do
    both."""
    run = packed_and_apart(kind, {"lr": 0.05, "fused": True}, torch.float32)
    (packed, plain), (vectors, rest, neighbour), free = run[2:]
    weights = (packed, plain, vectors, rest, neighbour)
    for scaler_of, optimizer, mine in ((0, run[0], weights[:2]), (1, run[1], weights[2:])):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            signs = torch.linspace(-1, 1, 6)[:, None]
            parts = (signs, signs[:4]) if not scaler_of else (signs[free], signs[~free], signs[:4])
            loss = sum((w * s).sum() + w.square().sum() for w, s in zip(mine, parts, strict=True))
            scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert float((packed[free] - vectors).detach().abs().max()) <= 1e-6
    assert float((packed[~free] - rest).detach().abs().max()) <= 1e-6


def test_an_exception_inside_the_step_puts_gradients_back():
    run = packed_and_apart(torch.optim.SGD, {"lr": 0.05}, torch.float64)
    packed = run[2][0]
    packed.grad = torch.ones_like(packed)
    bracket = StepBracket.of(run[0])
    bracket._pre(run[0], (run[0],), {})
    assert not torch.equal(packed.grad, torch.ones_like(packed))
    bracket.detach()
    assert torch.equal(packed.grad, torch.ones_like(packed))


def test_a_decay_that_changes_during_the_run_is_read_at_every_step():
    (ours, theirs), decays = both(), [0.3, 0.0, 0.1, 0.5]
    optimizer = torch.optim.SGD(ours, lr=0.1, weight_decay=0.3)
    by_user = torch.optim.SGD([{"params": theirs[:1]}, {"params": theirs[1:]}], lr=0.1)
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    bracket.claim_decay("me", DecayOwner.SHRINK, {ours[0]})
    for decay in decays:
        optimizer.param_groups[0]["weight_decay"] = by_user.param_groups[1]["weight_decay"] = decay
        backward(*ours, *theirs)
        optimizer.step()
        by_user.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("with_closure", [True, False])
def test_nobody_else_sees_the_split(with_closure):
    (ours, _), seen = both(), []
    optimizer = torch.optim.AdamW(ours, lr=0.1, weight_decay=0.3)
    groups = optimizer.param_groups

    def look(where: str) -> None:
        seen.append(
            (
                where,
                optimizer.param_groups is groups
                and optimizer.param_groups[0]["weight_decay"] == 0.3,
            )
        )

    optimizer.register_step_pre_hook(lambda *_: look("pre"))
    optimizer.register_step_post_hook(lambda *_: look("post"))
    bracket = StepBracket.of(optimizer)
    for phase in Phase:
        bracket.add(phase, lambda step: look("handler"))
    bracket.claim_decay("me", DecayOwner.SHRINK, {ours[0]})
    optimizer.register_step_pre_hook(lambda *_: look("later pre"))
    optimizer.register_step_post_hook(lambda *_: look("later post"))
    bracket.close_in()
    state = optimizer.state_dict()["param_groups"]
    for _ in range(2):
        if with_closure:
            optimizer.step(lambda: backward(*ours))
        else:
            backward(*ours)
            optimizer.step()
    assert {where for where, _ in seen} == {"pre", "post", "handler", "later pre", "later post"}
    assert all(unsplit for _, unsplit in seen)
    assert optimizer.state_dict()["param_groups"] == state


def test_an_exception_inside_the_step_is_repaired_at_the_next():
    class Breaks(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("broken")
            return super().step(closure)

    ours, theirs = both()
    optimizer = Breaks(ours, lr=0.1, weight_decay=0.3)
    by_user = torch.optim.SGD(
        [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:]}],
        lr=0.1,
        weight_decay=0.3,
    )
    bracket = StepBracket.of(optimizer)
    bracket.add(Phase.MEASURE, lambda step: None)
    bracket.claim_decay("me", DecayOwner.SHRINK, {ours[0]})
    groups = optimizer.param_groups
    backward(*ours, *theirs)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    optimizer.broken = False
    optimizer.step()
    by_user.step()
    assert optimizer.param_groups is groups
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert bracket.steps == 1


def test_the_highest_claim_owns_the_decay_and_a_claim_can_be_taken_back():
    (ours, _), active = both(), [True]
    optimizer = torch.optim.SGD(ours, lr=0.1, weight_decay=0.3)
    bracket = StepBracket.of(optimizer)
    assert bracket.decay_owner(ours[0]) is None
    bracket.claim_decay(
        "wrs", DecayOwner.RESCALING, lambda: {ours[0], ours[2]} if active[0] else set()
    )
    remove = bracket.claim_decay("aws", DecayOwner.SHRINK, {ours[0]})
    bracket.claim_decay("projection", DecayOwner.PROJECTION, {ours[0]})
    assert [bracket.decay_owner(w) for w in ours] == [DecayOwner.SHRINK, None, DecayOwner.RESCALING]
    remove()
    active[0] = False
    assert [bracket.decay_owner(w) for w in ours] == [DecayOwner.PROJECTION, None, None]


def test_a_decay_that_cannot_be_taken_over_is_refused_by_name():
    kind, weight = doubles.CachesDecay, nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        NotSupportedError,
        match=r"weight decay 0.1 of CachesDecay.*Set weight_decay=0 in their param group",
    ):
        check_decay_takeover(kind([weight], weight_decay=0.1), [weight])
    check_decay_takeover(kind([weight]), [weight])
    check_decay_takeover(
        kind(
            [{"params": [weight], "weight_decay": 0.0}, {"params": [nn.Parameter(torch.ones(1))]}],
            weight_decay=1,
        ),
        [weight],
    )


def test_rows_that_nobody_claims_are_refused_where_the_kind_of_the_decay_is_not_known():
    class LaterDecay(doubles.Options):
        """Decays after its update, with momentum: of no kind that could be applied to single
        rows."""

        def update(self, p, g, group, state):
            super().update(p, g, {**group, "weight_decay": 0.0}, state)
            p.mul_(1 - 3 * group["lr"] * group["weight_decay"])

    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = LaterDecay([weight], weight_decay=0.1)
    check_decay_takeover(optimizer, [weight])
    with pytest.raises(
        NotSupportedError, match=r"Some rows .*of LaterDecay.*a trial could not tell how"
    ):
        check_decay_takeover(optimizer, {weight: ROWS})


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
