"""A rescale must be invisible: to the next steps, to the optimizer's buffers, and to evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.decay import (
    decay_kind,
    supports_decay_takeover,
)
from lightning_normdyn.optimizers.state import (
    RunningStatistics,
    StateOf,
    has_stepped,
    per_matrix_only,
    rescale_batch_norm_,
    rescale_batch_norms_,
    state_exponents,
)


def test_the_state_of_weights_is_found_wherever_they_stand_in_it():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]  # equal, and not the same
    optimizer = torch.optim.SGD(weights, lr=0.1)
    of_two = StateOf(weights[1:])
    assert of_two.now(optimizer) == [{}, {}]
    assert not optimizer.state
    for number, weight in enumerate(weights):
        optimizer.state[weight] = {"number": number}
    for _ in range(2):
        assert of_two.now(optimizer) == [{"number": 1}, {"number": 2}]
    # Another state of the same weight.
    optimizer.state[weights[1]] = {"number": 4}
    assert of_two.now(optimizer) == [{"number": 4}, {"number": 2}]
    # Another order, and a state that is gone.
    optimizer.state[weights[0]] = optimizer.state.pop(weights[0])
    assert of_two.now(optimizer) == [{"number": 4}, {"number": 2}]
    del optimizer.state[weights[2]]
    assert of_two.now(optimizer) == [{"number": 4}, {}]
    optimizer.state[weights[2]] = {"number": 2}
    assert of_two.now(optimizer) == [{"number": 4}, {"number": 2}]


# name -> (class, options, exponent of the learning rate: the step of SGD goes as 1/f, that of
# Adam-like optimizers not at all)
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}, 2),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 2),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 2),
    "SGD dampening": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "maximize": True},
        2,
    ),
    "SGD nesterov foreach": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True, "maximize": True},
        2,
    ),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}, 2),
    "Adam": (torch.optim.Adam, {"lr": 0.01}, 1),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, 1),
    "Adam foreach": (
        torch.optim.Adam,
        {"lr": 0.01, "foreach": True, "amsgrad": True, "maximize": True},
        1,
    ),
    "Adam decoupled": (torch.optim.Adam, {"lr": 0.01, "decoupled_weight_decay": True}, 1),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}, 1),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}, 1),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}, 1),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True}, 1),
    "AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}, 1),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}, 1),
    "NAdam decoupled": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True}, 1),
    "NAdam foreach": (torch.optim.NAdam, {"lr": 0.01, "foreach": True, "maximize": True}, 1),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}, 1),
    "RAdam decoupled": (
        torch.optim.RAdam,
        {"lr": 0.01, "decoupled_weight_decay": True, "foreach": True, "maximize": True},
        1,
    ),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}, 1),
    "Adamax foreach": (torch.optim.Adamax, {"lr": 0.01, "foreach": True, "maximize": True}, 1),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}, 1),
    "RMSprop momentum": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "maximize": True}, 1),
    "RMSprop foreach": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True, "foreach": True},
        1,
    ),
    "RMSprop centered": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}, 1),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}, 1),
    "Adagrad lr_decay": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.01, "maximize": True}, 1),
    "Adagrad foreach": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.01, "foreach": True}, 1),
    "Adagrad fused": (torch.optim.Adagrad, {"lr": 0.01, "fused": True}, 1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = (torch.optim.Muon, {"lr": 0.01}, 1)
    OPTIMIZERS["Muon plain"] = (
        torch.optim.Muon,
        {"lr": 0.01, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        1,
    )


def build(name, weight):
    optimizer_class, options, _ = OPTIMIZERS[name]
    decay = 0.05 if decay_is_decoupled(name) else 0.01
    return optimizer_class([weight], weight_decay=decay, **copy.deepcopy(options))


def decay_is_decoupled(name):
    return name.startswith(("AdamW", "Muon")) or name.endswith("decoupled")


def loss(weight, step):
    """Sees the direction of the whole weight only; other data at every step."""
    rng = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, weight.shape[1], generator=rng, dtype=torch.float64)
    return (
        torch.tanh(2 * inputs @ (weight / weight.norm()).T).square().mean()
        + (inputs @ (weight / weight.norm()).T).sum(1).sin().mean()
    )


def run(optimizer, weight, steps):
    directions = []
    for step in steps:
        optimizer.zero_grad()
        loss(weight, step).backward()
        optimizer.step()
        directions.append((weight / weight.norm()).detach().clone())
    return torch.stack(directions)


def rescale(optimizer, weight, factor):
    """What the callbacks do, for one weight: ``factor`` is a number or broadcasts against the
    weight."""
    exponents = state_exponents(optimizer)
    with torch.no_grad():
        weight.mul_(factor)
        for key, buffer in optimizer.state[weight].items():
            if key in exponents and buffer is not None:
                buffer.mul_(factor ** exponents[key])


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_50_directions_are_those_of_the_undisturbed_run(name):
    # A power of two for Muon, whose orthogonalisation rounds to bfloat16; 3 shows that the others
    # need no such luck.
    factor = 4.0 if name.startswith("Muon") else 3.0
    lr_exponent = OPTIMIZERS[name][2]
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    undisturbed = nn.Parameter(start.clone())
    expected = run(build(name, undisturbed), undisturbed, range(70))[20:]

    weight = nn.Parameter(start.clone())
    optimizer = build(name, weight)
    run(optimizer, weight, range(20))
    rescale(optimizer, weight, factor)
    group = optimizer.param_groups[0]
    group["lr"] = group["lr"] * factor**lr_exponent
    # The gradient is now 1/factor of what it was. A coupled decay has to follow it; a decoupled one
    # has to undo the learning rate.
    group["weight_decay"] /= factor**lr_exponent if decay_is_decoupled(name) else factor**2
    if "eps" in group:
        group["eps"] /= factor
    actual = run(optimizer, weight, range(20, 70))

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert (expected[-1] - expected[0]).norm() > 1e-3  # the run goes somewhere


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD"])
def test_state_left_alone_disturbs_the_run(name):
    lr_exponent, start = (
        OPTIMIZERS[name][2],
        torch.randn(4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    )
    undisturbed = nn.Parameter(start.clone())
    expected = run(build(name, undisturbed), undisturbed, range(30))[20:]
    weight = nn.Parameter(start.clone())
    optimizer = build(name, weight)
    run(optimizer, weight, range(20))
    with torch.no_grad():
        weight.mul_(4.0)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 4.0**lr_exponent
    assert (run(optimizer, weight, range(20, 30)) - expected).abs().max() > 1e-4


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("Muon")])
def test_random_factors_give_the_state_of_a_run_at_the_scaled_weights(name):
    rng = torch.Generator().manual_seed(3)
    start = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    factors = torch.rand(5, 1, generator=rng, dtype=torch.float64) * 3 + 0.2

    def state_at(weight, rescaled_by=None):
        parameter = nn.Parameter(weight.clone())
        optimizer = build(name, parameter)
        optimizer.param_groups[0].update(
            lr=0.0, weight_decay=0.0, eps=0.0
        )  # the weight stays; the buffers fill
        for step in range(5):
            inputs = torch.randn(
                8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64
            )
            optimizer.zero_grad()
            torch.tanh(
                inputs @ (parameter / parameter.norm(dim=1, keepdim=True)).T
            ).sin().sum().backward()
            optimizer.step()
        if rescaled_by is not None:
            rescale(optimizer, parameter, rescaled_by)
        return optimizer.state[parameter]

    carried, gathered = state_at(start, factors), state_at(factors * start)
    assert carried.keys() == gathered.keys()
    for key, buffer in gathered.items():
        if buffer is not None:
            torch.testing.assert_close(carried[key], buffer, rtol=1e-11, atol=1e-13)


def test_muon_allows_one_factor_per_matrix_only():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    weight = nn.Parameter(torch.randn(4, 3))
    assert per_matrix_only(torch.optim.Muon([weight]))
    assert not any(
        per_matrix_only(build(name, nn.Parameter(torch.randn(4, 3))))
        for name in OPTIMIZERS
        if not name.startswith("Muon")
    )


def test_subclasses_are_what_they_inherit():
    class Named(torch.optim.AdamW):
        pass

    optimizer = Named([nn.Parameter(torch.randn(2, 2))])
    assert state_exponents(optimizer) == {
        "exp_avg": -1.0,
        "exp_avg_sq": -2.0,
        "max_exp_avg_sq": -2.0,
    }
    assert decay_kind(optimizer, optimizer.param_groups[0]) == "decoupled"
    assert supports_decay_takeover(optimizer) is None


def test_unknown_state_is_refused_by_name():
    weight = nn.Parameter(torch.randn(2, 2))
    for unknown in (
        torch.optim.Adafactor([weight]),
        torch.optim.Adadelta([weight]),
        torch.optim.Rprop([weight]),
    ):
        with pytest.raises(
            NotSupportedError, match=rf"state of {type(unknown).__name__} .*optimizer_state='keep'"
        ):
            state_exponents(unknown)
    sgd = torch.optim.SGD([weight], lr=0.1)
    sgd.state[weight] = {"ema": torch.zeros(2, 2), "step": torch.tensor(1.0)}
    with pytest.raises(NotSupportedError, match=r"buffers \['ema'\].*optimizer_state='keep'"):
        state_exponents(sgd)


def test_state_that_is_no_dict_belongs_to_no_weight():
    weight = nn.Parameter(torch.randn(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state.update(k=torch.tensor([3]), total_step=7, ema={"short": 0.0})
    assert state_exponents(optimizer) == {"momentum_buffer": -1.0}


@pytest.mark.parametrize("held", [{0.9: torch.zeros(2, 2)}, [torch.zeros(2, 2)], object()])
def test_buffers_in_containers_are_seen(held):
    weight = nn.Parameter(torch.randn(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"buffers": held, "step": 3, "flag": True}
    with pytest.raises(NotSupportedError, match=r"buffers \['buffers'\]"):
        state_exponents(optimizer)


# ---- The statistics behind a rescaled filter ----


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("norm_class", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_evaluation_after_equals_evaluation_before(dtype, bias, options, norm_class):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, bias=bias, dtype=dtype), norm_class(8, dtype=dtype, **options)
    x = torch.randn(16, 3, 6, 6, dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            batch = conv(x * torch.rand(()).to(dtype))
            nn.functional.batch_norm(
                batch, norm.running_mean, norm.running_var, training=True, momentum=0.3
            )
    norm.eval()
    before = norm(conv(x))
    factor = torch.linspace(0.05, 20, 8, dtype=dtype)
    with torch.no_grad():
        conv.weight.mul_(factor.view(-1, 1, 1, 1))
    stale = (norm(conv(x)) - before).abs().max()
    rescale_batch_norm_(norm.running_mean, norm.running_var, factor, conv.bias, norm.eps)
    error = (norm(conv(x)) - before).abs().max()
    assert stale > 1
    assert error < (1e-12 if dtype == torch.float64 else 1e-5) * max(1, before.abs().max().item())


def norms_of(kinds):
    """Statistics of several normalizations, and what each is rescaled by."""
    generator, norms = torch.Generator().manual_seed(0), []
    for channels, dtype, has_bias, eps in kinds:
        mean, var, factor, bias = torch.rand(4, channels, generator=generator).to(dtype) + 0.5
        norms.append(RunningStatistics(mean, var, factor, bias if has_bias else None, eps))
    return norms


def test_several_normalizations_are_rescaled_as_one_by_one():
    double = torch.float64
    kinds = [(3, double, True, 1e-5), (1, double, True, 1e-5), (4, double, False, 1e-5)]
    kinds += [(2, torch.float32, True, 1e-5), (2, double, True, 1e-3), (5, double, False, 1e-5)]
    together, alone = norms_of(kinds), norms_of(kinds)
    # Of one, an exception has come between its two buffers.
    together[2], alone[2] = (norms[2]._replace(mean=None) for norms in (together, alone))
    rescale_batch_norms_(together)
    for norm in alone:
        rescale_batch_norm_(*norm)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.var, theirs.var)
        assert ours.mean is None or torch.equal(ours.mean, theirs.mean)
        assert ours.var._version == theirs.var._version


def test_a_normalization_behind_two_weights_is_rescaled_twice():
    mean, var = torch.ones(2), torch.ones(2)
    factors = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])
    rescale_batch_norms_([RunningStatistics(mean, var, f, None, 0.0) for f in factors])
    assert mean.tolist() == [2, 3]
    assert var.tolist() == [4, 9]


def test_without_running_statistics_nothing_happens():
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    rescale_batch_norm_(norm.running_mean, norm.running_var, torch.ones(3), None, norm.eps)
    assert norm.running_mean is None


def test_training_goes_on_from_the_corrected_statistics():
    """A factor so small that the variance turns negative: what is used, variance + eps, stays
    positive, and training mends it."""
    norm = nn.BatchNorm1d(2, dtype=torch.float64)
    norm.running_var.fill_(1e-6)
    rescale_batch_norm_(norm.running_mean, norm.running_var, torch.full((2,), 0.1), None, norm.eps)
    assert (norm.running_var < 0).all()
    assert (norm.running_var + norm.eps > 0).all()
    norm(torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert (norm.running_var > 0).all()
    assert norm.eval()(torch.randn(4, 2, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "Adagrad", "RMSprop"])
def test_whether_a_weight_was_stepped_is_told_by_its_buffers(name: str) -> None:
    kind, options, _ = OPTIMIZERS.get(name, (getattr(torch.optim, name, None), {"lr": 0.1}, 1))
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = kind([weight], **options)
    # Adagrad has its buffers from the start.
    assert not has_stepped(optimizer, weight)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert has_stepped(optimizer, weight)
