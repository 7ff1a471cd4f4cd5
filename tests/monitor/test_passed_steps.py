"""What is remembered of steps that nobody measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.passed_steps import MOST_CHANGES, STATE, PassedSteps


def group(lr=0.1, **others):
    return {"params": [], "lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.01, **others}


def rates(passed, since=0):
    """The learning rate of every step, by number."""
    by_number = {}
    for stretch in passed.since(since):
        for number in range(stretch.first, stretch.last + 1):
            by_number[number] = stretch.settings[0]["lr"]
    return by_number


def noted(lrs):
    passed = PassedSteps()
    for number, lr in enumerate(lrs, 1):
        passed.note(number, [group(lr)])
    return passed


def test_every_step_is_remembered():
    lrs = [0.1, 0.1, 0.2, 0.2, 0.1, 0.3]
    assert rates(noted(lrs)) == dict(enumerate(lrs, 1))
    assert rates(noted(lrs), since=3) == {4: 0.2, 5: 0.1, 6: 0.3}


def test_a_constant_schedule_is_one_entry():
    assert len(noted([0.1] * 1000).since(0)) == 1


def test_a_step_that_is_taken_again_counts_once_with_its_last_numbers():
    passed = noted([0.1, 0.1, 0.1])
    passed.note(3, [group(0.5)])
    passed.note(4, [group(0.1)])
    assert rates(passed) == {1: 0.1, 2: 0.1, 3: 0.5, 4: 0.1}


def test_after_a_gap_nothing_before_it_is_known():
    passed = noted([0.1, 0.1])
    passed.note(5, [group(0.2)])
    assert passed.since(2) == []
    assert rates(passed, since=4) == {5: 0.2}


def test_what_is_forgotten_leaves_the_rest():
    passed = noted([0.1, 0.2, 0.2, 0.2, 0.3])
    passed.forget(3)
    assert rates(passed, since=3) == {4: 0.2, 5: 0.3}


@pytest.mark.parametrize("kind", [np.float32, lambda x: torch.tensor(x), lambda x: np.array([x])])
def test_numbers_in_any_form_are_floats(kind):
    passed = noted([kind(0.5), kind(0.25)])
    assert rates(passed) == {1: 0.5, 2: 0.25}


def test_a_tensor_that_is_changed_in_place_is_read_at_every_step():
    lr = torch.tensor(0.5)
    passed = PassedSteps()
    passed.note(1, [group(lr)])
    lr.fill_(0.25)
    passed.note(2, [group(lr)])
    assert rates(passed) == {1: 0.5, 2: 0.25}


def test_only_numbers_are_kept():
    passed = PassedSteps()
    passed.note(1, [group(param_names=["a"], foreach=None, nesterov=True, adjust="match_rms")])
    assert set(passed.since(0)[0].settings[0]) == {"lr", "betas", "weight_decay"}


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_weights_are_no_settings(entries):
    passed = PassedSteps()
    passed.note(1, [{"lr": 0.1, "params": [torch.nn.Parameter(torch.ones(entries))]}])
    assert passed.since(0)[0].settings[0] == {"lr": 0.1}


def test_a_checkpoint_gives_it_all_back():
    passed = noted([0.1, 0.2, 0.2, 0.3])
    STATE(passed.state(), "state")
    other = PassedSteps()
    other.load(passed.state())
    assert other.since(0) == passed.since(0)
    other.note(5, [group(0.3)])
    assert rates(other)[5] == 0.3


def lr_as_text(state):
    state["settings"][0][0]["lr"] = "fast"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lr_as_text, "lr"),
        (lambda state: state["numbers"].pop(), "without settings"),
        (lambda state: state["numbers"].reverse(), "another order"),
        (lambda state: state.update(newest=1), "another order"),
        (lambda state: state.update(newest=-1), "newest"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, message):
    state = noted([0.1, 0.2]).state()
    STATE(state, "state")
    damage(state)
    with pytest.raises(NormDynError, match=message):
        STATE(state, "state")


@pytest.mark.parametrize("other", [{"lr": (0.1, 0.2)}, {"momentum": 0.9}, {"betas": 0.9}])
def test_settings_of_another_optimizer_are_not_believed(other):
    state = noted([0.1, 0.2]).state()
    passed = PassedSteps()
    passed.load(state)
    passed.note(3, [{**group(0.3), **other}])
    assert passed.oldest == 3


def test_a_group_may_have_joined_since_the_checkpoint():
    passed = PassedSteps()
    passed.load(noted([0.1, 0.2]).state())
    passed.note(3, [group(0.3), group(0.4)])
    assert passed.oldest == 1


def test_a_schedule_that_nobody_logs_keeps_within_bounds():
    passed = noted(np.linspace(1, 2, 3 * MOST_CHANGES))
    assert len(passed.since(0)) <= MOST_CHANGES
    found = rates(passed)
    assert len(found) == 3 * MOST_CHANGES
    assert found[1] == pytest.approx(1.0)
    assert found[3 * MOST_CHANGES] == pytest.approx(2.0)
