"""Weights of zeros, on which a rule would have no effect, and callbacks that mean the same
weights."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from cases import EVERYBODY, WRITERS, refused
from models import (
    Net,
    fit,
    make,
    same,
    weights_of,
)
from torch import nn
from walk import SHAPE, Walk, batches, noise, start

from lightning_normdyn import (
    AdaptiveWeightShrink,
    LRDropRescaling,
    NormDynamicsMonitor,
    NormDynWarning,
    NotSupportedError,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.optimizers.step import Phase


def zeroed(**arguments: Any) -> Net:
    module = make(**arguments)
    with torch.no_grad():
        module.net[3].weight.zero_()
    return module


class NeedsLength(AdaptiveWeightShrink):
    """A rule that a weight of zeros would never notice."""

    needs_length = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(0.1, **arguments)


@pytest.mark.parametrize(
    "callback",
    [lambda **k: WeightRescaling(2, target_norm="initial", **k), NeedsLength],
    ids=["wrs", "a rule of somebody else"],
)
@pytest.mark.parametrize("params", ["auto", "net.3.weight"])
def test_a_weight_of_zeros_is_refused_by_name_and_the_way_out_works(callback, params):
    module = zeroed()
    before = weights_of(module)
    with pytest.raises(
        NotSupportedError, match=r"`net\.3\.weight`, but all entries are zero.*'!net\.3\.weight'"
    ):
        fit(module, [callback(params=params)])
    assert same(weights_of(module), before), "refused before the first step"
    assert not any(
        group["weight_decay"] == 0 for group in module.trainer.optimizers[0].param_groups
    )
    fit(zeroed(), [callback(params=["net.0.weight", "net.3.weight", "!net.3.weight"])], max_steps=2)


def test_who_only_looks_and_a_gate_let_a_weight_of_zeros_be():
    fit(
        zeroed(),
        [NormDynamicsMonitor(1, tables=False), RadialProjection(gate="cosine")],
        max_steps=2,
    )


@pytest.mark.parametrize(
    "callback",
    [
        AdaptiveWeightShrink(1.0),
        RadialProjection(),
        LRDropRescaling(exponent=0.25),
        WeightRescaling(1),
    ],
    ids=["aws", "projection", "lr drop", "wrs"],
)
def test_a_weight_of_zeros_is_treated_as_soon_as_it_has_grown(callback):
    module = zeroed(make_scheduler=dropping)
    untreated = zeroed(make_scheduler=dropping)
    for net in (module.net, untreated.net):
        nn.init.ones_(net[4].bias)  # or the ReLU behind it would let no gradient through
    with warnings.catch_warnings():
        # In the first step there is nothing to treat, which is said at the end.
        warnings.filterwarnings(
            "ignore", "\\w+ left vectors alone whose norm is zero", NormDynWarning
        )
        fit(module, [callback], max_epochs=2)
    fit(untreated, [], max_epochs=2)
    assert not torch.equal(module.net[3].weight, untreated.net[3].weight)
    if isinstance(callback, WeightRescaling):
        lengths = module.net[3].weight.detach().flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths))


def dropping(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.1)


def test_a_weight_of_zeros_that_is_unfrozen_later_is_left_to_its_optimizer():
    class Unfreezes(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].weight.requires_grad_(trainer.current_epoch > 0)

    module, callback = zeroed(), NeedsLength()
    module.net[3].weight.requires_grad_(False)
    with pytest.warns(
        NormDynWarning, match=r"`net\.3\.weight`, but all entries are zero.*left to its optimizer"
    ):
        fit(module, [Unfreezes(), callback], max_epochs=2)
    assert [t.name for t in callback.plans[0].targets] == ["net.0.weight"]


@pytest.mark.parametrize("name", WRITERS)
def test_two_of_a_kind_on_one_weight_are_refused_before_training(name):
    first, second = WRITERS[name](params="net.*"), WRITERS[name](params="net.3.weight")
    says = (
        r"Two \w+ callbacks target `net\.3\.weight`\. Give them different `params`, or remove one\."
    )
    refused(make(), [first, second], NotSupportedError, says)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("order", [1, -1])
def test_two_of_a_kind_on_one_weight_are_refused_under_auto_as_well(name, order):
    callbacks = [WRITERS[name](), WRITERS[name](params="net.3.weight")][::order]
    refused(make(), callbacks, NotSupportedError, r"Two \w+ callbacks target `net\.3\.weight`")


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_subclass_is_of_the_same_kind(name):
    base = type(EVERYBODY[name]())
    second = EVERYBODY[name](params="net.3.weight")
    second.__class__ = type("Mine", (base,), {})
    refused(
        make(),
        [EVERYBODY[name](), second],
        NotSupportedError,
        rf"Two {base.__name__} callbacks target `net\.3\.weight`",
    )


class Jealous(NormDynCallback):
    """A rule that says beside whom it cannot act."""

    refuses_beside = {"WeightRescaling": "two hands on one length end in a fight"}  # noqa: RUF012


@pytest.mark.parametrize("params", ["auto", "net.3.weight"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_rule_names_those_that_it_cannot_share_a_weight_with(params: str, order: int) -> None:
    both = [Jealous(params), WeightRescaling(2)][::order]
    says = r"both target `net\.\d\.weight`.*, but two hands on one length.*different `params`"
    refused(make(), both, NotSupportedError, says)
    apart = [Jealous("net.3.weight"), WeightRescaling(2, params="net.0.weight")][::order]
    fit(make(), apart, max_steps=2)
    fit(make(), [Jealous(params), AdaptiveWeightShrink(0.1)], max_steps=2)


def shrinks_by_a_square(name: str, phase: Phase, rank: int = 0) -> Any:
    """A rule that does not commute with a change of scale, under any name."""

    @during(phase)
    def act(self: Any, step: Any) -> None:
        norms = self.plan.vectors.norms()
        self.plan.vectors.scale_(1 / (1 + 0.1 * norms**2))

    worker = type(f"{name}Worker", (Worker,), {"act": act})
    return type(name, (NormDynCallback,), {"worker": worker, "rank": rank})()


def ends(*callbacks: Any) -> torch.Tensor:
    module = Walk(start(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    fit(module, list(callbacks), batches(noise(5, SHAPE)), max_epochs=1)
    return module.weight.detach().clone()


PAIRS = [
    (Phase.RESCALE, lambda: WeightRescaling(1, target_norm=2.0)),
    (Phase.SHRINK, lambda: AdaptiveWeightShrink(0.2)),
    (Phase.PROJECT, RadialProjection),
]


@pytest.mark.parametrize(("phase", "known"), PAIRS)
@pytest.mark.parametrize("name", ["Ball", "Sphere"])
@pytest.mark.parametrize("order", [1, -1])
def test_two_rules_in_one_phase_are_refused_by_name_where_nobody_ranks_them(
    phase: Phase, known: Any, name: str, order: int
) -> None:
    callbacks = [known(), shrinks_by_a_square(name, phase)][::order]
    with pytest.raises(
        NotSupportedError, match=rf"both change `weight` in phase {phase.name}.*`rank`"
    ) as refusal:
        ends(*callbacks)
    assert name in str(refusal.value)
    assert type(known()).__name__ in str(refusal.value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("phase", "known"), PAIRS[:2])
def test_ranked_rules_end_at_the_same_bits_whatever_their_names_and_order(
    phase: Phase, known: Any
) -> None:
    found = {}
    for rank in (-1, 1):
        runs = [
            ends(*[known(), shrinks_by_a_square(name, phase, rank)][::order])
            for name in ("Ball", "Sphere", "Zoo")
            for order in (1, -1)
        ]
        assert all(torch.equal(run, runs[0]) for run in runs)
        found[rank] = runs[0]
    assert not torch.allclose(found[-1], found[1]), (
        "the order makes a difference, so the test can fail"
    )


def test_rules_of_different_phases_or_on_different_weights_need_no_rank() -> None:
    ends(AdaptiveWeightShrink(0.2), shrinks_by_a_square("Ball", Phase.RESCALE))
    free = shrinks_by_a_square("Ball", Phase.SHRINK)
    free.params = ["!net.0.weight"]
    module = make()
    fit(module, [AdaptiveWeightShrink(0.2, params="net.0.weight"), free], max_steps=2)
    assert [t.name for t in free.plans[0].targets] == ["net.3.weight"]


def test_a_rule_that_acts_where_others_look_is_one_that_acts() -> None:
    with pytest.raises(NotSupportedError, match="both change `weight` in phase MEASURE_STEP"):
        ends(
            shrinks_by_a_square("Ball", Phase.MEASURE_STEP),
            shrinks_by_a_square("Sphere", Phase.MEASURE_STEP),
        )


def test_who_looks_comes_before_who_acts_in_one_phase() -> None:
    """The angle of a step must not depend on the name of a rule that acts in the same phase as the
    monitor looks."""
    angles = []
    for name in ("Ball", "Sphere"):
        monitor = NormDynamicsMonitor(1, tables=False)
        ends(monitor, shrinks_by_a_square(name, Phase.MEASURE_STEP))
        angles.append(monitor.history.column("radial_update/weight")[1].tolist())
    assert angles[0] == angles[1]
