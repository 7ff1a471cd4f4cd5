"""State of each vector that outlives plans and checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_normdyn.engine.vector_state import VectorState
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.geometry.vectors import WeightVectors

ROWS = Partition.filters((3, 2))
FIRST_TWO = Partition((0,), torch.tensor([0, 1, -1]), "filter")


def vectors(**partitions: Partition) -> WeightVectors:
    """A weight of three rows for each name."""
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in partitions]
    return WeightVectors(weights, list(partitions.values()), list(partitions))


def take(state: VectorState, chosen: WeightVectors, fresh: list[float] | None) -> torch.Tensor:
    """The state of ``chosen`` under "key"; ``fresh`` None: everything must be known."""

    def make() -> torch.Tensor:
        assert fresh is not None, "asked for what is known"
        return torch.tensor(fresh, dtype=torch.float64)

    return state.take("key", chosen, make, torch.float64)


def test_what_is_changed_in_place_is_what_the_next_plan_gets():
    state = VectorState()
    values = take(state, vectors(a=ROWS, b=ROWS), [0.0] * 6)
    values += torch.arange(6)
    assert take(state, vectors(b=ROWS), None).tolist() == [3, 4, 5]
    # `a` had left, and comes back with what it had.
    assert take(state, vectors(c=ROWS, a=ROWS), [9.0] * 6).tolist() == [9, 9, 9, 0, 1, 2]


def test_a_new_plan_has_a_tensor_of_its_own():
    state = VectorState()
    first = take(state, vectors(a=ROWS), [1.0] * 3)
    second = take(state, vectors(a=ROWS), None)
    second += 1
    assert first.tolist() == [1, 1, 1]
    assert state.gather()["key"]["a"].tolist() == [2, 2, 2]


def test_state_belongs_to_a_partition_and_not_to_a_number_of_vectors():
    state = VectorState()
    take(state, vectors(a=FIRST_TWO), [1.0] * 2)
    columns = Partition.filters((3, 2), axis=1)
    assert take(state, vectors(a=columns), [5.0] * 2).tolist() == [5, 5]


def test_vectors_that_stay_keep_their_state_when_others_join():
    state = VectorState()
    take(state, vectors(a=FIRST_TWO), [1.0, 2.0])
    assert take(state, vectors(a=ROWS), [7.0] * 3).tolist() == [1, 2, 7]


def test_a_checkpoint_holds_everything_and_is_taken_up_once():
    saved = VectorState()
    take(saved, vectors(a=ROWS, b=FIRST_TWO), [1.0, 2.0, 3.0, 4.0, 5.0])
    tables = saved.gather()
    assert {name: values.tolist() for name, values in tables["key"].items()} == {
        "a": [1, 2, 3],
        "b": [4, 5],
    }
    state = VectorState()
    state.restore(tables)
    assert state.gather()["key"].keys() == {"a", "b"}  # handed on while nobody has asked
    values = take(state, vectors(a=ROWS), None)
    values.zero_()
    assert take(state, vectors(a=ROWS), None).tolist() == [0, 0, 0]
    assert state.gather()["key"]["b"].tolist() == [4, 5]


def test_a_saved_state_of_other_vectors_is_not_used():
    state = VectorState()
    state.restore({"key": {"a": torch.ones(2)}})
    assert take(state, vectors(a=ROWS), [7.0] * 3).tolist() == [7, 7, 7]


def test_what_may_be_found_again_is_not_saved():
    state = VectorState()
    state.take("bad", vectors(a=ROWS), lambda: torch.ones(3), torch.bool)
    assert state.gather() == {}


@pytest.mark.parametrize("restored", [False, True])
def test_a_weight_that_took_the_place_of_another_starts_anew(restored):
    state = VectorState()
    if restored:
        state.restore({"key": {"a": torch.ones(3)}})
    else:
        take(state, vectors(a=ROWS), [1.0] * 3)
    state.forget("a")
    assert take(state, vectors(a=ROWS), [4.0] * 3).tolist() == [4, 4, 4]
