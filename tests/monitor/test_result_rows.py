"""What a measured optimizer adds to a row, weight by weight: what is there and what is not."""

from __future__ import annotations

import math

import pytest
import torch
from models import Net, fit, make
from monitoring import momentum, monitor


def rows_of(module, **arguments):
    watch = monitor(**arguments)
    fit(module, [watch], max_epochs=2)
    return watch.history


class WithoutOne(Net):
    """In every second batch, one weight gets no gradient."""

    def on_before_optimizer_step(self, optimizer):
        name, weight = next(iter(self.named_parameters()))
        self.left_out = name
        if self.trainer.global_step % 2:
            weight.grad = None


def test_a_weight_without_a_gradient_has_its_norm_and_no_angle():
    module = make(WithoutOne, make_optimizer=momentum)
    history = rows_of(module)
    name = module.left_out
    for i, row in enumerate(history):
        assert f"weight_norm/{name}" in row or i % 2
        has_angle = f"angular_update/{name}" in row
        assert has_angle == (i % 2 == 0)
        for quantity in ("equilibrium_ratio", "expected_ratio", "pull"):
            assert f"{quantity}/{name}" not in row or has_angle


@pytest.mark.filterwarnings("ignore::lightning_normdyn.errors.NormDynWarning")
def test_where_a_run_has_diverged_predictions_are_nan_and_not_missing():
    def exploding(parameters):
        return torch.optim.SGD(parameters, lr=1e30, momentum=0.9, weight_decay=0.1)

    history = rows_of(make(make_optimizer=exploding))
    last = history[-1]
    predicted = [key for key in last if key.startswith("equilibrium_ratio/")]
    assert predicted
    assert any(math.isnan(last[key]) for key in predicted)


def test_what_is_compared_is_the_quotient_of_what_is_shown():
    row = rows_of(make(make_optimizer=momentum))[-1]
    compared = 0
    for key, ratio in row.items():
        quantity, _, name = key.partition("/")
        of = {"equilibrium_ratio": "equilibrium", "expected_ratio": "expected"}.get(quantity)
        if of is not None and name in ("", *[k.partition("/")[2] for k in row]):
            foreseen = row[f"{of}_angular_update/{name}"]
            assert ratio == pytest.approx(row[f"angular_update/{name}"] / foreseen, rel=1e-5)
            compared += 1
    assert compared > 2
