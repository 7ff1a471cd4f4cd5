"""Functions of GPU programs, as far as they can be checked without Triton; `on_triton` runs them."""

from __future__ import annotations

import inspect
import re
from fractions import Fraction

from lightning_normdyn.geometry import triton_functions

HALF_PI = Fraction("1.57079632679489661923132169163975144209858469968755")


def test_half_a_turn_in_parts_of_which_the_first_are_short():
    """20 more bits fit a multiple of each, so that multiples up to 2**20 are exact."""
    text = inspect.getsource(triton_functions)
    parts = [Fraction(float(part)) for part in re.findall(r"quarter \* constant\(([^,]+),", text)]
    assert len(parts) == 3
    for part in parts[:2]:
        assert part.numerator.bit_length() <= 33
    assert abs(sum(parts) - HALF_PI) < Fraction(1, 10**36)


def test_terms_that_the_series_leave_out():
    """As the docstrings say: of the whole, at the end of the range that arguments are brought
    to."""
    largest = 0.198913
    assert largest**26 / 27 < 2.2e-20
    quarter = 0.785399
    sine, cosine = quarter**18 / 121645100408832000, quarter**20 / 2432902008176640000
    assert sine < 1.1e-19
    assert cosine < 4e-21
