"""Runs against each other: the same weights, the same fractions, nothing that is not known."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History
from lightning_normdyn.monitor.run_ratios import as_text, run_ratios


def run_of(curves, steps=40, every=1):
    """A history whose curves are functions of the fraction of the run."""
    history = History()
    for step in range(0, steps, every):
        row = {key: float(curve(step / steps)) for key, curve in curves.items()}
        history.append(step, row, optimizer_step=step + 1)
    return history


def test_fractions_are_those_of_each_run():
    base = run_of({"angular_update/a": lambda at: 0.01, "pull/a": lambda at: 1e-4})
    longer = run_of(
        {
            "angular_update/a": lambda at: 0.02 if at < 0.5 else 0.005,
            "pull/a": lambda at: 3e-4 if at < 0.25 else 1e-4,
        },
        steps=1000,
        every=10,
    )
    (weight,) = run_ratios(longer, base).weights
    assert weight.angles == pytest.approx((2, 2, 0.5, 0.5))
    assert weight.pulls == pytest.approx((3, 1, 1, 1))
    (weight,) = run_ratios(base, longer).weights
    assert weight.angles == pytest.approx((0.5, 0.5, 2, 2))


def test_angles_are_root_mean_squares_and_pulls_means():
    generator = np.random.default_rng(0)
    angles, pulls = generator.uniform(1, 9, (2, 2, 8))
    runs = []
    for own_angles, own_pulls in zip(angles, pulls, strict=True):
        history = History()
        for step, (angle, pull) in enumerate(zip(own_angles, own_pulls, strict=True)):
            history.append(
                step, {"angular_update/a": angle, "pull/a": pull}, optimizer_step=step + 1
            )
        runs.append(history)
    (weight,) = run_ratios(*runs).weights
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        squares = [np.square(own[rows]).mean() for own in angles]
        assert weight.angles[part] == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-6)
        means = [own[rows].mean() for own in pulls]
        assert weight.pulls[part] == pytest.approx(means[0] / means[1], rel=1e-6)


def test_what_nobody_knows_has_no_ratio():
    base = run_of({"angular_update/a": lambda at: 0.01, "pull/a": lambda at: 0.0})
    other = run_of({"angular_update/a": lambda at: float("nan") if at < 0.25 else 0.01})
    (weight,) = run_ratios(other, base).weights
    assert weight.angles[0] is None
    assert weight.angles[1:] == pytest.approx((1, 1, 1))
    assert weight.pulls == (None,) * 4
    assert "-" in as_text("b over a", run_ratios(other, base), 80)


def test_weights_that_differ_most_come_first_and_the_median_of_all_above():
    times = {"a": 1.0, "b": 0.2, "c": 3.0, "d": 1.1}
    base = run_of({f"angular_update/{name}": lambda at: 0.01 for name in times})
    other = run_of(
        {f"angular_update/{name}": lambda at, x=x: 0.01 * x for name, x in times.items()}
    )
    ratios = run_ratios(other, base)
    assert [weight.name for weight in ratios.farthest_first] == ["b", "c", "d", "a"]
    assert ratios.medians.angles == pytest.approx((1.05,) * 4)
    lines = as_text("other over base", ratios, 80).splitlines()
    names = [line.split()[0] for line in lines[5:10]]
    assert names == ["(median)", "b", "c", "d", "a"]
    assert max(map(len, lines)) <= 80


def test_weights_without_a_namesake_are_counted_and_none_in_common_is_refused():
    base = run_of({"angular_update/a": lambda at: 0.01, "angular_update/b": lambda at: 0.01})
    other = run_of({"angular_update/b": lambda at: 0.01, "angular_update/c": lambda at: 0.01})
    ratios = run_ratios(other, base)
    assert [weight.name for weight in ratios.weights] == ["b"]
    assert "1 of the first run alone and 1 of the other run alone" in ratios.left_out
    assert not run_ratios(base, base).left_out
    third = run_of({"weight_norm/a": lambda at: 1.0})
    with pytest.raises(NormDynError, match="no weight in common"):
        run_ratios(third, base)
