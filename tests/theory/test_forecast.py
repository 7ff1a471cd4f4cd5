"""Forecasts: norms are those of the course, and advice is given exactly where its condition
holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from paper_optimizers import group_of

from lightning_normdyn.theory import group_norms
from lightning_normdyn.theory.course import NormCourse
from lightning_normdyn.theory.equilibrium import (
    equilibrium_angular_update,
    equilibrium_norm,
    never_settles,
)
from lightning_normdyn.theory.forecast import (
    GroupForecast,
    GroupWeights,
    Measured,
    forecast_group,
)
from lightning_normdyn.theory.schedule import Schedule, constant_schedule

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


# --- the norms
# --------------------------------------------------------------------------------------------------


def scheduled(kind: type, rates: list[float], **hyper: Any) -> Schedule:
    group = {k: v for k, v in group_of(kind, lr=rates[0], **hyper).items() if k != "params"}
    return Schedule(tuple({**group, "lr": rate} for rate in rates))


def kinds_of(forecast: GroupForecast) -> list[str]:
    return [advice.kind for advice in forecast.advice]


def numbers_of(forecast: GroupForecast, kind: str) -> dict[str, float]:
    return next(dict(advice.numbers) for advice in forecast.advice if advice.kind == kind)


RAMP = [1e-3 * min(1.0, (t + 1) / 20) for t in range(200)]


def test_norms_are_those_of_the_course() -> None:
    schedule = scheduled(ADAMW, RAMP, weight_decay=0.1)
    forecast = forecast_group(ADAMW, schedule, GroupWeights([1.0, 3.0], [64, 9]))
    course = NormCourse(ADAMW, schedule.groups[0], [1.0, 3.0], [64, 9])
    for row, group in enumerate(schedule.groups):
        assert forecast.norms[row].tolist() == course.weight_norm.tolist()
        course.advance(group)
    assert forecast.norms[-1].tolist() == course.weight_norm.tolist()
    assert forecast.norm_steps == tuple(range(201))
    assert forecast.peak_lr == 1e-3
    assert forecast.timescale == pytest.approx(1 / (1e-3 * 0.1))
    assert forecast.total_pull == pytest.approx(sum(RAMP) * 0.1)
    assert forecast.relaxation == pytest.approx(1 / (2 * 1e-3 * 0.1))
    assert forecast.settled_norms == pytest.approx(
        [math.sqrt(1e-3 * 64 / 0.2), math.sqrt(1e-3 * 9 / 0.2)]
    )


def test_sgd_has_norms_where_its_gradients_were_measured() -> None:
    schedule = scheduled(SGD, [0.1] * 50, momentum=0.9, weight_decay=1e-3)
    blind = forecast_group(SGD, schedule, GroupWeights([2.0], [64]))
    assert blind.norms is None
    assert blind.norm_steps == ()
    assert blind.settled_norms is None
    # Momentum repeats a coupled decay.
    assert blind.timescale == pytest.approx(1 / (0.1 * 1e-2))
    assert blind.angle == pytest.approx(math.sqrt(2 * 0.1 * 1e-3 / 1.9))
    seeing = forecast_group(SGD, schedule, GroupWeights([2.0], [64], gradient_scale=[5.0]))
    course = NormCourse(SGD, schedule.groups[0], [2.0], 64)
    for group in schedule.groups:
        course.advance(group, 5.0)
    assert seeing.norms[-1].tolist() == course.weight_norm.tolist()


@pytest.mark.parametrize(("kind", "falls"), [(ADAMW, False), (SGD, True)])
def test_norms_follow_from_what_was_measured(kind: type, falls: bool) -> None:
    schedule = scheduled(kind, RAMP, weight_decay=0.1)
    measured = Measured([5.0, -2.0], [40.0, 3.0])
    weights = GroupWeights([1.0, 3.0], [64, 9])
    forecast = forecast_group(kind, schedule, weights, measured=measured)
    for i, (norm, coherence, energy) in enumerate(((1.0, 5.0, 40.0), (3.0, -2.0, 3.0))):
        square = norm**2
        for lr in RAMP:
            size = energy / square if falls else energy
            square = (1 - lr * 0.1) ** 2 * square + coherence * lr**2 * size
        assert forecast.norms[-1, i] == pytest.approx(math.sqrt(square))


def test_a_long_run_is_followed_in_steps_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [3e-3 * (1 - t / 2000) for t in range(2000)]
    schedule = scheduled(ADAMW, rates, weight_decay=0.3, betas=(0.9, 0.98))
    weights = GroupWeights([0.4, 1.0], [64, 64])
    monkeypatch.setattr(group_norms, "_LONGEST_COURSE", 2000)
    exact = forecast_group(ADAMW, schedule, weights)
    monkeypatch.setattr(group_norms, "_LONGEST_COURSE", 300)
    coarse = forecast_group(ADAMW, schedule, weights)
    assert len(coarse.norm_steps) < 310
    assert coarse.norm_steps[-1] == 2000
    at_same_steps = exact.norms[list(coarse.norm_steps)]
    assert coarse.norms == pytest.approx(at_same_steps, rel=0.04)


def test_rows_that_stand_for_several_steps_count_as_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_norms, "_LONGEST_COURSE", 10)
    whole = scheduled(ADAMW, [1e-3 * (1 + t // 4) for t in range(40)], weight_decay=0.3)
    thinned = Schedule(whole.groups[::4], stride=4, steps=38)
    weights = GroupWeights([0.4], [64])
    one = forecast_group(ADAMW, whole.first(38), weights)
    other = forecast_group(ADAMW, thinned, weights)
    assert (other.steps, other.norm_steps[-1]) == (38, 38)
    assert other.total_pull == pytest.approx(one.total_pull)
    assert other.norms[-1] == pytest.approx(one.norms[-1])


def test_muon_asks_for_the_shape_of_each_weight() -> None:
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        pytest.skip("this torch has no Muon")
    schedule = scheduled(kind, [3e-3] * 60, weight_decay=0.3)
    norms, dims, shapes = [3.0, 4.0, 3.0], [64 * 64, 64 * 256, 64 * 64], [(64, 64), (64, 256)]
    together = forecast_group(kind, schedule, GroupWeights(norms, dims, [*shapes, shapes[0]]))
    assert together.is_rough
    for i, shape in enumerate(shapes):
        alone = forecast_group(kind, schedule, GroupWeights([norms[i]], [dims[i]], [shape]))
        assert together.norms[:, i].tolist() == alone.norms[:, 0].tolist()
        assert together.settled_norms[i] == alone.settled_norms[0]
    assert together.norms[:, 2].tolist() == together.norms[:, 0].tolist()
    # Nothing is advised on the ground of steps of a rough length.
    assert not [k for k in kinds_of(together) if "norm" in k or "warm-up" in k]
    without = forecast_group(kind, schedule, GroupWeights(norms, dims))
    assert (without.norms, without.angle) == (None, None)
    assert without.timescale == pytest.approx(1 / (3e-3 * 0.3))


def test_nadam_settles_by_the_end_of_its_peak() -> None:
    """Its momentum still rises after thousands of steps."""
    kind = torch.optim.NAdam
    hyper = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    angles = []
    for steps in (100, 5000):
        schedule = scheduled(kind, [1e-3] * steps, **hyper)
        angles.append(forecast_group(kind, schedule, GroupWeights([1.0], [64])).angle)
    group = group_of(kind, lr=1e-3, **hyper)
    for angle, steps in zip(angles, (100, 5000), strict=True):
        assert angle == pytest.approx(equilibrium_angular_update(kind, group, step=steps))
    assert angles[0] > 1.2 * angles[1]


def test_a_measured_coherence_says_where_weights_of_any_kind_settle() -> None:
    schedule = scheduled(ADAMW, RAMP, weight_decay=0.1)
    weights = GroupWeights([1.0, 1.0, 1.0], [64, 64, 64])
    measured = Measured([4.0, 16.0, -3.0], [40.0] * 3)
    forecast = forecast_group(ADAMW, schedule, weights, measured=measured)
    # Where the loss alone holds the norm, no angle does.
    expected = [math.sqrt(2 * 1e-3 * 0.1 / kappa) for kappa in (4.0, 16.0)]
    assert forecast.angle == pytest.approx(sum(expected) / 2)
    assert forecast.coherence == 4.0
    assert forecast.settled_norms is None


def test_without_weights_only_what_follows_from_the_schedule_is_told() -> None:
    schedule = scheduled(ADAMW, RAMP, weight_decay=0.1)
    forecast = forecast_group(ADAMW, schedule, GroupWeights([], []))
    assert forecast.timescale == pytest.approx(1e4)
    assert (forecast.norms, forecast.angle, forecast.settled_norms) == (None, None, None)


def test_the_rest_of_a_run_is_not_asked_for_its_warm_up_or_held_against_a_memory() -> None:
    schedule = scheduled(ADAMW, [1e-2] * 900, weight_decay=0.1)
    weights = GroupWeights([0.1], [64])
    fresh = forecast_group(ADAMW, schedule, weights)
    rest = forecast_group(ADAMW, schedule, weights, goes_on=True)
    gone = {"warm-up too short", "memory longer than the run"}
    assert set(kinds_of(fresh)) - set(kinds_of(rest)) == gone
    assert set(kinds_of(rest)) < set(kinds_of(fresh))


def test_a_schedule_that_nobody_knows_has_no_warm_up_to_judge() -> None:
    known = scheduled(ADAMW, [1e-2] * 900, weight_decay=0.1)
    assumed = Schedule(known.groups, is_assumed=True)
    forecast = forecast_group(ADAMW, assumed, GroupWeights([0.1], [64]))
    assert forecast.is_assumed
    assert not [kind for kind in kinds_of(forecast) if "warm-up" in kind]


def test_an_optimizer_that_nobody_knows_has_no_forecast_of_norms() -> None:
    schedule = scheduled(torch.optim.Adadelta, [0.1] * 9, weight_decay=0.1)
    forecast = forecast_group(torch.optim.Adadelta, schedule, GroupWeights([1.0], [9]))
    assert (forecast.timescale, forecast.total_pull, forecast.angle, forecast.norms) == (None,) * 4
    assert forecast.advice == ()


@pytest.mark.parametrize(
    ("rates", "norms", "message"),
    [([], [1.0], "at every step"), ([math.nan], [1.0], "at every step"), ([0.1], [], "one each")],
)
def test_impossible_arguments_are_refused(rates: Any, norms: Any, message: str) -> None:
    schedule = Schedule(tuple({"lr": lr, "weight_decay": 0.1} for lr in rates))
    with pytest.raises(ValueError, match=message):
        forecast_group(ADAMW, schedule, GroupWeights(norms, [9]))


# --- advice
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "acts"), [(400, False), (600, True)])
def test_decay_that_shrinks_less_than_by_half_a_power_of_e_cannot_act(
    steps: int, acts: bool
) -> None:
    schedule = scheduled(ADAMW, [1e-2] * steps, weight_decay=0.1)
    forecast = forecast_group(ADAMW, schedule, GroupWeights([1.0], [64]))
    assert ("decay cannot act" not in kinds_of(forecast)) == acts
    if not acts:
        numbers = numbers_of(forecast, "decay cannot act")
        assert numbers == {
            "relaxation": pytest.approx(500),
            "steps": steps,
            "left": pytest.approx(math.exp(-0.4)),
        }


@pytest.mark.parametrize(
    ("steps", "epoch", "kind"),
    [
        (900, 10, "memory longer than the run"),
        (1100, 2000, "memory shorter than an epoch"),
        (1100, 500, None),
        (1100, None, None),
    ],
)
def test_memory_is_remarked_upon_outside_of_an_epoch_and_the_run(
    steps: int, epoch: int | None, kind: str | None
) -> None:
    schedule = scheduled(ADAMW, [1e-2] * steps, weight_decay=0.1)
    weights = GroupWeights([1.0], [64])
    forecast = forecast_group(ADAMW, schedule, weights, steps_per_epoch=epoch)
    found = [name for name in kinds_of(forecast) if name.startswith("memory")]
    assert found == ([] if kind is None else [kind])
    if kind is not None:
        numbers = numbers_of(forecast, kind)
        assert numbers["share_of_run"] == pytest.approx(1000 / steps)
        assert numbers["epochs"] == pytest.approx(1000 / epoch)


@pytest.mark.parametrize(
    ("times", "warm_up", "kind"),
    [
        (0.25, 0, "warm-up too short"),
        (0.25, 900, None),
        (1.0, 20, "no warm-up needed"),
        (1.0, 0, None),
        (3.0, 20, "no warm-up needed"),
    ],
)
def test_a_warm_up_is_held_against_the_steps_that_turn_too_fast(
    times: float, warm_up: int, kind: str | None
) -> None:
    lr, decay = 1e-2, 0.05
    rates = [lr * min(1.0, (t + 1) / (warm_up + 1)) for t in range(1000)]
    schedule = scheduled(ADAMW, rates, weight_decay=decay, betas=(0.9, 0.98))
    start = times * math.sqrt(lr * 64 / (2 * decay))
    forecast = forecast_group(ADAMW, schedule, GroupWeights([start], [64]))
    found = [name for name in kinds_of(forecast) if "warm-up" in name]
    assert found == ([] if kind is None else [kind])
    if kind == "warm-up too short":
        # The steps that its norm takes to half of the equilibrium norm, at which it turns twice as
        # fast; in the course, the second moment lags behind a little.
        fast = numbers_of(forecast, kind)["fast_steps"]
        reached = int((forecast.norms[:, 0] < 2 * start).sum())
        assert fast == pytest.approx(math.log((1 - 1 / 16) / 0.75) / (2 * lr * decay))
        assert reached == pytest.approx(fast, rel=0.15)


def test_a_norm_that_shrinks_in_the_cool_down_is_told() -> None:
    lr, decay = 1e-2, 0.3
    start = math.sqrt(lr * 64 / (2 * decay))
    cooling = [lr] * 250 + [lr * (1 - t / 750) for t in range(750)]
    schedule = scheduled(ADAMW, cooling, weight_decay=decay)
    forecast = forecast_group(ADAMW, schedule, GroupWeights([start], [64]))
    numbers = numbers_of(forecast, "norm shrinks in the cool-down")
    # Up to .999 of the peak counts as the peak.
    shrinks = 1 - forecast.norms[-1, 0] / forecast.norms[250, 0]
    assert numbers["shrinks"] == pytest.approx(shrinks)
    assert numbers["gradients"] == pytest.approx(1 / (1 - numbers["shrinks"]))
    constant = constant_schedule(schedule.groups[0], 1000)
    steady = forecast_group(ADAMW, constant, GroupWeights([3 * start], [64]))
    # It shrinks as well, but to its equilibrium, and no rate falls.
    assert steady.norms[-1, 0] < 0.5 * steady.norms[0, 0]
    assert "norm shrinks in the cool-down" not in kinds_of(steady)


def test_a_norm_that_nothing_holds_doubles() -> None:
    weights = GroupWeights([0.5], [64])
    free = forecast_group(ADAMW, scheduled(ADAMW, [1e-2] * 400, weight_decay=0.0), weights)
    steps = numbers_of(free, "norm doubles")["steps"]
    growth = math.log(free.norms[-1, 0] / free.norms[0, 0])
    assert steps == pytest.approx(400 * math.log(2) / growth)
    assert free.timescale is None
    start = equilibrium_norm(ADAMW, group_of(ADAMW, lr=1e-2, weight_decay=0.3), dim=64)
    held = scheduled(ADAMW, [1e-2] * 400, weight_decay=0.3)
    assert "norm doubles" not in kinds_of(forecast_group(ADAMW, held, GroupWeights([start], [64])))


def test_adafactor_never_settles() -> None:
    kind = torch.optim.Adafactor
    forecast = forecast_group(
        kind, scheduled(kind, [0.01] * 9, weight_decay=0.1), GroupWeights([1.0], [9])
    )
    assert numbers_of(forecast, "never settles") == {"lr": 0.01, "decay": 0.1}
    assert forecast.advice[-1].reason == never_settles(kind, group_of(kind, lr=0.01))
