"""What a step sees without weight decay, and that nobody else sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import backward, distance
from torch import nn

from lightning_normdyn import (
    DecayOwner,
    NotSupportedError,
    Partition,
    Phase,
    StepBracket,
)
from lightning_normdyn.optimizers.checks import check_decay_takeover


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


@pytest.mark.sampled(27)
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


@pytest.mark.sampled(20)
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
