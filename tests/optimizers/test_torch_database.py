"""torch's own database of its optimizers, every one with every set of options that torch tests, against
what is done around a step: brackets, taken-over decays, rescaled state."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_normdyn import DecayOwner, NotSupportedError, Phase, StepBracket
from lightning_normdyn.optimizers.checks import check_decay_takeover, check_optimizer
from lightning_normdyn.optimizers.state import per_matrix_only, state_exponents

KINDS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
)
FORMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Case(NamedTuple):
    """One optimizer with one set of options."""

    name: str
    kind: Any
    options: dict[str, Any]

    def build(self, groups: Any, **changes: Any) -> torch.optim.Optimizer:
        # Copied: a learning rate that is a tensor belongs to one optimizer.
        return self.kind(groups, **{**copy.deepcopy(self.options), **changes})


@functools.cache
def database() -> list[Case]:
    """Every optimizer, every set of options, every form that runs on this machine."""
    # Not at the top: it takes seconds, and only slow tests need it.
    from torch.testing._internal.common_optimizers import optim_db

    cases = []
    for info in optim_db:
        for given in info.optim_inputs_func(device="cpu", dtype=torch.float64):
            for form, switch in FORMS.items():
                name = f"{given.desc or 'default'}, {form}"
                case = Case(name, info.optim_cls, {**given.kwargs, **switch})
                try:
                    case.build([nn.Parameter(torch.ones(2, 2))])
                except (TypeError, ValueError, RuntimeError):
                    continue
                cases.append(case)
    return cases


def cases_of(kind: str) -> list[Case]:
    found = [case for case in database() if case.kind.__name__ == kind]
    assert found
    return found


every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.slow


def parameters(case: Case) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (2, 3), (3, 2, 2)]
    if case.kind.__name__ == "Muon":  # of matrices only
        shapes = [(4, 3), (2, 3), (3, 4)]
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sparse = type(optimizer).__name__ == "SparseAdam"
    for weight in weights:
        gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.grad = gradient.to_sparse() if sparse else gradient
    optimizer.step()


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_database_is_all_there():
    assert {case.kind.__name__ for case in database()} == set(KINDS)
    assert len(database()) > 150
    assert sum(case.options.get("fused", False) for case in database()) > 20


@every_kind
def test_a_bracket_changes_no_bit_and_sees_every_step(kind):
    different = []
    for case in cases_of(kind):
        ours, theirs = parameters(case), parameters(case)
        optimizer, plain = case.build(ours), case.build(theirs)
        if kind == "LBFGS":
            with pytest.raises(NotSupportedError, match="evaluates its closure more than once"):
                check_optimizer(optimizer)
            continue
        check_optimizer(optimizer)
        seen: list[torch.Tensor] = []
        bracket = StepBracket.of(optimizer)
        for phase in (Phase.RESOLVE, Phase.RESCALE):
            bracket.add(
                phase, lambda _, ours=ours, seen=seen: seen.append(ours[0].detach().clone())
            )
        points = [ours[0].detach().clone()]
        for seed in range(5):
            step(optimizer, ours, seed)
            step(plain, theirs, seed)
            points += [ours[0].detach().clone()] * 2
        # Before and after each step, as they were then.
        as_seen = all(torch.equal(a, b) for a, b in zip(seen, points[:-1], strict=True))
        if not as_seen or not equal(ours, theirs):
            different.append(case.name)
    assert not different


@every_kind
def test_a_decay_that_is_taken_over_is_no_decay(kind):
    different = []
    for case in cases_of(kind):
        ours, theirs, undisturbed = (parameters(case) for _ in range(3))
        if "weight_decay" not in case.build(ours).defaults:
            assert kind in ("LBFGS", "Rprop", "SparseAdam")
            continue
        decay = case.options.get("weight_decay") or 0.3
        optimizer = case.build(ours, weight_decay=decay)
        groups = [
            {"params": [theirs[0], theirs[2]], "weight_decay": 0.0},
            {"params": [theirs[1]], "weight_decay": decay},
        ]
        by_user = case.build(groups, weight_decay=decay)
        plain = case.build(undisturbed, weight_decay=decay)
        check_decay_takeover(optimizer, [ours[0], ours[2]])
        bracket = StepBracket.of(optimizer)
        bracket.add(Phase.MEASURE, lambda step: None)
        bracket.claim_decay("me", DecayOwner.SHRINK, {ours[0], ours[2]})
        for seed in range(5):
            step(optimizer, ours, seed)
            step(by_user, theirs, seed)
            step(plain, undisturbed, seed)
        if not equal(ours, theirs):
            different.append(case.name)
        assert equal(ours[1:2], undisturbed[1:2]), case.name
        assert not equal(ours[:1], undisturbed[:1]), "the decay would have made a difference"
    assert not different


# What they keep is not multiplied by a power of the factor when the weight is.
WITHOUT_EXPONENTS = {"ASGD", "Adadelta", "Adafactor", "LBFGS", "Rprop", "SparseAdam"}


@every_kind
def test_rescaled_state_is_that_of_a_run_at_the_rescaled_weights(kind):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    factors = torch.rand(5, 1, generator=generator, dtype=torch.float64) * 3 + 0.2
    different = []
    for case in cases_of(kind):
        optimizer = case.build([nn.Parameter(start.clone())])
        if kind in WITHOUT_EXPONENTS:
            with pytest.raises(NotSupportedError, match=kind):
                state_exponents(optimizer)
            continue
        exponents = state_exponents(optimizer)
        # Muon orthogonalizes a whole matrix.
        ours = factors[:1] if per_matrix_only(optimizer) else factors
        carried = state_at(case, start)
        for key, exponent in exponents.items():
            if carried.get(key) is not None:
                carried[key] = carried[key] * ours**exponent
        gathered = state_at(case, ours * start)
        assert carried.keys() == gathered.keys()
        for key, buffer in gathered.items():
            if buffer is None:
                continue
            if not torch.allclose(carried[key], buffer, rtol=1e-11, atol=1e-13):
                different.append(f"{case.name}: {key}")
    assert not different


def state_at(case: Case, value: torch.Tensor) -> dict[str, Any]:
    """The buffers after a few gradients at one place, of a loss that sees directions alone."""
    weight = nn.Parameter(value.clone())
    optimizer = case.build([weight])
    group = optimizer.param_groups[0]
    # The weight stays, the buffers fill.
    group.update(lr=group["lr"] * 0.0, weight_decay=0.0, eps=0.0)
    if case.kind.__name__ == "Adagrad":
        # A sum that starts at a number is an epsilon of its own.
        optimizer.state[weight]["sum"].zero_()
    for seed in range(5):
        data = torch.Generator().manual_seed(seed)
        inputs = torch.randn(8, 4, generator=data, dtype=torch.float64)
        optimizer.zero_grad()
        direction = weight / weight.norm(dim=1, keepdim=True)
        torch.tanh(inputs @ direction.T).sin().sum().backward()
        optimizer.step()
    return dict(optimizer.state[weight])
