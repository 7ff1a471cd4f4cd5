"""Which weight matrices are unlike the others, and the decay that would change it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_normdyn.functional import balanced_angular_update
from lightning_normdyn.theory.comparison import Turning, compared

USUAL = [Turning(f"fc{i}", 0.01, 19.0, 1e-3, 1e-4, 1e-3) for i in range(4)]


def beside_usual(**numbers: Any) -> list[Any]:
    return compared([*USUAL, USUAL[0]._replace(name="odd", **numbers)])


@pytest.mark.parametrize(
    ("angle", "kind"),
    [
        (0.021, "turns faster than its like"),
        (0.019, None),
        (0.0051, None),
        (0.0049, "turns more slowly than its like"),
        (0.0, "turns more slowly than its like"),
    ],
)
def test_a_weight_is_unlike_the_others_beyond_twice_the_median(
    angle: float, kind: str | None
) -> None:
    found = beside_usual(angle=angle)
    assert [(each.weight, each.kind) for each in found] == ([] if kind is None else [("odd", kind)])


def test_the_decay_for_the_median_balances_the_weight_there() -> None:
    (advice,) = beside_usual(angle=0.03, coherence=2.0, lr=5e-4, pull=3e-5)
    numbers = advice.numbers
    assert (numbers["times"], numbers["median"]) == (pytest.approx(3), 0.01)
    assert numbers["decay"] == pytest.approx(0.06)
    pull = 5e-4 * numbers["decay_for_median"]
    assert float(balanced_angular_update(pull, 2.0)) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "changed",
    [
        {"decay_share": 0.24},
        {"coherence": -1.0},
        {"pull": 0.0},
        {"lr": 2e-4},
        {"lr": 0.0},
    ],
)
def test_no_decay_is_named_where_none_follows(changed: dict[str, float]) -> None:
    (advice,) = beside_usual(angle=0.03, **changed)
    assert "decay_for_median" not in advice.numbers
    assert ("share" in advice.numbers) == ("decay_share" in changed)


def test_a_decay_that_matters_is_named_with_its_share() -> None:
    (advice,) = beside_usual(angle=0.03, decay_share=0.26)
    assert advice.numbers["share"] == 0.26
    assert "decay_for_median" in advice.numbers


def test_of_few_weights_or_such_as_do_not_turn_none_is_unlike_the_others() -> None:
    assert compared([*USUAL[:2], USUAL[0]._replace(angle=1.0)]) == []
    still = [weight._replace(angle=0.0) for weight in USUAL]
    assert compared([*still, USUAL[0]]) == []


def test_the_weight_farthest_off_comes_first() -> None:
    names = {"slow": 0.001, "fast": 0.03, "faster": 0.05, "still": 0.0}
    odd = [USUAL[0]._replace(name=name, angle=angle) for name, angle in names.items()]
    found = compared([*USUAL, *USUAL, *odd])
    assert [advice.weight for advice in found] == ["still", "slow", "faster", "fast"]
    distances = [abs(math.log(advice.numbers["times"])) for advice in found[1:]]
    assert distances == sorted(distances, reverse=True)
