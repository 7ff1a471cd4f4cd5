"""The exceptions that this package raises, and how it shows what it refuses."""

from __future__ import annotations

import re

import pytest

import lightning_normdyn
from lightning_normdyn import NormDynError, NormDynWarning, NoTargetsError, NotSupportedError
from lightning_normdyn.errors import shown


def test_exceptions_are_value_errors_of_one_family():
    assert issubclass(NormDynError, ValueError)
    assert issubclass(NoTargetsError, NormDynError)
    assert issubclass(NotSupportedError, NormDynError)


def test_a_warning_can_be_silenced_by_its_class():
    assert issubclass(NormDynWarning, UserWarning)
    assert not issubclass(NormDynWarning, NormDynError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1.0, "-1.0"),
        ("auto", "'auto'"),
        (10**5000, "a number of 16610 bits"),
        ([10**5000], "a list"),
    ],
    ids=["number", "text", "too long", "holds too much"],
)
def test_a_value_is_shown_whatever_it_is(value, text):
    assert shown(value) == text


def test_a_long_value_is_shown_in_short():
    assert len(shown(list(range(10_000)))) < 100


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("AdaptivWeightShrink", "Did you mean `AdaptiveWeightShrink`?"),
        ("NormDynamicMonitor", "Did you mean `NormDynamicsMonitor`?"),
    ],
)
def test_a_near_miss_of_a_public_name_names_the_nearest(name, hint):
    with pytest.raises(AttributeError, match=re.escape(hint)):
        getattr(lightning_normdyn, name)


def test_a_name_that_is_like_no_other_gets_no_hint():
    with pytest.raises(AttributeError, match=r"has no attribute 'qqq'\.$"):
        getattr(lightning_normdyn, "qqq")  # noqa: B009
