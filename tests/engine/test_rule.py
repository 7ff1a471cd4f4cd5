"""The configuration of a callback: patterns and what follows from its class."""

from __future__ import annotations

import pytest

from lightning_normdyn import AdaptiveWeightShrink, RadialProjection, WeightRescaling
from lightning_normdyn.engine.rule import Rule, shown


def test_state_key_names_class_params_and_granularity_only():
    assert (
        AdaptiveWeightShrink(0.5).state_key == AdaptiveWeightShrink(0.1, statistic="std").state_key
    )
    assert (
        AdaptiveWeightShrink(0.5).state_key != AdaptiveWeightShrink(0.5, params="net.*").state_key
    )
    assert (
        AdaptiveWeightShrink(0.5).state_key
        != AdaptiveWeightShrink(0.5, granularity="layer").state_key
    )
    assert AdaptiveWeightShrink(0.5).state_key != WeightRescaling(5).state_key


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("auto", False),
        ("!net.0.weight", False),
        ("net.*", True),
        (["net.*", "!net.0.weight"], True),
    ],
)
def test_excluding_names_no_weight(params, expected):
    assert Rule(params).by_name is expected


@pytest.mark.parametrize("granularity", ["", "rows", None])
def test_an_unknown_granularity_is_refused(granularity):
    with pytest.raises(
        ValueError, match="`granularity` must be 'auto', 'filter', 'group', 'layer' or"
    ):
        Rule("auto", granularity)


def test_a_subclass_is_of_the_kind_of_the_rule_below_it():
    class Stronger(AdaptiveWeightShrink):
        pass

    assert Stronger(0.1).kind is AdaptiveWeightShrink(0.1).kind is AdaptiveWeightShrink
    assert RadialProjection().kind is RadialProjection


def test_a_rule_that_writes_acts_and_shows_its_tables():
    rule = Rule()
    assert rule.writes
    assert rule.acts
    assert rule.shows_tables
    assert rule.settings() == {}
    assert [shown(["a"]), shown(["a", "b"])] == ["'a'", "['a', 'b']"]
