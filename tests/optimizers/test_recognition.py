"""Which row of the table an optimizer steps by."""

from __future__ import annotations

import doubles
import pytest
import torch
from torch import nn

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.optimizers.decay import (
    optimizer_decay,
    supports_decay_takeover,
)
from lightning_normdyn.optimizers.recognition import (
    Unknown,
    applied_rate,
    class_for_predictions,
    evaluates_closure_often,
    facts_of,
    follows_from_groups,
    has_plain_rate,
    is_schedule_free,
    row_of,
    sets_weights_back,
    steps_like,
    writes_into_groups,
)
from lightning_normdyn.optimizers.state import (
    state_exponents,
    step_buffer,
)
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
)


def test_schedule_free_is_told_by_what_it_does_and_refused():
    weight = nn.Parameter(torch.randn(2, 2))
    optimizer = doubles.ScheduleFree([weight])
    assert is_schedule_free(optimizer)
    with pytest.raises(NotSupportedError, match="Use another optimizer"):
        state_exponents(optimizer)
    assert "schedule-free" in supports_decay_takeover(optimizer)


@pytest.mark.parametrize("kind", [doubles.HasModes, doubles.DualAveraging, doubles.SlowCopy])
def test_names_of_attributes_make_nobody_schedule_free(kind):
    weight = nn.Parameter(torch.randn(2, 2))
    optimizer = kind([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not is_schedule_free(optimizer)
    marked = torch.optim.SGD([{"params": [weight], "train_mode": True}], lr=0.1)
    marked.state[weight] = {"z": torch.zeros(2, 2)}
    assert not is_schedule_free(marked)


def test_an_own_step_is_unknown_unless_it_steps_as_its_base():
    weight = nn.Parameter(torch.randn(2, 2))
    assert state_exponents(doubles.LoggingSGD([weight], lr=0.1, momentum=0.9)) == {
        "momentum_buffer": -1.0
    }
    with pytest.raises(NotSupportedError, match=r"state of ClippingSGD.*differs from that of SGD"):
        state_exponents(doubles.ClippingSGD([weight], lr=0.1, momentum=0.9))
    with pytest.raises(
        NotSupportedError, match=r"state of SlowCopy.*AdamW"
    ):  # before it has any state
        state_exponents(doubles.SlowCopy([weight]))
    assert (
        step_buffer(
            doubles.ClippingSGD([weight], lr=0.1, momentum=0.9),
            {"momentum": 0.9, "nesterov": False},
        )
        is None
    )


def weight():
    return nn.Parameter(torch.ones(3, 4))


def predicted(optimizer):
    return equilibrium_angular_update(class_for_predictions(optimizer), optimizer.param_groups[0])


def test_a_subclass_that_overrides_a_helper_of_the_step_is_another_optimizer():
    class Own(torch.optim.SGD):
        def _init_group(self, *arguments, **options):
            return super()._init_group(*arguments, **options)

    assert not steps_like(Own, torch.optim.SGD)
    assert predicted(Own([weight()], lr=0.1, weight_decay=0.1)) == pytest.approx(
        (2 * 0.1 * 0.1) ** 0.5
    )  # a trial shows that it is none


def test_an_own_step_has_predictions_only_if_a_trial_shows_that_it_is_its_bases():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert predicted(doubles.LoggingSGD([weight()], **options)) == predicted(
        torch.optim.SGD([weight()], **options)
    )
    clipping = doubles.ClippingSGD([weight()], **options)
    assert class_for_predictions(clipping) is Unknown
    assert predicted(clipping) is None
    assert facts_of(clipping).exponents is None
    assert optimizer_decay(clipping, clipping.param_groups[0]) is None


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("fixed_decay", True, False),
        ("weight_decouple", False, False),
        ("cautious", True, False),
        ("corrected_weight_decay", 1.0, False),
        ("mode", "other", False),
        ("foreach", True, True),
        ("initial_lr", 0.3, True),
        ("name", "head", True),
        ("step", 7, True),
        ("caution", False, True),
    ],
)
def test_an_option_that_a_rule_by_name_does_not_know_leaves_no_prediction(key, value, known):
    optimizer = doubles.Lion([{"params": [weight()], key: value}], weight_decay=0.1)
    assert (predicted(optimizer) is not None) is known


def test_an_attribute_that_switches_something_on_leaves_no_prediction():
    optimizer = doubles.Lion([weight()], weight_decay=0.1)
    assert predicted(optimizer) is not None
    optimizer.use_gc = True
    assert predicted(optimizer) is None


def test_who_sets_weights_back_is_told():
    assert sets_weights_back(torch.optim.Adam([weight()])) is None
    assert sets_weights_back(doubles.HasModes([weight()])) is None
    assert sets_weights_back(doubles.SlowCopy([weight()])) < 0.8


class PlainSubclass(torch.optim.SGD):
    """Adds nothing to the step."""


def test_steps_like_looks_at_the_step_alone():
    other = type("Other", (torch.optim.SGD,), {"step": lambda self, closure=None: None})
    assert steps_like(PlainSubclass, torch.optim.SGD)
    assert not steps_like(other, torch.optim.SGD)
    assert not steps_like(torch.optim.Adam, torch.optim.SGD)


@pytest.mark.parametrize(
    ("optimizer_class", "group", "name"),
    [
        (torch.optim.AdamW, {}, "AdamW"),
        (PlainSubclass, {}, "SGD"),
        (doubles.Plain, {"relative_step": False}, "Adafactor"),
        (doubles.Plain, {"d": 1e-6, "growth_rate": 2.0}, "DAdaptation"),
        (doubles.Prodigy, {"d": 1e-6}, "DAdaptation"),
        (doubles.Plain, {"d": 3}, None),
        (doubles.Plain, {"step_count": 0}, "HeavyBall"),
        (type("Any", (), {"__module__": "heavyball.optimizers"}), {}, "HeavyBall"),
        (type("Any", (), {"__module__": "schedulefree.sgd"}), {}, "ScheduleFree"),
        (doubles.Plain, {}, None),
    ],
)
def test_a_row_is_found_by_the_step_by_the_name_or_by_what_class_and_group_show(
    optimizer_class, group, name
):
    row = row_of(optimizer_class, group)
    assert (None if row is None else row.name) == name


def test_only_a_step_that_was_read_writes_nothing_into_groups():
    assert not writes_into_groups(torch.optim.SGD)
    assert not writes_into_groups(PlainSubclass)
    assert writes_into_groups(doubles.LoggingSGD)
    assert writes_into_groups(doubles.Lion)


def test_a_class_of_the_name_of_one_with_many_closures_is_one():
    class LBFGS(doubles.Plain):
        """Another package's."""

    derived = type("Derived", (LBFGS,), {})
    assert evaluates_closure_often(derived([weight()]))
    assert not evaluates_closure_often(doubles.Plain([weight()]))


def test_a_rate_on_a_device_is_not_waited_for():
    weight = nn.Parameter(torch.ones(3, 4, device="meta"))  # reading it would raise
    optimizer = doubles.Prodigy([weight], lr=torch.tensor(1.0, device="meta"))
    rate = applied_rate(optimizer, optimizer.param_groups[0], weight)
    assert isinstance(rate, torch.Tensor)
    assert rate.device.type == "meta"


def test_a_warmup_that_is_not_of_the_rate_is_told_by_the_decay():
    weight = nn.Parameter(torch.ones(3, 4))
    options = {"lr": 0.1, "weight_decay": 1e-9}
    other = doubles.WarmsUpSomethingElse([weight], **options)
    assert applied_rate(other, other.param_groups[0], weight) == 0.1
    its_own = doubles.OwnWarmup([weight], **options)
    assert applied_rate(its_own, its_own.param_groups[0], weight) is None


def test_a_rate_is_plain_or_differs_between_weights_where_the_table_says_so():
    weight = nn.Parameter(torch.ones(3, 4))
    sgd, asgd = torch.optim.SGD([weight]), torch.optim.ASGD([weight])
    relative, unknown = doubles.RelativeStep([weight]), doubles.Plain([weight])
    optimizers = (sgd, asgd, relative, unknown)
    assert list(map(has_plain_rate, optimizers)) == [True, False, False, False]
    differs = [facts_of(o).rate_by_weight for o in optimizers]
    assert differs == [False, True, True, False]


def test_of_torchs_own_optimizers_all_follows_from_class_and_groups():
    class Counting(torch.optim.SGD):
        """With torch's own step."""

    class Stepping(torch.optim.SGD):
        """With a step of its own."""

        def step(self, closure=None):
            return super().step(closure)

    weights = [nn.Parameter(torch.ones(2, 3))]
    assert follows_from_groups(torch.optim.AdamW)
    assert follows_from_groups(torch.optim.SGD(weights, lr=0.1))
    assert follows_from_groups(Counting(weights, lr=0.1))
    assert not follows_from_groups(Stepping(weights, lr=0.1))
