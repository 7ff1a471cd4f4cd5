"""Checks of what a person gives to a constructor."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn import (
    AdaptiveWeightShrink,
    InputSpanMonitor,
    LRDropRescaling,
    NormDynamicsMonitor,
    RadialProjection,
    WeightRescaling,
)
from lightning_normdyn.engine.arguments import (
    as_float,
    check_choice,
    check_count,
    check_number,
    is_number,
)

TOO_LARGE = {
    "alpha": lambda n: AdaptiveWeightShrink(n),
    "target_norm": lambda n: WeightRescaling(10, target_norm=n),
    "delta": lambda n: RadialProjection(delta=n),
    "weight_decay": lambda n: RadialProjection(weight_decay=n),
    "weight_decay_ratio": lambda n: RadialProjection(weight_decay_ratio=n),
    "exponent": lambda n: LRDropRescaling(exponent=n),
    "min_drop": lambda n: LRDropRescaling(min_drop=n),
    "energy": lambda n: InputSpanMonitor(energy=n),
    "seed": lambda n: InputSpanMonitor(seed=n),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_number_too_large_for_a_float_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        TOO_LARGE[name](10**400)


def test_numbers_of_numpy_are_numbers_everywhere():
    assert AdaptiveWeightShrink(np.float32(0.5)).alpha == 0.5
    assert RadialProjection(delta=np.float64(0.2), weight_decay=np.float32(0.5)).weight_decay == 0.5
    assert LRDropRescaling(exponent=np.float32(0.25), min_drop=np.int64(2)).settings() == {
        "exponent": 0.25,
        "min_drop": 2.0,
    }
    assert NormDynamicsMonitor(np.int64(10)).every_n_steps == 10
    assert (
        InputSpanMonitor(
            np.int64(2), max_samples=np.int32(50), energy=np.float32(0.5), seed=np.int64(3)
        ).max_samples
        == 50
    )
    for refused in (
        lambda: NormDynamicsMonitor(np.float64(10)),
        lambda: WeightRescaling(np.int64(0)),
        lambda: LRDropRescaling(exponent=True),
    ):
        with pytest.raises(ValueError, match="must be"):
            refused()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "1", None, float("inf")])
def test_a_number_that_is_none_is_refused_with_what_was_given(value):
    with pytest.raises(ValueError, match="`alpha` must be"):
        check_number("alpha", value, "> 0")


@pytest.mark.parametrize("value", [0, 1.0, True, "2", None])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(ValueError, match="`every` must be None or an integer >= 1, got"):
        check_count("every", value, 1, "None or ")


def test_what_is_right_comes_back_as_a_plain_number():
    assert check_number("alpha", np.float32(0.5), "> 0") == 0.5
    assert check_number("alpha", 0, ">= 0") == 0.0
    assert type(check_count("every", np.int64(3), 1)) is int
    assert is_number(np.float64(1))
    assert not is_number(True)
    assert as_float(-(10**400)) == -np.inf
    assert check_choice("gate", "cosine", ("always", "cosine")) == "cosine"


def test_a_choice_names_the_others():
    with pytest.raises(ValueError, match="`gate` must be 'always' or 'cosine', got 'x'"):
        check_choice("gate", "x", ("always", "cosine"))
