"""What is known of the signs of values, whatever they were computed from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_normdyn.invariance.flow import Sign
from lightning_normdyn.invariance.graph import trace


def sign_of(result: torch.Tensor) -> Sign:
    graph = trace(result, {}, lambda node: ("", None))
    return graph.signs.of(graph.root)


def x() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


SIGNS = {
    "a tensor": (lambda: x() + x(), Sign.ANY),
    "relu": (lambda: x().relu(), Sign.NONNEGATIVE),
    "softmax": (lambda: x().softmax(1), Sign.NONNEGATIVE),
    "a square": (lambda: (lambda a: a * a)(x()), Sign.NONNEGATIVE),
    "a product": (lambda: x() * x(), Sign.ANY),
    "a product of what is not negative": (lambda: x().relu() * x().abs(), Sign.NONNEGATIVE),
    "a product with a constant": (lambda: x().relu() * torch.randn(4), Sign.ANY),
    "a sum of what is not negative": (lambda: x().exp().sum(1), Sign.STATISTIC),
    "a mean of anything": (lambda: x().mean(), Sign.ANY),
    "a product of matrices": (lambda: x().relu() @ x().relu().t(), Sign.STATISTIC),
    "a vector with itself": (lambda: (lambda a: a.dot(a))(x()[0]), Sign.STATISTIC),
    "a view": (lambda: x().relu().view(2, 6).t(), Sign.NONNEGATIVE),
    "joined with anything": (lambda: torch.cat([x().relu(), x()]), Sign.ANY),
    "two terms": (lambda: x().relu() + x().exp(), Sign.NONNEGATIVE),
    "a difference": (lambda: x().relu() - x().exp(), Sign.ANY),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_of_values(name):
    make, expected = SIGNS[name]
    assert sign_of(make()) == expected


def test_nothing_is_known_of_a_constant():
    graph = trace(x().relu(), {}, lambda node: ("", None))
    assert graph.signs.of(None) == Sign.ANY


# Linear attention: ones are appended to the values, attended to with the values, and cut off as the
# denominator.
APPENDED = {
    "columns": (lambda: (x().relu() @ F.pad(values(), (0, 1), value=1.0))[:, 2:], True),
    "columns of both": (lambda: (x().relu() @ F.pad(values(), (0, 1), value=1.0))[:, 1:], False),
    "rows": (
        lambda: (F.pad(values().t(), (0, 0, 0, 1), value=1.0) @ x().relu().t())[2:],
        True,
    ),
    "rows that were turned": (
        lambda: (F.pad(values(), (0, 1), value=1.0).transpose(0, 1) @ x().relu().t())[2:],
        True,
    ),
    "weights of any sign": (lambda: (x() @ F.pad(values(), (0, 1), value=1.0))[:, 2:], False),
    "in front": (lambda: (x().relu() @ F.pad(values(), (1, 0), value=1.0))[:, :1], False),
    "cut from the end": (lambda: (x().relu() @ F.pad(values(), (0, 1)))[:, -1:], True),
}


def values() -> torch.Tensor:
    return torch.randn(4, 2, requires_grad=True)


@pytest.mark.parametrize("name", APPENDED)
def test_sums_of_what_was_appended_are_statistics(name):
    make, is_statistic = APPENDED[name]
    assert (sign_of(make()) == Sign.STATISTIC) is is_statistic
